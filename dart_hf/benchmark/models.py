"""The models that the benchmark compares: DART at several token budgets, timm's DeiT and transformers' ViT."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import timm
from timm.layers import set_fused_attn
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from dart_hf.modeling.configuration_region import SCORERS_WITHOUT_TRUNK
from dart_hf.presets import preset_config

NUM_LABELS = 1000
DART_IMAGE_SIZE = 448
PATCH_SIZE = 16
# Size -> hidden size and attention heads of a ViT with twelve layers, whose MLPs are four times as wide.
SIZES = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
DART_PRESETS = {
    "Ti": "tiny",
    "S": "small",
    "Vim-Ti": "vim-tiny",
    "Vim-S": "vim-small",
    "RMT-S": "rmt-small",
    "RMT-L6": "rmt-L6",
}
TIMM_NAMES = {"Ti": "deit_tiny_patch16_224", "S": "deit_small_patch16_224", "B": "deit_base_patch16_224"}
BUDGETS = {
    **dict.fromkeys(("Ti", "S"), (121, 196, 288, 392)),
    **dict.fromkeys(("Vim-Ti", "Vim-S"), (196, 392)),
    **dict.fromkeys(("RMT-S", "RMT-L6"), (196,)),
}
# ImageNet-1k top-1 in percent, as the DART paper reports them (arXiv 2506.10390).
PUBLISHED_ACCURACY = {
    "DART-Ti@121": 71.8,
    "DART-Ti@196": 73.8,
    "DART-S@196": 80.6,
    "DART-S@392": 81.8,
    "DART-Vim-Ti@196": 77.2,
    "DART-Vim-Ti@392": 78.9,
    "DART-Vim-S@196": 81.5,
    "DART-Vim-S@392": 82.2,
    "DeiT-Ti@224": 72.2,
    "DeiT-S@224": 79.8,
    "DeiT-S@384": 81.6,
    "DeiT-B@224": 81.8,
}


@dataclass(frozen=True)
class BenchmarkModel:
    """A model to measure.

    Args:
        family: `"DART"`, `"timm"` or `"transformers"`.
        size: `"Ti"`, `"S"` or `"B"`, for a DART also with the name of another encoder, such as `"Vim-Ti"`.
        image_size: Side of its images in pixels.
        num_patches: Tokens per image, without the class token.
        scorer: A DART's scorer; by default that of the preset.
    """

    family: str
    size: str
    image_size: int
    num_patches: int
    scorer: str | None = None

    @property
    def name(self) -> str:
        """`DART-<size>@<tokens>`, timm's `DeiT-<size>@<pixels>`, transformers' `ViT-<size>@<pixels>`.

        A DART with another scorer than its preset's is `DART-<size>@<tokens>/<scorer>`.
        """
        if self.family == "DART":
            return f"DART-{self.size}@{self.num_patches}" + (f"/{self.scorer}" if self.scorer else "")
        return f"{'DeiT' if self.family == 'timm' else 'ViT'}-{self.size}@{self.image_size}"

    def build(self, attention: str = "sdpa") -> nn.Module:
        """Make the model with random weights.

        Args:
            attention: `"sdpa"`, or `"eager"` for plain matrix products.
        """
        if self.family == "DART":
            config = preset_config(
                DART_PRESETS[self.size],
                num_patches=self.num_patches,
                image_size=self.image_size,
                num_labels=NUM_LABELS,
                **({"scorer": self.scorer} if self.scorer else {}),
            )
            # Vision Mamba has no attention, and its class refuses the argument.
            chosen = {} if config.model_type == "dart_vim" else {"attn_implementation": attention}
            return AutoModelForImageClassification.from_config(config, **chosen)
        if self.family == "timm":
            # timm has one switch for all models. Layers read it when they are made.
            set_fused_attn(attention == "sdpa")
            model = timm.create_model(TIMM_NAMES[self.size], img_size=self.image_size, num_classes=NUM_LABELS)
            set_fused_attn()
            return model
        hidden_size, heads = SIZES[self.size]
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=hidden_size,
                num_attention_heads=heads,
                intermediate_size=4 * hidden_size,
                image_size=self.image_size,
                num_labels=NUM_LABELS,
                attn_implementation=attention,
            )
        )


def benchmark_models() -> list[BenchmarkModel]:
    """All models of the benchmark: DART at its budgets, DeiT and ViT in the sizes and resolutions of the paper."""
    plain = [(size, 224) for size in SIZES] + [("S", 384), ("S", 448)]
    return [
        *(
            BenchmarkModel("DART", size, DART_IMAGE_SIZE, budget)
            for size, budgets in BUDGETS.items()
            for budget in budgets
        ),
        *(
            BenchmarkModel("DART", size, DART_IMAGE_SIZE, budget, scorer)
            for size, budget in (("Ti", 196), ("S", 392))
            for scorer in SCORERS_WITHOUT_TRUNK
        ),
        *(
            BenchmarkModel(family, size, image_size, (image_size // PATCH_SIZE) ** 2)
            for family in ("timm", "transformers")
            for size, image_size in plain
        ),
    ]


def choose_models(patterns: Sequence[str]) -> list[BenchmarkModel]:
    """The models whose names match one of the patterns.

    Names with a scorer match only patterns with one, such as `"DART-*/detail"`: `"*"` are the models of the paper.

    Raises:
        ValueError: A pattern matches no model.
    """
    known = benchmark_models()
    for pattern in patterns:
        if not any(_matches(entry.name, pattern) for entry in known):
            names = ", ".join(entry.name for entry in known)
            raise ValueError(f"models={pattern!r} matches no model; accepted are patterns of {names}.")
    return [entry for entry in known if any(_matches(entry.name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) and name.count("/") == pattern.count("/")
