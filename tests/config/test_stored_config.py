"""A run keeps its config, loads it as it is, and refuses changes that bend its curve."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ganscale.cli.main import main
from ganscale.config import Resolved, curve_changes, load_stored, resolve
from ganscale.settings_reference import annotated_yaml
from tests.helpers.config_folder import BASE, ConfigFolder


def test_text_with_interpolations_in_it_is_stored_and_loaded_as_text(folder, monkeypatch):
    monkeypatch.setenv("OWN_TOKEN", "token-${seed}")
    config = resolve([folder.base, "data.path=${oc.env:OWN_TOKEN}"]).config
    assert config.data.path == "token-${seed}"


@settings(deadline=None, max_examples=20)
@given(text=st.text("\\\\${}ab:.", max_size=12))
def test_every_text_is_stored_and_loaded_as_it_is(tmp_path_factory, stored, text):
    config = dataclasses.replace(stored, data=dataclasses.replace(stored.data, path=text))
    folder = ConfigFolder(tmp_path_factory.mktemp("text"))
    path = folder.write("config.yaml", Resolved(config, {}).to_yaml())
    assert load_stored(Path(path)).data.path == text
    assert curve_changes(load_stored(Path(path)), config) == []
    assert resolve([path]).config.data.path == text


@pytest.mark.parametrize("shown", [["config"], ["plan"]])
def test_a_stored_run_does_not_read_the_environment(folder, monkeypatch, capsys, shown):
    monkeypatch.setenv("OWN_TOKEN", "not-for-strangers")
    stored = folder.write("run/config.yaml", BASE.replace("data/x", "'${oc.env:OWN_TOKEN}'"))
    assert load_stored(Path(stored)).data.path == "${oc.env:OWN_TOKEN}"
    assert resolve([stored]).config.data.path == "not-for-strangers"
    folder.write("run/run.json", "{}")
    main([*shown, stored])
    assert "not-for-strangers" not in "".join(capsys.readouterr())


words = st.text(
    st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="$\x7f"), min_size=1
).filter(lambda text: text != "???")


numbers = st.floats(allow_nan=False, allow_infinity=False)


options = st.dictionaries(
    st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True),
    st.none() | st.booleans() | st.integers() | numbers | words | st.lists(numbers, max_size=3),
    max_size=4,
)


@settings(deadline=None, max_examples=8)
@given(
    name=words,
    path=st.lists(words, min_size=1, max_size=30).map(" ".join),
    options=options,
    rate=st.floats(0, 1e300),
    seed=st.integers(0, 2**64 - 1),
    clip=st.none() | st.floats(1e-300, 1e300),
)
def test_a_resolved_run_loads_again_as_it_is(
    tmp_path_factory, name, path, options, rate, seed, clip
):
    folder = ConfigFolder(tmp_path_factory.mktemp("round"))
    own = {
        "seed": seed,
        "run": {"name": name},
        "data": {"path": path, "resolution": 8},
        "generator": {"target": "mlp", "options": options},
        "optimizer": {"critic": {"learning_rate": rate}, "generator": {"learning_rate": rate}},
        "training": {"total_images": 10},
    }
    own["objective"] = {"loss": {"name": "wgan"}, "clip": clip and {"value": clip}}
    own["critic"] = {"target": "mlp"}
    resolved = resolve([folder.write("mine.yaml", yaml.safe_dump(own))])
    assert resolved.config.generator.options == options
    assert resolved.config.data.path == path
    commented = [annotated_yaml(resolved, explain=explain) for explain in (False, True)]
    for text in (resolved.to_yaml(), *commented):
        stored = folder.write("stored.yaml", text)
        loaded = load_stored(Path(stored))
        assert loaded == resolved.config
        assert curve_changes(resolved.config, loaded) == []


def test_a_stored_run_is_found_in_a_folder_with_an_equals_sign_in_its_name(folder, monkeypatch):
    stored = folder.write("rate=1e-4/config.yaml", resolve([folder.base]).to_yaml())
    assert load_stored(Path(stored)) == resolve([folder.base]).config
    monkeypatch.chdir(folder.path)
    assert load_stored(Path("rate=1e-4/config.yaml")) == resolve([folder.base]).config


FREE = [
    "run.name=other",
    "log.every_images=5",
    "samples.count=9",
    "checkpoint.keep_last=7",
    "runtime.timeout_seconds=5",
    "data.path=elsewhere",
    "data.workers=0",
    "data.max_bad_fraction=0.5",
    "training.total_images=99k",
]


@pytest.mark.parametrize("override", FREE)
def test_what_does_not_bend_the_curve_may_change(folder, stored, override):
    changed = resolve([folder.base, override]).config
    assert changed != stored
    assert curve_changes(stored, changed) == []


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("data.lanes=8", "data.lanes: 64 -> 8"),
        ("training.global_batch_size=32", "training.global_batch_size: 64 -> 32"),
        ("generator.options.width=9", "generator.options.width: 8 -> 9"),
        ("generator.options.depth=9", "generator.options.depth: not set -> 9"),
        ("objective.penalties.wgan_gp.weight=1", "objective.penalties.wgan_gp.weight: 10.0 -> 1.0"),
        ("optimizer.critic.betas=[0,0.99]", "optimizer.critic.betas: [0.0, 0.9] -> [0.0, 0.99]"),
        ("ema.ramp_up=0", "ema.ramp_up: 0.05 -> 0.0"),
    ],
)
def test_what_bends_the_curve_is_named_unless_it_is_allowed_by_name(
    folder, stored, override, change
):
    assert curve_changes(stored, resolve([folder.base, override]).config) == [change]
    key = override.split("=")[0]
    requested = resolve([folder.base, override]).config
    for allowed in (key, key.split(".")[0]):
        requested.resume.allow = [allowed]
        assert curve_changes(stored, requested) == []
    requested.resume.allow = ["see", "dat", "generato", "optim"]
    assert curve_changes(stored, requested) == [change]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_length_of_a_run_bends_the_curve_when_the_learning_rate_depends_on_it(folder, shape):
    key = "optimizer.critic.learning_rate"
    same = [folder.base, f"{key}={{to: 0, shape: {shape}}}"]
    stored = resolve(same).config
    longer = [*same, "training.total_images=60k"]
    before, after = (
        f"{{from: 0.0001, to: 0.0, over_images: {n}, shape: {shape}}}" for n in (50_000, 60_000)
    )
    assert curve_changes(stored, resolve(longer).config) == [f"{key}: {before} -> {after}"]
    for allowed in (key, "optimizer"):
        assert not curve_changes(stored, resolve([*longer, f"resume.allow=[{allowed}]"]).config)
    assert not curve_changes(stored, resolve([*longer, f"{key}.over_images=50k"]).config)


def test_a_resolution_of_equal_sides_is_that_of_one_number_when_a_run_resumes(stored, folder):
    assert curve_changes(stored, resolve([folder.base, "data.resolution=[8, 8]"]).config) == []
    assert curve_changes(stored, resolve([folder.base, "data.resolution=[8, 16]"]).config) == [
        "data.resolution: 8 -> [8, 16]"
    ]


def test_what_only_one_of_two_runs_has_is_not_set_in_the_other(folder):
    base = [folder.base, "critic=mlp", "objective.penalties={}", "objective.clip=null"]
    less = resolve(base).config
    overrides = ["critic.options.width=8", "objective.clip=0.01"]
    more = resolve([*base, *overrides, "objective.penalties.r1.weight=3"]).config
    keys = {"critic.options.width", "objective.clip.scope", "objective.clip.value"}
    added, removed = curve_changes(less, more), curve_changes(more, less)
    assert {change.partition(": not set -> ")[0] for change in added} >= keys
    assert {change.partition(":")[0] for change in removed if "-> not set" in change} >= keys
    assert not any("{}" in change or "None" in change for change in [*added, *removed])


def test_a_swapped_objective_is_a_change_of_the_curve(folder):
    other = folder.write("other.yaml", "objective: {loss: {name: lsgan}}")
    changes = curve_changes(resolve([folder.base]).config, resolve([folder.base, other]).config)
    assert {change.split(":")[0] for change in changes} >= {
        "objective.loss.name",
        "objective.n_critic",
        "objective.penalties.wgan_gp.weight",
    }
    assert all(change.startswith("objective.") for change in changes)
