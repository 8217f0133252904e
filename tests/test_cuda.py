"""What only a GPU can show. Everything here is skipped where there is none."""

import pytest
import torch

from dart_hf import DartConfig, DartForImageClassification

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


@pytest.mark.parametrize("partition", ["flow", "grid", "uniform"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_synchronises_after_the_first_call(partition, training):
    model, inputs = make_model(partition=partition).train(training), batch()
    model(**inputs).loss.backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_cuda_graphs_give_the_same_logits():
    torch.compiler.reset()
    model, inputs = make_model().eval(), batch()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(**inputs).logits.clone(), expected, rtol=1e-2, atol=1e-2)
