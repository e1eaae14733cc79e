"""All options of a run: every dataclass that a config can hold, with its defaults, ranges and documentation.

Nothing here imports JAX. Config files start from `new_config()` and change what differs; everything below the commands
reads the typed `Experiment` that `read_config` makes of it.
"""

from uae_jax.options.base import Options
from uae_jax.options.config import new_config, read_config
from uae_jax.options.data import DataOptions
from uae_jax.options.evaluation import EvaluationOptions, PeriodicEvaluationOptions, SuiteEvaluationOptions
from uae_jax.options.experiment import (
  FRESH,
  REINFORCEMENT,
  STAGES,
  CheckpointOptions,
  Experiment,
  InitOptions,
  LoRAOptions,
  MeshOptions,
  ProfileOptions,
)
from uae_jax.options.objectives import ImageObjective, TokenObjective
from uae_jax.options.optimization import AdvantageOptions, OptimizerOptions, ReferenceOptions, UpdateOptions
from uae_jax.options.reinforcement import (
  GenerationForUnderstandingOptions,
  GenerationForUnderstandingStage,
  ReinforcementStage,
  UnderstandingForGenerationOptions,
  UnderstandingForGenerationStage,
)
from uae_jax.options.rewards import (
  EXTERNAL,
  TEXT_REWARDS,
  ExternalRewardOptions,
  TextRewardOptions,
  embedder_of,
  image_text_kind,
  is_similarity,
)
from uae_jax.options.sampling import CaptionOptions, GenerationOptions, RewardOptions, ShiftOptions, TokenOptions
from uae_jax.options.stages import (
  CaptionerOptions,
  CaptionerStage,
  ColdStartOptions,
  ColdStartStage,
  ContrastiveOptions,
  ContrastiveStage,
  PretrainOptions,
  PretrainStage,
  Stage,
  SupervisedStage,
  VAEOptions,
  VAEStage,
)

__all__ = [
  "AdvantageOptions",
  "CaptionOptions",
  "CaptionerOptions",
  "CaptionerStage",
  "CheckpointOptions",
  "ColdStartOptions",
  "ColdStartStage",
  "ContrastiveOptions",
  "ContrastiveStage",
  "DataOptions",
  "EXTERNAL",
  "EvaluationOptions",
  "Experiment",
  "ExternalRewardOptions",
  "FRESH",
  "GenerationForUnderstandingOptions",
  "GenerationForUnderstandingStage",
  "GenerationOptions",
  "ImageObjective",
  "InitOptions",
  "LoRAOptions",
  "MeshOptions",
  "OptimizerOptions",
  "Options",
  "PeriodicEvaluationOptions",
  "SuiteEvaluationOptions",
  "PretrainOptions",
  "PretrainStage",
  "ProfileOptions",
  "REINFORCEMENT",
  "ReferenceOptions",
  "ReinforcementStage",
  "RewardOptions",
  "STAGES",
  "ShiftOptions",
  "Stage",
  "SupervisedStage",
  "TEXT_REWARDS",
  "embedder_of",
  "image_text_kind",
  "is_similarity",
  "TextRewardOptions",
  "TokenObjective",
  "TokenOptions",
  "UnderstandingForGenerationOptions",
  "UnderstandingForGenerationStage",
  "UpdateOptions",
  "VAEOptions",
  "VAEStage",
  "new_config",
  "read_config",
]
