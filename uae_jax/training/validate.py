"""Checks of a config that need more than its options: registered embedders and models, addresses of rewards."""

import difflib

from uae_jax import embedders
from uae_jax.algorithms import samplers
from uae_jax.embedders import text
from uae_jax.models.system import SystemConfig
from uae_jax.options import EXTERNAL, FRESH, Experiment, GenerationOptions, image_text_kind
from uae_jax.options.base import Options
from uae_jax.rewards.external import ExternalReward
from uae_jax.rollouts.guidance_interval import check_schedule
from uae_jax.training.sizes import find
from uae_jax.training.stages import spec


def validate(config: Experiment) -> None:
  """Checks that a config can run, before anything is loaded or written.

  Raises:
    ValueError: the config cannot run; the message names the field.
  """
  find(config.model)
  for kind in config.embedders:
    if kind not in embedders.KINDS:
      near = difflib.get_close_matches(kind, embedders.KINDS, n=1)
      hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(embedders.KINDS)}"
      raise ValueError(f"config.embedders.{kind}: unknown kind of embedder, {hint}")
  check_embedders(config)
  check_guidance("config.evaluation", config.evaluation)
  for name in config.stages:
    section = config.section(name)
    check_guidance(f"config.{name}.options", section.options)
    names = getattr(section.options, "reward_names", ())
    if EXTERNAL in names:
      ExternalReward(section.http_reward)
    for reward in names:
      if image_text_kind(reward):
        check_towers(config, f"config.{name}.options.reward_weights", reward)


def check_system(config: Experiment, uae: SystemConfig) -> None:
  """Checks that the stages of a run can train its system, and that all options of generation have an effect.

  Raises:
    ValueError: a stage trains another kind of system, its images have another size, or an option does nothing; the
      message names it.
  """
  for name in config.stages:
    wanted = spec.find(name).generates_by_captioner
    if wanted is not None and wanted != uae.generates_by_captioner:
      kind = "generates images token by token" if wanted else "has a decoder of its own"
      raise ValueError(f"config.stages names {name!r}, which trains a model that {kind}: this one does not")
  if any(spec.find(name).runs_suites for name in config.stages) and not config.data.buckets:
    try:
      uae.latents_shape(config.data.image_px, config.data.image_px)
    except ValueError as error:
      raise ValueError(f"config.data.image_px = {config.data.image_px}: {error}") from error
  sections = {f"config.{name}.options": config.section(name).options for name in config.stages}
  for where, options in (sections | {"config.evaluation": config.evaluation}).items():
    if isinstance(options, GenerationOptions):
      try:
        options.refuse_inert(uae.inert_options, "a model that generates images token by token")
      except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def check_guidance(where: str, options: Options) -> None:
  """Checks that a guidance interval contains a noise level of the sampler's schedule, where that is known here.

  Raises:
    ValueError: it contains none; the message names the field.
  """
  # A shift by size is known when the sampler is traced, which checks again.
  if isinstance(options, GenerationOptions) and not options.is_shift_by_size and options.guidance != 1.0:
    try:
      check_schedule(samplers.sigmas(options.sampler_steps, options.shift), options.guidance_interval)
    except ValueError as error:
      raise ValueError(f"{where}.{error}") from error


def check_towers(config: Experiment, field: str, reward: str) -> None:
  """Checks that the two towers of a reward for image and text are there, without reading their weights.

  Raises:
    ValueError: a file is missing or of another model; the message names the field.
  """
  kind = image_text_kind(reward)
  source = config.embedders.get(kind, "")
  if source in ("", FRESH):
    raise ValueError(f"{field} names {reward!r}: set config.embedders.{kind} to the folder of its weights")
  try:
    text.open_tower(kind, source).tokenizer()
  except (ValueError, OSError) as error:
    raise ValueError(f"{field} names {reward!r}: {error}") from error


def check_embedders(config: Experiment) -> None:
  """Checks that the run has weights for every embedder that rewards or evaluation use.

  Raises:
    ValueError: an embedder is missing or would have random weights; the message names the field.
  """
  wanted = []
  if config.evaluation.num_images:
    wanted += [("config.evaluation.embedders", name) for name in config.evaluation.embedders]
  for stage in config.stages:
    named = spec.find(stage).embedders(config.section(stage).options)
    wanted += [(f"config.{stage}.options.{field}", name) for field, name in named.items()]
  for field, name in wanted:
    source = config.embedders.get(name, "")
    if not source:
      raise ValueError(f"{field} names {name!r}: set config.embedders.{name} to the folder of its weights")
    if source == FRESH and not find(config.model).trains_from_scratch and not config.init.checkpoint:
      raise ValueError(
        f"{field} names {name!r}, but config.embedders.{name} = {FRESH!r} is random numbers: "
        "set the folder of its weights"
      )
