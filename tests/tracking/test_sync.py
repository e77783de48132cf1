"""`ganscale sync`: what W&B lacks of a run, once, whatever has happened before."""

import fcntl

import pytest
from sessions import (
    DEADLINE_SECONDS,
    RUN_ID,
    kill,
    recorded_steps,
    start,
    steps,
    synchronize,
    train,
    wait_until,
    wait_until_paused,
)

pytestmark = pytest.mark.timeout(3 * DEADLINE_SECONDS)


def expect_the_record(server, run_folder, run_id: str = RUN_ID) -> None:
    """Every row of the record is at the server, exactly once and in order, with its picture."""
    history = server.runs[run_id].history
    assert steps(history) == recorded_steps(run_folder)
    for name in ("eval/fid", "samples/images"):
        assert steps(history, name) == recorded_steps(run_folder, name)
    assert all(row["progress/images_seen"] == 64 * row["progress/step"] for row in history)


def test_a_run_killed_three_times_has_every_row_once(with_account, run_folder, server):
    """With W&B offline, online, and a server that goes away and comes back."""
    sessions = ((1, 12, "offline"), (9, 25, "auto"), (21, 28, "auto"), (15, 33, "disabled"))
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
        if session == 1:
            wait_until(lambda: RUN_ID in server.runs and server.runs[RUN_ID].history, "rows")
        kill(process)
    server.start()
    assert 0 < len(server.runs[RUN_ID].history) < 33
    assert synchronize(with_account, run_folder)["sent"] > 0
    expect_the_record(server, run_folder)

    assert synchronize(with_account, run_folder)["sent"] == 0
    expect_the_record(server, run_folder)
    assert synchronize(with_account, run_folder)["sent"] == 0

    train(with_account, run_folder=run_folder, mode="auto", first_step=31, last_step=40)
    expect_the_record(server, run_folder)
    assert recorded_steps(run_folder) == list(range(1, 41))


def test_an_offline_run_is_sent_with_pictures_and_alerts(with_account, run_folder, server):
    train(with_account, run_folder=run_folder, mode="offline", first_step=1, last_step=20)
    assert not server.runs
    done = synchronize(with_account, run_folder)
    assert done["sent"] == done["rows"] == 24
    assert done["location"].startswith(server.url)
    expect_the_record(server, run_folder)
    run = server.runs[RUN_ID]
    pictures = [name for name in run.files if name.startswith("media/images")]
    assert len(pictures) == 2
    assert all(name.endswith(".jpg") for name in pictures)
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


def test_checkpoints_become_one_version_each(with_account, run_folder, server):
    folder = run_folder / "checkpoints" / "images-000000192"
    folder.mkdir(parents=True)
    (folder / "generator.safetensors").write_bytes(b"weights")
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
    assert artifact.files == {"generator.safetensors": b"weights"}
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


def test_a_server_that_is_away_is_told_of_as_such(with_account, run_folder, server):
    train(with_account, run_folder=run_folder, mode="disabled", first_step=1, last_step=3)
    server.stop()
    error = synchronize(with_account, run_folder)["error"]
    assert error.startswith("UnavailableError: W&B did not take all of")
