"""How a run is continued and watched."""

from dataclasses import dataclass

from ganscale.setting import setting


@dataclass
class AuditConfig:
    """Audits compare weights and optimizer states over all ranks, also before checkpoints."""

    every_images: int = setting("Interval between comparisons.", 100_000, unit="images", at_least=1)


@dataclass
class ResumeConfig:
    """Continuing a stored run."""

    allow: list[str] = setting("Changed settings to accept although they change the curve.", list)


@dataclass
class RuntimeConfig:
    """Supervision of the ranks. The run also ends when a rank gives no sign of life for a tenth of
    `timeout_seconds` (but at least 30 s)."""

    timeout_seconds: float = setting(
        "The run ends when no rank makes progress for this long.", 600.0, unit="seconds", above=0
    )
    join_timeout_seconds: float = setting(
        "At the start, each rank waits this long for all others.", 120.0, unit="seconds", above=0
    )
    health_check_seconds: float = setting(
        "Before training, every device must compute, and the ranks add up a tensor, within this "
        "long; 0: no check.",
        60.0,
        unit="seconds",
        at_least=0,
    )


@dataclass
class ProfileConfig:
    """Profiling of some cycles with PyTorch's profiler."""

    cycles: int = setting("Cycles to profile once the run is warm; 0: off.", 0, at_least=0)
