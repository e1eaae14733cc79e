"""Runs on rectangles, on eight devices: stages take every bucket, and an interrupted run ends bit for bit alike."""

import dataclasses

import jax
import numpy as np
from PIL import Image
import pytest

from tests.end_to_end import small_run
from tests.end_to_end.test_resume import final_params
from tests.properties import rl_world
from uae_jax.layers.lora import LoRA
from uae_jax.options import REINFORCEMENT, DataOptions, OptimizerOptions
from uae_jax.planning.plan import _place_rows
from uae_jax.planning.stage_programs import stage_programs
from uae_jax.training import sizes
from uae_jax.training.batches import Batches
from uae_jax.training.build import check_buckets
from uae_jax.training.preemption import Preempted
from uae_jax.training.stage import make_stage

# The decoder of the small world has positions up to 32 pixels.
SIZES = ("32x32", "16x32", "32x16")
# As many pixels as the linear model of `small_run` has weights for.
OF_ONE_AREA = ("32x32", "16x64", "64x16")
STAGES = ("vae", "captioner", "pretrain", "cold_start", "generation_for_understanding", "understanding_for_generation")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataOptions:
  folder = tmp_path_factory.mktemp("photos")
  random = np.random.default_rng(0)
  for i, (height, width) in enumerate([(40, 40), (20, 50), (66, 24)] * 5):
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i:02d}.png")
    (folder / f"{i:02d}.txt").write_text("gray background ; large red circle ;")
  return DataOptions(source=f"folder:{folder}", buckets=SIZES, caption_tokens=rl_world.TOKENS, max_bad_fraction=0.0)


def config(data: DataOptions, name: str):
  """Two cheap steps of a stage."""
  cheap = dict(batch_size=8, total_steps=2, optimizer=OptimizerOptions())
  section = dataclasses.replace(rl_world.CONFIG.section(name), **cheap)
  if name in REINFORCEMENT:
    options = dict(num_rollouts=2, max_new_tokens=4, sampler_steps=2, is_shift_by_size=True)
    options |= {"window": 1, "window_range": (0, 1)} if hasattr(section.options, "window") else {}
    section = dataclasses.replace(section, options=dataclasses.replace(section.options, **options))
  if name == "cold_start":
    section = dataclasses.replace(
      section, options=dataclasses.replace(section.options, sampler_steps=1, gradient_steps=1)
    )
  return dataclasses.replace(rl_world.CONFIG, data=data, stages=(name,), **{name: section})


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("size", ["16x32", pytest.param("32x24", marks=pytest.mark.slow)])
def test_the_programs_of_every_stage_take_every_bucket(data, name, size):
  """Traces them, without compiling."""
  mesh = rl_world.mesh()
  only = config(dataclasses.replace(data, buckets=(size,)), name)
  programs, outputs = stage_programs(only, name, rl_world.built(), mesh), None
  phases = []
  with jax.set_mesh(mesh):
    while True:
      try:
        program = programs.send(outputs)
      except StopIteration:
        break
      phases.append(program.phase)
      outputs = jax.eval_shape(program.function, *program.arguments)
      outputs = jax.tree.map(lambda leaf: _place_rows(leaf, mesh), outputs)
  assert phases == (["rollout", "reward", "update"] if name in REINFORCEMENT else ["step"])


@pytest.mark.parametrize("size", ["28x32", "40x32"])
def test_a_size_that_the_decoder_cannot_make_is_refused(data, size):
  uae = sizes.named_uae("scenes", rl_world.built().processor, LoRA(4, 4.0))
  check_buckets(dataclasses.replace(data, buckets=("32x32", "32x16")), uae)
  with pytest.raises(ValueError, match=rf"names {size}, and the decoder cannot make .* sides must be multiples of 8"):
    check_buckets(dataclasses.replace(data, buckets=("32x32", size)), uae)


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=() if name in ("vae", "pretrain") else pytest.mark.slow) for name in STAGES]
)
def test_a_stage_trains_on_batches_of_several_shapes(data, name):
  made = config(dataclasses.replace(data, buckets=SIZES[:2], max_bad_fraction=0.4), name)
  # Made outside of the mesh, because other tests use the same parameters on one device.
  mesh, params = rl_world.mesh(), rl_world.params()
  with jax.set_mesh(mesh):
    stage = make_stage(made, name, rl_world.built(), params, seed=1)
    batches = Batches(made, name, rl_world.built().processor, mesh, seed=0)
    state, shapes = stage.state, set()
    for _ in range(2):
      batch = next(batches)
      shapes.add(batch["image"].shape[1:3])
      state, metrics = stage.step(state, batch)
      assert np.isfinite(float(metrics["loss"]))
  assert shapes == {(32, 32), (16, 32)} and batches.counts()["bad_records"] == 5


def test_an_interrupted_run_ends_like_an_uninterrupted_one(data, tmp_path):
  data = dataclasses.replace(data, buckets=OF_ONE_AREA)
  small_run.run(tmp_path / "whole", data=data)
  with pytest.raises(Preempted):
    small_run.run(tmp_path / "cut", notice_at=3, data=data)
  small_run.run(tmp_path / "cut", data=data)
  ours, theirs = (
    final_params(tmp_path / run / "checkpoints" / str(small_run.STEPS) / "params") for run in ("cut", "whole")
  )
  assert np.any(ours["kernel"]) and all(np.array_equal(ours[path], theirs[path]) for path in theirs)
