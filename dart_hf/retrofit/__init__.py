"""Region tokens for pretrained encoders."""

from dart_hf.retrofit.dartify import dartify
from dart_hf.retrofit.vision_tower import set_image_tokens

__all__ = ["dartify", "set_image_tokens"]
