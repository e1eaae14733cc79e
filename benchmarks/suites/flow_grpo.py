"""One update of the decoder's adapters from given trajectories: replay of the window, gradient, AdamW."""

import jax.numpy as jnp

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.suites import stages
from benchmarks.suites.ahead import compile_ahead
from benchmarks.suites.sampling import contexts
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.training.rl.sde_policy import Steps
from uae_jax.training.stages.understanding_for_generation import ImageGroups

NEEDS = ("decoder", "pooled")


def cases(world: World) -> dict:
  size = world.size

  def update():
    phases = stages.decoder_phases(world)
    latents = jnp.asarray(inputs.noise(size, size.image_px, size.prompts, size.window + 1, size.rollouts))
    context, _ = contexts(world, size.prompts)
    shape = (size.prompts, size.window)
    steps = Steps(
      latents,
      jnp.broadcast_to(jnp.arange(size.window), shape),
      jnp.zeros((*shape, size.rollouts)),
    )
    tokens = jnp.asarray(inputs.captions(size)[:, 0])
    groups = ImageGroups(tokens, context, negative=None, final=latents[:, -1], record=steps)
    arguments = (stages.batch(world), groups, jnp.asarray(inputs.advantages(size)))
    first = None
    state = world.state("decoder")
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
      unit="images",
      amount=size.prompts * size.rollouts,
      flops=flops,
      check=lambda: [float(first["loss"]), float(first["grad_norm"])],
      **fields,
    )

  return {f"G={size.rollouts} window {size.window}": update}
