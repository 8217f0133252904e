"""The quick start with a few steps: it writes the trained model, sample images and results, and reports them."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import dart_hf.quickstart
from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.quickstart import NUM_SAMPLES, pipeline_accuracy, run_quickstart, small_dart

SMALL = {"steps": 3, "batch_size": 8, "image_size": 32, "digit_sizes": (16, 24), "num_patches": 16}
PLACEMENTS = {"train_placements": 1, "test_placements": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, results and lines of a run, and the trained model."""
    output, lines, models = tmp_path_factory.mktemp("quickstart") / "made", [], []
    make = dart_hf.quickstart.small_dart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dart_hf.quickstart, "small_dart", lambda *args: models.append(make(*args)) or models[-1])
        results = run_quickstart(output, **SMALL, **PLACEMENTS, report=lines.append)
    return output, results, "\n".join(lines), models[0][0]


def test_output_folder_is_complete(finished):
    output, results, _, _ = finished
    assert {path.name for path in output.iterdir()} == {"images", "model", "regions.png", "results.json"}
    assert json.loads((output / "results.json").read_text()) == results
    test = digits_on_photos("test", 1, 32, (16, 24))
    samples = sorted((output / "images").iterdir())
    assert len(samples) == NUM_SAMPLES
    for number, path in enumerate(samples):
        assert path.name == f"{number}-digit-{test[number]['label']}.png"
        assert Image.open(path).tobytes() == test[number]["image"].tobytes()
    assert Image.open(output / "regions.png").width > 500
    assert "dart.tokenizer.projection.weight" in load_file(output / "model" / "model.safetensors")


def test_loaded_model_is_the_trained_one(finished):
    output, results, _, model = finished
    loaded = AutoModelForImageClassification.from_pretrained(output / "model")
    image_processor = AutoImageProcessor.from_pretrained(output / "model")
    test = digits_on_photos("test", 1, 32, (16, 24))
    pixel_values = image_processor(test[:16]["image"], return_tensors="pt").pixel_values
    assert pixel_values.shape == (16, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model.eval()(pixel_values).logits)
    assert results["accuracy"] == pytest.approx(results["accuracy_before_saving"])
    assert loaded.config.id2label[7] == "7"


def test_report_names_results_and_next_commands(finished):
    output, results, lines, _ = finished
    assert f"Accuracy: {results['accuracy']:.1%} of 360 test images (chance: 10%)" in lines
    assert f"{results['regions_on_digit']['learned']:.1f} of 16 as learned" in lines
    assert f"{results['regions_on_digit']['uniform']:.1f} if spread evenly" in lines
    assert f"Results in {output}" in lines
    for command in ("predict", "visualize"):
        (line,) = (line for line in lines.splitlines() if f"dart-hf {command}" in line)
        assert f"--model {output / 'model'}" in line
        assert (output / "images" / line.split()[2].rsplit("/", 1)[-1]).is_file()


def test_pipeline_accuracy_counts_right_answers(tmp_path):
    model, image_processor = small_dart([str(digit) for digit in range(10)], 32, 4)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias[3] = 1
    model.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    test = digits_on_photos("test", 1, 32, (16, 24)).select(range(60))
    assert pipeline_accuracy(tmp_path, test) == pytest.approx(test["label"][:].count(3) / 60)


@pytest.mark.parametrize("changed", [{"steps": 0}, {"num_patches": 0}, {"image_size": 16}, {"test_placements": 0}])
def test_arguments_out_of_range_are_refused(tmp_path, changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        run_quickstart(tmp_path, **{**SMALL, **PLACEMENTS, **changed}, report=lambda line: None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run_quickstart(tmp_path / "file", **SMALL, **PLACEMENTS)


WITHOUT_EXTRA = """
import sys

# torchmetrics imports matplotlib if it is installed.
import torchmetrics

extra = ("matplotlib", "skimage", "sklearn")
for name in [name for name in sys.modules if name.partition(".")[0] in extra]:
    del sys.modules[name]
sys.modules.update(dict.fromkeys(extra))

import dart_hf
import dart_hf.benchmark, dart_hf.evaluation, dart_hf.export, dart_hf.hub.publishing, dart_hf.training.run
from dart_hf.cli.main import app
from dart_hf.quickstart import small_dart

folder = sys.argv[1]
model, processor = small_dart(["no", "yes"], 32, 4)
model.save_pretrained(folder)
processor.save_pretrained(folder)
try:
    app(["predict", sys.argv[2], "--model", folder])
except SystemExit as end:
    assert end.code in (0, None)
app(["visualize", sys.argv[2], "--model", folder, "--output", f"{folder}/regions.png"])
"""


def test_only_plots_and_digits_need_the_extra(tmp_path):
    """Loading and predicting work without it, and drawing names it in one line."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    command = [sys.executable, "-c", WITHOUT_EXTRA, str(tmp_path / "model"), str(tmp_path / "red.png")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "yes" in result.stdout
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "dart-hf: Drawing needs matplotlib, which is not installed: pip install 'dart-hf[quickstart]'."
    )
