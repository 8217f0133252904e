"""What all DART models share: loading, freezing of the scorer, outputs, a classifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_region import RegionConfig
from .region_partition import Regions
from .region_scorer import DEAD_SCORER, GainAndOffset, RegionScorer
from .region_tokenizer import PatchProjection, RegionTokenizer
from .score_statistics import ScoreStatistics


@dataclass
class DartModelOutput(BaseModelOutputWithPooling):
    """[`BaseModelOutputWithPooling`] and, on request, the regions of the tokens."""

    regions: Regions | None = None


@dataclass
class DartImageClassifierOutput(ImageClassifierOutput):
    """[`ImageClassifierOutput`] and, on request, the regions of the tokens."""

    regions: Regions | None = None


@dataclass
class DistilledImageClassifierOutput(DartImageClassifierOutput):
    """[`DartImageClassifierOutput`] and the outputs of both classifiers of a distilled model.

    Args:
        cls_logits, distillation_logits: (B, num_labels) of the class token's and of the distillation token's
            classifier; `logits` is their mean. None without a distillation head.
    """

    cls_logits: torch.FloatTensor | None = None
    distillation_logits: torch.FloatTensor | None = None


class RegionPreTrainedModel(PreTrainedModel):
    """Initial weights, loading, and freezing of the scorer. Every base model has its scorer in `tokenizer`."""

    config: RegionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # So that transformers loads the scorer in the precision that it keeps by itself.
    _keep_in_fp32_modules_strict = ["scorer"]
    _can_compile_fullgraph = True

    def __init__(self, config: RegionConfig, *args: Any, **kwargs: Any) -> None:
        wanted = self.config_class
        if getattr(config, "model_type", wanted.model_type) != wanted.model_type:
            raise ValueError(f"{type(self).__name__} takes a {wanted.__name__}, got a {type(config).__name__}.")
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if any(module is part for part in self.scorer.trunk.modules()):
            # Trunks stay as their own library initialises them.
            return
        if isinstance(module, RegionScorer):
            # transformers' `init` functions change no loaded tensor, so the flag tells whether the scorer is new.
            init.constant_(module.trunk_loaded, -1)
            if not module.trunk_loaded.is_meta and module.trunk_loaded.item() == -1:
                module.initialize_trunk()
                module.trunk_loaded.zero_()
        elif isinstance(module, ScoreStatistics):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, GainAndOffset):
            init.ones_(module.gain)
            init.zeros_(module.offset)
        elif isinstance(module, RegionTokenizer):
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, (nn.Linear, nn.Conv2d, PatchProjection)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> "RegionPreTrainedModel | tuple[RegionPreTrainedModel, dict[str, Any]]":
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        trunk = model.scorer.trunk
        absent = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
        incomplete = any("tokenizer.scorer.trunk." in name for name in absent)
        if incomplete or dict(trunk.named_buffers()).keys() - trunk.state_dict().keys():
            model.scorer.initialize_trunk()
        if incomplete:
            # The checkpoint may say that its trunk has weights, but a part of this one is new.
            model.scorer.trunk_loaded.zero_()
        # Loading makes every parameter trainable again.
        model.scorer.set_frozen(model.config.scorer_frozen)
        return (model, info) if output_loading_info else model

    def post_init(self) -> None:
        super().post_init()
        if self.base_model is self and self.config.partition != "uniform":
            self.scorer.warn_if_dead()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # The saved code has the model without a head too, so `AutoModel` can load it from a classifier's folder.
        if self._auto_class is not None:
            bare = type(self.base_model)
            self.config.auto_map = {
                "AutoModel": f"{bare.__module__.rpartition('.')[2]}.{bare.__name__}",
                **(getattr(self.config, "auto_map", None) or {}),
            }
        super().save_pretrained(*args, **kwargs)

    @property
    def scorer(self) -> RegionScorer:
        """The scoring network inside the tokenizer."""
        return self.base_model.tokenizer.scorer

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder. transformers would take the first weights, which are the scorer's float32."""
        return next(self.get_input_embeddings().parameters()).dtype

    def score(self, pixel_values: Tensor) -> Tensor:
        """The scores that the regions follow: (B, C, H, W) -> (B, G, G)."""
        return self.base_model.tokenizer.score(pixel_values, self.look)

    @torch.no_grad()
    def look(self, pixel_values: Tensor, num_layers: int) -> Tensor:
        """The map of the first layers on a plain grid of small images, which `scorer="encoder"` reads.

        The images (B, C, H, W) are resized to P·G pixels a side, for G×G patches of P pixels, and the map to G×G cells:
        (B, D, G, G). The layers run in evaluation mode with their weights of the moment, and learn nothing from this.

        Args:
            pixel_values: Normalised, in float32 or float64. So is the map, whatever the precision of the layers.
            num_layers: The number of layers, from 0.
        """
        grid_size = self.config.score_grid_size
        images = resized(pixel_values, grid_size * self.config.patch_size)
        training = [module for module in self.modules() if module.training]
        try:
            for module in training:
                module.training = False
            # The layers may be on another device.
            return resized(self.base_model.first_layers(images, num_layers).to(images), grid_size)
        finally:
            for module in training:
                module.training = True

    def first_layers(self, images: Tensor, num_layers: int) -> Tensor:
        """Embedding and first layers, for [`look`]: images (B, C, P·G, P·G) -> a map (B, D, h, w).

        Every base model has this method. D is `config.layer_widths[num_layers]`. The map need not have G×G cells, and
        holds no class token.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `first_layers`, so scorer='encoder' cannot be used.")

    def load_pretrained_scorer(self, source: str | Path | None = None) -> None:
        """Give the scorer's trunk ImageNet weights, from its library's download or from a local file.

        See [`RegionScorer.load_pretrained_trunk`] for the accepted files and the errors.
        """
        self.scorer.load_pretrained_trunk(source)

    def freeze_scorer(self, frozen: bool = True) -> None:
        """Keep the scorer's trunk in evaluation mode and without gradient; with `frozen=False` let it train."""
        self.scorer.set_frozen(frozen)

    def require_scorer_weights(self) -> None:
        """Raise a ValueError if the scorer's trunk is frozen and never got weights.

        The regions of such a model stay almost uniform, whatever it is trained on.
        """
        if self.config.partition != "uniform" and self.scorer.is_dead:
            raise ValueError(DEAD_SCORER.format(scorer=self.config.scorer))

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.tokenizer.projection

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.tokenizer.projection = value


class ImageClassifierMixin:
    """A linear classifier on the pooled output of the base model."""

    def __init__(self, config: RegionConfig, base_model: RegionPreTrainedModel, num_features: int) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, base_model)
        self.classifier = build_classifier(num_features, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        num_patches: int | None = None,
        output_regions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DartImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W), floating point, normalised as [`DartImageProcessor`] does.
            labels: Class indices (B,); for `config.problem_type` "multi_label_classification" zeros and ones
                (B, num_labels) in floating point, for "regression" numbers. With labels the loss is returned.
            num_patches: Token budget N of this call. The default is `config.num_patches`.
            output_regions: Also return `regions`: where the tokens are.

        Returns:
            `logits` (B, num_labels); with labels `loss`; with `output_regions` `regions`.

        Raises:
            ValueError: The number of labels is not the number of images; or see [`RegionPartitioner.check`].
        """
        check_labels(labels, pixel_values)
        outputs = self.base_model(
            pixel_values,
            num_patches=num_patches,
            output_regions=output_regions,
            **{**self.base_model_arguments(kwargs), **kwargs},
        )
        classified = self.classify(outputs)
        if labels is not None:
            classified.loss = self.loss_function(labels, classified.logits, self.config, **kwargs)
        classified.hidden_states = outputs.hidden_states
        classified.attentions = outputs.attentions
        classified.regions = outputs.regions
        return classified

    def base_model_arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for the base model that depend on the caller's `kwargs`, which overrule them."""
        return {}

    def classify(self, outputs: DartModelOutput) -> DartImageClassifierOutput:
        """Outputs of the base model -> logits."""
        return DartImageClassifierOutput(logits=self.classifier(outputs.pooler_output))


def resized(images: Tensor, size: int) -> Tensor:
    """Images or maps (B, C, h, w) at `size` × `size`, bilinear and without aliasing."""
    if images.shape[2:] == (size, size):
        return images
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def check_labels(labels: Tensor | None, pixel_values: Tensor) -> None:
    """Raise a ValueError unless there is a label, or a row of labels, for each image."""
    if labels is not None and labels.shape[:1] != pixel_values.shape[:1]:
        raise ValueError(
            f"labels must have one entry per image, got shape {tuple(labels.shape)} for {pixel_values.shape[0]} images."
        )


def build_classifier(num_features: int, num_labels: int) -> nn.Module:
    return nn.Linear(num_features, num_labels) if num_labels > 0 else nn.Identity()


def drop_path_rates(highest: float, num_layers: int) -> list[float]:
    """Stochastic depth that grows linearly with depth, from 0 to `highest` (arXiv 1603.09382)."""
    return [highest * depth / max(num_layers - 1, 1) for depth in range(num_layers)]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights, with the arguments and results of `ALL_ATTENTION_FUNCTIONS`.

    transformers' own rounds float64 to float32.
    """
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
