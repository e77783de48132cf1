"""`ganscale shards` as a user runs it."""

import argparse
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ganscale.cli import shards
from ganscale.data.bad_samples import BadSample
from ganscale.data.manifest import Manifest
from ganscale.errors import UserError
from tests.helpers.images import jpeg, png
from tests.helpers.processes import HANG_SECONDS, run_python
from tests.helpers.tars import write_tar


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    shards.add_parser(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["shards", *arguments])
    return parsed.run(parsed)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("digits"))
    assert run("write", "bundled:mnist", folder, "--workers", "1", "--format", "npy") == 0
    return folder


def test_write_index_and_show_print_the_same_data_set(digits, capsys):
    run("index", digits, "--workers", "1")
    indexed = capsys.readouterr().out
    for line in (
        "samples      5,000",
        "resolution   32 x 32",
        "classes      10",
        "images       npy",
    ):
        assert line in indexed
    kept, indexed = indexed.split("\n", 1)
    assert kept == "not read, since unchanged: 1 of 1 shards"
    assert "location     .\n" in indexed
    run("show", digits)
    shown = capsys.readouterr().out
    assert shown.startswith(indexed)
    assert "  class     9           500  9\n" in shown
    run("write", "bundled:mnist", digits, "--workers", "1", "--format", "npy")
    again = capsys.readouterr().out
    assert again == "kept 1 shards from an earlier run\n" + indexed


def test_a_sheet_shows_the_samples(digits, tmp_path, capsys):
    path = tmp_path / "sheets" / "digits.png"
    run("show", digits, "--sheet", str(path), "--count", "9")
    assert f"sheet        {path}\n" in capsys.readouterr().out
    with Image.open(path) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (96, 96, 3)
    cells = sheet.reshape(3, 32, 3, 32, 3).transpose(0, 2, 1, 3, 4).reshape(9, -1)
    assert all(cell.max() > 200 for cell in cells)


def test_mistakes_give_clear_errors(digits, tmp_path):
    with pytest.raises(UserError, match="ganscale shards index"):
        run("show", str(tmp_path))
    with pytest.raises(UserError, match="with a different seed"):
        run("write", "bundled:mnist", digits, "--format", "npy", "--seed", "1")


def test_names_from_files_cannot_command_the_terminal(tmp_path):
    """Of shards, samples, classes and files that are not stored."""
    name = "\x1b[2J\x9b\r\u202e"
    data_set = tmp_path / "set"
    write_tar(
        data_set / f"{name}.tar", [(f"{name}.jpg", jpeg(0)[:400]), (f"{name}.cls", b"\x1b[m")]
    )
    images = tmp_path / "images"
    images.mkdir()
    (images / f"{name}.png").write_bytes(b"?")
    (images / f"0.{name}").write_bytes(b"?")
    (images / "0.png").write_bytes(png(0))
    for command in (
        ("index", str(data_set)),
        ("show", str(data_set)),
        ("verify", str(data_set)),
        ("write", str(images), str(tmp_path / "1")),
        ("write", str(images), str(tmp_path / "1"), "--max-bad", "0.9"),
    ):
        process = subprocess.run(
            [sys.executable, "-m", "ganscale", "shards", *command],
            capture_output=True, text=True, timeout=HANG_SECONDS,
        )  # fmt: skip
        output = process.stdout + process.stderr
        assert not set("\x1b\x9b\r\u202e") & set(output), output
        assert "\\x1b[" in output
    bad_sample = BadSample(f"{name}.tar", "cut", name, "is cut")
    assert str(bad_sample) == (
        r"sample \x1b[2J\x9b\x0d\u202e of shard \x1b[2J\x9b\x0d\u202e.tar is cut"
    )


def test_names_that_the_terminal_has_no_letters_for_are_escaped(tmp_path):
    folder = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", "猫".encode())]).parent
    process = subprocess.run(
        [sys.executable, "-m", "ganscale", "shards", "index", str(folder)],
        capture_output=True, text=True, timeout=HANG_SECONDS,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert "  class     0             1  \\u732b\n" in process.stdout


def test_a_folder_or_zip_of_images_is_answered_with_the_command_that_reads_images(tmp_path):
    photos = tmp_path / "photos"
    (photos / "cats").mkdir(parents=True)
    (photos / "cats" / "0.BMP").touch()
    (tmp_path / "photos.zip").touch()
    for source in (photos, tmp_path / "photos.zip"):
        with pytest.raises(UserError, match=rf"ganscale shards write {source} OUTPUT"):
            Manifest.load(source)
    with pytest.raises(
        UserError, match=rf"no \*\.tar in .*: ganscale shards write {photos} OUTPUT"
    ):
        run("index", str(photos))
    write_tar(photos / "a.tar", [("0.png", png(0))])
    with pytest.raises(UserError, match=rf"make one with: ganscale shards index {photos}$"):
        Manifest.load(photos)


@pytest.mark.parametrize("option", ["--workers", "--resolution", "--shard-samples"])
def test_numbers_below_one_are_usage_errors(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        run("write", "bundled:mnist", str(tmp_path), option, "0")
    assert raised.value.code == 2
    assert "0 is not positive" in capsys.readouterr().err


def test_the_parser_imports_nothing_heavy():
    program = (
        "import argparse, sys; from ganscale.cli import shards;"
        "shards.add_parser(argparse.ArgumentParser().add_subparsers());"
        "print([m for m in ('numpy', 'PIL', 'torch', 'webdataset') if m in sys.modules])"
    )
    assert run_python("-c", program).stdout == "[]\n"


@pytest.mark.parametrize(("pipeline", "rows"), [("ada", 15), ("diffaugment", 6)])
def test_a_sheet_shows_every_transformation_that_acts_on_gray_images(
    digits, tmp_path, capsys, pipeline, rows
):
    """The original and the default, and all but hue and saturation."""
    path = tmp_path / "sheets" / "augmented.png"
    run("show", digits, "--augment", str(path), "--pipeline", pipeline)
    assert f"augmented    {path}\n" in capsys.readouterr().out
    with Image.open(path) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (rows * 32, 96 + 8 * 32, 3)
    shown = sheet[:, 96:].reshape(rows, 32, 8 * 32, 3)
    assert all((row != shown[0]).any() for row in shown[1:])
