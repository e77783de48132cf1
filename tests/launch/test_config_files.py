"""The files of launch/, read by Accelerate's own launcher."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.launcher.api import LaunchConfig

from tests.helpers.processes import REPOSITORY

LAUNCH = REPOSITORY / "launch"


@pytest.fixture
def would_launch(monkeypatch: pytest.MonkeyPatch):
    """What torch's launcher is asked to start by `accelerate launch arguments`; nothing starts."""

    def launch(*arguments: str) -> LaunchConfig:
        asked: list[argparse.Namespace] = []
        monkeypatch.setattr(torchrun, "run", asked.append)
        launch_command(launch_command_parser().parse_args([*arguments, "train.py"]))
        return torchrun.config_from_args(asked[0])[0]

    return launch


@pytest.mark.parametrize(
    ("arguments", "world_size"),
    [
        pytest.param(["cpu.yaml"], 2, id="cpu"),
        pytest.param(["cpu.yaml", "--num_processes", "3"], 3, id="cpu-3"),
        pytest.param(["cpu.yaml", "--num_processes", "1"], 1, id="cpu-1"),
        pytest.param(["one_gpu.yaml"], 1, id="one_gpu"),
    ],
)
def test_as_many_processes_start_as_the_file_or_the_option_says(
    tmp_path: Path, arguments: list[str], world_size: int
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib\n"
        "rank, size = os.environ.get('RANK', '0'), os.environ.get('WORLD_SIZE', '1')\n"
        "seen = os.environ.get('CUDA_VISIBLE_DEVICES', 'all')\n"
        f"pathlib.Path({str(tmp_path)!r}, rank).write_text(f'{{rank}} of {{size}}: {{seen}}')\n"
    )
    file, *options = arguments
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # `make test` hides GPUs
    subprocess.run(
        [*launcher, "--config_file", str(LAUNCH / file), *options, str(script)],
        env=environment,
        check=True,
        timeout=300,
    )
    gpus = "-1,-1" if file == "cpu.yaml" else "all"
    texts = sorted(path.read_text() for path in tmp_path.iterdir() if path != script)
    assert texts == [f"{rank} of {world_size}: {gpus}" for rank in range(world_size)]


def test_one_machine_means_a_process_for_each_gpu(
    would_launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPUs are pretended: only the launcher's arithmetic is looked at."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    config = would_launch("--config_file", str(LAUNCH / "one_machine.yaml"))
    assert (config.min_nodes, config.nproc_per_node) == (1, 8)
    config = would_launch("--config_file", str(LAUNCH / "one_machine.yaml"), "--num_processes=4")
    assert (config.min_nodes, config.nproc_per_node) == (1, 4)


def test_one_machine_without_a_gpu_means_a_process_for_each_core(
    would_launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = would_launch("--config_file", str(LAUNCH / "one_machine.yaml"))
    assert (config.min_nodes, config.nproc_per_node) == (1, os.cpu_count())


def test_many_machines_meet_at_the_first_one_with_ranks_of_their_own(would_launch) -> None:
    file = str(LAUNCH / "many_machines.yaml")
    second = would_launch("--config_file", file, "--machine_rank=1")
    assert (second.min_nodes, second.max_nodes, second.nproc_per_node) == (2, 2, 8)
    assert second.rdzv_endpoint == "machine-0:29500"
    assert second.rdzv_configs["rank"] == 1
    assert would_launch("--config_file", file).rdzv_configs["rank"] == 0
