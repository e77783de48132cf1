"""A number of a config may be a schedule: a function of the images seen."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganscale.config import curve_changes, load_stored, resolve
from ganscale.errors import UserError
from ganscale.schedules import Schedule, value_at
from ganscale.settings_reference import annotated_yaml

BASE = """
data: {path: data/x, resolution: 8}
generator: {target: mlp}
critic: {target: mlp}
objective: {loss: wgan, penalties: {r1: 10}}
optimizer: {critic: {learning_rate: 1e-4, betas: [0, 0.9]}, generator: {learning_rate: 2e-4}}
training: {total_images: 50k}
"""
RATE = "optimizer.critic.learning_rate"
SCHEDULES = [
    f"{RATE}={{from: 2e-4, to: 5e-5, over_images: 20k, warmup_images: 10}}",
    "optimizer.generator.betas=[0, {from: 0.9, to: 0.99}]",
    "objective.penalties.r1.weight={from: 0.5, to: 0.05, shape: linear}",
    "ema.half_life_images={from: 0, to: 5k, over_images: 20k}",
]


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def mistake(base: str, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        resolve([base, *overrides])
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix("command line: ")


def test_a_cosine_passes_through_the_values_of_its_formula():
    schedule = Schedule(2e-4, 5e-5, over_images=20_000_000)
    points = {0: 2.0, 5_000_000: 1.78033, 10_000_000: 1.25, 15_000_000: 0.71967, 20_000_000: 0.5}
    for seen, expected in points.items():  # to + (from - to) (1 + cos(pi t / T)) / 2
        assert round(schedule.at(seen) * 1e4, 5) == expected
    assert schedule.at(30_000_000) == schedule.at(20_000_000) == 5e-5


def test_a_line_is_straight_and_ends_where_it_should():
    schedule = Schedule(0.5, 0.05, over_images=1000, shape="linear")
    found = [schedule.at(seen) for seen in (0, 250, 500, 1000, 10**9)]
    assert found == pytest.approx([0.5, 0.3875, 0.275, 0.05, 0.05], rel=1e-12)


def test_a_warm_up_rises_from_zero_before_the_schedule_begins():
    schedule = Schedule(0.4, 0.1, over_images=800, shape="linear", warmup_images=200)
    found = [schedule.at(seen) for seen in (0, 50, 100, 200, 600, 1000)]
    assert found == pytest.approx([0, 0.1, 0.2, 0.4, 0.25, 0.1], rel=1e-12)


@given(
    ends=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)),
    images=st.integers(1, 10**9),
    seen=st.integers(0, 2 * 10**9),
    shape=st.sampled_from(["cosine", "linear"]),
)
def test_a_schedule_starts_and_ends_exactly_and_stays_between(ends, images, seen, shape):
    start, end = ends
    schedule = Schedule(start, end, images, shape)
    assert (schedule.at(0), schedule.at(images)) == ends
    assert min(ends) * (1 - 1e-12) <= schedule.at(seen) <= max(ends) * (1 + 1e-12)


def test_a_plain_number_stays_what_it_is():
    assert value_at(0.3, 0) == value_at(0.3, 10**9) == 0.3


def test_every_number_that_r3gan_schedules_may_be_a_schedule(base):
    config = resolve([base, *SCHEDULES]).config
    optimizer = config.optimizer
    assert optimizer.critic.learning_rate == Schedule(2e-4, 5e-5, 20_000, "cosine", 10)
    assert optimizer.generator.betas == [0.0, Schedule(0.9, 0.99, 50_000)]
    assert config.objective.penalties["r1"].weight == Schedule(0.5, 0.05, 50_000, "linear")
    assert config.ema.half_life_images == Schedule(0, 5000, 20_000)


def test_a_run_with_schedules_loads_again_as_it_is(base, tmp_path):
    resolved = resolve([base, *SCHEDULES])
    for text in (
        resolved.to_yaml(),
        annotated_yaml(resolved),
        annotated_yaml(resolved, explain=True),
    ):
        again = tmp_path / "again.yaml"
        again.write_text(text)
        assert resolve([str(again), "run.name=base"]).config == resolved.config
        assert not curve_changes(load_stored(again), resolved.config)


def test_a_number_and_a_schedule_replace_each_other(base, tmp_path):
    later = tmp_path / "later.yaml"

    def rate(text: str, *overrides: str) -> float | Schedule:
        later.write_text(f"include: [base.yaml]\noptimizer: {{critic: {{learning_rate: {text}}}}}")
        return resolve([str(later), *overrides]).config.optimizer.critic.learning_rate

    schedule = "{from: 3e-4, to: 1e-4, over_images: 1k}"
    assert rate(schedule) == Schedule(3e-4, 1e-4, 1000)
    assert rate(schedule, f"{RATE}=5e-4") == 5e-4
    assert rate(schedule, f"{RATE}.to=0", f"{RATE}.shape=linear") == Schedule(
        3e-4, 0.0, 1000, "linear"
    )
    assert rate("{to: 0}") == Schedule(1e-4, 0.0, 50_000)  # from the number before
    assert rate("5e-4", f"{RATE}.to=0", f"{RATE}.over_images=2k") == Schedule(5e-4, 0.0, 2000)
    assert rate("{to: 0}", f"{RATE}=7e-4") == 7e-4
    assert rate("5e-4", f"{RATE}=7e-4", f"{RATE}.to=0") == Schedule(7e-4, 0.0, 50_000)
    assert rate("5e-4, learning_rate.to: 0") == Schedule(5e-4, 0.0, 50_000)
    assert rate("'${optimizer.generator.learning_rate}'") == 2e-4
    assert rate("{to: '${optimizer.generator.learning_rate}'}") == Schedule(1e-4, 2e-4, 50_000)
    rate(schedule)
    alike = "optimizer.generator.learning_rate='${optimizer.critic.learning_rate}'"
    both = resolve([str(later), f"{RATE}.shape=linear", alike]).config.optimizer
    assert both.generator.learning_rate == both.critic.learning_rate


def test_a_schedule_fills_what_the_warm_up_leaves_of_the_run(base):
    def length(warmup_images: int) -> int | None:
        rate = resolve([base, f"{RATE}={{to: 0, warmup_images: {warmup_images}}}"])
        schedule = rate.config.optimizer.critic.learning_rate
        assert isinstance(schedule, Schedule)
        assert (
            schedule.at(49_999) == pytest.approx(1e-4 * 49_999 / 60_000) or warmup_images < 50_000
        )
        return schedule.over_images

    assert [length(n) for n in (0, 10_000, 60_000)] == [50_000, 40_000, 1]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (f"{RATE}={{to: 0, over_images: 0}}", f"`{RATE}.over_images` must be at least 1, not 0"),
        (f"{RATE}={{to: 0, over_images: -5}}", f"`{RATE}.over_images` must be at least 1, not -5"),
        (f"{RATE}={{to: 0, over_images: nan}}", f"`{RATE}.over_images` must be int, not nan"),
        (f"{RATE}={{to: 0, over_images: inf}}", f"`{RATE}.over_images` must be int, not inf"),
        ("ema.half_life_images=inf", "`ema.half_life_images` must be int or a schedule, not inf"),
        (f"{RATE}={{to: 0, over_images: 1.5}}", f"`{RATE}.over_images` must be int, not 1.5"),
        (f"{RATE}={{to: 0, warmup_images: -1}}", f"`{RATE}.warmup_images` must be at least 0"),
        (f"{RATE}={{to: nan}}", f"`{RATE}.to` must be finite, not nan"),
        (f"{RATE}={{to: x}}", f"`{RATE}.to` must be float, not 'x'"),
        (f"{RATE}={{to: true}}", f"`{RATE}.to` must be float, not True"),
        (f"{RATE}={{from: , to: 1}}", f"`{RATE}.from` must be float, not None"),
        (f"{RATE}=", f"`{RATE}` must be float or a schedule, not None"),
        (f"{RATE}=[1]", f"`{RATE}` must be float or a schedule, not [1]"),
        (f"{RATE}={{to: -1}}", f"`{RATE}.to` must be at least 0, not -1.0"),
        (f"{RATE}={{over_images: 5}}", f"`{RATE}` is a schedule without `to`"),
        (
            f"{RATE}={{to: 0, shape: cosin}}",
            f"`{RATE}.shape` must be one of cosine, linear, not cosin; did you mean cosine?",
        ),
        (f"{RATE}.too=0", f"unknown key `{RATE}.too`; did you mean `{RATE}.to`?"),
        (
            "optimizer.critic.betas=[0, {from: 0.9, to: 1}]",
            "`optimizer.critic.betas` must be two numbers in [0, 1), not "
            "[0.0, {from: 0.9, to: 1.0, over_images: 50000, shape: cosine}]",
        ),
        (
            "optimizer.critic.betas=[0, {from: 0.9, to: 0.99, over_images: 0}]",
            "`optimizer.critic.betas[1].over_images` must be at least 1, not 0",
        ),
        (
            "optimizer.critic.betas=[0, {from: 0.9, to: 0.99, shape: line}]",
            "`optimizer.critic.betas[1].shape` must be one of cosine, linear, not line",
        ),
        (
            "optimizer.critic.betas=[0, {to: 0.99}]",
            "`optimizer.critic.betas[1]` is a schedule without `from`",
        ),
        (
            "optimizer.critic.betas=[0, {form: 0.9, to: 0.99}]",
            "unknown key `optimizer.critic.betas[1].form`; did you mean "
            "`optimizer.critic.betas[1].from`?",
        ),
        ("ema.half_life_images.to=0.5", "`ema.half_life_images.to` must be int, not 0.5"),
        (
            "training.gradient_clip.to=1",
            "`training.gradient_clip` must be float, not {'to': 1}: it cannot have a schedule",
        ),
        (
            "objective.penalties.r1={from: 1, to: 0}",
            "unknown key `objective.penalties.r1.from`; valid here: weight, interval, patch_score",
        ),
        ("training.schedule=linear", "unknown key `training.schedule`: learning rates have"),
        ("training.warmup_images=5", "unknown key `training.warmup_images`: warm-ups belong"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_schedule_is_one_sentence(base, override, sentence):
    assert mistake(base, override).startswith(sentence)


def test_a_change_of_a_schedule_is_one_change(base):
    stored = resolve([base, *SCHEDULES]).config
    changed = [*SCHEDULES, f"{RATE}={{to: 0, over_images: 7, shape: linear, warmup_images: 0}}"]
    (change,) = curve_changes(stored, resolve([base, *changed]).config)
    assert change == (
        f"{RATE}: {{from: 0.0002, to: 5e-05, over_images: 20000, shape: cosine, warmup_images: 10}}"
        " -> {from: 0.0002, to: 0.0, over_images: 7, shape: linear}"
    )
    assert not curve_changes(stored, resolve([base, *changed, f"resume.allow=[{RATE}]"]).config)
    (change,) = curve_changes(stored, resolve([base, *SCHEDULES[1:]]).config)
    assert change.endswith(" -> 0.0001")


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_images", [0, 20_000, 60_000])
def test_the_learning_rate_of_a_run_from_an_older_version_stays_as_it_was(
    base, tmp_path, shape, warmup_images
):
    path = tmp_path / "config.yaml"
    older = f"total_images: 50k, schedule: {shape}, warmup_images: {warmup_images}"
    path.write_text(BASE.replace("total_images: 50k", older))
    stored = load_stored(path)
    path.with_name("run.json").touch()  # `ganscale train RUN/config.yaml`
    assert resolve([str(path)]).config == stored
    for seen in (0, 10_000, 20_000, 30_000, 49_999):
        factor = min(1.0, seen / warmup_images) if warmup_images else 1.0
        if seen >= warmup_images:
            share = (seen - warmup_images) / (50_000 - warmup_images)
            factor = {
                "constant": 1.0,
                "linear": 1 - share,
                "cosine": (1 + math.cos(math.pi * share)) / 2,
            }[shape]
        for optimizer, rate in (
            (stored.optimizer.critic, 1e-4),
            (stored.optimizer.generator, 2e-4),
        ):
            assert value_at(optimizer.learning_rate, seen) == pytest.approx(
                rate * factor, rel=1e-12
            )
    if warmup_images == 0:
        now = [
            f"optimizer.{n}.learning_rate={{to: 0, shape: {shape}}}"
            for n in ("critic", "generator")
        ]
        now = [] if shape == "constant" else now
        assert not curve_changes(stored, resolve([base, *now]).config)


def test_some_values_of_a_schedule_are_printed_beside_it(base):
    lines = annotated_yaml(resolve([base, *SCHEDULES])).splitlines()
    rates = "0 at 0, 0.0002 at 10, 0.000125 at 10,010, 5e-05 from 20,010 images on"
    assert f"    learning_rate:  # {rates}" in lines
    assert "    - from: 0.9  # 0.9 at 0, 0.945 at 25,000, 0.99 from 50,000 images on" in lines
