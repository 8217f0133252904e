"""Convert pretrained ViTs and DeiTs of transformers and timm into DART models to fine-tune.

A DART with one equal region for each of the ViT's patches computes the ViT's own logits with the ViT's weights.
Fine-tuning then lets the regions follow the content. An encoder without a classifier is treated as a classifier of no
classes; its "logits" are then the class token's normalised features.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers.utils import logging

from dart_hf.conversion.tensors import renamed_tensors
from dart_hf.conversion.vit_source import ViT
from dart_hf.conversion.vit_timm import add_default_tag, read_timm_vit
from dart_hf.conversion.vit_transformers import read_transformers_vit
from dart_hf.files import atomic_folder, check_output_folder
from dart_hf.hub.loading import load_config, without_warnings
from dart_hf.modeling.configuration_dart import DartConfig
from dart_hf.modeling.image_processing_dart import DartImageProcessor
from dart_hf.modeling.modeling_dart import DartForImageClassification
from dart_hf.modeling.region_partition import PARTITIONS

logger = logging.get_logger(__name__)

# Largest difference from the source's logits, as a share of the largest logit, or of 1 where that is smaller.
TOLERANCE = 1e-4


def convert_vit(
    source: str | os.PathLike,
    output: str | os.PathLike,
    partition: str = "uniform",
    scorer: str | None = None,
    scorer_weights: str | os.PathLike | None = None,
    score_grid_size: int | None = None,
    report: Callable[[str], None] = logger.warning,
) -> Path:
    """Convert a ViT or DeiT into a folder with model, configuration and image processor.

    With `partition="uniform"` and as many tokens as the source has patches, the model computes the source's logits, to
    1e-4 of the largest logit (or of 1 if all are smaller). This is checked before anything is written. A source without
    a classifier becomes a [`DartModel`], and the class token's normalised features are compared.

    Args:
        source: A folder or Hub id of a `ViTModel`, `DeiTModel`, `ViTForImageClassification`,
            `DeiTForImageClassification` or `DeiTForImageClassificationWithTeacher` of transformers, or of a plain or
            distilled ViT of timm, such as `timm/deit_tiny_patch16_224.fb_in1k`; `timm/deit_tiny_patch16_224` stands
            for timm's default weights of that name. An existing folder wins over a Hub id.
        output: New or empty folder to write. It appears complete or not at all.
        partition: `config.partition` of the result: `"uniform"`, `"flow"` or `"grid"`.
        scorer: The scorer (see [`DartConfig`]); the default is that of the preset of about this width.
        scorer_weights: A local file with the trunk's weights, or `"imagenet"`, which the trunk's library downloads.
            The default leaves a pretrained trunk without weights; load some before you train with "flow".
        score_grid_size: Side G of the score grid and of the position table. The default is the number of patches along
            a side of the source's image. Another size resamples the position table, which changes the logits.
        report: Called with each sentence that the user should read.

    Returns:
        `output` as a path.

    Raises:
        ValueError: An argument is out of range, or the source is not such a model, has something that DART does not
            have, or is damaged or incomplete.
        OSError: The source or the trunk's weights cannot be found or downloaded, or `output` is in use.
    """
    if partition not in PARTITIONS:
        raise ValueError(f"partition must be one of {', '.join(map(repr, PARTITIONS))}, got {partition!r}.")
    if score_grid_size is not None and score_grid_size < 1:
        raise ValueError(f"score_grid_size must be at least 1, got {score_grid_size}.")
    output = Path(output)
    check_output_folder(output)
    model, processor = dart_from_vit(source, partition, scorer, scorer_weights, score_grid_size, report)
    with atomic_folder(output) as folder:
        (model if model.num_labels else model.dart).save_pretrained(folder)
        processor.save_pretrained(folder)
    return output


def dart_from_vit(
    source: str | os.PathLike,
    partition: str = "uniform",
    scorer: str | None = None,
    scorer_weights: str | os.PathLike | None = None,
    score_grid_size: int | None = None,
    report: Callable[[str], None] = logger.warning,
) -> tuple[DartForImageClassification, DartImageProcessor]:
    """Make the model and image processor that [`convert_vit`] writes, with the same arguments and errors.

    A source without a classifier gives a classifier without labels.
    """
    vit = read_vit(source)
    model = _build_dart(vit, scorer)
    _check_logits(model, vit)
    if score_grid_size not in (None, vit.grid_size):
        _resample_positions(model, score_grid_size)
        report(
            f"The position table of {vit.grid_size}×{vit.grid_size} cells was resampled to {score_grid_size}×"
            f"{score_grid_size}, so the logits differ from the source's; a score grid size of {vit.grid_size} keeps it."
        )
    model.config.partition = partition
    if scorer_weights is not None:
        model.load_pretrained_scorer(None if scorer_weights == "imagenet" else scorer_weights)
    if model.scorer.is_dead:
        report(
            f"The scorer {model.config.scorer!r} has no weights yet: call model.load_pretrained_scorer(), or convert "
            "with scorer weights, before training with partition='flow'."
        )
    return model, DartImageProcessor(**vit.preparation)


def _build_dart(vit: ViT, scorer: str | None) -> DartForImageClassification:
    """Make a DART with a region for each of the ViT's patches, the ViT's weights, and a new scorer."""
    tiny, small = DartConfig.preset("tiny"), DartConfig.preset("small")
    preset = tiny if vit.settings["hidden_size"] <= tiny.hidden_size else small
    config = DartConfig(
        **vit.settings,
        num_patches=vit.grid_size**2,
        partition="uniform",
        scorer=scorer or preset.scorer,
        score_grid_size=vit.grid_size,
    )
    with without_warnings():  # dart_from_vit reports a scorer without weights
        model = DartForImageClassification(config).eval()
    state = model.state_dict()
    renamed = renamed_tensors(vit.tensors, {name: tensor.shape for name, tensor in state.items()}, vit.names)
    new_scorer = {name: tensor for name, tensor in state.items() if name.startswith("dart.tokenizer.scorer.")}
    model.load_state_dict(renamed | new_scorer)
    return model


@torch.inference_mode()
def _check_logits(model: DartForImageClassification, vit: ViT) -> None:
    """Raise a ValueError unless model and ViT give the same logits for images of noise."""
    side = model.config.image_size
    noise = torch.randn(2, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    expected = vit.classify(noise)
    deviation = (model(noise).logits - expected).abs().max() / expected.abs().max().clamp(min=1)
    # `not <=` also refuses NaN.
    if not deviation <= TOLERANCE:
        raise ValueError(
            f"source: DART with its weights gives other {'logits' if model.num_labels else 'features'}, by "
            f"{deviation:.2%} of the largest: it computes something that DART does not have."
        )


def _resample_positions(model: DartForImageClassification, grid_size: int) -> None:
    table = model.dart.tokenizer.position_embeddings.detach()
    model.dart.tokenizer.position_embeddings = nn.Parameter(resample_abs_pos_embed(table, [grid_size, grid_size]))
    model.config.score_grid_size = grid_size


def read_vit(source: str | os.PathLike) -> ViT:
    """Read a source of [`convert_vit`], which says what it can be and what is raised."""
    name = add_default_tag(os.fspath(source))
    config = load_config(name)
    if config.model_type == "timm_wrapper":
        return read_timm_vit(name, config)
    if config.model_type not in ("vit", "deit"):
        raise ValueError(f"source: {name!r} is a model of type {config.model_type!r}; ViT and DeiT are accepted.")
    return read_transformers_vit(name, config)
