"""A profile contains exactly the chosen steps, with their annotations."""

import jax
import jax.numpy as jnp
import optax
import pytest

from uae_jax.options import read_config
from uae_jax.training.profiling import Profiler
from uae_jax.training.rl.phases import Phases
from uae_jax.training.stage import phased_step
from uae_jax.training.state import create

pytestmark = pytest.mark.fast

WIDTH = 4


def update(state, batch, groups, values):
  return state.replace(step=state.step + 1), {"loss": jnp.sum(values @ groups)}


STEP = phased_step(
  Phases(
    rollout=lambda params, batch, key, step: batch["x"] @ params["w"],
    reward=lambda params, batch, groups, key: ({"clip": groups}, {"reward": jnp.mean(groups)}),
    advantages=lambda rewards: (rewards["clip"], {}),
    update=update,
  )
)


def run_steps(profiler, steps):
  params, batch = {"w": jnp.ones((WIDTH, WIDTH))}, {"x": jnp.ones((WIDTH, WIDTH))}
  state = create(params, lambda path: True, optax.sgd(0.1), jax.random.key(0), has_ema=False)
  with profiler:
    for number in steps:
      with profiler.step(number):
        state, metrics = STEP(state, batch)
      profiler.end_step(number, state)
  return metrics


def traces(folder):
  return sorted(folder.rglob("*.xplane.pb"))


def events(file) -> list[tuple[str, dict]]:
  data = jax.profiler.ProfileData.from_file(str(file))
  return [(event.name, dict(event.stats)) for plane in data.planes for line in plane.lines for event in line.events]


def test_the_chosen_steps_are_traced(tmp_path):
  metrics = run_steps(Profiler(tmp_path, first_step=2, num_steps=2), range(1, 6))
  (file,) = traces(tmp_path)
  found = events(file)
  assert sorted(int(stats["step_num"]) for name, stats in found if name == "step") == [2, 3]
  for phase in ("rollout", "reward", "update"):
    assert sum(name == phase for name, _ in found) == 2
    assert metrics[f"seconds_{phase}"] > 0
  assert STEP.flops == 2 * 2 * WIDTH**3


@pytest.mark.parametrize(
  ("num_steps", "steps", "count"),
  [
    (0, range(1, 4), 0),
    (2, range(6, 9), 0),  # Resumed after them.
    (9, range(1, 4), 1),  # Ends among them.
  ],
)
def test_a_trace_is_whole_or_absent(tmp_path, num_steps, steps, count):
  run_steps(Profiler(tmp_path, first_step=3, num_steps=num_steps), steps)
  assert len(traces(tmp_path)) == count


def test_impossible_settings_name_their_field():
  with pytest.raises(ValueError, match=r"config\.profile\.first_step = 0: expected 1 or more"):
    read_config({"profile": {"first_step": 0, "num_steps": 1}})
  with pytest.raises(ValueError, match=r"config\.profile\.num_steps = -1"):
    read_config({"profile": {"first_step": 1, "num_steps": -1}})
