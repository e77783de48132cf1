"""The tracker with the real W&B client, in separate processes, against a server on loopback."""

import json
from pathlib import Path

from tests.tracking.sessions import (
    API_KEY,
    DEADLINE_SECONDS,
    kill,
    offline_records,
    recorded_steps,
    start,
    steps,
    train,
    wait_until_paused,
)


def test_an_offline_run_has_every_row_once_over_images_seen(environment, run_folder):
    outcome = train(environment, run_folder=run_folder, mode="offline", first_step=1, last_step=20)

    rows = [record["item"] for record in offline_records(run_folder, "history")]
    assert steps(rows) == list(range(1, 21))
    assert steps(rows, "logits/wasserstein") == [10, 20]
    assert all(row["progress/images_seen"] == 64 * row["progress/step"] for row in rows)
    assert all(row["loss/generator"] == "NaN" for row in rows if "loss/generator" in row)
    images = [row for row in rows if "samples/images.path" in row]
    assert [row["samples/images.format"] for row in images] == ["jpg", "jpg"]
    axes = {r["glob_name"]: r["step_metric"] for r in offline_records(run_folder, "metric")[1:]}
    assert axes == {"*": "progress/images_seen"}
    (alert,) = offline_records(run_folder, "alert")
    assert alert["title"] == "a run: not finite"
    assert Path(outcome["location"]).parent == run_folder / "wandb"


def test_fragments_of_a_run_resumed_twice_share_no_step(environment, run_folder):
    for first, last in ((1, 12), (9, 25), (21, 30)):
        train(environment, run_folder=run_folder, mode="offline", first_step=first, last_step=last)
    rows = [record["item"] for record in offline_records(run_folder, "history")]
    assert steps(rows) == recorded_steps(run_folder) == list(range(1, 31))
    assert steps(rows, "logits/wasserstein") == [10, 20, 30]
    wandb_steps = [row["_step"] for row in rows]
    assert wandb_steps == sorted(set(wandb_steps))


def test_a_run_resumed_twice_arrives_once_at_the_server(with_account, run_folder, server):
    for first, last in ((1, 12), (13, 13), (9, 30)):
        outcome = train(
            with_account, run_folder=run_folder, mode="online", first_step=first, last_step=last
        )
        assert outcome["location"].startswith(server.url)
    run = server.runs["same-run"]
    assert steps(run.history) == recorded_steps(run_folder) == list(range(1, 31))
    assert steps(run.history, "logits/wasserstein") == [10, 20, 30]
    assert steps(run.history, "samples/images") == [10, 20, 30]
    assert run.summary["final/critic"] == 0.5
    assert run.exit_code == 0
    assert json.loads(run.config)["world_size"]["value"] == 9


def test_a_run_killed_at_any_moment_continues_its_record(environment, run_folder):
    killed = start(
        environment, run_folder=run_folder, mode="offline", first_step=1, last_step=20, pause_at=15
    )
    wait_until_paused(killed)
    kill(killed)
    assert recorded_steps(run_folder) == list(range(1, 16))

    train(environment, run_folder=run_folder, mode="offline", first_step=11, last_step=20)
    assert recorded_steps(run_folder) == list(range(1, 21))


def test_a_score_whose_evaluation_was_cut_short_is_not_counted_as_sent(
    with_account, run_folder, server
):
    """The first process ends at step 10 with the meters logged, but not the evaluation."""
    arguments = {"run_folder": run_folder, "mode": "auto"}
    train(with_account, **arguments, first_step=1, last_step=10, evaluation_interval=0)
    train(with_account, **arguments, first_step=6, last_step=12)
    assert steps(server.runs["same-run"].history) == list(range(1, 13))
    assert steps(server.runs["same-run"].history, "logits/wasserstein") == [10]


def test_rows_of_sessions_without_wandb_are_sent_by_the_next_one_that_has_it(
    with_account, run_folder, server
):
    train(with_account, run_folder=run_folder, mode="disabled", first_step=1, last_step=12)
    assert not server.runs
    train(with_account, run_folder=run_folder, mode="offline", first_step=9, last_step=12)
    assert not server.runs
    train(with_account, run_folder=run_folder, mode="auto", first_step=9, last_step=15)
    assert steps(server.runs["same-run"].history) == list(range(1, 16))
    assert steps(server.runs["same-run"].history, "samples/images") == [10]


def test_without_an_api_key_a_run_is_offline_without_a_prompt(environment, run_folder, server):
    environment["WANDB_BASE_URL"] = server.url
    outcome = train(environment, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert "no Weights & Biases API key" in outcome["output"]
    assert "offline-run" in outcome["location"]
    assert not server.runs


def test_an_api_key_in_netrc_is_found(environment, run_folder, server):
    host = server.url.removeprefix("http://")
    Path(environment["NETRC"]).write_text(f"machine {host} login user password {API_KEY}\n")
    Path(environment["NETRC"]).chmod(0o600)
    environment["WANDB_BASE_URL"] = server.url
    train(environment, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert steps(server.runs["same-run"].history) == [1, 2, 3]


def test_wandb_mode_decides_if_the_config_does_not(with_account, run_folder, server):
    with_account["WANDB_MODE"] = "offline"
    outcome = train(with_account, run_folder=run_folder, mode="auto", first_step=1, last_step=3)
    assert "offline-run" in outcome["location"]
    assert not server.runs


def test_online_without_an_api_key_says_what_to_do(environment, run_folder):
    process = start(environment, run_folder=run_folder, mode="online", first_step=1, last_step=3)
    _, stderr = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode != 0
    assert "UserError: tracking online needs a Weights & Biases API key" in stderr
    assert "WANDB_API_KEY" in stderr


def test_files_in_the_current_folder_are_not_taken_for_modules(
    environment, run_folder, tmp_path, monkeypatch
):
    for name in ("random.py", "types.py", "queue.py"):
        (tmp_path / name).write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    train(environment, run_folder=run_folder, mode="offline", first_step=1, last_step=3)
    assert len(offline_records(run_folder, "history")) == 3
