"""The image processor: the published transform, the same pixels for every kind of input, errors for bad images."""

import base64
import functools
import threading
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torchvision import transforms
from transformers.image_utils import load_image

from dart_hf import DartImageProcessor
from dart_hf.data.collator import ImageClassificationCollator
from dart_hf.data.image_augmentation import training_transform

MEAN = torch.tensor(DartImageProcessor.image_mean)[:, None, None]
STD = torch.tensor(DartImageProcessor.image_std)[:, None, None]

published = transforms.Compose(
    [
        transforms.Resize(512, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(448),
        transforms.ToTensor(),
    ]
)


@pytest.fixture(scope="module")
def coffee() -> np.ndarray:
    return data.coffee()  # 400 high, 600 wide, RGB


@pytest.fixture
def processor() -> DartImageProcessor:
    return DartImageProcessor()


def pixels(processor: DartImageProcessor, image, **settings) -> torch.Tensor:
    return processor(image, return_tensors="pt", **settings).pixel_values[0]


def levels(pixel_values: torch.Tensor) -> torch.Tensor:
    """pixel_values back in 0…255."""
    return (pixel_values * STD + MEAN) * 255


@pytest.mark.parametrize("image", ["astronaut", "coffee", "retina", (1, 1), (3, 2), (2, 500), (500, 2)], ids=str)
def test_the_default_is_the_published_transform(processor, coffee, image):
    resized = isinstance(image, tuple)
    image = Image.fromarray(coffee).resize(image) if resized else Image.fromarray(getattr(data, image)())
    difference = (levels(pixels(processor, image)) - 255 * published(image)).abs()
    # Torchvision rounds the weights of resizing differently for 8-bit tensors and for PIL images.
    assert difference.max() < 2.01
    assert resized or difference.mean() < 0.01


def test_every_kind_of_input_gives_the_same_pixels(processor, coffee, tmp_path):
    path = tmp_path / "coffee.png"
    Image.fromarray(coffee).save(path)
    first = np.ascontiguousarray(coffee.transpose(2, 0, 1))
    expected = pixels(processor, Image.fromarray(coffee))
    for image in [
        coffee,
        first,
        coffee[::-1][::-1],
        coffee.astype(np.int64),
        torch.from_numpy(coffee),
        torch.from_numpy(first),
        coffee[None],
        [[path]],
        str(path),
        Image.open(path),
    ]:
        assert torch.equal(pixels(processor, image), expected)


def test_a_read_only_array_gives_no_warning(processor, coffee):
    read_only = coffee.copy()
    read_only.flags.writeable = False
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(action="error"):
            assert torch.equal(pixels(processor, read_only), pixels(processor, coffee))
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize("grouping", [None, False])
def test_an_image_does_not_depend_on_its_batch(processor, coffee, grouping):
    grey = coffee[:300, :300, 0]
    images = [coffee, Image.fromarray(grey), grey.astype(np.uint16) * 257 + 3, coffee.astype(np.float32)]
    batch = processor(images, return_tensors="pt", disable_grouping=grouping).pixel_values
    for alone, together in zip(images, batch, strict=True):
        torch.testing.assert_close(pixels(processor, alone), together, rtol=0, atol=1e-5)
    assert batch.shape == (4, 3, 448, 448)
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(processor, coffee, mode):
    image = Image.fromarray(coffee).convert("P" if mode == "PA" else mode).convert(mode)
    assert torch.equal(pixels(processor, image), pixels(processor, image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "settings"),
    [
        (np.full((40, 40, 4), [60, 60, 60, 51], dtype=np.uint8), {}),
        (np.full((40, 40, 2), [60, 51], dtype=np.uint8), {}),
        (np.full((40, 40, 4), [60 * 257] * 3 + [0], dtype=np.uint16), {}),
        (np.full((4, 40, 40), 60 / 255), {"do_rescale": False}),
    ],
)
def test_transparency_of_arrays_is_dropped(processor, image, settings):
    expected = torch.full((3, 448, 448), 60.0)
    torch.testing.assert_close(levels(pixels(processor, image, **settings)), expected, rtol=0, atol=1e-3)


def test_16_bit_arrays_are_scaled_by_65535_or_the_given_factor(processor, coffee):
    sixteen = coffee[..., 0].astype(np.uint16) * 257
    expected = pixels(processor, coffee[..., 0].astype(np.float32))
    for image in [sixteen, sixteen.astype(">u2"), torch.from_numpy(sixteen)]:
        torch.testing.assert_close(pixels(processor, image), expected, rtol=0, atol=1e-5)
    dark, less_dark = (pixels(processor, np.full((32, 32), value, np.uint16)) for value in (1000, 1001))
    torch.testing.assert_close((less_dark - dark) * STD, torch.full((3, 448, 448), 1 / 65535), rtol=0.01, atol=0)
    white = levels(pixels(processor, np.full((32, 32), 4095, np.uint16), rescale_factor=1 / 4095))
    torch.testing.assert_close(white, torch.full((3, 448, 448), 255.0))


@pytest.mark.parametrize(("white", "settings"), [(255.0, {}), (1.0, {"do_rescale": False})])
def test_floating_point_arrays_agree_with_8_bits_and_stay_in_range(processor, coffee, white, settings):
    difference = levels(pixels(processor, coffee * (white / 255), **settings)) - levels(pixels(processor, coffee))
    # Eight bits are rounded, and clipped between the two passes of the resizing.
    assert difference.abs().mean() < 0.5 and difference.abs().max() < 15
    checkers = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((8, 8))) * white
    result = levels(pixels(processor, checkers, **settings))
    assert result.min() > -0.01 and result.max() < 255.01


def test_a_very_thin_image_is_not_resized_as_a_whole(processor):
    # That would take 512 × 170,666,666 pixels.
    assert pixels(processor, np.zeros((3, 1_000_000, 3), np.uint8)).shape == (3, 448, 448)


@pytest.mark.parametrize(
    ("shape", "channels"), [((1, 1, 3), 2), ((3, 1, 1), 0), ((1, 4, 3), 2), ((4, 4, 3), 2), ((3, 4, 4), 0)]
)
def test_an_ambiguous_shape_is_read_as_three_channels(processor, shape, channels):
    image = np.zeros(shape, np.uint8)
    np.moveaxis(image, channels, -1)[:] = [10, 20, 30]
    torch.testing.assert_close(levels(pixels(processor, image)).mean(dim=(1, 2)), torch.tensor([10.0, 20.0, 30.0]))


def test_arguments_decide_about_the_channels(processor):
    image = np.array([[[10, 20, 30]]], np.uint8)
    assert torch.unique(pixels(processor, image)).numel() == 3
    grey = levels(pixels(processor, image, input_data_format="channels_first"))
    torch.testing.assert_close(grey[0], grey[2], rtol=0, atol=1e-3)
    settings = {"do_convert_rgb": False, "image_mean": [0.0] * 4, "image_std": [1.0] * 4}
    assert pixels(processor, np.zeros((20, 20, 4), np.uint8), **settings).shape == (4, 448, 448)
    assert pixels(processor, Image.new("RGBA", (20, 20)), **settings).shape == (4, 448, 448)


def with_pixel(value: float) -> np.ndarray:
    image = np.full((8, 8, 3), 100.0)
    image[3, 4, 1] = value
    return image


@pytest.mark.parametrize(
    ("image", "settings", "sentence"),
    [
        (with_pixel(np.nan), {}, "NaN or infinite"),
        (torch.from_numpy(with_pixel(np.inf)), {}, "NaN or infinite"),
        (np.zeros((0, 9, 3), np.uint8), {}, "no pixels"),
        (Image.new("RGB", (0, 5)), {}, "no pixels"),
        (np.zeros((9, 9, 5), np.uint8), {}, r"1 \(grey\).*got an array of shape \(9, 9, 5\)"),
        (np.zeros((3, 9, 9), np.uint8), {"input_data_format": "channels_last"}, r"got an array of shape \(3, 9, 9\)"),
        (np.zeros(9, np.uint8), {}, r"2 or 3 dimensions.*got \(9,\)"),
        (np.zeros((9, 9), np.complex64), {}, "numbers, got dtype complex64"),
        (None, {}, "got NoneType"),
        ([[1, 2], [3, 4]], {}, "got int"),
        ([], {}, "images is empty"),
        (np.full((9, 9, 3), 0.5), {}, "do_rescale=False"),
        (with_pixel(300), {}, "from 0 to 255, got 100 to 300"),
        (with_pixel(-2), {"do_rescale": False}, "from 0 to 1, got -2 to 100"),
        (np.full((9, 9), 256, np.int32), {}, "from 0 to 255, got 256 to 256"),
        (np.full((9, 9), 256, np.uint16), {"do_rescale": False}, "from 0 to 1, got 256"),
        (np.zeros((9, 9), np.uint8), {"crop_size": {"shortest_edge": 8}}, "crop_size must have a height and a width"),
    ],
)
def test_bad_images_are_refused_in_one_line(processor, image, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        processor(image, return_tensors="pt", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "given"),
    [(96, "96"), ({"height": 448, "width": 96}, "448 × 96"), ({"height": 96, "width": 448}, "96 × 448")],
)
def test_a_size_below_the_crop_is_refused(coffee, size, given):
    with pytest.raises(ValueError, match=f"size \\({given}\\) is smaller than crop_size \\(448 × 448\\)"):
        DartImageProcessor(size=size)(coffee)
    assert DartImageProcessor(size=size, crop_size=96)(coffee, return_tensors="pt").pixel_values.shape[-2:] == (96, 96)


def test_unreadable_files_are_named(processor, coffee, tmp_path):
    whole, half, text = tmp_path / "whole.jpg", tmp_path / "half.jpg", tmp_path / "text.png"
    Image.fromarray(coffee).save(whole)
    half.write_bytes(whole.read_bytes()[:5000])
    text.write_text("not an image")
    for path in (half, text):
        with pytest.raises(OSError, match=f"Cannot read .*{path.name}"):
            processor(path)
    with pytest.raises(OSError, match=r"Cannot read .*half\.jpg.*truncated"):
        processor(Image.open(half))
    with pytest.raises(OSError, match="Cannot read 'http://two words/a' as an image: URL"):
        processor("http://two words/a")
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no image file"):
            processor(path)


@pytest.mark.parametrize("values", [np.full((9, 9), 0.5, np.float32), np.full((9, 9), 70_000, np.int32)])
def test_images_of_16_or_32_bits_are_refused_unless_nothing_converts_them(processor, values, tmp_path):
    image = Image.fromarray(values)
    image.save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=f"mode '{image.mode}' has 16 or 32 bits a channel.*save .* 8 bits"):
        processor(image)
    with pytest.raises(OSError, match=r"Cannot read .*deep\.tif' as an image: mode .*save .* 8 bits"):
        processor(tmp_path / "deep.tif")
    settings = {"do_convert_rgb": False, "do_normalize": False, "do_rescale": False}
    if values.dtype == np.float32:
        assert processor(tmp_path / "deep.tif", return_tensors="pt", **settings).pixel_values.shape[1] == 1


@pytest.mark.parametrize("kind", ["transparent", "turned"])
def test_training_and_evaluation_get_the_same_pixels_as_pipelines(processor, tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    path, exif = tmp_path / "odd.png", Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6  # show it turned clockwise
    Image.fromarray(values[..., : 4 if kind == "transparent" else 3]).save(path, exif=exif)
    opened = load_image(str(path))  # what pipelines do
    expected = pixels(processor, np.asarray(opened))
    content = path.read_bytes()
    data_url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    assert all(torch.equal(pixels(processor, image), expected) for image in (path, Image.open(path), data_url))
    collate = ImageClassificationCollator(processor, 2)
    for image in ({"path": str(path), "bytes": None}, {"path": None, "bytes": content}, Image.open(path)):
        assert torch.equal(collate([{"image": image, "label": 0}])["pixel_values"][0], expected)
    transform = training_transform(processor, horizontal_flip=0.0)
    assert torch.equal(transform(Image.open(path)), transform(opened))


def test_images_are_downloaded(coffee, processor, tmp_path):
    Image.fromarray(coffee).save(tmp_path / "picture.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert torch.equal(pixels(processor, f"{address}/picture.png"), pixels(processor, coffee))
        with pytest.raises(OSError, match=r"Cannot read .*other\.png' as an image: .*404"):
            processor(f"{address}/other.png")
        server.shutdown()
    with pytest.raises(OSError, match=r"Cannot read 'http://127\.0\.0\.1"):
        processor(f"{address}/picture.png")
    with pytest.raises(OSError, match="Cannot read 'data:image/png;base64,"):
        processor("data:image/png;base64,???")


def test_very_large_files_are_refused(processor, tmp_path, monkeypatch):
    Image.new("1", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(OSError, match=r"Cannot read .*large\.png' as an image: .*decompression bomb"):
        processor(tmp_path / "large.png")
