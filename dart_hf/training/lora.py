"""LoRA: adapters of PEFT that hold everything a DART model needs besides its base weights."""

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel

if TYPE_CHECKING:
    from peft import LoraConfig

# Parts of a model that a training changes in other ways than by a low-rank update.
SCORER_PARTS = ("scorer.statistics", "scorer.head")
CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "head")
# The layers of an encoder, ours or a dartified one, by the names of their modules.
LAYERS = re.compile(r"\.(?:layers?|blocks|stages)\.")


def lora_config(model: RegionPreTrainedModel, **settings: Any) -> "LoraConfig":
    """PEFT's configuration of LoRA for a DART model: `get_peft_model(model, lora_config(model))`.

    The linear layers of the encoder get low-rank updates. The score statistics, the scorer's head, a trunk that trains,
    the classifier and the statistics of BatchNorm are trained and saved as a whole, because an adapter without them
    gives other logits when it is loaded again.

    Args:
        model: The model to train. If its scorer is to train, unfreeze it before this call.
        settings: Of `peft.LoraConfig`, e.g. `r=16`; they replace the ones that this function chooses.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs the package peft: pip install peft.") from error
    modules = dict(model.named_modules())
    encoder = [name for name in modules if ".scorer." not in name and LAYERS.search(name)]
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear) and ".scorer." not in name}
    saved = [*SCORER_PARTS, *sorted(name for name in linear if name.rpartition(".")[2] in CLASSIFIERS)]
    if not model.config.scorer_frozen:
        saved.append("scorer.trunk")
    saved += [name for name, module in modules.items() if isinstance(module, nn.BatchNorm2d) and ".scorer." not in name]
    chosen = {
        "target_modules": sorted({name.rpartition(".")[2] for name in encoder if name in linear}),
        "exclude_modules": r".*\.scorer\..*",
        "modules_to_save": saved,
    }
    return LoraConfig(**{**chosen, **settings})
