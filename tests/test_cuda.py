"""What only a GPU can show. Everything here is skipped where there is none."""

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier

from dart_hf import DartConfig, DartForImageClassification
from dart_hf.modeling.selective_scan import cuda_kernel, selective_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make_model(**settings) -> DartForImageClassification:
    torch.manual_seed(0)
    config = DartConfig(num_hidden_layers=2, image_size=64, num_patches=25, num_labels=5, scorer="conv", **settings)
    return DartForImageClassification(config).cuda()


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": images.cuda(), "labels": torch.arange(count).cuda() % 5}


@pytest.mark.parametrize("partition", ["flow", "grid", "uniform"])
def test_the_gpu_computes_what_the_cpu_computes(partition):
    model = make_model(partition=partition).double().eval()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch().items()}
    on_gpu = model(**inputs).logits.cpu()
    on_cpu = model.cpu()(**{name: value.cpu() for name, value in inputs.items()}).logits
    torch.testing.assert_close(on_gpu, on_cpu)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_gpu_computes_what_the_cpu_computes_with_every_encoder(model_type):
    """Vision Mamba's kernel is for float32; in float64 it is PyTorch's scan on both."""
    model = tiny_classifier(model_type=model_type, image_size=64).double()
    images = batch()["pixel_values"].double()
    expected = model(images.cpu()).logits
    torch.testing.assert_close(model.cuda()(images).logits.cpu(), expected)


def assert_only_the_first_call_synchronises(model: torch.nn.Module) -> None:
    inputs = batch()
    model(**inputs).loss.backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("partition", ["flow", "grid", "uniform"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_synchronises_after_the_first_call(partition, training):
    assert_only_the_first_call_synchronises(make_model(partition=partition).train(training))


@pytest.mark.parametrize("model_type", ["dart_vim", "dart_rmt"])
def test_no_encoder_synchronises_after_the_first_call(model_type):
    model = tiny_classifier([str(label) for label in range(5)], model_type)
    assert_only_the_first_call_synchronises(model.cuda().train())


def test_cuda_graphs_give_the_same_logits():
    torch.compiler.reset()
    model, inputs = make_model().eval(), batch()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(**inputs).logits.clone(), expected, rtol=1e-2, atol=1e-2)


def scan_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """x, Δ, A, B, C of the widths of DART-Vim-Ti, at 393 tokens."""
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, 2, 393, 384, generator=generator)
    B, C = torch.randn(2, 2, 393, 16, generator=generator)
    A = -torch.rand(384, 16, generator=generator) * 16
    return [tensor.to(dtype) for tensor in (x, torch.nn.functional.softplus(delta - 3), A, B, C)]


def values_and_gradients(tensors: list[torch.Tensor], backwards: bool) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = selective_scan(*leaves, backwards)
    gradients = torch.autograd.grad((y.float() * y.detach().float().sin()).sum(), leaves)
    return [value.detach().cpu() for value in (y, *gradients)]


@pytest.mark.parametrize("backwards", [False, True])
def test_the_scan_on_the_gpu(monkeypatch, backwards):
    """However large its blocks are there."""
    expected = values_and_gradients(scan_inputs(torch.float64), backwards)
    on_gpu = [tensor.cuda() for tensor in scan_inputs(torch.float64)]
    for block in (2**16, 2**22, 2**26):
        monkeypatch.setattr("dart_hf.modeling.blockwise_scan.GPU_BLOCK", block)
        torch.testing.assert_close(values_and_gradients(on_gpu, backwards), expected)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_kernel_computes_what_pytorch_computes(monkeypatch, dtype, backwards):
    if cuda_kernel() is None:
        pytest.skip("needs mamba_ssm, or kernels and the Hub")
    tensors = [tensor.cuda() for tensor in scan_inputs(dtype)]
    found = values_and_gradients(tensors, backwards)
    monkeypatch.setattr("dart_hf.modeling.selective_scan.USE_CUDA_KERNEL", False)
    for ours, theirs in zip(values_and_gradients(tensors, backwards), found, strict=True):
        assert (ours - theirs).abs().max() / ours.abs().max() < (1e-4 if dtype == torch.float32 else 1e-2)
