"""Images and labels: from folders, files and the Hub to batches for a model."""

from dart_hf.data.batch_mixing import MixImages
from dart_hf.data.batches import evenly_spread, image_batches
from dart_hf.data.class_table import class_table
from dart_hf.data.collator import ImageClassificationCollator, is_labelled
from dart_hf.data.fingerprint import data_fingerprint
from dart_hf.data.held_out import HELD_OUT_FILE, held_out_record, select_held_out
from dart_hf.data.image_augmentation import training_transform
from dart_hf.data.image_data import ImageData, load_image_data
from dart_hf.data.labels import class_names, match_labels
from dart_hf.data.seeded_rows import SeededRows, SeededStream

__all__ = [
    "HELD_OUT_FILE",
    "ImageClassificationCollator",
    "ImageData",
    "MixImages",
    "SeededRows",
    "SeededStream",
    "class_names",
    "class_table",
    "data_fingerprint",
    "evenly_spread",
    "held_out_record",
    "image_batches",
    "is_labelled",
    "load_image_data",
    "match_labels",
    "select_held_out",
    "training_transform",
]
