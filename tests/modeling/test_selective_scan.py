"""The selective scan against its definition, a loop over the tokens."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dart_hf.modeling import blockwise_scan
from dart_hf.modeling import selective_scan as module
from dart_hf.modeling.selective_scan import cuda_kernel, selective_scan

NAMES = ("x", "delta", "A", "B", "C")
both_directions = pytest.mark.parametrize("backwards", [False, True])


def literal_scan(x, delta, A, B, C, backwards=False) -> torch.Tensor:
    """h = exp(Δ A) h + Δ x B and y = C·h, token by token. Arguments and result are those of `selective_scan`."""
    h = x.new_zeros(x.shape[0], *A.shape)
    y = [None] * x.shape[1]
    for t in reversed(range(x.shape[1])) if backwards else range(x.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * x[:, t, :, None] * B[:, t, None, :]
        y[t] = (h * C[:, t, None, :]).sum(-1)
    return torch.stack(y, dim=1)


def inputs(
    length: int, batch: int = 2, channels: int = 3, states: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    """x, Δ, A, B, C. Some states forget within a token, others remember hundreds of tokens."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    drawn = (
        randn(batch, length, channels),
        nn.functional.softplus(2 * randn(batch, length, channels) - 2),
        -(2 * randn(channels, states)).exp(),
        randn(batch, length, states),
        randn(batch, length, states),
    )
    return [tensor.to(dtype) for tensor in drawn]


def fixed_weights(y: torch.Tensor) -> torch.Tensor:
    """The same numbers in every precision."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)


def values_and_gradients(scan, tensors, backwards=False) -> dict[str, torch.Tensor]:
    """y, and the gradients of a weighted sum of it for all five inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = scan(*leaves, backwards)
    gradients = torch.autograd.grad((y * fixed_weights(y)).sum(), leaves)
    return {"y": y.detach(), **dict(zip(NAMES, gradients, strict=True))}


def assert_agrees(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    """Compare max|a - b| / max|b| of each tensor."""
    for name, value in expected.items():
        assert found[name].shape == value.shape
        error = (found[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-300)
        assert error < tolerance, f"{name} is off by {error:.1e}"


def assert_scans(tensors, backwards, scan=selective_scan) -> None:
    expected = values_and_gradients(literal_scan, tensors, backwards)
    assert_agrees(values_and_gradients(scan, tensors, backwards), expected)


@pytest.fixture(params=["blockwise", "compiled", "exported"])
def implementation(request, monkeypatch) -> str:
    """Run, without a compiler, the implementation that `torch.compile` or an exporter gets."""
    if request.param == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if request.param == "exported":
        monkeypatch.setattr(module, "is_torchdynamo_exporting", lambda: True)
    return request.param


@both_directions
@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 100, 393])
def test_every_implementation_agrees_with_the_loop(implementation, length, backwards):
    assert_scans(inputs(length), backwards)


@pytest.mark.parametrize("batch", [1, 2, 5])
@both_directions
@pytest.mark.parametrize(
    ("block", "step", "length", "images", "segments", "chunks"),
    [
        # A block has at least four tokens, and at least one image.
        (1, 2**15, 3, 1, 1, 2),
        (1, 2**15, 4, 1, 1, 2),
        (1, 2**15, 5, 1, 2, 2),
        (1, 2**15, 17, 1, 5, 2),
        (200, 2**15, 50, 1, 4, 4),
        # One more token than fills a block.
        (200, 2**15, 17, 1, 2, 4),
        # Three segments of five tokens would do, but in steps of chunks two segments take all tokens.
        (60, 2**15, 11, 1, 2, 3),
        (400, 2**15, 50, 2, 4, 4),
        (2000, 2**15, 50, 10, 1, None),
        # One token of an image has 12 numbers, and there are two threads.
        (400, 1, 25, 2, 2, 1),
        (200, 11, 25, 1, 2, 1),
        (200, 12, 25, 1, 2, 2),
        (200, 18, 25, 1, 2, 3),
    ],
)
def test_blocks_and_chunks_of_any_size_give_the_same_result(
    monkeypatch, block, step, length, images, segments, chunks, backwards, batch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(blockwise_scan, "CPU_BLOCK", block)
    monkeypatch.setattr(blockwise_scan, "CPU_STEP", step)
    tensors = inputs(length, batch)
    sizes = blockwise_scan._Sizes.choose(tensors[0], num_states=4)
    assert sizes.images == min(images, batch)
    if batch >= images:
        assert (sizes.segments, sizes.chunks) == (segments, chunks)
    assert_scans(tensors, backwards)


@both_directions
@pytest.mark.parametrize("block", [100, 200, 10**6])
def test_backward_works_with_another_number_of_threads(monkeypatch, block, backwards):
    monkeypatch.setattr(blockwise_scan, "CPU_BLOCK", block)
    monkeypatch.setattr(blockwise_scan, "CPU_STEP", 24)

    def scan(*tensors):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        y = selective_scan(*tensors)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        return y

    assert_scans(inputs(25), backwards, scan)


@both_directions
def test_an_empty_batch_gives_an_empty_result(backwards):
    leaves = [tensor.requires_grad_() for tensor in inputs(5, batch=0)]
    y = selective_scan(*leaves, backwards)
    y.sum().backward()
    assert y.shape == leaves[0].grad.shape == (0, 5, 3) and not leaves[2].grad.any()


@both_directions
def test_the_result_can_be_changed_in_place(backwards):
    assert_scans(inputs(7), backwards, lambda *tensors: selective_scan(*tensors).add_(1).sub_(1))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 5),
    channels=st.integers(1, 4),
    states=st.integers(1, 5),
    block=st.integers(1, 2000),
    step=st.integers(1, 200),
    backwards=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_agrees_with_the_loop(length, batch, channels, states, block, step, backwards, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise_scan, "CPU_BLOCK", block)
        patch.setattr(blockwise_scan, "CPU_STEP", step)
        assert_scans(inputs(length, batch, channels, states, seed=seed), backwards)


@both_directions
@pytest.mark.parametrize("length", [17, 393, 2000])
def test_float32_differs_from_float64_by_rounding_only(length, backwards):
    expected = values_and_gradients(selective_scan, inputs(length), backwards)
    found = values_and_gradients(selective_scan, inputs(length, dtype=torch.float32), backwards)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_agrees(found, expected, tolerance=5e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_and_autocast_compute_in_float32(dtype, autocast, compiled):
    """Only inputs and results are rounded, in the backward pass too."""
    scan = compile_scan() if compiled else selective_scan
    tensors = inputs(12, dtype=dtype)
    exact = values_and_gradients(scan, [tensor.float() for tensor in tensors])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = values_and_gradients(scan, tensors)
    assert {value.dtype for value in found.values()} == {dtype}
    for name, value in found.items():
        assert torch.equal(value, exact[name].to(dtype)), name


def test_the_result_has_the_dtype_of_the_values():
    x, delta, A, B, C = inputs(20, dtype=torch.float32)
    mixed = selective_scan(x.bfloat16(), delta, A, B.bfloat16(), C.half())
    expected = selective_scan(x.bfloat16().float(), delta, A, B.bfloat16().float(), C.half().float())
    assert torch.equal(mixed, expected.bfloat16())


@both_directions
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("step", [0.0, 1e4, 1e30])
def test_time_steps_of_any_size(implementation, step, dtype, tolerance, backwards):
    """A large time step erases the states; a time step of zero leaves them unchanged."""
    tensors = inputs(40)
    tensors[1][:, ::7] = step
    expected = values_and_gradients(literal_scan, tensors, backwards)
    found = values_and_gradients(selective_scan, [tensor.to(dtype) for tensor in tensors], backwards)
    assert all(value.isfinite().all() for value in found.values())
    assert_agrees(found, expected, tolerance)
    # Beside the numbers of these tokens, which are as large as their time steps, errors of the others would not show.
    others = [t for t in range(40) if t % 7]
    for result in (found, expected):
        result.update({name: value[:, others] for name, value in result.items() if name != "A"})
    assert_agrees(found, expected, tolerance)


@both_directions
@pytest.mark.parametrize("rate", [0.0, -1e4, -1e30])
def test_decay_rates_of_any_size(implementation, rate, backwards):
    """A rate of zero never forgets; a large one forgets at once."""
    tensors = inputs(40)
    tensors[2][:, ::2] = rate
    assert_scans(tensors, backwards)
    found = values_and_gradients(selective_scan, [tensor.float() for tensor in tensors], backwards)
    assert all(value.isfinite().all() for value in found.values())


def count_saved_numbers(length: int, backwards: bool = False, scan=selective_scan) -> int:
    """How many numbers autograd saves for the backward pass."""
    saved = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    tensors = [tensor.requires_grad_() for tensor in inputs(length, channels=96, states=16, dtype=torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = scan(*tensors, backwards)
    assert y.requires_grad and saved
    return sum(saved.values())


@both_directions
def test_memory_for_the_gradient_grows_with_the_length_and_not_with_the_states(backwards):
    lengths = (512, 1024, 2048)
    saved = [count_saved_numbers(length, backwards) for length in lengths]
    assert saved[2] - saved[1] == pytest.approx(2 * (saved[1] - saved[0]), rel=0.05)
    # x and Δ are twice as many numbers; the states would be sixteen times as many.
    assert all(numbers < 3 * 2 * length * 96 for length, numbers in zip(lengths, saved, strict=True))
    assert count_saved_numbers(100, backwards, scan=compile_scan()) < 3 * 2 * 100 * 96


@pytest.mark.parametrize("constant", NAMES)
def test_a_tensor_that_needs_no_gradient_gets_none(constant):
    tensors = inputs(10)
    expected = values_and_gradients(literal_scan, tensors)
    leaves = dict(zip(NAMES, [tensor.requires_grad_() for tensor in tensors], strict=True))
    leaves[constant].requires_grad_(False)
    y = selective_scan(**leaves)
    (y * fixed_weights(y)).sum().backward()
    assert leaves.pop(constant).grad is None
    assert_agrees({name: leaf.grad for name, leaf in leaves.items()}, {name: expected[name] for name in leaves})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_recorded_when_none_is_wanted(mode):
    tensors = [tensor.requires_grad_() for tensor in inputs(30)]
    with mode():
        y = selective_scan(*tensors)
    assert not y.requires_grad
    torch.testing.assert_close(y, literal_scan(*tensors).detach())


@both_directions
def test_views_are_accepted_and_left_unchanged(implementation, backwards):
    x, delta, A, B, C = inputs(20)
    wide = torch.cat([B, C], dim=2)
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        delta[:, :, :1].expand(-1, -1, 3),
        A.t().contiguous().t(),
        wide[..., :4],
        wide[..., 4:],
    ]
    assert not any(view.is_contiguous() for view in views)
    before = [view.clone() for view in views]
    leaves = [view.requires_grad_() for view in views[:3]]
    found = selective_scan(*leaves, *views[3:], backwards)
    found.sum().backward()
    torch.testing.assert_close(found, literal_scan(*views, backwards))
    assert all(torch.equal(view, copy) for view, copy in zip(views, before, strict=True))


def compile_scan():
    torch.compiler.reset()
    return torch.compile(selective_scan, fullgraph=True, backend="aot_eager")


@both_directions
def test_compiles_as_one_graph_forward_and_backward(backwards):
    compiled = compile_scan()
    for length in (1, 20, 31):
        assert_scans(inputs(length), backwards, scan=compiled)


class OnAGpu(torch.Tensor):
    """A tensor in main memory that claims to be on a GPU."""

    is_cuda = True


def on_a_gpu(tensors) -> list[torch.Tensor]:
    return [tensor.as_subclass(OnAGpu) for tensor in tensors]


def fake_kernel(calls: list, u, delta, A, B, C) -> torch.Tensor:
    """mamba_ssm's `selective_scan_fn`: u, Δ (batch, E, L), A (E, S), B and C (batch, S, L) -> y (batch, E, L)."""
    calls.append([tuple(tensor.shape) for tensor in (u, delta, A, B, C)])
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (u, delta, A, B, C))
    x, delta, B, C = (tensor.transpose(1, 2) for tensor in (u, delta, B, C))
    return literal_scan(x, delta, A, B, C).transpose(1, 2)


@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_called_as_mamba_ssm_documents_it(monkeypatch, dtype, backwards):
    calls = []
    monkeypatch.setattr(module, "cuda_kernel", lambda: functools.partial(fake_kernel, calls))
    tensors = inputs(9, batch=2, channels=3, states=4, dtype=dtype)
    found = values_and_gradients(lambda *given: selective_scan(*on_a_gpu(given[:5]), given[5]), tensors, backwards)
    assert calls == [[(2, 3, 9), (2, 3, 9), (3, 4), (2, 4, 9), (2, 4, 9)]]
    expected = values_and_gradients(selective_scan, tensors, backwards)
    assert {value.dtype for value in found.values()} == {dtype}
    assert_agrees(found, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("reason", ["on a CPU", "switched off", "in float64", "not installed", "compiled"])
def test_pytorch_computes_where_the_kernel_cannot_be_used(monkeypatch, reason):
    def kernel(*tensors):
        raise AssertionError("The kernel is called.")

    monkeypatch.setattr(module, "cuda_kernel", lambda: None if reason == "not installed" else kernel)
    monkeypatch.setattr(module, "USE_CUDA_KERNEL", reason != "switched off")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: reason == "compiled")
    tensors = inputs(30, dtype=torch.float64 if reason == "in float64" else torch.float32)
    found = selective_scan(*(tensors if reason == "on a CPU" else on_a_gpu(tensors)))
    torch.testing.assert_close(found, literal_scan(*tensors), check_dtype=True)


MAMBA_MODULE = "mamba_ssm.ops.selective_scan_interface"


@pytest.fixture
def install(monkeypatch):
    """A function that puts a module into `sys.modules`. At first no package with a kernel is installed."""
    cuda_kernel.cache_clear()
    for name in ("mamba_ssm", "mamba_ssm.ops", MAMBA_MODULE, "kernels"):
        monkeypatch.setitem(sys.modules, name, None)

    def install(name: str, **content) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))

    yield install
    cuda_kernel.cache_clear()


def test_mamba_ssm_is_preferred_to_the_hub(install, warnings_of):
    asked = []

    def get_kernel(name, version):
        asked.append(name)
        return SimpleNamespace(selective_scan_fn="from the Hub")

    assert cuda_kernel() is None
    cuda_kernel.cache_clear()
    install("kernels", get_kernel=get_kernel)
    assert cuda_kernel() == cuda_kernel() == "from the Hub"
    assert asked == ["kernels-community/mamba-ssm"]
    cuda_kernel.cache_clear()
    install(MAMBA_MODULE, selective_scan_fn="from mamba_ssm")
    assert cuda_kernel() == "from mamba_ssm" and len(asked) == 1
    assert not warnings_of()


@pytest.mark.parametrize(
    "error",
    [
        ImportError("undefined symbol"),
        OSError("libcudart.so.11.0 is missing"),
        ModuleNotFoundError("No module named 'selective_scan_cuda'", name="selective_scan_cuda"),
    ],
)
def test_kernels_that_cannot_be_loaded_are_named_in_one_warning_each(install, warnings_of, monkeypatch, error):
    import_module = module.importlib.import_module

    def fail_for_mamba(name):
        if name == MAMBA_MODULE:
            raise error
        return import_module(name)

    def get_kernel(name, version):
        raise ValueError("no build for torch 9.9")

    monkeypatch.setattr(module.importlib, "import_module", fail_for_mamba)
    install("kernels", get_kernel=get_kernel)
    assert cuda_kernel() is None and cuda_kernel() is None
    of_mamba, of_hub = warnings_of()
    assert "mamba_ssm" in of_mamba and str(error) in of_mamba
    assert "kernels" in of_hub and "no build for torch 9.9" in of_hub
