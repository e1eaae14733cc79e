"""Training curves of every stage, and a breakdown of its wall time."""

from collections.abc import Sequence
import math
import re
import statistics
from typing import Any

from uae_jax.report import charts
from uae_jax.report.findings import true_length
from uae_jax.report.run import REINFORCEMENT, Run, Stage, number

# (title, hint, [(metric, label)], minimum y range); a card is drawn if one of its metrics was logged.
CURVES = (
  ("Reward", "should rise together", [("reward", "reward"), ("held_out_reward", "held-out embedder")], None),
  ("Caption length", "should approach the true length and not exceed it", [("caption_length", "tokens")], None),
  (
    "Recall and precision",
    "recall should rise without a drop in precision",
    [("caption_recall", "recall"), ("caption_precision", "precision")],
    (0.0, 1.0),
  ),
  (
    "Held-out similarity",
    "of reconstructions, by the averaged policy",
    [("evaluation_reward_similarity", "reward embedder"), ("evaluation_held_out_similarity", "held-out embedder")],
    None,
  ),
  (
    "Held-out captions",
    "by the averaged policy",
    [("evaluation_caption_recall", "recall"), ("evaluation_caption_precision", "precision")],
    (0.0, 1.0),
  ),
  ("KL to the reference", "how far the policy has moved", [("kl", "KL")], None),
  (
    "Clip fraction",
    "ratios outside the clip range",
    [("clip_fraction", "all"), ("clip_fraction_low", "low"), ("clip_fraction_high", "high")],
    None,
  ),
  (
    "Ratio to the old policy",
    "1 at the first update of a rollout; should stay close to 1",
    [("ratio_mean", "mean"), ("ratio_variance", "mean squared deviation from 1")],
    None,
  ),
  (
    "Reward spread within groups",
    "the remaining learning signal",
    [("reward_std_in_group", "standard deviation")],
    None,
  ),
  ("Range of rewards", "within a batch", [("reward_min", "lowest"), ("reward_max", "highest")], None),
  ("Advantages", "absolute values", [("advantage_abs_mean", "mean"), ("advantage_abs_max", "largest")], None),
  ("Entropy", "exploration ends if it collapses to 0", [("entropy", "nats per token")], None),
  ("Gradient norm", "before clipping", [("grad_norm", "norm")], None),
  (
    "|Δ log-prob|, rollout vs. replay",
    "0 if replay is exact",
    [("log_prob_difference", "mean difference"), ("log_prob_difference_max", "largest difference")],
    None,
  ),
  (
    "Groups and truncation",
    "fraction of groups, fraction of captions",
    [("zero_std_fraction", "groups without signal"), ("truncated_fraction", "truncated captions")],
    (0.0, 1.0),
  ),
  ("Distinct captions", "per group", [("distinct_captions", "captions")], None),
  (
    "Shortest and longest caption",
    "within a batch",
    [("caption_length_min", "shortest"), ("caption_length_max", "longest")],
    None,
  ),
  ("External failures", "rollouts without an external reward", [("external_failures", "fraction")], (0.0, 1.0)),
  ("Rollouts per second", "per device, over all phases", [("rollouts_per_second", "rollouts")], None),
  ("Loss", "", [("loss", "loss")], None),
)
MOST_OPEN_STAGES = 4
NOT_CURVES = {"stage", "step", "round", "seconds", "useful_seconds"}

PHASES = (
  ("seconds_rollout", "rollout"),
  ("seconds_reward", "reward"),
  ("seconds_update", "update"),
  ("seconds_data", "data"),
)
# Rates per chip: (metric, unit, factor).
RATES = (
  ("images_per_second_per_chip", "images/s", 1.0),
  ("tokens_per_second_per_chip", "tokens/s", 1.0),
  ("tflops_per_second_per_chip", "TFLOP/s", 1.0),
  ("mfu", "% of its peak", 100.0),
)


def _curve_card(
  run: Run, title: str, hint: str, metrics: Sequence[tuple[str, str]], lines: list[dict], y_range
) -> dict:
  drawn: dict[str, list[charts.Line]] = {"step": [], "minutes": []}
  legend = []
  start = min((number(line.get("seconds")) for line in lines), default=math.nan)
  for color, (metric, name) in enumerate(metrics):
    points = [line for line in lines if metric in line]
    if not points:
      continue
    ys = [number(line[metric]) for line in points]
    drawn["step"].append(charts.Line(name, [line["step"] for line in points], ys, color))
    seconds = [number(line.get("seconds")) for line in points]
    if all(map(math.isfinite, seconds)):
      drawn["minutes"].append(charts.Line(name, [(s - start) / 60 for s in seconds], ys, color))
    drawn_ys = charts.thin(charts.Line(name, [line["step"] for line in points], ys)).ys
    finite = [y for y in charts.smooth(drawn_ys, len(drawn_ys) // 12) if math.isfinite(y)]
    ends = f"{charts.label(finite[0])} → {charts.label(finite[-1])}" if finite else "–"
    legend.append({"name": name, "color": color, "ends": ends})
  references = [charts.Reference("truth", true_length(run))] if title == "Caption length" else []
  pictures = [
    charts.line_chart(drawn[unit], title=title, x_unit=unit, references=references, y_range=y_range)
    for unit in ("step", "minutes")
    if drawn[unit]
  ]
  return {"title": title, "hint": hint, "legend": legend, "charts": pictures, "has_time": len(pictures) == 2}


def _by_step(names: list[str]) -> list[tuple[str, str, list[tuple[str, str]]]]:
  """Groups metrics into cards (title, hint, [(metric, label)]); all `<name>_step<i>` share one card."""
  cards: dict[str, list[tuple[str, str]]] = {}
  for name in names:
    match = re.fullmatch(r"(.+)_step(\d+)", name)
    cards.setdefault(match[1] if match else name, []).append((name, f"step {match[2]}" if match else name))
  return [(name, "per step of the window" if metrics[0][0] != name else "", metrics) for name, metrics in cards.items()]


def curves(run: Run) -> list[dict]:
  """Cards per stage: those of `CURVES`, then all other logged metrics. The RL stages come first."""
  sections = []
  known = {metric for _, _, metrics, _ in CURVES for metric, _ in metrics} | NOT_CURVES
  for stage in run.stages:
    lines = run.metrics.get(stage, [])
    logged = {
      metric for line in lines for metric, value in line.items() if math.isfinite(number(value)) or value is None
    }
    cards = [
      _curve_card(run, title, hint, metrics, lines, y_range)
      for title, hint, metrics, y_range in CURVES
      if any(metric in logged for metric, _ in metrics)
    ]
    others = [
      _curve_card(run, title.replace("_", " "), hint, metrics, lines, None)
      for title, hint, metrics in _by_step(sorted(logged - known))
    ]
    if cards or others:
      sections.append(
        {
          "title": stage.title,
          "cards": cards,
          "others": others,
          "is_reinforcement": stage.name in REINFORCEMENT,
        }
      )
  sections.sort(key=lambda section: not section["is_reinforcement"])  # stable, so otherwise in run order
  reinforcement = [section for section in sections if section["is_reinforcement"]]
  for section in sections:
    section["is_open"] = section in reinforcement[-MOST_OPEN_STAGES:]
  return sections


def _stage_seconds(run: Run) -> dict[Stage, float]:
  """Wall time of each stage, from `seconds` in metrics.jsonl, which counts from the start of the run."""
  spent, end = {}, 0.0
  for stage in run.stages:
    seconds = [number(line.get("seconds")) for line in run.metrics.get(stage, [])]
    seconds = [value for value in seconds if math.isfinite(value)]
    if seconds:
      # Also handles a counter that restarts at every stage.
      spent[stage] = seconds[-1] - end if seconds[-1] >= end else seconds[-1]
      end = seconds[-1]
  return spent


def _total(lines: list[dict], metric: str) -> float:
  """Total seconds of a stage, from a metric that is the mean seconds per step since the previous line."""
  total, before = 0.0, 0
  for line in lines:
    value = number(line.get(metric))
    total += value * (line["step"] - before) if math.isfinite(value) else 0.0
    before = line["step"]
  return total


def _rates(lines: list[dict]) -> str:
  """Rates per chip as text, each the median over a stage."""
  found = []
  for metric, unit, factor in RATES:
    values = [value for line in lines if math.isfinite(value := number(line.get(metric)))]
    if values:
      found.append(f"{charts.label(factor * statistics.median(values))} {unit}")
  return " · ".join(found)


def times(run: Run) -> dict:
  """Wall time by stage and phase, and the rates per chip."""
  spent = _stage_seconds(run)
  rows: list[dict[str, Any]] = []
  for stage, seconds in spent.items():
    lines, parts = run.metrics[stage], []
    for color, (metric, name) in enumerate(PHASES):
      total = _total(lines, metric)
      if total > 0:
        parts.append(charts.Part(name, total, color))
    rest_of_steps = _total(lines, "seconds_step") - sum(part.value for part in parts)
    if rest_of_steps > 0:
      parts.append(charts.Part("step", rest_of_steps, len(PHASES)))
    rest = seconds - sum(part.value for part in parts)
    if rest > 0:
      parts.append(charts.Part("other: compiling, evaluating, saving" if parts else "not split", rest, 5))
    rows.append({"title": stage.title, "total": charts.duration(seconds), "parts": parts, "rates": _rates(lines)})
  longest = max((sum(part.value for part in row["parts"]) for row in rows), default=0.0)
  legend: dict[int, str] = {}
  for row in rows:
    row["bar"] = charts.stacked_bar(row["parts"], longest) if longest > 0 else ""
    legend |= {part.color: part.label for part in row["parts"] if part.color not in legend or part.label != "not split"}
  return {
    "rows": rows,
    "legend": [{"color": color, "name": name} for color, name in sorted(legend.items())],
    "total": charts.duration(sum(spent.values())),
    "has_rates": any(row["rates"] for row in rows),
  }
