"""The package as users install it: a wheel in a fresh environment, and an editable clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ganscale.ready import ready_configs
from tests.helpers.processes import REPOSITORY

SOURCES = ["pyproject.toml", "README.md", "LICENSE", "ganscale", "configs", "launch", "slurm"]


def run(*command: str | Path, cwd: Path, exit_code: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["WANDB_MODE"] = "disabled"
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ganscale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console command of a wheel in a fresh environment, which has the dependencies of this."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # a copy, since a build leaves files behind and finds old ones
        source, copy = REPOSITORY / name, folder / "clone" / name
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True)
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(*pip, "wheel", *options, folder / "clone", cwd=folder)
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    shutil.rmtree(folder / "clone")
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    # Not a site folder, so its own .pth files do not count: no editable ganscale.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv" / "bin" / "ganscale"


def test_a_wheel_trains_a_ready_config_by_its_name(ganscale: Path, tmp_path: Path) -> None:
    run(ganscale, "shards", "write", "bundled:mnist", "data/mnist", cwd=tmp_path)
    settings = ["training.total_images=64", "log.every_images=64", "data.workers=0"]
    settings += ["evaluation.every_images=0", "checkpoint.best=''"]
    printed = run(ganscale, "train", "demo", "hinge", "run.name=tried", *settings, cwd=tmp_path)
    assert "160 of 160 images" in printed
    config = (tmp_path / "runs" / "tried" / "config.yaml").read_text()
    assert "name: hinge" in config
    assert ganscale.parent.parent.name in run(ganscale, "config", "demo", cwd=tmp_path)


def test_a_wheel_lists_its_configs_and_batch_scripts_and_copies_them(
    ganscale: Path, tmp_path: Path
) -> None:
    listed = run(ganscale, "configs", cwd=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == [*ready_configs()]
    assert "slurm/train.sbatch" in run(ganscale, "slurm", cwd=tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("mine")
    copied = run(ganscale, "configs", "--copy", cwd=tmp_path)
    assert "configs/demo.yaml is there already: kept as it is\n" in copied
    run(ganscale, "slurm", "--copy", cwd=tmp_path)
    for folder in ("configs", "launch", "slurm"):
        originals = [*(REPOSITORY / folder).rglob("*.*")]
        assert originals
        for original in originals:
            if "__pycache__" not in original.parts and original.name != "demo.yaml":
                copy = tmp_path / original.relative_to(REPOSITORY)
                assert copy.read_bytes() == original.read_bytes()
    assert (tmp_path / "configs" / "demo.yaml").read_text() == "mine"


def test_a_wheel_of_a_clone_that_was_used_has_no_bytecode(ganscale: Path) -> None:
    (wheel,) = ganscale.parent.parent.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ganscale/shards/bundled/mnist.webp" in names
    assert [name for name in names if "__pycache__" in name] == []


def test_the_folder_above_a_clone_does_not_hide_the_package(tmp_path: Path) -> None:
    (tmp_path / "ganscale" / "ganscale").mkdir(parents=True)
    code = "import ganscale; print(ganscale.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path)
    assert found.strip() == str(REPOSITORY / "ganscale" / "__init__.py")
