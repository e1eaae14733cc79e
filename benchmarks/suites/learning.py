"""A few dozen steps of stages 2 and 3 of the small world: whether they learn on this device as they do on a CPU.

Both start from the same weights, and read the same scenes without a pipeline.
"""

import dataclasses
import functools
import os
from pathlib import Path
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import learning
from benchmarks.processes import LEARNING_START
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.data.processing import Processor
from uae_jax.small_world import scenes
from uae_jax.small_world.processor import write_processor
from uae_jax.small_world.source import ProceduralScenes
from uae_jax.training.stage import make_stage

NEEDS = ("none",)
STAGES = ("generation_for_understanding", "understanding_for_generation")
SEEDS, STEPS = (0, 1, 2), 40
CURVES = {"reward": "reward", "held_out_reward": "held out"}


def cases(world: World) -> dict:
  @functools.cache
  def start():
    file = os.environ.get(LEARNING_START)
    if not file:
      raise ValueError("--learning-start: needs the file of python -m benchmarks.learning RUN start.npz")
    with tempfile.TemporaryDirectory() as folder:
      write_processor(folder)
      processor = Processor.from_folder(folder)
    return learning.read(Path(file), processor)

  @functools.cache
  def stage_of(name):
    config, built, params = start()
    return make_stage(config, name, built, params, seed=0)

  def train(name, seed):
    config, built, _ = start()
    section, stage = config.section(name), stage_of(name)
    maker = ProceduralScenes("train", scenes.variant(config.data.variant)).batch_maker(
      built.processor, config.data.caption_tokens, section.captions, seed
    )
    facts = {"stage": name, "platform": jax.devices()[0].device_kind, "seed": seed, "curves": {}}

    def run():
      # A copy, because a step donates its state, and the next case starts from the same.
      state = dataclasses.replace(jax.tree.map(jnp.copy, stage.state), rng=jax.random.key(seed))
      random = np.random.default_rng(seed)
      for step in range(STEPS):
        rows = np.arange(step * section.batch_size, (step + 1) * section.batch_size)
        batch = maker(np.stack([rows, random.integers(scenes.NUM_SCENES, size=len(rows))], axis=1))
        state, metrics = stage.step(state, batch)
        for metric, curve in CURVES.items():
          if metric in metrics:
            facts["curves"].setdefault(curve, []).append(float(metrics[metric]))

    return Case(run=run, unit="steps", amount=STEPS, facts=facts, is_once=True)

  platform = jax.default_backend()
  return {f"{name}, seed {seed}, {platform}": lambda n=name, s=seed: train(n, s) for name in STAGES for seed in SEEDS}
