"""Fill the folder that is uploaded: a complete model with its code, its records and an example image.

The model is loaded and saved again. So the upload is complete, holds the code that the model was checked with, and
nothing else that lies in the model's folder, such as checkpoints.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel
from yaml import YAMLError

from dart_hf.files import weights_sha256
from dart_hf.hub.loading import load_model
from dart_hf.hub.records import Records
from dart_hf.modeling.image_processing_dart import read_image

EXAMPLE_FORMATS = (".png", ".jpg", ".jpeg", ".webp")


def load_publishable(folder: Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a model and its image processor onto the CPU.

    Raises:
        OSError: The folder or one of its files is missing.
        ValueError: The model is not a DART model, is damaged, or has a scorer without weights.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    model, processor = load_model(folder, needs_classifier=False)
    model.require_scorer_weights()
    return model.cpu(), processor


@torch.inference_mode()
def outputs_for_noise(model: PreTrainedModel, processor: BaseImageProcessor) -> torch.Tensor:
    """Compute the logits of a fixed image of noise, or the features of a model without a classifier: (1, …) in float32.

    Raises:
        ValueError: The image processor does not fit the model, or the logits are not finite.
    """
    config = model.config
    size = (config.num_channels, config.image_size, config.image_size + config.image_size // 4)
    noise = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixel_values = processor(noise, return_tensors="pt", input_data_format="channels_first").pixel_values
    outputs = model(pixel_values)
    values = (outputs.logits if "logits" in outputs else outputs.pooler_output).float()
    if not values.isfinite().all():
        raise ValueError("The model's logits are not finite, so its training has diverged; it is not published.")
    return values


def stage_example(folder: Path, example: str | os.PathLike | None, staged: Path) -> str | None:
    """Copy the pixels of the example image that is given or that the folder has; return the name of the copy."""
    own = (folder / f"example{suffix}" for suffix in EXAMPLE_FORMATS)
    path = Path(example) if example else next((path for path in own if path.is_file()), None)
    if path is None:
        return None
    suffix = path.suffix.lower()
    name = f"example{suffix if suffix in EXAMPLE_FORMATS else '.png'}"
    # The detour over an array drops place, camera and comments.
    Image.fromarray(np.asarray(read_image(path).convert("RGB"))).save(staged / name, quality=95)
    return name


def publishable_source(record: dict[str, Any], key: str, may_name: Callable[[str], bool]) -> str | None:
    """Reduce the source in `record[key]` to what readers may see; return it if it is an id on the Hub.

    Ids that `may_name` accepts and presets stay. A path becomes its last part. Everything else is removed.
    """
    source = record.pop(key, None)
    if source is None:
        return None
    if may_name(source):
        record[key] = source
        return source
    if source.startswith("preset "):
        record[key] = source
    elif Path(source).is_absolute():
        record[key] = Path(source).name
    return None


def stage_records(records: Records, staged: Path) -> None:
    """Write the records beside the model. The digest of the weights is that of the staged file."""
    names = ("training", "evaluation", "distillation")
    contents = {name: getattr(records, name) for name in names}
    if records.evaluation:
        contents["evaluation"] = {**records.evaluation, "weights_sha256": weights_sha256(staged)}
    for name, content in contents.items():
        if content:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (staged / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def read_card(path: Path | None, place: str) -> ModelCard | None:
    """Read a model card; return None if there is none.

    Raises:
        ValueError: Its metadata is damaged. The message says that the card is `place`.
    """
    if path is None or not path.is_file():
        return None
    try:
        return ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The metadata of the model card README.md {place} cannot be read ({reason}); repair or remove the file."
        ) from error
