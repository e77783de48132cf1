"""A run folder may move, be linked to and be mounted elsewhere; a copy of it is another run."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ganscale.errors import UserError
from ganscale.run_folder import RunFolder
from ganscale.run_identity import claim_identity, visible_original
from tests.helpers.disks import small_disk


def open_there(path: Path, **options: bool) -> str:
    """The id under which a run continues in this folder."""
    folder = RunFolder(path)
    identity = folder.read_identity() if folder.identity.exists() else None
    claim_identity(folder, identity, "data", **options)
    return folder.read_identity()["id"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "run"
    path.mkdir(parents=True)
    open_there(path)
    (path / "alerts.jsonl").write_text('{"kind": "finish"}\n')
    return path


def run_id(path: Path) -> str:
    return json.loads((path / "run.json").read_text())["id"]


def test_a_run_keeps_its_id_under_every_path_that_leads_to_it(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "all").symlink_to(run.parent)
    first = run_id(run)
    assert open_there(run) == first
    for path in (tmp_path / "link", tmp_path / "all" / "run", tmp_path / "all" / ".." / "runs/run"):
        assert open_there(path) == first


def test_a_copy_becomes_a_run_of_its_own_and_says_so(run, tmp_path, caplog):
    first = run_id(run)
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    with caplog.at_level(logging.INFO):
        own = open_there(copy)
    assert own != first
    assert f"{copy} is a copy of {run} and becomes a run of its own" in caplog.text
    assert f"write its id, {first}, into {copy}/run.json" in caplog.text
    assert not (copy / "alerts.jsonl").exists()
    assert (copy / f"alerts-of-{first}.jsonl").exists()
    assert open_there(copy) == own
    assert open_there(run) == first
    (copy / "run.json").write_text((copy / "run.json").read_text().replace(own, first))
    assert open_there(copy) == first  # as the sentence promised


def test_the_original_keeps_its_id_when_the_copy_takes_its_place(run):
    first = run_id(run)
    aside = run.rename(run.with_name("aside"))
    shutil.copytree(aside, run)
    assert open_there(run) == first
    assert open_there(aside) != first


def test_a_copy_whose_original_has_moved_on_is_still_a_copy(run):
    first = run_id(run)
    copy = shutil.copytree(run, run.with_name("copy"))
    moved = run.rename(run.with_name("moved"))
    assert open_there(copy) != first
    assert open_there(moved) == first


def test_a_run_that_moves_continues_as_the_same_run(run, tmp_path):
    first = run_id(run)
    moved = run.rename(tmp_path / "moved")
    assert open_there(moved) == first
    (tmp_path / "runs").rename(tmp_path / "below")
    shutil.move(moved, tmp_path / "below" / "run")
    (tmp_path / "below").rename(tmp_path / "renamed")  # with the run in it
    assert open_there(tmp_path / "renamed" / "run") == first
    with small_disk(tmp_path / "disk", "1m") as disk:  # `mv` copies and deletes
        assert open_there(Path(shutil.move(tmp_path / "renamed" / "run", disk / "run"))) == first


def test_the_same_folder_under_another_mount_point_is_the_same_run(run, tmp_path):
    """As two nodes see it, of which neither has the other's path."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("file systems can only be mounted by root")
    first = run_id(run)
    for name in ("node1", "node2", "node1"):
        node = tmp_path / name
        node.mkdir(exist_ok=True)
        mounts = f"mount --bind {run.parent} {node} && mount -t tmpfs none {run.parent}"
        program = (
            "from tests.test_run_identity import Path, open_there;"
            f"open_there(Path('{node / 'run'}'))"
        )
        command = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$0" -c "$1"']
        subprocess.run([*command, sys.executable, program], check=True, timeout=300)
        assert run_id(run) == first
        assert json.loads((run / "run.json").read_text())["location"] == str(node / "run")


def test_a_copy_from_a_place_that_cannot_be_seen_is_another_run_unless_it_may_keep_its_id(
    run, tmp_path
):
    first = run_id(run)
    copies = [shutil.copytree(run, tmp_path / name / "run") for name in ("here", "there")]
    shutil.rmtree(run.parent)
    assert open_there(copies[0], keeps_id=True) == first
    assert open_there(copies[1]) != first


def test_a_copy_made_only_to_be_sent_from_elsewhere_counts_as_the_run(run, tmp_path):
    copy = RunFolder(shutil.copytree(run, tmp_path / "copy"))
    assert visible_original(copy, copy.read_identity()) == run
    shutil.rmtree(run)
    assert visible_original(copy, copy.read_identity()) is None


@pytest.mark.parametrize("options", ["-al", "-rs"])
def test_a_copy_by_links_is_refused_since_both_would_write_the_same_files(run, tmp_path, options):
    copy = tmp_path / "copy"
    subprocess.run(["cp", options, str(run), str(copy)], check=True, timeout=60)
    with pytest.raises(UserError, match=r"shares alerts\.jsonl, run\.json with it.*cp -rL"):
        open_there(copy)


def test_a_copy_does_not_write_into_the_checkpoints_that_its_original_links_to(run, tmp_path):
    (tmp_path / "scratch").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    assert open_there(run)
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    with pytest.raises(UserError, match="shares checkpoints with it"):
        open_there(copy)
    copy = shutil.copytree(run, tmp_path / "whole copy")
    assert open_there(copy) != run_id(run)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "[" * 10_000, "\udcff", '{"id": 3}', '{"id": "../x"}'),
        '{"id": "x", "location": 3}',
    ],
)
def test_a_damaged_identity_is_known_from_the_newest_session(run, caplog, text):
    first = run_id(run)
    (run / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"run\.json is damaged: delete it"):
        open_there(run)
    session = {"images_seen": 0, "run_id": first, "data_fingerprint": "data"}
    (run / "sessions.jsonl").write_text(json.dumps(session) + "\n")
    assert open_there(run) == first
    assert "run.json is damaged" in caplog.text
    assert run_id(run) == first
