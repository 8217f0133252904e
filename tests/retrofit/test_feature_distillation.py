"""A dartified model learns its original's features without labels."""

import copy
import json
import math

import pytest
import torch
from helpers.tiny_training import same_tensors
from transformers import TrainerCallback, ViTConfig, ViTModel

from dart_hf import DartImageProcessor
from dart_hf.retrofit.distillation import distill
from dart_hf.retrofit.features import pooled_features

QUICK = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "num_patches": [9, 5]}


class Quiet(TrainerCallback):
    """Shows no progress, and stops like Ctrl-C after a step."""

    def __init__(self, last_step: int = -1) -> None:
        self.last_step = last_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last_step:
            raise KeyboardInterrupt


@pytest.fixture
def learn(original, photos, processor, tmp_path):
    """A function that distils a student from `original` in a few steps."""

    def learn(student, teacher=original, images=photos, **settings):
        settings = {"progress": Quiet(), **QUICK, **settings}
        return distill(student, teacher, images, processor, tmp_path / "out", **settings)

    return learn


def gains(record: dict) -> list[float]:
    """How much of the way to the original was made, for each budget and kind of features."""
    return [
        (row[f"{kind}_after"] - row[f"{kind}_before"]) / (1 - row[f"{kind}_before"])
        for row in record["similarity"]
        for kind in ("pooled", "patches")
    ]


def test_the_student_becomes_more_similar_at_every_budget(learn, classifier, make_student, tmp_path):
    student = make_student(classifier)
    head = copy.deepcopy(student.dartified.encoder.classifier)
    record = learn(student, classifier, steps=30, learning_rate=1e-2)
    assert [row["num_patches"] for row in record["similarity"]] == [9, 5]
    assert min(gains(record)) > 0.1
    assert record["data"] == {"num_train_images": 18, "num_held_out_images": 2}
    assert json.loads((tmp_path / "out" / "distillation.json").read_text()) == record
    assert same_tensors(student.dartified.encoder.classifier.state_dict(), head.state_dict())


def test_a_uniform_grid_has_the_features_of_the_original(learn, original, make_student):
    student = make_student(original, num_patches=16, partition="uniform")
    (row,) = learn(student, num_patches=16, steps=1)["similarity"]
    assert row["pooled_before"] == pytest.approx(1, abs=1e-6)
    assert row["patches_before"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}}], ids=["all", "lora"])
def test_a_stopped_distillation_goes_on_to_the_same_weights(learn, original, make_student, settings, tmp_path):
    if "lora" in settings:
        pytest.importorskip("peft")
    whole, stopped, resumed = (make_student(original) for _ in range(3))
    expected = learn(whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, save_steps=2, progress=Quiet(last_step=5), **settings)
    record = learn(resumed, save_steps=2, resume=True, **settings)
    assert same_tensors(resumed.state_dict(), whole.state_dict())
    assert record == expected
    again = make_student(original)
    learn(again, resume=True, **settings)
    assert same_tensors(again.state_dict(), whole.state_dict())


def changed(student: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Which parts of a student have other weights than before."""
    names = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    return {"scorer" if ".scorer." in name else "embedding" if "patch_embed" in name else "encoder" for name in names}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"scorer", "embedding", "encoder"}),
        ({"freeze_encoder": True}, {"scorer", "embedding"}),
        ({"lora": {"r": 2}}, {"scorer", "encoder"}),
    ],
    ids=["all", "frozen", "lora"],
)
def test_only_the_chosen_parts_learn(learn, original, make_student, settings, parts):
    if "lora" in settings:
        pytest.importorskip("peft")
    student = make_student(original)
    before = copy.deepcopy(student.state_dict())
    trainable = [parameter.requires_grad for parameter in student.parameters()]
    learn(student, **settings)
    assert student.state_dict().keys() == before.keys()
    assert changed(student, before) == parts
    assert [parameter.requires_grad for parameter in student.parameters()] == trainable


def test_the_teacher_may_read_more_pixels(learn, original, make_student):
    record = learn(make_student(original), teacher_size=48)
    assert (record["image_size"], record["teacher_size"]) == (32, 48)
    assert min(gains(record)) > 0


def test_images_may_be_a_list_and_unreadable_ones_are_left_out(learn, original, make_student, photos, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    files = [str(tmp_path / "text.png"), *sorted(photos.rglob("*.png"))[:5]]
    record = learn(make_student(original), images=files, held_out=0.3, steps=2)
    assert record["skipped_images"] > 0
    assert all(math.isfinite(gain) for gain in gains(record))


def test_features_of_the_image_are_pooled_as_the_model_does():
    tokens, pooled, projected = torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 3)
    outputs = {"last_hidden_state": tokens, "pooler_output": None, "image_embeds": None}
    assert torch.equal(pooled_features(outputs, 1), tokens[:, 0])
    assert torch.equal(pooled_features(outputs, 0), tokens.mean(dim=1))
    assert torch.equal(pooled_features(outputs | {"pooler_output": pooled}, 1), pooled)
    assert torch.equal(pooled_features(outputs | {"image_embeds": projected}, 1), projected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_patches": [9, 0]}, "num_patches must be integers of at least 1, got"),
        ({"num_patches": []}, "num_patches must be integers of at least 1, got"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"held_out": 0.0}, "held_out must be above 0 and below 1, got 0"),
        ({"pooled_weight": -1.0}, "pooled_weight must be at least 0, got -1"),
        ({"pooled_weight": 0.0, "patches_weight": 0.0}, "leave nothing to learn"),
        ({"freeze_encoder": True, "lora": {}}, "freeze_encoder or lora, not both"),
        ({"teacher_size": 0}, "teacher_size must be at least 1, got 0"),
        (
            {"teacher_processor": DartImageProcessor(size=32, crop_size=32, image_mean=[0.5, 0.5, 0.5])},
            r"must normalise as the original's, with image_mean=\(0.5, 0.5, 0.5\), got",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(learn, original, make_student, settings, message):
    with pytest.raises(ValueError, match=message):
        learn(make_student(original), **settings)


def test_teachers_that_do_not_fit_are_refused(learn, original, make_student):
    student = make_student(original)
    settings = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 32}
    wide = ViTModel(ViTConfig(hidden_size=24, patch_size=8, **settings), add_pooling_layer=False)
    coarse = ViTModel(ViTConfig(hidden_size=16, patch_size=16, **settings), add_pooling_layer=False)
    with pytest.raises(ValueError, match="teacher's pooled features have 24 channels and the student's 16"):
        learn(student, wide)
    with pytest.raises(ValueError, match="one for each of the 4×4 patches, got 5 tokens in all"):
        learn(student, coarse)
    with pytest.raises(ValueError, match="share weights"):
        learn(student, student.encoder)


def test_folders_without_images_to_learn_from_are_refused(learn, original, make_student, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"the folder '.*texts' has no images"):
        learn(make_student(original), images=folder)
    for name in "abc":
        (folder / f"{name}.png").write_text("no image")
    with pytest.raises(ValueError, match="no image can be read of the 1 drawn to compare with"):
        learn(make_student(original), images=folder)
