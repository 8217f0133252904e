"""Our classes in transformers' own common test suites, with transformers' own ViT as the control.

Every test that the ViT passes, ours pass, and does with our classes what it does with the ViT's.
"""

import functools
from collections.abc import Iterator

import pytest
import transformers
from packaging.version import Version

from .harness import Run, entered_in_name_mappings, judge, names_of_tests, run_test, tiny_models
from .suites import SuitesUnavailableError, load_suites
from .testers import CONTROL, DART, OURS, build_test_cases

NO_CONVERSION = "our state dicts have had one set of names from the start: no tensor is renamed while loading"
ONE_BACKEND = "our image processor has the torchvision backend only"

# Tests that ours are not to pass, by name or pattern, each with its reason.
SKIPS = {
    "modeling::test_can_load_from_already_mapped_keys": NO_CONVERSION,
    "modeling::test_reverse_loading_mapping": NO_CONVERSION,
    "modeling::test_can_init_all_missing_weights": (
        "a new model's trunk is what its library draws while it is built, not what `_init_weights` draws afterwards"
    ),
    "image_processing::test_backends_equivalence*": ONE_BACKEND,
    "image_processing::test_pil_can_*_without_torchvision": ONE_BACKEND,
    "image_processing::test_save_load_backends*": ONE_BACKEND,
}
NO_ATTENTION = "a Mamba layer has no attention"

# By model type, tests that one of ours is not to pass.
OWN_SKIPS = {
    "dart_vim": {
        "modeling::test_attention_outputs": NO_ATTENTION,
        "modeling::test_can_set_attention_dynamically": NO_ATTENTION,
        "modeling::test_eager_matches_sdpa_inference_*": NO_ATTENTION,
        "modeling::test_sdpa_can_dispatch_non_composite_models": NO_ATTENTION,
    },
    "dart_rmt": {
        "modeling::test_attention_outputs": "it returns no weights of its retention along rows and along columns",
    },
}
if Version(transformers.__version__) < Version("5.21"):
    SKIPS["image_processing::test_call_numpy_4_channels"] = "until 5.21 not for image processors that convert to RGB"
    OWN_SKIPS["dart_rmt"] |= {
        "modeling::test_keep_in_fp32_modules": "until 5.21 it asks for integer buffers in half precision",
    }

NO_TEXT_MODEL = "looks for a generative, text or multimodal model among ours, and there is none"
CLASS_ATTRIBUTES = "reads attributes of our classes and of the tester"

# Tests that pass without building or running a model, image processor or configuration of ours, each with its reason.
NOT_EXERCISED = {
    "modeling::test_config_attn_implementation_setter": "sets attributes of a configuration",
    "modeling::test_generation_tester_mixin_inheritance": NO_TEXT_MODEL,
    "modeling::test_get_*_features_*": NO_TEXT_MODEL,
    "modeling::test_load_with_mismatched_shapes": NO_TEXT_MODEL,
    "modeling::test_model_base_model_prefix": NO_TEXT_MODEL,
    "modeling::test_model_main_input_name": CLASS_ATTRIBUTES,
    "modeling::test_num_layers_is_small": CLASS_ATTRIBUTES,
    "image_processing::test_new_models_require_torchvision_backend": CLASS_ATTRIBUTES,
    "image_processing::test_post_process_test_mixin_inheritance": CLASS_ATTRIBUTES,
}

PICTURES = "what it needs of pictures and tiny models is given to it here"

# Tests that may not be skipped, not even where the control is: whatever keeps them from running is a fault here.
MUST_RUN = {
    "configuration::*": PICTURES,
    "pipelines::test_pipeline_image_classification*": PICTURES,
    "pipelines::test_pipeline_image_feature_extraction*": PICTURES,
    "training::*": PICTURES,
}

try:
    SUITES, UNAVAILABLE = load_suites(), ""
except SuitesUnavailableError as error:
    SUITES, UNAVAILABLE = None, str(error)
SUBJECTS = {subject.model_type: subject for subject in (*OURS, CONTROL)}
TEST_CASES = {name: build_test_cases(subject, SUITES) for name, subject in SUBJECTS.items()} if SUITES else {}
TESTS = [
    (subject.model_type, test)
    for subject in OURS
    for test in names_of_tests(TEST_CASES.get(subject.model_type, {}))
    # The image processor is the same for all.
    if subject is DART or not test.startswith("image_processing::")
]


def test_suites_are_available():
    if UNAVAILABLE:
        pytest.fail(UNAVAILABLE, pytrace=False)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ours in the name mappings and in the list of tiny models, and no way to the Hub."""
    with (
        pytest.MonkeyPatch.context() as patched,
        entered_in_name_mappings(OURS),
        tiny_models(SUITES, tmp_path_factory.mktemp("tiny_models"), [*OURS, CONTROL]),
    ):
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@functools.cache
def run(model_type: str, test: str) -> Run:
    suite, name = test.split("::")
    return run_test(suite, TEST_CASES[model_type][suite](name), SUBJECTS[model_type])


@pytest.mark.parametrize(("model_type", "test"), TESTS)
@pytest.mark.usefixtures("surroundings")
def test_ours_conform(model_type: str, test: str):
    verdict = judge(
        test,
        run(model_type, test),
        lambda: run(CONTROL.model_type, test),
        skips=SKIPS | OWN_SKIPS.get(model_type, {}),
        not_exercised=NOT_EXERCISED,
        must_run=MUST_RUN,
    )
    if verdict.outcome == "skipped":
        pytest.skip(verdict.message)
    if verdict.outcome == "failed":
        pytest.fail(verdict.message, pytrace=False)
