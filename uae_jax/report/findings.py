"""What a person should worry about in a run: hallucination, reward hacking, truncation, broken numbers."""

import dataclasses
import math

from uae_jax.report.run import GENERATION, REINFORCEMENT, Run, Stage, number

# Smaller changes are sampling noise of a few hundred held-out scenes.
PRECISION_DROP = 0.02
SIMILARITY_CHANGE = 0.005
PSNR_DROP_DB = 0.3
LENGTH_EXCESS = 1.05
TRUNCATED = 0.05
ZERO_STD = 0.6


@dataclasses.dataclass(frozen=True)
class Finding:
  """One warning: what happens, where it shows, and what usually helps."""

  title: str
  evidence: str
  advice: str


def trend(values: list[float]) -> tuple[float, float]:
  """Means of the first and of the last fifth of a curve, which a single noisy step does not move."""
  finite = [value for value in values if math.isfinite(value)]
  if len(finite) < 5:
    return math.nan, math.nan
  part = max(1, len(finite) // 5)
  return sum(finite[:part]) / part, sum(finite[-part:]) / part


def _before_and_after(run: Run, stage: Stage, figure: str) -> tuple[float, float]:
  """A held-out figure before and after a stage; nan where it is not known."""
  before = run.evaluated_before(stage, figure)
  after = run.evaluations.get(stage, {}).get(figure, math.nan)
  return (run.evaluations[before][figure] if before else math.nan), after


def _curve(run: Run, stage: Stage, metric: str) -> list[float]:
  return [number(line.get(metric)) for line in run.metrics.get(stage, [])]


def _figure_or_trend(run: Run, stage: Stage, figure: str, metric: str) -> tuple[float, float, str]:
  """(before, after, where from): the held-out figures once they exist, before that the training curve."""
  before, after = _before_and_after(run, stage, figure)
  if math.isfinite(before) and math.isfinite(after):
    return before, after, "on held-out images"
  return *trend(_curve(run, stage, metric)), "in training"


def hallucination(run: Run, stage: Stage) -> Finding | None:
  """Longer and less precise captions: the reward buys words that are not true."""
  evidence = []
  before, after, source = _figure_or_trend(run, stage, "caption_precision", "caption_precision")
  if before - after > PRECISION_DROP:
    evidence.append(f"precision falls from {before:.3f} to {after:.3f} {source}")
  truth = run.evaluations.get(stage, {}).get("true_caption_length", true_length(run))
  _, length, source = _figure_or_trend(run, stage, "caption_length", "caption_length")
  if length > truth * LENGTH_EXCESS:
    evidence.append(f"captions have {length:.1f} tokens {source}, the true ones {truth:.1f}")
  if not evidence:
    return None
  return Finding(
    f"Captions are hallucinating: {evidence[0]}",
    ": ".join([stage.title, *evidence[1:]]),
    "Usually the decoder is too weak to tell a true caption from a false one: pre-train it longer, "
    "or warm the captioner up longer, before the RL stages.",
  )


def reward_hacking(run: Run, stage: Stage) -> Finding | None:
  """The trained reward rises while an embedder that is not trained on falls, or the pixels get worse."""
  before, after, source = _figure_or_trend(run, stage, "reward_similarity", "reward")
  other_before, other_after, _ = _figure_or_trend(run, stage, "held_out_similarity", "held_out_reward")
  rises = after - before > SIMILARITY_CHANGE
  if rises and other_before - other_after > SIMILARITY_CHANGE:
    return Finding(
      f"Reward hacking: the reward rises from {before:.3f} to {after:.3f} "
      f"while the held-out embedder falls from {other_before:.3f} to {other_after:.3f}",
      f"{stage.title}, {source}",
      "The gain is particular to the reward model. Stop earlier, lower the learning rate, raise the KL weight, "
      "or add a second embedder to the reward.",
    )
  psnr_before, psnr_after = _before_and_after(run, stage, "psnr")
  if rises and psnr_before - psnr_after > PSNR_DROP_DB:
    return Finding(
      f"The reward rises from {before:.3f} to {after:.3f} "
      f"while PSNR falls from {psnr_before:.2f} to {psnr_after:.2f} dB",
      f"{stage.title}, {source}",
      "Mild over-optimisation of the embedder: compare the gallery, and lower the learning rate if images look worse.",
    )
  return None


def truncation(run: Run, stage: Stage) -> Finding | None:
  _, truncated = trend(_curve(run, stage, "truncated_fraction"))
  if not truncated > TRUNCATED:
    return None
  return Finding(
    f"{truncated:.0%} of the sampled captions are cut off at the longest allowed length",
    stage.title,
    "A cut caption has no end token to learn from: allow more tokens, or mask truncated captions in the loss.",
  )


def little_signal(run: Run, stage: Stage) -> Finding | None:
  """Only if it starts so: groups that agree at the end of a good run are what success looks like."""
  early, _ = trend(_curve(run, stage, "zero_std_fraction"))
  if not early > ZERO_STD:
    return None
  return Finding(
    f"{early:.0%} of the groups have no reward difference from the start",
    stage.title,
    "Such a group teaches nothing: raise the sampling temperature or the SDE noise, or use larger groups.",
  )


def broken_numbers(run: Run, stage: Stage) -> Finding | None:
  for line in run.metrics.get(stage, []):
    for metric in ("loss", "reward", "grad_norm"):
      if metric in line and not math.isfinite(number(line[metric])):
        return Finding(
          f"{metric} is not finite at step {line['step']}",
          stage.title,
          "Lower the learning rate or the gradient clip; check the batch of this step.",
        )
  return None


def true_length(run: Run) -> float:
  """Mean length of the ground-truth captions, from any evaluation that has it."""
  found = [figures["true_caption_length"] for figures in run.evaluations.values() if "true_caption_length" in figures]
  return found[-1] if found else math.nan


def findings(run: Run) -> list[Finding]:
  """All warnings of a run, stage by stage."""
  found = []
  for stage in run.stages:
    checks = [broken_numbers]
    if stage.name == GENERATION:
      checks += [hallucination, truncation]
    if stage.name in REINFORCEMENT:
      checks += [reward_hacking, little_signal]
    found += [finding for check in checks if (finding := check(run, stage)) is not None]
  return found
