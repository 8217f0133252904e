"""The authors' own results on stand-in weights: see README.md beside this file."""

from golden.golden import inputs, manifest, normalised, original_state_dict, reference

__all__ = ["inputs", "manifest", "normalised", "original_state_dict", "reference"]
