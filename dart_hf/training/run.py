"""A run of `dart-hf train`: settings -> a fine-tuned model in a folder."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from dart_hf.data.batches import without_worker_traceback
from dart_hf.data.class_table import class_table
from dart_hf.data.image_data import ImageData, load_image_data
from dart_hf.training.checkpoints import is_last, latest_complete_checkpoint, remove_incomplete_checkpoints
from dart_hf.training.facts import summary, training_facts, with_metrics
from dart_hf.training.output_folder import (
    begin_run,
    check_output,
    check_same_data,
    own_settings,
    read_facts,
    save_model,
    write_facts,
)
from dart_hf.training.progress import metric_text, progress_callback
from dart_hf.training.settings import DataArguments, TrainingSettings
from dart_hf.training.start_model import load_dart, start_model
from dart_hf.training.trainer import DartTrainer


def run_training(settings: TrainingSettings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Fine-tune a model, write it to the output folder, and evaluate it.

    The folder then has the model, its code and its image processor, `training.json` with the facts of the training,
    `held_out.json` if images were held out, and checkpoints. A killed run goes on with `resume`, on a CPU to the same
    weights as if nothing had happened.

    Returns:
        The contents of `training.json`.

    Raises:
        ValueError: A setting is out of range, model, data and teacher do not fit together, or the data of a resumed run
            has changed.
        OSError: A source does not exist, cannot be fetched or cannot be read; or the output folder is in use.
    """
    arguments, output = settings.trainer, Path(settings.data.output)
    is_main = arguments.process_index == 0
    report = say if is_main else lambda line: None
    _check_arguments(settings)
    if is_main:
        check_output(output, settings.run.resume)
    with arguments.main_process_first():
        checkpoint = latest_complete_checkpoint(output) if settings.run.resume else None
        data = _load_data(settings.data)
    set_seed(arguments.seed)
    if data.evaluation is None:
        arguments.eval_strategy, arguments.load_best_model_at_end = IntervalStrategy.NO, False
    if settings.run.resume:
        if is_main:
            check_same_data(output, data)
        done = _finished_run(settings, data, checkpoint)
        if done is not None:
            report(
                f"The training in {output} is complete after {done['steps']} steps; --num-train-epochs or --max-steps "
                "trains on."
            )
            return done
        report(
            f"Going on from {checkpoint}."
            if checkpoint
            else "There is no complete checkpoint: starting from the beginning."
        )

    model, image_processor = load_dart(checkpoint) if checkpoint else start_model(settings.model, data, report)
    trainer = _make_trainer(settings, data, model, image_processor)
    if is_main:
        if own_settings(output) is not None:
            remove_incomplete_checkpoints(output)
        begin_run(output, settings.given, data)
    for line in class_table(data):
        report(line)
    report(summary(model, data))
    progress = None if arguments.disable_tqdm else progress_callback()
    trainer.show_progress(progress)
    with without_worker_traceback(), _closed_at_the_end(progress), _told_how_to_resume(output, report):
        trainer.train(checkpoint)
        facts = training_facts(settings, data, trainer)
        # Before the evaluation, which may fail.
        save_model(trainer, output, facts, data)
        report(f"Wrote {output}")
        if data.evaluation is not None:
            metrics = trainer.evaluate()
            facts = with_metrics(training_facts(settings, data, trainer), metrics)
            if is_main:
                write_facts(output, facts)
    if metric := metric_text(facts["metrics"]):
        name, _, value = metric.rpartition(" ")
        report(f"{name.capitalize()}: {value}")
    if facts["skipped_images"]:
        report(f"Images that could not be read were skipped {facts['skipped_images']} times.")
    return facts


def _check_arguments(settings: TrainingSettings) -> None:
    arguments, reference = settings.trainer, settings.run.reference_batch_size
    if settings.data.streaming and arguments.max_steps < 1:
        raise ValueError("streaming: a stream has no length; give the number of steps with --max-steps.")
    if arguments.max_steps == 0 or arguments.num_train_epochs <= 0:
        raise ValueError(
            f"There is nothing to train with max_steps={arguments.max_steps}, num_train_epochs="
            f"{arguments.num_train_epochs:g}."
        )
    if arguments.gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps must be at least 1, got {arguments.gradient_accumulation_steps}."
        )
    if reference is not None and reference < 1:
        raise ValueError(f"reference_batch_size must be at least 1, got {reference}.")
    if arguments.remove_unused_columns:
        raise ValueError("remove_unused_columns=True would remove the images; leave it out.")


def _load_data(arguments: DataArguments) -> ImageData:
    return load_image_data(
        arguments.data,
        subset=arguments.subset,
        train_split=arguments.train_split,
        evaluation_split=arguments.evaluation_split,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        class_names=arguments.class_names,
        held_out=arguments.held_out,
        streaming=arguments.streaming,
    )


def _finished_run(settings: TrainingSettings, data: ImageData, checkpoint: Path | None) -> dict[str, Any] | None:
    """The facts of a run that has nothing left to do; None if it has."""
    facts = read_facts(Path(settings.data.output))
    if facts is None or checkpoint is None or not is_last(checkpoint, settings.trainer):
        return None
    return facts if facts["metrics"] or data.evaluation is None else None


def _make_trainer(
    settings: TrainingSettings, data: ImageData, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> DartTrainer:
    arguments = settings.trainer
    if settings.run.reference_batch_size:
        per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        arguments.learning_rate *= per_step / settings.run.reference_batch_size
    try:
        return DartTrainer(
            model,
            arguments,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=image_processor,
            recipe=settings.recipe,
        )
    except RuntimeError as error:
        # transformers raises it if report_to names a package that is missing.
        raise ValueError(str(error).strip().partition("\n")[0]) from error


@contextmanager
def _closed_at_the_end(progress: Any) -> Iterator[None]:
    try:
        yield
    finally:
        if progress is not None:
            progress.close()


@contextmanager
def _told_how_to_resume(output: Path, report: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        report(f"To go on from the last checkpoint: dart-hf train --output {shlex.quote(str(output))} --resume")
        raise
