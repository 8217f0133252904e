"""Training: `DartTrainer`, its recipe, and the pieces of both for a `Trainer` of your own."""

from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.image_augmentation import training_transform
from dart_hf.data.image_data import load_image_data
from dart_hf.data.seeded_rows import SeededRows, SeededStream
from dart_hf.evaluation.metrics import classification_accuracy
from dart_hf.training.checkpoints import latest_complete_checkpoint
from dart_hf.training.classifier import train_classifier
from dart_hf.training.distillation import DistillationLoss
from dart_hf.training.ema import load_average
from dart_hf.training.epoch_callback import EpochCallback
from dart_hf.training.lora import lora_config
from dart_hf.training.losses import mean_squared_error, multi_label_cross_entropy, soft_target_cross_entropy
from dart_hf.training.optimizer import parameter_groups
from dart_hf.training.recipe import Recipe
from dart_hf.training.running_scores import RunningScoresCallback
from dart_hf.training.teacher import Teacher
from dart_hf.training.trainer import DartTrainer

__all__ = [
    "DartTrainer",
    "DistillationLoss",
    "EpochCallback",
    "ImageClassificationCollator",
    "MixImages",
    "Recipe",
    "RunningScoresCallback",
    "SeededRows",
    "SeededStream",
    "Teacher",
    "classification_accuracy",
    "latest_complete_checkpoint",
    "load_average",
    "load_image_data",
    "lora_config",
    "mean_squared_error",
    "multi_label_cross_entropy",
    "parameter_groups",
    "soft_target_cross_entropy",
    "train_classifier",
    "training_transform",
]
