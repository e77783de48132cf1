"""The planned peak of device memory is that of cycles which really run, on a CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.ranks import run_ranks
from ganscale.cli.main import main
from ganscale.config import resolve
from ganscale.objectives.objective import build_objective
from ganscale.plan.device_memory import MemoryPlanner, usable_bytes
from ganscale.plan.meta_autocast import IN_FLOAT32, IN_LOWER_PRECISION, PROMOTED, TO_FLOAT32
from ganscale.plan.planning import make_plan
from ganscale.schema import Config
from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import TINY
from tests.plan.conftest import config_of as digits_config
from tests.plan.cycle_memory import small_config, tracked_peak

DEADLINE_SECONDS = 300
WIDTH_32 = ["data.path=x", "generator.options.width=32", "critic.options.width=32"]
PROCESSES = {
    "wgan_gp resnet32": ["resnet32.yaml", *WIDTH_32, "objective.n_critic=1"],
    "non_saturating dcgan64": ["dcgan64.yaml", *WIDTH_32, "critic.options.norm=none"],
}


def planner(config: Config, classes: int = 0, ranks: int = 1) -> MemoryPlanner:
    return MemoryPlanner(config, build_objective(config.objective), classes, ranks)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_planned_peak_is_within_a_tenth_of_what_a_process_grows_by(name):
    (file, *settings), batch = PROCESSES[name], 128
    settings = [str(REPOSITORY / "configs" / file), *settings]
    # Blocks above this size are the system's as soon as they are freed.
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    grown = subprocess.run(
        [sys.executable, "-m", "tests.plan.cycle_memory", str(batch), *settings],
        env={**os.environ, **returning},
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        timeout=DEADLINE_SECONDS,
    )
    assert planner(resolve(settings).config).peak(batch) == pytest.approx(
        int(grown.stdout), rel=0.1
    )


# Objective, networks, and settings.
TRACKED = {
    "wgan_gp": ("wgan_gp", "dcgan32"),
    "contiguous": ("wgan_gp", "dcgan32", "training.memory_format=contiguous"),
    "float64": ("wgan_gp", "resnet32", "training.precision=float64"),
    "bfloat16": ("wgan_gp", "dcgan32", "training.precision=bfloat16"),
    "bfloat16 spectral norm": (
        *("hinge", "dcgan32", "training.precision=bfloat16", "critic.target=resnet"),
        "critic.options.spectral_norm=true",
    ),
    "bfloat16 penalty": (
        *("wgan_gp", "dcgan32", "training.precision=bfloat16"),
        "training.penalty_precision=autocast",
    ),
    "no penalty": ("non_saturating", "resnet32"),
    "clipping": ("wgan", "dcgan32"),
    "two penalties": ("r3gan", "resnet32"),
    "grouped convolutions": (
        *("r3gan", "r3gan_emoji32", "training.precision=float32"),
        "training.penalty_precision=float32",
    ),
    "lazy penalty": ("r1", "dcgan32", "objective.penalties.r1.interval=2"),
    "dragan": ("dragan", "dcgan32"),
    "path length": (
        *("r1", "dcgan32", "generator.target=benchmarks.tiny_networks:TinyStyleGenerator"),
        *("generator.options.width=16", "objective.generator_penalties.path_length=2"),
        "objective.generator_penalties.path_length.interval=2",
    ),
    "micro-batches": ("wgan_gp", "resnet32", "training.accumulate=4"),
    "global means": ("relativistic_average", "dcgan32", "training.accumulate=2"),
    "reused fakes": ("non_saturating", "dcgan32", "training.reuse_fakes=true"),
    "layer norm": ("wgan_gp", "dcgan32", "critic.options.norm=layer"),
    "spectral norm": ("hinge", "resnet32", "critic.options.spectral_norm=true"),
    "classes": ("wgan_gp", "resnet32", "training.conditional=true"),
    "checkpoints": ("r1", "resnet32", "critic.target=tests.plan.cycle_memory:CheckpointedCritic"),
    "optimizers": (
        *("hinge", "dcgan32", "training.gradient_clip=1", "optimizer.generator.name=sgd"),
        *("optimizer.critic.name=rmsprop", "optimizer.critic.momentum=0.5"),
    ),
}


@pytest.mark.parametrize("case", TRACKED.values(), ids=TRACKED)
def test_the_planned_peak_is_that_of_the_tensors_of_a_run(runtime, case):
    """The same count, over tensors of the CPU."""
    config = small_config(*case)
    classes = 10 if config.training.conditional else 0
    peak = planner(config, classes).peak(config.training.global_batch_size)
    assert peak == pytest.approx(tracked_peak(config, runtime, classes), rel=0.01)


RANKS = ("wgan_gp", "micro-batches", "global means", "two penalties")


def test_the_planned_peak_is_that_of_each_of_two_real_ranks(tmp_path):
    configs = {name: small_config(*TRACKED[name]) for name in RANKS}
    (tmp_path / "cases.json").write_text(json.dumps({name: TRACKED[name] for name in RANKS}))
    run_ranks("tests.plan.cycle_memory:run", tmp_path, 2, DEADLINE_SECONDS)
    found = json.loads((tmp_path / "found.json").read_text())
    planned = {name: planner(each, ranks=2).peak(16) for name, each in configs.items()}
    assert planned == {name: pytest.approx(peak, rel=0.02) for name, peak in found.items()}


def test_autocast_on_the_meta_device_has_the_rules_for_cuda_of_the_installed_torch():
    """Those of its header, for what torch has Python functions of."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"

    def names(macro: str) -> set[str]:
        (block,) = re.findall(rf"#define {macro}\(_\)((?:.*\\\n)*.*)", header.read_text())
        found = set(re.findall(r"_\((\w+)", block))
        return {
            each for each in found if each[0] != "_" and (hasattr(torch, each) or hasattr(F, each))
        }

    assert names("AT_FORALL_LOWER_PRECISION_FP") <= IN_LOWER_PRECISION
    resampling = {name for name in names("AT_FORALL_FP32") if "upsample" in name}
    assert names("AT_FORALL_FP32") - resampling <= IN_FLOAT32
    assert names("AT_FORALL_FP32_SET_OPT_DTYPE") <= TO_FLOAT32
    assert names("AT_FORALL_PROMOTE") <= PROMOTED


@pytest.mark.parametrize("name", ["wgan_gp", "micro-batches", "no penalty"])
def test_the_batch_that_fits_a_gpu_fits_it_and_a_larger_one_does_not(name):
    config = small_config(*TRACKED[name])
    of_run = planner(config)
    gpus = (2, 80)
    for gpu, images in zip(gpus, of_run.largest_batches(gpus), strict=True):
        assert images % config.training.accumulate == 0
        larger = images + max(images // 50, 1) * config.training.accumulate
        assert 0.999 * of_run.peak(images) < usable_bytes(gpu) < of_run.peak(larger)


def test_a_run_that_does_not_fit_is_refused_and_what_is_offered_instead_fits(capsys, digits):
    """A GPU of 2 GB has 800 MB for tensors."""
    settings = ["generator.options.width=64", "critic.options.width=64"]
    settings.append("training.global_batch_size=2048")
    arguments = [*TINY, *settings, f"data.path={digits}", "--nodes", "2", "--gpu-memory", "2"]
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert "of device memory, but a GPU of 2 GB has 762.94 MiB for it" in said
    offered = re.findall(r"training\.\w+=\d+", said)
    assert [setting.partition("=")[0] for setting in offered] == [
        "training.global_batch_size",
        "training.accumulate",
    ]
    for setting in offered:
        memory = make_plan(digits_config(digits, *settings, setting), 2, 1, 2).device_memory
        assert memory is not None
        assert memory.peak_bytes <= usable_bytes(2)


def test_networks_that_need_values_are_planned_but_for_device_memory(digits):
    config = digits_config(digits, "critic.target=tests.plan.cycle_memory:AskingCritic")
    plan = make_plan(config, 1, 1)
    assert plan.device_memory is None
    assert plan.networks.critic_parameters > 0
    (remark,) = (each for each in plan.remarks if "peak of device memory is unknown" in each)
    assert "item" in remark
