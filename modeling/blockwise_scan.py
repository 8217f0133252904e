"""Blockwise selective scan: segment by segment, in memory that all segments share, with its own gradient.

`selective_scan.py` describes the recurrence and the chunks.
"""

import math
import re
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers.utils.generic import maybe_autocast

# Largest size of the states (images × tokens × states × channels) in memory: small enough for the cache of a CPU, large
# enough to keep a GPU busy.
CPU_BLOCK = 2**20
# In float32 this is 256 MiB. A gradient needs four times as much.
GPU_BLOCK = 2**26
# PyTorch computes a step up to this size on one CPU thread. If one token of all images keeps all threads busy, more
# chunks are only more work.
CPU_STEP = 2**15


class _Sizes(NamedTuple):
    """The sizes of the parts: groups of images, and segments of K chunks of T tokens."""

    images: int
    segments: int
    chunks: int
    steps: int

    @classmethod
    def choose(cls, x: Tensor, num_states: int) -> "_Sizes":
        """Choose the sizes for x (batch, L, E)."""
        block = GPU_BLOCK if x.is_cuda else CPU_BLOCK
        batch, length, channels = x.shape
        # With more images a block would hold too few tokens for several chunks.
        images = max(1, min(batch, block // (16 * num_states * channels)))
        states = images * num_states * channels
        tokens = min(length, max(4, block // states))
        chunks = math.isqrt(tokens - 1) + 1
        if x.device.type == "cpu":
            chunks = min(chunks, max(1, CPU_STEP * torch.get_num_threads() // states))
        # Shorten the chunks as far as the number of segments allows.
        steps = math.ceil(length / (math.ceil(length / tokens) * chunks))
        return cls(images, math.ceil(length / (chunks * steps)), chunks, steps)

    def empty(self, sequence: Tensor) -> Tensor:
        """Memory (batch, segments × K × T, F) for results that belong to a sequence (batch, L, F)."""
        batch, _, size = sequence.shape
        return sequence.new_empty(batch, self.segments * self.chunks * self.steps, size)

    def split(self, sequence: Tensor) -> list[Tensor]:
        """(images, L, …) -> segments (images, K, T, …). The last one is padded with zeros."""
        tokens = self.chunks * self.steps
        *segments, last = sequence.split(tokens, dim=1)
        if last.shape[1] < tokens:
            last = pad(last, (0, 0) * (last.ndim - 2) + (0, tokens - last.shape[1]))
        return [segment.unflatten(1, (self.chunks, self.steps)) for segment in (*segments, last)]

    def group(self, *sequences: Tensor) -> list[list[tuple[Tensor, ...]]]:
        """Split sequences into groups of images, each group into segments, each segment into its part of a sequence."""
        groups = zip(*(sequence.split(self.images) for sequence in sequences), strict=True)
        return [list(zip(*map(self.split, group), strict=True)) for group in groups]


class BlockwiseScan(torch.autograd.Function):
    """The scan with its gradient. The result is padded to whole segments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, rates: Tensor, backwards: bool) -> Tensor:
        # The gradient needs the same sizes, and the number of threads may have changed by then.
        sizes = _Sizes.choose(x, rates.shape[0])
        y, starts = _scan_blockwise(x, delta, B, C, rates, sizes, backwards)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, delta, B, C, rates, *starts)
            ctx.sizes, ctx.backwards = sizes, backwards
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, B, C, rates, *starts = ctx.saved_tensors
        # `backward` may be called under autocast.
        with maybe_autocast(x.device.type, enabled=False):
            return *_gradients(x, delta, B, C, rates, starts, grad_y, ctx.sizes, ctx.backwards), None


def _scan_blockwise(
    x: Tensor, delta: Tensor, B: Tensor, C: Tensor, rates: Tensor, sizes: _Sizes, backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    """Compute y, padded to whole segments, and the state before each segment."""
    y = sizes.empty(x)
    # All sequences get the states' axis, the last but one, of size 1 if they have no states.
    sequences = (x[:, :, None], delta[:, :, None], B[..., None], C[:, :, None], y[:, :, None])
    block, starts = _Block(backwards), []
    for segments in sizes.group(*sequences):
        start = x.new_zeros(len(segments[0][0]), *rates.shape)
        for values, deltas, weights, readings, results in segments[:: -1 if backwards else 1]:
            starts.append(start)
            h = block.states(deltas, deltas * values, weights, rates, start)
            results.copy_(readings @ h)
            start = block.end().clone()
    return y, starts


def _gradients(
    x: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    rates: Tensor,
    starts: list[Tensor],
    grad_y: Tensor,
    sizes: _Sizes,
    backwards: bool,
) -> tuple[Tensor, ...]:
    """Compute the gradients of x, delta, B, C and rates from y's gradient and the state before each segment."""
    starts = iter(starts)
    # The gradient of the states is a scan in the other direction. A token decays by the time step of the token that
    # follows it in the first scan.
    next_delta = pad(delta, (0, 0, 1, 0))[:, :-1] if backwards else pad(delta, (0, 0, 0, 1))[:, 1:]
    grads = tuple(map(sizes.empty, (x, delta, B, C)))
    rows = (each[:, :, None] for each in (x, delta, next_delta, grad_y, *grads))
    grad_rates = torch.zeros_like(rates)
    block, gradients = _Block(backwards), _Block(not backwards)
    for segments in sizes.group(B[..., None], C[..., None], *rows):
        segments = list(zip(segments[:: -1 if backwards else 1], islice(starts, len(segments)), strict=True))
        following = torch.zeros_like(segments[0][1])
        for (weights, readings, values, deltas, next_deltas, grads_y, *grads_here), start in reversed(segments):
            grad_inputs, grad_deltas, grads_B, grads_C = grads_here
            inputs = deltas * values
            h = block.states(deltas, inputs, weights, rates, start)
            grad_h = gradients.states(next_deltas, grads_y, readings, rates, following)
            following = gradients.end().clone()
            # Products with the row on the left: a column on the right takes ten times as long.
            grads_C.copy_(grads_y @ h.mT)
            grads_B.copy_(inputs @ grad_h.mT)
            grad_inputs.copy_(weights.mT @ grad_h)
            # The gradient of the exponent: the decayed state before, times the gradient of the state. It is computed as
            # a product, because the difference of state and input would cancel where the time step is large.
            grad_exponent = block.times_before(block.step_decays(deltas, rates), start).mul_(grad_h)
            grad_rates += torch.mul(grad_exponent, deltas, out=grad_h).sum((0, 1, 2))
            grad_deltas.copy_(grad_exponent.mul_(rates).sum(-2, keepdim=True))
    grad_inputs, grad_delta, grad_B, grad_C = (each[:, : x.shape[1]] for each in grads)
    # The base of the exponent is 2.
    grad_delta = grad_delta * math.log(2) + grad_inputs * x
    return grad_inputs * delta, grad_delta, grad_B, grad_C, grad_rates * math.log(2)


# Custom operators make the scan one node in a compiler's graph, for sequences of any length. Compiling the single steps
# would take minutes and keep all states for the gradient. The operators have this module's name, because remote code
# loads this file again as a module with a folder's name.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan", mutates_args=())
def scan_operator(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, rates: Tensor, backwards: bool) -> Tensor:
    with maybe_autocast(x.device.type, enabled=False):
        y, _ = _scan_blockwise(x, delta, B, C, rates, _Sizes.choose(x, rates.shape[0]), backwards)
    return y[:, : x.shape[1]].contiguous()


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan_gradients", mutates_args=())
def _gradients_operator(
    x: Tensor, delta: Tensor, B: Tensor, C: Tensor, rates: Tensor, grad_y: Tensor, backwards: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The states before the segments are computed again, because a compiler does not know their number."""
    with maybe_autocast(x.device.type, enabled=False):
        sizes = _Sizes.choose(x, rates.shape[0])
        _, starts = _scan_blockwise(x, delta, B, C, rates, sizes, backwards)
        gradients = _gradients(x, delta, B, C, rates, starts, grad_y, sizes, backwards)
    grad_x, grad_delta, grad_B, grad_C, grad_rates = gradients
    return grad_x, grad_delta, grad_B.contiguous(), grad_C.contiguous(), grad_rates


@scan_operator.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_gradients_operator.register_fake
def _(*tensors_and_direction: Any) -> tuple[Tensor, ...]:
    tensors = tensors_and_direction[:5]
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _save_for_gradients(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.backwards = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients_operator(*ctx.saved_tensors, grad_y, ctx.backwards), None


scan_operator.register_autograd(_differentiate, setup_context=_save_for_gradients)


class _Block:
    """Computes the states of segments, one after the other, in one direction and in the same memory."""

    def __init__(self, backwards: bool) -> None:
        self.backwards = backwards
        self.memory = torch.empty(0)
        # All chunks after the first one.
        self.later = slice(-1) if backwards else slice(1, None)

    def states(self, delta: Tensor, inputs: Tensor, weights: Tensor, rates: Tensor, start: Tensor) -> Tensor:
        """h_t = 2^(Δ_t rates) h_(t-1) + inputs_t weights_t, or with h_(t+1), for each token.

        (images, K, T, S, E), valid until the next call. From delta and inputs (images, K, T, 1, E), weights
        (images, K, T, S, 1), rates (S, E), and start (images, S, E), the state before the first of these tokens, or
        after the last one if backwards.
        """
        shape = (*delta.shape[:3], *rates.shape)
        if self.memory.shape != shape:
            self._allocate(delta.new_empty(shape), delta.new_empty(shape))
        torch.mul(delta, rates, out=self.decays).exp2_()
        torch.mul(inputs, weights, out=self.memory)

        decay, state = self.first_step
        state.addcmul_(decay, start)
        for (_, before), (decay, state) in pairwise(self.steps):
            state.addcmul_(decay, before)
        for before, decay in pairwise(self.later_decays):
            # Now the decay since the start of the chunk.
            decay.mul_(before)
        for (_, _, before), (decays, states, _) in pairwise(self.chunks):
            states.addcmul_(decays, before)
        return self.memory

    def step_decays(self, delta: Tensor, rates: Tensor) -> Tensor:
        """Compute 2^(Δ_t rates) again after `states`, which has overwritten them in all chunks except the first."""
        torch.mul(delta[:, self.later], rates, out=self.decays[:, self.later]).exp2_()
        return self.decays

    def times_before(self, factors: Tensor, start: Tensor) -> Tensor:
        """Multiply factors (images, K, T, S, E) in place by the state before each token."""
        flat, states = factors.flatten(1, 2), self.memory.flatten(1, 2)
        if self.backwards:
            flat[:, :-1].mul_(states[:, 1:])
            flat[:, -1].mul_(start)
        else:
            flat[:, 1:].mul_(states[:, :-1])
            flat[:, 0].mul_(start)
        return factors

    def end(self) -> Tensor:
        """The state after the segment, (images, S, E)."""
        return self.chunks[-1][-1].squeeze(1)

    def _allocate(self, decays: Tensor, states: Tensor) -> None:
        self.decays, self.memory = decays, states
        # These views of the memory serve all segments.
        order, first, last = (-1, -1, 0) if self.backwards else (1, 0, -1)
        self.first_step = decays[:, first, first], states[:, first, first]
        self.steps = list(zip(decays.unbind(2), states.unbind(2), strict=True))[::order]
        ends = states[:, :, last, None].unbind(1)
        self.chunks = list(zip(decays.unbind(1), states.unbind(1), ends, strict=True))[::order]
        # The first chunk already contains the state before it.
        later_decays = decays[:, self.later]
        self.later_decays = later_decays.unbind(2)[::order] if later_decays.numel() else ()
