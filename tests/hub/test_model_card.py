"""Model cards say what is so, and nothing that no record tells."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from dart_hf import DartConfig, DartForImageClassification
from dart_hf.hub import model_card
from dart_hf.hub.model_card import MADE, SHOWN_LABELS, TEMPLATES, Records, finished_card, make_model_card, read_record

TRAINING = {
    "data": {
        "source": "user/flowers",
        "subset": "small",
        "train_split": "train",
        "evaluation_split": "validation",
        "num_train_images": 900,
        "num_evaluation_images": 90,
    },
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
        {"num_patches": 16, "top1": 0.9, "top5": None, "images_per_second": 10.0},
        {"num_patches": 4, "top1": 0.8125, "top5": 0.98, "images_per_second": 20.0},
    ],
}


def make_model(**settings) -> DartForImageClassification:
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
        "patch_size": 4,
        "num_patches": 9,
        "score_grid_size": 4,
        "scorer": "conv",
        "num_labels": 3,
        **settings,
    }
    return DartForImageClassification(DartConfig(**settings)).eval()


@pytest.fixture(scope="module")
def model() -> DartForImageClassification:
    return make_model()


def read_back(card: ModelCard) -> ModelCard:
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


def test_what_is_not_on_record_is_left_out(model):
    card = read_back(make_model_card(model, "user/name", Records()))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["dart", "dart-hf", "vision", "adaptive-tokens", "region-tokenizer"],
    }
    assert "## Accuracy" not in card.text and "## Training" not in card.text


def test_metadata(model):
    records = Records(license="cc-by-4.0", base_model="user/base", dataset="user/flowers", example="example.png")
    data = read_back(make_model_card(model, "user/name", records)).data
    assert (data.license, data.base_model, data.datasets) == ("cc-by-4.0", "user/base", ["user/flowers"])
    assert data.widget == [{"src": "example.png", "example_title": "Example"}]


def test_accuracies_by_budget(model):
    records = Records(TRAINING, EVALUATION, evaluation_dataset="user/photos")
    card = read_back(make_model_card(model, "user/name", records))
    assert results(card) == [
        ("user/photos", None, "test", "Top-1 accuracy, 4 tokens", 0.8125),
        ("user/photos", None, "test", "Top-5 accuracy, 4 tokens", 0.98),
        ("user/photos", None, "test", "Top-1 accuracy, 16 tokens", 0.9),
    ]
    assert [result.metric_args["num_patches"] for result in card.data.eval_results] == [4, 4, 16]
    assert (card.data.model_name, card.data.metrics) == ("name", ["accuracy"])
    assert "On 1,234 images of user/photos (test), with `image` score normalisation:" in card.text
    assert (table(card)["4"], table(card)["16"]) == ("81.2% | 98.0%", "90.0% | –")


def test_the_accuracy_at_the_end_of_the_training(model):
    card = read_back(make_model_card(model, "user/name", Records(TRAINING, dataset="user/flowers")))
    assert results(card) == [
        ("user/flowers", "small", "validation", "Top-1 accuracy, 9 tokens", 0.75),
        ("user/flowers", "small", "validation", "Top-5 accuracy, 9 tokens", 0.95),
    ]
    assert "On 90 images of user/flowers (small, validation):" in card.text


def test_training(model):
    assert (
        table(make_model_card(model, "user/name", Records(TRAINING))).items()
        >= {
            "Started from": "user/pretrained",
            "Data": "user/flowers",
            "Images": "900",
            "Unreadable images left out": "3",
            "Steps": "70",
            "Epochs": "2.5",
            "`learning_rate`": "0.001",
            "`note`": "a\\|b c",
            "torch": "2.6.0",
        }.items()
    )


def test_data_that_are_not_on_the_hub_are_not_said_to_be(model):
    evaluation = {**EVALUATION, "data": {"source": "mnist"}}
    card = read_back(make_model_card(model, "user/name", Records({}, evaluation, dataset="user/flowers")))
    assert {(result.dataset_type, result.dataset_name) for result in card.data.eval_results} == {("private", "mnist")}
    assert "On 1,234 images of mnist" in card.text
    card = read_back(make_model_card(model, "user/name", Records({}, {**EVALUATION, "data": {}})))
    assert "On 1,234 images of data that are not public" in card.text


@pytest.mark.parametrize("training", [{"steps": 5}, {"data": {}, "settings": {}, "metrics": {}, "versions": {}}])
def test_incomplete_records(model, training):
    evaluation = {"budgets": [{"num_patches": 4}, {"top1": 0.5}]}
    card = read_back(make_model_card(model, "user/name", Records(training, evaluation)))
    assert card.data.eval_results is None
    assert "None" not in card.text


def test_only_what_is_expected_is_read_of_records(tmp_path):
    path = tmp_path / "training.json"
    assert read_record(path, model_card.TRAINING) == {}
    known = {key: value for key, value in TRAINING.items() if key != "settings"}
    path.write_text(json.dumps({**TRAINING, "command": "dart-hf train --data /home/me", "mine": {"a": [1]}}))
    assert read_record(path, model_card.TRAINING) == {**known, "settings": {"learning_rate": 0.001}}
    path.write_text(json.dumps({**EVALUATION, "model": "/home/me/model"}))
    budgets = [{"num_patches": 16, "top1": 0.9, "images_per_second": 10.0}, EVALUATION["budgets"][1]]
    data = {"source": "user/photos", "split": "test"}
    assert read_record(path, model_card.EVALUATION) == {**EVALUATION, "data": data, "budgets": budgets}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "[] is unexpected"),
        ('{"data": "flowers"}', '"flowers" is unexpected'),
        ('{"budgets": {"9": {"top1": 0.3}}}', "is unexpected"),
        ('{"budgets": [{"num_patches": 9, "top1": "x"}]}', '"x" is unexpected'),
        ('{"budgets": [{"num_patches": 9, "top1": NaN}]}', "NaN is unexpected"),
        ('{"num_images": 0.5}', "0.5 is unexpected"),
    ],
)
def test_damaged_records(tmp_path, text, words):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json' is damaged") as error:
        read_record(path, {**model_card.TRAINING, **model_card.EVALUATION, "data": {}})
    assert words in str(error.value)


def test_the_model(model):
    facts = table(make_model_card(model, "user/name", Records()))
    num_parameters = sum(tensor.numel() for tensor in model.parameters())
    assert facts["Parameters"] == f"{num_parameters:,}"
    assert facts["Image size"] == "64 × 64 pixels"
    assert facts["Tokens"].startswith("9,")
    assert facts["Partition"].startswith("`flow`")
    assert facts["Scorer"] == "`conv`, on a grid of 4 × 4"
    assert facts["Labels"] == "LABEL_0, LABEL_1, LABEL_2"


def test_many_labels_are_shortened():
    facts = table(make_model_card(make_model(num_labels=SHOWN_LABELS + 7), "user/name", Records()))
    assert facts["Labels"].endswith(f"LABEL_{SHOWN_LABELS - 1} and 7 more")


@pytest.mark.parametrize(
    ("rule", "words", "other"),
    [
        ("running", "no prediction depends on the other images", "image's prediction depends on"),
        ("image", "no prediction depends on the other images", "image's prediction depends on"),
        ("batch", "image's prediction depends on the other images", "no prediction depends on"),
    ],
)
def test_whether_predictions_depend_on_their_neighbours(rule, words, other):
    text = make_model_card(make_model(score_normalization=rule), "user/name", Records()).text
    assert f"`{rule}`" in text and words in text and other not in text


def test_running_statistics_that_are_not_there_yet():
    model = make_model()
    words = "There are no such statistics yet"
    assert words in make_model_card(model, "user/name", Records()).text
    model.train()(torch.rand(2, 3, 64, 64))
    assert words not in make_model_card(model, "user/name", Records()).text


def test_a_model_whose_scorer_is_not_run():
    text = make_model_card(make_model(partition="uniform"), "user/name", Records()).text
    assert "`uniform`" in text and "## Score normalisation" not in text


def test_an_encoder(model):
    card = make_model_card(model.dart, "user/name", Records())
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "AutoModelForImageClassification" not in card.text and "Labels" not in table(card)


def test_the_code_on_a_card_runs(model, tmp_path, monkeypatch):
    """Each of its Python blocks, of a model in a folder of that name, where dart_hf is installed."""
    from PIL import Image

    from dart_hf import DartImageProcessor

    monkeypatch.chdir(tmp_path)
    model.save_pretrained("user/name")
    DartImageProcessor(size=64, crop_size=64).save_pretrained("user/name")
    Image.new("RGB", (80, 64), "green").save("photo.jpg")
    blocks = make_model_card(model, "user/name", Records()).text.split("```python\n")[1:]
    assert len(blocks) == 2
    for block in blocks:
        exec(block.partition("```")[0], namespace := {})
    assert namespace["outputs"].logits.shape == (1, 3)
    assert namespace["outputs"].regions.scores.shape == (1, 4, 4)


@pytest.mark.parametrize("text", ["", f"\n{MADE}\n# Old\n", *(f"# Old\n{mark}\n" for mark in TEMPLATES)])
def test_a_card_that_nobody_wrote_keeps_its_licence_only(model, text):
    made = make_model_card(model, "user/name", Records(evaluation=EVALUATION))
    metadata = "license: other\nlicense_name: mine\ntags: [old]\nbase_model: user/old"
    card = read_back(finished_card(made, [ModelCard(f"---\n{metadata}\n---\n{text}")]))
    assert card.text == made.text and MADE in made.text
    assert card.data.to_dict() == {"license": "other", "license_name": "mine", **made.data.to_dict()}


def test_a_card_that_somebody_wrote_keeps_its_text_and_metadata(model):
    old = make_model_card(model, "user/old", Records(TRAINING, license="mit", base_model="user/base", example="a.png"))
    own = str(old).replace(f"{MADE}\n", "Mine.").replace("tags:\n", "language: en\ntags:\n- mine\n")
    own = ModelCard(own.replace("library_name: transformers", "library_name: other"))
    made = make_model_card(
        make_model(num_labels=5), "user/name", Records(evaluation=EVALUATION, dataset="user/flowers")
    )
    card = read_back(finished_card(made, [own]))
    assert card.text == own.text
    expected = {**made.data.to_dict(), "license": "mit", "language": "en", "library_name": "other"}
    assert card.data.to_dict() == {**expected, "tags": ["mine", *made.data.tags]}
    assert str(finished_card(made, [card])) == str(card)
    assert finished_card(make_model_card(model, "user/name", Records()), [own]).data.to_dict().keys() == {
        *("license", "language", "library_name", "pipeline_tag", "tags")
    }


def test_the_first_card_that_somebody_wrote_is_kept(model):
    made = make_model_card(model, "user/name", Records())
    template = ModelCard(f"---\nlicense: apache-2.0\n---\n# Model\n{TEMPLATES[0]}\n")
    first, second = (ModelCard(f"---\nlicense: {name}\n---\n# {name}\n") for name in ("mit", "bsd"))
    card = finished_card(made, [template, first, second])
    assert (card.text, card.data.license) == (first.text, "mit")


def test_a_licence_that_is_given_replaces_the_old_one(model):
    made = make_model_card(model, "user/name", Records(license="apache-2.0"))
    for text in (MADE, "# Mine"):
        old = ModelCard(f"---\nlicense: other\nlicense_name: mine\n---\n{text}\n")
        assert finished_card(made, [old]).data.to_dict() == made.data.to_dict()
