"""Run one test of transformers' suites with one architecture's classes, count what it used, and judge the result."""

import functools
import random
import unittest
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto

from .testers import Subject

# A test exercises a subject if it builds or runs one of these.
MODEL_USES = ("model built", "model run", "classifier built", "classifier run")
USES = {
    "modeling": MODEL_USES,
    "training": MODEL_USES,
    "configuration": ("config built",),
    "image_processing": ("image processor built", "image processor run"),
}

Outcome = Literal["passed", "skipped", "failed"]


@dataclass(frozen=True)
class Run:
    """The result of one test: outcome, reason or traceback, and how often the test built or ran which class."""

    outcome: Outcome
    message: str = ""
    uses: dict[str, int] = field(default_factory=dict)

    @property
    def exercises_subject(self) -> bool:
        return any(self.uses.values())


class Verdict(NamedTuple):
    outcome: Outcome
    message: str = ""


@dataclass(frozen=True)
class Exceptions:
    """Tests that are judged differently. Each table maps a test's name, or a pattern of it, to the reason.

    Args:
        skips: Our classes need not pass these.
        not_exercised: These pass without building or running a class of ours.
        must_run: These may not be skipped, even if the control skips them.
    """

    skips: dict[str, str] = field(default_factory=dict)
    not_exercised: dict[str, str] = field(default_factory=dict)
    must_run: dict[str, str] = field(default_factory=dict)


def run_test(suite: str, test_case: unittest.TestCase, subject: Subject) -> Run:
    """Run one test method with fixed random seeds."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    result = unittest.TestResult()
    with count_uses(subject) as counts:
        unittest.TestSuite([test_case]).run(result)
    uses = {use: counts[use] for use in USES[suite]}
    if problems := result.failures + result.errors:
        return Run("failed", "\n".join(traceback for _, traceback in problems), uses)
    if result.skipped:
        return Run("skipped", "; ".join(dict.fromkeys(reason for _, reason in result.skipped)), uses)
    return Run("passed", "", uses)


@contextmanager
def count_uses(subject: Subject) -> Iterator[Counter]:
    """Count how often a test builds and runs a subject's classes. Calls from inside these classes do not count."""
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
    depth = 0

    def counting(method: Callable, use: str) -> Callable:
        @functools.wraps(method)
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            uses[use] += depth == 0
            depth += 1
            try:
                return method(self, *args, **kwargs)
            finally:
                depth -= 1

        return counted

    with ExitStack() as stack:
        for owner, name, use in counted_methods:
            stack.enter_context(patch.object(owner, name, counting(getattr(owner, name), use)))
        yield uses


def reason_for(test: str, table: dict[str, str]) -> str | None:
    return next((reason for pattern, reason in table.items() if fnmatchcase(test, pattern)), None)


def judge(test: str, ours: Run, run_control: Callable[[], Run], exceptions: Exceptions) -> Verdict:
    """Judge a test of the recorded transformers version.

    Our classes pass if the test passes and builds and runs our classes wherever it builds and runs the control's.
    Every exception must be listed, and every listed exception must be needed.

    Args:
        test: `suite::test_name`.
        ours: The result with our classes.
        run_control: Runs the test with transformers' own ViT.
    """
    if reason := reason_for(test, exceptions.skips):
        if ours.outcome == "passed":
            return Verdict("failed", f"our classes pass; remove the test from SKIPS ({reason})")
        return Verdict("skipped", reason)
    if ours.outcome == "failed":
        return Verdict("failed", ours.message)
    control = run_control()
    if control.outcome == "failed":
        return Verdict("failed", f"the control fails, so the test says nothing about our classes:\n{control.message}")
    if ours.outcome == "skipped" and control.outcome == "passed":
        return Verdict("failed", f"the control passes, but our classes are skipped: {ours.message}")
    if missing := [use for use, count in control.uses.items() if count and not ours.uses[use]]:
        return Verdict("failed", f"with the control the test had {', '.join(missing)}; with our classes it had not")
    if ours.outcome == "skipped":
        if reason := reason_for(test, exceptions.must_run):
            return Verdict("failed", f"{reason}, but the test is skipped: {ours.message}")
        return Verdict("skipped", f"transformers' ViT is skipped too: {ours.message}")
    reason = reason_for(test, exceptions.not_exercised)
    if reason is None and not ours.exercises_subject:
        return Verdict("failed", "the test passes without building or running a class of ours")
    if reason is not None and ours.exercises_subject:
        return Verdict("failed", f"the test uses our classes; remove it from NOT_EXERCISED ({reason})")
    return Verdict("passed")


def judge_other_version(test: str, ours: Run, run_control: Callable[[], Run], exceptions: Exceptions) -> Verdict:
    """Judge a test of another transformers version: it fails only if it uses a class of ours and that class fails."""
    if ours.outcome == "passed":
        return Verdict("passed")
    if reason := reason_for(test, exceptions.skips):
        return Verdict("skipped", reason)
    if ours.outcome == "skipped":
        return Verdict("skipped", ours.message)
    if not ours.exercises_subject:
        return Verdict("skipped", f"the test fails without building or running a class of ours:\n{ours.message}")
    if run_control().outcome == "failed":
        return Verdict("skipped", f"the test fails with transformers' ViT too:\n{ours.message}")
    return Verdict("failed", ours.message)


def names_of_tests(test_cases: dict[str, type[unittest.TestCase]]) -> list[str]:
    """The tests of all suites, as `suite::test_name`."""
    loader = unittest.TestLoader()
    return [f"{suite}::{name}" for suite, case in test_cases.items() for name in loader.getTestCaseNames(case)]


@contextmanager
def registered_by_name(subjects: Iterable[Subject]) -> Iterator[None]:
    """Add the subjects to the mappings in which transformers' tests look up class names."""
    models = {subject.model_type: subject.model_class.__name__ for subject in subjects}
    classifiers = {subject.model_type: subject.classifier_class.__name__ for subject in subjects}
    processors = {subject.image_processor_class.__name__: subject.image_processor_class for subject in subjects}
    with (
        patch.dict(modeling_auto.MODEL_MAPPING_NAMES, models),
        patch.dict(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, classifiers),
        patch.multiple(transformers, create=True, **processors),
    ):
        yield
