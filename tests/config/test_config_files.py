"""Several files and the command line become one run: what comes later wins."""

from typing import Any

import pytest

from ganscale.config import resolve
from ganscale.errors import UserError
from ganscale.training.augmentation import run_pipeline
from tests.helpers.config_folder import BASE
from tests.helpers.processes import REPOSITORY


def test_a_later_file_and_then_the_command_line_win(folder):
    second = folder.write("second.yaml", "training: {total_images: 60k, accumulate: 2}\nseed: 1")
    third = folder.write("third.yaml", "training: {accumulate: 4}")
    config = resolve([folder.base, second, third, "seed=3", "data.flip=true"]).config
    assert (config.training.total_images, config.training.accumulate) == (60_000, 4)
    assert (config.seed, config.data.flip, config.data.resolution) == (3, True, 8)
    config = resolve(["seed=3", folder.base, third, second]).config
    assert (config.training.accumulate, config.seed) == (2, 3)


def test_the_first_file_names_the_run_unless_it_is_named(folder):
    other = folder.write("other.yaml", "seed: 1")
    assert resolve([folder.base, other]).config.run.name == "base"
    assert resolve([folder.base, "run.name=mine"]).config.run.name == "mine"


def test_included_files_come_first_relative_to_the_includer_and_are_merged(folder):
    folder.write("parts/loss.yaml", "objective: {loss: {name: wgan}, n_critic: 5}\nseed: 1")
    folder.write("parts/deep/clip.yaml", "objective: {clip: {value: 0.1}}\nseed: 2")
    folder.write(
        "parts/both.yaml", "include: [loss.yaml, deep/clip.yaml]\nobjective: {n_critic: 3}"
    )
    mine = folder.write("mine.yaml", "include: [parts/both.yaml]\nobjective: {clip: {scope: all}}")
    config = resolve([folder.base, mine]).config
    assert config.objective.loss.name == "wgan"
    assert config.objective.n_critic == 3
    assert config.objective.clip is not None
    assert (config.objective.clip.value, config.objective.clip.scope) == (0.1, "all")
    assert config.seed == 2


def test_a_later_files_objective_takes_the_place_of_an_earlier_one_as_a_whole(folder):
    other = folder.write("other.yaml", "objective: {loss: {name: lsgan}}")
    resolved = resolve([folder.base, other])
    assert resolved.config.objective.penalties == {}
    assert resolved.config.objective.n_critic == 1
    # The sections that the file does not mention stay, and so do those merged key by key.
    assert resolved.config.generator.options == {"width": 8}
    assert resolved.config.optimizer.critic.betas == [0, 0.9]
    assert "objective.n_critic" not in resolved.origin
    assert resolve([other, folder.base]).config.objective.n_critic == 5
    assert resolve([f"include={other}", folder.base]) == resolved  # as a sweep's agent passes it


@pytest.mark.parametrize("section", ["generator", "critic", "optimizer"])
def test_half_a_section_of_a_later_file_is_not_completed_by_an_earlier_one(folder, section):
    text = f"{section}: {{}}" if section == "optimizer" else f"{section}: {{options: {{depth: 1}}}}"
    assert f"the config lacks `{section}." in folder.mistake(text)


def test_the_command_line_changes_single_keys_of_a_section(folder):
    overrides = [
        "objective.n_critic=2",
        "objective.clip.value=0.5",
        "optimizer.critic.betas=[0.5,1e-1]",
    ]
    config = resolve([folder.base, *overrides]).config
    assert (config.objective.loss.name, config.objective.n_critic) == ("wgan", 2)
    assert config.objective.clip is not None
    assert config.objective.clip.value == 0.5
    assert config.optimizer.critic.betas == [0.5, 0.1]


def test_a_key_with_dots_in_a_file_is_the_key_of_a_section(folder):
    text = "optimizer: {critic.learning_rate: 3, critic: {eps: 1e-3}, generator.learning_rate: 2}"
    found = resolve([folder.base, folder.write("mine.yaml", text)])
    assert found.config.optimizer.critic.learning_rate == 3
    assert found.config.optimizer.critic.eps == 1e-3
    assert found.origin["optimizer.critic.learning_rate"].endswith("mine.yaml")
    sentence = folder.mistake("optimizer: {critic.lerning_rate: 3}")
    assert (
        "unknown key `optimizer.critic.lerning_rate`; did you mean `optimizer.critic." in sentence
    )


def test_anchors_and_merge_keys_of_yaml_are_understood(folder):
    text = "optimizer: {critic: &own {learning_rate: 3, eps: 1}, generator: {<<: *own, eps: 2}}"
    optimizer = resolve([folder.base, folder.write("mine.yaml", text)]).config.optimizer
    assert (optimizer.generator.learning_rate, optimizer.generator.eps) == (3, 2)
    assert optimizer.critic.eps == 1


@pytest.mark.parametrize(
    ("key", "value", "main"),
    [
        ("objective.penalties.r1", "10", "weight"),
        ("objective.clip", "0.01", "value"),
        ("objective.loss", "lsgan", "name"),
        ("generator", "resnet", "target"),
        ("critic", "my.nets:Critic", "target"),
    ],
)
def test_a_plain_value_in_place_of_a_section_means_its_main_setting(folder, key, value, main):
    long = resolve([folder.base, f"{key}.{main}={value}"])
    assert resolve([folder.base, f"{key}={value}"]) == long
    *sections, last = key.split(".")
    text = f"{last}: {value}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    folder.write("part.yaml", text)
    base = "include: [base.yaml, part.yaml]\nrun: {name: base}"
    found = resolve([folder.write("mine.yaml", base)]).config
    assert found == long.config


LSGAN = "objective: {loss: {name: lsgan, options: {a: -1}}, n_critic: 1}"


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("critic.target=resnet", "critic"),
        ("critic=resnet", "critic"),
        ("generator.target=resnet", "generator"),
        ("objective.loss.name=wgan", "objective.loss"),
        ("objective.loss=wgan", "objective.loss"),
    ],
)
def test_another_network_or_loss_does_not_get_the_options_of_the_one_before(
    folder, override, section
):
    folder.write("old.yaml", f"include: [base.yaml]\ncritic: {{options: {{depth: 3}}}}\n{LSGAN}")
    old = str(folder.path / "old.yaml")
    key, value = override.split("=")
    nested = value
    for name in reversed(key.split(".")):
        nested = f"{{{name}: {nested}}}"
    later = folder.write("later.yaml", f"include: [old.yaml]\n<<: {nested}")

    for resolved in (resolve([old, override]), resolve([later])):
        found: Any = resolved.config
        for name in section.split("."):
            found = getattr(found, name)
        assert found.options == {}
        assert not [each for each in resolved.origin if each.startswith(f"{section}.options")]

    own = resolve([old, f"{section}.options.own=1", override])
    assert own.origin[f"{section}.options.own"] == "command line"
    assert [each for each in own.origin if f"{section}.options." in each] == [
        f"{section}.options.own"
    ]
    same = resolve([old, "critic=mlp", "generator=mlp", "objective.loss=lsgan"]).config
    assert (same.critic, same.generator) == (
        resolve([old]).config.critic,
        resolve([old]).config.generator,
    )
    assert same.objective == resolve([old]).config.objective


def test_a_pipeline_that_is_named_none_turns_off_the_augmentation_of_a_file_before_it(folder):
    ada = str(REPOSITORY / "configs" / "augmentation" / "ada.yaml")
    demo = str(REPOSITORY / "configs" / "demo.yaml")
    resolved = resolve([demo, ada, "augmentation.pipeline=none"]).config
    assert (resolved.augmentation.pipeline, run_pipeline(resolved)) == ("none", None)
    with pytest.raises(UserError, match=r"`augmentation.pipeline` must be ada or diffaugment"):
        resolve([demo, "augmentation.probability=0.5"])


def test_a_ready_config_is_found_by_name_where_no_file_has_it(folder, monkeypatch):
    monkeypatch.chdir(folder.path)
    shipped = resolve([str(REPOSITORY / "configs" / "demo.yaml")]).config
    assert resolve(["demo"]).config == shipped
    hinge = [str(REPOSITORY / "configs" / name) for name in ("demo.yaml", "objective/hinge.yaml")]
    for name in ("hinge", "objective/hinge"):
        assert resolve(["demo", name]).config == resolve(hinge).config
    for name in ("ada", "augmentation/ada"):
        assert resolve(["demo", name]).config.augmentation.pipeline == "ada"
    mine = folder.write("mine.yaml", "include: [demo, hinge]\nseed: 3")
    assert resolve([mine]).config.objective.loss.name == "hinge"
    (folder.path / "demo").mkdir()
    assert resolve(["demo"]).config == shipped
    (folder.path / "demo").rmdir()
    folder.write("demo", BASE)
    assert resolve(["demo"]).config.data.path == "data/x"


def test_a_file_may_be_included_twice_without_a_circle(folder):
    folder.write("part.yaml", "seed: 3")
    folder.write("left.yaml", "include: [part.yaml]")
    mine = folder.write("mine.yaml", "include: [left.yaml, part.yaml]")
    assert resolve([folder.base, mine]).config.seed == 3
