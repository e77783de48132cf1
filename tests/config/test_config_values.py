"""How single values are written, in files and on the command line."""

import re
from pathlib import Path

import pytest

from ganscale.config import load_stored, resolve
from ganscale.errors import UserError


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


def test_what_no_float_and_no_file_can_hold_is_refused_in_one_sentence(folder):
    for override, sentence in (
        (f"ema.ramp_up={'1' * 400}", "`ema.ramp_up` is too large"),
        ("run.name=a\udcff", "is not UTF-8"),
    ):
        with pytest.raises(UserError, match=sentence):
            resolve([folder.base, override])


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


def test_whole_numbers_become_floats_where_floats_are_meant(folder):
    betas = resolve([folder.base]).config.optimizer.critic.betas
    assert [type(beta) for beta in betas] == [float, float]  # torch refuses (0, 0.9)


def test_values_may_refer_to_other_values(folder):
    mine = folder.write("mine.yaml", "samples: {every_images: '${training.total_images}'}")
    assert resolve([folder.base, mine]).config.samples.every_images == 50_000
