"""The image classification and feature extraction pipelines, from a saved folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import skimage
import torch
from helpers.tiny_models import tiny_classifier
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Pipeline,
    pipeline,
)

from dart_hf import (
    DartConfig,
    DartForImageClassification,
    DartImageProcessor,
    DartModel,
    DartRmtConfig,
    DartRmtForImageClassification,
    DartRmtModel,
    DartVimConfig,
    DartVimForImageClassification,
    DartVimModel,
)

CLASSES = {
    "dart": (DartConfig, DartModel, DartForImageClassification),
    "dart_vim": (DartVimConfig, DartVimModel, DartVimForImageClassification),
    "dart_rmt": (DartRmtConfig, DartRmtModel, DartRmtForImageClassification),
}

LABELS = ["ant", "bee", "cicada", "dragonfly", "earwig"]
SIDE = 64
NUM_PATCHES = 12
# Of float32 results alone and in a batch: the rounding of a score moves an edge by a thousandth of a pixel.
BATCH_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Photographs of several sizes, one of them grey."""
    photographs = [
        Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "camera")
    ]
    return [*photographs, photographs[0].rotate(90), photographs[1].resize((90, 120))]


@pytest.fixture(scope="module", params=CLASSES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(
    model_type: str, tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]
) -> Callable[[str], Path]:
    """Score normalisation -> the folder of a model, all of them with the same weights, and of its image processor."""
    # Weights of order one, so that the regions matter for the logits.
    settings = {"image_size": SIDE, "patch_size": 8, "num_patches": NUM_PATCHES, "initializer_range": 0.3}
    model = tiny_classifier(LABELS, model_type, score_normalization="running", **settings)
    processor = DartImageProcessor(size={"shortest_edge": 72}, crop_size={"height": SIDE, "width": SIDE})
    # One step in training mode gives the scorer its running statistics.
    model.train()(**processor(pictures, return_tensors="pt"))
    model.eval()

    folders = {}
    for normalization in ("running", "image", "batch"):
        model.config.score_normalization = normalization
        folders[normalization] = tmp_path_factory.mktemp(normalization)
        model.save_pretrained(folders[normalization])
        processor.save_pretrained(folders[normalization])
    return folders.__getitem__


@pytest.fixture(scope="module")
def classify(saved: Callable[[str], Path]) -> Pipeline:
    return pipeline("image-classification", model=str(saved("running")))


@pytest.fixture(scope="module")
def extract(saved: Callable[[str], Path]) -> Pipeline:
    return pipeline("image-feature-extraction", model=str(saved("running")))


def logits_of(folder: Path, pictures: list[Image.Image], batch_size: int) -> torch.Tensor:
    """What the classification pipeline answers, as (pictures, labels) logits in the order of the labels."""
    classify = pipeline("image-classification", model=str(folder), function_to_apply="none", top_k=len(LABELS))
    answers = [
        {entry["label"]: entry["score"] for entry in answer} for answer in classify(pictures, batch_size=batch_size)
    ]
    return torch.tensor([[answer[label] for label in LABELS] for answer in answers])


def test_auto_classes_resolve_to_ours(model_type, saved):
    folder = saved("running")
    config, model, classifier = CLASSES[model_type]
    assert type(AutoConfig.from_pretrained(folder)) is config
    assert type(AutoImageProcessor.from_pretrained(folder)) is DartImageProcessor
    assert type(AutoModel.from_pretrained(folder)) is model
    assert type(AutoModelForImageClassification.from_pretrained(folder)) is classifier


def test_pipelines_load_ours(model_type, classify, extract):
    _, model, classifier = CLASSES[model_type]
    assert type(classify.model) is classifier
    assert type(extract.model) is model
    assert type(classify.image_processor) is type(extract.image_processor) is DartImageProcessor


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_ask_no_questions(saved, monkeypatch, task):
    """A saved folder carries its code, but with dart_hf imported nothing in it needs to be trusted."""
    questions = []
    monkeypatch.setattr("builtins.input", questions.append)
    pipeline(task, model=str(saved("running")))
    assert questions == []


def test_classification_answers_what_the_model_does(classify, pictures):
    with torch.no_grad():
        logits = classify.model(**classify.image_processor(pictures[0], return_tensors="pt")).logits[0]
    answer = classify(pictures[0])
    assert [entry["label"] for entry in answer] == [LABELS[index] for index in logits.argsort(descending=True)]
    expected = logits.softmax(dim=0).sort(descending=True).values
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in answer]), expected)


def test_classification_of_a_path_and_of_a_list_of_paths(classify, pictures, tmp_path):
    paths = []
    for index, picture in enumerate(pictures[:3]):
        paths.append(str(tmp_path / f"{index}.png"))
        picture.save(paths[-1])
    assert classify(paths[0]) == classify(pictures[0])
    assert classify(paths) == classify(pictures[:3])


def test_classification_in_half_precision(saved, classify, pictures):
    half = pipeline("image-classification", model=str(saved("running")), dtype=torch.float16)
    assert half.dtype == torch.float16
    found, expected = half(pictures[0]), classify(pictures[0])
    assert found[0]["label"] == expected[0]["label"]
    assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=0.02)


@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_top_k(classify, pictures, top_k):
    every = classify(pictures[0], top_k=len(LABELS))
    assert classify(pictures[0], top_k=top_k) == every[:top_k]


def test_features(model_type, extract, pictures):
    """Tokens with the class token among them; of RMT a map, which two stages make of an image of 24×32 pixels."""
    features = extract(pictures[0], return_tensors=True)
    pooled = extract(pictures[0], pool=True, return_tensors=True)
    assert pooled.shape == (1, 32)
    if model_type == "dart_rmt":
        assert features.shape == (1, 32, 3, 4)
    else:
        class_token = {"dart": 0, "dart_vim": NUM_PATCHES // 2}[model_type]
        assert features.shape == (1, NUM_PATCHES + 1, 32)
        torch.testing.assert_close(pooled, features[:, class_token])


def test_pooled_features_are_what_the_classifier_reads(extract, classify, pictures):
    with torch.no_grad():
        logits = classify.model.classifier(extract(pictures[0], pool=True, return_tensors=True))[0]
    answer = {entry["label"]: entry["score"] for entry in classify(pictures[0])}
    assert answer == pytest.approx(dict(zip(LABELS, logits.softmax(dim=0).tolist(), strict=True)), rel=1e-4)


@pytest.mark.parametrize("normalization", ["running", "image"])
def test_batches_answer_as_single_pictures(saved, pictures, normalization):
    single = logits_of(saved(normalization), pictures, batch_size=1)
    batched = logits_of(saved(normalization), pictures, batch_size=4)
    assert single.std() > 0.1
    assert (single - batched).abs().max() <= BATCH_TOLERANCE * single.abs().max()


def test_the_published_normalization_would_not(saved, pictures):
    """What the test above is worth: the batch moves the answers by far more than its tolerance."""
    single = logits_of(saved("batch"), pictures, batch_size=1)
    batched = logits_of(saved("batch"), pictures, batch_size=4)
    assert (single - batched).abs().max() > 10 * BATCH_TOLERANCE * single.abs().max()


@pytest.mark.parametrize("normalization", ["running", "image"])
def test_features_of_a_batch_equal_those_of_single_pictures(saved, pictures, normalization):
    extract = pipeline("image-feature-extraction", model=str(saved(normalization)), return_tensors=True)
    single = torch.cat(extract(pictures))
    batched = torch.cat(extract(pictures, batch_size=4))
    assert (single - batched).abs().max() <= BATCH_TOLERANCE * single.abs().max()
