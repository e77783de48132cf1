"""The names in a run folder, and files that are replaced whole."""

import pytest

from ganscale.errors import UserError
from ganscale.files import write_text
from ganscale.run_folder import RunFolder, append_json_line, read_json_lines


def test_names_in_the_folder_sort_by_images(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.sample_grid(123_456) == tmp_path / "samples" / "images-000123456.png"
    assert folder.sample_grid(1, "non_ema") == tmp_path / "samples" / "non_ema-000000001.jpg"
    assert folder.checkpoints == tmp_path / "checkpoints"


def test_a_small_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    before = path.stat().st_ino
    write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_ino != before  # renamed into place: open readers keep the old one
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_damaged_lines_are_skipped(tmp_path):
    path = tmp_path / "sessions.jsonl"
    assert [*read_json_lines(path)] == []
    append_json_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"half\n[1]\n\xff\n' + b"[" * 100_000 + b"\n")
    append_json_line(path, {"a": 2})
    assert [*read_json_lines(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_a_damaged_summary_counts_as_none(tmp_path, text):
    folder = RunFolder(tmp_path)
    assert folder.read_summary() == {}
    folder.write_summary({"exit_code": 0})
    assert folder.read_summary() == {"exit_code": 0}
    folder.summary.write_text(text)
    assert folder.read_summary() == {}


def test_a_folder_without_a_run_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no run folder"):
        RunFolder(tmp_path / "missing").check_exists()
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        RunFolder(tmp_path).check_exists()
