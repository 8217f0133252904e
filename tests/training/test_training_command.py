"""`dart-hf train`: settings from flags and files, a model in a folder, and one sentence for each mistake."""

import functools
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_vit import ViTImageProcessor
from typer.testing import CliRunner

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.cli.main import app
from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.data.image_data import load_image_data
from dart_hf.hub.loading import load_model
from dart_hf.training.command import ModelArguments, parse_settings, run_training, start_model
from dart_hf.training.distillation import DistillationLoss
from dart_hf.training.recipe import Recipe

SIDE = 32
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_image_classification.py"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.1,
    "patch_size": 8,
    "scorer": "conv",
}
CONFIG = {
    "preset": "tiny",
    "model_settings": SMALL,
    "image_size": SIDE,
    "crop_pct": 1.0,
    "num_patches": 16,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder of pictures with a digit each: train/DIGIT (640 altogether) and test/DIGIT (120)."""
    root = tmp_path_factory.mktemp("digits")
    for split, count in (("train", 640), ("test", 120)):
        for number, row in enumerate(digits_on_photos(split, 1, SIDE, (28, 32)).select(range(count))):
            folder = root / split / str(row["label"])
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory) -> Path:
    """A smaller folder: four pictures of each of three digits, no split."""
    root = tmp_path_factory.mktemp("few")
    for name in "012":
        (root / name).mkdir()
        for path in sorted((digits / "train" / name).iterdir())[:4]:
            shutil.copy(path, root / name)
    return root


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(CONFIG))
    return path


def train(*arguments: object) -> dict:
    return run_training(parse_settings([str(argument) for argument in arguments]), say=lambda line: None)


def command(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], prog_name="dart-hf", catch_exceptions=False)


def sentence(result) -> str:
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("dart-hf: ")]
    assert len(lines) == 1
    return lines[0]


# Settings ---------------------------------------------------------------------------------------------------------


def test_flags_overrule_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: x\nlearning_rate: 5e-4\nmixup: 0.8\nmodel_settings: {scorer: conv}\nclass-names: [a, b]\n")
    settings = parse_settings(["--config", str(path), "--output", "out", "--mixup", "0.2", "--num-train-epochs", "3"])
    assert settings.trainer.learning_rate == 5e-4
    assert settings.recipe.mixup == 0.2
    assert settings.trainer.num_train_epochs == 3
    assert settings.trainer.weight_decay == 0.05
    assert settings.trainer.output_dir == "out"
    assert settings.data.class_names == ["a", "b"]
    assert json.loads(settings.model.model_settings) == {"scorer": "conv"}
    assert settings.given == {
        "data": "x", "learning_rate": 5e-4, "mixup": 0.2, "model_settings": '{"scorer": "conv"}',
        "class_names": ["a", "b"], "num_train_epochs": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out"], "required: --data"),
        (["--data", "x"], "required: --output"),
        (["--data", "x", "--output", "out", "--nonsense", "1"], "--nonsense"),
        (["--data", "x", "--output", "out", "--mixup", "much"], "invalid float value: 'much'"),
        (["--data", "x", "--output", "out", "--preset", "huge"], "--preset: invalid choice: 'huge'"),
        (["--data", "x", "--output", "out", "--config", "gone.yaml"], "config: there is no file 'gone.yaml'"),
    ],
)
def test_settings_that_are_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in sentence(command(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mixups: 0.8", "Unrecognized arguments: --mixups 0.8"),
        ("learning_rate: abc", "--learning-rate: invalid float value: 'abc'"),
        ("mixup: [1, 2]", "Unrecognized arguments: 2"),
        ("distillation: medium", "--distillation: invalid choice: 'medium'"),
        ("bf16: perhaps", "bf16"),
        ("resume: true", "may have all settings but resume"),
        ("output_dir: x", "may have all settings but"),
        ("[1, 2]", "must map names"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, content, message):
    (tmp_path / "config.yaml").write_text(content)
    assert message in sentence(
        command("--config", tmp_path / "config.yaml", "--data", "x", "--output", tmp_path / "out")
    )


def test_help_names_our_settings_and_not_hundreds_of_others():
    result = command("--help")
    assert result.exit_code == 0
    assert "Example: dart-hf train " in result.stdout
    for name in ("--data", "--scorer-weights", "--mixup", "--teacher", "--resume", "--skip-unreadable"):
        assert name in result.stdout
    assert "--torch_compile_backend" not in result.stdout


def test_the_deit_recipe_is_the_published_one():
    settings = parse_settings(["--config", "deit", "--data", "x", "--output", "out", "--preset", "tiny"])
    assert settings.recipe == Recipe(
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        crop_scale=0.08,
        horizontal_flip=0.5,
        repeated_augmentation=3,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.99996,
    )
    arguments = settings.trainer
    assert (arguments.learning_rate, settings.run.reference_batch_size) == (5e-4, 512)
    assert (arguments.weight_decay, arguments.num_train_epochs, arguments.label_smoothing_factor) == (0.05, 300, 0.1)
    assert arguments.get_warmup_steps(300) in (5, 6)
    assert arguments.lr_scheduler_type == "cosine_with_min_lr"
    assert settings.model.drop_path_rate == 0.1


# The run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> tuple[Path, dict]:
    """A short training with most of the recipe, and its facts."""
    root = tmp_path_factory.mktemp("trained")
    (root / "config.json").write_text(json.dumps({**CONFIG, "ema_decay": 0.95, "layer_decay": 0.9}))
    facts = train(
        "--config", root / "config.json", "--data", digits, "--output", root / "out", "--num-train-epochs", 10,
        "--crop-scale", 0.7, "--label-smoothing-factor", 0.05,
    )  # fmt: skip
    return root / "out", facts


def test_a_short_training_reads_digits(trained):
    assert trained[1]["metrics"]["eval_accuracy"] > 0.3


def test_the_output_is_a_model_with_everything(trained, digits):
    out, facts = trained
    model, processor = load_model(out)
    assert model.config.id2label == {index: str(index) for index in range(10)}
    assert processor.crop_size.height == SIDE
    assert (out / "modeling_dart.py").is_file()
    assert json.loads((out / "training.json").read_text()) == facts
    assert facts["data"]["num_train_images"] == 640
    assert facts["data"]["evaluation_split"] == "test"
    assert facts["steps"] == 200
    assert not list(out.glob(".*unfinished*"))
    assert len(list(out.glob("checkpoint-*"))) == 2


def test_what_is_saved_is_the_average_that_was_evaluated(trained):
    out, facts = trained
    last = out / "checkpoint-200"
    saved, average, raw = (load_file(path) for path in (
        out / "model.safetensors", last / "ema.safetensors", last / "model.safetensors"
    ))  # fmt: skip
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert not torch.equal(saved["classifier.weight"], raw["classifier.weight"])
    state = json.loads((last / "trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert accuracies[-1] == facts["metrics"]["eval_accuracy"]


def test_the_command_reports(few, config, tmp_path):
    result = command("--config", config, "--data", few, "--output", tmp_path / "out", "--max-steps", 2)
    assert result.exit_code == 0
    assert "3 classes: 10 images to learn from, 2 images to evaluate (held out of them)" in result.stdout
    assert f"Wrote {tmp_path / 'out'}" in result.stdout


@pytest.mark.parametrize("held_out", [0.1, 0.25])
def test_a_run_goes_on_to_the_same_weights(few, config, tmp_path, held_out):
    arguments = ["--data", few, "--config", config, "--save-strategy", "steps", "--save-steps", 2, "--ema-decay", 0.9]
    arguments += ["--per-device-train-batch-size", 4, "--drop-path-rate", 0.2, "--horizontal-flip", 0.5, "--mixup", 0.5]
    arguments += ["--repeated-augmentation", 2, "--save-total-limit", 10]
    # With ten pictures to learn from, the last batch of an epoch has two; with nine, one.
    arguments += ["--held-out", held_out]
    train(*arguments, "--output", tmp_path / "whole", "--num-train-epochs", 4)
    broken = tmp_path / "broken"
    train(*arguments, "--output", broken, "--num-train-epochs", 4)
    # As if killed in the third epoch of three steps each, while it wrote checkpoint-8.
    for path in broken.iterdir():
        if path.name not in ("train_settings.json", "checkpoint-6"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (broken / "checkpoint-6" / "complete.json").exists()
    (broken / "checkpoint-8").mkdir()
    (broken / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    train("--output", broken, "--resume")
    whole, again = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", broken))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_resume_without_anything_to_go_on_with(tmp_path):
    assert "holds no training to go on with" in sentence(command("--output", tmp_path / "out", "--resume"))
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(trained, digits, config):
    before = {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")}
    assert "is not empty; give a new one" in sentence(
        command("--config", config, "--data", digits, "--output", trained[0])
    )
    assert before == {path: path.stat().st_mtime_ns for path in trained[0].rglob("*")}


def test_checkpoints_of_another_program_are_left_alone(few, config, tmp_path):
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    arguments = ["--config", config, "--data", few, "--output", tmp_path / "out", "--max-steps", 1]
    assert "is not empty; give a new one" in sentence(command(*arguments))
    assert (tmp_path / "out" / "checkpoint-7").exists()


def test_a_mistake_does_not_claim_the_folder(few, config, tmp_path):
    arguments = ["--data", few, "--output", tmp_path / "out", "--max-steps", 1]
    assert "Give either model" in sentence(command(*arguments))
    assert not (tmp_path / "out").exists()
    train(*arguments, "--config", config)


def test_a_stream_goes_on_to_the_same_weights(few, config, tmp_path):
    arguments = ["--config", config, "--data", few, "--streaming", "--per-device-train-batch-size", 4]
    assert "streaming: a stream has no length" in sentence(command(*arguments, "--output", tmp_path / "out"))
    arguments += ["--max-steps", 8, "--save-strategy", "steps", "--save-steps", 5, "--horizontal-flip", 0.5]
    facts = train(*arguments, "--output", tmp_path / "whole")
    assert facts["steps"] == 8
    assert facts["data"]["num_train_images"] is None
    # Step 5 is in the second pass over twelve pictures.
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-8")
    train("--output", tmp_path / "broken", "--resume")
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    "change", [["--num-patches", 4], ["--model-settings", "{}"], ["--class-names", "0", "1"], ["--image-size", 64]]
)
def test_what_cannot_change_in_the_middle(trained, change):
    assert "cannot change in the middle of a training" in sentence(command("--output", trained[0], "--resume", *change))


def test_the_same_command_with_resume(few, start, tmp_path, monkeypatch):
    """Also where something is called as a download is, and with names that are relative to where the user is."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("photos", few), ("start", start)):
        shutil.copytree(source, name)
    Path("imagenet").mkdir()
    arguments = ["--data", "photos", "--model", "start", "--scorer-weights", "imagenet", "--max-steps", 2]
    arguments += ["--save-strategy", "steps", "--save-steps", 1, "--output", "out", "--disable-tqdm", True]
    train(*arguments)
    before = load_file("out/model.safetensors")
    shutil.rmtree("out/checkpoint-2")
    facts = train(*arguments, "--resume")
    after = load_file("out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert facts["settings"]["scorer_weights"] == "imagenet"
    assert facts["started_from"] == str(tmp_path / "start")
    assert "cannot change" in sentence(command(*arguments, "--resume", "--model", few))


def test_a_finished_run_without_checkpoints_is_not_begun_again(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert "has no complete checkpoint to go on from" in sentence(command("--output", tmp_path / "out", "--resume"))
    assert load_model(tmp_path / "out")


def test_a_checkpoint_that_lost_a_file_is_not_deleted(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "out")
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    assert "has no complete checkpoint to go on from" in sentence(command("--output", tmp_path / "out", "--resume"))
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-steps", 0], "There is nothing to train"),
        (["--gradient-accumulation-steps", 0], "gradient_accumulation_steps must be at least 1"),
        (["--reference-batch-size", 0], "reference_batch_size must be at least 1"),
        (["--output-dir", "elsewhere"], "Use output for output_dir"),
        (["--held-out", 1.5], "held_out must be at least 0 and below 1, got 1.5"),
        (["--model-settings", '{"hidden_size": "abc"}'], "hidden_size"),
        (["--remove-unused-columns"], "remove_unused_columns=True would take the images away"),
    ],
)
def test_values_out_of_range(few, config, tmp_path, arguments, message):
    base = ["--config", config, "--data", few, "--output", tmp_path / "out"]
    assert message in sentence(command(*base, *arguments))
    assert not (tmp_path / "out").exists()


def test_settings_in_yaml_as_people_write_them(few, tmp_path):
    content = {**CONFIG, "data": str(few), "output": str(tmp_path / "out"), "max_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content) + "eval_strategy: no\nsave_strategy: no\n")
    train("--config", tmp_path / "config.yaml")
    assert load_model(tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_example_trains_as_the_command_does(few, config, tmp_path, monkeypatch):
    arguments = [
        "--data", few, "--num-train-epochs", 2, "--per-device-train-batch-size", 4, "--mixup", 0.8,
        "--label-smoothing-factor", 0.1, "--ema-decay", 0.9, "--layer-decay", 0.8, "--auto-augment",
        "rand-m9-mstd0.5-inc1", "--num-patches", 9,
    ]  # fmt: skip
    torch.manual_seed(0)
    start = DartForImageClassification(
        DartConfig(**SMALL, image_size=SIDE, id2label={0: "0", 1: "1", 2: "2"}, label2id={"0": 0, "1": 1, "2": 2})
    )
    start.save_pretrained(tmp_path / "start")
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(tmp_path / "start")
    arguments += ["--model", tmp_path / "start"]
    train(*arguments, "--output", tmp_path / "command")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), "--output", str(tmp_path / "example")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    ours, copied = (load_file(tmp_path / name / "model.safetensors") for name in ("command", "example"))
    assert all(torch.equal(ours[name], copied[name]) for name in ours)
    assert not torch.equal(ours["classifier.weight"], start.classifier.weight)


# Mistakes with images ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(few, tmp_path) -> Path:
    shutil.copytree(few, tmp_path / "damaged")
    victim = sorted((tmp_path / "damaged" / "1").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:60])
    return tmp_path / "damaged"


def test_corrupt_images_of_a_stream_and_of_a_whole_batch(damaged, config, tmp_path):
    arguments = ["--config", config, "--data", damaged, "--eval-strategy", "no", "--max-steps", 12]
    arguments += ["--per-device-train-batch-size", 1, "--skip-unreadable", "--held-out", 0]
    for name, more in (("stream", ["--streaming"]), ("mixed", ["--mixup", 0.5]), ("plain", [])):
        facts = train(*arguments, *more, "--output", tmp_path / name)
        assert facts["skipped_images"] == 1
        assert load_file(tmp_path / name / "model.safetensors")["classifier.weight"].isfinite().all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_in_the_middle_of_an_epoch(damaged, config, tmp_path, workers):
    arguments = ["--config", config, "--data", damaged, "--output", tmp_path / "out", "--num-train-epochs", 1]
    arguments += ["--dataloader-num-workers", workers, "--held-out", 0, "--eval-strategy", "no"]
    assert "cannot be read" in sentence(command(*arguments))
    shutil.rmtree(tmp_path / "out")
    result = command(*arguments, "--skip-unreadable")
    assert result.exit_code == 0
    assert "Images that could not be read were skipped 1 times" in result.stdout
    assert json.loads((tmp_path / "out" / "training.json").read_text())["skipped_images"] == 1


# The model to start from ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model that knows the digits 2, 1, 0, in this order, with the published normalisation."""
    folder = tmp_path_factory.mktemp("start")
    config = DartConfig(**SMALL, image_size=SIDE, num_patches=16, score_normalization="batch",
                        id2label={0: "2", 1: "1", 2: "0"}, label2id={"2": 0, "1": 1, "0": 2})  # fmt: skip
    torch.manual_seed(0)
    DartForImageClassification(config).save_pretrained(folder)
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


@pytest.fixture
def starting(few):
    return functools.partial(start_model, data=load_image_data(few), say=lambda line: None)


def test_a_head_that_fits_is_kept_in_the_order_of_the_data(start, starting):
    model, _ = starting(ModelArguments(model=str(start)))
    before = DartForImageClassification.from_pretrained(start)
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert torch.equal(model.classifier.weight, before.classifier.weight.flip(0))
    assert torch.equal(model.dart.layernorm.weight, before.dart.layernorm.weight)


def test_a_head_of_other_classes_is_replaced_only_if_asked_for(start, starting, tmp_path):
    model, processor = load_model(start)
    for names in (["0", "1", "5"], ["0", "1"], ["0", "1", "2", "3"]):
        model = DartForImageClassification(
            DartConfig.from_pretrained(
                start, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
            )
        )
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"labels of the data do not match those of .*: .* classes .*--new-head"):
            starting(ModelArguments(model=str(tmp_path)))
        renewed, _ = starting(ModelArguments(model=str(tmp_path), new_head=True))
        assert renewed.classifier.weight.shape == (3, 32)
        assert not renewed.classifier.bias.any()
        if len(names) == 3:
            assert not torch.equal(renewed.classifier.weight, model.classifier.weight)
        assert torch.equal(renewed.dart.layernorm.weight, model.dart.layernorm.weight)


def test_a_budget_that_fills_no_grid_is_refused_before_training(starting):
    with pytest.raises(ValueError, match=r"num_patches=200 does not fill the 14 rows .* are 196 and 210"):
        starting(ModelArguments(preset="rmt-small", num_patches=200, image_size=448))


def test_a_model_without_a_head_gets_one(start, starting, tmp_path):
    model, processor = load_model(start)
    model.dart.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    started, _ = starting(ModelArguments(model=str(tmp_path)))
    assert started.classifier.weight.shape == (3, 32)
    assert torch.equal(started.dart.layernorm.weight, model.dart.layernorm.weight)


def test_settings_of_the_model_can_be_changed_but_not_so_that_weights_are_lost(start, starting):
    model, processor = starting(ModelArguments(model=str(start), num_patches=5, partition="uniform", image_size=48,
                                               crop_pct=1.0, drop_path_rate=0.3))  # fmt: skip
    assert (model.config.num_patches, model.config.partition) == (5, "uniform")
    assert (processor.crop_size.height, processor.size.shortest_edge) == (48, 48)
    assert model.dart.layers[-1].drop_path.drop_prob == 0.3
    with pytest.raises(ValueError, match="does not fit the weights of"):
        starting(ModelArguments(model=str(start), model_settings='{"intermediate_size": 60}', new_head=True))
    with pytest.raises(ValueError, match="DartConfig has no setting 'depth'"):
        starting(ModelArguments(model=str(start), model_settings='{"depth": 3}'))
    with pytest.raises(ValueError, match=r"model_settings: '{' is no JSON"):
        starting(ModelArguments(preset="tiny", model_settings="{"))
    with pytest.raises(ValueError, match="crop_pct must be above 0 and at most 1, got 2"):
        starting(ModelArguments(model=str(start), crop_pct=2))


@pytest.mark.parametrize("arguments", [ModelArguments(), ModelArguments(model="x", preset="tiny")])
def test_either_a_model_or_a_preset(starting, arguments):
    with pytest.raises(ValueError, match=r"Give either model .* or preset"):
        starting(arguments)


def test_fine_tuning_turns_the_published_normalisation_to_running(start, few, tmp_path):
    train("--data", few, "--model", start, "--output", tmp_path / "out", "--max-steps", 1, "--disable-tqdm", True)
    model, _ = load_model(tmp_path / "out")
    assert model.config.score_normalization == "running"
    assert model.scorer.statistics.num_batches_tracked == 1


def test_a_frozen_scorer_without_weights_is_refused(few, tmp_path, config):
    frozen = {**SMALL, "scorer": "mobilenet_v3_small"}
    arguments = ["--data", few, "--config", config, "--model-settings", json.dumps(frozen), "--max-steps", 1]
    refusal = sentence(command(*arguments, "--output", tmp_path / "out"))
    assert "is frozen and has no weights: give scorer_weights (--scorer-weights)" in refusal
    weights = DartForImageClassification(DartConfig(**frozen)).scorer.trunk.state_dict()
    torch.save(weights, tmp_path / "trunk.pth")
    train(*arguments, "--output", tmp_path / "other", "--scorer-weights", tmp_path / "trunk.pth")
    model, _ = load_model(tmp_path / "other")
    saved = model.scorer.trunk.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_a_plain_vit_becomes_a_dart(few, tmp_path):
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=7)
    )
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    arguments = ["--data", few, "--model", tmp_path / "vit", "--model-settings", '{"scorer": "conv"}', "--max-steps", 1]
    assert "do not match those of" in sentence(command(*arguments, "--output", tmp_path / "out"))
    facts = train(
        *arguments, "--new-head", "--output", tmp_path / "tuned", "--learning-rate", 0, "--disable-tqdm", True
    )
    assert facts["started_from"] == str(tmp_path / "vit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.partition == "flow"
    assert torch.equal(model.dart.layernorm.weight, vit.vit.layernorm.weight)
    assert AutoImageProcessor.from_pretrained(tmp_path / "tuned").image_mean == (0.5, 0.5, 0.5)


def test_the_recipe_reaches_the_trainer(few, start, tmp_path, monkeypatch):
    found = {}

    def remember(name):
        def call(*arguments, **settings):
            found[name] = (arguments, settings)
            if name == "trainer":
                raise InterruptedError

        return call

    monkeypatch.setattr("dart_hf.training.command.resume_training", remember("trainer"))
    monkeypatch.setattr("dart_hf.training.recipe.training_transform", remember("transform"))
    monkeypatch.setattr("dart_hf.training.recipe.MixImages", remember("mix"))
    with pytest.raises(InterruptedError):
        train("--data", few, "--model", start, "--output", tmp_path / "out", "--teacher", start, "--mixup", 0.4,
              "--cutmix", 0.6, "--label-smoothing-factor", 0.2, "--repeated-augmentation", 4, "--ema-decay", 0.5,
              "--layer-decay", 0.5, "--scorer-learning-rate", 1e-6, "--distillation", "hard", "--distillation-alpha",
              0.3, "--distillation-temperature", 3, "--reference-batch-size", 64, "--learning-rate", 0.1,
              "--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 2, "--auto-augment", "rand-m3",
              "--random-erasing", 0.1, "--crop-scale", 0.2, "--horizontal-flip", 0.3, "--color-jitter",
              0.4)  # fmt: skip
    ((trainer, checkpoint), _) = found["trainer"]
    assert checkpoint is None
    assert found["transform"][1] == {
        "auto_augment": "rand-m3", "random_erasing": 0.1, "crop_scale": 0.2, "horizontal_flip": 0.3, "color_jitter": 0.4
    }  # fmt: skip
    assert found["mix"][0] == (3, 0.4, 0.6, 0.2)
    assert trainer.args.learning_rate == pytest.approx(0.1 * 16 / 64)
    assert trainer.train_dataset.repeats == 4
    loss = trainer.compute_loss_func
    assert isinstance(loss, DistillationLoss)
    assert (loss.kind, loss.alpha, loss.temperature) == ("hard", 0.3, 3)
    callbacks = {type(callback).__name__: callback for callback in trainer.callback_handler.callbacks}
    assert {"EpochCallback", "RandomStateCallback", "RunningScoresCallback"} <= callbacks.keys()
    assert callbacks["EmaCallback"].decay == 0.5
    assert [*callbacks][-1] == "CompleteCheckpointCallback"
    rates = {round(group["lr"], 9) for group in trainer.create_optimizer().param_groups}
    assert {1e-6, 0.025, 0.0125} <= rates
