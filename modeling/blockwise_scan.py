"""Selective scan, segment by segment in memory that all segments share, with a gradient of its own.

The scan itself is described in `selective_scan.py`.
"""

import math
import re
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers.utils.generic import maybe_autocast

# How many numbers of the states (images × tokens × states × channels) are in memory at once: few enough to stay in a
# CPU's cache, enough to fill a GPU.
CPU_BLOCK = 2**20
# In float32 256 MiB, of which a gradient takes four.
GPU_BLOCK = 2**26
# Up to how many numbers of a step PyTorch computes on one thread of a CPU. Where one token of all images keeps all
# threads busy, more chunks side by side would only be more work.
CPU_STEP = 2**15


class _Sizes(NamedTuple):
    """How the work is cut: into groups of images, and segments of K chunks of T tokens."""

    images: int
    segments: int
    chunks: int
    steps: int

    @classmethod
    def choose(cls, x: torch.Tensor, num_states: int) -> "_Sizes":
        """For x (batch, L, E)."""
        block = GPU_BLOCK if x.is_cuda else CPU_BLOCK
        batch, length, channels = x.shape
        # A block of fewer tokens of more images would be one step after the other.
        images = max(1, min(batch, block // (16 * num_states * channels)))
        states = images * num_states * channels
        tokens = min(length, max(4, block // states))
        chunks = math.isqrt(tokens - 1) + 1
        if x.device.type == "cpu":
            chunks = min(chunks, max(1, CPU_STEP * torch.get_num_threads() // states))
        # No longer than it takes for as many segments: there may be fewer of them then.
        steps = math.ceil(length / (math.ceil(length / tokens) * chunks))
        return cls(images, math.ceil(length / (chunks * steps)), chunks, steps)

    def empty(self, sequence: torch.Tensor) -> torch.Tensor:
        """Memory for results (batch, segments × K × T, F) beside a sequence (batch, L, F)."""
        batch, _, size = sequence.shape
        return sequence.new_empty(batch, self.segments * self.chunks * self.steps, size)

    def split(self, sequence: torch.Tensor) -> list[torch.Tensor]:
        """(images, L, …) -> segments (images, K, T, …), the last with zeros behind the last token."""
        tokens = self.chunks * self.steps
        *segments, last = sequence.split(tokens, dim=1)
        if last.shape[1] < tokens:
            last = pad(last, (0, 0) * (last.ndim - 2) + (0, tokens - last.shape[1]))
        return [segment.unflatten(1, (self.chunks, self.steps)) for segment in (*segments, last)]

    def group(self, *sequences: torch.Tensor) -> list[list[tuple[torch.Tensor, ...]]]:
        """What is computed at once: group of images -> segment -> its part of each sequence."""
        groups = zip(*(sequence.split(self.images) for sequence in sequences), strict=True)
        return [list(zip(*map(self.split, group), strict=True)) for group in groups]


class BlockwiseScan(torch.autograd.Function):
    """The scan in place, segment by segment, in memory that all of them share. y may go on behind the last token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        rates: torch.Tensor,
        backwards: bool,
    ) -> torch.Tensor:
        # Chosen once: there may be another number of threads by the time of the gradient.
        sizes = _Sizes.choose(x, rates.shape[0])
        y, starts = _scan_blockwise(x, delta, B, C, rates, sizes, backwards)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, delta, B, C, rates, *starts)
            ctx.sizes, ctx.backwards = sizes, backwards
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, delta, B, C, rates, *starts = ctx.saved_tensors
        # Whoever calls `backward` under autocast gets float32 too.
        with maybe_autocast(x.device.type, enabled=False):
            return *_gradients(x, delta, B, C, rates, starts, grad_y, ctx.sizes, ctx.backwards), None


def _scan_blockwise(
    x: torch.Tensor,
    delta: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    rates: torch.Tensor,
    sizes: _Sizes,
    backwards: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, which may go on behind the last token, and what each segment begins with."""
    y = sizes.empty(x)
    # The states' axis is the last but one, and what has none has one entry there.
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
    x: torch.Tensor,
    delta: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    rates: torch.Tensor,
    starts: list[torch.Tensor],
    grad_y: torch.Tensor,
    sizes: _Sizes,
    backwards: bool,
) -> tuple[torch.Tensor, ...]:
    """Those of x, delta, B, C and rates, from y's and what each segment began with."""
    starts = iter(starts)
    # The states' gradient is itself a scan, in the other direction, in which a token decays by the time step of the
    # one that the first scan went to next.
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
            # Rows from the left: columns from the right take ten times as long.
            grads_C.copy_(grads_y @ h.mT)
            grads_B.copy_(inputs @ grad_h.mT)
            grad_inputs.copy_(weights.mT @ grad_h)
            # What is left in a state of the one before it, times the gradient: the gradient of the exponent. As a
            # product, because the difference of state and input has lost it where the time step is large.
            grad_exponent = block.times_before(block.step_decays(deltas, rates), start).mul_(grad_h)
            grad_rates += torch.mul(grad_exponent, deltas, out=grad_h).sum((0, 1, 2))
            grad_deltas.copy_(grad_exponent.mul_(rates).sum(-2, keepdim=True))
    grad_inputs, grad_delta, grad_B, grad_C = (each[:, : x.shape[1]] for each in grads)
    # The base of the exponent is 2.
    grad_delta = grad_delta * math.log(2) + grad_inputs * x
    return grad_inputs * delta, grad_delta, grad_B, grad_C, grad_rates * math.log(2)


# One node of a compiler's graph, for sequences of any length: it would take minutes over the single steps, and keep the
# states for the gradient. Named like this module, which remote code loads once more, under a folder's name.
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan", mutates_args=())
def scan_operator(
    x: torch.Tensor, delta: torch.Tensor, B: torch.Tensor, C: torch.Tensor, rates: torch.Tensor, backwards: bool
) -> torch.Tensor:
    with maybe_autocast(x.device.type, enabled=False):
        y, _ = _scan_blockwise(x, delta, B, C, rates, _Sizes.choose(x, rates.shape[0]), backwards)
    return y[:, : x.shape[1]].contiguous()


@torch.library.custom_op(f"{_NAMESPACE}::selective_scan_gradients", mutates_args=())
def _gradients_operator(
    x: torch.Tensor,
    delta: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    rates: torch.Tensor,
    grad_y: torch.Tensor,
    backwards: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What segments begin with is computed again: how many there are would be one more unknown to a compiler."""
    with maybe_autocast(x.device.type, enabled=False):
        sizes = _Sizes.choose(x, rates.shape[0])
        _, starts = _scan_blockwise(x, delta, B, C, rates, sizes, backwards)
        gradients = _gradients(x, delta, B, C, rates, starts, grad_y, sizes, backwards)
    grad_x, grad_delta, grad_B, grad_C, grad_rates = gradients
    return grad_x, grad_delta, grad_B.contiguous(), grad_C.contiguous(), grad_rates


@scan_operator.register_fake
def _(x: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_gradients_operator.register_fake
def _(*tensors_and_direction: Any) -> tuple[torch.Tensor, ...]:
    tensors = tensors_and_direction[:5]
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _save_for_gradients(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.backwards = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients_operator(*ctx.saved_tensors, grad_y, ctx.backwards), None


scan_operator.register_autograd(_differentiate, setup_context=_save_for_gradients)


class _Block:
    """Computes the states of one segment after the other, in one direction and in the same memory."""

    def __init__(self, backwards: bool) -> None:
        self.backwards = backwards
        self.memory = torch.empty(0)
        # The chunks behind the first.
        self.later = slice(-1) if backwards else slice(1, None)

    def states(
        self,
        delta: torch.Tensor,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        rates: torch.Tensor,
        start: torch.Tensor,
    ) -> torch.Tensor:
        """h_t = 2^(Δ_t rates) h_(t-1) + inputs_t weights_t, or with h_(t+1).

        Args:
            delta, inputs: (images, K, T, 1, E).
            weights: (images, K, T, S, 1).
            rates: (S, E).
            start: (images, S, E), what is before the first of these tokens, or behind the last.

        Returns:
            (images, K, T, S, E), until the next call.
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
            # From here on the decay since the chunk began.
            decay.mul_(before)
        for (_, _, before), (decays, states, _) in pairwise(self.chunks):
            states.addcmul_(decays, before)
        return self.memory

    def step_decays(self, delta: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        """2^(Δ_t rates) after `states` of the same, which has written over them in all chunks but the first."""
        torch.mul(delta[:, self.later], rates, out=self.decays[:, self.later]).exp2_()
        return self.decays

    def times_before(self, factors: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Multiply factors (images, K, T, S, E) in place by the state before each of the present ones."""
        flat, states = factors.flatten(1, 2), self.memory.flatten(1, 2)
        if self.backwards:
            flat[:, :-1].mul_(states[:, 1:])
            flat[:, -1].mul_(start)
        else:
            flat[:, 1:].mul_(states[:, :-1])
            flat[:, 0].mul_(start)
        return factors

    def end(self) -> torch.Tensor:
        """(images, S, E), what the segment leaves."""
        return self.chunks[-1][-1].squeeze(1)

    def _allocate(self, decays: torch.Tensor, states: torch.Tensor) -> None:
        self.decays, self.memory = decays, states
        # The parts of the memory are looked up once for all segments.
        order, first, last = (-1, -1, 0) if self.backwards else (1, 0, -1)
        self.first_step = decays[:, first, first], states[:, first, first]
        self.steps = list(zip(decays.unbind(2), states.unbind(2), strict=True))[::order]
        ends = states[:, :, last, None].unbind(1)
        self.chunks = list(zip(decays.unbind(1), states.unbind(1), ends, strict=True))[::order]
        # What is before the first chunk is in its first step already.
        later_decays = decays[:, self.later]
        self.later_decays = later_decays.unbind(2)[::order] if later_decays.numel() else ()
