"""One update of the captioner's adapters from given captions: replay over the shared prefix, gradient, AdamW."""

import jax.numpy as jnp

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.suites import stages
from benchmarks.suites.ahead import compile_ahead
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.rollouts.captions import Captions
from uae_jax.training.stages.generation_for_understanding import CaptionGroups

NEEDS = ("captioner",)


def cases(world: World) -> dict:
  size = world.size

  def update():
    phases, batch = stages.captioner_phases(world), stages.batch(world)
    tokens = jnp.asarray(inputs.captions(size))
    sampled = Captions(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape), jnp.ones(tokens.shape[:2], bool))
    arguments = (batch, CaptionGroups(sampled, None, None), jnp.asarray(inputs.advantages(size)))
    first = None
    state = world.state("captioner")
    flops = matrix_flops(phases.update, state, *arguments)
    compiled, fields = compile_ahead(phases.update, (state, *arguments), donate_argnums=0)
    step = stages.Stepper(compiled, state)

    def run():
      nonlocal first
      metrics = step(*arguments)
      first = first or metrics
      return metrics

    return Case(
      run=run,
      unit="captions",
      amount=size.prompts * size.rollouts,
      flops=flops,
      # Checks the first update only: later ones start from other adapters.
      check=lambda: [float(first["loss"]), float(first["grad_norm"])],
      **fields,
    )

  return {f"G={size.rollouts} T={size.caption_tokens}": update}
