"""Evaluations on the page: the charts, the best figures, and which of them can be compared."""

import json
from dataclasses import replace
from pathlib import Path

from ganscale.cli.main import main
from ganscale.evaluation.figures import Figures, Identity
from ganscale.report.curves import layout_of
from ganscale.report.evaluations import best_figures, dependences, incomparable
from ganscale.report.run_reader import read_runs
from tests.report.chromium import Chromium
from tests.report.made_rows import MakeRun

IDENTITY = Identity("lite", "ab" * 32, "bilinear to 64", "data 12ab at 32 x 32 x 1", 5000, 300)


def add_evaluations(folder: Path, identity: Identity, values: dict[int, float]) -> Path:
    """Rows as training logs them: the same value for a distance and for recall."""
    with (folder / "metrics.jsonl").open("a") as file:
        for images_seen, value in values.items():
            figures = Figures({"eval/fd_lite": value, "eval/recall_lite": value}, identity, 2.5)
            at = {"progress/images_seen": images_seen, "progress/step": 1, "eval/failed": 0}
            file.write(json.dumps(at | figures.row()) + "\n")
    return folder


def test_only_figures_have_charts_and_a_deviation_shares_that_of_its_mean() -> None:
    names = [
        "eval/fid", "eval/fid64", "eval/kid_subsets_lite", "eval/kid_subsets_std_lite", "eval/is",
        "eval/is_std", "eval/samples", "eval/reference_images", "eval/failed", "eval/seconds",
        "collapse/generator",
    ]  # fmt: skip
    one = layout_of(names, overlays_runs=False)
    assert [*one] == ["eval", "collapse"]
    assert {chart.title: [label for _, label in chart.lines] for chart in one["eval"]} == {
        "FID": [""],
        "FID on 64 components": [""],
        "Inception Score": ["mean", "std"],
        "kernel distance, mean over subsets (lite)": ["mean", "std"],
    }
    several = layout_of(names, overlays_runs=True)["eval"]
    assert [chart.title for chart in several][-1] == (
        "kernel distance, mean over subsets (lite), standard deviation"
    )
    assert len(several) == 6


def test_the_best_figures_are_those_that_compare_with_the_newest(make_run: MakeRun) -> None:
    folder = add_evaluations(make_run("a"), replace(IDENTITY, samples=200), {1000: 1.0, 2000: 9.5})
    add_evaluations(folder, IDENTITY, {3000: 5.0, 4000: 2.5, 5000: 3.0})
    runs = read_runs([folder])
    assert dict(best_figures(runs)) == {
        "eval/fd_lite": ["2.5 at 4,000 images"],
        "eval/recall_lite": ["5 at 3,000 images"],
    }
    assert incomparable(runs) == [
        "Figures from before 3,000 images cannot be compared with later ones: samples: 200, 300."
    ]
    (text,) = dependences(runs)
    assert "Network lite (sha256 abababababababab), bilinear to 64" in text
    assert "5,000 images; 300 samples" in text


def test_runs_whose_figures_cannot_be_compared_have_a_notice(
    browser: Chromium, make_run: MakeRun, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    values = {1000: 3.0, 2000: 2.0}
    same = [add_evaluations(make_run(name), IDENTITY, values) for name in ("a", "b")]
    other = replace(IDENTITY, reference="<b>data</b> 77", resize="none")
    other = add_evaluations(make_run("other"), other, values)
    notices = "[...document.querySelectorAll('.incomparable')].map(e => e.textContent)"
    for folders, expected in (
        ([*same, make_run("without")], []),
        (
            [*same, other],
            [
                "Figures of a and other cannot be compared: resize: bilinear to 64, none; "
                "reference: data 12ab at 32 x 32 x 1, <b>data</b> 77."
            ],
        ),
    ):
        assert main(["report", *map(str, folders), "--output", str(page)]) == 0
        browser.open(page)
        assert browser.value(notices) == expected
        assert browser.value("document.querySelector('nav a[href^=\"#rows\"]').textContent") == (
            "Sample quality"
        )
        assert browser.errors == []
