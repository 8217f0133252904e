"""Fine-tune a DART model on images: a script to copy and change.

    python examples/train_image_classification.py --data photos --model dart-tiny --output flowers --mixup 0.8
    accelerate launch --config_file examples/ddp.yaml examples/train_image_classification.py --data photos ...

It takes every option of `Recipe` and of transformers' `TrainingArguments`. `dart-hf train` does the same and more: new
models, ViTs, streams, configuration files.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, TrainingArguments

from dart_hf.training import DartTrainer, Recipe, load_image_data


@dataclass
class Arguments:
    """Settings of this script alone."""

    data: str
    model: str
    output: str
    num_patches: int | None = None
    resume: bool = False


@dataclass
class Training(TrainingArguments):
    """`TrainingArguments` with other defaults."""

    num_train_epochs: float = 10
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    weight_decay: float = 0.05
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2


def main() -> None:
    arguments, recipe, training = HfArgumentParser((Arguments, Recipe, Training)).parse_args_into_dataclasses()
    training.output_dir = arguments.output
    if training.process_index == 0 and Path(arguments.output).exists() and not arguments.resume:
        raise SystemExit(f"{arguments.output} exists; choose another folder, or go on there with --resume.")

    data = load_image_data(arguments.data, held_out=0.1)
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model,
        id2label=dict(enumerate(data.label_names)),
        label2id={name: index for index, name in enumerate(data.label_names)},
        problem_type=data.problem_type,
        ignore_mismatched_sizes=True,
    )
    if arguments.num_patches is not None:
        model.config.num_patches = arguments.num_patches

    trainer = DartTrainer(
        model,
        training,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=AutoImageProcessor.from_pretrained(arguments.model),
        recipe=recipe,
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    if data.evaluation is not None:
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
