"""`ganscale shards` as a user meets it."""

import argparse

import numpy as np
import pytest
from PIL import Image

from ganscale.cli import shards
from ganscale.errors import UserError
from tests.helpers.processes import run_python


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
    assert kept == "unchanged, not read again: 1 of 1 shards"
    assert "location     .\n" in indexed
    run("show", digits)
    shown = capsys.readouterr().out
    assert shown.startswith(indexed)
    assert "  class     9           500  9\n" in shown
    run("write", "bundled:mnist", digits, "--workers", "1", "--format", "npy")
    again = capsys.readouterr().out
    assert again == "kept from an earlier run: 1 shards\n" + indexed


def test_a_sheet_shows_the_samples(digits, tmp_path, capsys):
    path = tmp_path / "sheets" / "digits.png"
    run("show", digits, "--sheet", str(path), "--count", "9")
    assert f"sheet        {path}\n" in capsys.readouterr().out
    with Image.open(path) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (96, 96, 3)
    cells = sheet.reshape(3, 32, 3, 32, 3).transpose(0, 2, 1, 3, 4).reshape(9, -1)
    assert all(cell.max() > 200 for cell in cells)


def test_mistakes_are_sentences(digits, tmp_path):
    with pytest.raises(UserError, match="ganscale shards index"):
        run("show", str(tmp_path))
    with pytest.raises(UserError, match="with other seed"):
        run("write", "bundled:mnist", digits, "--format", "npy", "--seed", "1")


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
