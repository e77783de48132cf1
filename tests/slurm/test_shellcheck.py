"""What shellcheck says about the batch scripts."""

import subprocess

from tests.helpers.processes import REPOSITORY


def test_shellcheck_finds_nothing_in_the_batch_scripts(shellcheck: str) -> None:
    scripts = sorted(map(str, (REPOSITORY / "slurm").iterdir()))
    assert any(script.endswith(".sh") for script in scripts)
    result = subprocess.run(
        [shellcheck, *scripts], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout
