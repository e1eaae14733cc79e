"""Builds a stage of a run, ready to train: its jitted step, its first state, and the function that finishes it."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import re
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from uae_jax import trees
from uae_jax.data.prompts_source import PromptsSource
from uae_jax.data.sources import open_source
from uae_jax.embedders import text
from uae_jax.options import EXTERNAL, DataOptions, Experiment, OptimizerOptions, Stage, image_text_kind
from uae_jax.rewards.external import ExternalReward
from uae_jax.rewards.image_text import ImageTextReward
from uae_jax.training import frozen_weights, supervised
from uae_jax.training.build import Built
from uae_jax.training.flops import Composed, Program
from uae_jax.training.optimizer import learning_rate, make_optimizer
from uae_jax.training.placement import state_shardings
from uae_jax.training.rl import external, pieces
from uae_jax.training.rl.host_rewards import HostReward
from uae_jax.training.rl.phases import Phases, phase_keys
from uae_jax.training.rl.sde_policy import window_trips
from uae_jax.training.stages import spec
from uae_jax.training.stages.spec import StageSpec
from uae_jax.training.state import State, create, release


@dataclasses.dataclass(frozen=True)
class ReadyStage:
  """A stage that is ready to train; made by `make_stage`, read by `training.loop.run`.

  Attributes:
    name: name of its section in the config.
    step: (state, batch) -> (state, metrics), jitted.
    state: first state.
    learning_rate: optimizer step -> learning rate.
    optimizer_steps: number of optimizer steps per step.
    finish: (params, images uint8[B, H, W, 3]) -> parameters that the next stage starts from.
  """

  name: str
  step: Program | Composed
  state: State
  learning_rate: optax.Schedule
  optimizer_steps: int
  finish: Callable[[dict, jax.Array], dict]


def params_before(config: Experiment, name: str, params: dict) -> dict:
  """Returns the parameters from before a stage that its evaluation compares against; the rest may be freed."""
  if not spec.find(name).compares_before or not config.evaluation.num_images:
    return {}
  return trees.split(params, is_trainable(config.section(name)))[0]


def is_trainable(section: Stage) -> Callable[[str], bool]:
  """Makes the predicate: path of a parameter -> whether the stage trains it."""
  pattern = re.compile(section.trainable)
  return lambda path: pattern.search(path) is not None


def make_stage(config: Experiment, name: str, built: Built, params: dict, seed: int) -> ReadyStage:
  """Builds the jitted step and the first state of one stage.

  Args:
    config: config of the run.
    name: name of the stage.
    built: networks, processor and shardings.
    params: nested dict of arrays that the stage starts from; weights that the stage holds as int8 are deleted.
    seed: seed of the state's key and of the stage's extra parameters.
  """
  stage, section, key = spec.find(name), config.section(name), jax.random.key(seed)
  optimizer, rate, optimizer_steps = stage_optimizer(section)
  if stage.extra_params is not None:
    params = {**params, **stage.extra_params(built, key)}
  phases = make_phases(config, name, built, optimizer) if stage.make_phases is not None else None
  init = make_init(section, built, optimizer, phases)
  mesh = jax.tree.leaves(built.shardings)[0].mesh
  given = params
  params, originals = frozen_weights.rounded(section, given, config.lora.alpha / config.lora.rank)
  places = state_shardings(jax.eval_shape(init, params, key), params, mesh)
  state = jax.jit(init, out_shardings=places)(params, key)
  release(params, given)  # the state has its own copy
  step: Program | Composed
  if phases is not None:
    shape = built.sizes.uae.latents_shape(*config.data.largest_size)
    step = phased_step(phases, places, trips=window_trips(section.options, shape))
  else:
    step = Program(
      supervised_step(config, name, built, optimizer),
      donate_argnums=0,
      out_shardings=(places, None),
    )
  return ReadyStage(name, step, state, rate, optimizer_steps, finisher(stage, built, originals))


def finisher(
  stage: StageSpec, built: Built, originals: dict[str, frozen_weights.HostCopy]
) -> Callable[[dict, jax.Array], dict]:
  return lambda params, images: stage.finish(built, frozen_weights.restored(params, originals), images)


def stage_optimizer(section: Stage) -> tuple[optax.GradientTransformation, optax.Schedule, int]:
  """Returns (optimizer, optimizer step -> learning rate, optimizer steps per step) of a stage."""
  options: OptimizerOptions = section.optimizer
  updates = getattr(section, "updates", None)
  optimizer_steps = 1 if updates is None else updates.num_epochs * updates.num_minibatches
  total = section.total_steps * optimizer_steps
  return make_optimizer(options, total), learning_rate(options, total), optimizer_steps


def make_init(section: Stage, built: Built, optimizer: optax.GradientTransformation, phases: Phases | None = None):
  """Makes init(params, key) -> first state of a stage; `phases` are those of an RL stage."""
  trains = is_trainable(section)

  def init(params: dict, key: jax.Array) -> State:
    return create(
      params,
      lambda path: trains(path) and path not in built.buffers,
      optimizer,
      key,
      has_ema=section.ema_decay > 0,
      has_old=phases is not None and phases.old_policy is not None,
      has_reference=phases is not None and phases.moves_reference,
    )

  return init


def supervised_step(config: Experiment, name: str, built: Built, optimizer: optax.GradientTransformation):
  """Makes step(state, batch) -> (state, metrics) of a supervised stage, a pure function that is not jitted."""
  section, make_loss = config.section(name), spec.find(name).make_loss
  if make_loss is None:
    raise ValueError(f"stage {name} has no `make_loss`: it is an RL stage, see `make_phases`")
  loss = make_loss(config, built)
  return supervised.make_step(
    loss,
    optimizer,
    ema_decay=section.ema_decay,
    ema_interval=section.ema_interval,
    num_microbatches=section.num_microbatches,
  )


def make_phases(config: Experiment, name: str, built: Built, optimizer: optax.GradientTransformation) -> Phases:
  """Makes the phases of an RL stage, with those of its rewards that are computed between two phases."""
  section, make = config.section(name), spec.find(name).make_phases
  if make is None:
    raise ValueError(f"stage {name} has no `make_phases`: it is a supervised stage, see `supervised_step`")
  phases = make(config, built, optimizer)
  rewards: list[HostReward] = []
  if EXTERNAL in section.options.reward_names:
    metadata_of = None if config.data.has_images else _metadata_of(config.data)
    rewards.append(external.make_external_reward(ExternalReward(section.http_reward), built.processor, metadata_of))
  for reward in section.options.reward_names:
    if kind := image_text_kind(reward):
      towers = ImageTextReward(functools.partial(text.load, kind, config.embedders.get(kind, "")))
      rewards.append(external.make_image_text_reward(reward, towers, built.processor))
  return dataclasses.replace(phases, host_rewards=tuple(rewards), num_pieces=section.http_reward.num_pieces)


def _metadata_of(data: DataOptions) -> Callable[[int], dict]:
  """Makes a function from the index of a prompt to its metadata; the file is opened by its first call."""
  opened = functools.cache(lambda: cast(PromptsSource, open_source(data, "train")))
  return lambda index: opened().metadata(index)


def phased_step(phases: Phases, places: State | None = None, *, trips: Sequence[float] = ()) -> Composed:
  """Composes the phases of an RL step, each jitted and timed separately; some rewards are computed on the host.

  Rollout and reward run once per piece of the prompts. The rewards on the host begin when their piece is generated, and
  are waited for after the last piece.

  Args:
    phases: phases of the stage.
    places: shardings of the state; None leaves them to the compiler.
    trips: trip counts of the loops of the rollout whose bound is not in its trace, for the count of FLOPs.
  """
  rollout, advantages = Program(phases.rollout, trips=trips), Program(phases.advantages)
  measure: Callable = phases.reward
  if phases.host_rewards:
    if phases.reward_and_inputs is None:
      raise ValueError("a reward that is computed on the host needs `Phases.reward_and_inputs`")
    measure = phases.reward_and_inputs
  reward = Program(measure)
  update = Program(phases.update, donate_argnums=0, out_shardings=(places, None))
  keys = jax.jit(phase_keys)
  num_pieces = phases.num_pieces
  cut = jax.jit(functools.partial(pieces.cut, num_pieces=num_pieces))
  join = jax.jit(
    lambda trajectories, rewards, metrics: (
      phases.join(trajectories),
      pieces.join(rewards),
      pieces.join_metrics(metrics),
    )
  )

  def step(state: State, batch: dict) -> tuple[State, dict]:
    rollout_key, reward_key = keys(state)
    seconds = dict.fromkeys(("seconds_rollout", "seconds_reward", "seconds_update"), 0.0)

    @contextlib.contextmanager
    def phase(name):
      start = time.perf_counter()
      with jax.profiler.TraceAnnotation(name):
        yield
      seconds[f"seconds_{name}"] += time.perf_counter() - start

    def generate(rows: dict, *piece: jax.Array) -> tuple[Any, dict, dict]:
      """Generates a piece, and begins its rewards on the host: (trajectory, rewards, metrics)."""
      with phase("rollout"):
        trajectory = jax.block_until_ready(
          rollout(phases.sampling_params(state), rows, rollout_key, state.step, *piece)
        )
      with phase("reward"):
        measured = reward(state.params, rows, trajectory, pieces.piece_key(reward_key, *piece or (None,)))
        if phases.host_rewards:
          measured, reward_inputs = measured
          for each, begun in zip(phases.host_rewards, begun_rewards, strict=True):
            begun.append(each.begin(rows, reward_inputs))
        return trajectory, *jax.block_until_ready(measured)

    begun_rewards: list[list] = [[] for _ in phases.host_rewards]
    try:
      if num_pieces == 1:
        trajectory, rewards, reward_metrics = generate(batch)
      else:
        numbers = [jnp.int32(i) for i in range(num_pieces)]
        trajectory, rewards, reward_metrics = join(*zip(*(generate(cut(batch, i), i) for i in numbers), strict=True))
      if phases.host_rewards:
        with phase("reward"):
          rewards = rewards | {
            each.name: each.finish(begun) for each, begun in zip(phases.host_rewards, begun_rewards, strict=True)
          }
    except BaseException:
      for each in phases.host_rewards:
        each.cancel()
      raise
    values, advantage_metrics = advantages(rewards)
    with phase("update"):
      state, update_metrics = jax.block_until_ready(update(state, batch, trajectory, values))
    num_rollouts = next(iter(rewards.values())).size
    timing = {**seconds, "rollouts_per_second": num_rollouts / sum(seconds.values()) / jax.device_count()}
    return state, {**reward_metrics, **advantage_metrics, **update_metrics, **timing}

  return Composed(step, (*(rollout, reward) * num_pieces, advantages, update))
