"""transformers' pipelines with a saved model."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import skimage
import torch
from helpers.tiny_models import tiny_classifier
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, Pipeline, pipeline

import dart_hf
from dart_hf import DartImageProcessor
from dart_hf.evaluation.classification import evaluate_classifier
from dart_hf.evaluation.prediction import predict

CLASSES = {"dart": "Dart", "dart_vim": "DartVim", "dart_rmt": "DartRmt"}
LABELS = ["ant", "bee", "cicada", "dragonfly", "earwig"]
SIDE = 64
NUM_PATCHES = 12
# Between float32 results alone and in a batch: a rounded score moves an edge by a thousandth of a pixel.
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
) -> Callable[[str], str]:
    """A function that returns the folder of a model for each score normalisation, always with the same weights."""
    # The weights are large enough for the regions to matter for the logits.
    settings = {"image_size": SIDE, "patch_size": 8, "num_patches": NUM_PATCHES, "initializer_range": 0.3}
    model = tiny_classifier(LABELS, model_type, score_normalization="running", **settings)
    processor = DartImageProcessor(size={"shortest_edge": 72}, crop_size={"height": SIDE, "width": SIDE})
    # One step in training mode gives the scorer its running statistics.
    model.train()(**processor(pictures, return_tensors="pt"))
    model.eval()

    folders = {}
    for normalization in ("running", "image", "batch"):
        model.config.score_normalization = normalization
        folders[normalization] = str(tmp_path_factory.mktemp(normalization))
        model.save_pretrained(folders[normalization])
        processor.save_pretrained(folders[normalization])
    return folders.__getitem__


@pytest.fixture(scope="module")
def classify(saved: Callable[[str], str]) -> Pipeline:
    return pipeline("image-classification", model=saved("running"))


@pytest.fixture(scope="module")
def extract(saved: Callable[[str], str]) -> Pipeline:
    return pipeline("image-feature-extraction", model=saved("running"))


def logits_of(folder: str, pictures: list[Image.Image], batch_size: int) -> torch.Tensor:
    """Return the logits (pictures, labels) of the classification pipeline, in the order of the labels."""
    classify = pipeline("image-classification", model=folder, function_to_apply="none", top_k=len(LABELS))
    answers = [
        {entry["label"]: entry["score"] for entry in answer} for answer in classify(pictures, batch_size=batch_size)
    ]
    return torch.tensor([[answer[label] for label in LABELS] for answer in answers])


def test_auto_classes_and_pipelines_load_our_classes(model_type, saved, classify, extract):
    name = CLASSES[model_type]
    assert type(AutoConfig.from_pretrained(saved("running"))) is getattr(dart_hf, f"{name}Config")
    assert type(classify.model) is getattr(dart_hf, f"{name}ForImageClassification")
    assert type(extract.model) is getattr(dart_hf, f"{name}Model")
    assert type(classify.image_processor) is type(extract.image_processor) is DartImageProcessor


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_ask_no_questions(saved, monkeypatch, task):
    """The saved code need not be trusted while dart_hf is imported."""
    questions = []
    monkeypatch.setattr("builtins.input", questions.append)
    pipeline(task, model=saved("running"))
    assert questions == []


def test_classification_answers_like_the_model(classify, pictures):
    with torch.no_grad():
        logits = classify.model(**classify.image_processor(pictures[0], return_tensors="pt")).logits[0]
    answer = classify(pictures[0])
    assert [entry["label"] for entry in answer] == [LABELS[index] for index in logits.argsort(descending=True)]
    expected = logits.softmax(dim=0).sort(descending=True).values
    torch.testing.assert_close(torch.tensor([entry["score"] for entry in answer]), expected)
    assert [classify(pictures[0], top_k=top_k) for top_k in (1, 3, 99)] == [answer[:1], answer[:3], answer]


def test_classification_in_half_precision(saved, classify, pictures):
    half = pipeline("image-classification", model=saved("running"), dtype=torch.float16)
    assert half.dtype == torch.float16
    found, expected = half(pictures[0]), classify(pictures[0])
    assert found[0]["label"] == expected[0]["label"]
    assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=0.02)


def test_features_have_their_shapes_and_feed_the_classifier(model_type, extract, classify, pictures):
    features = extract(pictures[0], return_tensors=True)
    pooled = extract(pictures[0], pool=True, return_tensors=True)
    assert pooled.shape == (1, 32)
    if model_type == "dart_rmt":
        # Two stages make a map of an image of 24×32 pixels.
        assert features.shape == (1, 32, 3, 4)
    else:
        class_token = {"dart": 0, "dart_vim": NUM_PATCHES // 2}[model_type]
        assert features.shape == (1, NUM_PATCHES + 1, 32)
        torch.testing.assert_close(pooled, features[:, class_token])
    with torch.no_grad():
        probabilities = classify.model.classifier(pooled)[0].softmax(dim=0)
    answer = {entry["label"]: entry["score"] for entry in classify(pictures[0])}
    assert answer == pytest.approx(dict(zip(LABELS, probabilities.tolist(), strict=True)), rel=1e-4)


@pytest.mark.parametrize("normalization", ["running", "image", "batch"])
def test_only_batch_normalisation_depends_on_the_batch(saved, pictures, normalization):
    single = logits_of(saved(normalization), pictures, batch_size=1)
    batched = logits_of(saved(normalization), pictures, batch_size=4)
    assert single.std() > 0.1
    difference = (single - batched).abs().max() / single.abs().max()
    if normalization == "batch":
        assert difference > 10 * BATCH_TOLERANCE
    else:
        assert difference <= BATCH_TOLERANCE
        extract = pipeline("image-feature-extraction", model=saved(normalization), return_tensors=True)
        single, batched = torch.cat(extract(pictures)), torch.cat(extract(pictures, batch_size=4))
        assert (single - batched).abs().max() <= BATCH_TOLERANCE * single.abs().max()


# --- the same pixels for every way in ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory) -> Path:
    """A folder of image files whose pixels depend on how they are opened."""
    folder = tmp_path_factory.mktemp("odd")
    values = np.random.default_rng(0).integers(0, 256, (70, 90, 4), dtype=np.uint8)
    image = Image.fromarray(values).resize((90, 70))
    image.save(folder / "transparent.png")
    image.convert("RGB").quantize(16).save(folder / "palette.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise by viewers
    image.convert("RGB").save(folder / "turned.jpg", exif=exif)
    image.convert("L").save(folder / "grey.png")
    image.convert("RGB").convert("CMYK").save(folder / "cmyk.jpg")
    return folder


@pytest.fixture(scope="module")
def address(odd_files) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

    handler = functools.partial(Handler, directory=str(odd_files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("name", ["transparent.png", "palette.png", "turned.jpg", "grey.png", "cmyk.jpg"])
def test_model_gets_the_same_pixels_whatever_reads_the_image(odd_files, address, tmp_path, name):
    model = tiny_classifier(LABELS, score_normalization="image")
    processor = DartImageProcessor(size=36, crop_size=32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    path = odd_files / name
    files = datasets.Dataset.from_dict({"image": [str(path)], "label": [0]})
    column = files.cast_column("image", datasets.Image())
    ways: dict[str, Callable[[], object]] = {
        "path": lambda: classify(str(path)),
        "URL": lambda: classify(f"{address}/{name}"),
        "PIL": lambda: classify(Image.open(path)),
        "list": lambda: classify([str(path), Image.open(path)], batch_size=2),
        "column": lambda: classify(column[0]["image"]),
        "processor": lambda: model(**processor(Image.open(path), return_tensors="pt")),
        "AutoImageProcessor": lambda: model(**AutoImageProcessor.from_pretrained(tmp_path)(path, return_tensors="pt")),
        "predict": lambda: predict(model, processor, [path]),
        "evaluate": lambda: evaluate_classifier(model, processor, column, LABELS),
    }
    seen: list[torch.Tensor] = []

    def record(_: torch.nn.Module, arguments: tuple, settings: dict) -> None:
        seen.extend((*arguments, *settings.values())[0])

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    expected = processor(Image.open(path), return_tensors="pt").pixel_values[0]
    for way, run in ways.items():
        seen.clear()
        run()
        assert seen and all(torch.equal(pixels, expected) for pixels in seen), way
    hook.remove()
