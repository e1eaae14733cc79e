"""One update of the decoder's adapters from given trajectories: replay of the window, gradient, AdamW."""

import jax
import jax.numpy as jnp

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.suites import stages
from benchmarks.suites.sampling import contexts
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.training.rl.sde_policy import Steps
from uae_jax.training.stages.understanding_for_generation import ImageGroups


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
    flops = matrix_flops(phases.update, world.state("decoder"), *arguments)
    step = stages.Stepper(jax.jit(phases.update, donate_argnums=0), world.state("decoder"))

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
    )

  return {f"G={size.rollouts} window {size.window}": update}
