"""Configs and batch scripts that travel with the package. Its folders are links to those at the top
of the repository, and copies of them in an installed package."""

from collections.abc import Iterator
from pathlib import Path

READY = Path(__file__).parent
_PIECES = "objective", "augmentation"  # folders of parts of a run


def ready_configs() -> dict[str, Path]:
    """The files of complete runs and their pieces by name, such as `demo` and `objective/lsgan`."""
    root = READY / "configs"
    files = [path for folder in ("", *_PIECES) for path in sorted((root / folder).glob("*.yaml"))]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def find_config(name: str) -> Path | None:
    """The ready config called `name`; the folder of a piece may be left out."""
    configs = ready_configs()
    names = name, *(f"{folder}/{name}" for folder in _PIECES)
    return next((configs[each] for each in names if each in configs), None)


def title(path: Path) -> str:
    """The first line of a file's first comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ")), "")


def copy_here(folder: str, here: Path) -> Iterator[tuple[Path, bool]]:
    """Copies the files of `configs`, `slurm` or `launch` to `here`/`folder`, and yields each copy
    with whether it was made: a file that is there already is kept."""
    for source in sorted((READY / folder).rglob("*")):
        target = here / folder / source.relative_to(READY / folder)
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        if is_new := not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        yield target, is_new
