"""Every setting of a run, with its default, unit, limits and explanation.

`ganscale.config` checks files and overrides against these dataclasses; `ganscale config --explain`
and docs/settings.md print them. A setting without a default is required; the first choice of
`choice` is its default.
"""

from dataclasses import dataclass, field

from ganscale.schema.data import CriticConfig, DataConfig, GeneratorConfig, RunConfig
from ganscale.schema.objective import (
    AdaptiveConfig,
    AugmentationConfig,
    ClipConfig,
    GeneratorPenaltyConfig,
    LossConfig,
    ObjectiveConfig,
    PenaltyConfig,
)
from ganscale.schema.operation import AuditConfig, ProfileConfig, ResumeConfig, RuntimeConfig
from ganscale.schema.records import CheckpointConfig, EvaluationConfig, LogConfig, SamplesConfig
from ganscale.schema.training import EMAConfig, OptimizerConfig, OptimizersConfig, TrainingConfig
from ganscale.setting import setting

__all__ = [
    "AdaptiveConfig",
    "AuditConfig",
    "AugmentationConfig",
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EMAConfig",
    "EvaluationConfig",
    "GeneratorConfig",
    "GeneratorPenaltyConfig",
    "LogConfig",
    "LossConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OptimizersConfig",
    "PenaltyConfig",
    "ProfileConfig",
    "ResumeConfig",
    "RunConfig",
    "RuntimeConfig",
    "SamplesConfig",
    "TrainingConfig",
]


@dataclass
class Config:
    seed: int = setting(
        "Seed of initial weights, data order and all other randomness.", 0, at_least=0, below=2**64
    )
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizersConfig = field(default_factory=OptimizersConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
