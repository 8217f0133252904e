"""Vision Mamba's selective scan in ONNX: one `Scan`, where PyTorch's operations would be hundreds of nodes.

There are two scans in a layer, and writing all of their nodes takes a quarter of an hour and more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dart_hf.modeling import modeling_dart_vim
from dart_hf.modeling.selective_scan import selective_scan

DOMAIN = "dart_hf"
# What the scan does for each token, in ONNX's text form.
STEP = """
step (float[batch, S, E] before, float[S, E] rates,
      float[batch, E] delta, float[batch, E] input, float[batch, S] B, float[batch, S] C)
  => (float[batch, S, E] state, float[S, E] same_rates, float[batch, E] y) {
    one = Constant<value_ints = [1]>()
    two = Constant<value_ints = [2]>()
    time_step = Unsqueeze(delta, one)
    exponent = Mul(time_step, rates)
    decay = Exp(exponent)
    kept = Mul(decay, before)
    row = Unsqueeze(input, one)
    weights = Unsqueeze(B, two)
    added = Mul(row, weights)
    state = Add(kept, added)
    readings = Unsqueeze(C, one)
    read = MatMul(readings, state)
    y = Squeeze(read, one)
    same_rates = Identity(rates)
}
"""


@contextmanager
def scans_as_nodes() -> Iterator[None]:
    """What is traced inside has a node of its own for each scan, which [`replace_scans`] knows."""
    modeling_dart_vim.selective_scan = scan_as_node
    try:
        yield
    finally:
        modeling_dart_vim.selective_scan = selective_scan


def scan_as_node(
    x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backwards: bool = False
) -> torch.Tensor:
    """A node in place of [`selective_scan`], with its arguments and result; in float32."""
    start = x.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    inputs = (start, A.t(), delta, delta * x, B, C)
    attributes = {"backwards": int(backwards)}
    return torch.onnx.ops.symbolic(f"{DOMAIN}::Scan", inputs, attributes, dtype=x.dtype, shape=x.shape, version=1)


def replace_scans(program: Any) -> None:
    """Make ONNX's `Scan` of each such node of an `onnx.ModelProto`, in place."""
    for node in program.graph.node:
        if node.domain == DOMAIN:
            node.CopyFrom(_to_scan(node))
    for opset in [opset for opset in program.opset_import if opset.domain == DOMAIN]:
        program.opset_import.remove(opset)


def _to_scan(node: Any) -> Any:
    from onnx import helper, parser

    (y,), (backwards,) = node.output, (attribute.i for attribute in node.attribute)
    return helper.make_node(
        "Scan",
        node.input,
        # Nothing reads the first two.
        [f"{y}_last_state", f"{y}_rates", y],
        name=node.name,
        body=parser.parse_graph(STEP),
        num_scan_inputs=4,
        # Along the tokens.
        scan_input_axes=[1] * 4,
        scan_input_directions=[backwards] * 4,
        scan_output_axes=[1],
        scan_output_directions=[backwards],
    )
