"""A small disk that can be filled."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MIB = 64


@dataclass(frozen=True)
class Disk:
    """path: where it is mounted; is_small: False for an ordinary disk, which cannot be filled"""

    path: Path
    is_small: bool

    def fill(self) -> None:
        """Takes all free space."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Gives it back."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.path / "filler"


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
    """A tmpfs at `path` for root, otherwise a folder."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_MIB}m,mode=700", "ganscale-faults", str(path)]
    is_small = os.geteuid() == 0 and _succeeds(mount)
    try:
        yield Disk(path, is_small)
    finally:
        if is_small:
            _succeeds(["umount", "--lazy", str(path)])


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
