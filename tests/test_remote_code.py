"""A saved folder loads with `trust_remote_code=True` where dart_hf is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor

WITHOUT_DART_HF = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dart_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
folder, resaved = sys.argv[1:]

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
pixels = torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)
model.save_pretrained(resaved)
processor.save_pretrained(resaved)
again = AutoModelForImageClassification.from_pretrained(resaved, trust_remote_code=True)
image = torch.zeros(3, 40, 50, dtype=torch.uint8).numpy().transpose(1, 2, 0)
from PIL import Image
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
with torch.no_grad():
    print(json.dumps({
        "classes": [type(x).__module__.split(".")[0] for x in (model, processor, bare)],
        "logits": model(pixels).logits[0].tolist(),
        "again": again(pixels).logits[0].tolist(),
        "pooled": bare(pixels).pooler_output[0].tolist(),
        "processed": list(processor(image, return_tensors="pt")["pixel_values"].shape),
        "labels": len(classify(Image.fromarray(image))),
        "dart_hf": "dart_hf" in sys.modules,
    }))
"""


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    torch.manual_seed(0)
    config = DartConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=4, num_patches=9,
        scorer="conv", num_labels=3,
    )  # fmt: skip
    return DartForImageClassification(config).eval()


def test_a_bare_model_names_its_code(model, tmp_path):
    model.dart.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_dart.DartConfig", "AutoModel": "modeling_dart.DartModel"}


def test_loads_without_dart_hf(model, tmp_path):
    folder, resaved = tmp_path / "saved", tmp_path / "resaved"
    model.save_pretrained(folder)
    DartImageProcessor().save_pretrained(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DART_HF, str(folder), str(resaved)],
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
        pooled = model.dart(pixels).pooler_output[0]
    assert found["classes"] == ["transformers_modules"] * 3
    torch.testing.assert_close(torch.tensor(found["logits"]), expected)
    torch.testing.assert_close(torch.tensor(found["again"]), expected)
    torch.testing.assert_close(torch.tensor(found["pooled"]), pooled)
    assert found["processed"] == [1, 3, 448, 448]
    assert found["labels"] == 3
    assert found["dart_hf"] is False
