"""Files and overrides become one complete run, or one sentence that says what is wrong where."""

import dataclasses
import inspect
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ganscale.cli.main import main
from ganscale.config import Resolved, curve_changes, load_stored, resolve
from ganscale.errors import UserError
from ganscale.networks.build import NETWORKS
from ganscale.objectives.losses import LOSSES
from ganscale.objectives.penalties import PENALTIES
from ganscale.schema import Config, PenaltyConfig
from ganscale.setting import settings_of, types_of
from ganscale.settings_reference import annotated_yaml, reference
from ganscale.training.augmentation import run_pipeline

REPOSITORY = Path(__file__).parent.parent

BASE = """
data: {path: data/x, resolution: 8}
generator: {target: mlp, options: {width: 8}}
critic: {target: mlp}
objective: {loss: {name: wgan}, penalties: {wgan_gp: {weight: 10}}, n_critic: 5}
optimizer: {critic: {learning_rate: 1e-4, betas: [0, 0.9]}, generator: {learning_rate: 2e-4}}
training: {total_images: 50k}
"""


class Folder:
    """A folder of config files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = self.write("base.yaml", BASE)

    def write(self, name: str, text: str) -> str:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def mistake(self, text: str | None, *overrides: str) -> str:
        """The sentence about a mistake in `text`, which comes after a good file."""
        files = [self.base] if text is None else [self.base, self.write("mine.yaml", text)]
        with pytest.raises(UserError) as raised:
            resolve([*files, *overrides])
        sentence = str(raised.value)
        assert "\n" not in sentence
        return sentence


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Config:
    """The config of a run that was begun with the base file."""
    return resolve([Folder(tmp_path_factory.mktemp("stored")).base, "run.name=base"]).config


def test_a_later_file_and_then_the_command_line_win(folder):
    second = folder.write("second.yaml", "training: {total_images: 60k, accumulate: 2}\nseed: 1")
    third = folder.write("third.yaml", "training: {accumulate: 4}")
    config = resolve([folder.base, second, third, "seed=3", "data.flip=true"]).config
    assert (config.training.total_images, config.training.accumulate) == (60_000, 4)
    assert (config.seed, config.data.flip, config.data.resolution) == (3, True, 8)
    config = resolve(["seed=3", folder.base, third, second]).config
    assert (config.training.accumulate, config.seed) == (2, 3)


@pytest.mark.parametrize(
    ("text", "resolution", "size"),
    [
        ("64", 64, (64, 64)),
        ("1e2", 100, (100, 100)),
        ("[64, 128]", [64, 128], (64, 128)),
        ("[ 64,128 ]", [64, 128], (64, 128)),
        ("[64, 64]", 64, (64, 64)),
        ("${oc.env:SIDE}", 48, (48, 48)),
        ("['${oc.env:SIDE}', 96]", [48, 96], (48, 96)),
    ],
)
def test_a_resolution_is_one_number_or_height_and_width(
    folder, monkeypatch, text, resolution, size
):
    monkeypatch.setenv("SIDE", "48")
    of_file = resolve([folder.base, folder.write("mine.yaml", f"data:\n  resolution: {text}")])
    found = resolve([folder.base, f"data.resolution={text}"])
    assert found.config.data.resolution == of_file.config.data.resolution == resolution
    assert found.config.data.size == size
    assert found.config.data.sample_shape == (3, *size)
    again = folder.write("again.yaml", found.to_yaml())
    assert resolve([again]).config == found.config
    assert load_stored(Path(again)).data.resolution == resolution
    assert resolve([again, "data.resolution=8"]).config.data.size == (8, 8)
    assert resolve([again, "data.resolution=[8, 4]"]).config.data.size == (8, 4)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0", "0"),
        ("-4", "-4"),
        ("64.5", "64.5"),
        ("true", "True"),
        ("large", "'large'"),
        ("64x128", "'64x128'"),
        ("null", "None"),
        ("", "None"),
        ("[]", "[]"),
        ("[64]", "[64]"),
        ("[64, 128, 3]", "[64, 128, 3]"),
        ("[64, 0]", "[64, 0]"),
        ("[64, 12.5]", "[64, 12.5]"),
        ("[64, true]", "[64, True]"),
        ("[64, wide]", "[64, 'wide']"),
        ("[64, [128]]", "[64, [128]]"),
        ("[64, null]", "[64, None]"),
        ("{height: 64, width: 128}", "{'height': 64, 'width': 128}"),
    ],
)
def test_another_resolution_is_one_sentence(folder, text, shown):
    assert folder.mistake(None, f"data.resolution={text}") == (
        "command line: `data.resolution` must be a whole number above 0, or two of them as "
        f"[height, width], not {shown}"
    )


def test_a_resolution_of_equal_sides_is_that_of_one_number_when_a_run_resumes(stored, folder):
    assert curve_changes(stored, resolve([folder.base, "data.resolution=[8, 8]"]).config) == []
    assert curve_changes(stored, resolve([folder.base, "data.resolution=[8, 16]"]).config) == [
        "data.resolution: 8 -> [8, 16]"
    ]


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


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("50k", 50_000), ("2M", 2_000_000), ("2.5k", 2500), ("7", 7), ("1_000", 1000)),
        *(("1e6", 1_000_000), ("1.5e+3", 1500), ("1E3", 1000), ("64.0", 64), ("0100", 100)),
    ],
)
def test_whole_numbers_may_be_written_in_thousands_and_millions(folder, text, count):
    assert (
        resolve([folder.base, f"training.total_images={text}"]).config.training.total_images
        == count
    )
    mine = folder.write("mine.yaml", f"training: {{total_images: {text}}}")
    assert resolve([folder.base, mine]).config.training.total_images == count


TEXTS = ["007", "1.10", "1_1_1", "2024_01_05", "2024-01-05", "12:30", "on", "No", "true", "1e3"]


@pytest.mark.parametrize("text", [*TEXTS, "0x1F", ".inf", "nan", "1_000", "=", "+1"])
def test_a_text_setting_is_the_text_as_written(folder, text):
    mine = folder.write("mine.yaml", f"run: {{name: {text}}}\nresume: {{allow: [{text}]}}")
    override = [f"run.name={text}", f"resume.allow=[{text}]"]
    for resolved in (resolve([folder.base, mine]), resolve([folder.base, *override])):
        assert (resolved.config.run.name, resolved.config.resume.allow) == (text, [text])
        stored = folder.write("stored.yaml", resolved.to_yaml())
        assert load_stored(Path(stored)) == resolved.config


@pytest.mark.parametrize("text", ["a: b", "[a", "{", "a #b", "*a", "it's", "@", "%", "a'b", ": "])
def test_text_on_the_command_line_needs_no_quotes_of_yaml(folder, text):
    assert resolve([folder.base, f"run.name={text}"]).config.run.name == text


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_of_yaml_around_text_on_the_command_line_are_removed(folder, quote):
    assert resolve([folder.base, f"run.name={quote}007{quote}"]).config.run.name == "007"


def test_options_are_read_as_yaml_1_2_reads_them(folder):
    values = "[1, 1_000, 0x10, 010, 1e2, true, null, on, no, 12:30, 2024_01_05, '7', 2024-01-05]"
    expected = [1, 1000, 16, 10, 100.0, True, None]
    expected += ["on", "no", "12:30", "2024_01_05", "7", "2024-01-05"]
    mine = folder.write("mine.yaml", f"critic: {{target: mlp, options: {{x: {values}}}}}")
    for arguments in ([mine], [f"critic.options.x={values}"]):
        found = resolve([folder.base, *arguments]).config.critic.options["x"]
        assert found == expected
        assert [*map(type, found)] == [*map(type, expected)]


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


@pytest.mark.parametrize("number", ["nan", ".nan", "NaN", "inf", "-inf", ".inf", "1e400"])
@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("optimizer.critic.learning_rate", "{}"),
        ("data.max_bad_fraction", "{}"),
        ("objective.loss.options.smoothing", "{}"),
        ("objective.penalties.r1.weight", "{}"),
        ("optimizer.critic.betas[1]", "[0, {}]"),
        ("generator.options.scale", "{}"),
        ("generator.options.x[0][1].a", "[[1, {{a: {}}}]]"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_key_and_origin(folder, key, written, number):
    value, plain = written.format(number), key.partition("[")[0]
    said = folder.mistake(None, f"{plain}={value}")
    assert re.fullmatch(rf"command line: `{re.escape(key)}` must be finite, not (nan|-?inf)", said)


def test_text_with_interpolations_in_it_is_stored_and_loaded_as_text(folder, monkeypatch):
    monkeypatch.setenv("OWN_TOKEN", "token-${seed}")
    config = resolve([folder.base, "data.path=${oc.env:OWN_TOKEN}"]).config
    assert config.data.path == "token-${seed}"


@settings(deadline=None, max_examples=50)
@given(text=st.text("\\\\${}ab:.", max_size=12))
def test_every_text_is_stored_and_loaded_as_it_is(tmp_path_factory, stored, text):
    config = dataclasses.replace(stored, data=dataclasses.replace(stored.data, path=text))
    folder = Folder(tmp_path_factory.mktemp("text"))
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


def test_whole_numbers_become_floats_where_floats_are_meant(folder):
    betas = resolve([folder.base]).config.optimizer.critic.betas
    assert [type(beta) for beta in betas] == [float, float]  # torch refuses (0, 0.9)


def test_values_may_refer_to_other_values(folder):
    mine = folder.write("mine.yaml", "samples: {every_images: '${training.total_images}'}")
    assert resolve([folder.base, mine]).config.samples.every_images == 50_000


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("trainig: {}", "trainig", "did you mean `training`?"),
        (
            "training: {total_image: 3}",
            "training.total_image",
            "did you mean `training.total_images`?",
        ),
        (
            "objective: {penalties: {wgan_gp: {wieght: 1}}}",
            "objective.penalties.wgan_gp.wieght",
            "did you mean `objective.penalties.wgan_gp.weight`?",
        ),
        ("total_images: 3", "total_images", "did you mean `training.total_images`?"),
        ("data: {zzz: 3}", "data.zzz", "valid here: path, shards,"),
        ("3: 4", "3", "valid here: seed, run,"),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_the_nearest(folder, text, key, hint):
    sentence = folder.mistake(text)
    assert sentence.startswith(f"{folder.path / 'mine.yaml'}: unknown key `{key}`; {hint}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: many", "`seed` must be int, not 'many'"),
        ("seed: null", "`seed` must be int, not None"),
        ("training: {total_images: 1.5}", "`training.total_images` must be int, not 1.5"),
        ("training: {total_images: true}", "`training.total_images` must be int, not True"),
        ("training: {total_images: 1:30}", "`training.total_images` must be int, not '1:30'"),
        ("training: {total_images: 1.5k7}", "`training.total_images` must be int, not '1.5k7'"),
        ("training: 5k", "`training` must be a section of keys, not '5k'"),
        ("data: {flip: 1.5}", "`data.flip` must be bool, not 1.5"),
        ("data: 3", "`data` must be a section of keys, not 3"),
        ("data: [1, 2]", "`data` must be a section of keys, not [1, 2]"),
        ("data: null", "`data` must be a section of keys, not None"),
        ("run: {name: {a: b}}", "`run.name` must be str, not {'a': 'b'}"),
        ("objective: {loss: [wgan]}", "`objective.loss` must be a section of keys, not ['wgan']"),
        ("optimizer: {critic: adam}", "`optimizer.critic` must be a section of keys, not 'adam'"),
        (
            "objective: {loss: {options: [1]}}",
            "`objective.loss.options` must be a section of keys, not [1]",
        ),
        (
            "objective: {loss: {options: {a: x}}}",
            "`objective.loss.options.a` must be float, not 'x'",
        ),
        (
            "objective: {penalties: null}",
            "`objective.penalties` must be a section of keys, not None",
        ),
        (
            "objective: {penalties: {wgan_gp: strong}}",
            "`objective.penalties.wgan_gp.weight` must be float or a schedule, not 'strong'",
        ),
        ("generator: {options: {3: 4}}", "a key of `generator.options` must be a word, not 3"),
        (
            "optimizer: {critic: {betas: {a: 1}}}",
            "`optimizer.critic.betas` must be list, not {'a': 1}",
        ),
        ("critic: {options: {x: !!int x}}", "`critic.options.x` must be int, not 'x'"),
        ("optimizer: {critic: {betas: 5}}", "`optimizer.critic.betas` must be list, not 5"),
        (
            "optimizer: {critic: {betas: [0, x]}}",
            "`optimizer.critic.betas[1]` must be float or a schedule, not 'x'",
        ),
        ("resume: {allow: optimizer}", "`resume.allow` must be list, not 'optimizer'"),
        ("include: base.yaml", "`include` must be a list of files, not 'base.yaml'"),
        ("include: null", "`include` must be a list of files, not None"),
        ("include: [null]", "`include` must be a list of files, not [None]"),
        ("include: [{a: b}]", "`include` must be a list of files, not [{'a': 'b'}]"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_file_and_what_is_right(
    folder, text, complaint
):
    assert folder.mistake(text) == f"{folder.path / 'mine.yaml'}: {complaint}"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.total_images=0", "must be at least 1, not 0"),
        ("seed=-1", "must be at least 0, not -1"),
        (f"seed={2**64}", f"must be below {2**64}, not {2**64}"),
        ("data.max_bad_fraction=1", "must be below 1, not 1.0"),
        ("objective.clip.value=0", "must be above 0, not 0.0"),
        ("objective.penalties.wgan_gp.weight=-1", "must be at least 0, not -1.0"),
        (
            "training.precision=bf16",
            "must be one of float32, bfloat16, float64, not bf16; did you mean bfloat16?",
        ),
        ("log.wandb=xyz", "must be one of auto, online, offline, disabled, not xyz"),
        ("data.channels=2", "must be one of 1, 3, not 2"),
        ("optimizer.critic.betas=[0.5]", "must be two numbers in [0, 1), not [0.5]"),
        ("optimizer.generator.betas=[0,1]", "must be two numbers in [0, 1), not [0.0, 1.0]"),
        ("training.accumulate=3", "must divide the global batch of 64, not 3"),
    ],
)
def test_a_value_out_of_its_range_is_named_with_its_origin(folder, override, complaint):
    key = override.split("=")[0]
    assert folder.mistake(None, override) == f"command line: `{key}` {complaint}"


@pytest.mark.parametrize("other", ["accumulate=2", "generator_real=fresh"])
def test_reused_fakes_are_refused_with_what_needs_others(folder, other):
    found = folder.mistake(None, "training.reuse_fakes=true", f"training.{other}")
    assert found.startswith("command line: `training.reuse_fakes` must be false with training.")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("a b=token", "command line: `a b=...` is not of the form key.subkey=value"),
        ("--seed=token", "command line: `--seed=...` is not of the form key.subkey=value"),
        ("=token", "command line: `=...` is not of the form key.subkey=value"),
        ("seed=[token", "command line: `seed` is not valid YAML (line 1, column 7: expected"),
        ("resume.allow=[a: token: b]", "command line: `resume.allow` is not valid YAML ("),
        ("seed=!!python/name:os 3", "command line: `seed` has the unknown tag"),
        ("run.folder=", "command line: `run.folder` must be str, not None"),
        ("seed=${nothing}", "command line: `seed`: Interpolation key 'nothing' not found"),
        ("data.path=a${token", "command line: `data.path` has a `${...}` that cannot be read"),
        ("seed=https://me:token@host", "command line: `seed` must be int, not 'https://host'"),
    ],
)
def test_an_override_that_cannot_be_read_is_named_without_its_value(folder, override, sentence):
    said = folder.mistake(None, override)
    assert said.startswith(sentence)
    assert "token" not in said


def test_what_a_later_file_has_replaced_and_left_out_is_blamed_on_it(folder):
    sentence = folder.mistake("optimizer: {critic: {learning_rate: 0.1}}")
    assert sentence.startswith("the config lacks `optimizer.generator.learning_rate`; ")
    assert sentence.endswith("mine.yaml replaces `optimizer` of earlier files as a whole")


def test_what_is_missing_is_listed_whole(folder):
    mine = folder.write("mine.yaml", "training: {total_images: 1}\ndata: {path: x}")
    with pytest.raises(UserError) as raised:
        resolve([mine])
    assert str(raised.value) == (
        "the config lacks `critic.target`, `data.resolution`, `generator.target`, "
        "`objective.loss.name`, `optimizer.critic.learning_rate`, "
        "`optimizer.generator.learning_rate`"
    )
    assert folder.mistake("objective: {clip: {}, loss: {name: wgan}}") == (
        "the config lacks `objective.clip.value`"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: [1", "not valid YAML ("),
        ("seed: 1\nseed: 2", "`seed` is given twice"),
        ("data: {flip: true, flip: false}", "`data.flip` is given twice"),
        ("? [seed]\n: 2", "a key must be a word, not ['seed']"),
        ("<<: 3", "not valid YAML ("),
        ("generator: &own {options: {depth: *own}}", "nested too deeply"),
        ("generator: {options: {depth: " + "[" * 2000, "n"),
        ("seed: 1\n\tdata: 2", "not valid YAML ("),
        ("- 1\n- 2", "must hold `key: value` pairs"),
    ],
)
def test_a_file_that_is_no_yaml_of_keys_is_named(folder, text, complaint):
    assert folder.mistake(text).startswith(f"{folder.path / 'mine.yaml'}: {complaint}")


# Thirty values, each ten times the one before.
_LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 30)
)
_MERGED_LAUGHS = "a0: &a0 {k: x}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join(10 * [f'*a{i - 1}'])}]}}\n" for i in range(1, 30)
)


@pytest.mark.parametrize("laughs", [_LAUGHS, _MERGED_LAUGHS], ids=["lists", "merged"])
def test_a_short_file_that_aliases_make_endless_is_one_sentence(folder, laughs):
    text = "generator:\n options:\n" + "".join(f"  {line}\n" for line in laughs.splitlines())
    sentence = "has more than 10,000 values, aliases (`*name`) included"
    assert folder.mistake(text) == f"{folder.path / 'mine.yaml'}: {sentence}"
    flow = "{" + ", ".join(laughs.splitlines()) + "}"
    with pytest.raises(UserError, match=re.escape(sentence)):
        resolve([folder.base, f"generator.options={flow}"])


def test_files_that_cannot_be_read_are_named(folder):
    cases = {
        str(folder.path / "none.yaml"): "none.yaml: no such config file",
        str(folder.path): "cannot be read",
    }
    (folder.path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    cases[str(folder.path / "binary.yaml")] = "binary.yaml: "
    for argument, complaint in cases.items():
        with pytest.raises(UserError, match=re.escape(complaint)):
            resolve([argument])
    with pytest.raises(UserError, match="no config given"):
        resolve(["seed=3"])
    for url in ("https://me:token@host/set", "https://host/set?key=token"):  # after `data.path= `
        with pytest.raises(UserError, match="https://host/set: no such config file") as raised:
            resolve([folder.base, url])
        assert "token" not in str(raised.value)


def test_an_included_file_that_is_missing_is_named_with_the_file_that_includes_it(folder):
    assert folder.mistake("include: [parts/none.yaml]") == (
        f"{folder.path}/mine.yaml includes {folder.path}/parts/none.yaml: no such config file"
    )


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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("bas.yaml", " (did you mean 'base.yaml'?)"),
        ("base.yml", " (did you mean 'base.yaml'?)"),
        ("configs/demo.yaml", "; there is a ready config named demo"),
        ("dmo", " (did you mean 'demo'?)"),
        ("qqqqq", ""),
    ],
)
def test_a_config_that_is_missing_is_answered_with_the_nearest(folder, monkeypatch, name, hint):
    monkeypatch.chdir(folder.path)
    with pytest.raises(UserError) as raised:
        resolve([name])
    assert str(raised.value) == f"{name}: no such config file{hint}"


@pytest.mark.parametrize("loop", ["mine.yaml", "sub/back.yaml", "sub/../mine.yaml"])
def test_files_that_include_each_other_in_a_circle_are_refused(folder, loop):
    folder.write("sub/back.yaml", "include: [../mine.yaml]")
    sentence = folder.mistake(f"include: [{loop}]")
    assert sentence.endswith("mine.yaml: includes itself")


def test_a_file_may_be_included_twice_without_a_circle(folder):
    folder.write("part.yaml", "seed: 3")
    folder.write("left.yaml", "include: [part.yaml]")
    mine = folder.write("mine.yaml", "include: [left.yaml, part.yaml]")
    assert resolve([folder.base, mine]).config.seed == 3


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
    folder = Folder(tmp_path_factory.mktemp("round"))
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


def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_code_2(folder):
    program = [sys.executable, "-m", "ganscale", "config", folder.base, "trainig.total_images=3"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: command line: unknown key `trainig`; did you mean `training`?\n")
