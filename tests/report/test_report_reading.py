"""What the report reads from run folders, complete or not."""

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ganscale.cli.main import main
from ganscale.errors import UserError
from ganscale.report.curves import (
    drawable,
    format_number,
    late_mean,
    layout_of,
    trained_by,
    unit_of,
)
from ganscale.report.history import Session, faults_of, read_log, run_state, sessions_of
from ganscale.report.page import differing_settings, objective_of
from ganscale.report.run_reader import Curve, flattened, read_metrics, read_runs
from ganscale.report.samples import read_grids
from ganscale.run_folder import RunFolder
from tests.report.made_rows import MakeRun, row


def test_curves_are_the_record_bit_for_bit(make_run: MakeRun) -> None:
    metrics = read_runs([make_run("demo", rows=30)])[0].metrics
    rows = [row(number, "wgan") for number in range(1, 31)]
    names = set(rows[0]) - {"progress/images_seen", "progress/step"}
    assert set(metrics.curves) == names
    for name in names:
        assert metrics.curves[name].x.tolist() == [each["progress/images_seen"] for each in rows]
        assert metrics.curves[name].y.tolist() == [each[name] for each in rows]


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [{"progress/images_seen": at, "loss/critic": at / 10} for at in (10, 20, 30)]
    lines = [json.dumps(each).encode() + b"\n" for each in whole]
    damaged = [
        b'{"progress/images_seen": 15, "loss/cri\n',
        b"\x00\xff\x00\n",
        b"[1, 2]\n",
        b'{"loss/critic": 1}\n',
        b'{"progress/images_seen": "15", "loss/critic": 1}\n',
        b'{"progress/images_seen": 1e400, "loss/critic": 1}\n',
        b'{"progress/images_seen": -1, "loss/critic": 1}\n',
        b"[" * 100_000 + b"\n",
    ]
    half = b'{"progress/images_seen": 40, "loss/critic": 4}'
    path.write_bytes(lines[0] + b"".join(damaged) + lines[1] + lines[2] + half)
    metrics = read_metrics(path)
    assert (metrics.rows, metrics.damaged_lines, metrics.has_half_line) == (3, len(damaged), True)
    assert metrics.curves["loss/critic"].y.tolist() == [1.0, 2.0, 3.0]


def test_numbers_that_are_not_finite_are_kept_and_text_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values: list = ["nan", "inf", "-inf", 10**400, -(10**400), True, "64x64 pixels", None, [1], 2]
    with path.open("w") as file:
        for at, value in enumerate(values):
            file.write(json.dumps({"progress/images_seen": at, "a/b": value}) + "\n")
    curve = read_metrics(path).curves["a/b"]
    assert curve.x.tolist() == [0, 1, 2, 3, 4, 9]
    assert math.isnan(curve.y[0])
    assert curve.y[1:].tolist() == [math.inf, -math.inf, math.inf, -math.inf, 2.0]


def test_rows_are_sorted_by_images_and_of_two_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for at, value in ((10, 1.0), (20, 2.0), (30, 3.0), (20, 4.0), (30, 5.0)):
            file.write(json.dumps({"progress/images_seen": at, "a/b": value}) + "\n")
    curve = read_metrics(path).curves["a/b"]
    assert (curve.x.tolist(), curve.y.tolist()) == ([10, 20, 30], [1.0, 4.0, 5.0])


def test_a_folder_without_a_run_is_refused_in_one_sentence(
    tmp_path: Path, make_run: MakeRun
) -> None:
    (tmp_path / "empty").mkdir()
    demo = make_run("demo")
    with pytest.raises(UserError, match=r"there is no run folder .*nowhere"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"empty is not a run folder: it has no config\.yaml"):
        read_runs([demo, tmp_path / "empty"])
    with pytest.raises(UserError, match="given twice"):
        read_runs([demo, demo / ".." / "demo"])


def test_runs_of_one_name_are_shown_with_their_folders(make_run: MakeRun) -> None:
    folders = [make_run("a/demo"), make_run("b/demo"), make_run("b/other")]
    assert [run.name for run in read_runs(folders)] == ["a/demo", "b/demo", "b/other"]
    assert [run.name for run in read_runs(folders[1:])] == ["demo", "other"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=400),
    st.integers(6, 40),
)
def test_a_thinned_curve_has_only_real_rows_and_keeps_every_extreme(
    values: list[float], most: int
) -> None:
    y = np.array(values)
    x = np.arange(len(y)) * 64
    line = drawable(Curve(x, y), most)
    rows = dict(zip(x.tolist(), values, strict=True))
    for at, value in zip(line["x"], line["y"], strict=True):
        assert value == rows[at] if math.isfinite(rows[at]) else value is None
    assert line["x"] == sorted(set(line["x"]))
    if len(y) <= most:
        assert len(line["x"]) == len(y)
        return
    stretches = np.array_split(y, max(1, most // 2 - 1))
    drawn = dict(zip(line["x"], line["y"], strict=True))
    position = 0
    for stretch in stretches:
        within = [drawn[at] for at in range(position * 64, (position + len(stretch)) * 64, 64)
                  if at in drawn]  # fmt: skip
        finite = [value for value in stretch.tolist() if math.isfinite(value)]
        if finite:
            kept = [value for value in within if value is not None]
            assert (min(kept), max(kept)) == (min(finite), max(finite))
        if len(finite) < len(stretch):
            assert None in within  # the line is broken there
        position += len(stretch)


def test_means_of_a_thinned_curve_are_those_of_all_rows() -> None:
    y = np.random.default_rng(0).normal(size=10_000)
    line = drawable(Curve(np.arange(10_000), y), 202)
    assert len(line["mean_y"]) == 100
    np.testing.assert_allclose(line["mean_y"], y.reshape(100, 100).mean(axis=1), rtol=1e-5)


def test_final_values_are_means_of_the_last_tenth() -> None:
    x, y = np.arange(0, 101), np.full(101, 7.0)
    y[90:] = [1, 2, 3, math.nan, 4, 5, 6, math.inf, 7, 8, 9]
    assert late_mean(Curve(x, y)) == pytest.approx(5.0)
    assert math.isnan(late_mean(Curve(x[:1], np.array([math.nan]))))


def test_related_metrics_share_a_chart_unless_runs_are_overlaid() -> None:
    names = [
        "panel/critic/wgan", "panel/generator/wgan", "loss/critic", "loss/generator",
        "loss/critic_real", "loss/critic_fake", "loss/penalty_r1", "logits/real_mean",
        "loss/generator_penalty_path_length", "penalty/path_length", "penalty/path_length_average",
        "logits/fake_mean", "logits/wasserstein", "penalty/r1_gradient_norm",
        "penalty/r1_gradient_norm_std", "penalty/r1_gradient_norm_max", "perf/cycle_ms",
        "perf/penalty_ms", "perf/rank_images_per_second_min", "perf/rank_images_per_second_mean",
        "perf/rank_images_per_second_max", "zoo/animals", "bare",
        *(f"logits/{kind}_histogram_p{at}" for kind in ("real", "fake") for at in ("05", 50, 95)),
    ]  # fmt: skip
    one = layout_of(names, overlays_runs=False)
    assert list(one) == ["panel", "loss", "logits", "penalty", "perf", "zoo", ""]
    assert sorted(n for charts in one.values() for c in charts for n, _ in c.lines) == sorted(names)
    shown = {c.title: [label for _, label in c.lines] for charts in one.values() for c in charts}
    assert shown == {
        "wgan": ["critic", "generator"],
        "critic, with its terms": ["sum", "real", "fake", "penalty r1"],
        "generator, with its terms": ["sum", "penalty path length"],
        "mean": ["real", "fake"],
        "wasserstein": [""],
        "distribution: 5, 50, 95 %": [
            "real p50", "fake p50", "real p05", "fake p05", "real p95", "fake p95"
        ],
        "path length": [""],
        "path length average": [""],
        "r1 gradient norm": ["mean", "max", "std"],
        "time of a cycle": ["cycle", "penalty"],
        "rank images per second": ["min", "mean", "max"],
        "animals": [""],
        "bare": [""],
    }  # fmt: skip
    assert one["logits"][0].colours == 2

    several = layout_of(names, overlays_runs=True)
    assert list(several)[:2] == ["panel/critic", "panel/generator"]
    singles = sorted(n for charts in several.values() for c in charts for n, _ in c.lines)
    assert singles == sorted(name for name in names if "histogram" not in name)
    assert all(len(c.lines) == 1 for charts in several.values() for c in charts)
    assert unit_of("perf/step_ms_mean") == "ms"
    assert unit_of("optim/critic_learning_rate") == ""


def test_log_lines_of_one_kind_are_one_fault(make_run: MakeRun) -> None:
    folder = make_run("demo")
    lines = [
        f"2026-01-01 10:00:{i:02d} WARNING: sample {i} of shard a.tar is cut" for i in range(9)
    ]
    lines += ["2026-01-01 10:01:00 ERROR: no samples could be written", "a traceback's line"]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    faults, last_time = read_log(folder / "log.txt")
    assert [(fault.level, fault.text, fault.times) for fault in faults] == [
        ("warning", "sample 0 of shard a.tar is cut", 9),
        ("error", "no samples could be written", 1),
    ]
    assert last_time == "2026-01-01 10:01:00"


def test_sessions_faults_and_state_come_from_summary_and_rows(make_run: MakeRun) -> None:
    folder = make_run("demo", rows=10)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {
        "exit_code": 75,
        "bad_samples": 3,
        "bad_samples_by_shard": [{"shard": "a.tar", "reason": "cut", "count": 3}],
        "sessions": [{"images_seen": 0, "world_size": 2}, {"images_seen": 1280, "world_size": 4}],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (run,) = read_runs([folder])
    assert run_state(run) == ("stopped; the same command continues it", "note")
    assert sessions_of(run) == [Session(0, ranks="2"), Session(1280, ranks="4")]
    texts = [fault.text for fault in faults_of(run)]
    assert texts == ["3 bad samples, replaced by others", "bad samples in a.tar: cut"]

    with (folder / "metrics.jsonl").open("a") as file:  # it goes on after that summary
        more = {"progress/images_seen": 7040, "loss/critic": "nan"}
        file.write(json.dumps(more) + "\n")
    (run,) = read_runs([folder])
    assert run_state(run) == ("in progress or killed", "note")
    faults = faults_of(run)
    assert (faults[0].text, faults[0].when) == ("loss/critic was not finite", "at 7,040 images")


def test_sessions_come_from_their_own_record_if_there_is_one(make_run: MakeRun) -> None:
    folder = make_run("demo")
    facts = {
        "started": "2026-01-01T10:00:00+00:00",
        "images_seen": 640,
        "git": {"revision": "0123456789abcdef", "is_dirty": True},
        "versions": {"torch": "2.13.0"},
        "cluster": {"world_size": 8, "nodes": 2, "device": "H100"},
    }
    lines = ['{"images_seen": 0}', "{half", "[1]", '{"images_seen": "3"}', json.dumps(facts)]
    lines += ['{"images_seen": 700, "cluster": 3, "git": {"revision": [1]}}']
    (folder / "sessions.jsonl").write_text("\n".join(lines))
    (run,) = read_runs([folder])
    assert sessions_of(run) == [
        Session(0),
        Session(
            640,
            "2026-01-01 10:00:00 UTC",
            "8 on 2 nodes",
            "H100",
            "0123456789 with changes",
            "2.13.0",
        ),
        Session(700),
    ]


def test_percentiles_of_histograms_are_those_of_their_samples(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    counts, edges = np.histogram(values, bins=400)
    whole = {"counts": counts.tolist(), "edges": edges.tolist()}
    others: list = [
        {}, {"counts": 3, "edges": [1]}, {"counts": [1], "edges": [1]}, {"counts": ["x"]},
        {"counts": [0, 0], "edges": [0, 1, 2]}, {"counts": [-1, 2], "edges": [0, 1, 2]},
        {"counts": [[1]], "edges": [0, 1]}, {"counts": [None], "edges": [0, 1]},
    ]  # fmt: skip
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for at, histogram in enumerate([whole, *others]):
            row = {"progress/images_seen": at, "logits/real_histogram": histogram}
            file.write(json.dumps(row) + "\n")
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.rows == 9
    for percent in (5, 50, 95):
        curve = metrics.curves[f"logits/real_histogram_p{percent:02}"]
        assert curve.x.tolist() == [0]
        assert curve.last == pytest.approx(np.percentile(values, percent), abs=0.02)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"images_seen": "many", "sessions": 3}'])
def test_a_summary_of_any_content_is_tolerated(make_run: MakeRun, text: str) -> None:
    folder = make_run("demo")
    (folder / "summary.json").write_text(text)
    (run,) = read_runs([folder])
    assert run_state(run)[0] == "in progress or killed"
    assert sessions_of(run) == [Session(0)]
    assert run.images_seen == 40 * 640


def test_a_page_is_written_whatever_a_run_stores(make_run: MakeRun) -> None:
    folder = make_run("demo")
    bad = {"shards": {"tr\udcffain.tar": {"no image": 1}}}
    (folder / "summary.json").write_text(json.dumps({"bad_samples": bad, "x": "tr\udcff"}))
    with (folder / "log.txt").open("a", encoding="utf-8", errors="surrogateescape") as log:
        log.write("2026-11-30 12:00:00 WARNING shard tr\udcffain.tar is cut\n")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!")


def test_only_settings_that_differ_are_compared(make_run: MakeRun) -> None:
    runs = read_runs([make_run("a", loss="wgan"), make_run("b", loss="hinge")])
    assert [(row.name, row.cells) for row in differing_settings(runs)] == [
        ("objective.loss.name", ["wgan", "hinge"])
    ]
    assert objective_of(runs[1]) == "hinge, n_critic 2"
    runs[1].config["objective"]["penalties"] = {"r1": {"weight": {"from": 0.5, "to": 0.05}}}
    assert objective_of(runs[1]) == "hinge + 0.5 to 0.05 r1, n_critic 2"


@pytest.mark.parametrize("pair", ["{{x: *a{0}, y: *a{0}}}", "[*a{0}, *a{0}]"])
def test_endless_settings_are_cut(make_run: MakeRun, pair: str) -> None:
    folder = make_run("demo")
    levels = "\n".join(f"a{i}: &a{i} {pair.format(i - 1)}" for i in range(1, 25))
    (folder / "config.yaml").write_text(f"a0: &a0 {{x: 1}}\nround: &r {{and: *r}}\n{levels}\n")
    since = time.process_time()
    (run,) = read_runs([folder])
    assert len(flattened(run.config)) == 10_000
    assert time.process_time() - since < 5


def test_grids_keep_the_first_and_the_last_and_skip_damaged_ones(
    make_run: MakeRun,
) -> None:
    folder = make_run("demo", grids=100)
    (folder / "samples" / "images-000640000.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    (folder / "samples" / "images-000640000.png.partial").write_bytes(b"")
    (folder / "samples" / "real.png").write_bytes(
        (folder / "samples" / "images-000000000.png").read_bytes()
    )
    grids = read_grids(RunFolder(folder), runs=1)
    assert list(grids) == ["ema", "real"]
    series = grids["ema"]
    assert (series.total, series.left_out, len(series.frames)) == (101, 1, 31)
    assert series.frames[0].images_seen == 0
    assert grids["real"].frames[0].images_seen is None
    assert len(read_grids(RunFolder(folder), runs=10)["ema"].frames) == 5


def test_nothing_is_shown_that_lies_outside_of_the_run_folder(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a run of someone else's links to."""
    private = make_run("private", grids=2)
    folder = make_run("demo", grids=2)
    grid = folder / "samples" / "images-000006400.png"
    grid.unlink()
    grid.symlink_to(private / "samples" / grid.name)
    (folder / "samples" / "loop.png").symlink_to("loop.png")
    grids = read_grids(RunFolder(folder), runs=1)
    assert (grids["ema"].total, grids["ema"].left_out, len(grids["ema"].frames)) == (2, 1, 1)
    assert f"{grid} is left out of the report: {grid.name} is not a file in" in caplog.text
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "log.txt", "samples"):
        linked = tmp_path / f"linked-{name}"
        shutil.copytree(folder, linked, symlinks=True)
        if (linked / name).is_dir():
            shutil.rmtree(linked / name)
        (linked / name).unlink(missing_ok=True)
        (linked / name).symlink_to(private / name)
        with pytest.raises(UserError, match=f"{name} is a link to .*: only what lies in the run"):
            read_runs([linked])
    (tmp_path / "moved").symlink_to(folder)  # the folder itself may be a link
    assert read_runs([tmp_path / "moved"])


def test_an_image_that_is_far_too_large_is_left_out(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run("demo", grids=1)
    Image.new("1", (20_000, 20_000)).save(folder / "samples" / "images-000000001.png")
    series = read_grids(RunFolder(folder), runs=1)["ema"]
    assert (series.total, series.left_out) == (2, 1)
    assert "images-000000001.png is left out of the report: Image size" in caplog.text


def test_a_panel_chart_names_the_runs_that_train_its_loss(make_run: MakeRun) -> None:
    runs = read_runs([make_run("a", loss="wgan"), make_run("b", loss="hinge")])
    layout = layout_of(runs[0].metrics.curves, overlays_runs=True)
    assert {c.title: trained_by(c, runs) for c in layout["panel/critic"]} == {
        "hinge": [1],
        "wgan": [0],
    }
    assert [trained_by(c, runs) for c in layout["loss"]] == [[], []]


def test_numbers_are_shown_with_four_significant_digits() -> None:
    shown = [format_number(v) for v in (0, -0.5, 1234.56, 99999, 123456, 5e-7, math.nan, -math.inf)]
    assert shown == ["0", "−0.5", "1,235", "99,999", "1.235e+05", "5.000e−07", "NaN", "−∞"]  # noqa: RUF001


def test_passwords_signatures_and_commands_of_a_run_are_not_shown(make_run: MakeRun) -> None:
    """Also where a long command is folded over lines, and where the settings are damaged."""
    folder = make_run("secret")
    command = "pipe:curl -H " + " ".join(f"SECRET{number}" for number in range(40))
    data = {"path": "https://user:SECRET@host/set", "shards": command, "url": "http://h/x?SECRET"}
    config = folder / "config.yaml"
    text = config.read_text() + yaml.safe_dump({"data": data, "lanes": 4})
    for written in (text, text + "{"):
        config.write_text(written)
        with (folder / "log.txt").open("a") as file:
            file.write("2026-01-01 10:00:00 WARNING: https://user:SECRET@host/set is slow\n")
        (run,) = read_runs([folder])
        faults = faults_of(run)
        assert "SECRET" not in run.config_text + str(flattened(run.config)) + str(faults)
        assert "host/set" in run.config_text
        assert "https://host/set is slow" in str(faults)
        assert "SECRET" in config.read_text()
    config.write_text(text)
    (run,) = read_runs([folder])
    data |= {"path": "https://***@host/set", "shards": "pipe:curl ***", "url": "http://h/x?***"}
    assert yaml.safe_load(run.config_text) == yaml.safe_load(text) | {"data": data}
