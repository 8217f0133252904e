"""A run of `dart-hf train`: a model in a folder, again after a kill, and one sentence for each mistake."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_training import same_tensors, tiny_dart, tiny_pictures, tiny_processor
from helpers.train_command import CONFIG, SIDE, command, sentence, train
from PIL import Image
from safetensors.torch import load_file

from dart_hf.data import load_image_data, select_held_out
from dart_hf.hub.loading import load_model
from dart_hf.training import DartTrainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_image_classification.py"


def same_weights(one: Path, other: Path) -> bool:
    return same_tensors(*(load_file(folder / "model.safetensors") for folder in (one, other)))


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def trained(few, tmp_path_factory) -> Path:
    """A folder with `out`, a run of two steps with most of the recipe, and its data `photos`. Not to be written to."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(few, root / "photos")
    (root / "config.json").write_text(json.dumps({**CONFIG, "ema_decay": 0.5, "layer_decay": 0.9}))
    train("--config", root / "config.json", "--data", root / "photos", "--output", root / "out", "--max-steps", 2,
          "--crop-scale", 0.7, "--label-smoothing-factor", 0.05, "--held-out", 0.25, "--save-strategy", "steps",
          "--save-steps", 1)  # fmt: skip
    return root


@pytest.fixture
def unfinished(trained, tmp_path, monkeypatch) -> Path:
    """That run as if killed after its first step, and a copy of its data; in the working folder."""
    shutil.copytree(trained / "photos", tmp_path / "photos")
    shutil.copytree(trained / "out", tmp_path / "out")
    settings = tmp_path / "out" / "train_settings.json"
    settings.write_text(settings.read_text().replace(str(trained / "photos"), str(tmp_path / "photos")))
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    (tmp_path / "out" / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_output_is_a_model_with_everything(trained):
    out, last = trained / "out", trained / "out" / "checkpoint-2"
    model, processor = load_model(out)
    facts = json.loads((out / "training.json").read_text())
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"} and processor.crop_size.height == SIDE
    assert (out / "modeling_dart.py").is_file()
    assert (facts["data"]["num_train_images"], facts["data"]["evaluation_split"], facts["steps"]) == (9, None, 2)
    assert not list(out.glob(".*unfinished*")) and len(list(out.glob("checkpoint-*"))) == 2
    # The average that was evaluated is saved.
    paths = (out / "model.safetensors", last / "ema.safetensors", last / "model.safetensors")
    saved, average, raw = map(load_file, paths)
    assert same_tensors(saved, average) and not torch.equal(saved["classifier.weight"], raw["classifier.weight"])


def test_command_reports_its_data_and_output(few, config, tmp_path):
    result = command("--config", config, "--data", few, "--output", tmp_path / "out", "--max-steps", 2)
    assert result.stdout.splitlines()[0].split() == ["class", "train", "held", "out"]
    assert "3 classes: 10 images to learn from, 2 images to evaluate (held out of them)" in result.stdout
    assert f"Wrote {tmp_path / 'out'}" in result.stdout


def test_resume_without_a_run(tmp_path):
    assert "holds no training to resume" in sentence(command("--output", tmp_path / "out", "--resume"))
    assert not (tmp_path / "out").exists()


def test_folder_in_use_stays_unchanged(trained, few, config, tmp_path):
    # The second holds a checkpoint of another program.
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    for root in (trained, tmp_path):
        before = modification_times(root)
        message = sentence(command("--config", config, "--data", few, "--output", root / "out", "--max-steps", 1))
        assert "is not empty; give a new one" in message
        assert modification_times(root) == before


def test_resumed_stream_ends_with_the_same_weights(few, config, tmp_path):
    arguments = ["--config", config, "--data", few, "--streaming", "--per-device-train-batch-size", 4]
    assert "streaming: a stream has no length" in sentence(command(*arguments, "--output", tmp_path / "out"))
    arguments += ["--max-steps", 8, "--save-strategy", "steps", "--save-steps", 5, "--horizontal-flip", 0.5]
    facts = train(*arguments, "--output", tmp_path / "whole")
    assert (facts["steps"], facts["data"]["num_train_images"]) == (8, None)
    # Step 5 is in the second pass over twelve pictures.
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-8")
    train("--output", tmp_path / "broken", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    "change", [["--num-patches", 4], ["--model-settings", "{}"], ["--class-names", "0", "1"], ["--image-size", 64]]
)
def test_resume_refuses_settings_of_the_model(trained, change):
    assert "cannot change during a training" in sentence(command("--output", trained / "out", "--resume", *change))


def test_same_command_with_resume(few, digits_model, tmp_path, monkeypatch):
    """Also where a folder has the name of a download, and with names that are relative to where the user is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(few, "photos")
    shutil.copytree(digits_model, "start")
    Path("imagenet").mkdir()
    arguments = ["--data", "photos", "--model", "start", "--scorer-weights", "imagenet", "--max-steps", 2]
    arguments += ["--save-strategy", "steps", "--save-steps", 1, "--output", "out", "--disable-tqdm", True]
    train(*arguments)
    before = load_file("out/model.safetensors")
    shutil.rmtree("out/checkpoint-2")
    facts = train(*arguments, "--resume")
    assert same_tensors(load_file("out/model.safetensors"), before)
    assert (facts["settings"]["scorer_weights"], facts["started_from"]) == ("imagenet", str(tmp_path / "start"))
    assert "cannot change" in sentence(command(*arguments, "--resume", "--model", few))


@pytest.mark.parametrize("lost", ["checkpoint-*", "optimizer.pt"])
def test_run_that_lost_its_checkpoints_does_not_begin_again(trained, tmp_path, lost):
    shutil.copytree(trained / "out", tmp_path / "out", ignore=shutil.ignore_patterns(lost))
    before = sorted(tmp_path.rglob("*"))
    assert "has no complete checkpoint to go on from" in sentence(command("--output", tmp_path / "out", "--resume"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-steps", 0], "There is nothing to train"),
        (["--model", "x"], "Give either model"),
        (["--gradient-accumulation-steps", 0], "gradient_accumulation_steps must be at least 1"),
        (["--reference-batch-size", 0], "reference_batch_size must be at least 1"),
        (["--output-dir", "elsewhere"], "Use --output instead of --output-dir"),
        (["--held-out", 1.5], "held_out must be at least 0 and below 1, got 1.5"),
        (["--model-settings", '{"hidden_size": "abc"}'], "hidden_size"),
        (["--remove-unused-columns"], "remove_unused_columns=True would remove the images"),
    ],
)
def test_mistake_leaves_no_folder(few, config, tmp_path, arguments, message):
    base = ["--config", config, "--data", few, "--output", tmp_path / "out"]
    assert message in sentence(command(*base, *arguments))
    assert not (tmp_path / "out").exists()


def test_settings_in_yaml_as_people_write_them(few, tmp_path):
    content = {**CONFIG, "data": str(few), "output": str(tmp_path / "out"), "max_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content) + "eval_strategy: no\nsave_strategy: no\n")
    train("--config", tmp_path / "config.yaml")
    assert load_model(tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_example_trains_exactly_as_the_command(few, tmp_path, monkeypatch):
    start = tiny_dart(id2label={0: "0", 1: "1", 2: "2"}, label2id={"0": 0, "1": 1, "2": 2})
    start.save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    arguments = [
        "--data", few, "--num-train-epochs", 2, "--per-device-train-batch-size", 4, "--mixup", 0.8,
        "--label-smoothing-factor", 0.1, "--ema-decay", 0.9, "--layer-decay", 0.8, "--auto-augment",
        "rand-m9-mstd0.5-inc1", "--num-patches", 9, "--model", tmp_path / "start",
    ]  # fmt: skip
    train(*arguments, "--output", tmp_path / "command")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), "--output", str(tmp_path / "example")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert same_weights(tmp_path / "command", tmp_path / "example")
    trained = load_file(tmp_path / "command" / "model.safetensors")
    assert not torch.equal(trained["classifier.weight"], start.classifier.weight)


# Mistakes with images ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(few, tmp_path) -> Path:
    shutil.copytree(few, tmp_path / "damaged")
    (tmp_path / "damaged" / "1" / "1.png").write_bytes((few / "1" / "1.png").read_bytes()[:60])
    return tmp_path / "damaged"


def test_damaged_images_in_a_stream_and_in_a_whole_batch(damaged, config, tmp_path):
    arguments = ["--config", config, "--data", damaged, "--eval-strategy", "no", "--max-steps", 12]
    arguments += ["--per-device-train-batch-size", 1, "--skip-unreadable", "--held-out", 0]
    for name, more in (("stream", ["--streaming"]), ("mixed", ["--mixup", 0.5]), ("plain", [])):
        assert train(*arguments, *more, "--output", tmp_path / name)["skipped_images"] == 1
        assert load_file(tmp_path / name / "model.safetensors")["classifier.weight"].isfinite().all()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_image_in_the_middle_of_an_epoch(damaged, config, tmp_path, workers):
    arguments = ["--config", config, "--data", damaged, "--output", tmp_path / "out", "--num-train-epochs", 1]
    arguments += ["--dataloader-num-workers", workers, "--held-out", 0, "--eval-strategy", "no"]
    assert "cannot be read" in sentence(command(*arguments))
    shutil.rmtree(tmp_path / "out")
    result = command(*arguments, "--skip-unreadable")
    assert result.exit_code == 0 and "Images that could not be read were skipped 1 times" in result.stdout
    assert json.loads((tmp_path / "out" / "training.json").read_text())["skipped_images"] == 1


def test_settings_reach_the_trainer(few, digits_model, tmp_path, monkeypatch):
    found = []

    def stop(trainer, checkpoint):
        found.append(trainer)
        raise InterruptedError

    monkeypatch.setattr(DartTrainer, "train", stop)
    with pytest.raises(InterruptedError):
        train("--data", few, "--model", digits_model, "--output", tmp_path / "out", "--teacher", digits_model,
              "--mixup", 0.4, "--repeated-augmentation", 4, "--ema-decay", 0.5, "--layer-decay", 0.5,
              "--scorer-learning-rate", 1e-6, "--distillation", "hard", "--distillation-alpha", 0.3,
              "--distillation-temperature", 3, "--reference-batch-size", 64, "--learning-rate", 0.1,
              "--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 2, "--skip-unreadable",
              "--auto-augment", "rand-m3")  # fmt: skip
    (trainer,) = found
    assert trainer.args.learning_rate == pytest.approx(0.1 * 16 / 64)
    assert trainer.train_dataset.repeats == 4
    assert trainer.data_collator.skip_unreadable and trainer.data_collator.transform and trainer.data_collator.mix
    loss = trainer._distillation
    assert (loss.kind, loss.alpha, loss.temperature) == ("hard", 0.3, 3)
    assert trainer.recipe.ema_decay == 0.5
    rates = {round(group["lr"], 9) for group in trainer.create_optimizer().param_groups}
    assert {1e-6, 0.025, 0.0125} <= rates


# What a run records, and what it compares -------------------------------------------------------------------------


def test_resume_takes_data_that_only_moved_but_no_renamed_classes(unfinished):
    shutil.copytree("out", "moved")
    train("--output", "moved", "--resume")
    assert (unfinished / "moved" / "config.json").exists()
    (unfinished / "photos" / "2").rename(unfinished / "photos" / "7")
    assert "the data has the classes '0', '1', '7', and the training began with '0', '1', '2'" in sentence(
        command("--output", "out", "--resume")
    )


@pytest.mark.parametrize("change", ["added", "replaced", "other class"])
def test_resume_refuses_changed_images(unfinished, change):
    image = sorted((unfinished / "photos" / "1").iterdir())[0]
    if change == "added":
        shutil.copy(image, image.with_name("another.png"))
    elif change == "replaced":
        image.write_bytes(image.read_bytes() + bytes(9))
    else:
        image.rename(unfinished / "photos" / "2" / "moved.png")
    message = sentence(command("--output", "out", "--resume"))
    assert "are not those that the training began with" in message or "to evaluate with or their labels" in message


def test_resume_of_a_complete_run_says_so_and_changes_nothing(trained):
    before = modification_times(trained)
    result = command("--output", trained / "out", "--resume")
    assert result.exit_code == 0 and "is complete after 2 steps" in result.stdout
    assert modification_times(trained) == before


def test_more_steps_train_a_complete_run_on(trained, tmp_path):
    shutil.copytree(trained / "out", tmp_path / "out")
    assert train("--output", tmp_path / "out", "--resume", "--max-steps", 3)["steps"] == 3


def test_held_out_images_are_recorded_with_the_model(trained, few):
    record = json.loads((trained / "out" / "held_out.json").read_text())
    everything = load_image_data(few, held_out=0.0).train
    held_out = load_image_data(few, held_out=0.25).evaluation
    found = select_held_out(everything, record)
    assert sorted(row["image"]["path"] for row in found) == sorted(row["image"]["path"] for row in held_out)


@pytest.mark.parametrize(
    ("labels", "problem_type", "first_line", "last_line"),
    [
        ([["a", "c"], [], ["b"]], "multi_label_classification", "3 classes: ", "Mean average precision: "),
        ([0.5, -1.0, 2.0], "regression", "Regression: ", "Mean absolute error: "),
    ],
)
def test_tasks_with_several_labels_and_with_numbers(labels, problem_type, first_line, last_line, config, tmp_path):
    rows = [{"image": row["image"], "label": labels[row["label"]]} for row in tiny_pictures(12)]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "data.parquet")
    arguments = ["--config", config, "--data", tmp_path / "data.parquet", "--output", tmp_path / "out"]
    result = command(*arguments, "--max-steps", 2, "--held-out", 0.5)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(line.startswith(first_line) for line in lines) and lines[-1].startswith(last_line)
    model, _ = load_model(tmp_path / "out")
    assert model.config.problem_type == problem_type
    assert list(model.config.id2label.values()) == (["LABEL_0"] if problem_type == "regression" else ["a", "b", "c"])


def test_ctrl_c_says_how_to_resume(few, config, tmp_path, monkeypatch):
    def interrupt(trainer, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DartTrainer, "training_step", interrupt)
    lines, output = [], tmp_path / "my out"
    with pytest.raises(KeyboardInterrupt):
        train("--config", config, "--data", few, "--output", output, say=lines.append)
    assert lines[-1].endswith(f"dart-hf train --output '{output}' --resume")


@pytest.mark.parametrize("damage", ["cut", "float"])
def test_unreadable_image_in_the_evaluation(few, config, tmp_path, damage):
    """The trained model is saved first. The error names the file and an option that the command has."""
    for split in ("train", "test"):
        shutil.copytree(few, tmp_path / "photos" / split)
    victim = tmp_path / "photos" / "test" / "1" / "damaged.tiff"
    if damage == "cut":
        victim.write_bytes(sorted((few / "1").iterdir())[0].read_bytes()[:60])
    else:
        Image.fromarray(np.random.default_rng(0).random((32, 32), dtype=np.float32)).save(victim)
    arguments = ["--config", config, "--data", tmp_path / "photos", "--max-steps", 1, "--eval-strategy", "no"]
    message = sentence(command(*arguments, "--output", tmp_path / "out"))
    assert "damaged.tiff" in message and "--skip-unreadable" in message
    assert load_model(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "training.json").read_text())["metrics"] == {}
    facts = train(*arguments, "--output", tmp_path / "skipped", "--skip-unreadable")
    assert facts["skipped_images"] == 1 and "eval_accuracy" in facts["metrics"]
    # A run whose evaluation failed is not complete.
    resumed = train("--output", tmp_path / "out", "--resume", "--skip-unreadable")
    assert resumed["metrics"] == facts["metrics"]
