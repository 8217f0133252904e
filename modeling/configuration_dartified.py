"""Configuration of a pretrained encoder that reads region tokens."""

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_region import RegionConfig, checked


@checked
class DartifiedConfig(RegionConfig):
    """Configuration of a pretrained encoder that reads region tokens. [`dart_hf.dartify`] makes it.

    The settings of scorer and partition are those of [`RegionConfig`]. There are three more:

    Args:
        encoder_config: The configuration of the original model, or its dictionary. Labels and problem type are read
            from this configuration, not from the original's.
        encoder_class: The name of the original's class in transformers, such as `"Dinov2Model"`.
        encoder_arguments: Further arguments of that class, such as `{"add_pooling_layer": False}`.
    """

    model_type = "dartified"
    sub_configs = {"encoder_config": AutoConfig}
    keys_to_ignore_at_inference = ["regions", "cls_logits", "distillation_logits"]

    encoder_config: dict | PreTrainedConfig | None = None
    encoder_class: str = "ViTModel"
    encoder_arguments: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None:
            self.encoder_config = AutoConfig.for_model("vit")
        elif isinstance(self.encoder_config, dict):
            self.encoder_config = AutoConfig.for_model(**self.encoder_config)
        super().__post_init__(**kwargs)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The original's settings of its vision encoder."""
        return getattr(self.encoder_config, "vision_config", self.encoder_config)

    @property
    def hidden_size(self) -> int:
        """Width D of a token."""
        return self.vision_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.vision_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.vision_config.num_attention_heads


__all__ = ["DartifiedConfig"]
