"""A run of one small stage without networks, for tests of several processes; they only pay for its imports.

python -m tests.end_to_end.small_run WORKDIR COORDINATOR NUM_PROCESSES PROCESS_ID [NOTICE_AT]
"""

import dataclasses
import itertools
import os
from pathlib import Path
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tests.processors import processor_of
from uae_jax import sharding
from uae_jax.algorithms.losses import Loss, sum_and_count
from uae_jax.options import DataOptions, OptimizerOptions, Options, SupervisedStage
from uae_jax.small_world.processor import make_tokenizer
from uae_jax.training import loop, processes, row_draws
from uae_jax.training.batches import Batches
from uae_jax.training.checkpoints import Checkpoints
from uae_jax.training.flops import Program
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.placement import state_shardings
from uae_jax.training.preemption import Preempted, PreemptionNotice
from uae_jax.training.profiling import Profiler
from uae_jax.training.stage import ReadyStage
from uae_jax.training.state import create
from uae_jax.training.supervised import make_step

PIXELS, WIDTH, STEPS = 32 * 32 * 3, 8, 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallStage(SupervisedStage):
  """A stage without options of its own."""

  options: Options = Options()


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields of an `Experiment` that batches and the loop read."""

  data: DataOptions
  small: SupervisedStage

  def section(self, name: str) -> SupervisedStage:
    return getattr(self, name)


SCENES = DataOptions(image_px=32, caption_tokens=26, max_bad_fraction=0.0)


def make_config(total_steps: int, data: DataOptions = SCENES) -> Config:
  return Config(
    data,
    SmallStage(
      captions="mixed" if data.source == "scenes" else "full",
      batch_size=8,
      total_steps=total_steps,
      log_every_steps=1,
      save_every_steps=2,
    ),
  )


def loss(params: dict, batch: dict, keys: jax.Array):
  """Loss of a linear model that predicts tokens from noisy pixels."""
  pixels = batch["image"].reshape(-1, PIXELS) / 255.0 + 0.1 * row_draws.draw(jax.random.normal, keys, PIXELS)
  return Loss(*sum_and_count(jnp.square(pixels @ params["kernel"] - batch["tokens"][:, :WIDTH] / 10.0))), {}


def run(workdir: Path, total_steps: int = STEPS, notice_at: int = 0, data: DataOptions = SCENES) -> None:
  """Trains to the end or to a preemption notice, or resumes. Every process holds and writes a part of the parameters.

  Args:
    workdir: created if absent.
    total_steps: length of the stage.
    notice_at: step of the stage in which process 0 receives SIGTERM; 0 for never.
    data: what to train on, images of `PIXELS` values.

  Raises:
    Preempted: after saving.
  """
  mesh = sharding.make_mesh(fsdp=jax.device_count())
  config = make_config(total_steps, data)
  plain_config = dataclasses.asdict(config)
  optimizer = make_optimizer(OptimizerOptions(learning_rate=1e-2, eps=1e-3), total_steps)
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  params = {"kernel": jax.make_array_from_callback((PIXELS, WIDTH), cut, lambda rows: np.zeros((PIXELS, WIDTH))[rows])}
  processes.on_first(lambda: workdir.mkdir(parents=True, exist_ok=True))
  with jax.set_mesh(mesh), PreemptionNotice(mesh) as notice:

    def init(params, key):
      return create(params, lambda path: True, optimizer, key, has_ema=True)

    asked = itertools.count(1)

    def is_preempted() -> bool:
      if next(asked) == notice_at and jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
      return notice()

    key = jax.random.key(0)
    places = state_shardings(jax.eval_shape(init, params, key), params, mesh)
    state = jax.jit(init, out_shardings=places)(params, key)
    step = Program(make_step(loss, optimizer, ema_decay=0.9), donate_argnums=0, out_shardings=(places, None))
    checkpoints = Checkpoints(workdir / "checkpoints")
    writer = MetricWriter(workdir, enabled=jax.process_index() == 0, tensorboard=False)
    try:
      params = loop.run(
        ReadyStage("small", step, state, lambda step: 1e-2, 1, lambda params, images: params),
        config.section("small"),
        "small",
        Batches(config, "small", processor_of(make_tokenizer()), mesh, seed=5),
        checkpoints,
        writer,
        plain_config,
        is_preempted,
        profiler=Profiler(workdir / "profile", first_step=1, num_steps=0),
        max_skipped_in_a_row=3,
      )
      checkpoints.save_final(total_steps, params, plain_config)
    finally:
      writer.close()
      checkpoints.close()


if __name__ == "__main__":
  processes.join(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
  try:
    run(Path(sys.argv[1]), notice_at=int(sys.argv[5]) if len(sys.argv) > 5 else 0)
  except Preempted as reason:
    print(f"preempted, {reason}")
