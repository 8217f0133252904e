"""Put our classes, and transformers' own ViT as the control, into transformers' suites with the same code."""

import copy
import functools
import unittest
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from helpers.tiny_models import ENCODERS
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.testing_utils import torch_device

from dart_hf import (
    DartConfig,
    DartForImageClassification,
    DartifiedConfig,
    DartifiedForImageClassification,
    DartifiedModel,
    DartImageProcessor,
    DartModel,
    DartRmtConfig,
    DartRmtForImageClassification,
    DartRmtModel,
    DartVimConfig,
    DartVimForImageClassification,
    DartVimModel,
)

IMAGE_SIZE = 32


@dataclass(frozen=True)
class Subject:
    """One architecture's classes.

    Args:
        image_processors: Image processor class of each backend. The first one is in checkpoints.
        settings: A configuration that is small enough for the suites.
        num_layers: The number of layers, or stages, that return hidden states.
        hidden_state_sizes: The last two sizes of the first hidden state: tokens and channels, or height and width.
        has_attention: The implementation of attention can be chosen.
        returns_attentions: The model returns attention weights.
        batching_tolerance: Allowed float32 difference between an image alone and the image in a batch.
    """

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    classifier_class: type[PreTrainedModel]
    image_processors: dict[str, type]
    settings: dict[str, Any]
    num_layers: int
    hidden_state_sizes: tuple[int, int]
    has_attention: bool = True
    returns_attentions: bool = True
    batching_tolerance: float = 1e-5

    @property
    def model_type(self) -> str:
        return self.config_class.model_type

    @property
    def model_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return self.model_class, self.classifier_class

    @property
    def image_processor_class(self) -> type:
        return next(iter(self.image_processors.values()))

    def config(self) -> PreTrainedConfig:
        return self.config_class(**self.settings)


SHARED = {"image_size": IMAGE_SIZE, "num_labels": 3}
TRANSFORMER = {"num_attention_heads": 4, "intermediate_size": 37}
TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "patch_size": 8}
REGIONS = {"num_patches": 10, "score_grid_size": 4, "scorer": "conv"}


def our_subject(*classes: type, settings: dict[str, Any], **others: Any) -> Subject:
    return Subject(
        *classes,
        image_processors={"torchvision": DartImageProcessor},
        settings={**SHARED, **REGIONS, **settings},
        num_layers=2,
        # Rounding in the scores moves region edges, and so the patches of a noise image: by up to 5e-5 in 60 trials.
        batching_tolerance=5e-4,
        **others,
    )


DART = our_subject(
    DartConfig,
    DartModel,
    DartForImageClassification,
    settings={**TRANSFORMER, **TOKENS},
    hidden_state_sizes=(11, 32),
)
DART_VIM = our_subject(
    DartVimConfig,
    DartVimModel,
    DartVimForImageClassification,
    settings={**TOKENS, "state_size": 4},
    hidden_state_sizes=(11, 32),
    has_attention=False,
    returns_attentions=False,
)
DART_RMT = our_subject(
    DartRmtConfig,
    DartRmtModel,
    DartRmtForImageClassification,
    settings={**ENCODERS["dart_rmt"], "patch_size": 8, "num_patches": 16},
    hidden_state_sizes=(8, 8),
    returns_attentions=False,
)
DARTIFIED = our_subject(
    DartifiedConfig,
    DartifiedModel,
    DartifiedForImageClassification,
    settings={
        "patch_size": 8,
        "encoder_class": "ViTForImageClassification",
        "encoder_config": ViTConfig(**TOKENS, **TRANSFORMER, **SHARED).to_dict(),
    },
    hidden_state_sizes=(11, 32),
)
OURS = (DART, DART_VIM, DART_RMT, DARTIFIED)
CONTROL = Subject(
    ViTConfig,
    ViTModel,
    ViTForImageClassification,
    image_processors={"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil},
    settings={**SHARED, **TRANSFORMER, **TOKENS},
    num_layers=2,
    hidden_state_sizes=(17, 32),
)


def image_processor_settings(subject: Subject) -> dict[str, Any]:
    """Settings with which any of the image processors returns images of `IMAGE_SIZE` pixels."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    shared = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "do_resize": True, "do_normalize": True}
    if getattr(subject.image_processor_class, "do_center_crop", None):
        return {**shared, "size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": side}
    return {**shared, "size": side}


class ModelTester:
    """Settings and inputs for the modeling and training suites. The suites prescribe the names."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.batch_size = 5
        self.is_training = True
        self.sequence_classification_class = subject.classifier_class
        for name, value in {**TRANSFORMER, **subject.settings}.items():
            setattr(self, name, value)
        # The suites compare hidden states with these sizes, also if the hidden states are maps.
        self.num_hidden_layers = subject.num_layers
        self.seq_length, self.hidden_size = subject.hidden_state_sizes
        # For masked image modeling: the ViT's forward has an argument for it.
        self.num_masks = 3
        self.mask_length = self.seq_length - 1

    def get_config(self) -> PreTrainedConfig:
        return self.subject.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        pixel_values = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=torch_device)
        return self.get_config(), {"pixel_values": pixel_values}


class ImageProcessorTester:
    """Settings and inputs for the image processing suite. The suite prescribes the names."""

    batch_size = 5
    num_channels = 3

    def __init__(self, subject: Subject, suites: SimpleNamespace) -> None:
        self.prepare_image_processor_dict = functools.partial(image_processor_settings, subject)
        self.suites = suites

    def prepare_image_inputs(self, **overrides: Any) -> list[Any]:
        settings = {"batch_size": self.batch_size, "num_channels": self.num_channels}
        settings |= {"min_resolution": 30, "max_resolution": 100, **overrides}
        return self.suites.image_processing.prepare_image_inputs(**settings)

    def prepare_processor_inputs(self, **overrides: Any) -> dict[str, Any]:
        return {"images": self.prepare_image_inputs(**overrides)}

    def expected_output_image_shape(self, images: list[Any]) -> tuple[int, int, int]:
        return self.num_channels, IMAGE_SIZE, IMAGE_SIZE


def build_test_cases(subject: Subject, suites: SimpleNamespace) -> dict[str, type[unittest.TestCase]]:
    """For each suite, a test case of transformers' tests with a subject's classes."""
    modeling, training = suites.modeling, suites.training

    class ModelingTest(modeling.ModelTesterMixin, unittest.TestCase):
        all_model_classes = subject.model_classes
        has_attentions = subject.has_attention
        # Vision transformers have no vocabulary to resize.
        test_resize_embeddings = False
        # Without this, the date of the configuration's file decides whether the test runs.
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self) -> None:
            self.model_tester = ModelTester(subject)

        def test_batching_equivalence(self) -> None:
            super().test_batching_equivalence(atol=subject.batching_tolerance, rtol=subject.batching_tolerance)

        def test_can_load_ignoring_mismatched_shapes(self) -> None:
            def zero_init(config: PreTrainedConfig) -> PreTrainedConfig:
                """Replaces transformers', which expects every setting with `layer_scale` in its name to be a number."""
                config = copy.deepcopy(config)
                config.initializer_range = 1e-10
                return config

            with patch.object(modeling, "_config_zero_init", zero_init):
                super().test_can_load_ignoring_mismatched_shapes()

        def test_retain_grad_hidden_states_attentions(self) -> None:
            self.has_attentions = subject.returns_attentions
            super().test_retain_grad_hidden_states_attentions()

        def test_model_get_set_embeddings(self) -> None:
            """Replaces transformers' test, which expects the `nn.Embedding` of a vocabulary."""
            for model_class in self.all_model_classes:
                model = model_class(self.model_tester.get_config())
                self.assertIsInstance(model.get_input_embeddings(), nn.Module)
                output = model.get_output_embeddings()
                self.assertTrue(output is None or isinstance(output, nn.Linear))

    class TrainingTest(training.TrainingTesterMixin, unittest.TestCase):
        """The suite makes batches of text only. Here its two methods for text make a batch of images."""

        all_model_classes = subject.model_classes
        model_tester = None

        def setUp(self) -> None:
            self.model_tester = ModelTester(subject)
            # The suite reads `vocab_size` and passes it to the method below.
            config = self.model_tester.get_config()
            config.vocab_size = None
            self.model_tester.get_config = lambda: config

        def _get_model_modality(self) -> str:
            return "text"

        def _create_text_training_batch(self, batch_size: int, **others: Any) -> dict[str, torch.Tensor]:
            pixel_values = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
            return {"pixel_values": pixel_values, "labels": torch.arange(batch_size) % subject.settings["num_labels"]}

    class ConfigurationTest(unittest.TestCase):
        def test_config(self) -> None:
            # The configuration computes or completes these.
            nested = ("num_labels", "encoder_config")
            settings = {name: value for name, value in subject.settings.items() if name not in nested}
            tester = suites.configuration.ConfigTester(
                self,
                config_class=subject.config_class,
                has_text_modality=False,
                common_properties=list(settings),
                **settings,
            )
            self.model_tester = ModelTester(subject)
            tester.run_common_tests()

    class ImageProcessingTest(suites.image_processing.ImageProcessingTestMixin, unittest.TestCase):
        test_cast_dtype = True
        image_processing_classes = subject.image_processors

        def setUp(self) -> None:
            self.image_processor_tester = ImageProcessorTester(subject, suites)

        @property
        def image_processor_dict(self) -> dict[str, Any]:
            return self.image_processor_tester.prepare_image_processor_dict()

    return {
        "modeling": ModelingTest,
        "training": TrainingTest,
        "configuration": ConfigurationTest,
        "image_processing": ImageProcessingTest,
    }
