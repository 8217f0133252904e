"""`dart-hf dartify`: from a pretrained encoder and images without labels to a folder with a model."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny_models import random_weights
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import dart_hf.retrofit.run
from dart_hf import DartifiedModel, DartImageProcessor
from dart_hf.hub.model_card import make_model_card
from dart_hf.hub.records import DISTILLATION, Records, read_record
from dart_hf.retrofit.distillation import distill

TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
LABELS = {"id2label": {0: "cup", 1: "cat"}, "label2id": {"cup": 0, "cat": 1}}
MEAN = [0.4, 0.5, 0.6]
QUICK = ("--steps", 2, "--batch-size", 2)


@pytest.fixture
def vit(tmp_path) -> Path:
    """The folder of a classifier that squashes its images."""
    folder = tmp_path / "vit"
    random_weights(ViTForImageClassification(ViTConfig(hidden_size=16, **TINY, **LABELS))).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN).save_pretrained(folder)
    return folder


@pytest.fixture
def dartify(run, folder, tmp_path):
    """A function that runs the command with its output in `tmp_path / "out"`."""
    return lambda *given: run("dartify", "--output", tmp_path / "out", *given)


def sentence(result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("dart-hf: ")]
    return line


def test_switching_keeps_classifier_and_preparation(dartify, vit, tmp_path):
    result = dartify("--model", vit, "--num-patches", 16, "--partition", "uniform")
    assert (result.exit_code, result.stdout) == (0, f"Wrote {tmp_path / 'out'}\n")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, DartImageProcessor) and list(processor.image_mean) == MEAN
    answers = [pipeline("image-classification", model=str(path))("cup.png") for path in (vit, tmp_path / "out")]
    scores = [{answer["label"]: answer["score"] for answer in given} for given in answers]
    assert scores[1] == pytest.approx(scores[0], abs=0.01)


def test_distillation_is_recorded_for_the_card(dartify, vit, tmp_path):
    result = dartify("--model", vit, "--data", "photos", "--num-patches", "9,4", *QUICK)
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0].strip() for line in result.stdout.splitlines()[-2:]] == ["9 tokens", "4 tokens"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_patches, model.config.id2label) == (9, LABELS["id2label"])
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["started_from"] == str(vit) and record["data"]["source"] == str(Path("photos").resolve())
    assert sum(record["data"][f"num_{part}_images"] for part in ("train", "held_out")) == 8
    published = read_record(tmp_path / "out" / "distillation.json", DISTILLATION)
    text = make_model_card(model, "user/name", Records(distillation=published)).text
    row = record["similarity"][0]
    assert f"| 9 | {row['pooled_before']:.3f} → {row['pooled_after']:.3f} |" in text
    assert f"| Distilled from | {vit} |" in text


def test_a_stopped_run_is_resumed_with_its_settings(dartify, vit, tmp_path, monkeypatch):
    seen = []

    def stop(*given, **settings):
        seen.append((given[3:], settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(dart_hf.retrofit.run, "distill", stop)
    result = dartify("--model", vit, "--data", "photos", "--num-patches", "9,4", *QUICK, "--freeze-encoder")
    assert f"dart-hf dartify --output {tmp_path / 'out'} --resume" in result.stderr
    monkeypatch.setattr(
        dart_hf.retrofit.run,
        "distill",
        lambda *given, **settings: seen.append((given[3:], settings)) or distill(*given, **settings),
    )
    result = dartify("--resume")
    assert result.exit_code == 0, result.output
    assert seen[1][1] == {**seen[0][1], "resume": True}
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert sentence(dartify("--resume", "--steps", 5)) == (
        "dart-hf: --steps cannot change when a run is resumed. See 'dart-hf dartify --help'."
    )


def test_a_resumed_run_that_fails_leaves_the_finished_model(dartify, vit, tmp_path, monkeypatch):
    def fail(*given, **settings):
        raise ValueError("no memory")

    assert dartify("--model", vit, "--data", "photos", "--num-patches", 4, *QUICK).exit_code == 0
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    monkeypatch.setattr(dart_hf.retrofit.run, "distill", fail)
    assert sentence(dartify("--resume")) == "dart-hf: no memory"
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("make", "image_processor"),
    [
        (
            lambda: CLIPModel(
                CLIPConfig(
                    text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9},
                    vision_config={"hidden_size": 16, "projection_dim": 8, **TINY},
                    projection_dim=8,
                )
            ),
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        ),
        (
            lambda: Dinov2Model(Dinov2Config(hidden_size=16, mlp_ratio=1, **{**TINY, "image_size": 48})),
            DartImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        ),
    ],
    ids=["clip", "dinov2 at another size"],
)
def test_encoders_of_other_families_are_distilled(dartify, make, image_processor, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "original")
    image_processor.save_pretrained(tmp_path / "original")
    result = dartify("--model", tmp_path / "original", "--data", "photos", "--num-patches", 9, *QUICK)
    assert result.exit_code == 0, result.output
    assert isinstance(DartifiedModel.from_pretrained(tmp_path / "out"), DartifiedModel)


def test_a_vit_of_timm_reads_larger_images_than_its_student(dartify, tmp_path):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=2, **settings)
    save_for_hf(vit, tmp_path / "timm", model_args=settings)
    result = dartify("--model", tmp_path / "timm", "--data", "photos", "--num-patches", 9, *QUICK, "--teacher-size", 48)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert (record["image_size"], record["teacher_size"]) == (32, 48)
    assert pipeline("image-classification", model=str(tmp_path / "out"))("cup.png")


def test_mistakes_are_one_sentence(dartify, vit, tmp_path, run):
    def mistake(*given) -> str:
        return sentence(dartify("--num-patches", 9, *given))

    assert "has region tokens already; give the original model" in mistake("--model", "model")
    assert "num_patches=1025 is more than the 1024 pixels" in sentence(dartify("--model", vit, "--num-patches", 1025))
    assert "Missing option '--model'" in mistake()
    assert "the folder 'empty' has no images" in mistake("--model", vit, "--data", "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("a.png", "b.png"):
        (broken / name).write_text("not an image")
    assert "no image can be read of the 1 drawn to compare with" in mistake("--model", vit, "--data", broken)
    assert not (tmp_path / "out").exists()
    BeitModel(BeitConfig(hidden_size=16, **TINY)).save_pretrained(tmp_path / "beit")
    assert "BeitModel cannot be dartified" in sentence(
        run("dartify", "--model", tmp_path / "beit", "--num-patches", 9, "--output", tmp_path / "other")
    )
    (vit / "preprocessor_config.json").unlink()
    assert "image processor" in sentence(
        run("dartify", "--model", vit, "--num-patches", 9, "--output", tmp_path / "other")
    )
    assert "is not empty" in sentence(run("dartify", "--model", vit, "--num-patches", 9, "--output", "photos"))
    assert "holds no distillation to resume" in sentence(run("dartify", "--output", "photos", "--resume"))
