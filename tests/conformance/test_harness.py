"""The harness notices tests that pass for the wrong reason, and gets transformers' suites with a clear error."""

import tarfile
import unittest
from pathlib import Path

import pytest
import torch
import transformers

from . import suites
from .harness import Exceptions, Run, count_uses, judge, judge_other_version, run_test
from .suites import SuitesUnavailableError, locate_suites
from .test_conformance import SUITES, UNAVAILABLE
from .testers import CONTROL, DART, OURS, ModelTester, build_test_cases


class Examples(unittest.TestCase):
    """Test methods like transformers'."""

    __test__ = False

    def test_runs_the_classifier(self):
        config, inputs = ModelTester(DART).prepare_config_and_inputs_for_common()
        self.assertTrue(DART.classifier_class(config)(**inputs).logits.isfinite().all())

    def test_fails_in_a_part(self):
        with self.subTest("a part"):
            self.fail(f"drew {torch.rand(())}")


def run_example(name: str) -> Run:
    return run_test("modeling", Examples(f"test_{name}"), DART)


def test_calls_inside_a_model_are_not_counted():
    run = run_example("runs_the_classifier")
    assert run.outcome == "passed"
    assert run.uses == {"model built": 0, "model run": 0, "classifier built": 1, "classifier run": 1}


@pytest.mark.parametrize("subject", OURS, ids=lambda subject: subject.model_type)
def test_counting_restores_the_classes(subject):
    """Methods that a class inherits must not stay behind as its own."""
    owners = (*subject.model_classes, subject.image_processor_class)
    before = [dict(vars(owner)) for owner in owners]
    with count_uses(subject):
        assert all(dict(vars(owner)) != unpatched for owner, unpatched in zip(owners, before, strict=True))
    assert [dict(vars(owner)) for owner in owners] == before


def test_failure_of_a_part_counts_and_seeds_are_fixed():
    run = run_example("fails_in_a_part")
    assert run.outcome == "failed" and "drew 0." in run.message
    assert run == run_example("fails_in_a_part")


def used(outcome: str, built: int = 1, run: int = 1) -> Run:
    return Run(outcome, "because", {"model built": built, "model run": run})


@pytest.mark.parametrize(
    ("ours", "control", "table", "expected", "with_other_version"),
    [
        (used("passed"), used("passed"), None, "passed", "passed"),
        (used("passed", 2, 1), used("passed", 1, 3), None, "passed", "passed"),
        (used("failed"), used("passed"), None, "failed", "failed"),
        (used("failed"), used("skipped"), None, "failed", "failed"),
        (used("failed"), used("failed"), None, "failed", "skipped"),
        (used("failed", 0, 0), used("passed"), None, "failed", "skipped"),
        (used("skipped"), used("passed"), None, "failed", "skipped"),
        (used("skipped"), used("skipped"), None, "skipped", "skipped"),
        (used("skipped", 0, 0), used("skipped"), None, "failed", "skipped"),
        (used("passed"), used("failed"), None, "failed", "passed"),
        (used("passed"), used("skipped"), None, "passed", "passed"),
        (used("passed", 1, 0), used("passed"), None, "failed", "passed"),
        (used("passed", 0, 0), used("passed", 0, 0), None, "failed", "passed"),
        (used("skipped"), used("passed"), "skips", "skipped", "skipped"),
        (used("failed"), used("passed"), "skips", "skipped", "skipped"),
        (used("passed"), used("passed"), "skips", "failed", "passed"),
        (used("passed", 0, 0), used("passed", 0, 0), "not_exercised", "passed", "passed"),
        (used("passed", 0, 0), used("passed"), "not_exercised", "failed", "passed"),
        (used("passed"), used("passed"), "not_exercised", "failed", "passed"),
        (used("skipped"), used("skipped"), "must_run", "failed", "skipped"),
        (used("passed"), used("passed"), "must_run", "passed", "passed"),
    ],
)
def test_judgement(ours, control, table, expected, with_other_version):
    exceptions = Exceptions(**({table: {"modeling::test_some*": "for a reason"}} if table else {}))
    for judged, outcome in ((judge, expected), (judge_other_version, with_other_version)):
        verdict = judged("modeling::test_something", ours, lambda: control, exceptions)
        assert verdict.outcome == outcome
        assert bool(verdict.message) == (outcome != "passed")


@pytest.mark.skipif(bool(UNAVAILABLE), reason="transformers' suites are not available")
def test_a_class_that_transformers_does_not_know_by_name_is_noticed():
    """`test_problem_types` passes over a class that is not in transformers' mappings, and passes."""
    runs = [
        run_test("modeling", build_test_cases(subject, SUITES)["modeling"]("test_problem_types"), subject)
        for subject in (DART, CONTROL)
    ]
    assert [run.outcome for run in runs] == ["passed", "passed"]
    verdict = judge("modeling::test_problem_types", runs[0], lambda: runs[1], Exceptions())
    assert verdict.outcome == "failed"
    assert "classifier built, classifier run" in verdict.message


NAME = f"transformers-{transformers.__version__}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds no package."""
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no pip.conf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.delenv(suites.SOURCE_VARIABLE, raising=False)
    return tmp_path / "cache" / "dart-hf"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source distribution like transformers', with one suite, and the variable that names it."""
    (tmp_path / "test_modeling_common.py").write_text("")
    path = tmp_path / f"{NAME}.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        opened.add(tmp_path / "test_modeling_common.py", f"{NAME}/tests/test_modeling_common.py")
        opened.add(tmp_path / "test_modeling_common.py", f"{NAME}/setup.py")
    monkeypatch.setenv(suites.SOURCE_VARIABLE, str(path))
    return path


def test_without_a_network_the_error_says_what_to_do(cache):
    with pytest.raises(SuitesUnavailableError, match=f"could not download.*{suites.SOURCE_VARIABLE}.*{NAME}.tar.gz"):
        locate_suites()
    assert list(cache.iterdir()) == []


def test_a_given_archive_is_unpacked_once(cache, archive):
    folder = locate_suites()
    assert folder == cache / NAME and [path.name for path in folder.iterdir()] == ["test_modeling_common.py"]
    archive.unlink()
    assert locate_suites() == folder


def test_a_missing_suite_gets_no_placeholder(cache, archive, monkeypatch):
    monkeypatch.setattr(suites, "PACKAGE", "transformers_suites_of_another_version")
    with pytest.raises(SuitesUnavailableError, match="cannot be imported"):
        suites.load_suites()
