"""Only the listed entries of a record are read, and damaged records are refused."""

import json

import pytest

from dart_hf.hub import records
from dart_hf.hub.records import read_record


def test_only_listed_entries_are_read(tmp_path):
    path = tmp_path / "training.json"
    assert read_record(path, records.TRAINING) == {}
    known = {"data": {"source": "user/flowers"}, "settings": {"learning_rate": 0.001}, "metrics": {"eval_f1": 0.5}}
    private = {"command": "dart-hf train --data /home/me", "mine": {"a": [1]}, "steps": None}
    settings = {"learning_rate": 0.001, "hub_token": "hf_secret"}
    path.write_text(json.dumps({**known, **private, "settings": settings}))
    assert read_record(path, records.TRAINING) == known
    budgets = [{"num_patches": 16, "top1": 0.9}, {"num_patches": 4, "mean_absolute_error": 3}]
    path.write_text(json.dumps({"model": "/home/me/model", "budgets": [{**budgets[0], "top5": None}, budgets[1]]}))
    assert read_record(path, records.EVALUATION) == {"budgets": budgets}


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
def test_damaged_record_is_refused(tmp_path, text, words):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json' is damaged") as error:
        read_record(path, records.EVALUATION)
    assert words in str(error.value)
