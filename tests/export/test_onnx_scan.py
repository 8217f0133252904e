"""The selective scan in ONNX computes what PyTorch's does."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from dart_hf.export.onnx_scan import replace_scans, scans_as_nodes
from dart_hf.modeling import modeling_dart_vim
from dart_hf.modeling.selective_scan import selective_scan

NAMES = ["x", "delta", "A", "B", "C"]


class Scans(nn.Module):
    """Both directions, as Vision Mamba calls them."""

    def forward(self, x, delta, A, B, C):
        scan = modeling_dart_vim.selective_scan
        return scan(x, delta, A, B, C, False), scan(x, delta, A, B, C, True)


def sequences(batch: int, length: int = 11) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(batch)
    x, delta, rates = torch.randn(batch, length, 6), torch.rand(batch, length, 6), -torch.rand(6, 4) * 3
    return x, delta, rates, torch.randn(batch, length, 4), torch.randn(batch, length, 4)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.onnx"
    shapes = {name: None if name == "A" else {0: torch.export.Dim("batch")} for name in NAMES}
    with scans_as_nodes():
        program = torch.export.export(Scans(), sequences(2), dynamic_shapes=shapes, strict=False)
    model = torch.onnx.export(program, dynamo=True, verbose=False, input_names=NAMES).model_proto
    replace_scans(model)
    onnx.save(model, path)
    return path


def test_each_scan_becomes_one_standard_node(written):
    model = onnx.load(written)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("Scan") == 2
    assert {opset.domain for opset in model.opset_import} == {""}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_scan_node_computes_what_pytorch_does(written, batch):
    given = sequences(batch)
    session = onnxruntime.InferenceSession(written)
    found = session.run(None, {name: value.numpy() for name, value in zip(NAMES, given, strict=True)})
    for direction, backwards in zip(found, (False, True), strict=True):
        torch.testing.assert_close(torch.from_numpy(direction), selective_scan(*given, backwards), rtol=1e-5, atol=1e-5)


def test_model_is_restored_after_an_error(written):
    with pytest.raises(RuntimeError, match="interrupted"), scans_as_nodes():
        assert modeling_dart_vim.selective_scan is not selective_scan
        raise RuntimeError("interrupted")
    assert modeling_dart_vim.selective_scan is selective_scan
