"""Fine-tune a DART model on images with the stock `Trainer`: a script to copy and change.

    python examples/train_image_classification.py --data photos --model dart-tiny --output flowers --mixup 0.8
    accelerate launch --config_file examples/ddp.yaml examples/train_image_classification.py --data photos ...

`dart-hf train` does the same and more: new models, ViTs, distillation, streams, configuration files.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from dart_hf.data.augmentation import EpochCallback
from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.image_augmentation import training_transform
from dart_hf.data.image_data import load_image_data
from dart_hf.data.seeded_rows import SeededRows
from dart_hf.evaluation.metrics import classification_accuracy
from dart_hf.training.checkpoints import (
    CompleteCheckpointCallback,
    RandomStateCallback,
    latest_complete_checkpoint,
    remove_incomplete_checkpoints,
    resume_training,
)
from dart_hf.training.ema import EmaCallback
from dart_hf.training.losses import soft_target_cross_entropy
from dart_hf.training.optimizer import layerwise_optimizer
from dart_hf.training.recipe import RunningScoresCallback


@dataclass
class Arguments:
    """What `TrainingArguments` does not have."""

    data: str
    model: str
    output: str
    num_patches: int | None = None
    auto_augment: str | None = None
    random_erasing: float = 0.0
    crop_scale: float = 1.0
    horizontal_flip: float = 0.0
    repeated_augmentation: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    layer_decay: float = 1.0
    scorer_learning_rate: float | None = None
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
    # The collator prepares the images, so they must reach it.
    remove_unused_columns: bool = False


def main() -> None:
    arguments, training = HfArgumentParser((Arguments, Training)).parse_args_into_dataclasses()
    training.output_dir = arguments.output
    if training.process_index == 0 and Path(arguments.output).exists() and not arguments.resume:
        raise SystemExit(f"{arguments.output} exists; choose another folder, or go on there with --resume.")

    data = load_image_data(arguments.data, held_out=0.1)
    labels = {
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: index for index, name in enumerate(data.label_names)},
    }
    model = AutoModelForImageClassification.from_pretrained(arguments.model, **labels, ignore_mismatched_sizes=True)
    # Training a dead scorer would learn nothing about where to look.
    model.require_scorer_weights()
    if arguments.num_patches is not None:
        model.config.num_patches = arguments.num_patches
    processor = AutoImageProcessor.from_pretrained(arguments.model)

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=SeededRows(data.train, training.seed, arguments.repeated_augmentation),
        eval_dataset=data.evaluation,
        data_collator=ImageClassificationCollator(
            processor,
            model.config.num_labels,
            transform=training_transform(
                processor,
                auto_augment=arguments.auto_augment,
                random_erasing=arguments.random_erasing,
                crop_scale=arguments.crop_scale,
                horizontal_flip=arguments.horizontal_flip,
            ),
            mix=MixImages(model.config.num_labels, arguments.mixup, arguments.cutmix, training.label_smoothing_factor),
        ),
        processing_class=processor,
        compute_loss_func=soft_target_cross_entropy,
        compute_metrics=classification_accuracy,
        optimizer_cls_and_kwargs=layerwise_optimizer(
            training, layer_decay=arguments.layer_decay, scorer_learning_rate=arguments.scorer_learning_rate
        ),
        callbacks=[
            RunningScoresCallback(),
            EpochCallback(),
            RandomStateCallback(),
            *([EmaCallback(arguments.ema_decay)] if arguments.ema_decay is not None else []),
            # Last, because it declares complete what the others have saved.
            CompleteCheckpointCallback(),
        ],
    )
    # Before 5.6 transformers left accelerate to divide the loss by the accumulation steps once more.
    trainer.accelerator.gradient_accumulation_steps = 1
    checkpoint = None
    if arguments.resume:
        checkpoint = latest_complete_checkpoint(arguments.output)
        if trainer.is_world_process_zero():
            remove_incomplete_checkpoints(arguments.output)
    resume_training(trainer, checkpoint)
    trainer.save_model()
    if data.evaluation is not None:
        print(trainer.evaluate())


if __name__ == "__main__":
    main()
