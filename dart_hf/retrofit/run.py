"""A run of `dart-hf dartify`: a pretrained encoder and images without labels -> a dartified model in a folder."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from dart_hf.data.batches import without_worker_traceback
from dart_hf.files import absolute_source, atomic_folder, atomic_write, check_output_folder, move_model_files
from dart_hf.retrofit.dartify import dartify
from dart_hf.retrofit.distillation import distill, write_record
from dart_hf.retrofit.original import load_original, processor_for
from dart_hf.retrofit.unlabelled_images import unlabelled_images
from dart_hf.training.checkpoints import latest_complete_checkpoint

SETTINGS_FILE = "dartify_settings.json"


@dataclass(frozen=True)
class DartifySettings:
    """What `dart-hf dartify` does; the arguments of [`dartify`] and [`distill`].

    Args:
        model: Folder or Hub id of the original.
        num_patches: Token budgets. The first becomes the model's own.
        data: Folder of images; without it, or with `steps=0`, nothing is learned.
        lora: Rank of LoRA's updates.
    """

    model: str
    num_patches: Sequence[int]
    data: str | None = None
    partition: str = "flow"
    scorer: str = "detail"
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-4
    lora: int | None = None
    freeze_encoder: bool = False
    teacher_size: int | None = None
    held_out: float = 0.1
    seed: int = 0


def run_dartify(
    settings: DartifySettings | None,
    output: str | os.PathLike,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Dartify a model, let it learn from its original, and write it to the output folder.

    The folder then has the model, its code, its image processor, and after distillation `distillation.json` and the
    last checkpoint.

    Args:
        settings: What to do; a resumed run reads it from the folder.
        output: A new or an empty folder; with `resume` that of the run.
        resume: Go on from the last complete checkpoint.
        say: Called with each line for the user.

    Returns:
        The contents of `distillation.json`; None if nothing was learned.

    Raises:
        ValueError: A setting is out of range, or model and images do not fit; see [`dartify`] and [`distill`].
        OSError: A source does not exist or cannot be fetched, or the output folder is in use.
    """
    output = Path(output)
    if resume:
        settings = earlier_settings(output)
    else:
        check_output_folder(output)
    learns = settings.data is not None and settings.steps > 0
    images = unlabelled_images(settings.data) if learns else None
    original = load_original(settings.model)
    set_seed(settings.seed)
    student = dartify(
        original,
        num_patches=settings.num_patches[0],
        partition=settings.partition,
        scorer=settings.scorer,
    )
    processor = processor_for(original, settings.model, student.config.image_size)
    if not learns:
        with atomic_folder(output) as folder:
            student.save_pretrained(folder)
            processor.save_pretrained(folder)
        say(f"Wrote {output}")
        return None

    with _begun(output, settings, resume):
        record = distill(
            student,
            original,
            images,
            processor,
            output,
            num_patches=settings.num_patches,
            teacher_size=settings.teacher_size,
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lora=None if settings.lora is None else {"r": settings.lora},
            freeze_encoder=settings.freeze_encoder,
            held_out=settings.held_out,
            resume=resume,
            seed=settings.seed,
        )
    record = {
        "started_from": absolute_source(settings.model),
        **record,
        "data": {"source": absolute_source(settings.data), **record["data"]},
    }
    write_record(output, record)
    unfinished = output / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    student.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    move_model_files(unfinished, output)
    say(f"Wrote {output}")
    for line in similarity_lines(record):
        say(line)
    return record


@contextmanager
def _begun(output: Path, settings: DartifySettings, resume: bool) -> Iterator[None]:
    """Write the settings for a resumed run. A new run that fails before its first checkpoint leaves nothing."""
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / SETTINGS_FILE) as unfinished:
        unfinished.write_text(json.dumps(asdict(settings), indent=2) + "\n")
    try:
        with without_worker_traceback():
            yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(
            f"To go on from the last checkpoint: dart-hf dartify --output {shlex.quote(str(output))} --resume"
        )
        raise
    except Exception:
        # The folder of a resumed run can hold a finished model.
        if not resume and latest_complete_checkpoint(output) is None:
            shutil.rmtree(output)
        raise


def earlier_settings(output: Path) -> DartifySettings:
    """The settings of the run that an output folder belongs to.

    Raises:
        FileNotFoundError: It belongs to none.
    """
    try:
        return DartifySettings(**json.loads((output / SETTINGS_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise FileNotFoundError(
            f"resume: the folder {str(output)!r} holds no distillation to resume: it has no {SETTINGS_FILE}."
        ) from error


def similarity_lines(record: dict[str, Any]) -> list[str]:
    """The similarity to the original before and after, for a reader."""
    count = record["data"]["num_held_out_images"]
    return [
        f"Similarity to the original on {count} held-out images, before → after:",
        *(
            f"{row['num_patches']:6d} tokens: image {row['pooled_before']:.3f} → {row['pooled_after']:.3f}, "
            f"patches {row['patches_before']:.3f} → {row['patches_after']:.3f}"
            for row in record["similarity"]
        ),
    ]
