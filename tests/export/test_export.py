"""Exported programs compute what the model computes, and a failed export writes nothing."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage
import torch
from helpers.tiny_models import tiny_classifier
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

import dart_hf.environment
import dart_hf.export.checking
import dart_hf.export.exporting
import dart_hf.export.onnx
import dart_hf.export.torch
from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor, DartModel
from dart_hf.cli.main import app
from dart_hf.export import Export, export_model
from dart_hf.export.exporting import _image_size
from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel

SIDE = 64
LABELS = ["ant", "bee", "cicada", "dragonfly"]
# For logits of order one. float32 gives the edges of regions to a thousandth of a pixel.
TOLERANCE = 2e-3


def save_model(
    folder: Path, model_type: str = "dart", statistics: bool = True, dtype: torch.dtype = torch.float32, **settings
) -> Path:
    """The folder of a small model and its image processor."""
    # With weights of order one the regions change the logits.
    defaults = {"image_size": SIDE, "score_normalization": "running", "initializer_range": 0.3}
    model = tiny_classifier(LABELS, model_type, **{**defaults, **settings})
    if model.config.scorer != "conv":
        give_trunk_weights(model)
    if statistics:
        model.train()(pixels(8))
    model.to(dtype).save_pretrained(folder)
    DartImageProcessor(size=SIDE, crop_size=SIDE).save_pretrained(folder)
    return folder


@torch.no_grad()
def give_trunk_weights(model: RegionPreTrainedModel) -> None:
    """Give a random trunk statistics, without which its features are rounding noise."""
    norms = [module for module in model.scorer.trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None
    model.scorer.trunk(pixels(16))
    model.scorer.trunk.eval()
    model.scorer.trunk_loaded.fill_(1)


def pixels(count: int) -> torch.Tensor:
    """Smooth images (count, 3, SIDE, SIDE)."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    return torch.nn.functional.interpolate(coarse, SIDE, mode="bicubic")


def program(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The program in a file, loaded by the functions of its runtime."""
    if path.suffix == ".pt2":
        return torch.no_grad()(torch.export.load(path).module())
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


def model_logits(folder: Path, images: torch.Tensor, **settings) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)(images, **settings).logits


@pytest.fixture(scope="module")
def in_onnx(tmp_path_factory) -> Callable[[str], tuple[Path, Export]]:
    """Model type -> the folder of a model, and its export to ONNX."""

    @functools.cache
    def export(model_type: str) -> tuple[Path, Export]:
        folder = save_model(tmp_path_factory.mktemp("model"), model_type)
        return folder, export_model(folder, tmp_path_factory.mktemp("exported"))

    return export


def reuse(exported: Export, monkeypatch) -> None:
    """Let the next export to ONNX write a program that was exported before, which saves seconds."""
    monkeypatch.setattr(dart_hf.export.exporting, "trace", lambda model, input_shape: None)
    monkeypatch.setattr(
        dart_hf.export.onnx, "write_program", lambda program, path: path.write_bytes(exported.path.read_bytes())
    )


def without(monkeypatch, *packages: str) -> None:
    """Let packages look as if they were not installed."""
    find_spec = dart_hf.environment.find_spec
    monkeypatch.setattr(dart_hf.environment, "find_spec", lambda name: None if name in packages else find_spec(name))


@pytest.fixture
def model_folder(in_onnx) -> Path:
    return in_onnx("dart")[0]


@pytest.fixture
def exported(in_onnx) -> Export:
    return in_onnx("dart")[1]


def test_export_is_a_folder_with_program_labels_and_preprocessing(exported, model_folder):
    folder = exported.path.parent
    files = {path.name for path in folder.iterdir() if path.suffix != ".py"}
    assert files == {"model.onnx", "config.json", "preprocessor_config.json"}
    session = onnxruntime.InferenceSession(exported.path)
    ((given, returned),) = zip(session.get_inputs(), session.get_outputs(), strict=True)
    assert (given.name, given.shape, given.type) == ("pixel_values", ["batch", 3, SIDE, SIDE], "tensor(float)")
    assert (returned.name, returned.shape) == ("logits", ["batch", len(LABELS)])
    assert exported.input_shape == (3, SIDE, SIDE)
    assert 0 < exported.deviation < 1e-3
    assert exported.int8_deviation is None

    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(model_folder).to_dict()
    assert [AutoConfig.from_pretrained(folder).id2label[index] for index in range(4)] == LABELS
    photograph = processor(skimage.data.coffee(), return_tensors="pt").pixel_values
    expected = model_logits(model_folder, photograph)
    torch.testing.assert_close(program(exported.path)(photograph), expected, atol=TOLERANCE, rtol=0)


SLOW_RMT = pytest.param("dart_rmt", marks=pytest.mark.slow)


@pytest.mark.parametrize("model_type", ["dart", "dart_vim", SLOW_RMT])
def test_batches_of_any_size_give_the_logits_of_single_images(in_onnx, model_type):
    model_folder, exported = in_onnx(model_type)
    run, images = program(exported.path), pixels(7)
    expected = model_logits(model_folder, images)
    assert expected.std(dim=0).min() > 0.05, "the test needs images with different logits"
    for found in (run(images), torch.cat([run(image[None]) for image in images]), torch.cat([run(images[:3])] * 3)[:3]):
        torch.testing.assert_close(found, expected[: len(found)], atol=TOLERANCE, rtol=0)


def test_image_with_unusable_scores_gets_the_uniform_partition(exported, model_folder):
    images = pixels(3)
    images[1] = 0.5
    torch.testing.assert_close(program(exported.path)(images), model_logits(model_folder, images), atol=2e-3, rtol=0)
    images[2, 0, 10, 10] = torch.nan
    found = program(exported.path)(images)
    assert found[:2].isfinite().all() and found[2].isnan().all()


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("torch", {"partition": "uniform"}),
        pytest.param("onnx", {"partition": "grid", "statistics": False}, marks=pytest.mark.slow),
        pytest.param(
            "onnx",
            {"scorer": "mobilenet_v3_small", "scorer_head": "v2", "score_normalization": "batch"},
            marks=pytest.mark.slow,
        ),
        pytest.param("torch", {"score_normalization": "image", "scorer_head": "v2"}, marks=pytest.mark.slow),
        pytest.param("torch", {"model_type": "dart_vim"}, marks=pytest.mark.slow),
        pytest.param("torch", {"model_type": "dart_rmt", "first_strip_edge": 2}, marks=pytest.mark.slow),
    ],
)
def test_program_agrees_with_the_model(tmp_path, format, settings):
    folder = save_model(tmp_path / "model", **settings)
    path = export_model(folder, tmp_path / "out", format=format).path
    assert path == tmp_path / "out" / {"onnx": "model.onnx", "torch": "model.pt2"}[format]
    run, images = program(path), pixels(5)
    for batch in (images, images[:1], images[2:]):
        torch.testing.assert_close(run(batch), model_logits(folder, batch), atol=TOLERANCE, rtol=0)
    change = (run(images)[:1] - run(images[:1])).abs().max()
    assert (change > 10 * TOLERANCE) == (settings.get("score_normalization") == "batch")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 40, "crop_size": {"height": 32, "width": 48}}, (3, 32, 48)),
        ({"size": {"height": 40, "width": 56}, "do_center_crop": False}, (3, 40, 56)),
        ({"size": 40, "do_center_crop": False}, (3, SIDE, SIDE)),
    ],
)
def test_image_size_is_that_of_the_image_processor(settings, expected):
    assert (3, *_image_size(DartImageProcessor(**settings), SIDE)) == expected


@pytest.mark.parametrize(
    ("model_type", "outputs"),
    [
        # Query, key, value, output and two layers of the MLP; neither the scorer nor the classifier.
        ("dart", [32] * 6),
        # The first and last layer of a mixer; not the layers that compute the time steps.
        ("dart_vim", [128, 32]),
        pytest.param("dart_rmt", [16] * 4 + [32, 16] + [32] * 4 + [64, 32], marks=pytest.mark.slow),
    ],
)
def test_int8_quantizes_the_linear_layers_of_the_encoder(tmp_path, monkeypatch, in_onnx, model_type, outputs):
    model_folder, exported = in_onnx(model_type)
    single = exported.path.stat().st_size
    reuse(exported, monkeypatch)
    done = export_model(model_folder, tmp_path / "out", int8=True)
    assert done.path.stat().st_size < single
    graph = onnx.load(done.path).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(outputs)
    # Each output of a layer has its own scale.
    scales = [constant for constant in graph.initializer if constant.name.endswith("_scale")]
    assert sorted(scale.dims[0] for scale in scales if scale.dims) == sorted(outputs)
    images = pixels(5)
    found, expected = program(done.path)(images), model_logits(model_folder, images)
    share = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 1e-3 < share < 0.05
    assert 1e-3 < done.int8_deviation < 0.05
    assert done.deviation == pytest.approx(exported.deviation)


def test_int8_is_refused_without_layers_or_with_large_errors(tmp_path, monkeypatch, model_folder, exported):
    reuse(exported, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(dart_hf.export.onnx, "_is_in_encoder", lambda node: False)
        with pytest.raises(ValueError, match="int8 finds no linear layer of the encoder"):
            export_model(model_folder, tmp_path / "refused", int8=True)
    monkeypatch.setattr(dart_hf.export.checking, "INT8_TOLERANCE", 1e-3)
    with pytest.raises(ValueError, match=r"int8 changes the logits by .*nothing was written"):
        export_model(model_folder, tmp_path / "refused", int8=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_program_that_disagrees_is_not_written(tmp_path, monkeypatch, model_folder, exported, factor):
    """The file has another classifier than the model."""
    other = onnx.load(exported.path)
    (weight,) = [constant for constant in other.graph.initializer if constant.name.endswith("classifier.weight")]
    changed = onnx.numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    monkeypatch.setattr(dart_hf.export.exporting, "trace", lambda model, input_shape: None)
    monkeypatch.setattr(dart_hf.export.onnx, "write_program", lambda program, path: onnx.save(other, path))
    with pytest.raises(ValueError, match=r"does not agree with PyTorch: .*nothing was written"):
        export_model(model_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mistakes(tmp_path, monkeypatch, model_folder) -> Path:
    """The working folder, with `model`, and with models and outputs that are refused."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model_folder)
    Path("used").mkdir()
    Path("used", "file.txt").write_text("mine")
    Path("vit").mkdir()
    Path("vit", "config.json").write_text(json.dumps({"model_type": "vit"}))
    save_model(Path("grid"), partition="grid")
    save_model(Path("dead"), scorer="mobilenet_v3_small")
    dead = DartForImageClassification.from_pretrained("dead")
    dead.scorer.trunk_loaded.zero_()
    dead.save_pretrained("dead")
    DartModel(dead.config).save_pretrained("encoder")
    AutoImageProcessor.from_pretrained("dead").save_pretrained("encoder")
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, ["export", "--model", *arguments], prog_name="dart-hf", catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "--format", "tflite"], "format must be one of 'onnx', 'torch', got 'tflite'"),
        (["model", "--format", "torch", "--int8"], "int8 needs format='onnx', got 'torch'"),
        (["model", "--num-patches", "0"], "--num-patches"),
        (["model", "--output", "used"], "the folder used is not empty"),
        (["model", "--output", "used/file.txt"], "used/file.txt is a file"),
        (["./none"], "There is no folder './none'"),
        (["vit"], "'vit', not a DART model"),
        (["encoder"], "'encoder' has no classifier: it is DartModel"),
        (["dead"], "The scorer is dead"),
        (["grid", "--num-patches", "11"], "num_patches=11 does not fill the 3 rows"),
    ],
)
def test_mistake_gives_one_line_and_writes_nothing(mistakes, arguments, words):
    before = set(mistakes.rglob("*"))
    result = run(*(arguments if "--output" in arguments else [*arguments, "--output", "out"]))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert set(mistakes.rglob("*")) == before


def test_missing_package_is_named(mistakes, monkeypatch):
    without(monkeypatch, "onnxscript")
    result = run("model", "--output", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "dart-hf: format='onnx' needs onnxscript, which is not installed: pip install 'dart-hf[export]'.\n"
    )


def test_command_reports_steps_and_result(tmp_path, monkeypatch):
    """The model is in half precision, and its program in float32."""
    model_folder = save_model(tmp_path / "model", dtype=torch.bfloat16)
    assert DartForImageClassification.from_pretrained(model_folder).dtype == torch.bfloat16
    monkeypatch.chdir(tmp_path)
    without(monkeypatch, "onnx", "onnxscript", "onnxruntime")
    result = run(str(model_folder), "--output", "some/out", "--format", "torch", "--num-patches", "17")
    assert result.exit_code == 0
    wrote, differs = result.stdout.splitlines()
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["Tracing", "Writing", "Comparing"]
    assert wrote == f"Wrote some/out/model.pt2, for pixel_values of shape (batch, 3, {SIDE}, {SIDE})"
    assert differs.startswith("Its logits differ from PyTorch's by at most 0.0")
    assert [path.name for path in Path("some").iterdir()] == ["out"]

    # Program and configuration have the new budget.
    images = pixels(3)
    expected = model_logits(model_folder, images, num_patches=17)
    assert (expected - model_logits(model_folder, images)).abs().max() > 10 * TOLERANCE
    torch.testing.assert_close(program(Path("some/out/model.pt2"))(images), expected, atol=TOLERANCE, rtol=0)
    config = DartConfig.from_pretrained("some/out")
    assert (config.num_patches, config.dtype) == (17, torch.float32)
