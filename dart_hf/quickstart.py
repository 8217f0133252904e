"""The quick start: train a small DART to read digits on photographs, load it again, and show where its tokens are.

It needs the extra `quickstart`, which has the digits, the photographs and matplotlib.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import pipeline, set_seed

from dart_hf import DartConfig, DartForImageClassification, DartImageProcessor
from dart_hf.data.digits_on_photos import digits_on_photos
from dart_hf.environment import require_packages
from dart_hf.evaluation.metrics import Accuracy
from dart_hf.evaluation.region_statistics import count_regions_on_boxes
from dart_hf.training.classifier import EVALUATION_BATCH_SIZE, train_classifier
from dart_hf.visualization import draw_regions, save_figure

NUM_SAMPLES = 8
# The largest training digit is larger than the largest test digit by this factor.
LARGER = 4 / 3


def run_quickstart(
    output: str | os.PathLike = "quickstart",
    steps: int = 1400,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    image_size: int = 112,
    digit_sizes: tuple[int, int] = (28, 48),
    num_patches: int = 49,
    scorer: str = "conv",
    train_placements: int = 20,
    test_placements: int = 3,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a small DART on digits on photographs, save it, load it again in a pipeline, and draw its regions.

    Args:
        output: Folder for the model, sample images and results; created if missing.
        steps: Training steps.
        batch_size: Images in a step.
        learning_rate: The highest learning rate.
        image_size: Side of the images in pixels.
        digit_sizes: Smallest and largest side in pixels of a test digit; training digits can be larger by a third.
        num_patches: Token budget.
        scorer: The scorer, such as "conv", "detail" or "encoder"; see [`DartConfig`].
        train_placements, test_placements: Number of images that show each training digit, and each test digit.
        seed: Random seed of the images, the initial weights and the order of training.
        report: Called with each line of output.

    Returns:
        The content of `results.json`: `accuracy` of the loaded model, `accuracy_before_saving`, `chance`,
        `regions_on_digit` (`learned` and `uniform`, see [`count_regions_on_boxes`]), `seconds`, `settings`.

    Raises:
        ValueError: An argument is out of range.
        OSError: `output` cannot be written to.
        ImportError: A package of the extra `quickstart` is missing.
    """
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "image_size": image_size,
        "digit_sizes": list(digit_sizes),
        "num_patches": num_patches,
        "scorer": scorer,
        "train_placements": train_placements,
        "test_placements": test_placements,
        "seed": seed,
    }
    for name in ("steps", "batch_size", "num_patches", "train_placements", "test_placements"):
        if settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}.")
    require_packages("The quick start", "quickstart", "matplotlib", "skimage", "sklearn")
    started = time.monotonic()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    set_seed(seed)

    smallest, largest = digit_sizes
    # The model learns large digits first, which helps it with the small ones.
    train_digit_sizes = (smallest, min(round(LARGER * largest), image_size))
    train = digits_on_photos("train", train_placements, image_size, train_digit_sizes, seed)
    test = digits_on_photos("test", test_placements, image_size, digit_sizes, seed)
    report(
        f"Pasted digits on photographs: {len(train):,} training images, {len(test):,} test images with other digits."
    )

    model, image_processor = small_dart(train.features["label"].names, image_size, num_patches, scorer)
    report(f"Training a DART of {model.num_parameters() / 1e6:.1f} million weights, {num_patches} tokens an image.")
    trainer = train_classifier(model, image_processor, train, test, output, steps, batch_size, learning_rate, seed=seed)
    accuracy_before_saving = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(output / "model")
    image_processor.save_pretrained(output / "model")

    report("Testing the saved model.")
    accuracy = pipeline_accuracy(output / "model", test)
    regions_on_digit = count_regions_on_boxes(model, image_processor, test)
    samples = draw_samples(model, image_processor, test, output)
    results = {
        "accuracy": accuracy,
        "accuracy_before_saving": accuracy_before_saving,
        "chance": 1 / model.config.num_labels,
        "regions_on_digit": regions_on_digit,
        "seconds": round(time.monotonic() - started, 1),
        "settings": settings,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    report(f"""
Accuracy: {accuracy:.1%} of {len(test):,} test images (chance: {results["chance"]:.0%})
Regions on the digit: {regions_on_digit["learned"]:.1f} of {num_patches} as learned, \
{regions_on_digit["uniform"]:.1f} if spread evenly

Results in {output}:
  regions.png     where the tokens went on {len(samples)} test images
  images/         these images
  model/          the model and its image processor
  results.json    the numbers

Try next:
  dart-hf predict {samples[0]} --model {output / "model"}
  dart-hf visualize {samples[0]} --model {output / "model"} --output {output / "one.png"} --scores""")
    return results


def small_dart(
    labels: Sequence[str], image_size: int, num_patches: int, scorer: str = "conv", **settings: Any
) -> tuple[DartForImageClassification, DartImageProcessor]:
    """A DART that is small enough to train on a laptop's processor, and its image processor.

    Args:
        labels: Names of the classes.
        image_size: Side of its images in pixels; the image processor resizes and crops others.
        num_patches: Token budget.
        scorer: The scorer. `"conv"` trains from scratch.
        settings: Other settings of [`DartConfig`].
    """
    config = DartConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        # About 1/√96. With the 0.02 of wide models, a model as narrow as this learns nothing for hundreds of steps.
        initializer_range=0.1,
        image_size=image_size,
        patch_size=8,
        num_patches=num_patches,
        scorer=scorer,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **settings,
    )
    image_processor = DartImageProcessor(size={"shortest_edge": image_size}, crop_size=image_size)
    return DartForImageClassification(config), image_processor


def pipeline_accuracy(folder: str | os.PathLike, test: Dataset) -> float:
    """The accuracy of a saved model in a pipeline on `test` (columns `image`, `label`)."""
    # The folder contains the model's code, for users without this package. This uses the installed code.
    classify = pipeline("image-classification", model=os.fspath(folder), top_k=1, trust_remote_code=False)
    answers = classify(test["image"][:], batch_size=EVALUATION_BATCH_SIZE)
    index_of = classify.model.config.label2id
    predictions = [index_of[answer[0]["label"]] for answer in answers]
    return Accuracy().compute(predictions=predictions, references=test["label"][:])["accuracy"]


@torch.no_grad()
def draw_samples(
    model: DartForImageClassification, image_processor: DartImageProcessor, test: Dataset, output: Path
) -> list[Path]:
    """Write the first images of `test` to the folder `images` in `output`, and draw their regions to `regions.png`.

    Returns:
        The paths of the images.
    """
    model.eval()
    rows = test[:NUM_SAMPLES]
    pixel_values = image_processor(rows["image"], return_tensors="pt")["pixel_values"]
    outputs = model(pixel_values.to(model.device), output_regions=True)
    answers = [model.config.id2label[index] for index in outputs.logits.argmax(dim=-1).tolist()]
    titles = [f"{label}, read as {answer}" for label, answer in zip(rows["label"], answers, strict=True)]
    save_figure(draw_regions(pixel_values, outputs.regions, titles), output / "regions.png")

    (output / "images").mkdir(exist_ok=True)
    paths = []
    for number, (image, label) in enumerate(zip(rows["image"], rows["label"], strict=True)):
        paths.append(output / "images" / f"{number}-digit-{label}.png")
        image.save(paths[-1])
    return paths
