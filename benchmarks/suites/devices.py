"""One update of the captioner on 1, 2, 4, ... devices: the same batch, weights and state sharded over `fsdp`.

Virtual devices share the cores of a CPU, so times show the overhead of sharding, and memory shows what it saves.
"""

import jax
import jax.numpy as jnp

from benchmarks import inputs
from benchmarks.suites import stages
from benchmarks.suites.ahead import compile_ahead
from benchmarks.timing import Case
from benchmarks.world import World, make
from uae_jax import sharding
from uae_jax.rollouts.captions import Captions
from uae_jax.training.placement import state_shardings
from uae_jax.training.stages.generation_for_understanding import CaptionGroups

PROMPTS, ROLLOUTS = 8, 2


def cases(world: World) -> dict:
  size = world.size
  length = size.caption_tokens // 2

  def update(count):
    mesh = sharding.make_mesh(fsdp=count, devices=jax.devices()[:count])
    cut = make(size, mesh=mesh)
    # Copies, because the update donates its arguments and the next case starts from the same values.
    places = jax.tree.map(lambda leaf: leaf.sharding, cut.abstract)
    params = jax.device_put(jax.tree.map(jnp.copy, world.params), places)
    phases = stages.captioner_phases(cut, num_rollouts=ROLLOUTS, max_new_tokens=length)
    tokens = jnp.asarray(inputs.words(size, PROMPTS, ROLLOUTS, length, seed=11))
    sampled = Captions(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape), jnp.ones(tokens.shape[:2], bool))
    advantages = jnp.where(jnp.arange(ROLLOUTS) % 2 == 0, 1.0, -1.0) * jnp.ones((PROMPTS, 1))
    batch = {"captioner_image": jnp.asarray(inputs.images(size, size.caption_px, PROMPTS))}
    arguments = jax.device_put((batch, CaptionGroups(sampled, None, None), advantages), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
      state = cut.state("captioner", params)
      places = state_shardings(state, params, mesh)
      state = jax.device_put(state, places)
      compiled, fields = compile_ahead(
        phases.update, (state, *arguments), donate_argnums=0, out_shardings=(places, None)
      )
    step = stages.Stepper(compiled, state)
    first = None

    def run():
      nonlocal first
      with jax.set_mesh(mesh):
        metrics = step(*arguments)
      first = first or metrics

    return Case(
      run=run,
      unit="captions",
      amount=PROMPTS * ROLLOUTS,
      seconds_compile=fields["seconds_compile"],
      facts=fields["facts"] | {"axis": "devices, update of the captioner", "x": count},
      check=lambda: [float(first["loss"]), float(first["grad_norm"])],
    )

  counts = [count for count in (1, 2, 4, 8) if count <= jax.device_count()]
  return {f"{count} devices": lambda count=count: update(count) for count in counts}
