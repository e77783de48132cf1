import json
import logging
import math
from pathlib import Path

import pytest

from ganscale.run_folder import RunFolder
from ganscale.tracking.alerts import COLLAPSED, Alerts, read_alerts


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def alerts(folder: RunFolder) -> Alerts:
    return Alerts(folder, "a run")


def kinds(folder: RunFolder) -> list[tuple[str, int]]:
    return [(alert.kind, alert.images_seen) for alert in read_alerts(folder)]


def test_the_first_value_that_is_not_finite_is_sent_once(alerts, folder, caplog):
    alerts.check_row({"loss/critic": 1.0, "progress/step": 1}, 64)
    assert kinds(folder) == []
    with caplog.at_level(logging.WARNING):
        alerts.check_row({"loss/critic": math.nan, "loss/generator": -math.inf}, 128)
        alerts.check_row({"loss/critic": math.nan}, 192)
    assert kinds(folder) == [("nan", 128)]
    assert caplog.text.count("loss/critic") == 1
    assert "128 images" in caplog.text


def test_a_run_that_is_resumed_to_before_an_alert_does_not_repeat_it(alerts, folder):
    alerts.check_row({COLLAPSED: 1.0}, 128)
    resumed = Alerts(folder, "a run")
    resumed.check_row({COLLAPSED: 0.0}, 64)
    resumed.check_row({COLLAPSED: 1.0}, 128)
    assert kinds(folder) == [("collapse", 128)]


def test_a_line_that_a_crash_cut_is_skipped(alerts, folder):
    alerts.send("finish", "done", "the run is done", 640)
    with folder.alerts.open("a") as file:
        file.write('{"kind": "na')
    assert kinds(folder) == [("finish", 640)]


def test_titles_fit_what_wandb_takes(folder):
    Alerts(folder, "n" * 100).send("nan", "not finite", "text", 64)
    (line,) = folder.alerts.read_text().splitlines()
    assert len(json.loads(line)["title"]) < 64
