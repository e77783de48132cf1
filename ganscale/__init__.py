"""Train GANs on one CPU, eight GPUs or a cluster, with the same command and the same result."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ganscale.evaluation.exported_generator import load_generator as load_generator

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_generator`, which needs torch, once it is asked for."""
    if name == "load_generator":
        from ganscale.evaluation.exported_generator import load_generator

        return load_generator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
