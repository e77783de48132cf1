"""A run does not know its cluster: the same curve on one rank and on two."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from ganscale.config import resolve
from ganscale.runtime import Runtime
from ganscale.training.trainer import Trainer
from tests.helpers.processes import REPOSITORY
from tests.helpers.runs import SCHEDULES, Runs, with_networks

# What tells about this machine and this moment, not about the curve; a stop is audited, too.
_OF_THE_MACHINE = ("perf/", "audit/")


def curve(rows: list[dict]) -> list[dict]:
    """The rows without what differs by machine, each bin of a histogram under a name of its own."""
    return [
        dict(figure for name, value in row.items() for figure in _figures(name, value))
        for row in rows
    ]


def _figures(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name.startswith(_OF_THE_MACHINE):
        return
    if not isinstance(value, dict):
        yield name, value
        return
    for part, numbers in value.items():
        yield from ((f"{name} {part} {i}", number) for i, number in enumerate(numbers))


# A rate at which much happens within the test: the critic's loss falls from +10 to -10.
_LENGTH = (
    "training.total_images=1600",
    "optimizer.critic.learning_rate=1e-3",
    "optimizer.generator.learning_rate=1e-3",
)


# name: settings, tolerance
CASES = {
    # Adam amplifies the last bits from step to step: in 100 critic and 50 generator steps from
    # 1e-16 to 2e-9. In float32 curves stay within 2e-7 (with an epsilon that keeps tiny second
    # moments from dividing) until a ReLU's input changes its sign by rounding, in the 7th to the
    # 16th cycle of three seeds, with or without a fast double backward; after 25 cycles they are
    # within 5e-3. A wrong gradient is off by 1e-2 at once.
    "float64": (["training.precision=float64"], 1e-7),
    "float32": (
        [
            "training.total_images=160",
            "optimizer.critic.eps=1e-3",
            "optimizer.generator.eps=1e-3",
        ],
        1e-5,
    ),
    "accumulated": (
        [
            "training.precision=float64",
            "training.accumulate=2",
            "data.flip=true",
            "training.gradient_clip=1",
            *SCHEDULES,
        ],
        1e-7,
    ),
    "conditional_resnet_with_spectral_norm": (
        [
            "training.precision=float64",
            "training.conditional=true",
            "generator={target: resnet, latent_dim: 16, options: {width: 4}}",
            "critic={target: resnet, options: {width: 4, spectral_norm: true}}",
        ],
        1e-7,
    ),
    "conditional_r3gan_on_fresh_images": (
        [
            "training.precision=float64",
            "training.conditional=true",
            "training.generator_real=fresh",
            str(REPOSITORY / "configs" / "objective" / "r3gan.yaml"),
        ],
        1e-7,
    ),
    "clipped_wgan_on_kept_fakes": (
        [
            "training.precision=float64",
            str(REPOSITORY / "configs" / "objective" / "wgan.yaml"),
            "objective.clip.value=0.05",
            "training.reuse_fakes=true",
        ],
        1e-7,
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[int, Runs]:
    """The runs of all cases on one rank and on two, which are started once for all of them."""
    runs = {ranks: Runs(tmp_path_factory.mktemp("ranks"), digits) for ranks in (1, 2)}
    for ranks, of_ranks in runs.items():
        cases = {
            name: of_ranks.settings(name, *_LENGTH, *case) for name, (case, _) in CASES.items()
        }
        name = "conditional_r3gan_on_fresh_images"
        cases[name] = with_networks("r3gan", cases[name])
        (of_ranks.folder / "cases.json").write_text(json.dumps([*cases.values()]))
        run_ranks("tests.distributed.test_promise:train", of_ranks.folder, ranks, seconds=600)
    return runs


def train(folder: Path) -> None:
    runtime = Runtime.start(timeout_seconds=300)
    for settings in json.loads((folder / "cases.json").read_text()):
        assert Trainer(resolve(settings), runtime).run() == 0
    runtime.close()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_log_the_same_curve_as_one(trained: dict[int, Runs], name: str) -> None:
    assert trained[2].summary(name)["sessions"] == [{"images_seen": 0, "world_size": 2}]
    one, two = (curve(trained[ranks].rows(name)) for ranks in (1, 2))
    assert len(one) == len(two) == trained[1].summary(name)["steps"] >= 5
    tolerance = CASES[name][1]
    for row_of_one, row_of_two in zip(one, two, strict=True):
        assert row_of_one.keys() == row_of_two.keys()
        for key, value in row_of_one.items():
            assert math.isclose(value, row_of_two[key], rel_tol=tolerance, abs_tol=tolerance), (
                key,
                row_of_one["progress/images_seen"],
            )
