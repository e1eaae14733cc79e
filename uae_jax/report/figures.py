"""Held-out metrics after each stage: summary tiles, the main table, and the full table."""

import dataclasses
import math
from typing import Any

from uae_jax.report.findings import LENGTH_EXCESS, true_length
from uae_jax.report.run import REINFORCEMENT, Run


@dataclasses.dataclass(frozen=True)
class Figure:
  """A held-out metric: its key in evaluation/<stage>.json, its format, and which change is an improvement."""

  key: str
  name: str
  digits: int = 3
  unit: str = ""
  better: str = "higher"

  @property
  def column(self) -> str:
    return f"{self.name},{self.unit}" if self.unit else self.name


FIGURES = (
  Figure("caption_recall", "Recall"),
  Figure("caption_precision", "Precision"),
  Figure("caption_length", "Length", 1, better="closer to the truth, not beyond"),
  Figure("reward_similarity", "Reward"),
  Figure("held_out_similarity", "Held-out embedder"),
  Figure("held_out_pairs_reward_similarity", "Unseen pairs"),
  Figure("object_accuracy", "Objects right"),
  Figure("psnr", "PSNR", 2, " dB"),
)


def change(figure: Figure, before: float, after: float, truth: float) -> dict:
  """Formats a change and rates it as "good", "bad" or "same"."""
  difference = after - before
  text = f"{difference:+.{figure.digits}f}".replace("-", "−")
  if round(abs(difference), figure.digits) == 0:
    return {"text": "±0", "verdict": "same"}
  if figure.better == "higher":
    good = difference > 0
  elif math.isfinite(truth):
    good = after <= truth * LENGTH_EXCESS and abs(after - truth) < abs(before - truth)
  else:
    return {"text": text, "verdict": "same"}
  return {"text": text, "verdict": "good" if good else "bad"}


def headline(run: Run) -> dict:
  """Table of held-out metrics by stage, each with its change from the previous stage."""
  figures = [f for f in FIGURES if any(f.key in evaluation for evaluation in run.evaluations.values())]
  rows = []
  for stage in run.stages:
    evaluation = run.evaluations.get(stage, {})
    cells = []
    for figure in figures:
      value = evaluation.get(figure.key)
      if value is None:
        cells.append({"name": figure.column, "value": None})
        continue
      before = run.evaluated_before(stage, figure.key)
      truth = evaluation.get("true_caption_length", math.nan)
      shown = f"{value:.{figure.digits}f}"
      cell: dict[str, Any] = {"name": figure.column, "value": shown, "of": "", "change": None}
      if figure.key == "caption_length" and math.isfinite(truth):
        cell["of"] = f"of {truth:.1f}"
      if before is not None:
        cell["change"] = change(figure, run.evaluations[before][figure.key], value, truth)
      cells.append(cell)
    if any(cell["value"] is not None for cell in cells):
      rows.append({"title": stage.title, "is_reinforcement": stage.name in REINFORCEMENT, "cells": cells})
  return {"columns": [figure.column for figure in figures], "rows": rows}


def tiles(run: Run) -> list[dict]:
  """Summary tiles: each metric now and before the RL stages."""
  first = next((stage for stage in run.stages if stage.name in REINFORCEMENT and stage in run.evaluations), None)
  if first is None:
    return []
  found = []
  for figure in FIGURES:
    after = [run.evaluations[s][figure.key] for s in run.stages if figure.key in run.evaluations.get(s, {})]
    before = run.evaluated_before(first, figure.key)
    if not after or before is None:
      continue
    start = run.evaluations[before][figure.key]
    truth = true_length(run) if figure.key == "caption_length" else math.nan
    found.append(
      {
        "name": figure.name,
        "value": f"{after[-1]:.{figure.digits}f}",
        "unit": f" of {truth:.1f}" if math.isfinite(truth) else figure.unit,
        "before": f"{start:.{figure.digits}f}{figure.unit}",
        "verdict": change(figure, start, after[-1], truth)["verdict"],
      }
    )
  return found


def all_figures(run: Run) -> dict:
  """Table of every held-out metric of every stage."""
  stages = [stage for stage in run.stages if run.evaluations.get(stage)]
  names = list(dict.fromkeys(name for stage in stages for name in run.evaluations[stage]))
  rows = [
    (name, [f"{run.evaluations[s][name]:.4g}" if name in run.evaluations[s] else "" for s in stages]) for name in names
  ]
  return {"columns": [stage.title for stage in stages], "rows": rows}
