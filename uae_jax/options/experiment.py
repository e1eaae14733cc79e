"""The whole config of a run."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from uae_jax.files import input_path, local_path
from uae_jax.options import buckets as bucket_sizes
from uae_jax.options import mixture
from uae_jax.options import stages as sections
from uae_jax.options.base import Options, option
from uae_jax.options.rewards import EXTERNAL, image_text_kind
from uae_jax.options.sampling import DATASET, GenerationOptions

DTYPES = ("bfloat16", "float32")
REMAT_POLICIES = ("none", "full", "dots")
# The value of `config.embedders.<kind>` for random numbers: the small world trains its own embedders.
FRESH = "fresh"
# Which of several captions of a record is used.
FIRST, LONGEST, RANDOM = "first", "longest", "random"
# The kind of `data.source` that has no images.
PROMPTS = "prompts"
# Kinds of `data.source` whose names are paths.
PATH_KINDS = ("jsonl", "arrayrecord", "folder", "parquet", "webdataset", PROMPTS)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
  """Where images and captions come from.

  Attributes:
    source: "scenes", or KIND:NAME, see `data.sources`.
    data_dir: folder that relative names in `source` refer to.
    image_field: name of the field, column or feature of the image, of tar members the suffix; "" takes the usual names.
    caption_field: name of the field, column or feature of the captions; "" takes the usual names.
    caption_choice: which of several captions of a record is used: "first", "longest", or "random", drawn anew by the
      seed whenever the record is read for training.
    index_dir: folder for the indexes of large files and folders; "" keeps them beside the data.
    image_px: side in pixels of the square images in a batch, and of held-out images.
    buckets: sizes of the images in a batch, HEIGHTxWIDTH in pixels; a batch has one of them, that with the aspect ratio
      nearest to the ratio of its pictures. Empty: all pictures become squares of `image_px`.
    max_crop: largest fraction of a picture that its bucket may cut off; a picture that fits worse is a bad record.
    caption_tokens: tokens per caption, including the closing token; longer captions are truncated.
    max_bad_fraction: largest fraction of unreadable records before the run stops.
    max_cut_fraction: largest fraction of captions longer than `caption_tokens` before a stage that trains on captions
      stops; 1 sets no limit.
    variant: variant of the small world: "plain", "shifted" or "dense".
  """

  source: str = "scenes"
  data_dir: str = ""
  image_field: str = ""
  caption_field: str = ""
  caption_choice: str = option(FIRST, choices=(FIRST, LONGEST, RANDOM))
  index_dir: str = option("", is_path=True)
  image_px: int = option(512, at_least=1)
  buckets: tuple[str, ...] = ()
  max_crop: float = option(0.5, at_least=0, less_than=1)
  caption_tokens: int = option(512, at_least=2)
  max_bad_fraction: float = option(0.01, at_least=0, at_most=1)
  max_cut_fraction: float = option(1.0, at_least=0, at_most=1)
  variant: str = "plain"

  @property
  def has_images(self) -> bool:
    return PROMPTS not in {kind for kind, _ in self._parts()}

  @property
  def image_sizes(self) -> tuple[bucket_sizes.Size, ...]:
    """(height, width) of the images of training: those of the buckets, or one square."""
    return bucket_sizes.parse(self.buckets) or ((self.image_px, self.image_px),)

  @property
  def largest_size(self) -> bucket_sizes.Size:
    """The size with the most pixels."""
    return max(self.image_sizes, key=math.prod)

  def _parts(self) -> list[tuple[str, str]]:
    """(kind, name) of the source, or of each source of a mixture."""
    kind, _, name = self.source.partition(":")
    sources = [source for _, source in mixture.parse(name)] if kind == mixture.MIXTURE else [self.source]
    return [(kind, name) for kind, _, name in (source.partition(":") for source in sources)]

  def check(self) -> None:
    kind, colon, name = self.source.partition(":")
    if kind in PATH_KINDS:
      self.replace_path("source", name, prefix=kind + colon, is_input=True)
    if kind == mixture.MIXTURE:
      self._check_mixture(name)
    if kind != "tfds":  # TFDS opens addresses itself
      self.replace_path("data_dir", self.data_dir, is_input=True)
    if kind not in ("scenes", "tfds"):
      self.refuse_inert(("variant",), f"source = {self.source!r}, which is not the small world")
    if kind == PROMPTS:
      self.refuse_inert(("image_field",), f"source = {self.source!r}, which has no images")
    if not self.buckets:
      self.refuse_inert(("max_crop",), "buckets = ()")
    elif kind == "scenes":
      raise ValueError(f"buckets = {self.buckets}: the images of source = {self.source!r} are all squares")
    try:
      bucket_sizes.parse(self.buckets)
    except ValueError as error:
      raise ValueError(f"buckets = {error}") from error
    if kind in ("scenes", "folder"):
      names = ("image_field", "caption_field", "caption_choice")
      self.refuse_inert(names, f"source = {self.source!r}, whose records have no named fields")

  def _check_mixture(self, name: str) -> None:
    parts = []
    for weight, source in _parse(name):
      kind, _, path = source.partition(":")
      if kind in ("scenes", mixture.MIXTURE):
        raise ValueError(f"source = {self.source!r}: {kind} cannot be part of a mixture")
      try:
        parts.append(f"{weight!r}*{kind}:{input_path(path) if kind in PATH_KINDS else path}")
      except ValueError as error:
        raise ValueError(f"source = {error}") from error
    object.__setattr__(self, "source", f"{mixture.MIXTURE}:{mixture.SEPARATOR.join(parts)}")


def _parse(name: str) -> list[tuple[float, str]]:
  try:
    return mixture.parse(name)
  except ValueError as error:
    raise ValueError(f"source = {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeriodicEvaluationOptions(Options):
  """Held-out figures while a stage trains, as `evaluation_<figure>` in its metrics.

  Attributes:
    every_steps: interval at which a stage computes its held-out figures on the averaged policy, before its first and
      after its last step too; 0 disables.
    num_images: held-out images, the first of `evaluation.num_images`.
  """

  every_steps: int = option(0, at_least=0)
  num_images: int = option(64, at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuiteEvaluationOptions(Options):
  """Suites of `uae-jax evaluate` at small size, before, while and after each stage that captions and generates.

  Attributes:
    names: suites that are scored here, each as NAME:PATH, such as transfer:pictures; their figures are
      `suite_<name>...` in the metrics. Embedders are those of `evaluation.embedders`.
    every_steps: interval while a stage trains; 0: before its first and after its last step only.
    limit: first prompts or pictures of each suite that are used.
  """

  names: tuple[str, ...] = ()
  every_steps: int = option(0, at_least=0)
  limit: int = option(16, at_least=1)

  def check(self) -> None:
    found = []
    for name in self.names:
      suite, colon, path = name.partition(":")
      if not (suite and colon and path):
        raise ValueError(f"names = {name!r}: expected NAME:PATH")
      try:
        found.append(f"{suite}:{local_path(path)}")
      except ValueError as error:
        raise ValueError(f"names = {error}") from error
    suites = [name.partition(":")[0] for name in found]
    if len(set(suites)) < len(suites):
      raise ValueError(f"names = {self.names!r}: expected each suite once")
    object.__setattr__(self, "names", tuple(found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(GenerationOptions):
  """Held-out figures after each stage.

  Attributes:
    num_images: held-out images; 0 evaluates nothing.
    batch_size: images per call.
    num_noises: reconstructions per image whose similarities are averaged.
    max_new_tokens: caption budget in tokens.
    embedders: the first gives `reward_similarity`, the second `held_out_similarity`, each further one
      `<kind>_similarity`.
    gallery_images: images in the report's gallery.
    caption_every_steps: interval at which stage 2 captions held-out images while it trains; 0 disables.
    seed: seed of captions and noise, the same after every stage.
    periodic: see `PeriodicEvaluationOptions`.
    suites: see `SuiteEvaluationOptions`.
  """

  num_images: int = option(768, at_least=0)
  batch_size: int = option(64, at_least=1)
  num_noises: int = option(1, at_least=1)
  max_new_tokens: int = option(512, at_least=1)
  sampler_steps: int = option(40, at_least=1)
  embedders: tuple[str, ...] = ("clip", "dinov2")
  gallery_images: int = option(8, at_least=0)
  caption_every_steps: int = option(50, at_least=0)
  seed: int = 0
  periodic: PeriodicEvaluationOptions = PeriodicEvaluationOptions()
  suites: SuiteEvaluationOptions = SuiteEvaluationOptions()

  def check(self) -> None:
    super().check()
    if self.periodic.every_steps and self.periodic.num_images > self.num_images:
      raise ValueError(f"periodic.num_images = {self.periodic.num_images} is more than num_images = {self.num_images}")


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
  """

  seed: int = 0
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
  generation_for_understanding: sections.GenerationForUnderstandingStage = stage(
    sections.GenerationForUnderstandingStage(), "Stage 2 · Generation for Understanding", "After stage 2"
  )
  understanding_for_generation: sections.UnderstandingForGenerationStage = stage(
    sections.UnderstandingForGenerationStage(), "Stage 3 · Understanding for Generation", "After stage 3"
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
  field.name for field in dataclasses.fields(Experiment) if isinstance(field.default, sections.ReinforcementStage)
)
