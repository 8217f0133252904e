"""Output folders appear complete or not at all."""

from pathlib import Path

import pytest

from dart_hf.folders import check_unused, complete_folder


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
