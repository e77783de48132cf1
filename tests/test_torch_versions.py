"""What the README, pyproject.toml and the Makefile say about versions of torch; an old one."""

import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tests.helpers.processes import REPOSITORY


def found(pattern: str, file: str) -> str:
    """The group of the only match in a file of the repository."""
    (match,) = re.findall(pattern, (REPOSITORY / file).read_text(), re.MULTILINE)
    return match


def test_the_readme_names_the_versions_that_are_accepted_and_tried() -> None:
    accepted = Requirement(found(r'^    "(torch[^"]*)",', "pyproject.toml")).specifier
    oldest = Version(found(r"torch (\S+) or newer", "README.md"))
    assert str(accepted) == f"<3,>={oldest}"
    sentence = found(r"passed with torch ([^:]*):", "README.md")
    tried = [Version(version) for version in re.findall(r"\d+(?:\.\d+)+", sentence)]
    assert tried == sorted(tried)
    assert all(version in accepted for version in tried)
    assert tried[0].release[:2] == oldest.release
    assert tried[0] == Version(found(r"^TORCH \?= (\S+)$", "Makefile"))
    assert Version(found(r"^torch==(\S+)$", "constraints.txt")) in tried


def test_a_torch_that_is_too_old_is_named_with_what_is_needed(tmp_path: Path) -> None:
    """A stand-in: only the record that an old torch is installed."""
    (tmp_path / "torch-2.5.1.dist-info").mkdir()
    record = "Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n"
    (tmp_path / "torch-2.5.1.dist-info" / "METADATA").write_text(record)
    done = subprocess.run(
        [sys.executable, "-m", "ganscale", "configs"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: torch 2\.5\.1 is installed, but ganscale needs torch\S+\n", done.stderr
    )
