"""Our classes in transformers' own common test suites, with transformers' own ViT as the control."""

import functools
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from . import recorded_tests
from .harness import (
    Exceptions,
    Run,
    judge,
    judge_other_version,
    names_of_tests,
    registered_by_name,
    run_test,
)
from .suites import SuitesUnavailableError, load_suites
from .testers import CONTROL, DART, OURS, Subject, build_test_cases

NO_CONVERSION = "our checkpoints use the names of the model's parameters; no tensor is renamed while loading"
ONE_BACKEND = "our image processor has the torchvision backend only"
RENAMES_NOTHING = {
    "modeling::test_can_load_from_already_mapped_keys": NO_CONVERSION,
    "modeling::test_reverse_loading_mapping": NO_CONVERSION,
}
SKIPS = {
    "modeling::test_can_init_all_missing_weights": (
        "the trunk's library initialises a new trunk when it is built; `_init_weights` leaves it as it is"
    ),
    "image_processing::test_backends_equivalence*": ONE_BACKEND,
    "image_processing::test_pil_can_*_without_torchvision": ONE_BACKEND,
    "image_processing::test_save_load_backends*": ONE_BACKEND,
}
NO_ATTENTION = "a Mamba layer has no attention"
SKIPS_BY_MODEL_TYPE = {
    "dart": RENAMES_NOTHING,
    "dart_vim": {
        **RENAMES_NOTHING,
        "modeling::test_attention_outputs": NO_ATTENTION,
        "modeling::test_can_set_attention_dynamically": NO_ATTENTION,
        "modeling::test_eager_matches_sdpa_inference_*": NO_ATTENTION,
        "modeling::test_multimodal_outputs_are_returned": NO_ATTENTION,
        "modeling::test_sdpa_can_dispatch_non_composite_models": NO_ATTENTION,
    },
    "dart_rmt": {**RENAMES_NOTHING, "modeling::test_attention_outputs": "it returns no attention weights"},
    "dartified": {
        "modeling::test_can_load_ignoring_mismatched_shapes": "the test wants a classifier outside of the original"
    },
}
if Version(transformers.__version__) < Version("5.21"):
    SKIPS["image_processing::test_call_numpy_4_channels"] = "until 5.21 not for image processors that convert to RGB"
    SKIPS_BY_MODEL_TYPE["dart_rmt"] |= {
        "modeling::test_keep_in_fp32_modules": "until 5.21 it expects integer buffers in half precision",
    }

NO_TEXT_MODEL = "the test is for generative, text or multimodal models, and we have none"
CLASS_ATTRIBUTES = "the test reads attributes of classes only"
NOT_EXERCISED = {
    "modeling::test_config_attn_implementation_setter": "the test changes a configuration only",
    "modeling::test_generation_tester_mixin_inheritance": NO_TEXT_MODEL,
    "modeling::test_get_*_features_*": NO_TEXT_MODEL,
    "modeling::test_load_with_mismatched_shapes": NO_TEXT_MODEL,
    "modeling::test_model_base_model_prefix": NO_TEXT_MODEL,
    "modeling::test_model_main_input_name": CLASS_ATTRIBUTES,
    "modeling::test_multimodal_outputs_are_returned": NO_TEXT_MODEL,
    "modeling::test_num_layers_is_small": CLASS_ATTRIBUTES,
    "image_processing::test_new_models_require_torchvision_backend": CLASS_ATTRIBUTES,
    "image_processing::test_post_process_test_mixin_inheritance": CLASS_ATTRIBUTES,
}

INPUTS_ARE_HERE = "the harness has the inputs that the test needs"
MUST_RUN = {
    "configuration::*": INPUTS_ARE_HERE,
    "training::*": INPUTS_ARE_HERE,
}

# The quick suite runs these for one encoder only.
SLOW = ("training::*", "modeling::test_bc_torch_dtype", "modeling::test_eager_matches_sdpa_inference_*")

IS_RECORDED_VERSION = transformers.__version__ == recorded_tests.VERSION
SUBJECTS = {subject.model_type: subject for subject in (*OURS, CONTROL)}
try:
    SUITES = load_suites()
    TEST_CASES = {name: build_test_cases(subject, SUITES) for name, subject in SUBJECTS.items()}
    UNAVAILABLE = ""
except (SuitesUnavailableError, AttributeError) as error:
    SUITES, TEST_CASES, UNAVAILABLE = None, {}, str(error)


def names_for(subject: Subject) -> list[str]:
    names = names_of_tests(TEST_CASES.get(subject.model_type, {}))
    # All encoders have the same image processor.
    return [name for name in names if subject is DART or not name.startswith("image_processing::")]


def parameters(subject: Subject, test: str):
    is_slow = subject is not DART and any(fnmatchcase(test, pattern) for pattern in SLOW)
    return pytest.param(subject.model_type, test, marks=[pytest.mark.slow] if is_slow else [])


def test_suites_are_available(record_property: Callable):
    if UNAVAILABLE and not IS_RECORDED_VERSION:
        record_property("note", f"transformers' common tests did not run: {UNAVAILABLE}")
        pytest.skip(UNAVAILABLE)
    if UNAVAILABLE:
        pytest.fail(UNAVAILABLE, pytrace=False)


@pytest.mark.skipif(not IS_RECORDED_VERSION, reason="another transformers version is installed")
def test_recorded_tests_are_the_suites_tests():
    constraints = Path(__file__).parents[2].joinpath("constraints.txt").read_text().splitlines()
    assert f"transformers=={recorded_tests.VERSION}" in constraints
    assert names_for(DART) == recorded_tests.NAMES, recorded_tests.__doc__


@pytest.fixture(scope="module")
def surroundings() -> Iterator[None]:
    """Our classes in transformers' mappings, and no Hub."""
    with pytest.MonkeyPatch.context() as patched, registered_by_name(OURS):
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@functools.cache
def run(model_type: str, test: str) -> Run:
    suite, name = test.split("::")
    return run_test(suite, TEST_CASES[model_type][suite](name), SUBJECTS[model_type])


@pytest.mark.parametrize(
    ("model_type", "test"), [parameters(subject, test) for subject in OURS for test in names_for(subject)]
)
@pytest.mark.usefixtures("surroundings")
def test_our_classes_conform(model_type: str, test: str, record_property: Callable):
    exceptions = Exceptions(SKIPS | SKIPS_BY_MODEL_TYPE.get(model_type, {}), NOT_EXERCISED, MUST_RUN)
    ours, run_control = run(model_type, test), functools.partial(run, CONTROL.model_type, test)
    verdict = (judge if IS_RECORDED_VERSION else judge_other_version)(test, ours, run_control, exceptions)
    if test not in recorded_tests.NAMES:
        note = f"new in transformers {transformers.__version__}: {test} ({model_type}: {verdict.outcome})"
        record_property("note", note)
    if verdict.outcome == "skipped":
        pytest.skip(verdict.message)
    if verdict.outcome == "failed":
        pytest.fail(verdict.message, pytrace=False)
