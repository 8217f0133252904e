"""The loss: cross entropy of soft and hard targets, as a mean over the images of the whole batch."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from transformers import Trainer, TrainingArguments

from dart_hf import DartConfig, DartForImageClassification
from dart_hf.training.losses import soft_target_cross_entropy

CLASSES = 3
NUM_IMAGES = 12


@pytest.fixture
def logits():
    return torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def soft():
    return torch.rand(8, CLASSES, generator=torch.Generator().manual_seed(2)).softmax(dim=1)


def test_soft_targets_as_torch_computes_them(logits, soft):
    expected = cross_entropy(logits, soft)
    assert soft_target_cross_entropy({"logits": logits}, soft).item() == pytest.approx(expected.item())
    assert soft_target_cross_entropy((logits,), soft).item() == pytest.approx(expected.item())


def test_class_indices_are_certain_targets(logits):
    labels = torch.arange(8) % CLASSES
    hard = soft_target_cross_entropy({"logits": logits}, labels)
    assert hard.item() == pytest.approx(cross_entropy(logits, labels).item())
    assert hard.item() == pytest.approx(soft_target_cross_entropy({"logits": logits}, one_hot(labels).float()).item())


def test_images_without_a_label_do_not_count(logits, soft):
    labels = torch.arange(8) % CLASSES
    labels[5:], soft[5:] = -100, -100
    logits[6] = torch.nan
    for targets in (labels, soft):
        loss = soft_target_cross_entropy({"logits": logits}, targets)
        assert loss.item() == pytest.approx(cross_entropy(logits[:5], targets[:5]).item())
    assert soft_target_cross_entropy({"logits": logits}, torch.full((8,), -100)).item() == 0


@pytest.mark.parametrize("count", [24, torch.tensor(24), torch.full((2, 1), 12)], ids=["int", "tensor", "DataParallel"])
def test_a_part_of_a_batch_gives_its_part_of_the_mean(logits, soft, count):
    labels = torch.arange(8) % CLASSES
    mean = cross_entropy(logits, labels).item()
    assert soft_target_cross_entropy({"logits": logits}, labels, num_items_in_batch=count).item() == pytest.approx(
        mean / 3
    )
    mean = cross_entropy(logits, soft).item()
    assert soft_target_cross_entropy({"logits": logits}, soft, count * CLASSES).item() == pytest.approx(mean / 3)


def test_half_precision_is_computed_in_float32(logits, soft):
    half = logits.to(torch.bfloat16)
    loss = soft_target_cross_entropy({"logits": half}, soft.to(torch.float64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(half.float(), soft).item())
    assert soft_target_cross_entropy({"logits": logits.double()}, soft).dtype == torch.float64


def test_labels_must_suit_the_logits(logits, soft):
    with pytest.raises(ValueError, match="must have labels, got none"):
        soft_target_cross_entropy({"logits": logits}, None)
    with pytest.raises(ValueError, match=r"shape \(8,\) \(integers\) or \(8, 3\) \(floating point\) .* got \(8, 2\)"):
        soft_target_cross_entropy({"logits": logits}, soft[:, :2])
    with pytest.raises(ValueError, match=r"got \(8,\) in torch.float32"):
        soft_target_cross_entropy({"logits": logits}, torch.ones(8))


def tiny_dart():
    torch.manual_seed(0)
    config = DartConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.2,
        image_size=16,
        patch_size=8,
        num_patches=4,
        score_grid_size=4,
        scorer="conv",
        # Whatever a scorer in training does depends on how images are put into batches.
        partition="uniform",
        num_labels=CLASSES,
    )
    return DartForImageClassification(config)


def rows(labels):
    images = torch.randn(NUM_IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def train(labels, folder, batch_size=8, accumulation=1):
    """A `Trainer` after an epoch of 12 images."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        # Plain steps, which show the scale of a gradient.
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(tiny_dart(), arguments, train_dataset=rows(labels), compute_loss_func=soft_target_cross_entropy)
    # transformers before 5.6 lets accelerate divide by the number of accumulated batches once more.
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.train()
    return trainer


HARD = torch.arange(NUM_IMAGES) % CLASSES
SOFT = torch.rand(NUM_IMAGES, CLASSES, generator=torch.Generator().manual_seed(4)).mul(4).softmax(dim=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trainers after an epoch on soft and on hard targets."""
    return {name: train(labels, tmp_path_factory.mktemp(name)) for name, labels in (("soft", SOFT), ("hard", HARD))}


@pytest.mark.parametrize(("whole", "part", "accumulation"), [(8, 2, 4), (12, 5, 3)], ids=["8+4", "5+5+2"])
@pytest.mark.parametrize("labels", [SOFT, HARD], ids=["soft", "hard"])
def test_accumulated_steps_are_those_of_whole_batches(labels, whole, part, accumulation, tmp_path):
    expected = train(labels, tmp_path, whole).model.state_dict()
    for name, weights in train(labels, tmp_path, part, accumulation).model.state_dict().items():
        torch.testing.assert_close(weights, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("labels", [SOFT, HARD], ids=["soft", "hard"])
def test_a_step_follows_the_mean_over_the_images(labels, tmp_path):
    model = tiny_dart().train()
    cross_entropy(model(torch.stack([row["pixel_values"] for row in rows(labels)])).logits, labels).backward()
    trained = train(labels, tmp_path, NUM_IMAGES).model.classifier.weight
    torch.testing.assert_close(trained, model.classifier.weight - model.classifier.weight.grad, atol=1e-6, rtol=0)


def test_soft_targets_teach_something_else(trained):
    soft, hard = (trained[kind].model.classifier.weight for kind in ("soft", "hard"))
    assert (soft - hard).abs().max() > 0.01


def test_evaluation_on_class_indices(trained):
    trainer = trained["soft"]
    trainer.args.per_device_eval_batch_size = NUM_IMAGES
    data = rows(HARD)
    with torch.no_grad():
        logits = trainer.model.eval()(torch.stack([row["pixel_values"] for row in data])).logits
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(cross_entropy(logits, HARD).item(), rel=1e-5)


def test_the_models_own_loss_takes_float_labels_for_several_answers():
    model = tiny_dart().eval()
    pixel_values = torch.stack([row["pixel_values"] for row in rows(SOFT)])
    outputs = model(pixel_values, labels=SOFT)
    assert outputs.loss.item() == pytest.approx(binary_cross_entropy_with_logits(outputs.logits, SOFT).item())
    assert outputs.loss.item() != pytest.approx(soft_target_cross_entropy(outputs, SOFT).item(), rel=0.05)
