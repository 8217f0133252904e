"""Keep the random numbers of a training, and the precision of the weights, unchanged by an evaluation."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore Python's, NumPy's and PyTorch's random state at the end of the block.

    An evaluation draws random numbers, at least a seed for the workers of its data loader. A training that resumes from
    a checkpoint saved before the evaluation of the same step (`save_strategy="steps"` with `eval_strategy="epoch"`)
    does not evaluate again. Without this its dropout would differ from then on.
    """
    accelerator = torch.get_device_module(device) if device.type != "cpu" else None
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = accelerator.get_rng_state() if accelerator is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator is not None:
            accelerator.set_rng_state(on_device)


@contextmanager
def unchanged_weights(model: nn.Module) -> Iterator[None]:
    """Restore a model's weights and buffers at the end of the block.

    `Trainer` casts the model for an evaluation in half precision (`bf16_full_eval`, `fp16_full_eval`) and leaves it so.
    """
    tensors = [
        (module, name, tensor, tensor.data)
        for module in model.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    try:
        yield
    finally:
        for module, name, tensor, data in tensors:
            tensor.data = data
            setattr(module, name, tensor)
