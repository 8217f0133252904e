"""Model cards say what the model and its records say, and nothing else."""

import pytest
import torch
from helpers.tiny_models import tiny_classifier
from huggingface_hub import ModelCard
from PIL import Image

from dart_hf import DartForImageClassification, DartImageProcessor
from dart_hf.hub.model_card import GENERATED, SHOWN_LABELS, TEMPLATES, make_model_card, merge_cards
from dart_hf.hub.records import Records

FLOWERS = {"source": "user/flowers", "subset": "small", "train_split": "train", "evaluation_split": "validation"}
TRAINING = {
    "data": {**FLOWERS, "num_train_images": 900, "num_evaluation_images": 90},
    "started_from": "user/pretrained",
    "settings": {"learning_rate": 0.001, "note": "a|b\nc"},
    "steps": 70,
    "epochs": 2.5,
    "metrics": {"eval_accuracy": 0.75, "eval_top5_accuracy": 0.95, "eval_loss": 0.5},
    "skipped_images": 3,
    "versions": {"torch": "2.6.0"},
}
EVALUATION = {
    "data": {"source": "user/photos", "subset": None, "split": "test"},
    "num_images": 1234,
    "score_normalization": "image",
    "budgets": [
        {"num_patches": 16, "top1": 0.9, "images_per_second": 10.0},
        {"num_patches": 4, "top1": 0.8125, "top5": 0.98, "images_per_second": 20.0},
    ],
}


def make_model(num_labels: int = 3, **settings) -> DartForImageClassification:
    labels = [f"LABEL_{index}" for index in range(num_labels)]
    return tiny_classifier(labels, **{"score_normalization": "running", **settings})


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return make_model()


def make_card(model: DartForImageClassification, *arguments, **records) -> ModelCard:
    """Make the card of user/name, and check that it reads back as it was written."""
    card = make_model_card(model, "user/name", Records(*arguments, **records))
    again = ModelCard(str(card))
    assert (again.data.to_dict(), again.text) == (card.data.to_dict(), card.text)
    return again


def table(card: ModelCard) -> dict[str, str]:
    rows = (line.split(" | ") for line in card.text.splitlines() if line.startswith("| "))
    return {row[0].removeprefix("| "): " | ".join(row[1:]).removesuffix(" |") for row in rows}


def results(card: ModelCard) -> list[tuple]:
    return [
        (result.dataset_type, result.dataset_config, result.dataset_split, result.metric_name, result.metric_value)
        for result in card.data.eval_results
    ]


def test_card_without_records_describes_the_model_only(model):
    card = make_card(model)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["dart", "dart-hf", "vision", "adaptive-tokens", "region-tokenizer"],
    }
    assert "## Evaluation" not in card.text and "## Training" not in card.text
    facts = table(card)
    assert facts["Parameters"] == f"{sum(tensor.numel() for tensor in model.parameters()):,}"
    assert facts["Image size"] == "32 × 32 pixels" and facts["Tokens"].startswith("9 ")
    assert facts["Partition"].startswith("`flow`") and facts["Scorer"] == "`conv`, on a grid of 4 × 4"
    assert facts["Labels"] == "LABEL_0, LABEL_1, LABEL_2"


def test_records_become_metadata(model):
    data = make_card(model, license="mit", base_model="user/base", dataset="user/flowers", example="a.png").data
    assert (data.license, data.base_model, data.datasets) == ("mit", "user/base", ["user/flowers"])
    assert data.widget == [{"src": "a.png", "example_title": "Example"}]


def test_accuracies_are_listed_by_budget(model):
    card = make_card(model, TRAINING, EVALUATION, evaluation_dataset="user/photos")
    assert results(card) == [
        ("user/photos", None, "test", "Top-1 accuracy, 4 tokens", 0.8125),
        ("user/photos", None, "test", "Top-5 accuracy, 4 tokens", 0.98),
        ("user/photos", None, "test", "Top-1 accuracy, 16 tokens", 0.9),
    ]
    assert [result.metric_args["num_patches"] for result in card.data.eval_results] == [4, 4, 16]
    assert (card.data.model_name, card.data.metrics) == ("name", ["accuracy"])
    assert "On 1,234 images of user/photos (test), with `image` score normalisation:" in card.text
    assert (table(card)["4"], table(card)["16"]) == ("81.2% | 98.0%", "90.0% | –")


def test_accuracy_of_the_training_is_used_without_an_evaluation(model):
    card = make_card(model, TRAINING, dataset="user/flowers")
    assert results(card) == [
        ("user/flowers", "small", "validation", "Top-1 accuracy, 9 tokens", 0.75),
        ("user/flowers", "small", "validation", "Top-5 accuracy, 9 tokens", 0.95),
    ]
    assert "On 90 images of user/flowers (small, validation):" in card.text
    shown = {"Started from": "user/pretrained", "Images": "900", "Unreadable images left out": "3", "Steps": "70"}
    shown |= {"Epochs": "2.5", "`learning_rate`": "0.001", "`note`": "a\\|b c", "torch": "2.6.0"}
    assert table(card).items() >= shown.items()


@pytest.mark.parametrize(
    ("problem_type", "metrics", "purpose", "tag", "names", "row"),
    [
        (
            "multi_label_classification",
            {"mean_average_precision": 0.875, "f1": 0.75},
            "finds which of 3 labels an image has",
            "multi-label-classification",
            {"Mean average precision": "mean_average_precision", "F1": "f1"},
            "87.5% | 75.0%",
        ),
        (
            "regression",
            {"mean_absolute_error": 12.34567, "mean_squared_error": 200.0},
            "predicts 3 numbers from an image",
            "image-regression",
            {"Mean absolute error": "mae", "Mean squared error": "mse"},
            "12.35 | 200",
        ),
    ],
)
def test_card_of_other_tasks(problem_type, metrics, purpose, tag, names, row):
    model = make_model(problem_type=problem_type)
    at_the_end = {"metrics": {f"eval_{name}": value for name, value in metrics.items()}}
    for records in (Records(at_the_end), Records({}, {"budgets": [{"num_patches": 9, **metrics}]})):
        card = make_model_card(model, "user/name", records)
        assert purpose in card.text and tag in card.data.tags
        found = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
        kinds = zip(names.values(), metrics.values(), strict=True)
        assert found == dict(zip((f"{name}, 9 tokens" for name in names), kinds, strict=True))
        assert table(card)["9"] == row and card.data.metrics == list(names.values())


def test_data_are_named_only_where_they_are_public(model):
    card = make_card(model, {}, {**EVALUATION, "data": {"source": "mnist"}}, dataset="user/flowers")
    assert {(result.dataset_type, result.dataset_name) for result in card.data.eval_results} == {("private", "mnist")}
    assert "On 1,234 images of mnist" in card.text
    assert "On 1,234 images of data that are not public" in make_card(model, {}, {**EVALUATION, "data": {}}).text


@pytest.mark.parametrize("training", [{"steps": 5}, {"data": {}, "settings": {}, "metrics": {}, "versions": {}}])
def test_incomplete_records_give_no_results(model, training):
    card = make_card(model, training, {"budgets": [{"num_patches": 4}, {"top1": 0.5}]})
    assert card.data.eval_results is None and "None" not in card.text


def test_special_models_are_described(model):
    assert table(make_card(make_model(SHOWN_LABELS + 7)))["Labels"].endswith(f"LABEL_{SHOWN_LABELS - 1} and 7 more")
    uniform = make_card(make_model(partition="uniform")).text
    assert "`uniform`" in uniform and "## Score normalisation" not in uniform
    encoder = make_card(model.dart)
    assert encoder.data.pipeline_tag == "image-feature-extraction"
    assert "AutoModelForImageClassification" not in encoder.text and "Labels" not in table(encoder)


@pytest.mark.parametrize("rule", ["running", "image", "batch"])
def test_card_warns_of_predictions_that_depend_on_the_batch(rule):
    model = make_model(score_normalization=rule)
    text = make_card(model).text
    assert f"`{rule}`" in text
    assert ("**A prediction depends on the other images of its batch.**" in text) == (rule == "batch")
    assert ("No prediction depends on the other images of its batch." in text) == (rule != "batch")
    assert ("There are no such statistics yet" in text) == (rule == "running")
    if rule == "running":
        model.train()(torch.rand(2, 3, 32, 32))
        assert "There are no such statistics yet" not in make_card(model).text


def test_code_on_the_card_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("user/name")
    DartImageProcessor(size=32, crop_size=32).save_pretrained("user/name")
    Image.new("RGB", (80, 64), "green").save("photo.jpg")
    blocks = make_card(model).text.split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        exec(block.partition("```")[0], namespace := {})
    assert namespace["outputs"].logits.shape == (1, 3)
    assert namespace["outputs"].regions.scores.shape == (1, 4, 4)


@pytest.mark.parametrize("text", ["", f"\n{GENERATED} and made anew -->\n# Old\n", *(f"# A\n{t}\n" for t in TEMPLATES)])
def test_generated_card_is_replaced_and_keeps_its_licence(model, text):
    new = make_card(model, evaluation=EVALUATION)
    metadata = "license: other\nlicense_name: mine\ntags: [old]\nbase_model: user/old"
    card = merge_cards(new, [ModelCard(f"---\n{metadata}\n---\n{text}")])
    assert card.text == new.text and GENERATED in new.text
    assert card.data.to_dict() == {"license": "other", "license_name": "mine", **new.data.to_dict()}


def test_written_card_keeps_its_text_and_metadata(model):
    old = str(make_card(model, TRAINING, license="mit", base_model="user/base", example="a.png"))
    own = old.replace(GENERATED, "<!-- Mine.").replace("tags:\n", "language: en\ntags:\n- mine\n")
    own = ModelCard(own.replace("library_name: transformers", "library_name: other"))
    new = make_card(make_model(5), evaluation=EVALUATION, dataset="user/flowers")
    card = merge_cards(new, [own])
    assert card.text == own.text
    expected = {**new.data.to_dict(), "license": "mit", "language": "en", "library_name": "other"}
    assert card.data.to_dict() == {**expected, "tags": ["mine", *new.data.tags]}
    assert str(merge_cards(new, [card])) == str(card)
    assert merge_cards(make_card(model), [own]).data.to_dict().keys() == {
        *("license", "language", "library_name", "pipeline_tag", "tags")
    }


def test_first_written_card_and_the_given_licence_win(model):
    template = ModelCard(f"---\nlicense: apache-2.0\n---\n# Model\n{TEMPLATES[0]}\n")
    first, second = (ModelCard(f"---\nlicense: {name}\n---\n# {name}\n") for name in ("mit", "bsd"))
    card = merge_cards(make_card(model), [template, first, second])
    assert (card.text, card.data.license) == (first.text, "mit")
    # A given licence replaces the earlier one.
    new = make_card(model, license="apache-2.0")
    for text in (GENERATED, "# Mine"):
        old = ModelCard(f"---\nlicense: other\nlicense_name: mine\n---\n{text}\n")
        assert merge_cards(new, [old]).data.to_dict() == new.data.to_dict()
