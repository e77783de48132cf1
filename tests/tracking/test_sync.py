"""`ganscale sync` sends what W&B lacks of a run, once, whatever happened before."""

import fcntl
import hashlib
import json
import shutil

import pytest

from ganscale.cli.main import main
from ganscale.config import resolve
from ganscale.errors import GanscaleError, UnavailableError, UserError
from ganscale.run_folder import RunFolder
from ganscale.run_identity import claim_identity
from ganscale.tracking import sync
from ganscale.tracking.superseded_rows import note_rewind
from ganscale.tracking.uploader_messages import WandbIdentity
from ganscale.tracking.wandb_identity import wandb_identity
from tests.helpers.runs import TINY
from tests.tracking.sessions import (
    RUN_ID,
    end,
    kill,
    recorded_steps,
    start,
    steps,
    synchronize,
    train,
    wait_until_paused,
)


def expect_the_record(server, run_folder, run_id: str = RUN_ID) -> None:
    """Every row of the record is at the server, exactly once and in order, with its sample grid."""
    history = server.runs[run_id].history
    assert steps(history) == recorded_steps(run_folder)
    for name in ("logits/wasserstein", "samples/images"):
        assert steps(history, name) == recorded_steps(run_folder, name)
    assert all(row["progress/images_seen"] == 64 * row["progress/step"] for row in history)


def test_a_run_killed_three_times_has_every_row_once(with_account, run_folder, server):
    """With W&B offline, online, and a server that goes away and comes back."""
    sessions = ((1, 12, "offline"), (9, 24, "auto"), (21, 28, "auto"), (15, 33, "disabled"))
    for session, (first, last, mode) in enumerate(sessions):
        if session == 2:
            server.stop()
        process = start(
            with_account,
            run_folder=run_folder,
            mode=mode,
            first_step=first,
            last_step=last + 1,
            pause_at=last,
        )
        wait_until_paused(process)
        if session == 1:  # this one ends well
            end(process)
        else:
            kill(process)
    server.start()
    assert steps(server.runs[RUN_ID].history) == list(range(1, 26))
    assert synchronize(with_account, run_folder)["sent"] > 0
    expect_the_record(server, run_folder)

    assert synchronize(with_account, run_folder)["sent"] == 0
    expect_the_record(server, run_folder)
    assert synchronize(with_account, run_folder)["sent"] == 0

    train(with_account, run_folder=run_folder, mode="auto", first_step=31, last_step=40)
    expect_the_record(server, run_folder)
    assert recorded_steps(run_folder) == list(range(1, 41))


def test_an_offline_run_is_sent_with_samples_and_alerts(with_account, run_folder, server):
    train(with_account, run_folder=run_folder, mode="offline", first_step=1, last_step=20)
    assert not server.runs
    done = synchronize(with_account, run_folder)
    assert done["sent"] == done["rows"] == 24
    assert done["location"].startswith(server.url)
    expect_the_record(server, run_folder)
    run = server.runs[RUN_ID]
    images = [name for name in run.files if name.startswith("media/images")]
    assert len(images) == 2
    assert all(name.endswith(".jpg") for name in images)
    assert run.alerts == ["a run: not finite"]
    # `wandb sync`, out of habit, finds these marked as sent.
    assert len([*run_folder.glob("wandb/offline-run-*/*.wandb.synced")]) == 1

    assert synchronize(with_account, run_folder)["sent"] == 0
    assert run.alerts == ["a run: not finite"]


def test_another_project_gets_all_rows(with_account, run_folder, server):
    train(with_account, run_folder=run_folder, mode="disabled", first_step=1, last_step=3)
    done = synchronize(with_account, run_folder, project="papers")
    assert "/papers/" in done["location"]
    assert server.runs[RUN_ID].project == "papers"


def test_a_session_to_be_requeued_is_preempted_and_shown_by_its_command(
    with_account, run_folder, server
):
    train(with_account, run_folder=run_folder, mode="disabled", first_step=1, last_step=3)
    (run_folder / "summary.json").write_text('{"exit_code": 75}')
    command = ["/bin/ganscale", "train", "configs/demo.yaml"]
    synchronize(with_account, run_folder, config={"session": {"command": command}})
    run = server.runs[RUN_ID]
    assert (run.exit_code, run.is_preempting) == (75, True)
    metadata = json.loads(run.files["wandb-metadata.json"])
    assert [metadata["program"], *metadata["args"]] == command


def test_it_counts_the_rows_in_wandb_from_before_the_settings_changed(
    with_account, run_folder, server
):
    train(with_account, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert note_rewind(RunFolder(run_folder), 64)  # as a run that is resumed there
    assert synchronize(with_account, run_folder)["superseded"] == 2
    assert synchronize(with_account, run_folder)["superseded"] == 2


@pytest.mark.parametrize("obstacle", [".lock", "wandb"])
def test_a_folder_that_cannot_be_written_to_is_a_user_error(
    with_account, run_folder, monkeypatch, obstacle
):
    monkeypatch.setenv("WANDB_API_KEY", with_account["WANDB_API_KEY"])
    monkeypatch.setattr(sync, "resolve_mode", lambda mode: mode)
    if obstacle == ".lock":
        (run_folder / ".lock").mkdir()
    else:
        (run_folder / "wandb").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        sync.synchronize(RunFolder(run_folder), WandbIdentity("id", "n", {}))


def test_the_command_sends_what_it_can_and_ends_with_the_worst_code(tmp_path, monkeypatch, capsys):
    """1 (W&B said no) is worse than 75 (try again), and a run that is well is sent."""
    for name in ("first", "away", "failed", "last"):
        RunFolder(tmp_path / name).path.mkdir()
        (tmp_path / name / "config.yaml").write_text(resolve(TINY).to_yaml())
        (tmp_path / name / "run.json").write_text('{"id": "x", "fingerprint": "y"}')

    def answer(folder, *arguments):
        name = folder.path.name
        if name in ("away", "failed"):
            raise (UnavailableError if name == "away" else GanscaleError)(name)
        return sync.SyncResult(7, 3, 2 if name == "last" else 0, "there")

    monkeypatch.setattr(sync, "synchronize", answer)
    paths = [str(tmp_path / name) for name in ("first", "away", "none", "failed", "last")]
    assert main(["sync", *paths]) == 1  # of 75, 2 and 1
    shown = capsys.readouterr()
    assert shown.out.count("W&B has all 7 rows (3 sent now)") == 2
    assert shown.out.count("for 2 of them, W&B keeps") == 1
    assert shown.err.count("error: ") == 3
    assert main(["sync", paths[1]]) == 75


def test_a_copy_is_sent_as_a_run_of_its_own_where_its_original_can_be_seen(
    tmp_path, monkeypatch, capsys
):
    original = RunFolder(tmp_path / "original")
    original.path.mkdir()
    original.write_config(resolve([*TINY, f"run.folder={tmp_path}", "run.name=original"]).to_yaml())
    claim_identity(original, None, "data")
    copies = [shutil.copytree(original.path, tmp_path / name) for name in ("copy", "mirror")]
    sent: list[WandbIdentity] = []

    def answer(folder, identity, *arguments):
        sent.append(identity)
        return sync.SyncResult(7, 3, 0, "there")

    monkeypatch.setattr(sync, "synchronize", answer)
    for path in (copies[0], copies[0], original.path):
        assert main(["sync", str(path)]) == 0
    assert capsys.readouterr().out.count("is a copy of") == 1
    shutil.rmtree(original.path)  # as on another machine
    assert main(["sync", str(copies[1])]) == 0
    names_and_ids = [(identity.name, identity.run_id) for identity in sent]
    own, first = names_and_ids[0][1], names_and_ids[2][1]
    assert own != first
    assert names_and_ids == [("copy", own)] * 2 + [("original", first), ("mirror", first)]


def test_the_config_in_wandb_has_the_newest_sessions_only(tmp_path):
    folder = RunFolder(tmp_path)
    folder.identity.write_text('{"id": "x"}')
    folder.sessions.write_text("".join(f'{{"images_seen": {n}}}\n' for n in range(300)))
    config = wandb_identity(resolve(TINY).config, folder).config
    assert [session["images_seen"] for session in config["sessions"]] == [*range(280, 300)]
    assert config["session"] == config["sessions"][-1]


def write_listed(folder, **files: bytes) -> None:
    """Files of a checkpoint, and the list of them."""
    folder.mkdir(parents=True)
    entry = {"bytes": 1, "sha256": ""}
    (folder / "checksums.json").write_text(
        json.dumps({f"{name}.safetensors": entry for name in files})
    )
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)


@pytest.mark.parametrize("link", ["file", "folder", "summary.json", "samples", "config.yaml"])
def test_nothing_is_sent_that_lies_outside_of_the_run_folder(
    with_account, run_folder, server, tmp_path, link
):
    """Whatever a run of someone else's links to."""
    private = tmp_path / "private"
    write_listed(private, generator=b"secret")
    (private / "summary.json").write_text('{"token": "secret"}')
    folder = run_folder / "checkpoints" / "images-000000192"
    if link == "file":
        write_listed(folder, generator=b"")
        (folder / "generator.safetensors").unlink()
        (folder / "generator.safetensors").symlink_to(private / "generator.safetensors")
    elif link == "folder":
        folder.parent.mkdir()
        folder.symlink_to(private)
    else:
        write_listed(folder, generator=b"weights")
        (run_folder / link).symlink_to(private / link)
    checkpoints = [{"path": str(folder), "aliases": ["last"]}]
    error = synchronize(with_account, run_folder, checkpoints=checkpoints)["error"]
    assert error.startswith("UserError: ")
    sent = [artifact.files for artifact in server.artifacts.values()]
    assert "secret" not in repr([sent, server.runs.get(RUN_ID)])


@pytest.mark.parametrize("listed", ["../../../private", "{folder}/private", "..", "a/../../b"])
def test_no_file_is_sent_that_a_checkpoint_lists_outside_of_itself(
    with_account, run_folder, server, tmp_path, listed
):
    (tmp_path / "private").write_text("secret")
    folder = run_folder / "checkpoints" / "images-000000192"
    write_listed(folder, generator=b"weights")
    checksums = json.loads((folder / "checksums.json").read_text())
    name = listed.format(folder=tmp_path)
    checksums[name] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (folder / "checksums.json").write_text(json.dumps(checksums))
    checkpoints = [{"path": str(folder), "aliases": ["last"]}]
    error = synchronize(with_account, run_folder, checkpoints=checkpoints)["error"]
    assert error.startswith(f"UserError: {folder} was not uploaded: ")
    assert name in error
    sent = [artifact.files for artifact in server.artifacts.values()]
    assert "secret" not in repr([sent, server.runs.get(RUN_ID)])


def test_checkpoints_become_one_version_each(with_account, run_folder, server):
    folder = run_folder / "checkpoints" / "images-000000192"
    write_listed(folder, generator=b"weights")
    (folder / "private.txt").write_bytes(b"not listed")
    checkpoints = [{"path": str(folder), "aliases": ["best", "last"]}]
    train(
        with_account,
        run_folder=run_folder,
        mode="auto",
        first_step=1,
        last_step=3,
        checkpoints=checkpoints,
    )
    (artifact,) = server.artifacts.values()
    assert artifact.state == "COMMITTED"
    assert {"best", "last"} <= {*artifact.aliases}
    assert artifact.files["generator.safetensors"] == b"weights"
    assert {*artifact.files} == {"checksums.json", "generator.safetensors"}
    synchronize(with_account, run_folder, checkpoints=checkpoints)
    assert len(server.artifacts) == 1


def test_a_run_that_is_training_is_left_alone(with_account, run_folder):
    (run_folder / "metrics.jsonl").touch()
    with (run_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = synchronize(with_account, run_folder)
    assert answer["error"].startswith("UserError: the run in")
    assert "is training" in answer["error"]


def test_without_an_api_key_it_says_what_to_do(environment, run_folder):
    assert "WANDB_API_KEY" in synchronize(environment, run_folder)["error"]


def test_a_server_that_is_away_is_reported(with_account, run_folder, server):
    train(with_account, run_folder=run_folder, mode="disabled", first_step=1, last_step=3)
    server.stop()
    error = synchronize(with_account, run_folder)["error"]
    assert error.startswith("UnavailableError: W&B did not take all of")
