"""The models compute what the authors' code computes (`golden/README.md` says what each tensor is)."""

import shutil

import golden
import numpy as np
import pytest
import torch

from dart_hf import DartConfig, DartForImageClassification
from dart_hf.export import export_model
from dart_hf.modeling.region_partition import grid_regions
from dart_hf.modeling.region_sampling import patch_images, sample_regions
from dart_hf.modeling.region_scorer import RegionScorer

REFERENCE_VARIANTS = ("darvit-tiny", "darvit-tiny-v2", "darvit-tiny-ft121p", "darvit-sm-ft392p")
ALL_VARIANTS = (*REFERENCE_VARIANTS, "darvit-sm", "darvit-sm-ft144p", "darvit-sm-ft288p")
TENSORS = (
    "scores",
    "row_heights",
    "edges",
    "patches_first_last",
    "embeddings_every_8th",
    "position_embeddings_every_8th",
    "logits",
    "grad_pos_embed",
    "grad_projection_bias",
    "grad_scorer_in_bias",
    "grad_scorer_out_weight",
    "grad_pixels_mean_abs",
)


def relative_error(computed: torch.Tensor, expected: np.ndarray) -> float:
    """max|a - b| / max|b|; shapes must agree."""
    expected = torch.from_numpy(expected).double()
    assert computed.shape == expected.shape
    return ((computed.double() - expected).abs().max() / expected.abs().max()).item()


def tolerance(expected: np.ndarray) -> float:
    """Ours is 1e-6; agreement is in fact much closer, limited by how the reference is stored."""
    return 2e-7 if expected.dtype == np.float32 else 1e-8


def photographs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(golden.normalised(golden.inputs())).to(dtype)


@pytest.fixture(scope="module", params=REFERENCE_VARIANTS)
def case(request, converted) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Everything that the reference stores, computed by the converted model in float64; and the reference."""
    expected = golden.reference(request.param)
    model = DartForImageClassification.from_pretrained(converted(request.param), dtype=torch.float64)
    pixel_values = photographs().requires_grad_()
    outputs = model(pixel_values, output_regions=True)
    weights = torch.from_numpy(np.random.RandomState(0).standard_normal(outputs.logits.shape))
    (outputs.logits * weights).sum().backward()

    tokenizer, head, regions = model.dart.tokenizer, model.dart.tokenizer.scorer.head, outputs.regions
    patches = sample_regions(pixel_values, regions, model.config.patch_size)
    embeddings, positions = tokenizer.projection(patches), tokenizer.positions(regions)
    computed = {
        "scores": regions.scores.flatten(1),
        "row_heights": regions.row_edges.diff(dim=1),
        "edges": regions.strip_edges,
        "patches_first_last": patch_images(patches, model.config.patch_size)[:, [0, 1, -2, -1]],
        "embeddings_every_8th": embeddings[:, ::8],
        "position_embeddings_every_8th": positions[:, ::8],
        "logits": outputs.logits,
        # The rows of the class token and of the first eight cells.
        "grad_pos_embed": tokenizer.position_embeddings.grad[:, :9],
        "grad_projection_bias": tokenizer.projection.bias.grad,
        "grad_scorer_in_bias": head.fc1.bias.grad,
        "grad_scorer_out_weight": head.fc2.weight.grad,
        "grad_pixels_mean_abs": pixel_values.grad.abs().mean(dim=(1, 2, 3)),
    }
    return {name: value.detach() for name, value in computed.items()}, expected


def test_every_stored_tensor_is_compared(case):
    _, expected = case
    assert set(TENSORS) == set(expected)


@pytest.mark.parametrize("name", TENSORS)
def test_float64_agrees_with_the_authors_code(case, name):
    computed, expected = case
    assert relative_error(computed[name], expected[name]) < tolerance(expected[name])


@pytest.mark.parametrize("variant", REFERENCE_VARIANTS)
def test_float32_logits_agree_with_the_authors_code(variant, converted):
    model = DartForImageClassification.from_pretrained(converted(variant))
    with torch.no_grad():
        logits = model(photographs(torch.float32)).logits
    assert logits.dtype == torch.float32
    assert relative_error(logits, golden.reference(variant)["logits"]) < 2e-3


def as_it_is(model, pixel_values):
    return model


def compiled(model, pixel_values):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def exported(model, pixel_values):
    return torch.export.export(model, (pixel_values,), {"output_regions": True}).module()


def channels_last(model, pixel_values):
    return lambda images, **settings: model(images.contiguous(memory_format=torch.channels_last), **settings)


def unfolded(model, pixel_values):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: None)
    return model


def image_by_image(model, pixel_values):
    """The scorer's trunk reads one image at a time."""

    def run(images, **settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dart_hf.modeling.scorer_trunk.LARGEST_REUSED_ALLOCATION", 1)
            return model(images, **settings)

    return run


@pytest.mark.parametrize("path", [as_it_is, compiled, exported, channels_last, unfolded, image_by_image])
@pytest.mark.parametrize("variant", ["darvit-tiny-v2", "darvit-sm-ft392p"])
def test_every_path_agrees_with_the_authors_code_in_float64(variant, path, converted):
    expected = golden.reference(variant)
    model = DartForImageClassification.from_pretrained(converted(variant), dtype=torch.float64)
    with torch.no_grad():
        outputs = path(model, photographs())(photographs(), output_regions=True)
    for name, found in {"edges": outputs.regions.strip_edges, "logits": outputs.logits}.items():
        assert relative_error(found, expected[name]) < tolerance(expected[name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled programs need a C++ compiler")
def test_compiled_programs_agree_with_the_authors_code(converted):
    """The compiler's own code, not only its graph."""
    torch.compiler.reset()
    expected = golden.reference("darvit-tiny")["logits"]
    model = DartForImageClassification.from_pretrained(converted("darvit-tiny"), dtype=torch.float64)
    # One layer of the encoder is like another, and to compile them all takes minutes.
    model.dart.encode = torch.compiler.disable(model.dart.encode)
    with torch.no_grad():
        assert relative_error(torch.compile(model)(photographs()).logits, expected) < tolerance(expected)


def test_onnx_programs_agree_with_the_authors_code(converted, tmp_path):
    import onnxruntime

    program = export_model(converted("darvit-tiny"), tmp_path / "program").path
    images = photographs(torch.float32).numpy()
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": images})
    assert relative_error(torch.from_numpy(logits), golden.reference("darvit-tiny")["logits"]) < 2e-3


@pytest.mark.parametrize("mode", ["weights", "autocast"])
@pytest.mark.parametrize(("dtype", "noise"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("variant", ["darvit-tiny-v2", "darvit-sm-ft392p"])
def test_half_precision_keeps_the_partition_and_is_off_by_its_noise_alone(variant, dtype, noise, mode, converted):
    """A plain ViT of these sizes is as far off: up to 1.5% in bfloat16 and 0.2% in float16."""
    model = DartForImageClassification.from_pretrained(converted(variant))
    pixel_values = photographs(torch.float32)
    with torch.no_grad():
        expected = model(pixel_values, output_regions=True)
        if mode == "weights":
            model = DartForImageClassification.from_pretrained(converted(variant), dtype=dtype)
            assert model.classifier.weight.dtype == dtype
            found = model(pixel_values, output_regions=True)
        else:
            with torch.autocast("cpu", dtype=dtype):
                found = model(pixel_values, output_regions=True)
    assert torch.equal(found.regions.row_edges, expected.regions.row_edges)
    assert torch.equal(found.regions.strip_edges, expected.regions.strip_edges)
    assert found.logits.dtype == dtype
    assert 0 < relative_error(found.logits, expected.logits.numpy()) < noise


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_published_models_survive_saving_and_loading(variant, converted, tmp_path):
    model = DartForImageClassification.from_pretrained(converted(variant))
    published = golden.manifest(variant)
    assert (model.config.num_patches, model.config.image_size) == (published["num_patches"], published["image_size"])
    assert (model.config.scorer, model.config.scorer_head) == (published["scorer"], published["scorer_head"])

    pixel_values = photographs(torch.float32)
    model.save_pretrained(tmp_path)
    reloaded = DartForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(pixel_values).logits
        assert torch.equal(reloaded(pixel_values).logits, logits)
    assert logits.isfinite().all()


def test_grid_partition_and_efficientnet_scorer_agree_with_the_authors_code():
    """The tokenizer of RMT-L6, whose encoder is not part of this package."""
    expected = golden.reference("darmt-L6")
    prefix = "pre_image.spn.spn.spn."
    config = DartConfig(scorer="efficientnet_b0", score_normalization="batch", scorer_frozen=True)
    scorer = RegionScorer(config).eval()
    tensors = {
        name.removeprefix(prefix)
        .replace("features.", "trunk.")
        .replace("mlp.net.0.", "head.fc1.")
        .replace("mlp.net.2.", "head.fc2."): torch.from_numpy(value)
        for name, value in golden.original_state_dict("darmt-L6").items()
        if name.startswith(prefix)
    }
    scorer.load_state_dict({**scorer.state_dict(), **tensors, "trunk_loaded": torch.tensor(True)})
    pixel_values = photographs()
    with torch.no_grad():
        scores = scorer.double()(pixel_values)
        regions = grid_regions(scores, 196, 448, 448, first_edge=2.0)
        patches = patch_images(sample_regions(pixel_values, regions, 16), 16)
    rebuilt = patches.unflatten(1, (14, 14)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 224, 224)

    assert relative_error(scores.flatten(1), expected["scores"]) < 1e-8
    assert relative_error(regions.row_edges.diff(dim=1), expected["row_heights"]) < 1e-8
    assert relative_error(regions.strip_edges, expected["edges"]) < 1e-8
    assert relative_error(rebuilt[:, :, ::8, ::8], expected["reshaped_image"]) < 2e-7
