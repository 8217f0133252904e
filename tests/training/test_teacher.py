"""Teachers read images through their own preprocessing."""

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_training import tiny_dart, tiny_processor
from PIL import Image
from timm.models import save_for_hf
from torch import nn
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from dart_hf.training import Teacher

SIDE = 32
NAMES = ["ant", "bee", "cat"]


def tiny_vit(model_class=ViTForImageClassification):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    return model_class(ViTConfig(**sizes, image_size=SIDE, patch_size=16, **names))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of a teacher of transformers."""
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit().save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dart(tmp_path_factory):
    """The folder of a teacher that is a DART model."""
    folder = tmp_path_factory.mktemp("dart")
    tiny_dart().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """The folder of a teacher that timm saved."""
    folder = tmp_path_factory.mktemp("timm")
    overlay = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model = timm.create_model("test_vit", num_classes=len(NAMES), img_size=SIDE, pretrained_cfg_overlay=overlay)
    save_for_hf(model, folder, model_config={"label_names": NAMES, "model_args": {"img_size": SIDE}})
    return folder


def picture(side):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tensor(image):
    """A PIL image -> what a training gives a teacher: (1, 3, H, W) from 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


class Recorder(nn.Module):
    """A classifier that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, pixel_values):
        self.pixel_values = pixel_values
        return pixel_values.mean(dim=(2, 3)) * self.weight


def pixels_of_model(teacher, image):
    """The pixel values that the teacher's model reads."""
    teacher.model = Recorder()
    teacher(as_tensor(image))
    return teacher.model.pixel_values


@pytest.mark.parametrize(("kind", "side"), [("vit", SIDE), ("dart", 24)])
def test_teacher_reads_what_its_own_processor_makes(kind, side, request):
    folder = request.getfixturevalue(kind)
    expected = AutoImageProcessor.from_pretrained(folder)(picture(side), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels_of_model(Teacher.load(folder), picture(side)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_timm_teacher_reads_what_timm_makes(timm_folder, prefix):
    model = timm.create_model(f"local-dir:{timm_folder}", pretrained=True)
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(picture(SIDE))[None]
    teacher = Teacher.load(f"{prefix}{timm_folder}")
    assert not teacher.model.training
    assert teacher(torch.rand(2, 3, SIDE, SIDE)).shape == (2, len(NAMES))
    torch.testing.assert_close(pixels_of_model(teacher, picture(SIDE)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "processor",
    [
        # Channels in another order, no normalisation.
        MobileViTImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        # Normalised twice.
        EfficientNetImageProcessor(size={"height": SIDE, "width": SIDE}, include_top=True),
        ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=1.0),
        # Takes images of any size.
        ViTImageProcessor(do_resize=False),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_peculiar_processors(processor):
    def preprocess(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    actual = pixels_of_model(Teacher(Recorder(), preprocess, NAMES), picture(SIDE))
    torch.testing.assert_close(actual[0], preprocess(picture(SIDE)), atol=1e-5, rtol=0)


def test_images_are_resized_to_the_size_of_the_teacher():
    processor = ViTImageProcessor(size={"height": 48, "width": 24}, resample=Image.Resampling.BICUBIC)

    def preprocess(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    smooth = picture(4).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    actual = pixels_of_model(Teacher(Recorder(), preprocess, NAMES), smooth)
    assert actual.shape == (1, 3, 48, 24)
    # The processor rounds to 8 bits and clips.
    torch.testing.assert_close(actual[0], preprocess(smooth), atol=0.02, rtol=0)


def test_teacher_is_frozen_and_has_the_given_precision(vit):
    teacher = Teacher.load(vit, dtype=torch.bfloat16)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    images = torch.rand(2, 3, SIDE, SIDE)
    assert teacher(images).dtype == torch.float32
    torch.testing.assert_close(teacher(images), Teacher.load(vit)(images), atol=0.2, rtol=0)


def test_unusable_teachers(tmp_path):
    with pytest.raises(ValueError, match=r"teacher='timm/no_such' cannot be used: Unknown model \(no_such\)"):
        Teacher.load("timm/no_such")
    for source in ("timm/test_vit", tmp_path / "nothing"):
        with pytest.raises(OSError, match=f"teacher='{source}' cannot be loaded: "):
            Teacher.load(source)
    tiny_vit(model_class=ViTModel).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"lacks weights \(classifier.bias, classifier.weight\)"):
        Teacher.load(tmp_path / "headless")
