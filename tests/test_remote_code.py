"""A saved folder loads with `trust_remote_code=True` where dart_hf is not installed."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier
from transformers import AutoModelForImageClassification

from dart_hf import DartImageProcessor, DartVimForImageClassification

SCRIPT = Path(__file__).parent / "helpers" / "without_dart_hf.py"
OLD_FOLDER = Path(__file__).parent / "modeling" / "saved_by_0_1.zip"


@pytest.mark.parametrize(
    ("model_type", "config_class", "model_class"),
    [
        ("dart", "configuration_dart.DartConfig", "modeling_dart.DartModel"),
        ("dart_vim", "configuration_dart_vim.DartVimConfig", "modeling_dart_vim.DartVimModel"),
        ("dart_rmt", "configuration_dart_rmt.DartRmtConfig", "modeling_dart_rmt.DartRmtModel"),
    ],
)
def test_a_bare_model_names_its_code(model_type, config_class, model_class, tmp_path):
    tiny_classifier(model_type=model_type).base_model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": config_class, "AutoModel": model_class}


def run_without_dart_hf(folder, directory):
    """What `without_dart_hf.py` prints for a model folder, in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, folder, directory / "resaved"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["classes"] == ["transformers_modules"] * 3
    assert found["processed"] == [1, 3, 448, 448]
    assert found["labels"] == 3
    assert found["dart_hf"] is False
    return found


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [*((model_type, {}) for model_type in ENCODERS), ("dart", {"scorer": "encoder", "scorer_layers": 1})],
)
def test_loads_without_dart_hf(model_type, settings, tmp_path):
    model = tiny_classifier(("ant", "bee", "cicada"), model_type, **settings)
    # The code is a module of the folder's name.
    folder = tmp_path / "modèle (1)"
    model.save_pretrained(folder)
    DartImageProcessor().save_pretrained(folder)
    found = run_without_dart_hf(folder, tmp_path)
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits[0]
        pooled = model.base_model(pixels).pooler_output[0]
    for name, values in {"logits": expected, "again": expected, "pooled": pooled}.items():
        # Another process may have another number of threads, which sum in another order.
        torch.testing.assert_close(torch.tensor(found[name]), values, rtol=1e-4, atol=1e-4)


@pytest.fixture
def old_folder(tmp_path):
    """A trained DART-Vim that dart-hf saved when all configurations were in one file, and what it computed then."""
    with zipfile.ZipFile(OLD_FOLDER) as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old", json.loads((tmp_path / "old" / "expected.json").read_text())


def test_a_folder_of_an_older_version_gives_the_same_logits(old_folder):
    folder, expected = old_folder
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is DartVimForImageClassification
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cicada"}
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 48).mul(40).sin().view(2, 3, 32, 48)
    with torch.no_grad():
        found = model(pixels, output_regions=True)
    for name, tensor in {"logits": found.logits, **found.regions}.items():
        if name in expected:
            torch.testing.assert_close(tensor, torch.tensor(expected[name]), rtol=1e-4, atol=1e-4)


def test_a_folder_of_an_older_version_loads_with_its_own_code(old_folder, tmp_path):
    folder, expected = old_folder
    found = run_without_dart_hf(folder, tmp_path)
    for name in ("logits", "again"):
        torch.testing.assert_close(found[name], expected["logits_without_dart_hf"][0], rtol=1e-4, atol=1e-4)


def test_a_folder_of_an_older_version_is_saved_with_todays_code(old_folder, tmp_path):
    folder, expected = old_folder
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "new")
    DartImageProcessor.from_pretrained(folder).save_pretrained(tmp_path / "new")
    auto_map = json.loads((tmp_path / "new" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_dart_vim.DartVimConfig"
    found = run_without_dart_hf(tmp_path / "new", tmp_path)
    torch.testing.assert_close(found["logits"], expected["logits_without_dart_hf"][0], rtol=1e-4, atol=1e-4)
