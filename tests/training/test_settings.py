"""Settings of `dart-hf train`: from flags and files, with one sentence for each mistake."""

import json

import pytest
from helpers.train_command import command, sentence

from dart_hf.training.recipe import Recipe
from dart_hf.training.settings import parse_settings


def test_flags_overrule_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: x\nlearning_rate: 5e-4\nmixup: 0.8\nmodel_settings: {scorer: conv}\nclass-names: [a, b]\n")
    settings = parse_settings(["--config", str(path), "--output", "out", "--mixup", "0.2", "--num-train-epochs", "3"])
    trainer = settings.trainer
    assert (trainer.learning_rate, trainer.num_train_epochs, trainer.weight_decay) == (5e-4, 3, 0.05)
    assert (settings.recipe.mixup, trainer.output_dir, settings.data.class_names) == (0.2, "out", ["a", "b"])
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
        (["--data", "x", "--output", "out", "--preset", "huge"], "--preset: invalid choice: 'huge'"),
        (["--data", "x", "--output", "out", "--config", "gone.yaml"], "config: there is no file 'gone.yaml'"),
    ],
)
def test_wrong_settings(arguments, message, tmp_path, monkeypatch):
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
        ("resume: true", "must not set resume"),
        ("output_dir: x", "must not set"),
        ("[1, 2]", "must map names"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_wrong_settings_in_a_file(tmp_path, content, message):
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


def test_deit_recipe_is_the_published_one():
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
