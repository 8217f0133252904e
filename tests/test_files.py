"""Output folders appear complete or not at all, and weights are known again."""

import hashlib
from pathlib import Path

import pytest

from dart_hf.files import check_unused, complete_folder, written_whole
from dart_hf.hub.loading import weights_digest


def fill(folder: Path) -> None:
    (folder / "one.txt").write_text("1")


@pytest.mark.parametrize("output", ["new", "deep/new", "empty", "link"])
def test_what_was_filled_takes_its_place(tmp_path, output):
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    path = tmp_path / output
    check_unused(path)
    before = {found.name for found in tmp_path.iterdir()}
    with complete_folder(path) as folder:
        fill(folder)
        assert not (path / "one.txt").exists()
    assert (path / "one.txt").read_text() == "1"
    assert {found.name for found in tmp_path.iterdir()} - before <= {Path(output).parts[0]}


def test_the_working_folder_may_be_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with complete_folder(Path(".")) as folder:
        fill(folder)
    assert (tmp_path / "one.txt").exists()


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), complete_folder(tmp_path / "new") as folder:
        fill(folder)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(FileExistsError, match=r"the folder .* is not empty"):
        check_unused(tmp_path)
    with pytest.raises(FileExistsError, match=r"one.txt is a file"):
        check_unused(tmp_path / "one.txt")


def test_weights_are_known_by_their_content(tmp_path):
    (tmp_path / "optimizer.safetensors").write_bytes(b"no weights of the model")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        weights_digest(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"second")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"first")
    assert weights_digest(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    with written_whole(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists()
    with pytest.raises(KeyError), written_whole(path) as unfinished:
        unfinished.write_text("ne")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
