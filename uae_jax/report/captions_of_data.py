"""Lengths of the captions that a run was trained on, as rows of a table."""

from uae_jax.data.caption_lengths import read_lengths
from uae_jax.report.run import Run

FIGURES = ("captions", "budget", "min", "p50", "p90", "p99", "max", "cut", "mean_lost")
COLUMNS = ("Looked at", "Budget", "Fewest", "Median", "90 %", "99 %", "Most", "Cut", "Tokens lost by a cut one")


def rows(run: Run) -> list[dict]:
  """Per stage `title`, `values` in the order of `COLUMNS`, and `histogram` with the share of the largest bin."""
  found = []
  for stage, plain in read_lengths(run.workdir).items():
    histogram = []
    for bin_ in plain.get("histogram") or ():
      if isinstance(bin_, list) and len(bin_) == 3 and all(isinstance(value, int) for value in bin_):
        histogram.append(bin_)
    most = max((count for *_, count in histogram), default=0) or 1
    bars = [{"range": f"{low} to {high}", "count": count, "share": count / most} for low, high, count in histogram]
    found.append({"title": stage, "values": [plain.get(name, "") for name in FIGURES], "bars": bars})
  return found
