"""A plan as text and as JSON."""

from collections.abc import Sequence
import dataclasses

from uae_jax.planning.chips import GIB, Chip
from uae_jax.planning.plan import ProgramPlan
from uae_jax.planning.prices import Price, usd_per_1000_steps


def to_json(plans: Sequence[ProgramPlan], **about) -> dict:
  """A plan as plain dicts: `about`, and each program with its derived figures."""
  programs = []
  for plan in plans:
    fields = dataclasses.asdict(plan)
    fields["memory"] |= {"total": plan.memory.total}
    programs.append(fields | {"seconds": plan.seconds, "fits": plan.fits})
  return about | {"fits": all(plan.fits for plan in plans), "programs": programs}


def step_seconds(plans: Sequence[ProgramPlan]) -> dict[str, float]:
  """Stage -> lower bound of the seconds of a step."""
  return {
    stage: sum(plan.seconds for plan in plans if plan.stage == stage)
    for stage in dict.fromkeys(plan.stage for plan in plans)
  }


def ranking(results: Sequence[dict]) -> str:
  """A table of the plans of several slices, in the format of `to_json`: the cheapest that fits comes first.

  A slice that cannot be planned has an `error` in place of programs. The last column is for 1000 steps of each stage.
  """

  def order(result: dict) -> tuple:
    cost = result.get("usd_per_1000_steps")
    seconds = sum(result.get("step_seconds", {}).values())
    return not result["fits"], cost is None, sum(cost.values()) if cost else seconds, seconds

  ordered = sorted(results, key=order)
  rows = []
  for result in ordered:
    if "error" in result:
      rows.append(["", "", "", "", ""])
      continue
    memory = max((program["memory"] for program in result["programs"]), key=lambda memory: memory["total"])
    cost = result["usd_per_1000_steps"]
    rows.append(
      [
        str(result["num_chips"]),
        "yes" if result["fits"] else "NO",
        f"{memory['total'] / GIB:.2f} of {memory['limit'] / GIB:.2f}",
        f"{sum(result['step_seconds'].values()):.3g}",
        f"{sum(cost.values()):.4g}" if cost else "no price",
      ]
    )
  columns = ("chips", "fits", "largest program, GiB", "s of one step of each stage", "USD of 1000 of them")
  lines = table("slice", [result["topology"] for result in ordered], columns, rows)
  lines += [f"{result['topology']}: {result['error']}" for result in ordered if "error" in result]
  return "\n".join([*lines, "Seconds and prices are lower bounds: products and links at their peaks."])


def bucket_table(buckets: Sequence[dict]) -> list[str]:
  """Lines of a table of the buckets of `stage_programs.bucket_tokens`, of which the first is planned."""
  rows = [[str(bucket["decoder_tokens"]), str(bucket["captioner_tokens"])] for bucket in buckets]
  names = [f"{bucket['size']} {'(planned: the largest)' if i == 0 else ''}".strip() for i, bucket in enumerate(buckets)]
  return table("bucket, height x width", names, ("decoder tokens", "captioner tokens"), rows)


def to_text(plans: Sequence[ProgramPlan], chip: Chip, num_devices: int, price: Price | None) -> str:
  """A plan as text: tables of memory, work and collectives, a lower bound per stage, and whether everything fits.

  Args:
    chip: as in `CHIPS`.
    num_devices: number of devices of all slices.
    price: of a chip; None if it is not known.
  """
  num_chips, device = num_devices // chip.num_devices, chip.device
  names = [f"{plan.stage} {plan.phase}" for plan in plans]
  limit = device.hbm_bytes / GIB
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
  if chip.num_devices > 1:
    lines[0] = (
      f"{num_chips} x {chip.name}, which are {num_devices} devices of {limit:.2f} GiB of HBM; "
      "all figures per chip are per device"
    )
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
  for stage, seconds in step_seconds(plans).items():
    cost = f", 1000 steps cost at least {usd_per_1000_steps(seconds, num_chips, price):.4g} USD" if price else ""
    lines.append(f"{stage}: a step takes at least {seconds:.3g} s{cost}")
  if price:
    lines.append(f"list price: {price}")
  lines.append("")
  for plan in plans:
    if not plan.fits:
      over = (plan.memory.total - device.hbm_bytes) / GIB
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
