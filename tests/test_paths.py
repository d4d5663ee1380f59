"""paths.py: a file is replaced whole or not at all, and nothing else is written."""

import os

import pytest

from richhf_data import paths


def test_a_file_appears_whole(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with paths.writing(file) as partial:
        assert partial.parent == file.parent and partial.name != file.name and not file.exists()
        partial.write_text("first")
    assert file.read_text() == "first"
    paths.replace(file, b"second")
    assert file.read_text() == "second" and os.listdir(file.parent) == ["a.txt"]
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_file_as_it_was(tmp_path, error):
    paths.replace(tmp_path / "a.txt", b"first")
    for writing in (paths.writing, paths.writing_url):
        with pytest.raises(error), writing(str(tmp_path / "a.txt")) as partial:
            if writing is paths.writing:
                partial.write_text("second")
            else:
                partial.write(b"second")
            raise error
        assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "first"


def test_no_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr(paths.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / "a.txt.guessed.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        paths.replace(tmp_path / "a.txt", b"x")
    assert (tmp_path / "victim").read_text() == "precious" and len(os.listdir(tmp_path)) == 2


def test_urls_are_written_whole(tmp_path):
    with paths.writing_url(f"file://{tmp_path}/a.bin") as file:
        file.write(b"data")
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"data" and os.listdir(tmp_path) == ["a.bin"]
