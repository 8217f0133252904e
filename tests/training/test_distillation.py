"""Distillation: the loss, and a student that follows its teacher."""

import pytest
import torch
from helpers.tiny_training import SIDE, still_dart, tiny_arguments
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import ViTConfig, ViTForImageClassification, default_data_collator

from dart_hf import DartImageProcessor
from dart_hf.training import DartTrainer, DistillationLoss, Recipe, Teacher

NAMES = ["ant", "bee", "cat"]
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]


def named(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def tiny_student(names=NAMES, **settings):
    return still_dart(num_labels=len(names), **named(names), **settings).train()


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=SIDE, patch_size=8, **named(NAMES)))
    # Decided opinions, so that following them shows.
    nn.init.normal_(model.classifier.weight)
    return Teacher(
        model, lambda image: torch.tensor(image.getpixel((0, 0)))[:, None, None].expand(3, SIDE, SIDE) / 255, NAMES
    )


def test_labels_in_another_order_are_matched_by_name(teacher):
    images = torch.rand(2, 3, SIDE, SIDE)
    student = tiny_student(["cat", "ant", "bee"])
    loss = DistillationLoss(teacher, student, [0.0] * 3, [1.0] * 3, kind="hard", alpha=1.0)
    outputs = student(images)
    expected = cross_entropy(outputs.logits, teacher(images)[:, [2, 0, 1]].argmax(dim=1))
    assert loss(outputs, torch.tensor([0, 1]), images).item() == pytest.approx(expected.item(), rel=1e-5)


def test_other_labels_are_refused(teacher):
    with pytest.raises(ValueError, match="must have the student's 2 labels, got one with 3"):
        DistillationLoss(teacher, tiny_student(NAMES[:2]), MEAN, STD)
    with pytest.raises(ValueError, match=r"1 of 3 classes \('cow'\) are none of"):
        DistillationLoss(teacher, tiny_student(["ant", "bee", "cow"]), MEAN, STD)
    twice = Teacher(nn.Identity(), lambda image: torch.zeros(3, 8, 8), ["ant", "ant", "bee"])
    with pytest.raises(ValueError, match="must have the student's labels: 2 of 3 classes"):
        DistillationLoss(twice, tiny_student(["ant", "bee", "ant"]), MEAN, STD)
    # Without names there is nothing to compare.
    DistillationLoss(teacher, tiny_student(["LABEL_0", "LABEL_1", "LABEL_2"]), MEAN, STD)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"kind": "warm"}, "kind must be 'soft' or 'hard', got 'warm'"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"image_mean": [0.5]}, r"image_mean must have 3 values .* got \[0.5\]"),
    ],
)
def test_arguments_out_of_range(teacher, argument, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(teacher, tiny_student(), **{"image_mean": MEAN, "image_std": STD, **argument})


def expected_loss(class_logits, distilled_logits, teacher_logits, labels, kind, alpha, temperature):
    if kind == "soft":
        student, target = (each.div(temperature).log_softmax(dim=1) for each in (distilled_logits, teacher_logits))
        distillation = temperature**2 * kl_div(student, target, reduction="batchmean", log_target=True)
    else:
        distillation = cross_entropy(distilled_logits, teacher_logits.argmax(dim=1))
    return (1 - alpha) * cross_entropy(class_logits, labels) + alpha * distillation


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([[0.5, 0.5, 0], [0, 0.1, 0.9]])])
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("head", [False, True], ids=["one_head", "distillation_head"])
def test_loss_is_that_of_the_paper(teacher, labels, kind, head):
    student = tiny_student(distillation_token=head, distillation_head=head)
    pixel_values = torch.randn(2, 3, SIDE, SIDE)
    loss = DistillationLoss(teacher, student, MEAN, STD, kind, alpha=0.3, temperature=2.0)
    outputs = student(pixel_values)
    class_logits, distilled_logits = outputs.logits, outputs.logits
    if head:
        class_logits, distilled_logits = outputs.cls_logits, outputs.distillation_logits
    images = pixel_values * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    expected = expected_loss(class_logits, distilled_logits, teacher(images), labels, kind, 0.3, 2.0)
    actual = loss(outputs, labels, pixel_values)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    actual.backward()
    assert student.classifier.weight.grad.abs().max() > 0
    # An image without a label does not count.
    labels, pixel_values = torch.cat([labels, labels[:1] * 0 - 100]), torch.cat([pixel_values, pixel_values[:1] + 1])
    assert loss(student(pixel_values), labels, pixel_values).item() == pytest.approx(expected.item(), rel=1e-5)


PIXELS = torch.randn(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(12) % len(NAMES)
ROWS = [{"pixel_values": image, "labels": label} for image, label in zip(PIXELS, LABELS, strict=True)]


def train(teacher, folder, alpha=0.5, kind="soft", **settings):
    """A trainer after its training, with plain steps, which show the scale of a gradient."""
    plain = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 0.1}
    plain |= {"num_train_epochs": 1, "max_steps": -1, "eval_strategy": "no", "save_strategy": "no"}
    trainer = DartTrainer(
        tiny_student(),
        tiny_arguments(folder, **{**plain, "per_device_train_batch_size": 12, **settings}),
        data_collator=default_data_collator,
        train_dataset=ROWS,
        processing_class=DartImageProcessor(image_mean=MEAN, image_std=STD),
        recipe=Recipe(distillation=kind, distillation_alpha=alpha),
        teacher=teacher,
    )
    trainer.show_progress(None)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_teacher_pulls_the_student(teacher, kind, tmp_path):
    def distance(student):
        loss = DistillationLoss(teacher, student.train(), MEAN, STD, kind, alpha=1.0)
        return loss(student(PIXELS), LABELS, PIXELS).item()

    before = distance(tiny_student())
    alone = distance(train(teacher, tmp_path, num_train_epochs=15, kind=kind, alpha=0.0).model)
    taught = distance(train(teacher, tmp_path, num_train_epochs=15, kind=kind, alpha=1.0).model)
    assert taught < 0.8 * before
    assert taught < 0.8 * alone


def test_accumulated_steps_equal_whole_batches(teacher, tmp_path):
    whole = train(teacher, tmp_path).model.state_dict()
    parts = train(teacher, tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=3).model.state_dict()
    for name, weights in parts.items():
        torch.testing.assert_close(weights, whole[name], atol=1e-6, rtol=0, msg=name)


def test_evaluation_does_not_ask_the_teacher(teacher, tmp_path):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = train(teacher, tmp_path)
    assert len(calls) == 1
    evaluated = trainer.evaluate(ROWS)["eval_loss"]
    assert len(calls) == 1
    with torch.no_grad():
        plain = cross_entropy(trainer.model.eval()(PIXELS).logits, LABELS)
    assert evaluated == pytest.approx(plain.item(), rel=1e-5)


def test_teacher_needs_one_class_for_each_image(teacher, tmp_path):
    student = tiny_student(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="A teacher needs one class for each image, not multi_label_classification"):
        DartTrainer(
            student,
            tiny_arguments(tmp_path, eval_strategy="no"),
            processing_class=DartImageProcessor(),
            teacher=teacher,
        )
