"""Write the selective scan of Vision Mamba as one `Scan` node of ONNX instead of hundreds of nodes.

A layer has two scans. Without this, writing all their nodes takes more than a quarter of an hour.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dart_hf.modeling import modeling_dart_vim
from dart_hf.modeling.selective_scan import selective_scan

DOMAIN = "dart_hf"
# The step of the scan for each token, in the text form of ONNX.
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
    """Trace a model inside this context, and each scan is one node, which [`replace_scans`] turns into a `Scan`."""
    modeling_dart_vim.selective_scan = scan_as_node
    try:
        yield
    finally:
        modeling_dart_vim.selective_scan = selective_scan


def scan_as_node(
    x: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, backwards: bool = False
) -> torch.Tensor:
    """A node that stands for [`selective_scan`], with the same arguments and result, in float32."""
    start = x.new_zeros(x.shape[0], A.shape[1], A.shape[0])
    inputs = (start, A.t(), delta, delta * x, B, C)
    attributes = {"backwards": int(backwards)}
    return torch.onnx.ops.symbolic(f"{DOMAIN}::Scan", inputs, attributes, dtype=x.dtype, shape=x.shape, version=1)


def replace_scans(program: Any) -> None:
    """Replace each node that stands for a scan in an `onnx.ModelProto` by a `Scan`, in place."""
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
        # The first two outputs are not used.
        [f"{y}_last_state", f"{y}_rates", y],
        name=node.name,
        body=parser.parse_graph(STEP),
        num_scan_inputs=4,
        # The axis of the tokens.
        scan_input_axes=[1] * 4,
        scan_input_directions=[backwards] * 4,
        scan_output_axes=[1],
        scan_output_directions=[backwards],
    )
