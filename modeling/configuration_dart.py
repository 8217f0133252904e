"""Configuration of DART with a ViT (DeiT) encoder."""

from typing import Any, ClassVar

from .configuration_region import RegionTokenizerConfig, checked


@checked
class DartConfig(RegionTokenizerConfig):
    """Configuration of DART with a ViT (DeiT) encoder. The defaults are the published DART-DeiT-Ti.

    Presets are `"tiny"` (DART-DeiT-Ti), `"small"` (DART-DeiT-S) and `"base"` (the encoder of DeiT-B, the scorer of
    `"small"`). The settings of the tokenizer are those of [`RegionTokenizerConfig`]. The settings of the encoder have
    the names of [`ViTConfig`], and there are three more:

    Args:
        drop_path_rate: Stochastic depth of the last block. It grows linearly from 0 in the first block.
        distillation_token: Put a distillation token (arXiv 2012.12877) between the class token and the regions.
        distillation_head: Add a second classifier, which reads the distillation token. The logits are then the mean of
            both classifiers.

    Example:

    ```python
    >>> from dart_hf import DartConfig, DartForImageClassification

    >>> config = DartConfig.preset("small", num_patches=392, num_labels=10)
    >>> model = DartForImageClassification(config)
    ```
    """

    model_type = "dart"
    keys_to_ignore_at_inference = ["regions", "cls_logits", "distillation_logits"]
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {},
        "small": {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "scorer": "mobilenet_v3_large",
        },
        "base": {
            "hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "scorer": "mobilenet_v3_large",
        },
    }

    at_least_1: ClassVar[set[str]] = RegionTokenizerConfig.at_least_1 | {"num_hidden_layers", "intermediate_size"}

    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    intermediate_size: int = 768
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float = 1e-6
    distillation_token: bool = False
    distillation_head: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_activation()
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )
        if self.distillation_head and not self.distillation_token:
            raise ValueError("distillation_head=True needs distillation_token=True, the token that the head reads.")


__all__ = ["DartConfig"]
