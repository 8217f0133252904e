"""A saved folder loads with `trust_remote_code=True` where dart_hf is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import ENCODERS, tiny_classifier

from dart_hf import DartImageProcessor

SCRIPT = Path(__file__).parent / "helpers" / "without_dart_hf.py"


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


@pytest.mark.parametrize("model_type", ENCODERS)
def test_loads_without_dart_hf(model_type, tmp_path):
    model = tiny_classifier(("ant", "bee", "cicada"), model_type)
    # The code is a module of the folder's name.
    folder, resaved = tmp_path / "modèle (1)", tmp_path / "resaved"
    model.save_pretrained(folder)
    DartImageProcessor().save_pretrained(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, folder, resaved],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits[0]
        pooled = model.base_model(pixels).pooler_output[0]
    assert found["classes"] == ["transformers_modules"] * 3
    for name, values in {"logits": expected, "again": expected, "pooled": pooled}.items():
        # Another process may have another number of threads, which sum in another order.
        torch.testing.assert_close(torch.tensor(found[name]), values, rtol=1e-4, atol=1e-4)
    assert found["processed"] == [1, 3, 448, 448]
    assert found["labels"] == 3
    assert found["dart_hf"] is False
