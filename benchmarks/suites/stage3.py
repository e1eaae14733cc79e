"""The whole step of stage 3: caption, group of stochastic samples, reward, update; the phases are jitted separately."""

from benchmarks.suites import stages
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.training.stage import phased_step


def cases(world: World) -> dict:
  size = world.size

  def step():
    stepper = stages.Stepper(phased_step(stages.decoder_phases(world)), world.state("decoder"))
    batch = stages.batch(world)
    return Case(run=lambda: stepper(batch), unit="images", amount=size.prompts * size.rollouts)

  return {f"G={size.rollouts}, {size.sde_steps} sampler steps, window {size.window}": step}
