"""The figures of the suite `learning` as a table: the same training on several platforms."""

from collections.abc import Iterator, Sequence
import statistics

ENDS = 5  # steps at the start and at the end whose mean is taken


def ends(values: Sequence[float]) -> tuple[float, float]:
  """Mean of the first and of the last steps."""
  return statistics.fmean(values[:ENDS]), statistics.fmean(values[-ENDS:])


def lines(rows: Sequence[dict]) -> Iterator[str]:
  """Markdown lines: per stage and platform the mean over seeds of each reward, at the start and at the end."""
  found: dict[str, dict[str, list[dict]]] = {}
  for row in rows:
    if row["suite"] == "learning" and "error" not in row:
      facts = row["facts"]
      found.setdefault(facts["stage"], {}).setdefault(facts["platform"], []).append(facts)
  for stage, platforms in found.items():
    yield f"\n{stage}, mean over seeds, and their range at the end:\n"
    names = list(next(iter(platforms.values()))[0]["curves"])
    yield "| platform | seeds | steps | " + " | ".join(f"{name}, start | end | range" for name in names) + " |"
    yield "|---" * (3 + 3 * len(names)) + "|"
    for platform, runs in platforms.items():
      cells = [platform, str(len(runs)), str(len(runs[0]["curves"][names[0]]))]
      for name in names:
        starts, finals = zip(*(ends(run["curves"][name]) for run in runs), strict=True)
        cells += [f"{statistics.fmean(starts):.4f}", f"{statistics.fmean(finals):.4f}"]
        cells += [f"{min(finals):.4f} to {max(finals):.4f}"]
      yield "| " + " | ".join(cells) + " |"
