"""Throughput of pods: images and captions per second and chip, from the JSON files of `uae-jax plan`.

python -m uae_jax.planning.pods docs/plans/*.json > docs/plans/pods.md
"""

from collections.abc import Sequence
import json
from pathlib import Path
import sys

from uae_jax.planning.chips import CHIPS

SHARES = (1.0, 0.6, 0.4)
HEAD = """# Pods: images and captions a second

    python -m uae_jax.planning.pods docs/plans/*.json > docs/plans/pods.md

Worked out from the plans beside this page, none of it measured on a TPU. A phase takes the longer of two times: that of
its matrix products at the chip's peaks (each the larger of FLOPs and bytes moved), and that of its collectives at the
links' peak; phases follow each other. At 60 % everything takes 1 / 0.6 of that time. Images are those that the decoder
learns from or generates for a reward, captions those that the captioner samples; both are of whole steps, and a chip's
share.
"""


def step_seconds(plan: dict, stage: str) -> float:
  """Lower bound of a step's time, at the peaks."""
  return sum(program["seconds"] for program in plan["programs"] if program["stage"] == stage)


def bounds(program: dict, chip: str) -> dict[str, float]:
  """Seconds of a program if only one part of the chip took time, for each part."""
  peaks = CHIPS[chip].device
  return {
    # Plans without products of int8 may lack `flop_seconds`.
    "matrix units": program["work"].get("flop_seconds", program["work"]["flops"] / peaks.flops),
    "HBM": program["work"]["bytes"] / peaks.hbm_bandwidth,
    "links": program["link_seconds"],
  }


def title(plan: dict, stage: str) -> str:
  mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1)
  frozen = plan["stages"][stage].get("frozen_weights")
  weights = f", frozen_weights {frozen}" if frozen else ""
  return f"{plan['model']}, {plan['image_px']} px, {plan['num_chips']} x {plan['chip']} ({mesh}){weights}"


def throughput_rows(plan: dict) -> list[str]:
  """Rows of the first table: per stage, images and captions per second and chip at each share of the peak."""
  rows = []
  for stage, counts in plan["stages"].items():
    seconds = step_seconds(plan, stage) * plan["num_chips"]
    cells = [
      " / ".join(f"{share * counts[kind] / seconds:.3g}" for share in SHARES) if counts[kind] else ""
      for kind in ("images", "captions")
    ]
    rows.append(f"| {title(plan, stage)} | {stage} | {step_seconds(plan, stage):.3g} | {' | '.join(cells)} |")
  return rows


def bound_rows(plan: dict) -> list[str]:
  """Rows of the second table: what bounds each phase."""
  rows = []
  for program in plan["programs"]:
    seconds = bounds(program, plan["chip"])
    cells = " | ".join(f"{value:.3g}" for value in seconds.values())
    rows.append(
      f"| {title(plan, program['stage'])} | {program['stage']} {program['phase']} | {cells} | "
      f"{max(seconds, key=seconds.__getitem__)} |"
    )
  return rows


def page(plans: Sequence[dict]) -> str:
  """Markdown page of plans in the format of `tables.to_json`."""
  shares = " / ".join(f"{share:.0%}" for share in SHARES).replace("%", " %")
  lines = [
    HEAD,
    f"| slice | stage | s per step | images / s per chip at {shares} | captions / s per chip at {shares} |",
  ]
  lines += ["|---|---|---|---|---|", *(row for plan in plans for row in throughput_rows(plan))]
  lines += ["", "What bounds a phase, in seconds per call if only that took time:", ""]
  lines += ["| slice | phase | matrix units | HBM | links | bound by |", "|---|---|---|---|---|---|"]
  lines += [row for plan in plans for row in bound_rows(plan)]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(page([json.loads(Path(name).read_text()) for name in sys.argv[1:]]), end="")
