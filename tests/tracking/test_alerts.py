import json
import logging
import math
from pathlib import Path

import pytest

from ganscale.tracking.alerts import COLLAPSED, Alerts, read_alerts


@pytest.fixture
def told(tmp_path: Path) -> Alerts:
    return Alerts(tmp_path, "a run")


def kinds(folder: Path) -> list[tuple[str, int]]:
    return [(alert.kind, alert.images_seen) for alert in read_alerts(folder)]


def test_the_first_value_that_is_not_finite_is_told_once(told, tmp_path, caplog):
    told.look({"loss/critic": 1.0, "progress/step": 1}, 64)
    assert kinds(tmp_path) == []
    with caplog.at_level(logging.WARNING):
        told.look({"loss/critic": math.nan, "loss/generator": -math.inf}, 128)
        told.look({"loss/critic": math.nan}, 192)
    assert kinds(tmp_path) == [("nan", 128)]
    assert caplog.text.count("loss/critic") == 1
    assert "128 images" in caplog.text


def test_a_run_that_is_resumed_to_before_an_alert_does_not_repeat_it(told, tmp_path):
    told.look({COLLAPSED: 1.0}, 128)
    resumed = Alerts(tmp_path, "a run")
    resumed.look({COLLAPSED: 0.0}, 64)
    resumed.look({COLLAPSED: 1.0}, 128)
    assert kinds(tmp_path) == [("collapse", 128)]


def test_a_line_that_a_crash_cut_is_passed_over(told, tmp_path):
    told.tell("finish", "done", "the run is done", 640)
    with (tmp_path / "alerts.jsonl").open("a") as file:
        file.write('{"kind": "na')
    assert kinds(tmp_path) == [("finish", 640)]


def test_titles_fit_what_wandb_takes(tmp_path):
    Alerts(tmp_path, "n" * 100).tell("nan", "not finite", "text", 64)
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert len(json.loads(line)["title"]) < 64
