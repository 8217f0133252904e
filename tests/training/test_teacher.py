"""Teachers read images through their own preprocessing."""

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_training import SIDE, tiny_dart, tiny_processor
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

NAMES = ["ant", "bee", "cat"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
IMAGES = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind of teacher -> its folder."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("vit", "dart", "timm")}
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=SIDE, patch_size=8, **names))
    vit.save_pretrained(folders["vit"])
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folders["vit"])
    tiny_dart().save_pretrained(folders["dart"])
    tiny_processor().save_pretrained(folders["dart"])
    overlay = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    size = {"img_size": SIDE, "patch_size": 8}
    model = timm.create_model("test_vit", num_classes=len(NAMES), pretrained_cfg_overlay=overlay, **size)
    save_for_hf(model, folders["timm"], model_config={"label_names": NAMES, "model_args": size})
    return folders


class Recorder(nn.Module):
    """A classifier that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, pixel_values):
        self.pixel_values = pixel_values
        return pixel_values.mean(dim=(2, 3)) * self.weight


def pixels_of_model(teacher, image):
    """The pixel values that the teacher's model reads for a PIL image."""
    teacher.model = Recorder()
    teacher(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    return teacher.model.pixel_values[0]


def preprocess_with(processor):
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("kind", ["vit", "dart", "timm"])
def test_teacher_reads_what_its_own_processor_makes(kind, folders):
    if kind == "timm":
        model = timm.create_model(f"local-dir:{folders[kind]}", pretrained=True)
        preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        teacher = Teacher.load(f"local-dir:{folders[kind]}")
        assert torch.equal(teacher(IMAGES), Teacher.load(folders[kind])(IMAGES))
    else:
        preprocess = preprocess_with(AutoImageProcessor.from_pretrained(folders[kind]))
        teacher = Teacher.load(folders[kind])
    assert not teacher.model.training and teacher(IMAGES).shape == (2, len(NAMES))
    torch.testing.assert_close(pixels_of_model(teacher, PICTURE), preprocess(PICTURE), atol=1e-5, rtol=0)


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
def test_colours_of_peculiar_processors(processor):
    preprocess = preprocess_with(processor)
    found = pixels_of_model(Teacher(Recorder(), preprocess, NAMES), PICTURE)
    torch.testing.assert_close(found, preprocess(PICTURE), atol=1e-5, rtol=0)


def test_images_are_resized_to_the_size_of_the_teacher():
    processor = ViTImageProcessor(size={"height": 48, "width": 32}, resample=Image.Resampling.BICUBIC)
    smooth = PICTURE.resize((4, 4)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    found = pixels_of_model(Teacher(Recorder(), preprocess_with(processor), NAMES), smooth)
    assert found.shape == (3, 48, 32)
    # The processor rounds to 8 bits and clips.
    torch.testing.assert_close(found, preprocess_with(processor)(smooth), atol=0.02, rtol=0)


def test_teacher_is_frozen_and_has_the_given_precision(folders):
    teacher = Teacher.load(folders["vit"], dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert teacher(IMAGES).dtype == torch.float32
    torch.testing.assert_close(teacher(IMAGES), Teacher.load(folders["vit"])(IMAGES), atol=0.2, rtol=0)


def test_unusable_teachers_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"teacher='timm/no_such' cannot be used: Unknown model \(no_such\)"):
        Teacher.load("timm/no_such")
    for source in ("timm/test_vit", tmp_path / "nothing"):
        with pytest.raises(OSError, match=f"teacher='{source}' cannot be loaded: "):
            Teacher.load(source)
    ViTModel.from_pretrained(folders["vit"]).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"lacks weights \(classifier.bias, classifier.weight\)"):
        Teacher.load(tmp_path / "headless")
