"""The whole config of a run."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from uae_jax.files import input_path
from uae_jax.options import reinforcement
from uae_jax.options import stages as sections
from uae_jax.options.base import Options, option
from uae_jax.options.data import DataOptions
from uae_jax.options.evaluation import EvaluationOptions
from uae_jax.options.image_tokens import ImageTokenStage, JointTokenStage
from uae_jax.options.rewards import EXTERNAL, image_text_kind
from uae_jax.options.sampling import DATASET, LARGEST_SEED

DTYPES = ("bfloat16", "float32")
REMAT_POLICIES = ("none", "full", "dots")
# The value of `config.embedders.<kind>` for random numbers: the small world trains its own embedders.
FRESH = "fresh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitOptions(Options):
  """What a run starts from; empty fields start from random numbers.

  Attributes:
    weights: folder of an official or plain UAE, or of an Orbax export.
    checkpoint: finished stage of another run, "WORKDIR:STAGE"; "WORKDIR" alone is its newest finished stage.
  """

  weights: str = option("", is_input=True)
  checkpoint: str = option("", is_path=True)

  def check(self) -> None:
    if self.weights and self.checkpoint:
      raise ValueError("weights and checkpoint are both set: a run starts from one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions(Options):
  """Adapters where the weights have none yet.

  Attributes:
    rank: rank r.
    alpha: adapters are scaled by alpha / r.
  """

  rank: int = option(16, at_least=1)
  alpha: float = option(16.0, more_than=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions(Options):
  """Shape of the device mesh; the product is the number of devices.

  Attributes:
    data: data parallelism; over slices, this axis spans the network between them.
    fsdp: parameters are sharded over this axis and all-gathered per layer.
    tensor: tensor parallelism over heads and MLP widths.
  """

  data: int = option(1, at_least=1)
  fsdp: int = option(1, at_least=1)
  tensor: int = option(1, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileOptions(Options):
  """Steps of every stage that are traced by xprof.

  Attributes:
    first_step: first traced step, counted from 1.
    num_steps: number of traced steps; 0 traces none.
  """

  first_step: int = option(10, at_least=1)
  num_steps: int = option(0, at_least=0)

  def check(self) -> None:
    if not self.num_steps:
      self.refuse_inert(("first_step",), "num_steps = 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Options):
  """Which checkpoints of a stage stay on disk.

  Attributes:
    last: number of most recent checkpoints to keep.
    best: number of additional checkpoints to keep, ranked by `metric`; 0 disables.
    metric: name of a logged metric, taken at the step that is saved.
    mode: whether the largest ("max") or smallest ("min") metric is best.
  """

  last: int = option(2, at_least=1)
  best: int = option(0, at_least=0)
  metric: str = "loss"
  mode: str = option("min", choices=("max", "min"))

  def check(self) -> None:
    if not self.best:
      self.refuse_inert(("metric", "mode"), "best = 0")


# Beginnings of the names of libtpu's flags, and the two such names that XLA itself knows.
LIBTPU_PREFIXES = ("xla_tpu_", "xla_jf_", "xla_sc_", "xla_enable_async_", "xla_latency_hiding_scheduler_", "megascale_")
XLA_TPU_FLAGS = ("xla_tpu_detect_nan", "xla_tpu_detect_inf")


def stage(default: sections.Stage, title: str, moment: str) -> Any:
  """A field of `Experiment` that is a stage; `training.stages.<field>` makes it.

  Args:
    default: the section with its defaults.
    title: heading in reports.
    moment: column heading for what is measured after the stage.
  """
  return dataclasses.field(default=default, metadata={"title": title, "moment": moment})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Options):
  """The config of a run; every field of every section is a flag of `uae-jax train` and `uae-jax plan`.

  Attributes:
    seed: seed of the run; each stage derives its own.
    model: name of the model's sizes, see `training.sizes`, or "weights" for those of `init.weights`.
    processor: folder of tokenizer and image processor; "" takes that of the weights or of the small world.
    dtype: dtype of the parameters; trained parameters keep a float32 master copy.
    remat: what the backward pass recomputes per layer: "none", "full", or "dots" (all but matrix products).
    xla_flags: compiler flags for every platform, added before those of the environment's XLA_FLAGS.
    libtpu_init_args: flags of the TPU compiler and runtime, such as --xla_tpu_enable_latency_hiding_scheduler=true,
      added before those of the environment's LIBTPU_INIT_ARGS; unused on other platforms.
    max_skipped_in_a_row: updates with a non-finite loss or gradient before the run stops.
    tensorboard: writes TensorBoard event files beside metrics.jsonl.
    metric_writers: further writers of the metrics: "wandb", or MODULE:FUNCTION, see `training.metric_writers`.
    watchdog_seconds: longest time between the ends of two steps, after which a process writes the stacks of its threads
      and exits with 175; loading, compiling, evaluation and saves may take 20 times as long; 0 disables.
    stages: names of the stages to run, in this order.
    rounds: number of alternations of the RL stages.
    init: see `InitOptions`.
    embedders: kind -> folder of its weights, "fresh" for random numbers, or "" for none.
    lora: see `LoRAOptions`.
    mesh: see `MeshOptions`.
    profile: see `ProfileOptions`.
    checkpoints: see `CheckpointOptions`.
    data: see `DataOptions`.
    evaluation: see `EvaluationOptions`.
    clip: see `ContrastiveStage`.
    dinov2: see `ContrastiveStage`.
    vae: see `VAEStage`.
    captioner: see `CaptionerStage`.
    pretrain: see `PretrainStage`.
    cold_start: see `ColdStartStage`.
    generation_for_understanding: see `GenerationForUnderstandingStage`.
    understanding_for_generation: see `UnderstandingForGenerationStage`.
    image_tokens: see `ImageTokenStage`.
    joint_tokens: see `JointTokenStage`.
  """

  seed: int = option(0, at_least=0, at_most=LARGEST_SEED // 1000 - 1)  # a stage has 1000 * seed + its number
  model: str = "scenes"
  processor: str = option("", is_input=True)
  dtype: str = option("float32", choices=DTYPES)
  remat: str = option("none", choices=REMAT_POLICIES)
  xla_flags: str = ""
  libtpu_init_args: str = ""
  max_skipped_in_a_row: int = option(20, at_least=1)
  tensorboard: bool = True
  metric_writers: tuple[str, ...] = ()
  watchdog_seconds: float = option(0.0, at_least=0)
  stages: tuple[str, ...] = (
    "pretrain",
    "cold_start",
    "generation_for_understanding",
    "understanding_for_generation",
  )
  rounds: int = option(1, at_least=1)
  init: InitOptions = InitOptions()
  embedders: Mapping[str, str] = dataclasses.field(default_factory=dict)
  lora: LoRAOptions = LoRAOptions()
  mesh: MeshOptions = MeshOptions()
  profile: ProfileOptions = ProfileOptions()
  checkpoints: CheckpointOptions = CheckpointOptions()
  data: DataOptions = DataOptions()
  evaluation: EvaluationOptions = EvaluationOptions()

  # Stages, in the order of a run.
  clip: sections.ContrastiveStage = stage(
    sections.ContrastiveStage(trainable="^(embedders/clip|contrastive)/"), "Reward embedder · CLIP", "Reward embedder"
  )
  dinov2: sections.ContrastiveStage = stage(
    sections.ContrastiveStage(trainable="^(embedders/dinov2|contrastive)/"),
    "Held-out embedder · DINOv2",
    "Held-out embedder",
  )
  vae: sections.VAEStage = stage(sections.VAEStage(), "VAE", "VAE")
  captioner: sections.CaptionerStage = stage(sections.CaptionerStage(), "Captioner warm-up", "Captioner")
  pretrain: sections.PretrainStage = stage(sections.PretrainStage(), "Stage 0 · Decoder pre-training", "After stage 0")
  cold_start: sections.ColdStartStage = stage(sections.ColdStartStage(), "Stage 1 · Cold start", "Before RL")
  generation_for_understanding: reinforcement.GenerationForUnderstandingStage = stage(
    reinforcement.GenerationForUnderstandingStage(), "Stage 2 · Generation for Understanding", "After stage 2"
  )
  understanding_for_generation: reinforcement.UnderstandingForGenerationStage = stage(
    reinforcement.UnderstandingForGenerationStage(), "Stage 3 · Understanding for Generation", "After stage 3"
  )
  image_tokens: ImageTokenStage = stage(
    ImageTokenStage(), "Stage 3 · Understanding for Generation, token by token", "After stage 3"
  )
  joint_tokens: JointTokenStage = stage(
    JointTokenStage(), "Stages 2 and 3 · Both directions, token by token", "After both directions"
  )

  def section(self, name: str) -> Any:
    """The section of a stage."""
    return getattr(self, name)

  @property
  def runs(self) -> list[tuple[str, str]]:
    """(folder, stage) in run order; with several rounds the RL stages alternate."""
    once = [(name, name) for name in self.stages if name not in REINFORCEMENT]
    in_turn = [name for name in self.stages if name in REINFORCEMENT]
    if self.rounds == 1:
      return once + [(name, name) for name in in_turn]
    return once + [(f"{name}_round{k + 1}", name) for k in range(self.rounds) for name in in_turn]

  def check(self) -> None:
    for name in ("xla_flags", "libtpu_init_args"):
      if others := [word for word in getattr(self, name).split() if not word.startswith("--")]:
        raise ValueError(f"{name}: {others[0]!r} is not a flag: expected --NAME=VALUE, separated by spaces")
    check_xla_flags(self.xla_flags, "xla_flags", "libtpu_init_args")
    for name in self.metric_writers:
      if name != "wandb" and not all(name.partition(":")):
        raise ValueError(f"metric_writers: {name!r} is neither wandb nor MODULE:FUNCTION")
    object.__setattr__(
      self, "embedders", {kind: _path_of_embedder(kind, path) for kind, path in self.embedders.items()}
    )
    if not self.stages:
      raise ValueError(f"stages = (): expected some of {', '.join(STAGES)}")
    for name in self.stages:
      if name not in STAGES:
        raise ValueError(f"stages: unknown stage {name!r}, expected some of {', '.join(STAGES)}")
    if len(set(self.stages)) < len(self.stages):
      raise ValueError(f"stages = {self.stages}: a stage is named twice; use rounds to repeat the RL stages")
    if self.rounds > 1 and not set(self.stages) & set(REINFORCEMENT):
      raise ValueError(f"rounds = {self.rounds} does nothing: stages names no RL stage")
    if not self.data.has_images:
      self._check_prompts()
    rows = self.mesh.data * self.mesh.fsdp
    for name in self.stages:
      section = self.section(name)
      if name in REINFORCEMENT:
        cuts = section.updates.num_minibatches * section.updates.num_microbatches
        if section.options.max_new_tokens > self.data.caption_tokens:
          raise ValueError(
            f"{name}.options.max_new_tokens = {section.options.max_new_tokens} is more than "
            f"data.caption_tokens = {self.data.caption_tokens}"
          )
        if section.batch_size % (rows * section.http_reward.num_pieces):
          raise ValueError(
            f"{name}.batch_size = {section.batch_size} is not divisible by mesh.data * mesh.fsdp * "
            f"http_reward.num_pieces = {rows} * {section.http_reward.num_pieces}"
          )
      else:
        cuts = section.num_microbatches
      if section.batch_size % (rows * cuts):
        raise ValueError(
          f"{name}.batch_size = {section.batch_size} is not divisible by mesh.data * mesh.fsdp * microbatches = "
          f"{rows} * {cuts}"
        )

  def _check_prompts(self) -> None:
    """Refuses what needs images, which `data.source` does not have."""
    without = f"data.source = {self.data.source!r} has no images"
    name = "understanding_for_generation"
    others = [stage for stage in self.stages if stage != name]
    if others:
      raise ValueError(f"stages = {self.stages}: {', '.join(others)} need images, and {without}: only {name} does not")
    options = self.section(name).options
    for field, value in (("captions", DATASET), ("conditioning", "text"), ("held_out_embedder", "")):
      if getattr(options, field) != value:
        raise ValueError(f"{name}.options.{field} = {getattr(options, field)!r}: {without}, set it to {value!r}")
    compared = [reward for reward in options.reward_names if reward != EXTERNAL and not image_text_kind(reward)]
    if compared:
      raise ValueError(
        f"{name}.options.reward_weights names {', '.join(compared)}, which compare with the original image, and "
        f"{without}: use the match of image and text, such as 'clip_text', or {EXTERNAL!r}, the external reward"
      )
    if self.evaluation.num_images:
      raise ValueError(f"evaluation.num_images = {self.evaluation.num_images}: {without}, set it to 0")


def _path_of_embedder(kind: str, path: str) -> str:
  try:
    return input_path(path)
  except ValueError as error:
    raise ValueError(f"embedders.{kind} = {error}") from error


def check_xla_flags(flags: str, where: str, remedy: str) -> None:
  """Refuses flags that only libtpu knows, because XLA ends the process on an unknown flag in XLA_FLAGS.

  Args:
    flags: flags for XLA_FLAGS, separated by spaces.
    where: where they are from, for the error message.
    remedy: where flags of libtpu belong.

  Raises:
    ValueError: there is one.
  """
  for flag in flags.split():
    name = flag.lstrip("-").partition("=")[0]
    if name.startswith(LIBTPU_PREFIXES) and name not in XLA_TPU_FLAGS:
      raise ValueError(f"{where}: {flag} is a flag of libtpu, XLA would end the process: put it into {remedy}")


# name -> {"title", "moment"} of every stage, in the order of a run.
STAGES = {field.name: dict(field.metadata) for field in dataclasses.fields(Experiment) if "title" in field.metadata}
REINFORCEMENT = tuple(
  field.name for field in dataclasses.fields(Experiment) if isinstance(field.default, reinforcement.ReinforcementStage)
)
