"""The page in a real browser, opened as a file, without a network."""

import io
import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ganscale.cli.main import main
from ganscale.report import read_runs, render
from tests.report.chromium import Chromium
from tests.report.made_rows import MakeRun, row

HOSTILE = (
    '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2">&amp;\u2028'
)

# Every line of every chart as Plotly holds it.
DRAWN = """(ganscaleReport.drawAll(), ganscaleReport.charts.flatMap(chart =>
    chart.element.data.filter(line => line.meta).map(line =>
        ({row: line.meta, name: line.name, colour: line.line.color, x: line.x, y: line.y}))))"""


def report(output: Path, *folders: Path) -> Path:
    """Writes a page by the command."""
    assert main(["report", *map(str, folders), "--output", str(output)]) == 0
    return output


def test_curves_hold_the_numbers_of_the_record(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run("demo", rows=40)
    browser.open(report(tmp_path / "page.html", folder))
    drawn = browser.value(DRAWN)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = set(rows[0]) - {"progress/images_seen", "progress/step"}
    assert {line["row"] for line in drawn} == names
    assert len(drawn) == len(names)
    for line in drawn:
        assert line["x"] == [row["progress/images_seen"] for row in rows]
        assert line["y"] == [row[line["row"]] for row in rows]
    assert browser.errors == []


def test_the_page_needs_no_network(browser: Chromium, make_run: MakeRun, tmp_path: Path) -> None:
    page = report(tmp_path / "page.html", make_run("a"), make_run("b", loss="hinge"))
    text = page.read_text()
    assert re.findall(r"""(?:https?:)?//[\w-]+\.[\w.]+""", text) == []
    assert set(re.findall(r"""(?:src|href)=["']?(data:|#|[^"'\s]{1,20})""", text)) == {"data:", "#"}
    browser.open(page)
    browser.value(DRAWN)
    assert {url.partition(":")[0] for url in browser.requests} == {"file", "data"}
    assert [url for url in browser.requests if url.startswith("file")] == [page.as_uri()]
    # The page's own policy refuses what a browser with a network would fetch.
    refused = browser.value(
        """new Promise(done => {
            const refused = [];
            document.addEventListener('securitypolicyviolation', event => {
                if (refused.push(event.effectiveDirective) == 3) done(refused.sort());
            });
            fetch('http://127.0.0.1:9/x').catch(() => 0);
            new Image().src = 'http://127.0.0.1:9/x.png';
            const script = document.createElement('script');
            script.textContent = 'window.hacked = 1';
            document.body.append(script);
            setTimeout(() => done(refused), 10000);
        })"""
    )
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert browser.value("window.hacked === undefined")


def test_names_and_settings_are_text_and_never_markup(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run("<b>run & 'co'")
    hostile_row = {**row(41, "wgan"), f"section/{HOSTILE}": 1.5, f"{HOSTILE}/x": 2, "": 3, "/": 4}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(hostile_row) + "\n")
    (folder / "config.yaml").write_text(
        f"objective: {{loss: {{name: {json.dumps(HOSTILE)}}}}}\nnote: {json.dumps(HOSTILE)}\n"
    )
    (folder / "log.txt").write_text(f"2026-01-01 10:00:00 ERROR: {HOSTILE}\n")
    summary = {"images_seen": 41 * 640, "bad_samples": 1, "exit_code": HOSTILE}
    summary["bad_samples_by_shard"] = [{"shard": HOSTILE, "reason": HOSTILE, "count": 1}]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "samples" / 'a"onload="window.hacked=3"-000000001.png').write_bytes(
        (folder / "samples" / "images-000000000.png").read_bytes()
    )
    for folders in ([folder], [folder, make_run("other")]):
        browser.open(report(tmp_path / "page.html", *folders))
        drawn = browser.value(DRAWN)
        assert f"section/{HOSTILE}" in {line["row"] for line in drawn}
        assert browser.value("window.hacked === undefined")
        assert browser.value("document.querySelectorAll('b').length") < 100
        assert browser.value("document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0
        assert browser.errors == []
    assert browser.value("document.querySelector('.chip').textContent") == "<b>run & 'co'"


def test_light_and_dark_pages_can_both_be_read(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    folders = [make_run(f"run{number}") for number in range(6)]
    page = report(tmp_path / "page.html", *folders)
    browser.open(page, dark=False)
    shown: list[tuple[np.ndarray, set[str], np.ndarray]] = []
    for dark in (False, True):
        browser.set_scheme(dark=dark)  # the page follows when the reader's setting changes
        if shown:
            before = json.dumps(sorted(shown[0][1]))
            first = "(ganscaleReport.drawAll(), ganscaleReport.charts[0].element.data[0])"
            browser.wait_for(f"!{before}.includes({first}.line.color)")
        lines = {line["colour"] for line in browser.value(DRAWN)}
        card = _colour(
            browser.value("getComputedStyle(document.querySelector('.card')).backgroundColor")
        )
        body = _colour(browser.value("getComputedStyle(document.body).backgroundColor"))
        texts = browser.value(
            """[...document.querySelectorAll('h1,h2,h3,p,a,td,th,summary,label,button,figcaption')]
            .filter(e => e.checkVisibility()).map(e => getComputedStyle(e).color)"""
        )
        for text in set(texts):
            assert min(_contrast(_colour(text), card), _contrast(_colour(text), body)) >= 4.5
        assert len(lines) == 6
        assert all(_contrast(_colour(line), card) >= 3 for line in lines)
        browser.value("document.querySelector('.cards').scrollIntoView()")
        pixels = np.array(Image.open(io.BytesIO(browser.screenshot())).convert("RGB")).astype(int)
        for line in lines:  # they are on the screen, not only in the data
            assert (np.abs(pixels - _colour(line)).max(axis=-1) <= 2).any()
        assert (pixels == card).all(axis=-1).mean() > 0.2
        shown.append((body, lines, pixels))
    assert _contrast(shown[0][0], shown[1][0]) > 10
    assert (shown[0][2] != shown[1][2]).any(axis=-1).mean() > 0.9
    assert browser.errors == []


def test_a_run_has_one_colour_in_all_charts_and_can_be_hidden(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    folders = [make_run("one", loss="wgan"), make_run("two", loss="hinge")]
    browser.open(report(tmp_path / "page.html", *folders))
    drawn = browser.value(DRAWN)
    assert {(line["name"], line["colour"]) for line in drawn} == {
        ("one", drawn[0]["colour"]),
        ("two", drawn[1]["colour"]),
    }
    assert drawn[0]["colour"] != drawn[1]["colour"]
    panel = [line for line in drawn if line["row"] == "panel/critic/hinge"]
    assert [line["y"][0] for line in panel] == [row(1, loss)["panel/critic/hinge"]
                                                for loss in ("wgan", "hinge")]  # fmt: skip
    browser.value("document.querySelector('.chip').click()")
    assert {line["name"] for line in browser.value(DRAWN)} == {"two"}
    shown = "[...document.querySelectorAll('figure')].map(figure => figure.checkVisibility())"
    assert browser.value(shown) == [False, True]


def test_a_smoothed_line_is_drawn_over_the_raw_one_as_its_weighted_past(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run("demo", rows=50)
    browser.open(report(tmp_path / "page.html", folder))
    raw = browser.value(DRAWN)
    smoothing = "document.getElementById('smoothing')"
    browser.value(f"{smoothing}.value = 4, {smoothing}.dispatchEvent(new Event('input'))")
    assert browser.value(DRAWN) == raw
    (chart,) = browser.value(
        """ganscaleReport.charts.map(chart => chart.element.data)
        .filter(lines => lines.some(line => line.meta == 'loss/generator'))"""
    )
    (smoothed,) = (line for line in chart if line["name"] == "sum, smoothed")
    (line,) = (line for line in raw if line["row"] == "loss/generator")
    x, y = np.array(line["x"]), np.array(line["y"])
    constant = 0.1 * x[-1]  # the fifth stop of the slider; the axis begins at zero
    for place in (0, 1, 20, 49):
        weights = np.exp(-(x[place] - x[: place + 1]) / constant)
        expected = (weights * y[: place + 1]).sum() / weights.sum()
        assert smoothed["y"][place] == pytest.approx(expected, rel=1e-9)


def test_real_images_that_all_runs_share_are_shown_once(make_run: MakeRun) -> None:
    folders = [make_run("a"), make_run("b"), make_run("c")]
    for folder in folders:
        Image.new("RGB", (64, 64), (10, 0, 0)).save(folder / "samples" / "real.png")
    assert render(read_runs(folders), datetime.now()).count("<figure") == 3 + 1
    Image.new("RGB", (64, 64), (200, 0, 0)).save(folders[2] / "samples" / "real.png")
    assert render(read_runs(folders), datetime.now()).count("<figure") == 3 + 3


def test_samples_move_with_time_in_all_runs(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    browser.open(report(tmp_path / "page.html", make_run("a", grids=3), make_run("b", grids=2)))
    shown = """[...document.querySelectorAll('figure')].map(figure =>
        [...figure.querySelectorAll('img')].filter(i => !i.hidden).map(i => i.dataset.at).join())"""
    assert browser.value(shown) == ["12800", "6400"]
    slider = "document.getElementById('time')"
    for place, expected in ((0, ["0", "0"]), (1, ["6400", "6400"]), (2, ["12800", "6400"])):
        browser.value(f"{slider}.value = {place}, {slider}.dispatchEvent(new Event('input'))")
        assert browser.value(shown) == expected
    browser.value("document.getElementById('play').click()")
    browser.wait_for(f"{slider}.value == 2 && document.getElementById('play').textContent == '▶'")
    colours = browser.value(
        """(async () => { const image = document.querySelector('img:not([hidden])');
        await image.decode(); const canvas = document.createElement('canvas');
        const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
        return [...context.getImageData(8, 8, 1, 1).data]; })()"""
    )
    assert colours[:3] == pytest.approx([160, 40, 200], abs=6)


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_phone_shows_the_page_without_scrolling_sideways(
    browser: Chromium, make_run: MakeRun, tmp_path: Path, several: bool
) -> None:
    folders = [make_run("a-rather-long-name-of-a-run-" + "x" * 60), make_run("b"), make_run("c")]
    page = report(tmp_path / "page.html", *folders[: 3 if several else 1])
    browser.open(page, width=400, height=800)
    browser.value(DRAWN)
    assert browser.value("document.documentElement.scrollWidth") == 400
    widths = browser.value("ganscaleReport.charts.map(c => c.element._fullLayout.width)")
    assert all(300 < width <= 400 for width in widths)
    cut = """[...document.querySelectorAll('body *')].filter(element =>
        element.scrollWidth > element.clientWidth + 1
        && getComputedStyle(element).overflowX === 'auto').map(element => element.className)"""
    compared = ["scroller"] * len(browser.value(cut)) if several else []
    assert browser.value(cut) == compared  # tables with a column for each run scroll in their box
    browser.resize(1000, 800)  # turned
    browser.value("document.querySelector('.cards').scrollIntoView()")
    browser.wait_for("ganscaleReport.charts[0].element._fullLayout.width > 400")


def test_a_hundred_thousand_rows_are_drawn_with_every_spike_and_gap(
    browser: Chromium, tmp_path: Path
) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    values = np.random.default_rng(0).normal(size=100_000).round(6).tolist()
    values[1234], values[77_777], values[50_000] = 40.0, -55.5, math.nan
    with (folder / "metrics.jsonl").open("w") as file:
        for number, value in enumerate(values):
            text = "nan" if math.isnan(value) else value
            file.write(f'{{"loss/critic": {json.dumps(text)}, ')
            file.write(f'"progress/images_seen": {number * 64}}}\n')
    page = report(tmp_path / "page.html", folder)
    assert page.stat().st_size < 3e6
    assert "each stretch of rows keeps its minimum and its maximum" in page.read_text()
    browser.open(page)
    (line,) = browser.value(DRAWN)
    assert len(line["x"]) <= 2005
    drawn = dict(zip(line["x"], line["y"], strict=True))
    assert (drawn[1234 * 64], drawn[77_777 * 64], drawn[50_000 * 64]) == (40.0, -55.5, None)
    marks = browser.value(
        "ganscaleReport.charts[0].element.data.filter(l => l.yaxis == 'y2').map(l => [l.x, l.text])"
    )
    assert marks == [[[50_000 * 64], ["NaN"]]]
    assert browser.errors == []


def test_new_runs_and_runs_without_rows_make_pages_too(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    begun, bare = make_run("begun", rows=1, grids=0), make_run("bare", rows=0, grids=0)
    (begun / "summary.json").unlink()
    for name in ("metrics.jsonl", "summary.json", "log.txt"):
        (bare / name).unlink()
    for folders in ([bare], [begun, bare]):
        browser.open(report(tmp_path / "page.html", *folders))
        browser.value(DRAWN)
        assert browser.errors == []
        assert "in progress or killed" in browser.value("document.body.innerText")
        assert browser.value("document.getElementById('samples')") is None


def test_pages_are_as_small_as_they_claim(make_run: MakeRun) -> None:
    page = render(read_runs([make_run("demo")]), datetime(2026, 1, 2, 3, 4))
    assert len(page.encode()) < 2.5e6
    assert "2026-01-02 03:04" in page


def test_mistakes_are_reported_in_one_sentence(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"error: there is no run folder {tmp_path / 'nowhere'}\n"
    folder = make_run("demo")
    output = tmp_path / "missing" / "page.html"
    assert main(["report", str(folder), "--output", str(output)]) == 2
    assert "the report cannot be written" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()


def _colour(css: str) -> np.ndarray:
    """(3,) of 0 to 255 from rgb(1, 2, 3)."""
    return np.array([float(part) for part in re.findall(r"[\d.]+", css)[:3]])


def _contrast(one: Any, other: Any) -> float:
    """The ratio of two colours, as WCAG 2.2 defines it."""

    def luminance(colour: np.ndarray) -> float:
        share = colour / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
