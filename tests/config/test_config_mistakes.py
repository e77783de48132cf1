"""Mistakes in files and overrides: one sentence that says what is wrong where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ganscale.config import load_stored, resolve
from ganscale.errors import UserError


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
        ("optimizer.critic.momentum=0.9", "means nothing to adam: leave it out"),
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


def test_settings_of_another_optimizer_are_refused_where_they_are_written(folder):
    sentence = folder.mistake(
        "optimizer: {critic: {name: rmsprop, learning_rate: 1, betas: [0, 0.5]},"
        " generator: {learning_rate: 1}}"
    )
    assert sentence.endswith("`optimizer.critic.betas` means nothing to rmsprop: leave it out")
    # A later choice of the algorithm goes beyond the file, and defaults change nothing.
    config = resolve([folder.base, "optimizer.critic.name=sgd", "optimizer.critic.alpha=0.99"])
    assert config.config.optimizer.critic.name == "sgd"
    # A run that an older version stored can still be read.
    stored = resolve([folder.base]).to_yaml().replace("momentum: 0.0", "momentum: 0.5")
    assert (
        load_stored(Path(folder.write("run/config.yaml", stored))).optimizer.critic.name == "adam"
    )


def test_strengths_that_are_all_zero_are_refused(folder):
    sentence = folder.mistake(
        "augmentation: {pipeline: ada, probability: 0.5, strengths: {blit: 0, geom: 0}}"
    )
    assert "`augmentation.strengths` must have one above 0" in sentence


def test_another_augmentation_replaces_the_one_before_it(folder):
    ada = "{pipeline: ada, strengths: {blit: 1}, adaptive: {target: 0.6}}"
    ours = folder.write("ada.yaml", f"augmentation: {ada}")
    other = folder.write("other.yaml", "augmentation: {pipeline: diffaugment, probability: 1}")
    for arguments in (
        [ours, other],
        [ours, "augmentation=diffaugment", "augmentation.probability=1"],
    ):
        found = resolve([folder.base, *arguments]).config.augmentation
        assert (found.pipeline, found.strengths) == ("diffaugment", {})


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


def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_code_2(folder):
    program = [sys.executable, "-m", "ganscale", "config", folder.base, "trainig.total_images=3"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: command line: unknown key `trainig`; did you mean `training`?\n")
