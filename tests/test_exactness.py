"""The models compute what the authors' code computes (`golden/README.md` says what each tensor is)."""

import functools
import shutil

import golden
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from dart_hf.export import export_model
from dart_hf.modeling.modeling_dart_rmt import DartRmtStage
from dart_hf.modeling.modeling_dart_vim import DartVimMixer
from dart_hf.modeling.region_partition import Regions
from dart_hf.modeling.region_sampling import patch_images, sample_regions
from dart_hf.modeling.region_tokenizer import RegionTokenizer

REFERENCE_VARIANTS = (
    "darvit-tiny",
    "darvit-tiny-v2",
    "darvit-tiny-ft121p",
    "darvit-sm-ft392p",
    "darvim-tiny",
    "darmt-L6",
)
ALL_VARIANTS = (
    *REFERENCE_VARIANTS,
    "darvit-sm",
    "darvit-sm-ft144p",
    "darvit-sm-ft288p",
    "darvim-tiny-ft2seq",
    "darvim-sm",
    "darvim-sm-ft2seq",
)
STORED = [(variant, name) for variant in REFERENCE_VARIANTS for name in golden.reference(variant)]


def slow_unless(condition: bool, *parameters):
    """Parameters of a test that runs in `make test` only if the condition holds."""
    return pytest.param(*parameters, marks=[] if condition else pytest.mark.slow)


def relative_error(computed: torch.Tensor, expected: np.ndarray) -> float:
    """max|a - b| / max|b|; shapes must agree."""
    expected = torch.from_numpy(expected).double()
    assert computed.shape == expected.shape
    return ((computed.double() - expected).abs().max() / expected.abs().max()).item()


def tolerance(variant: str, name: str) -> float:
    """Ours is 1e-6; agreement is in fact much closer, limited by how the reference is stored.

    RMT's encoder has frequencies and decay rates in float32, which another processor may round in another way.
    """
    if variant == "darmt-L6" and name in ("stage_outputs_mean", "logits", "grad_scorer_in_bias"):
        return 1e-6
    return 2e-7 if golden.reference(variant)[name].dtype == np.float32 else 1e-8


def photographs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(golden.normalised(golden.inputs())).to(dtype)


@pytest.fixture(scope="module")
def load(converted):
    """Variant -> the converted model, with the settings of `from_pretrained`."""

    def load(variant: str, **settings) -> PreTrainedModel:
        return AutoModelForImageClassification.from_pretrained(converted(variant), **settings)

    return load


# --- float64 ---------------------------------------------------------------------------------------------------------


def outputs_of(model: PreTrainedModel, kind: type[torch.nn.Module]) -> list[torch.Tensor]:
    """What the modules of a class will return, in their order."""
    outputs = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return outputs


def leaves(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the reference may store gradients of, by their names there."""
    base, tokenizer = model.base_model, model.base_model.tokenizer
    found = {
        "grad_scorer_in_bias": tokenizer.scorer.head.fc1.bias,
        "grad_scorer_out_weight": tokenizer.scorer.head.fc2.weight,
        "grad_pixels_mean_abs": pixel_values,
    }
    if isinstance(tokenizer, RegionTokenizer):
        found["grad_pos_embed"] = tokenizer.position_embeddings
        found["grad_projection_bias"] = tokenizer.projection.bias
    if model.config.model_type == "dart_vim":
        found["grad_layer0_A_b_log"] = base.layers[0].mixer.backward_scan.A_log
    return found


def of_the_tokenizer(model: PreTrainedModel, pixel_values: torch.Tensor, regions: Regions) -> dict[str, torch.Tensor]:
    tokenizer = model.base_model.tokenizer
    if not isinstance(tokenizer, RegionTokenizer):
        return {"reshaped_image": tokenizer.rebuild(pixel_values, regions)[:, :, ::8, ::8]}
    patches = sample_regions(pixel_values, regions, model.config.patch_size)
    return {
        "patches_first_last": patch_images(patches, model.config.patch_size)[:, [0, 1, -2, -1]],
        "embeddings_every_8th": tokenizer.projection(patches)[:, ::8],
        "position_embeddings_every_8th": tokenizer.positions(regions)[:, ::8],
    }


@pytest.fixture(scope="module")
def in_float64(load):
    """Variant -> all that its reference stores, computed by the converted model."""

    @functools.cache
    def compute(variant: str) -> dict[str, torch.Tensor]:
        model = load(variant, dtype=torch.float64)
        mixers, stages = outputs_of(model, DartVimMixer), outputs_of(model, DartRmtStage)
        pixel_values = photographs().requires_grad_()
        outputs = model(pixel_values, output_regions=True)
        computed = {
            "scores": outputs.regions.scores.flatten(1),
            "row_heights": outputs.regions.row_edges.diff(dim=1),
            "edges": outputs.regions.strip_edges,
            "logits": outputs.logits,
            **of_the_tokenizer(model, pixel_values, outputs.regions),
        }
        if mixers:
            computed["layer0_mixer_output"] = mixers[0][:, ::16]
        if stages:
            computed["stage_outputs_mean"] = torch.stack([features.mean(dim=(1, 2, 3)) for features in stages])

        weights = torch.from_numpy(np.random.RandomState(0).standard_normal(outputs.logits.shape))
        wanted = {name: leaf for name, leaf in leaves(model, pixel_values).items() if (variant, name) in STORED}
        gradients = torch.autograd.grad((outputs.logits * weights).sum(), wanted.values())
        computed |= dict(zip(wanted, gradients, strict=True))
        if "grad_pos_embed" in wanted:
            # The rows of the class token and of the first eight cells.
            computed["grad_pos_embed"] = computed["grad_pos_embed"][:, :9]
        if "grad_pixels_mean_abs" in wanted:
            computed["grad_pixels_mean_abs"] = computed["grad_pixels_mean_abs"].abs().mean(dim=(1, 2, 3))
        return {name: value.detach() for name, value in computed.items()}

    return compute


# RMT has 100 million parameters; in float64 they take a minute. The quick tests compare its float32 logits.
@pytest.mark.parametrize(("variant", "name"), [slow_unless(case[0] != "darmt-L6", *case) for case in STORED])
def test_every_stored_tensor_agrees_in_float64(variant, name, in_float64):
    assert relative_error(in_float64(variant)[name], golden.reference(variant)[name]) < tolerance(variant, name)


def compiled(model, pixel_values):
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def compiled_layers(model, pixel_values):
    """One graph for all layers: to compile 24 of them in one takes a minute."""
    torch.compiler.reset()
    for layer in model.base_model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    return model


def exported(model, pixel_values):
    return torch.export.export(model, (pixel_values,), {"output_regions": True}).module()


def channels_last(model, pixel_values):
    return lambda images, **settings: model(images.contiguous(memory_format=torch.channels_last), **settings)


def unfolded(model, pixel_values):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: None)
    return model


VIT_PATHS = (compiled, exported, channels_last, unfolded)
PATHS = [
    *(("darvit-tiny-v2", path) for path in VIT_PATHS),
    *(("darvit-sm-ft392p", path) for path in VIT_PATHS),
    *(("darvim-tiny", path) for path in (compiled_layers, exported, channels_last)),
    *(("darmt-L6", path) for path in (exported, channels_last)),
]
QUICK_PATHS = [
    *(("darvit-tiny-v2", path) for path in (exported, channels_last, unfolded)),
    ("darvim-tiny", compiled_layers),
]


@pytest.mark.parametrize(("variant", "path"), [slow_unless(case in QUICK_PATHS, *case) for case in PATHS])
def test_every_path_agrees_with_the_authors_code_in_float64(variant, path, load):
    expected = golden.reference(variant)
    with torch.no_grad():
        outputs = path(load(variant, dtype=torch.float64), photographs())(photographs(), output_regions=True)
    for name, found in {"edges": outputs.regions.strip_edges, "logits": outputs.logits}.items():
        assert relative_error(found, expected[name]) < tolerance(variant, name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled programs need a C++ compiler")
def test_compiled_programs_agree_with_the_authors_code(load):
    """The compiler's own code, not only its graph."""
    torch.compiler.reset()
    model = load("darvit-tiny", dtype=torch.float64)
    # One layer of the encoder is like another, and to compile them all takes minutes.
    model.dart.encode = torch.compiler.disable(model.dart.encode)
    with torch.no_grad():
        logits = torch.compile(model)(photographs()).logits
    assert relative_error(logits, golden.reference("darvit-tiny")["logits"]) < tolerance("darvit-tiny", "logits")


# --- less than float64 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_float32(load):
    """Variant -> the outputs in float32."""

    @functools.cache
    def run(variant: str):
        with torch.no_grad():
            return load(variant)(photographs(torch.float32), output_regions=True)

    return run


@pytest.mark.parametrize("variant", REFERENCE_VARIANTS)
def test_float32_logits_agree_with_the_authors_code(variant, in_float32):
    logits = in_float32(variant).logits
    assert logits.dtype == torch.float32
    assert relative_error(logits, golden.reference(variant)["logits"]) < (1e-4 if variant == "darmt-L6" else 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["darvit-tiny", "darvim-tiny"])
def test_onnx_programs_agree_with_the_authors_code(variant, converted, tmp_path):
    import onnxruntime

    program = export_model(converted(variant), tmp_path / "program").path
    images = photographs(torch.float32).numpy()
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": images})
    assert relative_error(torch.from_numpy(logits), golden.reference(variant)["logits"]) < 2e-3


NOISE = {torch.bfloat16: 0.03, torch.float16: 0.004}


@pytest.mark.parametrize("mode", ["weights", "autocast"])
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *(("darvit-tiny-v2", dtype) for dtype in NOISE),
        *(slow_unless(False, variant, dtype) for variant in ("darvit-sm-ft392p", "darvim-tiny") for dtype in NOISE),
        slow_unless(False, "darmt-L6", torch.bfloat16),
    ],
)
def test_half_precision_keeps_the_partition_and_is_off_by_its_noise_alone(variant, dtype, mode, load, in_float32):
    """A plain ViT of these sizes is as far off: up to 1.5% in bfloat16 and 0.2% in float16."""
    pixel_values, expected = photographs(torch.float32), in_float32(variant)
    with torch.no_grad():
        if mode == "weights":
            model = load(variant, dtype=dtype, device_map="auto")
            assert model.classifier.weight.dtype == dtype
            found = model(pixel_values, output_regions=True)
        else:
            model = load(variant)
            with torch.autocast("cpu", dtype=dtype):
                found = model(pixel_values, output_regions=True)
    assert torch.equal(found.regions.row_edges, expected.regions.row_edges)
    assert torch.equal(found.regions.strip_edges, expected.regions.strip_edges)
    assert found.logits.dtype == dtype
    assert 0 < relative_error(found.logits, expected.logits.numpy()) < NOISE[dtype]


@pytest.mark.parametrize(
    "variant", [slow_unless(variant in ("darvit-tiny-ft121p", "darvim-tiny"), variant) for variant in ALL_VARIANTS]
)
def test_published_models_survive_saving_and_loading(variant, load, in_float32, tmp_path):
    model, published = load(variant), golden.manifest(variant)
    # RMT's manifest leaves out that its budget is 14×14.
    assert model.config.num_patches == published.get("num_patches", 196)
    assert model.config.image_size == published["image_size"]
    assert (model.config.scorer, model.config.scorer_head) == (published["scorer"], published["scorer_head"])

    model.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    logits = in_float32(variant).logits
    with torch.no_grad():
        torch.testing.assert_close(reloaded(photographs(torch.float32)).logits, logits)
    assert logits.isfinite().all()
