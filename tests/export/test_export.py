"""Exported programs: loaded again they compute what the model computes; what goes wrong writes nothing."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import skimage
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

import dart_hf.export.onnx
from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor, DartModel
from dart_hf.cli.main import app
from dart_hf.export.onnx import Export, export_model
from dart_hf.modeling.modeling_dart_base import RegionPreTrainedModel

SIDE = 64
LABELS = ["ant", "bee", "cicada", "dragonfly"]
# Of logits of order one: float32 knows the edges of regions to a thousandth of a pixel.
TOLERANCE = 2e-3


def save_model(
    folder: Path, model_type: str = "dart", statistics: bool = True, dtype: torch.dtype = torch.float32, **settings
) -> Path:
    """The folder of a small model and its image processor."""
    # Weights of order one, so that the regions matter for the logits.
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
    """Make a random trunk respond to images: without statistics its features are rounding noise."""
    norms = [module for module in model.scorer.trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None
    model.scorer.trunk(pixels(16))
    model.scorer.trunk.eval()
    model.scorer.trunk_loaded.fill_(1)


def pixels(count: int) -> torch.Tensor:
    """Smooth images, as photographs are: (count, 3, SIDE, SIDE)."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    return torch.nn.functional.interpolate(coarse, SIDE, mode="bicubic")


def program(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The program in a file, by the runtime's own means."""
    if path.suffix == ".pt2":
        return torch.no_grad()(torch.export.load(path).module())
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


def model_logits(folder: Path, images: torch.Tensor, **settings) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)(images, **settings).logits


@pytest.fixture(scope="module")
def in_onnx(tmp_path_factory) -> Callable[[str], tuple[Path, Export]]:
    """Model type -> the folder of a model, and that model in ONNX."""

    @functools.cache
    def export(model_type: str) -> tuple[Path, Export]:
        folder = save_model(tmp_path_factory.mktemp("model"), model_type)
        return folder, export_model(folder, tmp_path_factory.mktemp("exported"))

    return export


@pytest.fixture
def model_folder(in_onnx) -> Path:
    return in_onnx("dart")[0]


@pytest.fixture
def exported(in_onnx) -> Export:
    return in_onnx("dart")[1]


def test_an_export_is_a_folder_with_program_labels_and_preprocessing(exported, model_folder):
    folder = exported.path.parent
    assert {path.name for path in folder.iterdir() if path.suffix != ".py"} == {
        "model.onnx",
        "config.json",
        "preprocessor_config.json",
    }
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
    photograph = processor(Image.fromarray(skimage.data.coffee()), return_tensors="pt").pixel_values
    expected = model_logits(model_folder, photograph)
    torch.testing.assert_close(program(exported.path)(photograph), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_any_number_of_images_gives_what_each_gives_alone(in_onnx, model_type):
    model_folder, exported = in_onnx(model_type)
    run, images = program(exported.path), pixels(7)
    expected = model_logits(model_folder, images)
    assert expected.std(dim=0).min() > 0.05, "the images must differ for the comparison to mean something"
    for found in (run(images), torch.cat([run(image[None]) for image in images]), torch.cat([run(images[:3])] * 3)[:3]):
        torch.testing.assert_close(found, expected[: len(found)], atol=TOLERANCE, rtol=0)


def test_an_image_that_cannot_be_scored_gets_the_uniform_partition(exported, model_folder):
    images = pixels(3)
    images[1] = 0.5
    torch.testing.assert_close(program(exported.path)(images), model_logits(model_folder, images), atol=2e-3, rtol=0)
    images[2, 0, 10, 10] = torch.nan
    found = program(exported.path)(images)
    assert found[:2].isfinite().all() and found[2].isnan().all()


# Everything that takes another way through the tokenizer, once.
@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("onnx", {"scorer": "mobilenet_v3_small", "scorer_head": "v2", "score_normalization": "batch"}),
        ("onnx", {"partition": "grid", "statistics": False}),
        ("torch", {"partition": "uniform"}),
        ("torch", {"score_normalization": "image", "scorer_head": "v2"}),
        ("torch", {"model_type": "dart_vim"}),
        ("torch", {"model_type": "dart_rmt", "first_strip_edge": 2}),
    ],
)
def test_agrees_with_the_model(tmp_path, format, settings):
    folder = save_model(tmp_path / "model", **settings)
    path = export_model(folder, tmp_path / "out", format=format).path
    assert path == tmp_path / "out" / {"onnx": "model.onnx", "torch": "model.pt2"}[format]
    run, images = program(path), pixels(5)
    for batch in (images, images[:1], images[2:]):
        torch.testing.assert_close(run(batch), model_logits(folder, batch), atol=TOLERANCE, rtol=0)
    change = (run(images)[:1] - run(images[:1])).abs().max()
    assert (change > 10 * TOLERANCE) == (settings.get("score_normalization") == "batch")


def test_a_model_in_half_precision_is_exported_in_single(tmp_path):
    folder = save_model(tmp_path / "model", dtype=torch.bfloat16)
    assert DartForImageClassification.from_pretrained(folder).dtype == torch.bfloat16
    path = export_model(folder, tmp_path / "out", format="torch").path
    images = pixels(3)
    torch.testing.assert_close(program(path)(images), model_logits(folder, images), atol=TOLERANCE, rtol=0)
    assert json.loads((path.parent / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 40, "crop_size": {"height": 32, "width": 48}}, (3, 32, 48)),
        ({"size": {"height": 40, "width": 56}, "do_center_crop": False}, (3, 40, 56)),
        ({"size": 40, "do_center_crop": False}, (3, SIDE, SIDE)),
    ],
)
def test_the_size_is_what_the_image_processor_makes(tmp_path, settings, expected):
    folder = save_model(tmp_path / "model", statistics=False, partition="uniform")
    DartImageProcessor(**settings).save_pretrained(folder)
    exported = export_model(folder, tmp_path / "out", format="torch")
    assert exported.input_shape == expected
    assert program(exported.path)(torch.zeros(3, *expected)).shape == (3, len(LABELS))


@pytest.mark.parametrize(
    ("model_type", "outputs"),
    [
        # Query, key, value, output and two of the MLP; neither the scorer nor the classifier.
        ("dart", [32] * 6),
        # Of a mixer what goes in and what comes out; not what the time steps come from.
        ("dart_vim", [128, 32]),
        ("dart_rmt", [16] * 4 + [32, 16] + [32] * 4 + [64, 32]),
    ],
)
def test_int8_computes_the_encoder_in_8_bits(tmp_path, monkeypatch, in_onnx, model_type, outputs):
    model_folder, exported = in_onnx(model_type)
    single = exported.path.stat().st_size
    monkeypatch.setattr(
        dart_hf.export.onnx, "_write_onnx", lambda program, path: path.write_bytes(exported.path.read_bytes())
    )
    done = export_model(model_folder, tmp_path / "out", int8=True)
    assert done.path.stat().st_size < single
    graph = onnx.load(done.path).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == len(outputs)
    # Every output of a layer has a scale of its own.
    scales = [constant for constant in graph.initializer if constant.name.endswith("_scale")]
    assert sorted(scale.dims[0] for scale in scales if scale.dims) == sorted(outputs)
    images = pixels(5)
    found, expected = program(done.path)(images), model_logits(model_folder, images)
    share = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert 1e-3 < share < 0.05
    assert 1e-3 < done.int8_deviation < 0.05
    assert done.deviation == pytest.approx(exported.deviation)


def test_int8_without_a_layer_or_too_far_off_is_refused(tmp_path, monkeypatch, model_folder, exported):
    monkeypatch.setattr(
        dart_hf.export.onnx, "_write_onnx", lambda program, path: path.write_bytes(exported.path.read_bytes())
    )
    with monkeypatch.context() as patch:
        patch.setattr(dart_hf.export.onnx, "_is_in_encoder", lambda node: False)
        with pytest.raises(ValueError, match="int8 finds no linear layer of the encoder"):
            export_model(model_folder, tmp_path / "refused", int8=True)
    monkeypatch.setattr(dart_hf.export.onnx, "INT8_TOLERANCE", 1e-3)
    with pytest.raises(ValueError, match=r"int8 changes the logits by .*nothing was written"):
        export_model(model_folder, tmp_path / "refused", int8=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "value"), [("onnx", torch.nan), ("torch", 0.1)])
def test_a_program_that_disagrees_is_not_written(tmp_path, monkeypatch, model_folder, exported, format, value):
    def other_program(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: program(exported.path)(images) + value

    monkeypatch.setattr(dart_hf.export.onnx, f"_write_{format}", lambda program, path: path.write_bytes(b"a program"))
    monkeypatch.setattr(dart_hf.export.onnx, "_read", other_program)
    with pytest.raises(ValueError, match=r"does not agree with PyTorch: .*nothing was written"):
        export_model(model_folder, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_the_check_runs_the_file(tmp_path, monkeypatch, model_folder):
    """A file with another classifier in it than the model's."""
    trace = dart_hf.export.onnx._trace

    def trace_another(model, input_shape):
        model.classifier.bias.data.add_(1)
        return trace(model, input_shape)

    monkeypatch.setattr(dart_hf.export.onnx, "_trace", trace_another)
    with pytest.raises(ValueError, match="does not agree with PyTorch"):
        export_model(model_folder, tmp_path / "out", format="torch")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mistakes(tmp_path, monkeypatch, model_folder) -> Path:
    """The working folder, with `model` and things that cannot be exported or written to."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model_folder)
    Path("used").mkdir()
    Path("used", "file.txt").write_text("mine")
    Path("vit").mkdir()
    Path("vit", "config.json").write_text(json.dumps({"model_type": "vit"}))
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
    ],
)
def test_a_mistake_gives_one_line_and_writes_nothing(mistakes, arguments, words):
    before = set(mistakes.rglob("*"))
    result = run(*(arguments if "--output" in arguments else [*arguments, "--output", "out"]))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert set(mistakes.rglob("*")) == before


def test_a_grid_that_the_budget_does_not_fill_is_named(tmp_path):
    folder = save_model(tmp_path / "model", partition="grid")
    with pytest.raises(ValueError, match="num_patches=11 does not fill the 3 rows"):
        export_model(folder, tmp_path / "out", num_patches=11)
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_is_named(mistakes, monkeypatch):
    find_spec = dart_hf.export.onnx.find_spec
    monkeypatch.setattr(
        dart_hf.export.onnx, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    result = run("model", "--output", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "dart-hf: format='onnx' needs onnxscript, not installed here: pip install 'dart-hf[export]'.\n"
    )


def test_the_command_says_what_it_wrote(tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    # PyTorch's own format needs no further package.
    monkeypatch.setattr(dart_hf.export.onnx, "find_spec", lambda name: None)
    result = run(str(model_folder), "--output", "some/out", "--format", "torch", "--num-patches", "17")
    assert result.exit_code == 0
    wrote, differs = result.stdout.splitlines()
    assert wrote == f"Wrote some/out/model.pt2, for pixel_values of shape (batch, 3, {SIDE}, {SIDE})"
    assert differs.startswith("Its logits differ from PyTorch's by at most 0.0")
    assert [path.name for path in Path("some").iterdir()] == ["out"]

    # The budget is in the program and in its configuration.
    images = pixels(3)
    expected = model_logits(model_folder, images, num_patches=17)
    assert (expected - model_logits(model_folder, images)).abs().max() > 10 * TOLERANCE
    torch.testing.assert_close(program(Path("some/out/model.pt2"))(images), expected, atol=TOLERANCE, rtol=0)
    assert DartConfig.from_pretrained("some/out").num_patches == 17
