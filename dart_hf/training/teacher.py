"""Teacher: a frozen classifier of transformers or timm that reads the images of another model's training."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dart_hf.data.labels import class_names, placeholders
from dart_hf.training.losses import at_least_float32, logits_of

# An image of this side keeps it only if the preprocessing does not resize.
PROBE_SIDE = 333


class Teacher(nn.Module):
    """A frozen image classifier with its own preprocessing: images (B, 3, H, W) from 0 to 1 -> logits (B, K).

    It keeps two things of the preprocessing: the input size and what happens to the colours. It does not crop, because
    training images are already augmented and cropped; an image of another size is resized as a whole.

    Args:
        model: Takes pixel values, returns logits or outputs with `logits`.
        preprocess: A PIL image -> pixel values (3, h, w).
        label_names: Names of the K classes in order; `LABEL_<i>`, transformers' placeholder, if they have none.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Image.Image], torch.Tensor],
        label_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.label_names = list(label_names)
        # Rescaling, normalising and swapping channels is an affine map of the colours. Four colours determine it.
        probes = [preprocess(Image.new("RGB", (PROBE_SIDE,) * 2, name)) for name in ("black", "red", "lime", "blue")]
        height, width = probes[0].shape[1:]
        self.size = None if (height, width) == (PROBE_SIDE, PROBE_SIDE) else (height, width)
        black, *primaries = (probe[:, height // 2, width // 2].float() for probe in probes)
        self.register_buffer("offset", black[:, None, None])
        self.register_buffer("colors", torch.stack(primaries, dim=1) - black[:, None])

    @classmethod
    def load(cls, source: str | os.PathLike, dtype: torch.dtype | None = None) -> "Teacher":
        """Load a trained classifier.

        Args:
            source: `timm/<name>` for a pretrained timm model; a folder that timm saved, also as `local-dir:<folder>`;
                or the folder or Hub id of any image classifier of transformers, DART among them.
            dtype: Type of its weights; without it the type that they were saved in.

        Raises:
            OSError: The model or its image processor is missing or cannot be fetched.
            ValueError: timm has no such model, or the model is no classifier with trained weights.
        """
        source = os.fspath(source)
        if _is_saved_by_timm(Path(source)):
            source = f"local-dir:{source}"
        try:
            is_timm = source.startswith(("timm/", "local-dir:"))
            teacher = cls._load_timm(source.removeprefix("timm/")) if is_timm else cls._load_transformers(source)
        except OSError as error:
            raise OSError(f"teacher={source!r} cannot be loaded: {_first_line(error)}") from error
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"teacher={source!r} cannot be used: {_first_line(error)}") from error
        if dtype is not None:
            teacher.model.to(dtype)
        return teacher

    @classmethod
    def _load_timm(cls, name: str) -> "Teacher":
        model = timm.create_model(name, pretrained=True)
        if model.num_classes < 1:
            raise ValueError("it has no classifier.")
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        names = model.pretrained_cfg.get("label_names") or placeholders(model.num_classes)
        return cls(model, transform, names)

    @classmethod
    def _load_transformers(cls, source: str) -> "Teacher":
        model, info = AutoModelForImageClassification.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False
        )
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint lacks weights ({', '.join(sorted(info['missing_keys'])[:3])}).")
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)

        def preprocess(image: Image.Image) -> torch.Tensor:
            return processor(image, return_tensors="pt")["pixel_values"][0]

        return cls(model, preprocess, class_names(model))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) from 0 to 1 -> logits (B, K) in float32 at least."""
        if self.size is not None and images.shape[2:] != self.size:
            images = interpolate(images, self.size, mode="bicubic", antialias=True)
        pixel_values = torch.einsum("dc,bchw->bdhw", self.colors, images) + self.offset
        outputs = self.model(pixel_values.to(next(self.model.parameters()).dtype))
        return at_least_float32(outputs) if isinstance(outputs, torch.Tensor) else logits_of(outputs)


def _is_saved_by_timm(folder: Path) -> bool:
    """Tell if timm wrote this folder's config.json: it names an architecture and has no transformers model type."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return "architecture" in config and "model_type" not in config


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
