"""The harness itself: what it counts, what it lets pass, and how it gets transformers' suites."""

import subprocess
import sys
import tarfile
import unittest
from pathlib import Path

import pytest
import torch
import transformers

from . import suites
from .harness import Run, count_uses, judge, run_test
from .suites import SuitesUnavailableError, locate_suites
from .test_conformance import SUITES, UNAVAILABLE
from .testers import CONTROL, DART, OURS, ModelTester, build_test_cases

needs_suites = pytest.mark.skipif(bool(UNAVAILABLE), reason="transformers' suites are not available")


class Checks(unittest.TestCase):
    """Stands for a test case of transformers."""

    __test__ = False

    def test_runs_the_classifier(self):
        config, inputs = ModelTester(DART).prepare_config_and_inputs_for_common()
        self.assertTrue(DART.classifier_class(config)(**inputs).logits.isfinite().all())

    def test_continues_past_everything(self):
        for model_class in DART.model_classes:
            if model_class.__name__ not in ["ViTModel"]:
                continue
            model_class(DART.config())

    def test_skips_a_part(self):
        with self.subTest("a part"):
            self.skipTest("not this one")

    def test_fails_in_a_part(self):
        with self.subTest("a part"):
            self.fail("broken here")

    def test_reads_the_random_state(self):
        raise RuntimeError(f"drew {torch.rand(())}")


def check(name: str) -> Run:
    return run_test("modeling", Checks(f"test_{name}"), DART)


def test_uses_are_counted_from_outside_the_models():
    run = check("runs_the_classifier")
    assert run.outcome == "passed"
    assert run.uses == {"model built": 0, "model run": 0, "classifier built": 1, "classifier run": 1}


@pytest.mark.parametrize("subject", OURS, ids=lambda subject: subject.model_type)
def test_counting_leaves_no_trace(subject):
    """Also of methods that a class inherits, as most of ours do."""
    owners = (*subject.model_classes, subject.image_processor_class)
    before = [dict(vars(owner)) for owner in owners]
    with count_uses(subject):
        assert all(dict(vars(owner)) != unpatched for owner, unpatched in zip(owners, before, strict=True))
    assert [dict(vars(owner)) for owner in owners] == before


def test_outcomes():
    assert check("skips_a_part").outcome == "skipped"
    assert check("skips_a_part").message == "not this one"
    assert check("fails_in_a_part").outcome == "failed"
    assert "broken here" in check("fails_in_a_part").message
    assert not any(check("continues_past_everything").uses.values())
    assert check("reads_the_random_state").message == check("reads_the_random_state").message


def used(outcome: str, built: int = 1, run: int = 1) -> Run:
    return Run(outcome, "because", {"model built": built, "model run": run})


@pytest.mark.parametrize(
    ("ours", "control", "table", "expected"),
    [
        (used("passed"), used("passed"), None, "passed"),
        (used("passed", 2, 1), used("passed", 1, 3), None, "passed"),
        (used("failed"), used("passed"), None, "failed"),
        (used("failed"), used("failed"), None, "failed"),
        (used("skipped"), used("passed"), None, "failed"),
        (used("skipped"), used("skipped"), None, "skipped"),
        (used("skipped", 0, 0), used("skipped"), None, "failed"),
        (used("passed"), used("failed"), None, "failed"),
        (used("passed"), used("skipped"), None, "passed"),
        (used("passed", 1, 0), used("passed"), None, "failed"),
        (used("passed", 0, 0), used("passed", 0, 0), None, "failed"),
        (used("skipped"), used("passed"), "skips", "skipped"),
        (used("failed"), used("passed"), "skips", "skipped"),
        (used("passed"), used("passed"), "skips", "failed"),
        (used("passed", 0, 0), used("passed", 0, 0), "not_exercised", "passed"),
        (used("passed", 0, 0), used("passed"), "not_exercised", "failed"),
        (used("passed"), used("passed"), "not_exercised", "failed"),
        (used("skipped"), used("skipped"), "must_run", "failed"),
        (used("passed"), used("passed"), "must_run", "passed"),
    ],
)
def test_judgement(ours, control, table, expected):
    tables = {"skips": {}, "not_exercised": {}, "must_run": {}}
    if table:
        tables[table] = {"modeling::test_some*": "for a reason"}
    verdict = judge("modeling::test_something", ours, lambda: control, **tables)
    assert verdict.outcome == expected
    assert bool(verdict.message) == (expected != "passed")


@needs_suites
def test_ours_out_of_the_name_mappings_is_noticed():
    """transformers' test of training walks past a class that it does not know by name, and passes."""
    runs = {
        subject.model_type: run_test(
            "modeling", build_test_cases(subject, SUITES)["modeling"]("test_problem_types"), subject
        )
        for subject in (DART, CONTROL)
    }
    ours, control = runs["dart"], runs["vit"]
    assert ours.outcome == control.outcome == "passed"
    verdict = judge("modeling::test_problem_types", ours, lambda: control, skips={}, not_exercised={}, must_run={})
    assert verdict.outcome == "failed"
    assert "classifier built, classifier run" in verdict.message


# --- where the suites come from --------------------------------------------------------------------------------------

NAME = f"transformers-{transformers.__version__}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds nothing anywhere."""
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no pip.conf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.delenv(suites.SOURCE_VARIABLE, raising=False)
    return tmp_path / "cache" / "dart-hf"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A source distribution like transformers', with one suite."""
    (tmp_path / "test_modeling_common.py").write_text("")
    path = tmp_path / f"{NAME}.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        opened.add(tmp_path / "test_modeling_common.py", f"{NAME}/tests/test_modeling_common.py")
        opened.add(tmp_path / "test_modeling_common.py", f"{NAME}/setup.py")
    return path


def test_without_a_network_the_message_says_what_to_do(cache):
    with pytest.raises(
        SuitesUnavailableError, match=f"pip could not download.*set {suites.SOURCE_VARIABLE}.*{NAME}.tar.gz"
    ):
        locate_suites()
    assert list(cache.iterdir()) == []


def test_pip_is_asked_for_the_installed_version_once(cache, archive, monkeypatch):
    commands = []

    def download(command, **kwargs):
        commands.append(command)
        archive.rename(Path(command[command.index("--dest") + 1], archive.name))

    monkeypatch.setattr(subprocess, "run", download)
    assert locate_suites() == locate_suites() == cache / NAME
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == f"transformers=={transformers.__version__}"


def test_a_given_archive_needs_no_network(cache, archive, monkeypatch):
    monkeypatch.setenv(suites.SOURCE_VARIABLE, str(archive))
    folder = locate_suites()
    assert [path.name for path in folder.iterdir()] == ["test_modeling_common.py"]
    assert [path.name for path in cache.iterdir()] == [NAME]
    archive.unlink()
    assert locate_suites() == folder


def test_what_an_interrupted_run_left_is_not_used(cache, archive, monkeypatch):
    (cache / f".{NAME}-interrupted" / NAME / "tests").mkdir(parents=True)
    monkeypatch.setenv(suites.SOURCE_VARIABLE, str(archive))
    assert (locate_suites() / "test_modeling_common.py").is_file()


@pytest.mark.parametrize("kept", [0, 60], ids=["empty", "cut short"])
def test_a_damaged_archive_is_named_and_not_kept(cache, archive, monkeypatch, kept):
    archive.write_bytes(archive.read_bytes()[:kept])
    monkeypatch.setenv(suites.SOURCE_VARIABLE, str(archive))
    with pytest.raises(SuitesUnavailableError, match=f"{NAME}.tar.gz is damaged"):
        locate_suites()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["transformers-1.0.0.tar.gz", "missing.tar.gz"])
def test_another_versions_archive_is_refused(cache, archive, monkeypatch, name):
    monkeypatch.setenv(suites.SOURCE_VARIABLE, str(archive.with_name(name)))
    if name.startswith("transformers"):
        archive.rename(archive.with_name(name))
    with pytest.raises(
        SuitesUnavailableError, match=f"{suites.SOURCE_VARIABLE} must be the path of {NAME}.tar.gz, got"
    ):
        locate_suites()


def test_a_suite_that_is_missing_is_not_stood_in_for(cache, archive, monkeypatch):
    monkeypatch.setenv(suites.SOURCE_VARIABLE, str(archive))
    monkeypatch.setattr(suites, "PACKAGE", "transformers_suites_of_another_version")
    with pytest.raises(SuitesUnavailableError, match="cannot be imported"):
        suites.load_suites()
