"""Job arrays on a real SLURM: a sweep, and indexing in parts."""

import re
import shutil
from pathlib import Path

from ganscale.data.manifest import Manifest
from tests.helpers.processes import REPOSITORY
from tests.slurm.jobs import Jobs

OBJECTIVES = "configs/sweeps/objectives.txt"


def test_the_sweep_of_objectives_has_all_of_them_each_as_a_run_of_its_own() -> None:
    lines = (REPOSITORY / OBJECTIVES).read_text().splitlines()
    settings = [line.split() for line in lines if not line.startswith("#")]
    files = sorted((REPOSITORY / "configs" / "objective").glob("*.yaml"))
    assert settings == [
        [f"configs/objective/{file.name}", f"run.name=objectives-{file.stem}"] for file in files
    ]
    script = (REPOSITORY / "slurm" / "sweep.sbatch").read_text()
    assert re.findall(r"^#SBATCH --array=1-(\d+)", script, re.MULTILINE) == [str(len(files))]


def test_each_task_of_a_sweep_trains_the_run_of_its_line(jobs: Jobs, tmp_path: Path) -> None:
    chosen = {4: "minimax", 9: "wgan", 10: "wgan_gp"}
    array = jobs.sweep(
        OBJECTIVES, "training.total_images=320", options=f"--array={','.join(map(str, chosen))}"
    )
    for task, objective in chosen.items():
        jobs.cluster.wait_for(f"{array}_{task}", JobState="COMPLETED")
        assert jobs.summary(f"objectives-{objective}")["images_seen"] == 320
        config = (jobs.run_folder(f"objectives-{objective}") / "config.yaml").read_text()
        assert f"name: {objective.removesuffix('_gp')}\n" in config
    assert len([path for path in tmp_path.glob("objectives-*") if path.is_dir()]) == 3


def test_an_array_indexes_shards_in_parts_and_a_last_job_makes_the_manifest(
    jobs: Jobs, digits: Path, tmp_path: Path
) -> None:
    (shards := tmp_path / "shards").mkdir()
    for path in digits.glob("*.tar"):
        shutil.copy(path, shards)
    parts = jobs.submit("shards.sbatch", "index", str(shards), options="--array=1-2")
    last = jobs.submit(
        "shards.sbatch", "index", str(shards), options=f"--dependency=afterany:{parts}"
    )
    jobs.cluster.wait_for(last, JobState="COMPLETED")
    assert "not read, since unchanged: 5 of 5 shards" in jobs.log(last)
    assert Manifest.load(shards).fingerprint == Manifest.load(digits).fingerprint
