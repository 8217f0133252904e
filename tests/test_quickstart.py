"""The quickstart, end to end in small: what it writes, what it says, and that the saved model is the trained one."""

import json

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
    """Folder, results, lines and the trained model itself."""
    output, lines, models = tmp_path_factory.mktemp("quickstart") / "made", [], []
    make = dart_hf.quickstart.small_dart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dart_hf.quickstart, "small_dart", lambda *args: models.append(make(*args)) or models[-1])
        results = run_quickstart(output, **SMALL, **PLACEMENTS, say=lines.append)
    return output, results, "\n".join(lines), models[0][0]


def test_what_it_writes(finished):
    output, results, _, _ = finished
    assert {path.name for path in output.iterdir()} == {"images", "model", "regions.png", "results.json"}
    assert json.loads((output / "results.json").read_text()) == results
    assert len(list((output / "images").iterdir())) == NUM_SAMPLES
    assert Image.open(output / "regions.png").width > 500
    assert not list(output.rglob("*.bin")) + list(output.rglob("*.pt"))
    assert "dart.tokenizer.projection.weight" in load_file(output / "model" / "model.safetensors")


def test_the_loaded_model_is_the_trained_one(finished):
    output, results, _, model = finished
    loaded = AutoModelForImageClassification.from_pretrained(output / "model")
    image_processor = AutoImageProcessor.from_pretrained(output / "model")
    test = digits_on_photos("test", 1, 32, (16, 24))
    pixel_values = image_processor(test[:16]["image"], return_tensors="pt").pixel_values
    assert pixel_values.shape == (16, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model.eval()(pixel_values).logits)
    assert results["accuracy"] == pytest.approx(results["accuracy_before_saving"])
    assert loaded.config.id2label[7] == "7"


def test_samples_are_test_pictures(finished):
    output, *_ = finished
    test = digits_on_photos("test", 1, 32, (16, 24))
    for number, path in enumerate(sorted((output / "images").iterdir())):
        assert path.name == f"{number}-digit-{test[number]['label']}.png"
        assert Image.open(path).tobytes() == test[number]["image"].tobytes()


def test_what_it_says(finished):
    output, results, lines, _ = finished
    assert f"Accuracy: {results['accuracy']:.1%} of 360 test pictures (chance: 10%)" in lines
    assert f"{results['regions_on_digit']['learned']:.1f} of 16 as learned" in lines
    assert f"{results['regions_on_digit']['uniform']:.1f} if spread evenly" in lines
    assert f"Results in {output}" in lines
    for command in ("predict", "visualize"):
        (line,) = (line for line in lines.splitlines() if f"dart-hf {command}" in line)
        assert f"--model {output / 'model'}" in line
        assert (output / "images" / line.split()[2].rsplit("/", 1)[-1]).is_file()


def test_the_pipeline_accuracy_counts_right_answers(tmp_path):
    model, image_processor = small_dart([str(digit) for digit in range(10)], 32, 4)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias[3] = 1
    model.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    test = digits_on_photos("test", 1, 32, (16, 24)).select(range(60))
    assert pipeline_accuracy(tmp_path, test) == pytest.approx(test["label"][:].count(3) / 60)


@pytest.mark.parametrize("changed", [{"steps": 0}, {"num_patches": 0}, {"image_size": 16}, {"test_placements": 0}])
def test_arguments_out_of_range(tmp_path, changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        run_quickstart(tmp_path, **{**SMALL, **PLACEMENTS, **changed}, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run_quickstart(tmp_path / "file", **SMALL, **PLACEMENTS)
