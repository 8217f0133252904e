"""Exported programs compute what the model computes, and a failed export writes nothing."""

import functools
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
from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.cli.main import app
from dart_hf.export import Export, export_model
from dart_hf.export.exporting import _image_size
from dart_hf.export.onnx_scan import scans_as_nodes
from dart_hf.modeling import modeling_dart_vim
from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel
from dart_hf.modeling.selective_scan import selective_scan

SIDE = 64
LABELS = ["ant", "bee", "cicada", "dragonfly"]
# For logits of order one. float32 gives the edges of regions to a thousandth of a pixel.
TOLERANCE = 2e-3
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


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
    for module in model.scorer.trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train().momentum = None
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


def reuse(monkeypatch, program: onnx.ModelProto) -> None:
    """Let the next export to ONNX write this program, which saves seconds."""
    monkeypatch.setattr(dart_hf.export.exporting, "trace", lambda model, input_shape: None)
    monkeypatch.setattr(dart_hf.export.onnx, "write_program", lambda traced, path: onnx.save(program, path))


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
    assert (exported.input_shape, exported.int8_deviation) == ((3, SIDE, SIDE), None)
    assert 0 < exported.deviation < 1e-3
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(model_folder).to_dict()
    assert [AutoConfig.from_pretrained(folder).id2label[index] for index in range(4)] == LABELS
    photograph = processor(skimage.data.coffee(), return_tensors="pt").pixel_values
    expected = model_logits(model_folder, photograph)
    torch.testing.assert_close(program(exported.path)(photograph), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "model_type", ["dart", "dart_vim", "dartified", pytest.param("dart_rmt", marks=pytest.mark.slow)]
)
def test_batches_of_any_size_give_the_logits_of_single_images(in_onnx, model_type):
    model_folder, exported = in_onnx(model_type)
    run, images = program(exported.path), pixels(7)
    expected = model_logits(model_folder, images)
    assert expected.std(dim=0).min() > 0.05, "the test needs images with different logits"
    for found in (run(images), torch.cat([run(image[None]) for image in images]), run(images[:3])):
        torch.testing.assert_close(found, expected[: len(found)], atol=TOLERANCE, rtol=0)
    # Each of the two scans of a layer of Vision Mamba is one node, of the standard operators.
    model = onnx.load(exported.path)
    assert [node.op_type for node in model.graph.node].count("Scan") == (2 if model_type == "dart_vim" else 0)
    assert {opset.domain for opset in model.opset_import} == {""}


def test_selective_scan_is_restored_after_an_error():
    with pytest.raises(RuntimeError, match="interrupted"), scans_as_nodes():
        assert modeling_dart_vim.selective_scan is not selective_scan
        raise RuntimeError("interrupted")
    assert modeling_dart_vim.selective_scan is selective_scan


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
        ("onnx", {"scorer": "detail"}),
        slow("onnx", {"scorer": "encoder", "scorer_layers": 1}),
        slow("torch", {"scorer": "encoder", "model_type": "dart_rmt"}),
        slow("onnx", {"partition": "grid", "statistics": False}),
        slow("onnx", {"scorer": "mobilenet_v3_small", "scorer_head": "v2", "score_normalization": "batch"}),
        slow("torch", {"score_normalization": "image", "scorer_head": "v2"}),
        slow("torch", {"model_type": "dart_vim"}),
        slow("torch", {"model_type": "dart_rmt", "first_strip_edge": 2}),
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


def test_image_size_is_that_of_the_image_processor():
    for expected, settings in (
        ((32, 48), {"size": 40, "crop_size": {"height": 32, "width": 48}}),
        ((40, 56), {"size": {"height": 40, "width": 56}, "do_center_crop": False}),
        ((SIDE, SIDE), {"size": 40, "do_center_crop": False}),
    ):
        assert _image_size(DartImageProcessor(**settings), SIDE) == expected


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
    reuse(monkeypatch, onnx.load(exported.path))
    done = export_model(model_folder, tmp_path / "out", int8=True)
    assert done.path.stat().st_size < exported.path.stat().st_size
    graph = onnx.load(done.path).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(outputs)
    # Each output of a layer has its own scale.
    scales = [constant.dims[0] for constant in graph.initializer if constant.name.endswith("_scale") and constant.dims]
    assert sorted(scales) == sorted(outputs)
    images = pixels(5)
    found, expected = program(done.path)(images), model_logits(model_folder, images)
    assert 1e-3 < float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.05
    assert 1e-3 < done.int8_deviation < 0.05
    assert done.deviation == pytest.approx(exported.deviation)


def test_int8_is_refused_without_layers_or_with_large_errors(tmp_path, monkeypatch, model_folder, exported):
    reuse(monkeypatch, onnx.load(exported.path))
    monkeypatch.setattr(dart_hf.export.checking, "INT8_TOLERANCE", 1e-3)
    with pytest.raises(ValueError, match=r"int8 changes the logits by .*nothing was written"):
        export_model(model_folder, tmp_path / "refused", int8=True)
    monkeypatch.setattr(dart_hf.export.onnx, "_is_in_encoder", lambda node: False)
    with pytest.raises(ValueError, match="int8 finds no linear layer of the encoder"):
        export_model(model_folder, tmp_path / "refused", int8=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", [1.1, torch.nan])
def test_program_that_disagrees_is_not_written(tmp_path, monkeypatch, model_folder, exported, factor):
    """The file has another classifier than the model."""
    other = onnx.load(exported.path)
    (weight,) = [constant for constant in other.graph.initializer if constant.name.endswith("classifier.weight")]
    changed = onnx.numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    reuse(monkeypatch, other)
    with pytest.raises(ValueError, match=r"does not agree with PyTorch: .*nothing was written"):
        export_model(model_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, in_onnx) -> Path:
    """A folder with `model`, and with models and outputs that are refused."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "model").symlink_to(in_onnx("dart")[0])
    for name, content in {"used/file.txt": "mine", "vit/config.json": '{"model_type": "vit"}'}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(content)
    save_model(folder / "grid", partition="grid")
    dead = DartForImageClassification.from_pretrained(save_model(folder / "dead", scorer="mobilenet_v3_small"))
    dead.scorer.trunk_loaded.zero_()
    dead.save_pretrained(folder / "dead")
    return folder


def run(*arguments: str):
    return CliRunner().invoke(app, ["export", "--model", *arguments], prog_name="dart-hf", catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("model --output out --format tflite", "format must be one of 'onnx', 'torch', got 'tflite'"),
        ("model --output out --format torch --int8", "int8 needs format='onnx', got 'torch'"),
        ("model --output out --num-patches 0", "--num-patches"),
        ("model --output used", "the folder used is not empty"),
        ("model --output used/file.txt", "used/file.txt is a file"),
        ("vit --output out", "'vit', not a DART model"),
        ("dead --output out", "The scorer is dead"),
        ("grid --output out --num-patches 11", "num_patches=11 does not fill the 3 rows"),
        ("model --output out", "format='onnx' needs onnxscript, which is not installed: pip install 'dart-hf[export]'"),
    ],
)
def test_mistake_gives_one_line_and_writes_nothing(mistakes, monkeypatch, arguments, words):
    monkeypatch.chdir(mistakes)
    if "onnxscript" in words:
        without(monkeypatch, "onnxscript")
    before = set(mistakes.rglob("*"))
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and len(result.stderr.splitlines()) == 1
    assert set(mistakes.rglob("*")) == before


def test_command_reports_steps_and_result(tmp_path, monkeypatch):
    """The model is in half precision, and its program in float32. Program and configuration have the new budget."""
    model_folder = save_model(tmp_path / "model", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    without(monkeypatch, "onnx", "onnxscript", "onnxruntime")
    result = run(str(model_folder), "--output", "some/out", "--format", "torch", "--num-patches", "17")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["Tracing", "Writing", "Comparing"]
    wrote, differs = result.stdout.splitlines()
    assert wrote == f"Wrote some/out/model.pt2, for pixel_values of shape (batch, 3, {SIDE}, {SIDE})"
    assert differs.startswith("Its logits differ from PyTorch's by at most 0.0")
    assert [path.name for path in Path("some").iterdir()] == ["out"]
    images = pixels(3)
    expected = model_logits(model_folder, images, num_patches=17)
    assert (expected - model_logits(model_folder, images)).abs().max() > 10 * TOLERANCE
    torch.testing.assert_close(program(Path("some/out/model.pt2"))(images), expected, atol=TOLERANCE, rtol=0)
    config = DartConfig.from_pretrained("some/out")
    assert (config.num_patches, config.dtype) == (17, torch.float32)
