"""The page of `uae-jax compare`: differences with their intervals, and the prompts that gained and lost most."""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from PIL import Image

from uae_jax.data.images import open_image
from uae_jax.files import shown, write_whole
from uae_jax.report import charts
from uae_jax.report.inline_images import Embedded, embed
from uae_jax.report.templates import environment

# Images of one prompt that are shown, two in a row.
MOST_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class Contender:
  """One result: its letter, path, overall score as papers print it, settings, and notes about its scores."""

  label: str
  path: str
  overall: float
  settings: Mapping[str, Any]
  notes: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt with its two scores and the image files of both results."""

  text: str
  category: str
  scores: tuple[float, float]
  files: tuple[Sequence[Path], ...]


@dataclasses.dataclass(frozen=True)
class Metric:
  """One metric of two results: its name or "", rows of `evaluation.comparison.paired`, and examples."""

  name: str
  rows: Sequence[Mapping[str, Any]]
  wins: Sequence[Example]
  losses: Sequence[Example]


@dataclasses.dataclass(frozen=True)
class Pair:
  """A result and the baseline: settings that differ, and the metrics that both have."""

  label: str
  differing: Sequence[str]
  metrics: Sequence[Metric]


def write_page(file: Path, suite: str, scale: float, contenders: Sequence[Contender], pairs: Sequence[Pair]) -> None:
  """Writes one self-contained page.

  Args:
    file: path of the page.
    suite: name of the benchmark.
    scale: factor between the rows' numbers and those that are shown.
    contenders: all results in the order of the command, the baseline first.
    pairs: every other result against the baseline.
  """
  digits = 2 if scale > 1 else 3
  html = (
    environment()
    .get_template("compare.html")
    .render(
      suite=suite,
      contenders=[
        {
          "label": one.label,
          "path": shown(one.path),
          "overall": f"{one.overall:.{digits}f}",
          "notes": [shown(note) for note in one.notes],
        }
        for one in contenders
      ],
      settings=_settings(contenders),
      pairs=[_pair(pair, scale, digits) for pair in pairs],
    )
  )
  file.parent.mkdir(parents=True, exist_ok=True)
  write_whole(file, html)


def _settings(contenders: Sequence[Contender]) -> list[dict]:
  """Rows of the table of settings; those that differ come first."""
  names = dict.fromkeys(name for one in contenders for name in one.settings)
  rows = []
  for name in names:
    values = ["not known" if name not in one.settings else shown(str(one.settings[name])) for one in contenders]
    rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
  return sorted(rows, key=lambda row: not row["differs"])


def _pair(pair: Pair, scale: float, digits: int) -> dict:
  return {
    "label": pair.label,
    "differing": [shown(text) for text in pair.differing],
    "metrics": [_metric(metric, scale, digits) for metric in pair.metrics],
  }


def _metric(metric: Metric, scale: float, digits: int) -> dict:
  limit = max((abs(row[end]) for row in metric.rows for end in ("low", "high")), default=0.0)
  return {
    "name": metric.name,
    "rows": [
      {
        "category": row["category"],
        "count": f"{row['count']:,}",
        "a": f"{scale * row['a']:.{digits}f}",
        "b": f"{scale * row['b']:.{digits}f}",
        "difference": f"{scale * row['difference']:+.{digits}f}",
        "interval": f"{scale * row['low']:+.{digits}f} to {scale * row['high']:+.{digits}f}",
        "chart": charts.interval(row["low"], row["difference"], row["high"], limit),
        "verdict": "good" if row["low"] > 0 else "bad" if row["high"] < 0 else "",
        "wins": row["wins"],
        "losses": row["losses"],
      }
      for row in metric.rows
    ],
    "galleries": {
      "Largest gains": [_example(example, digits) for example in metric.wins],
      "Largest losses": [_example(example, digits) for example in metric.losses],
    },
  }


def _example(example: Example, digits: int) -> dict:
  return {
    "text": shown(example.text),
    "category": shown(example.category),
    "scores": [f"{score:.{digits}f}" for score in example.scores],
    "images": [_sheet(files) for files in example.files],
  }


def _sheet(files: Sequence[Path]) -> Embedded | None:
  """The first images of a prompt on one sheet; None if there is none that can be read."""
  images = []
  for file in files[:MOST_IMAGES]:
    try:
      with open_image(file) as image:
        images.append(image.convert("RGB"))
    except Exception:  # PIL's decoders raise many exception types; the page shows an empty frame for any of them.
      continue
  if not images:
    return None
  width, height = images[0].size
  columns = min(2, len(images))
  sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
  for index, shown_image in enumerate(images):
    sheet.paste(shown_image.resize((width, height)), (index % columns * width, index // columns * height))
  return embed(sheet)
