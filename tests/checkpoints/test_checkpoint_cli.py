"""`ganscale checkpoint` on the folder of a run."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from ganscale.checkpoints.retention import score_entry
from ganscale.cli.main import main
from tests.checkpoints.helpers import save_checkpoint
from tests.helpers.runs import MINIMAL

KEPT = "checkpoint: {keep_last: 2, keep_every_images: 300, best: logits/wasserstein}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(MINIMAL + KEPT)
    for images_seen, score in enumerate((None, 40.0, 8.25, 30.0, 20.0, 9.0, 10.0)):
        files = {"generator": {"weight": torch.zeros(250_000)}}
        if images_seen:
            numbers = score_entry("logits/wasserstein", score)
            save_checkpoint(folder / "checkpoints", 100 * images_seen, files, numbers)
    return folder


def images(run: Path) -> list[int]:
    return sorted(int(path.name[-9:]) for path in (run / "checkpoints").glob("images-*"))


def printed(capsys: pytest.CaptureFixture) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_list_shows_size_score_best_and_truncated_files(run: Path, capsys) -> None:
    os.truncate(run / "checkpoints" / "images-000000400" / "generator.safetensors", 12)
    shutil.copytree(
        run / "checkpoints" / "images-000000100", run / "checkpoints" / "damaged-images-000000050"
    )
    two_hours_ago = (run / "checkpoints" / "images-000000100").stat().st_mtime - 7200
    path = run / "checkpoints" / "images-000000100" / "checksums.json"
    os.utime(path, (two_hours_ago, two_hours_ago))
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = printed(capsys)
    assert lines[1] == ["images-000000100", "100", "1.0", "2", "h", "logits/wasserstein", "40"]
    assert lines[2][-3:] == ["logits/wasserstein", "8.25", "best"]
    assert (
        " ".join(lines[4]).endswith("has 12 bytes instead of 1,000,080") or "damaged:" in lines[4]
    )
    assert [line[0] for line in lines[1:7]] == [f"images-000000{n}00" for n in range(1, 7)]
    assert lines[7][-1] == "damaged-images-000000050"


def test_list_of_a_run_that_scores_no_checkpoint_has_no_column_for_it(run: Path, capsys) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    save_checkpoint(run / "checkpoints", 100, {"generator": {"weight": torch.zeros(9)}}, {})
    assert main(["checkpoint", "list", str(run)]) == 0
    header, line = printed(capsys)
    assert header == ["checkpoint", "images", "MB", "age"]
    assert line == ["images-000000100", "100", "0.0", "0", "s"]


def test_list_of_a_run_without_checkpoints_is_empty(run: Path, capsys) -> None:
    shutil.rmtree(run / "checkpoints")
    assert main(["checkpoint", "list", str(run)]) == 0
    assert len(printed(capsys)) == 1
    assert main(["checkpoint", "verify", str(run)]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_verify_reads_every_byte_and_names_the_file(run: Path, capsys) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert {line[1] for line in printed(capsys)} == {"whole"}
    path = run / "checkpoints" / "images-000000300" / "generator.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:500_000] + b"\1" + whole[500_001:])
    assert main(["checkpoint", "verify", str(run)]) == 1
    damaged = [line for line in printed(capsys) if line[1] != "whole"]
    assert [" ".join(line) for line in damaged] == [
        "images-000000300: damaged: generator.safetensors is not as it was written"
    ]
    assert images(run) == [100, 200, 300, 400, 500, 600]  # it changes nothing


def test_prune_uses_the_runs_settings_and_those_of_the_command_line(run: Path, capsys) -> None:
    assert main(["checkpoint", "prune", str(run), "--dry-run"]) == 0
    lines = printed(capsys)
    assert [line[0] for line in lines[:-1]] == ["images-000000100:", "images-000000400:"]
    assert lines[-1] == ["2", "of", "6", "checkpoints", "would", "be", "deleted:", "2.0", "MB"]
    assert len(images(run)) == 6
    assert main(["checkpoint", "prune", str(run)]) == 0
    assert images(run) == [200, 300, 500, 600]
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--keep-every", "0"]) == 0
    assert images(run) == [200, 600]
    capsys.readouterr()
    assert main(["checkpoint", "prune", str(run), "--keep-last", "0"]) == 2
    assert "`checkpoint.keep_last` must be at least 1, not 0" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(run), "--keep-last", "1", "--keep-every", "0.1k"]) == 0
    assert images(run) == [200, 600]


def test_a_folder_other_than_a_run_folder_is_refused(tmp_path: Path, capsys) -> None:
    for action in (["list"], ["verify"], ["prune"]):
        assert main(["checkpoint", *action, str(tmp_path)]) == 2
        assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(tmp_path), str(tmp_path / "out")]) == 2


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capsys) -> None:
    name = "images-000000600"
    os.truncate(run / "checkpoints" / name / "generator.safetensors", 12)
    out = tmp_path / "out"
    assert main(["checkpoint", "export", str(run), str(out), "--checkpoint", name]) == 2
    assert "is damaged (generator.safetensors is not as it was written)" in capsys.readouterr().err
    assert not out.exists()
