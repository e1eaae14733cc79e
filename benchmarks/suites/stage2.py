"""The whole step of stage 2: captions, reconstructions, reward, update; the phases are jitted separately."""

from benchmarks.suites import stages
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax.training.stage import phased_step


def cases(world: World) -> dict:
  size = world.size

  def step():
    stepper = stages.Stepper(phased_step(stages.captioner_phases(world)), world.state("captioner"))
    batch = stages.batch(world)
    return Case(run=lambda: stepper(batch), unit="captions", amount=size.prompts * size.rollouts)

  return {f"G={size.rollouts} T={size.caption_tokens}, {size.reward_steps} sampler steps": step}
