"""Distillation: teachers in their own preprocessing, and a student that follows them."""

import copy
import gc
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.models import save_for_hf
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.training.distillation import DistillationLoss, Teacher
from dart_hf.training.losses import soft_target_cross_entropy

SIDE = 32
NAMES = ["ant", "bee", "cat"]
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]


def named(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def tiny_student(names=NAMES, **settings):
    torch.manual_seed(0)
    config = DartConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.2,
        image_size=SIDE,
        patch_size=8,
        num_patches=4,
        score_grid_size=4,
        scorer="conv",
        # Whatever a scorer in training does depends on how images are put into batches.
        partition="uniform",
        **named(names),
        **settings,
    )
    return DartForImageClassification(config).train()


def tiny_vit(names=NAMES, model_class=ViTForImageClassification):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = model_class(ViTConfig(**sizes, image_size=SIDE, patch_size=16, **named(names)))
    if model_class is ViTForImageClassification:
        # Decided opinions, so that following them shows.
        nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of a teacher of transformers' kind."""
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit().save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dart(tmp_path_factory):
    """The folder of a teacher that is a DART model."""
    folder = tmp_path_factory.mktemp("dart")
    tiny_student().save_pretrained(folder)
    DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """The folder of a teacher that timm saved."""
    folder = tmp_path_factory.mktemp("timm")
    overlay = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model = timm.create_model("test_vit", num_classes=len(NAMES), img_size=SIDE, pretrained_cfg_overlay=overlay)
    save_for_hf(model, folder, model_config={"label_names": NAMES, "model_args": {"img_size": SIDE}})
    return folder


def picture(side=SIDE):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Recorder(nn.Module):
    """A classifier that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, pixel_values):
        self.pixel_values = pixel_values
        return pixel_values.mean(dim=(2, 3)) * self.weight


def pixels_for_the_teacher(teacher, image):
    """What the teacher's model reads in a training step on the student's pixel values of `image`."""
    processor = DartImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=MEAN, image_std=STD)
    student, teacher.model = tiny_student(), Recorder()
    loss = DistillationLoss(teacher, student, MEAN, STD)
    loss(student(**processor(image, return_tensors="pt")), torch.tensor([0]))
    return teacher.model.pixel_values


@pytest.mark.parametrize("kind", ["vit", "dart"])
def test_a_teacher_reads_what_its_own_processor_makes(kind, request):
    folder = request.getfixturevalue(kind)
    expected = AutoImageProcessor.from_pretrained(folder)(picture(), return_tensors="pt")["pixel_values"]
    actual = pixels_for_the_teacher(Teacher.load(folder), picture())
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_timm_teacher_reads_what_timm_makes(timm_folder, prefix):
    model = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture())[None]
    teacher = Teacher.load(f"{prefix}{timm_folder}")
    assert not teacher.model.training
    assert teacher(torch.rand(2, 3, SIDE, SIDE)).shape == (2, len(NAMES))
    torch.testing.assert_close(pixels_for_the_teacher(teacher, picture()), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "processor",
    [
        # Channels in another order, no normalisation.
        MobileViTImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        # Normalised twice.
        EfficientNetImageProcessor(size={"height": SIDE, "width": SIDE}, include_top=True),
        ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=1.0),
        # Takes images as large as they are.
        ViTImageProcessor(do_resize=False),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_peculiar_processors(processor):
    def preprocess(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    actual = pixels_for_the_teacher(Teacher(Recorder(), preprocess, NAMES), picture())
    torch.testing.assert_close(actual[0], preprocess(picture()), atol=1e-5, rtol=0)


def test_images_are_resized_to_the_teachers_size():
    processor = ViTImageProcessor(size={"height": 48, "width": 24}, resample=Image.Resampling.BICUBIC)

    def preprocess(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    smooth = picture(4).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    actual = pixels_for_the_teacher(Teacher(Recorder(), preprocess, NAMES), smooth)
    assert actual.shape == (1, 3, 48, 24)
    # The processor rounds to 8 bits and clips.
    torch.testing.assert_close(actual[0], preprocess(smooth), atol=0.02, rtol=0)


def test_a_teacher_is_frozen_and_has_the_precision_asked_for(vit):
    teacher = Teacher.load(vit, dtype=torch.bfloat16)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    images = torch.rand(2, 3, SIDE, SIDE)
    assert teacher(images).dtype == torch.float32
    torch.testing.assert_close(teacher(images), Teacher.load(vit)(images), atol=0.2, rtol=0)


def test_teachers_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"teacher='timm/no_such' cannot be used: Unknown model \(no_such\)"):
        Teacher.load("timm/no_such")
    for source in ("timm/test_vit", tmp_path / "nothing"):
        with pytest.raises(OSError, match=f"teacher='{source}' cannot be loaded: "):
            Teacher.load(source)
    tiny_vit(model_class=ViTModel).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"lacks weights \(classifier.bias, classifier.weight\)"):
        Teacher.load(tmp_path / "headless")


@pytest.fixture
def teacher(vit):
    return Teacher.load(vit)


def test_labels_in_another_order_are_matched_by_name(teacher):
    images = torch.rand(2, 3, SIDE, SIDE)
    student = tiny_student(["cat", "ant", "bee"])
    loss = DistillationLoss(teacher, student, [0.0] * 3, [1.0] * 3, kind="hard", alpha=1.0)
    outputs = student(images)
    expected = cross_entropy(outputs.logits, teacher(images)[:, [2, 0, 1]].argmax(dim=1))
    assert loss(outputs, torch.tensor([0, 1])).item() == pytest.approx(expected.item(), rel=1e-5)


def test_other_labels_are_refused(teacher):
    with pytest.raises(ValueError, match="must have the student's 2 labels, got one with 3"):
        DistillationLoss(teacher, tiny_student(NAMES[:2]), MEAN, STD)
    with pytest.raises(ValueError, match=r"must have the student's labels: 1 of 3 classes \('cow'\) are none of"):
        DistillationLoss(teacher, tiny_student(["ant", "bee", "cow"]), MEAN, STD)
    twice = Teacher(Recorder(), lambda image: torch.zeros(3, 8, 8), ["ant", "ant", "bee"])
    with pytest.raises(ValueError, match=r"must have the student's labels: 2 of 3 classes"):
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
def test_the_loss_is_the_papers(teacher, labels, kind, head):
    student = tiny_student(distillation_token=head, distillation_head=head)
    pixel_values = torch.randn(2, 3, SIDE, SIDE)
    loss = DistillationLoss(teacher, student, MEAN, STD, kind, alpha=0.3, temperature=2.0)
    outputs = student(pixel_values)
    class_logits, distilled_logits = outputs.logits, outputs.logits
    if head:
        class_logits, distilled_logits = outputs.cls_logits, outputs.distillation_logits
    images = pixel_values * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    expected = expected_loss(class_logits, distilled_logits, teacher(images), labels, kind, 0.3, 2.0)
    actual = loss(outputs, labels)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    actual.backward()
    assert student.classifier.weight.grad.abs().max() > 0


def test_images_without_a_label_do_not_count(teacher):
    student, pixel_values = tiny_student(), torch.randn(3, 3, SIDE, SIDE)
    loss = DistillationLoss(teacher, student, MEAN, STD)
    some = loss(student(pixel_values[:2]), torch.tensor([0, 1]))
    assert loss(student(pixel_values), torch.tensor([0, 1, -100])).item() == pytest.approx(some.item(), rel=1e-5)


def rows(count):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(len(NAMES), (count,), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def train(teacher, folder, count=12, **settings):
    """A `Trainer` that is done, with its loss."""
    arguments = {"num_train_epochs": 1, "per_device_train_batch_size": count, "learning_rate": 0.1, **settings}
    options = {name: arguments.pop(name) for name in ("alpha", "kind") if name in arguments}
    arguments = TrainingArguments(
        output_dir=str(folder),
        # Plain steps, which show the scale of a gradient.
        optim="sgd",
        max_grad_norm=0,
        lr_scheduler_type="constant",
        per_device_eval_batch_size=count,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    student = tiny_student()
    loss = DistillationLoss(teacher, student, MEAN, STD, **options)
    trainer = Trainer(student, arguments, train_dataset=rows(count), compute_loss_func=loss)
    # transformers before 5.6 lets accelerate divide by the number of accumulated batches once more.
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.train()
    return trainer, loss


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_pulls_the_student(teacher, kind, tmp_path):
    def distance(student):
        """The mean loss against the teacher on the training images."""
        pixel_values = torch.stack([row["pixel_values"] for row in rows(12)])
        loss = DistillationLoss(teacher, student.train(), MEAN, STD, kind, alpha=1.0)
        return loss(student(pixel_values), torch.zeros(12, dtype=torch.int64)).item()

    before = distance(tiny_student())
    alone = distance(train(teacher, tmp_path, num_train_epochs=30, kind=kind, alpha=0.0)[0].model)
    taught = distance(train(teacher, tmp_path, num_train_epochs=30, kind=kind, alpha=1.0)[0].model)
    assert taught < 0.7 * before
    assert taught < 0.7 * alone


def test_accumulated_steps_are_those_of_whole_batches(teacher, tmp_path):
    whole = train(teacher, tmp_path)[0].model.state_dict()
    parts = train(teacher, tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=3)[0].model.state_dict()
    for name, weights in parts.items():
        torch.testing.assert_close(weights, whole[name], atol=1e-6, rtol=0, msg=name)


def test_evaluation_leaves_the_teacher_alone(teacher, tmp_path):
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer, _ = train(teacher, tmp_path)
    assert len(calls) == 1
    data = rows(12)
    evaluated = trainer.evaluate(data)["eval_loss"]
    assert len(calls) == 1
    with torch.no_grad():
        outputs = trainer.model.eval()(torch.stack([row["pixel_values"] for row in data]))
    plain = soft_target_cross_entropy(outputs, torch.stack([row["labels"] for row in data]))
    assert evaluated == pytest.approx(plain.item(), rel=1e-5)


def test_a_copy_of_the_student_can_be_evaluated_while_it_trains(teacher):
    student, pixel_values, labels = tiny_student(), torch.randn(2, 3, SIDE, SIDE), torch.tensor([0, 1])
    loss = DistillationLoss(teacher, student, MEAN, STD)
    with torch.no_grad():
        outputs = copy.deepcopy(student).eval()(pixel_values)
    assert loss(outputs, labels).item() == pytest.approx(cross_entropy(outputs.logits, labels).item())


def test_the_student_keeps_nothing_of_its_teacher(teacher, tmp_path, monkeypatch):
    def refuse(self, *args):
        raise AssertionError("The teacher must not be copied.")

    monkeypatch.setattr(Teacher, "__reduce_ex__", refuse)
    student = tiny_student()
    before = set(student.state_dict())
    modules = sum(1 for _ in student.modules())
    loss = DistillationLoss(teacher, student, MEAN, STD)
    assert sum(1 for _ in student.modules()) == modules
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == before

    outputs = student(torch.randn(2, 3, SIDE, SIDE))
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        twin(torch.randn(5, 3, SIDE, SIDE))
        (memory,) = twin._forward_pre_hooks.values()
        assert memory.pixel_values is None
    # The twins' images did not take the place of the student's.
    loss(outputs, torch.tensor([0, 1]))


def test_images_are_kept_no_longer_than_needed(teacher):
    student = tiny_student()
    loss = DistillationLoss(teacher, student, MEAN, STD)
    (memory,) = student._forward_pre_hooks.values()
    outputs = student(pixel_values=torch.randn(2, 3, SIDE, SIDE))
    assert memory.pixel_values is not None
    loss(outputs, torch.tensor([0, 1]))
    assert memory.pixel_values is None
    with torch.no_grad():
        student(torch.randn(2, 3, SIDE, SIDE))
    student.eval()(torch.randn(2, 3, SIDE, SIDE))
    assert memory.pixel_values is None


@pytest.mark.parametrize("end", ["close", "collect"])
def test_the_hook_goes_with_the_loss(teacher, end):
    student = tiny_student()
    loss = DistillationLoss(teacher, student, MEAN, STD)
    assert len(student._forward_pre_hooks) == 1
    if end == "close":
        loss.close()
        loss.close()
    else:
        del loss
        gc.collect()
    assert not student._forward_pre_hooks


def test_a_training_step_that_was_not_seen(teacher):
    student = tiny_student()
    loss = DistillationLoss(teacher, student, MEAN, STD)
    with pytest.raises(RuntimeError, match="did not see the images of this training step"):
        loss(copy.deepcopy(student)(torch.randn(2, 3, SIDE, SIDE)), torch.tensor([0, 1]))


@pytest.mark.parametrize("wrapper", ["compiled", "ddp", "autocast"])
def test_a_wrapped_student_is_seen(teacher, wrapper):
    student, pixel_values, labels = tiny_student(), torch.randn(2, 3, SIDE, SIDE), torch.tensor([0, 1])
    loss = DistillationLoss(teacher, student, MEAN, STD)
    expected = loss(student(pixel_values), labels).item()
    if wrapper == "compiled":
        assert loss(torch.compile(student, backend="eager")(pixel_values), labels).item() == pytest.approx(expected)
    elif wrapper == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            loss_value = loss(student(pixel_values), labels)
        assert loss_value.dtype == torch.float32
        assert loss_value.item() == pytest.approx(expected, rel=0.05)
    else:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
            assert loss(parallel(pixel_values), labels).item() == pytest.approx(expected)
        finally:
            torch.distributed.destroy_process_group()
