"""A stage of the config, made ready to run: its step, its first state, its data, and what becomes of its result."""

from collections.abc import Callable
import contextlib
import dataclasses
import re
import time

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from uae_jax import trees
from uae_jax.algorithms import forward_process
from uae_jax.algorithms.advantages import AdvantageOptions
from uae_jax.algorithms.flow_grpo import FlowObjective
from uae_jax.algorithms.forward_process import ForwardObjective
from uae_jax.algorithms.grpo import TokenObjective
from uae_jax.rewards.ensemble import HTTP, Ensemble
from uae_jax.rewards.external import ExternalReward, ExternalRewardOptions
from uae_jax.rewards.text import TEXT_REWARDS, TextRewardOptions
from uae_jax.training import profiling, supervised
from uae_jax.training.build import Built
from uae_jax.training.flops import Composed, Program
from uae_jax.training.optimizer import OptimizerOptions, learning_rate, make_optimizer
from uae_jax.training.order import REINFORCEMENT
from uae_jax.training.placement import state_shardings
from uae_jax.training.rl import external
from uae_jax.training.rl.phases import Phases, phase_keys
from uae_jax.training.rl.update import UpdateOptions
from uae_jax.training.sizes import FRESH, find
from uae_jax.training.stages import (
  captioner,
  cold_start,
  contrastive,
  generation_for_understanding,
  pretrain,
  understanding_for_generation,
  vae,
)
from uae_jax.training.state import State, create

CONTRASTIVE = ("clip", "dinov2")
SUPERVISED = ("vae", "captioner", "pretrain", "cold_start")

# (state, batch) -> (state, metrics).
Step = Program | Composed


@dataclasses.dataclass(frozen=True)
class Stage:
  """
  Attributes:
    name: of the section in the config.
    step: (state, batch) -> (state, metrics), jitted.
    state: the first state.
    learning_rate: optimizer step -> rate.
    optimizer_steps: optimizer steps a step.
    finish: (params, images uint8[B, H, W, 3]) -> params that the next stage starts from.
  """

  name: str
  step: Step
  state: State
  learning_rate: optax.Schedule
  optimizer_steps: int
  finish: Callable[[dict, jax.Array], dict]


def validate(config) -> None:
  """Refuses settings that cannot run, before anything is made.

  Raises:
    ValueError: naming the field.
  """
  known = CONTRASTIVE + SUPERVISED + REINFORCEMENT
  for name in config.stages:
    if name not in known:
      raise ValueError(f"config.stages: unknown stage {name!r}, expected some of {', '.join(known)}")
  if config.rounds < 1:
    raise ValueError(f"config.rounds = {config.rounds}: expected 1 or more")
  if config.init.weights and config.init.checkpoint:
    raise ValueError("config.init.weights and config.init.checkpoint are both set: a run starts from one of them")
  check_embedders(config)
  profiling.validate(config.profile)
  rows = config.mesh.data * config.mesh.fsdp
  for name in config.stages:
    section = config[name]
    cuts = section.num_microbatches
    if section.target_loss < 0 or (section.target_loss and name in REINFORCEMENT):
      raise ValueError(
        f"config.{name}.target_loss = {section.target_loss}: expected 0, or more where a loss tells what is learned, "
        "which that of a policy does not"
      )
    if name in REINFORCEMENT:
      check_rewards(name, section)
      cuts = section.updates.num_minibatches * section.updates.num_microbatches
      if section.options.max_new_tokens > config.data.caption_tokens:
        raise ValueError(
          f"config.{name}.options.max_new_tokens = {section.options.max_new_tokens} is more than "
          f"config.data.caption_tokens = {config.data.caption_tokens}"
        )
    if section.batch_size < 1 or section.batch_size % (rows * cuts):
      raise ValueError(
        f"config.{name}.batch_size = {section.batch_size} is not divisible by data * fsdp * pieces of an update = "
        f"{rows} * {cuts}"
      )
    if section.total_steps < 1:
      raise ValueError(f"config.{name}.total_steps = {section.total_steps}: expected 1 or more")


def check_embedders(config) -> None:
  """Refuses rewards and figures of embedders that the run does not have, or has only as random numbers.

  Raises:
    ValueError: naming the field.
  """
  wanted = {name: "config.evaluation.embedders" for name in config.evaluation.embedders if config.evaluation.num_images}
  for stage in config.stages:
    options = config[stage].options
    if stage == "cold_start":
      wanted[options.encoder] = "config.cold_start.options.encoder"
    if stage in REINFORCEMENT:
      embedders = [name for name, _ in options.reward_weights if name not in (*TEXT_REWARDS, HTTP)]
      wanted |= {name: f"config.{stage}.options.reward_weights" for name in embedders}
      wanted |= (
        {options.held_out_embedder: f"config.{stage}.options.held_out_embedder"} if options.held_out_embedder else {}
      )
  for name, field in wanted.items():
    if not name:
      continue  # no held-out encoder
    source = config.embedders.get(name, "")
    if not source:
      raise ValueError(f"{field} names {name!r}: set config.embedders.{name} to the folder of its weights")
    if source == FRESH and not find(config.model).trains_from_scratch and not config.init.checkpoint:
      raise ValueError(
        f"{field} names {name!r}, but config.embedders.{name} = {FRESH!r} is random numbers: "
        "set the folder of its weights"
      )


def check_rewards(name: str, section) -> None:
  """
  Raises:
    ValueError: the held-out encoder is rewarded, nothing is, or the external reward has no usable address or token.
  """
  try:
    ensemble = Ensemble(_frozen(section.options.reward_weights), section.options.held_out_embedder)
    # Also where it is not asked: its address is written to the workdir and must not hold a key.
    external_reward = _options(ExternalRewardOptions, section.http_reward)
    if ensemble.has_judge:
      ExternalReward(external_reward)
  except ValueError as error:
    raise ValueError(f"config.{name}: {error}") from error


def keep(params: dict, images: jax.Array) -> dict:
  """The result of a stage as it is."""
  del images
  return params


def _options(cls, section):
  """A frozen options dataclass from a section of the config, lists as tuples."""
  fields = {name: _frozen(value) for name, value in section.to_dict().items()}
  try:
    return cls(**fields)
  except TypeError as error:
    raise ValueError(f"{cls.__name__}: {error}") from error


def _frozen(value):
  return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def params_before(config, name: str, params: dict) -> dict:
  """What measuring a stage needs to know of the parameters before it; all others may be freed while it trains.

  Stage 3 leaves the captioner alone: its gain is measured image by image, from the same captions, and needs the
  leaves that it is about to train. Other stages need none.
  """
  if name != "understanding_for_generation" or not config.evaluation.num_images:
    return {}
  return trees.split(params, _is_trainable(config[name]))[0]


def _is_trainable(section) -> Callable[[str], bool]:
  """Path of a parameter -> whether the stage trains it."""
  pattern = re.compile(section.trainable)
  return lambda path: pattern.search(path) is not None


def make_stage(config, name: str, built: Built, params: dict, seed: int) -> Stage:
  """Builds the jitted step and the first state of one stage.

  Args:
    config: the experiment.
    name: of the stage.
    built: nets.
    params: what the stage starts from.
    seed: of this stage in this run.
  """
  section = config[name]
  optimizer, rate, optimizer_steps = stage_optimizer(section, name)
  key = jax.random.key(seed)
  finish = keep
  text_graphdef = None
  # The decode loop is the only one of unknown length.
  while_trips = section.options.get("max_new_tokens", config.data.caption_tokens)

  if name in CONTRASTIVE:
    with nnx.use_eager_sharding(False):
      text_graphdef, tower = nnx.split(built.make_text_tower(nnx.Rngs(jax.random.fold_in(key, 1))))
    contrast = {"text": nnx.to_pure_dict(tower), "logit_scale": jnp.log(jnp.float32(10.0))}
    params = {**params, "contrastive": contrast}

    def finish(params, images):
      del images
      return {net: tree for net, tree in params.items() if net != "contrastive"}

  elif name == "vae":
    finish = jax.jit(lambda params, images: vae.standardize_latents(built.networks, params, images))

  phases = make_phases(config, name, built, optimizer) if name in REINFORCEMENT else None
  init = make_init(section, built, optimizer, has_old=phases is not None and phases.old_policy is not None)
  mesh = jax.tree.leaves(built.shardings)[0].mesh
  places = state_shardings(jax.eval_shape(init, params, key), params, mesh)
  state = jax.jit(init, out_shardings=places)(params, key)
  if phases is not None:
    step = phased_step(phases, places, while_trips=while_trips)
  else:
    loss = make_loss(config, name, built, text_graphdef)
    step = Program(
      supervised.make_step(loss, optimizer, ema_decay=section.ema_decay, num_microbatches=section.num_microbatches),
      while_trips=while_trips,
      donate_argnums=0,
      out_shardings=(places, None),
    )
  return Stage(name, step, state, rate, optimizer_steps, finish)


def stage_optimizer(section, name: str) -> tuple[optax.GradientTransformation, optax.Schedule, int]:
  """(optimizer, optimizer step -> rate, optimizer steps a step) of a stage."""
  options = _options(OptimizerOptions, section.optimizer)
  updates = _options(UpdateOptions, section.updates) if name in REINFORCEMENT else UpdateOptions()
  optimizer_steps = updates.num_epochs * updates.num_minibatches
  total = section.total_steps * optimizer_steps
  return make_optimizer(options, total), learning_rate(options, total), optimizer_steps


def make_init(section, built: Built, optimizer: optax.GradientTransformation, *, has_old: bool = False):
  """(params, key) -> the first state of a stage."""
  is_trainable = _is_trainable(section)

  def init(params: dict, key: jax.Array) -> State:
    return create(
      params,
      lambda path: is_trainable(path) and path not in built.buffers,
      optimizer,
      key,
      has_ema=section.ema_decay > 0,
      has_old=has_old,
    )

  return init


def make_loss(config, name: str, built: Built, text_graphdef: nnx.GraphDef | None) -> supervised.Loss:
  """The loss of a supervised stage."""
  section, networks = config[name], built.networks
  if name in CONTRASTIVE:
    options = _options(contrastive.ContrastiveOptions, section.options)
    return contrastive.make_loss(networks, name, text_graphdef, options)
  module, cls = {
    "vae": (vae, vae.VAEOptions),
    "captioner": (captioner, captioner.CaptionerOptions),
    "pretrain": (pretrain, pretrain.PretrainOptions),
    "cold_start": (cold_start, cold_start.ColdStartOptions),
  }[name]
  return module.make_loss(networks, _options(cls, section.options))


def make_phases(config, name: str, built: Built, optimizer: optax.GradientTransformation) -> Phases:
  """The phases of an RL stage."""
  section = config[name]
  shared = (_options(AdvantageOptions, section.advantage), _options(UpdateOptions, section.updates), optimizer)
  if name == "generation_for_understanding":
    module = generation_for_understanding
    options = _options(module.GenerationForUnderstandingOptions, section.options)
    objective = _options(TokenObjective, section.objective)
    text = _options(TextRewardOptions, section.text_rewards)
    if not text.forbidden_tokens:
      text = dataclasses.replace(text, forbidden_tokens=tuple(built.processor.tokenizer.all_special_ids))
    phases = module.make_phases(
      built.networks, options, objective, *shared, ema_decay=section.ema_decay, text_rewards=text
    )
  else:
    module = understanding_for_generation
    options = _options(module.UnderstandingForGenerationOptions, section.options)
    is_forward = section.objective.loss in forward_process.LOSSES
    objective = _options(ForwardObjective if is_forward else FlowObjective, section.objective)
    phases = module.make_phases(built.networks, options, objective, *shared, ema_decay=section.ema_decay)
  if HTTP in dict(options.reward_weights):
    judge = ExternalReward(_options(ExternalRewardOptions, section.http_reward))
    phases = dataclasses.replace(
      phases, judge=external.make_external_reward(judge, built.processor, built.networks.prompts)
    )
  return phases


def phased_step(phases: Phases, places: State | None = None, *, while_trips: int = 1) -> Composed:
  """The composition of the phases with each one jitted apart and timed; the external reward runs between two of them.

  `places` are the shardings of the state, for several devices; `while_trips` is the length of the decode loop, for the
  count of FLOPs.
  """
  rollout, advantages = Program(phases.rollout, while_trips=while_trips), Program(phases.advantages)
  reward = Program(phases.reward if phases.judge is None else phases.reward_and_inputs)
  update = Program(phases.update, donate_argnums=0, out_shardings=(places, None))
  keys = jax.jit(phase_keys)

  def step(state: State, batch: dict) -> tuple[State, dict]:
    rollout_key, reward_key = keys(state)
    seconds = {}

    @contextlib.contextmanager
    def phase(name):
      start = time.perf_counter()
      with jax.profiler.TraceAnnotation(name):
        yield
      seconds[f"seconds_{name}"] = time.perf_counter() - start

    with phase("rollout"):
      trajectory = jax.block_until_ready(rollout(phases.sampling_params(state), batch, rollout_key, state.step))
    with phase("reward"):
      measured = reward(state.params, batch, trajectory, reward_key)
      if phases.judge is not None:
        (rewards, reward_metrics), reward_inputs = measured
        measured = rewards | phases.judge(batch, reward_inputs), reward_metrics
      rewards, reward_metrics = jax.block_until_ready(measured)
    values, advantage_metrics = advantages(rewards)
    with phase("update"):
      state, update_metrics = jax.block_until_ready(update(state, batch, trajectory, values))
    timing = {**seconds, "rollouts_per_second": values.size / sum(seconds.values()) / jax.device_count()}
    return state, {**reward_metrics, **advantage_metrics, **update_metrics, **timing}

  return Composed(step, (rollout, reward, advantages, update))
