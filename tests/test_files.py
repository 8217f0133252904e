"""Output files and folders appear complete or not at all."""

import hashlib
from pathlib import Path

import pytest

from dart_hf.files import absolute_source, atomic_folder, atomic_write, check_output_folder, weights_sha256


def fill(folder: Path) -> None:
    (folder / "one.txt").write_text("1")


@pytest.mark.parametrize("output", ["new", "deep/new", "empty", "link", "."])
def test_output_folder_appears_complete(tmp_path, monkeypatch, output):
    if output != ".":
        (tmp_path / "empty").mkdir()
        (tmp_path / "target").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path)
    path = Path(output)
    check_output_folder(path)
    before = {found.name for found in tmp_path.iterdir()}
    with atomic_folder(path) as folder:
        fill(folder)
        assert not (tmp_path / path / "one.txt").exists()
    assert (tmp_path / path / "one.txt").read_text() == "1"
    assert {found.name for found in tmp_path.iterdir()} - before <= {"one.txt" if output == "." else path.parts[0]}


def test_failed_output_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "new") as folder:
        fill(folder)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_used_output_folder_is_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(FileExistsError, match=r"the folder .* is not empty"):
        check_output_folder(tmp_path)
    with pytest.raises(FileExistsError, match=r"one.txt is a file"):
        check_output_folder(tmp_path / "one.txt")


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path) as unfinished:
        unfinished.write_text("ne")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_sha256_reads_only_the_weights_of_the_model(tmp_path):
    (tmp_path / "optimizer.safetensors").write_bytes(b"not the model's")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        weights_sha256(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"second")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"first")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()


def test_only_local_sources_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert absolute_source("photos") == str(tmp_path / "photos")
    assert absolute_source("user/photos") == "user/photos"
