"""A plan as text and as JSON."""

from collections.abc import Sequence
import dataclasses

from uae_jax.planning.chips import GIB, Chip
from uae_jax.planning.plan import ProgramPlan


def to_json(plans: Sequence[ProgramPlan], **about) -> dict:
  """A plan as plain dicts: `about`, and each program with its derived figures."""
  programs = []
  for plan in plans:
    fields = dataclasses.asdict(plan)
    fields["memory"] |= {"total": plan.memory.total}
    programs.append(fields | {"seconds": plan.seconds, "fits": plan.fits})
  return about | {"fits": all(plan.fits for plan in plans), "programs": programs}


def to_text(plans: Sequence[ProgramPlan], chip: Chip, num_chips: int) -> str:
  """A plan as text: tables of memory, work and collectives, a lower bound per stage, and whether everything fits."""
  names = [f"{plan.stage} {plan.phase}" for plan in plans]
  limit = chip.hbm_bytes / GIB
  memory = [
    [f"{bytes_ / GIB:.2f}" for bytes_ in (m.arguments, m.outputs, m.temporaries, m.held, m.total, m.peak)]
    + ["yes" if plan.fits else "NO"]
    for plan in plans
    for m in [plan.memory]
  ]
  work = [
    [
      f"{plan.work.flops / 1e12:.3g}",
      f"{plan.work.bytes / 1e9:.4g}",
      f"{plan.work.seconds:.3g}",
      f"{plan.link_seconds:.3g}",
      f"{plan.seconds:.3g}",
      f"{plan.seconds + min(plan.work.seconds, plan.link_seconds):.3g}",
    ]
    for plan in plans
  ]
  kinds = [
    [
      kind,
      str(row["count"]),
      str(row["in_loops"]),
      f"{row['largest_bytes'] / 2**20:.1f}",
      f"{row['total_bytes'] / GIB:.2f}",
    ]
    for plan in plans
    for kind, row in plan.collectives.items()
  ]
  kind_names = [name for name, plan in zip(names, plans, strict=True) for _ in plan.collectives]
  lines = [f"{num_chips} x {chip.name}, {limit:.2f} GiB of HBM per chip", ""]
  columns = ("arguments", "outputs", "temporaries", "held", "total", "peak", "fits")
  lines += table("HBM per chip, GiB", names, columns, memory)
  lines += table(
    "per call and chip",
    names,
    ("TFLOP", "GB moved", "s at peak", "s of links", "s overlapped", "s in turn"),
    work,
  )
  if kinds:
    lines += table("collectives", kind_names, ("kind", "count", "in loops", "largest MiB", "GiB per call"), kinds)
  for stage in dict.fromkeys(plan.stage for plan in plans):
    own = [plan for plan in plans if plan.stage == stage]
    together = sum(plan.seconds for plan in own)
    lines.append(f"{stage}: a step takes at least {together:.3g} s")
  lines.append("")
  for plan in plans:
    if not plan.fits:
      over = (plan.memory.total - chip.hbm_bytes) / GIB
      text = f"by {over:.2f} GiB per chip" if over > 0 else "(the compiler gave up)"
      lines.append(
        f"{plan.stage} {plan.phase} does not fit {text}: in config.{plan.stage}, {plan.lever}; "
        "or take more chips on config.mesh.fsdp"
      )
  lines.append("fits" if all(plan.fits for plan in plans) else "does not fit")
  return "\n".join(lines)


def table(title: str, names: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table with right-aligned columns, followed by an empty line."""
  cells = [[title, *columns], *([name, *row] for name, row in zip(names, rows, strict=True))]
  widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
  lines = [
    row[0].ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
    for row in cells
  ]
  return [*lines, ""]
