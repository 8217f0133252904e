"""Distillation without labels: a dartified model learns to give the features of its original."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel

from dart_hf.files import atomic_write
from dart_hf.retrofit.feature_trainer import FeatureTrainer, FeatureWeights
from dart_hf.retrofit.features import (
    OriginalFeatures,
    check_same_width,
    image_similarity,
    region_features,
)
from dart_hf.retrofit.image_processors import check_same_normalization, resized_processor, side_of
from dart_hf.retrofit.unlabelled_images import FeatureCollator, image_rows, split_rows
from dart_hf.training.facts import package_versions
from dart_hf.training.lora import lora_config
from dart_hf.training.progress import progress_callback
from dart_hf.training.recipe import Recipe

DISTILLATION_FILE = "distillation.json"


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    images: str | os.PathLike | Sequence[Any],
    image_processor: BaseImageProcessor,
    output: str | os.PathLike,
    *,
    num_patches: int | Sequence[int] | None = None,
    teacher_processor: BaseImageProcessor | None = None,
    teacher_size: int | None = None,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    scorer_learning_rate: float | None = 1e-3,
    pooled_weight: float = 1.0,
    patches_weight: float = 1.0,
    cosine_weight: float = 0.9,
    smooth_l1_weight: float = 0.1,
    freeze_encoder: bool = False,
    lora: Mapping[str, Any] | None = None,
    held_out: float = 0.1,
    resume: bool = False,
    seed: int = 0,
    progress: TrainerCallback | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Let a dartified model learn from its original to give the same features, on images without labels.

    For each image it learns the original's pooled output (or class token, see [`pooled_features`]), and the original's
    patch tokens. For the latter its region tokens are placed back on the original's grid by [`place_back`].

    Args:
        student: The dartified model, also one with a classifier, which stays as it is. It is changed in place.
        teacher: The original; it only computes. It must be another object than the one that was dartified.
        images: A folder of images, nested or not; a data set with a column `image`; or a list of images or paths.
        image_processor: The student's.
        output: Folder for checkpoints and for the record, `distillation.json`. Save the student there too, and its
            model card will tell of the distillation.
        num_patches: Token budgets; each batch has one of them, drawn at random. The default is the student's own.
        teacher_processor: The teacher's image processor; the default is the student's. Both must show the same part of
            an image.
        teacher_size: Side in pixels of the images that the teacher reads. With more than the student has, the student
            learns of details that its own grid of patches would miss.
        steps, batch_size, learning_rate: Number of batches, images in each, and the highest learning rate: it grows
            over the first tenth of the steps, then falls as a cosine.
        scorer_learning_rate: Learning rate of the scorer, which starts new; None for that of the rest.
        pooled_weight, patches_weight: Weights of the two kinds of features in the loss.
        cosine_weight, smooth_l1_weight: Weights of cosine distance and smooth L1, see [`feature_distance`].
        freeze_encoder: Let only the scorer and the patch embedding learn.
        lora: Let only low-rank updates of the encoder and the scorer learn: settings of [`lora_config`], `{}` for its
            defaults. The updates are merged into the weights at the end. It needs peft.
        held_out: Share of the images (at least one, at most 500) on which the similarity is measured.
        resume: Go on from the last complete checkpoint in `output`, with the same arguments as before.
        seed: Seed of the order of the images, the budgets, and all else that is random.
        progress: Shows the progress; without it a bar on a terminal, and a few lines elsewhere.
        arguments: Other fields of `TrainingArguments`, such as `bf16=True`.

    Returns:
        The contents of `distillation.json`. `similarity` has the mean cosine similarity to the original's features on
        the held-out images before and after, for each budget: of the pooled features and of the patches.

    Raises:
        ValueError: An argument is out of range; there are too few images or none can be read; or student, teacher and
            image processors do not fit together.
        OSError: The images do not exist or cannot be downloaded.
        ImportError: `lora` is given and peft is not installed.
    """
    weights = FeatureWeights(pooled_weight, patches_weight, cosine_weight, smooth_l1_weight)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if freeze_encoder and lora is not None:
        raise ValueError("Give freeze_encoder or lora, not both: LoRA updates the encoder.")
    _check_apart(student, teacher)
    teacher_processor = teacher_processor or image_processor
    check_same_normalization(image_processor, teacher_processor)
    if teacher_size is not None:
        teacher_processor = resized_processor(teacher_processor, teacher_size)
    encoder = student.base_model
    budgets = _budgets(encoder.config.num_patches if num_patches is None else num_patches)
    collator = FeatureCollator(image_processor, teacher_processor, budgets)
    rows, held_out_rows = split_rows(image_rows(images), held_out)
    readable = collator.readable(held_out_rows)
    if not readable:
        raise ValueError(f"data: no image can be read of the {len(held_out_rows)} drawn to compare with.")
    held_out_rows = Subset(held_out_rows, readable)

    set_seed(seed)
    settings = TrainingArguments(
        os.fspath(output),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 10,
            "weight_decay": 0.01,
            "seed": seed,
            "logging_steps": 10,
            "save_steps": max(steps // 10, 1),
            "save_total_limit": 1,
            "report_to": "none",
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **arguments,
        },
    )
    student.to(settings.device)
    original = OriginalFeatures(teacher.to(settings.device), encoder, side_of(teacher_processor))
    batches = DataLoader(held_out_rows, batch_size, collate_fn=collator)
    before = similarity(encoder, original, batches, budgets)
    with _trained_part(encoder, freeze_encoder, lora) as trained:
        trainer = FeatureTrainer(
            trained,
            settings,
            data_collator=collator,
            train_dataset=rows,
            processing_class=image_processor,
            recipe=Recipe(scorer_learning_rate=scorer_learning_rate),
            original=original,
            num_prefix_tokens=encoder.num_prefix_tokens,
            weights=weights,
        )
        progress = progress or progress_callback()
        trainer.show_progress(progress)
        try:
            trainer.train(resume or None)
        finally:
            getattr(progress, "close", lambda: None)()
    student.eval()
    record = {
        "data": {"num_train_images": len(rows), "num_held_out_images": len(held_out_rows)},
        "skipped_images": collator.num_skipped,
        "trained": "scorer and patch embedding" if freeze_encoder else "all weights" if lora is None else "LoRA",
        "steps": trainer.state.global_step,
        "batch_size": batch_size,
        "learning_rate": settings.learning_rate,
        "image_size": side_of(image_processor),
        "teacher_size": side_of(teacher_processor),
        "similarity": _comparison(before, similarity(encoder, original, batches, budgets)),
        "versions": package_versions(),
    }
    if trainer.is_world_process_zero():
        write_record(Path(output), record)
    return record


@torch.no_grad()
def similarity(
    encoder: PreTrainedModel, original: OriginalFeatures, batches: DataLoader, budgets: Sequence[int]
) -> dict[int, dict[str, float]]:
    """The mean cosine similarity of a dartified encoder's features to the original's: budget -> "pooled", "patches".

    Raises:
        ValueError: The features have different numbers of channels.
    """
    encoder.eval()
    found = defaultdict(lambda: defaultdict(list))
    for batch in batches:
        wanted = original(batch["teacher_pixel_values"].to(encoder.device))
        pixel_values = batch["pixel_values"].to(encoder.device)
        for budget in budgets:
            features = region_features(
                encoder, encoder.num_prefix_tokens, pixel_values, budget, wanted.patches.shape[2:]
            )
            check_same_width(features, wanted)
            for name, cosines in image_similarity(features, wanted).items():
                found[budget][name].append(cosines)
    return {
        budget: {name: torch.cat(cosines).mean().item() for name, cosines in kinds.items()}
        for budget, kinds in found.items()
    }


def _comparison(
    before: Mapping[int, Mapping[str, float]], after: Mapping[int, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """A row for each budget: `pooled_before`, `pooled_after`, `patches_before`, `patches_after`."""
    return [
        {
            "num_patches": budget,
            **{
                f"{name}_{when}": values[budget][name]
                for name in before[budget]
                for when, values in (("before", before), ("after", after))
            },
        }
        for budget in before
    ]


@contextmanager
def _trained_part(
    encoder: PreTrainedModel, freeze_encoder: bool, lora: Mapping[str, Any] | None
) -> Iterator[PreTrainedModel]:
    """What a trainer gets: the encoder, with only a part that learns, or inside LoRA. Afterwards it is as before."""
    trainable = {parameter: parameter.requires_grad for parameter in encoder.parameters()}
    if lora is not None:
        # First, because it says how to install peft.
        settings = lora_config(encoder, **lora)
        from peft import get_peft_model

        adapted = get_peft_model(encoder, settings)
        try:
            yield adapted
        finally:
            adapted.merge_and_unload()
    elif freeze_encoder:
        learning = {*encoder.scorer.parameters(), *encoder.get_input_embeddings().parameters()}
        for parameter in trainable:
            parameter.requires_grad_(trainable[parameter] and parameter in learning)
        yield encoder
    else:
        yield encoder
    for parameter, requires_grad in trainable.items():
        parameter.requires_grad_(requires_grad)


def _budgets(given: int | Sequence[int]) -> list[int]:
    budgets = [given] if isinstance(given, int) else list(given)
    if not budgets or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in budgets):
        raise ValueError(f"num_patches must be integers of at least 1, got {given!r}.")
    return list(dict.fromkeys(budgets))


def _check_apart(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    shared = {parameter.data_ptr() for parameter in student.parameters()}
    if any(parameter.data_ptr() in shared for parameter in teacher.parameters()):
        raise ValueError("student and teacher share weights; load the original a second time as teacher.")


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    """Write `distillation.json`."""
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / DISTILLATION_FILE) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
