"""Selective scan: the recurrence at the heart of Mamba, many tokens at a time.

For every channel e and state s of a sequence, with x, Δ (L, E), A (E, S) and B, C (L, S):

    h_t = exp(Δ_t A) h_(t-1) + Δ_t x_t B_t        y_t = Σ_s C_t h_t

(Mamba, arXiv 2312.00752.) A sequence is cut into chunks. All chunks take their first step at once, then their second
step, and so on, each from an empty state. Then each chunk adds the decayed final state of the chunks before it. All
factors are decays of at most 1, so nothing overflows. A CPU gets fewer chunks than a GPU, or only one, because the
states of a batch of images keep it busy already.
"""

import functools
import importlib
import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_torchdynamo_exporting

from .blockwise_scan import BlockwiseScan, scan_operator

logger = logging.get_logger(__name__)

# Set this to False to compute without mamba_ssm's CUDA kernel where it is installed.
USE_CUDA_KERNEL = True


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, backwards: bool = False) -> Tensor:
    """Scan sequences, in float32 at least.

    Time and memory grow linearly with L. For the gradient, one state of each block of tokens is kept and the others are
    computed again. There is no second derivative. `torch.compile` sees the scan as one operator.

    Args:
        x: (batch, L, E), the values, L at least 1.
        delta: (batch, L, E), the time steps Δ, at least 0.
        A: (E, S), the rates of decay, at most 0.
        B, C: (batch, L, S), the weights of the input and of the output of each state.
        backwards: Scan from the last token to the first.

    Returns:
        y (batch, L, E), dtype of `x`.
    """
    sequences = [tensor.to(torch.promote_types(x.dtype, torch.float32)) for tensor in (x, delta, B, C)]
    # Autocast would undo the promotion.
    with maybe_autocast(x.device.type, enabled=False):
        return _scan(*sequences, A.to(sequences[0].dtype), backwards).to(x.dtype)


def _scan(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, backwards: bool) -> Tensor:
    """Choose the implementation: for exporters, for `torch.compile`, mamba_ssm's kernel, or the blockwise scan."""
    if is_torchdynamo_exporting() or torch.jit.is_tracing():
        return _scan_in_graph(x, delta, B, C, _rates(A), backwards)
    if torch.compiler.is_compiling():
        return scan_operator(x, delta, B, C, _rates(A), backwards)
    if x.is_cuda and A.dtype == torch.float32 and USE_CUDA_KERNEL and cuda_kernel() is not None:
        return _scan_by_kernel(cuda_kernel(), x, delta, B, C, A, backwards)
    return BlockwiseScan.apply(x, delta, B, C, _rates(A), backwards)[:, : x.shape[1]]


@functools.cache
def cuda_kernel() -> Callable | None:
    """mamba_ssm's `selective_scan_fn`, from that package or from the Hub through the package `kernels`, or None."""
    for package in ("mamba_ssm", "kernels"):
        try:
            if package == "mamba_ssm":
                return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
            # The version that transformers 5.23 uses for its own Mamba.
            kernels = importlib.import_module(package)
            return kernels.get_kernel("kernels-community/mamba-ssm", version=4).selective_scan_fn
        except Exception as error:
            # A foreign kernel can fail in any way. The blockwise scan works without it.
            if not isinstance(error, ModuleNotFoundError) or (error.name or "").partition(".")[0] != package:
                logger.warning(f"The CUDA kernel of the package {package} cannot be used: {error}")
    return None


def _scan_by_kernel(
    kernel: Callable, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, backwards: bool
) -> Tensor:
    """The scan by mamba_ssm's kernel, which takes channels before tokens and scans only forwards."""
    if backwards:
        return _scan_by_kernel(kernel, *(tensor.flip(1) for tensor in (x, delta, B, C)), A, False).flip(1)
    x, delta, B, C = (tensor.transpose(1, 2).contiguous() for tensor in (x, delta, B, C))
    return kernel(x, delta, A, B, C).transpose(1, 2)


def _rates(A: Tensor) -> Tensor:
    """Rates of decay (E, S) -> (S, E), to the base 2, because exp2 is faster than exp on a CPU."""
    return (A * math.log2(math.e)).t().contiguous()


def _scan_in_graph(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, rates: Tensor, backwards: bool) -> Tensor:
    """The scan with a new tensor for each result, for exporters: √L chunks of √L tokens."""
    # A number, also where a free batch size turns sizes into symbols.
    length = operator.index(x.shape[1])
    num_steps = math.isqrt(length - 1) + 1
    sequences = (
        pad(sequence, (0, 0, 0, -length % num_steps)).unflatten(1, (-1, num_steps)).unbind(2)
        for sequence in (delta, delta * x, B, C)
    )
    direction = -1 if backwards else 1
    steps = list(zip(*sequences, strict=True))[::direction]
    decays, states = [], []
    for delta_t, input_t, B_t, _ in steps:
        decay = torch.exp2(delta_t[..., None, :] * rates)
        state = input_t[..., None, :] * B_t[..., None]
        states.append(torch.addcmul(state, decay, states[-1]) if states else state)
        decays.append(decays[-1] * decay if decays else decay)

    left = [torch.zeros_like(states[-1][:, 0])]
    for decay, state in list(zip(decays[-1].unbind(1), states[-1].unbind(1), strict=True))[::direction][:-1]:
        left.append(torch.addcmul(state, decay, left[-1]))
    before = torch.stack(left[::direction], dim=1)
    y = [
        (C_t[..., None] * torch.addcmul(state, decay, before)).sum(-2, keepdim=True)
        for (*_, C_t), state, decay in zip(steps, states, decays, strict=True)
    ]
    return torch.cat(y[::direction], dim=2).flatten(1, 2)[:, :length]
