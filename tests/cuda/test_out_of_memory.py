"""Too little memory is one sentence: what was tried, and what to change."""

from collections.abc import Mapping

import pytest

from ganscale.cli.main import main
from tests.helpers.runs import Runs

CRITIC = ("critic.target=tests.helpers.hungry_networks:HungryCritic",)
GENERATOR = (
    "generator.target=tests.helpers.hungry_networks:HungryGenerator",
    "training.total_images=64",
)
BATCH = ("training.global_batch_size=64", "training.total_images=256", "log.every_images=128")


def last_words(printed: str) -> str:
    assert "Traceback" not in printed
    (line,) = (line for line in printed.splitlines() if "error: " in line)
    assert line == printed.splitlines()[-1]
    return line.partition("error: ")[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_that_does_not_fit_is_named_with_settings_that_do(
    environment: Mapping[str, str], runs: Runs, ranks: int
) -> None:
    """Real and fake images together, 32 of them fit."""
    settings, per_rank = (*CRITIC, *BATCH), 64 // ranks
    if ranks > 1:
        environment = {"CUDA_VISIBLE_DEVICES": ""}  # they would need a GPU each
    printed = runs.finish("run", *settings, ranks=ranks, exit_code=1, environment=environment)
    message = last_words(printed)
    assert "ran out of memory in `critic`" in message
    assert f"with {per_rank} images per rank: continue with training.accumulate=2, for" in message
    assert "or a smaller training.global_batch_size, and with resume.allow=[training]" in message
    settings = (*settings, f"training.accumulate={per_rank // 16}", "resume.allow=[training]")
    runs.finish("run", *settings, ranks=ranks, environment=environment)
    assert runs.summary("run")["images_seen"] == 256


def test_networks_that_fit_with_no_batch_should_be_smaller(
    environment: Mapping[str, str], runs: Runs
) -> None:
    settings = (*CRITIC, *BATCH, "critic.options.largest_batch=0")
    message = last_words(runs.finish("run", *settings, exit_code=1, environment=environment))
    assert "ran out of memory in `building the networks`, which tries them" in message
    assert "use narrower networks or a smaller data.resolution" in message


def test_samples_that_do_not_fit_are_named(environment: Mapping[str, str], runs: Runs) -> None:
    printed = runs.finish(
        "run", *GENERATOR, exit_code=1, environment={**environment, "IS_HUNGRY": "1"}
    )
    assert "ran out of memory in `samples`, which makes 16 images at a time" in last_words(printed)


def test_the_sample_command_names_the_cpu_as_a_way_out(
    environment: Mapping[str, str],
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs.finish("run", *GENERATOR, environment=environment)
    command = ["sample", str(runs.folder / "run"), "--grid", str(runs.folder / "grid.png")]
    monkeypatch.setenv("IS_HUNGRY", "1")
    assert main(command) == 1
    assert last_words(capsys.readouterr().err).startswith("out of memory while making 16 images")
    monkeypatch.delenv("IS_HUNGRY")
    assert main(command) == 0
