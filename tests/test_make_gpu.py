"""`make gpu` on the CPU: what it writes, also of steps that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import STEPS, Step, main, measure
from ganscale.runtime import has_slow_bfloat16
from tests.helpers.processes import REPOSITORY

ON_CPU = {
    **os.environ,
    "GANSCALE_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(REPOSITORY),
}
ROW = '{"name": "cycle", "rival": "", "ratio": 2, "unit": "x", "note": ""}'
DIES = f"import sys; open(sys.argv[1], 'w').write('{{\"rows\": [{ROW}]}}'); sys.exit('too hot')"
HANGS = "import sys, time; open(sys.argv[1], 'w').write('[{'); time.sleep(600)"


def small(name: str, *arguments: str) -> Step:
    (step,) = (step for step in STEPS if step.name == name)
    return Step(name, (*step.arguments, *arguments))


@pytest.mark.skipif(
    has_slow_bfloat16(torch.device("cpu")), reason="bfloat16 in software takes too long"
)
def test_results_are_written_with_versions_tests_rows_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        small("tests", "-k", "(every_critic and mlp) or never_waits and wgan_lp"),
        small("forms", "--only", "dcgan32/f32"),
        small("step", "--only", "wgan_gp/dcgan32"),
    ]
    measure(steps, tmp_path, 600, ON_CPU)
    content = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert {"torch", "cuda", "driver", "gpu"} <= content["machine"].keys()
    assert content["tf32"] is False
    tests, cycles = content["steps"]["tests"], content["steps"]["step"]
    assert [tests["failure"], cycles["failure"]] == ["", ""]
    assert (tests["passed"], tests["failed"]) == (2, [])
    assert tests["skipped"] == {"a CPU has no streams, graphs, NCCL or memory of its own": 1}
    forms = content["steps"]["forms"]
    assert forms["failure"] == ""
    assert {"dcgan32/f32/subpixel", "dcgan32/f32/all"} <= {row["name"] for row in forms["rows"]}
    *peaks, plain, autocast, mixed, graphs, graphs_too = cycles["rows"]
    assert all(peak["ratio"] > 0 and "TFLOP/s" in peak["unit"] for peak in peaks)
    names = [row["name"].rpartition("/")[2] for row in (plain, autocast, mixed)]
    assert names == ["f32", "bf16", "bf16_penalty_f32"]
    for row in (plain, autocast, mixed):
        assert row["ratio"] == min(row["rivals"].values()) > 0
        assert row["images_per_second"] > 0
        assert 0 < row["percent_of_peak"] < 100
    assert {"plain loop", "PyTorch-GAN", "PyTorch Lightning"} <= plain["rivals"].keys()
    for row in (graphs, graphs_too):
        assert row["name"].endswith("_cuda_graphs")
        assert (row["ratio"], row["note"]) == (None, "not measured: no CUDA graphs on cpu")
    printed = capsys.readouterr().out
    assert "| cycle | images/s | plain loop |" in printed
    assert "| `wgan_gp/dcgan32/bf16` |" in printed


def test_a_step_that_fails_or_hangs_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        Step("dies", ("-c", DIES, "FILE")),
        Step("hangs", ("-c", HANGS, "FILE"), share=0.01),
    ]
    found = measure(steps, tmp_path, 600, ON_CPU)["steps"]
    assert found == json.loads((tmp_path / "gpu-cpu.json").read_text())["steps"]
    assert [row["ratio"] for row in found["dies"]["rows"]] == [2]
    assert found["dies"]["failure"] == "exit code 1: too hot\n"
    assert found["hangs"]["failure"].startswith("not done after 6 s")
    assert "its file cannot be read" in found["hangs"]["failure"]
    assert "| `dies/cycle` |  | 2 | x |" in capsys.readouterr().out


def test_what_tests_record_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_ratio.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('network', ['dcgan', 'resnet'])\n"
        "def test_ratio(network, record_property):\n"
        "    record_property('planned / real', '0.97')\n"
        "    assert network == 'resnet'\n"
    )
    arguments = ("-m", "pytest", "-p", "no:cacheprovider", "--junit-xml", "FILE", str(tmp_path))
    tests = measure([Step("tests", arguments)], tmp_path, 600, ON_CPU)["steps"]["tests"]
    assert (tests["passed"], len(tests["failed"])) == (1, 1)
    assert tests["recorded"] == {"planned / real/dcgan": "0.97", "planned / real/resnet": "0.97"}
    assert "| `planned / real/resnet` | 0.97 |" in capsys.readouterr().out


def test_the_exit_code_says_whether_a_step_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GANSCALE_DEVICE", "cpu")
    arguments = ["--results", str(tmp_path), "--steps", "launches"]
    for code, expected in (("pass", 0), ("import sys; sys.exit(3)", 1)):
        monkeypatch.setattr("benchmarks.gpu.STEPS", (Step("launches", ("-c", code)),))
        assert main(arguments) == expected
    monkeypatch.delenv("GANSCALE_DEVICE")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: no GPU")


@pytest.mark.parametrize("given", [True, False])
def test_make_installs_nothing_for_a_given_python(given: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    python = [f"PYTHON={sys.executable}"] if given else []
    command = ["make", "--always-make", "--dry-run", "gpu", *python]
    printed = subprocess.check_output(command, cwd=REPOSITORY, env=environment, text=True)
    assert ("pip install" in printed) != given
    assert printed.splitlines()[-1].endswith("python -m benchmarks.gpu") or given
    if given:
        assert printed == f"{sys.executable} -m benchmarks.gpu\n"
