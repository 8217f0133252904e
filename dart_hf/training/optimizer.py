"""Parameter groups: which parameters decay, and how fast each part of a model learns."""

from collections import defaultdict
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn
from transformers import Trainer, TrainingArguments

from dart_hf.modeling.modeling_dart_rmt import DartRmtDepthwiseConvolution
from dart_hf.modeling.modeling_dart_vim import DartVimConvolution, DartVimTimeSteps
from dart_hf.modeling.region_tokenizer import PatchProjection

# timm's sign for a part that goes with the layer before it.
WITH_PREVIOUS = (99999,)
DECAYING_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    PatchProjection,
    DartRmtDepthwiseConvolution,
    DartVimConvolution,
    DartVimTimeSteps,
)

# The parts of a model from its input to its output in timm's notation, by the names of their parameters. What matches
# nothing (the final norm and the heads) comes last. A name may have a wrapper's prefix such as `module.`.
DEPTHS = {
    "tokens": r"(?:.*\.)?(?:tokenizer\.|stem\.|embeddings\.|patch_embed\.|cls_token$|distillation_token$)",
    "layers": [
        (r"(?:.*?\.)?stages\.(\d+)\.layers\.(\d+)\.", None),
        # The step down to the next stage goes with the layer before it.
        (r"(?:.*?\.)?stages\.(\d+)\.downsample\.", WITH_PREVIOUS),
        # Of a dartified model "layer" or "blocks".
        (r"(?:.*?\.)?(?:layers?|blocks)\.(\d+)\.", None),
    ],
}


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    scorer_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of a DART model's parameters for a torch optimizer.

    Each parameter that requires a gradient is in exactly one group. Only the weights of linear and convolutional layers
    decay: norms, biases, class and distillation tokens and the position table do not.

    timm finds the depth of each parameter. Its `param_groups_layer_decay` is not used: it leaves the rate of a group to
    timm's schedulers (`lr_scale`), which `Trainer`'s do not read, and it has no rate for the scorer.

    Args:
        model: The model, bare or wrapped (compiled, DDP, FSDP).
        learning_rate: Learning rate of the final norm and the classifier.
        weight_decay: Decay of the weights that decay.
        layer_decay: Factor of the learning rate from one layer to the one before it, as in BEiT (arXiv 2106.08254):
            layer i of L learns at `learning_rate * layer_decay**(L + 1 - i)` with i from 1, and what makes the tokens
            (projection, positions, scorer, class token; RMT's stem) is layer 0.
        scorer_learning_rate: Learning rate of the scorer: its head and, if it trains, its trunk. Without it the rate
            of layer 0.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, and a `name`: "depth_<i>" or "scorer", followed by "_no_decay" if
        the group does not decay. The last layer comes first, because `Trainer` logs the first group's learning rate.

    Raises:
        ValueError: `layer_decay` is not above 0 and at most 1, or `scorer_learning_rate` is negative; or the parameters
            were flattened by FSDP and cannot be told apart.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}.")
    if scorer_learning_rate is not None and scorer_learning_rate < 0:
        raise ValueError(f"scorer_learning_rate must be at least 0, got {scorer_learning_rate}.")
    depths = group_parameters(model, DEPTHS, reverse=True)
    if any(name.endswith("_flat_param") for name in depths):
        raise ValueError("FSDP flattened the parameters, so they cannot be grouped; set fsdp_use_orig_params: true.")

    # By the kind of layer: FSDP may have flattened a matrix to one dimension.
    decaying = {id(module.weight) for module in model.modules() if isinstance(module, DECAYING_LAYERS)}
    members = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            apart = scorer_learning_rate is not None and ".scorer." in f".{name}"
            members[-1 if apart else depths[name], id(parameter) in decaying].append(parameter)

    deepest = max(depths.values())
    groups = []
    for (depth, decays), parameters in sorted(members.items(), reverse=True):
        name = "scorer" if depth < 0 else f"depth_{depth}"
        groups.append(
            {
                "name": name if decays else f"{name}_no_decay",
                "params": parameters,
                "lr": scorer_learning_rate if depth < 0 else learning_rate * layer_decay ** (deepest - depth),
                "weight_decay": weight_decay if decays else 0.0,
            }
        )
    return groups


def build_optimizer(
    model: nn.Module, args: TrainingArguments, layer_decay: float = 1.0, scorer_learning_rate: float | None = None
) -> torch.optim.Optimizer | None:
    """The optimizer of `args.optim`, with its options, on [`parameter_groups`].

    The schedule of `Trainer` scales the learning rates of all groups.

    Returns:
        The optimizer; None if `args.optim` groups the parameters itself and no rate of ours has to be applied.

    Raises:
        ValueError: `args.optim` groups the parameters itself, so that `layer_decay` or `scorer_learning_rate` cannot be
            applied.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    is_class = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    if not is_class or options.keys() & {"params", "model", "optimizer_dict"}:
        if layer_decay == 1.0 and scorer_learning_rate is None:
            return None
        raise ValueError(
            f"optim={args.optim.value!r} groups the parameters itself, so layer_decay and scorer_learning_rate "
            "cannot be applied; choose another one, e.g. 'adamw_torch'."
        )
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, layer_decay, scorer_learning_rate)
    return optimizer_class(groups, **options)
