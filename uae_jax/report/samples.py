"""Samples of a run on fixed held-out images: the gallery, and the captions of one image over training."""

import math
from typing import Any

from uae_jax.report.inline_images import embed_file
from uae_jax.report.run import Run, number

MOST_GALLERY_ROWS = 4
MOST_CAPTION_STEPS = 12


def _words(entry: dict) -> list[dict]:
  """The words of a caption with their verdicts; a caption without verdicts is a single neutral entry."""
  words = entry.get("words")
  if not isinstance(words, list) or not words:
    return [{"text": str(entry.get("caption", "")), "verdict": "neutral"}]
  found = []
  for word in words:
    text, verdict = (word[0], word[1]) if isinstance(word, list) and len(word) == 2 else (word, "neutral")
    found.append({"text": str(text), "verdict": verdict if verdict in ("right", "wrong") else "neutral"})
  return found


def _caption(entry: dict) -> dict:
  missing = entry.get("missing")
  return {"words": _words(entry), "missing": [str(item) for item in missing] if isinstance(missing, list) else []}


def _score(value: Any) -> str | None:
  return f"{number(value):.3f}" if math.isfinite(number(value)) else None


def gallery(run: Run) -> dict:
  """One row per held-out original, with its caption and reconstruction after each stage."""
  stages = [stage for stage in run.stages if stage in run.galleries]
  rows: dict[str, dict] = {}
  for stage in stages:
    folder = run.samples_folder(stage)
    for position, item in enumerate(run.galleries[stage]):
      row = rows.setdefault(
        str(item.get("name", position)),
        {"original": None, "true_caption": str(item.get("true_caption") or ""), "moments": {}},
      )
      row["original"] = row["original"] or embed_file(folder, item.get("original"))
      row["moments"][stage] = {
        "title": stage.moment,
        "image": embed_file(folder, item.get("reconstruction")),
        "caption": _caption(item),
        "reward": _score(item.get("reward")),
        "held_out": _score(item.get("held_out")),
      }
  listed = [
    {"name": name, **row, "moments": [row["moments"][stage] for stage in stages if stage in row["moments"]]}
    for name, row in rows.items()
  ]
  return {"columns": len(stages), "rows": listed[:MOST_GALLERY_ROWS], "more": listed[MOST_GALLERY_ROWS:]}


def _spread(items: list, count: int) -> list:
  """Selects `count` evenly spaced items, including the first and the last."""
  if len(items) <= count:
    return items
  return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def captions_over_time(run: Run) -> list[dict]:
  """Captions of one image over training, per stage."""
  sections = []
  for stage in run.stages:
    content = run.captions.get(stage)
    if content is None:
      continue
    steps = [step for step in content["steps"] if isinstance(step, dict)]
    steps.sort(key=lambda step: number(step.get("step")))
    rewards = [number(step.get("reward")) for step in steps]
    highest = max([reward for reward in rewards if math.isfinite(reward)] + [1.0])
    sections.append(
      {
        "title": stage.title,
        "image": embed_file(run.samples_folder(stage), content.get("image")),
        "true_caption": str(content.get("true_caption") or ""),
        "steps": [
          {
            "step": step.get("step"),
            "reward": _score(step.get("reward")),
            "share": max(0.0, min(1.0, number(step.get("reward")) / highest)) if _score(step.get("reward")) else 0.0,
            "caption": _caption(step),
          }
          for step in _spread(steps, MOST_CAPTION_STEPS)
        ],
      }
    )
  return sections
