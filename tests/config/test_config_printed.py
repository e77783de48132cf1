"""What is shipped and printed: ready configs, `ganscale config`, the page of settings."""

import inspect
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

from ganscale.cli.main import main
from ganscale.config import resolve
from ganscale.networks.build import NETWORKS
from ganscale.objectives.losses import LOSSES
from ganscale.objectives.penalties import PENALTIES
from ganscale.schema import Config, PenaltyConfig
from ganscale.setting import settings_of, types_of
from ganscale.settings_reference import annotated_yaml, reference
from tests.helpers.processes import REPOSITORY


def shipped(pattern: str) -> list[Path]:
    return sorted((REPOSITORY / "configs").glob(pattern))


@pytest.mark.parametrize("path", shipped("*.yaml"), ids=lambda path: path.stem)
def test_every_config_that_is_shipped_is_a_complete_run(path):
    assert resolve([str(path)]).config.run.name == path.stem


@pytest.mark.parametrize(
    "path",
    shipped("objective/*.yaml") + shipped("augmentation/*.yaml"),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_piece_that_is_shipped_completes_a_run(folder, path):
    resolved = resolve([folder.base, str(path)])
    assert str(path) in resolved.origin.values()


def test_the_shipped_objectives_are_those_of_the_papers(folder):
    def built(name: str):
        path = REPOSITORY / "configs" / "objective" / f"{name}.yaml"
        return resolve([folder.base, str(path)]).config

    gp = built(
        "wgan_gp"
    )  # Gulrajani et al., algorithm 1: lambda 10, n_critic 5, Adam(1e-4, 0, 0.9)
    assert (gp.objective.n_critic, gp.objective.penalties["wgan_gp"].weight) == (5, 10)
    assert (gp.optimizer.critic.learning_rate, gp.optimizer.critic.betas) == (1e-4, [0, 0.9])
    clipped = built("wgan")  # Arjovsky et al., algorithm 1: c 0.01, n_critic 5, RMSProp(5e-5)
    assert clipped.objective.clip is not None
    assert (clipped.objective.n_critic, clipped.objective.clip.value) == (5, 0.01)
    assert (clipped.optimizer.critic.name, clipped.optimizer.critic.learning_rate) == (
        "rmsprop",
        5e-5,
    )
    assert clipped.objective.penalties == {}


def origins(annotated: str) -> dict[str, str]:
    """The comment after each value, by dotted key."""
    found, path = {}, []
    for line in annotated.splitlines():
        match = re.match(r"( *)'?([\w-]+)'?:.*?(?:  # (.*))?$", line)
        if match is None:
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        if match[3]:
            found[".".join(path)] = match[3]
    return found


@pytest.mark.parametrize("explain", [False, True])
def test_each_value_is_printed_with_the_file_that_it_came_from(folder, explain):
    folder.write("part.yaml", "objective: {loss: {name: wgan}, n_critic: 3}\nseed: 5")
    mine = folder.write(
        "mine.yaml",
        "include: [part.yaml]\nobjective: {clip: {value: 1}}\n"
        "generator: {target: mlp, options: {'n': {deep: 3}, sizes: [1, 2]}}",
    )
    resolved = resolve([folder.base, mine, "data.flip=true"])
    found = origins(annotated_yaml(resolved, explain=explain))
    part = str(folder.path / "part.yaml")
    expected = {
        "seed": part,
        "objective.n_critic": part,
        "objective.clip.value": mine,
        "objective.clip.scope": "default",
        "objective.penalties": "default",  # not the first file's any more
        "generator.options.n.deep": mine,
        "generator.options.sizes": mine,
        "data.flip": "command line",
        "data.resolution": folder.base,
        "data.lanes": "default",
        "optimizer.critic.betas": folder.base,
        "optimizer.generator.betas": "default",
        "run.name": f"name of {folder.base}",
    }
    assert {key: found[key] for key in expected} == expected
    again = folder.write("again.yaml", annotated_yaml(resolved, explain=explain))
    assert resolve([again]).config == resolved.config


def test_the_config_command_prints_the_whole_run(folder, capsys):
    assert main(["config", folder.base, "seed=3"]) == 0
    printed = capsys.readouterr()
    assert "seed: 3  # command line\n" in printed.out
    assert printed.err == ""
    assert yaml.safe_load(printed.out)["training"]["total_images"] == 50_000


def test_the_config_command_explains_each_setting_of_a_run(folder, capsys):
    assert main(["config", folder.base, "--explain"]) == 0
    printed = capsys.readouterr().out
    assert (
        "  # Real images shown to the critic in the whole run. (images, at least 1)\n"
        f"  total_images: 50000  # {folder.base}\n"
    ) in printed
    assert "  #   bfloat16: autocast over float32 weights\n" in printed
    assert "\n# The training images and how they are read.\ndata:\n" in printed


def test_the_config_command_explains_all_settings_without_a_run(capsys):
    assert main(["config", "--explain"]) == 0
    assert capsys.readouterr().out == reference()


def test_the_settings_page_is_up_to_date():
    page = (REPOSITORY / "docs" / "settings.md").read_text()
    assert page == reference(), "run: python -m ganscale.settings_reference > docs/settings.md"


def all_sections(schema: type = Config) -> list[type]:
    """The dataclasses of the schema."""
    sections = [schema]
    for expected in types_of(schema).values():
        if get_origin(expected) is dict:
            expected = get_args(expected)[1]
        if is_dataclass(expected):
            sections += all_sections(expected)  # type: ignore[arg-type]
    return sections


SECTIONS = [*dict.fromkeys(all_sections())]


@pytest.mark.parametrize("section", SECTIONS[1:], ids=lambda each: each.__name__)
def test_a_section_has_one_sentence(section):
    assert re.fullmatch(r"[A-Z].*\.", inspect.getdoc(section) or "", re.DOTALL)
    assert not section.__doc__.startswith(f"{section.__name__}(")  # made by dataclasses


@pytest.mark.parametrize("section", SECTIONS, ids=lambda each: each.__name__)
def test_a_setting_has_a_sentence_and_all_or_no_choices_have_a_meaning(section):
    for name, setting in settings_of(section).items():
        if setting is None:
            assert is_dataclass(types_of(section)[name]) or name.endswith("penalties"), name
            continue
        assert re.fullmatch(r"[A-Z].*\.", setting.sentence), name
        assert len({bool(meaning) for meaning in setting.choices.values()}) <= 1, name


def test_settings_name_the_networks_losses_and_penalties_that_exist():
    explained = reference()
    assert f"Network: {', '.join(NETWORKS['generator'])}, or your own" in explained
    assert f"Loss: {', '.join(LOSSES)}, or your own" in " ".join(explained.split())
    documented = re.search(r"NAME is (.*), or", " ".join((PenaltyConfig.__doc__ or "").split()))
    assert documented is not None
    assert {*documented[1].split(", ")} == {*PENALTIES}
