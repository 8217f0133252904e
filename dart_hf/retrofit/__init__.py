"""Region tokens for pretrained encoders."""

from dart_hf.retrofit.dartify import dartify
from dart_hf.retrofit.distillation import distill
from dart_hf.retrofit.vision_tower import set_image_tokens

__all__ = ["dartify", "distill", "set_image_tokens"]
