"""What W&B has of runs that were trained, sent and swept with the commands."""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ganscale.data.manifest import Manifest
from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import TINY, read_rows
from tests.tracking.sessions import recorded_steps, steps
from tests.tracking.wandb_server import StoredRun, WandbServer

SETTINGS = [
    *(setting for setting in TINY if not setting.startswith("log.wandb")),
    "training.total_images=160",
    "samples.every_images=80",
    "checkpoint.every_images=80",
    "log.artifacts=last",
]


def ganscale(environment: dict[str, str], *arguments: str, prefix: Sequence[str] = ()) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "ganscale", *arguments],
        cwd=REPOSITORY,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def trained(
    with_account: dict[str, str], server: WandbServer, digits: Path, tmp_path: Path
) -> tuple[Path, StoredRun]:
    """The folder of a run of two sessions, and what the server has of it."""
    where = [f"run.folder={tmp_path}", "run.name=tiny", f"data.path={digits}"]
    ganscale(with_account, "train", *SETTINGS, *where, "training.total_images=64")
    ganscale(with_account, "train", *SETTINGS, *where)
    (run,) = server.runs.values()
    return tmp_path / "tiny", run


def test_a_run_is_completely_in_wandb(trained, server, digits, with_account):
    folder, run = trained
    rows: list[dict[str, Any]] = list(read_rows(folder / "metrics.jsonl"))
    assert len(run.history) == len(rows)
    assert steps(run.history) == recorded_steps(folder)
    assert [row["progress/images_seen"] for row in run.history] == [
        row["progress/images_seen"] for row in rows
    ]
    numbers = [(k, v) for k, v in rows[-2].items() if isinstance(v, float)]
    assert len(numbers) > 50
    sent = run.history[-2]
    assert all(sent[name] == pytest.approx(value, nan_ok=True) for name, value in numbers)
    histogram = sent["logits/real_histogram"]
    assert histogram["_type"] == "histogram"
    assert histogram["values"] == rows[-2]["logits/real_histogram"]["counts"]

    for name, count in {"ema": 4, "non_ema": 4, "interpolation": 4, "real": 1}.items():
        shown = [row[f"samples/{name}"] for row in run.history if f"samples/{name}" in row]
        assert len(shown) == count
        assert all(image["path"] in run.files and image["format"] == "jpg" for image in shown)

    config = {
        name: entry["value"] for name, entry in json.loads(run.config).items() if name != "_wandb"
    }
    assert config["generator"]["options"] == {"width": 4}
    assert [session["images_seen"] for session in config["sessions"]] == [0, 64]
    session = config["session"]
    assert session["data_fingerprint"] == Manifest.load(str(digits)).fingerprint
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if revision.returncode == 0:  # not where only the files were copied to
        assert session["git"]["revision"] == revision.stdout.strip()
    assert session["cluster"]["world_size"] == 1
    assert {"python", "torch", "cuda", "ganscale", "wandb"} <= {*session["versions"]}

    assert run.alerts == ["tiny: done"]
    (data,) = (server.artifacts[key] for key in run.inputs)  # once, in two sessions
    assert (data.type, data.name) == ("dataset", digits.name)
    assert data.files == {"fingerprint.txt": f"{session['data_fingerprint']}\n".encode()}
    newest = [each for each in server.artifacts.values() if "latest" in each.aliases][-1]
    weights = folder / "checkpoints" / "images-000000160" / "generator.safetensors"
    assert newest.files["generator.safetensors"] == weights.read_bytes()

    artifacts = len(server.artifacts)
    assert "(0 sent now)" in ganscale(with_account, "sync", str(folder))
    assert len(run.history) == len(rows)
    assert len(server.artifacts) == artifacts


def test_a_sweep_finds_the_objective_among_other_parameters(tmp_path):
    sweep = yaml.safe_load((REPOSITORY / "configs/sweeps/objectives.yaml").read_text())
    *command, last = sweep["command"]
    assert last == "${args_no_hyphens}"
    program = tmp_path / "ganscale"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    parameters = ["a=1 2", "include=configs/objective/r1.yaml", "b=[3]"]
    done = subprocess.run(
        [*command, *parameters],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_RUN_ID": "id"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.splitlines() == [
        *("train", "configs/demo.yaml", "a=1 2", "include=configs/objective/r1.yaml", "b=[3]"),
        *("run.folder=runs/objectives", "run.name=r1-id"),
    ]


def test_the_array_of_objectives_has_the_documented_names():
    """`ganscale report runs/objectives-*`, and for W&B's agent `runs/objectives/*`."""
    lines = (REPOSITORY / "configs/sweeps/objectives.txt").read_text().splitlines()
    names = {line.split()[1] for line in lines if line and not line.startswith("#")}
    objectives = {path.stem for path in REPOSITORY.glob("configs/objective/*")}
    assert names == {f"run.name=objectives-{name}" for name in objectives}
    for document in ("docs/tracking.md", "docs/cluster.md", "configs/sweeps/objectives.txt"):
        assert "ganscale report runs/objectives-*" in (REPOSITORY / document).read_text()


def test_a_sweep_trains_the_objectives_it_is_given(with_account, server, digits, tmp_path):
    """The real sweep file with a smaller config, since the demo takes minutes."""
    sweep = yaml.safe_load((REPOSITORY / "configs/sweeps/objectives.yaml").read_text())
    chosen = sweep["parameters"]["include"]["values"]
    files = sorted(str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("configs/objective/*"))
    assert chosen == files
    tiny = shlex.join([*SETTINGS, f"data.path={digits}"])
    assert "configs/demo.yaml" in sweep["command"][2]
    sweep["command"][2] = sweep["command"][2].replace("configs/demo.yaml", tiny)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    server.sweep_runs = [
        {
            "run_id": "swept",
            "program": None,
            "args": {"include": {"value": str(REPOSITORY / "configs/objective/hinge.yaml")}},
        }
    ]
    scripts = str(Path(sys.executable).parent)
    environment = {**with_account, "PATH": f"{scripts}:{with_account['PATH']}"}
    for command in (["sweep", "sweep.yaml"], ["agent", "tester/ganscale/sweep"]):
        done = subprocess.run(
            ["wandb", *command],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1", "WANDB_ENTITY": "tester"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
    folder = tmp_path / "runs" / "objectives" / "hinge-swept"
    assert steps(server.runs["swept"].history) == recorded_steps(folder)
    assert len(recorded_steps(folder)) == 5
    assert json.loads((folder / "run.json").read_text())["id"] == "swept"  # for `ganscale sync`
    assert server.runs["swept"].project == "ganscale"
    config = json.loads(server.runs["swept"].config)
    assert config["objective"]["value"]["loss"]["name"] == "hinge"
    assert config["include"]["value"].endswith("configs/objective/hinge.yaml")


@pytest.mark.parametrize("home", ["unknown", "missing", "read-only"])
def test_a_run_is_completely_in_wandb_also_without_a_home_folder(
    with_account: dict[str, str], server: WandbServer, digits: Path, tmp_path: Path, home: str
) -> None:
    """In a container, a user may have neither HOME nor an entry in /etc/passwd."""
    as_nobody_known = ["unshare", "--user", "--map-user=54321"]
    if subprocess.run([*as_nobody_known, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare (Debian: util-linux), and user namespaces")
    del with_account["HOME"], with_account["NETRC"]
    if home != "unknown":
        with_account["HOME"] = "/proc/home" if home == "missing" else "/proc"
    where = [f"run.folder={tmp_path}", "run.name=tiny", f"data.path={digits}"]
    settings = [*SETTINGS, *where, "training.total_images=64"]
    printed = ganscale(with_account, "train", *settings, prefix=as_nobody_known)
    assert "WARNING" not in printed
    (run,) = server.runs.values()
    assert steps(run.history) == recorded_steps(tmp_path / "tiny")
    assert {artifact.type for artifact in server.artifacts.values()} == {"model", "dataset"}
    assert run.inputs


def test_evaluations_and_the_best_figures_are_in_wandb(
    with_account: dict[str, str], server: WandbServer, digits: Path, tmp_path: Path
) -> None:
    where = [f"run.folder={tmp_path}", "run.name=judged", f"data.path={digits}"]
    where += [f"data.cache={tmp_path}/cache", "log.artifacts=none", "samples.every_images=160"]
    printed = ganscale(
        with_account,
        "train",
        *SETTINGS,
        *where,
        "evaluation.every_images=64",
        "evaluation.samples=40",
        "evaluation.network=tests.helpers.feature_networks:Projection",
        "evaluation.metrics=[fd,is]",
    )
    assert "W&B cannot take" not in printed
    ganscale(with_account, "sync", str(tmp_path / "judged"))  # if the machine was too busy
    (run,) = server.runs.values()
    rows = [row for row in read_rows(tmp_path / "judged" / "metrics.jsonl") if "eval/failed" in row]
    assert len(rows) == 3
    sent = [row for row in run.history if "eval/failed" in row]
    for row, expected in zip(sent, rows, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    best = json.loads((tmp_path / "judged" / "summary.json").read_text())["best_figures"]
    assert set(best) == {"eval/fd_Projection", "eval/is_Projection", "eval/identity"}
    assert run.summary["best_figures"] == best
    # Beside the newest, under its own name.
    assert run.summary["eval/fd_Projection"] == pytest.approx(rows[-1]["eval/fd_Projection"])
