"""Warnings about a run: hallucination, reward hacking, truncation, little signal, non-finite values."""

import dataclasses
import math

from uae_jax.report.run import GENERATION, REINFORCEMENT, Run, Stage, number

# Thresholds. Smaller changes are within the sampling noise of a few hundred held-out scenes.
PRECISION_DROP = 0.02
SIMILARITY_CHANGE = 0.005
PSNR_DROP_DB = 0.3
LENGTH_EXCESS = 1.05
TRUNCATED = 0.05
ZERO_STD = 0.6


@dataclasses.dataclass(frozen=True)
class Finding:
  """One warning: what happens, the evidence for it, and what usually helps."""

  title: str
  evidence: str
  advice: str


def trend(values: list[float]) -> tuple[float, float]:
  """Means of the first and the last fifth of a curve, which are robust to single noisy steps."""
  finite = [value for value in values if math.isfinite(value)]
  if len(finite) < 5:
    return math.nan, math.nan
  part = max(1, len(finite) // 5)
  return sum(finite[:part]) / part, sum(finite[-part:]) / part


def _before_and_after(run: Run, stage: Stage, figure: str) -> tuple[float, float]:
  """A held-out metric before and after a stage; NaN if unknown."""
  before = run.evaluated_before(stage, figure)
  after = run.evaluations.get(stage, {}).get(figure, math.nan)
  return (run.evaluations[before][figure] if before else math.nan), after


def _curve(run: Run, stage: Stage, metric: str) -> list[float]:
  return [number(line.get(metric)) for line in run.metrics.get(stage, [])]


def _figure_or_trend(run: Run, stage: Stage, figure: str, metric: str) -> tuple[float, float, str]:
  """(before, after, source): from held-out metrics if they exist, else from the training curve."""
  before, after = _before_and_after(run, stage, figure)
  if math.isfinite(before) and math.isfinite(after):
    return before, after, "on held-out images"
  return *trend(_curve(run, stage, metric)), "in training"


def hallucination(run: Run, stage: Stage) -> Finding | None:
  """Warns if precision falls or captions exceed the true length: the reward then favors false words."""
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
  """Warns if the reward rises while the held-out embedder's similarity or PSNR falls."""
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
      "Mild over-optimization of the embedder: compare the gallery, and lower the learning rate if images look worse.",
    )
  return None


def truncation(run: Run, stage: Stage) -> Finding | None:
  _, truncated = trend(_curve(run, stage, "truncated_fraction"))
  if not truncated > TRUNCATED:
    return None
  return Finding(
    f"{truncated:.0%} of the sampled captions are cut off at the longest allowed length",
    stage.title,
    "A truncated caption has no end token to learn from: allow more tokens, or mask truncated captions in the loss.",
  )


def little_signal(run: Run, stage: Stage) -> Finding | None:
  """Warns if most groups have equal rewards from the start; at the end of a good run that is expected."""
  early, _ = trend(_curve(run, stage, "zero_std_fraction"))
  if not early > ZERO_STD:
    return None
  return Finding(
    f"{early:.0%} of the groups have no reward difference from the start",
    stage.title,
    "Such groups give no gradient: raise the sampling temperature or the SDE noise, or use larger groups.",
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
  """Mean length of the ground-truth captions in tokens, from the latest evaluation that has it; else NaN."""
  found = [figures["true_caption_length"] for figures in run.evaluations.values() if "true_caption_length" in figures]
  return found[-1] if found else math.nan


def findings(run: Run) -> list[Finding]:
  """All warnings of a run, in stage order."""
  found = []
  for stage in run.stages:
    checks = [broken_numbers]
    if stage.name == GENERATION:
      checks += [hallucination, truncation]
    if stage.name in REINFORCEMENT:
      checks += [reward_hacking, little_signal]
    found += [finding for check in checks if (finding := check(run, stage)) is not None]
  return found
