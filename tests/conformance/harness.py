"""Run one test of transformers' suites against one subject, see what it exercised, and judge ours by the control."""

import functools
import random
import unittest
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto

from .suites import Suites
from .testers import Subject

# What a test of each suite has to do with a subject's classes to count as a test of them.
MODEL_USES = ("model built", "model run", "classifier built", "classifier run")
USES = {
    "modeling": MODEL_USES,
    "pipelines": MODEL_USES,
    "training": MODEL_USES,
    "configuration": ("config built",),
    "image_processing": ("image processor built", "image processor run"),
}


@dataclass(frozen=True)
class Run:
    """What became of one test: its outcome, the reason or the traceback, and how often it did what with our classes."""

    outcome: Literal["passed", "skipped", "failed"]
    message: str = ""
    uses: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    outcome: Literal["passed", "skipped", "failed"]
    message: str = ""


def run_test(suite: str, test_case: unittest.TestCase, subject: Subject) -> Run:
    """Run one test method, the same way every time."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    result = unittest.TestResult()
    with count_uses(subject) as uses:
        unittest.TestSuite([test_case]).run(result)
    exercised = {use: uses[use] for use in USES[suite]}
    if problems := result.failures + result.errors:
        return Run("failed", "\n".join(traceback for _, traceback in problems), exercised)
    if result.skipped:
        return Run("skipped", "; ".join(dict.fromkeys(reason for _, reason in result.skipped)), exercised)
    return Run("passed", "", exercised)


@contextmanager
def count_uses(subject: Subject) -> Iterator[Counter]:
    """Count how often a subject's classes are built and run. What a model builds and runs inside it does not count."""
    uses: Counter = Counter()
    counted_methods = [
        (subject.config_class, "__init__", "config built"),
        (subject.model_class, "__init__", "model built"),
        (subject.model_class, "forward", "model run"),
        (subject.classifier_class, "__init__", "classifier built"),
        (subject.classifier_class, "forward", "classifier run"),
        (subject.image_processor_class, "__init__", "image processor built"),
        (subject.image_processor_class, "__call__", "image processor run"),
    ]
    inside = 0

    def counting(method: Callable, use: str) -> Callable:
        @functools.wraps(method)
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            uses[use] += not inside
            inside += 1
            try:
                return method(self, *args, **kwargs)
            finally:
                inside -= 1

        return counted

    with ExitStack() as stack:
        for owner, name, use in counted_methods:
            stack.enter_context(patch.object(owner, name, counting(getattr(owner, name), use)))
        yield uses


def listed(table: dict[str, str], test: str) -> str | None:
    """The reason that a table gives for a test, by its name `suite::test_name` or a pattern of it."""
    return next((reason for pattern, reason in table.items() if fnmatchcase(test, pattern)), None)


def judge(
    test: str,
    ours: Run,
    run_control: Callable[[], Run],
    *,
    skips: dict[str, str],
    not_exercised: dict[str, str],
    must_run: dict[str, str],
) -> Verdict:
    """Whether our classes pass a test that is meant for them.

    Args:
        test: Its name, `suite::test_name`.
        ours: What became of it with our classes.
        run_control: Runs it with transformers' own ViT.
        skips: Tests that ours are not to pass, each with its reason.
        not_exercised: Tests that pass without doing anything with our classes, each with its reason.
        must_run: Tests that may not be skipped, even if the control is, each with its reason.
    """
    reason = listed(skips, test)
    if reason is not None:
        if ours.outcome == "passed":
            return Verdict("failed", f"ours passes, so it need not be listed in SKIPS ({reason})")
        return Verdict("skipped", reason)
    if ours.outcome == "failed":
        return Verdict("failed", ours.message)
    control = run_control()
    if control.outcome == "failed":
        return Verdict("failed", f"the control fails, so it tells nothing about ours:\n{control.message}")
    if ours.outcome == "skipped" and control.outcome == "passed":
        return Verdict("failed", f"ours is skipped ({ours.message}) and the control passes")
    missing = [use for use, count in control.uses.items() if count and not ours.uses[use]]
    if missing:
        return Verdict("failed", f"with the control the test had {', '.join(missing)}; with ours it had not")
    if ours.outcome == "skipped":
        if reason := listed(must_run, test):
            return Verdict("failed", f"{reason}, and both are skipped: {ours.message}")
        return Verdict("skipped", f"for transformers' ViT too: {ours.message}")
    reason = listed(not_exercised, test)
    if reason is None and not any(ours.uses.values()):
        return Verdict("failed", "the test passes without building or running anything of ours")
    if reason is not None and any(ours.uses.values()):
        return Verdict("failed", f"ours is exercised, so it need not be listed in NOT_EXERCISED ({reason})")
    return Verdict("passed")


def names_of_tests(test_cases: dict[str, type[unittest.TestCase]]) -> list[str]:
    """Every test of every suite, as `suite::test_name`."""
    loader = unittest.TestLoader()
    return [f"{suite}::{name}" for suite, case in test_cases.items() for name in loader.getTestCaseNames(case)]


@contextmanager
def entered_in_name_mappings(subjects: Iterable[Subject]) -> Iterator[None]:
    """Enter subjects where transformers' tests look for the names of the classes that they are meant for."""
    models = {subject.model_type: subject.model_class.__name__ for subject in subjects}
    classifiers = {subject.model_type: subject.classifier_class.__name__ for subject in subjects}
    processors = {subject.image_processor_class.__name__: subject.image_processor_class for subject in subjects}
    with (
        patch.dict(modeling_auto.MODEL_MAPPING_NAMES, models),
        patch.dict(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, classifiers),
        patch.multiple(transformers, create=True, **processors),
    ):
        yield


@contextmanager
def tiny_models(suites: Suites, folder: Any, subjects: Iterable[Subject]) -> Iterator[None]:
    """Give the pipeline suite tiny models of a local folder in place of those of the Hub."""
    summary: dict[str, Any] = {}
    for subject in subjects:
        summary |= subject.save_tiny_models(folder)
    with (
        patch.object(suites.pipelines, "TRANSFORMERS_TINY_MODEL_PATH", str(folder)),
        patch.object(suites.pipelines, "tiny_model_summary", summary),
    ):
        yield
