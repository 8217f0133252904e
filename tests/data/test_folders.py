"""The rule of image folders: the first level has splits only if all its folders are named so; then come classes."""

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dart_hf.data.class_table import class_table
from dart_hf.data.image_data import load_image_data


def make(root: Path, files: str) -> Path:
    """Write image files with different pixels; other files get some text."""
    for number, name in enumerate(files.split()):
        path = root / name.replace("~", " ")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg", ".avif"):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        else:
            path.write_text("no image")
    return root


def found(root: Path, **settings) -> dict[str, dict[str, int]]:
    """Split -> class -> number of images."""
    data = load_image_data(root, needs_labels=False, **settings)
    splits = {"train": data.train, **({data.evaluation_split: data.evaluation} if data.evaluation else {})}
    return {name: dict(Counter(data.label_names[row["label"]] for row in split)) for name, split in splits.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("cat/1.png dog/1.png", {"train": {"cat": 1, "dog": 1}}),
        (
            "train/train/1.png train/bus/1.png val/train/1.png val/bus/1.png",
            {"train": {"train": 1, "bus": 1}, "validation": {"train": 1, "bus": 1}},
        ),
        ("flask/1.png test~tube/1.png test~tube/2.png", {"train": {"flask": 1, "test tube": 2}}),
        (
            "Testing/a/1.png Testing/b/1.png Training/a/1.png Training/b/1.png Training/b/2.png",
            {"train": {"a": 1, "b": 2}, "test": {"a": 1, "b": 1}},
        ),
        ("cat/2023/1.png cat/2024/2.png dog/2023/3.png", {"train": {"cat": 2, "dog": 1}}),
        ("cat/test-1.png cat/train.png dog/validation/1.png", {"train": {"cat": 2, "dog": 1}}),
        ("train/a/x/1.png train/b/1.png other/1.png", {"train": {"train": 2, "other": 1}}),
        ("train/a/1.png train/b/1.png DEV/a/1.png docs/x.txt", {"train": {"a": 1, "b": 1}, "validation": {"a": 1}}),
        ("cat/1.PNG cat/.hidden.png .git/x/1.png __MACOSX/cat/1.png dog/1.jpg", {"train": {"cat": 1, "dog": 1}}),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_splits_and_classes(tmp_path, files, expected, streaming):
    assert found(make(tmp_path / "train-data", files), streaming=streaming) == expected


@pytest.mark.parametrize("word", ["text", "csv", "imagefolder"])
def test_a_folder_comes_before_a_builder_of_datasets_with_its_name(tmp_path, monkeypatch, word):
    make(tmp_path / word, "cat/1.png dog/1.png")
    monkeypatch.chdir(tmp_path)
    assert found(Path(word)) == {"train": {"cat": 1, "dog": 1}}


def test_links_are_followed_but_not_in_circles(tmp_path):
    make(tmp_path / "elsewhere", "1.png 2.png")
    root = make(tmp_path / "pets", "cat/1.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    os.symlink(tmp_path / "elsewhere" / "1.png", root / "cat" / "linked.png")
    (root / "cat" / "circle").symlink_to(root, target_is_directory=True)
    assert found(root) == {"train": {"cat": 2, "dog": 2}}


def test_files_that_are_left_out_are_counted_aloud(tmp_path, caplog):
    root = make(tmp_path / "pets", "cat/1.png cat/2.heic cat/3.heic dog/1.avif dog/notes.txt loose.png")
    assert found(root) == {"train": {"cat": 1, "dog": 1}}
    assert "3 files in" in caplog.text and "(2 .heic, 1 .txt)" in caplog.text
    assert "1 images in" in caplog.text and "no class folder, such as 'loose.png'" in caplog.text


def test_the_word_of_a_folder_names_its_split(tmp_path):
    files = "Training/a/1.png Training/b/1.png val/a/1.png val/b/2.png test/a/1.png test/b/1.png"
    root = make(tmp_path / "pets", files)
    assert len(load_image_data(root, evaluation_split="val").evaluation) == 2
    assert len(load_image_data(root, train_split="training[:1]", needs_labels=False).train) == 1
    with pytest.raises(ValueError, match=r"the folders 'val' and 'validation' in .* are all the split 'validation'"):
        found(make(root, "validation/a/1.png"))


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"": "Training/train-1.png,cat Training/test-2.png,dog Testing/1.png,dog"}, {"test": {"dog": 1}}),
        ({"Training/": "train-1.png,cat test-2.png,dog", "Testing/": "1.png,dog"}, {"test": {"dog": 1}}),
        ({"": "test-1.png,cat train-1.png,dog"}, {}),
    ],
    ids=["one table", "a table in each split", "no folders"],
)
def test_metadata_tells_the_labels_and_the_folders_tell_the_splits(tmp_path, tables, expected):
    for folder, rows in tables.items():
        make(tmp_path, " ".join(folder + row.split(",")[0] for row in rows.split()))
        (tmp_path / folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows.split()]) + "\n")
    assert found(tmp_path) == {"train": {"cat": 1, "dog": 1}, **expected}


def test_the_table_shows_the_images_of_each_class_and_split(tmp_path):
    root = make(tmp_path / "pets", "train/cat/1.png train/cat/2.png train/dog/1.png val/cat/3.png")
    lines = ["class   train  validation", "cat         2           1", "dog         1           0"]
    assert list(class_table(load_image_data(root))) == [*lines, "images      3           1"]
    assert list(class_table(load_image_data(root, streaming=True))) == []


def test_the_table_of_many_classes_shows_the_rarest(tmp_path):
    root = make(tmp_path / "many", " ".join(f"c{number:02}/{copy}.png" for number in range(23) for copy in range(2)))
    (root / "c11" / "1.png").unlink()
    lines = list(class_table(load_image_data(root)))
    assert len(lines) == 23 and lines[-1] == "3 classes with more images are not shown."
    assert "c11         1" in lines


@pytest.mark.parametrize(
    ("files", "evaluation", "names", "warnings"),
    [
        ("test/1.png", None, ["cat", "dog"], ["no class folder, such as 'test/1.png'"]),
        ("test/cow/1.png test/cat/2.png", 2, ["cat", "cow", "dog"], ["only the evaluation images of", "class 'cow';"]),
    ],
)
def test_evaluation_images_without_a_class_to_learn_are_reported(tmp_path, caplog, files, evaluation, names, warnings):
    data = load_image_data(make(tmp_path / "pets", f"train/cat/1.png train/dog/1.png {files}"))
    assert (data.evaluation and len(data.evaluation), data.label_names) == (evaluation, names)
    assert all(text in caplog.text for text in warnings)
