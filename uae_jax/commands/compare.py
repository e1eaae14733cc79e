"""`uae-jax compare`: two results of `uae-jax evaluate`, prompt by prompt."""

import json
import sys

from uae_jax.commands import command_line


def parser() -> command_line.Parser:
  parser = command_line.Parser("compare", "Compares two scored results of uae-jax evaluate, prompt by prompt.")
  parser.add_argument(
    "results", nargs=2, type=command_line.path, metavar="RESULT", help="results.json, or the folder that holds it"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)

  from uae_jax.evaluation import results

  read = []
  for name in arguments.results:
    result = results.read(name)
    if result is None:
      raise ValueError(f"{name}: no {results.FILE}")
    if "scores" not in result:
      raise ValueError(f"{name} has no scores yet: run the official scorer, then uae-jax evaluate without --model")
    read.append(result)
  one, other = read
  for setting in ("suite", "prompts"):
    if one["settings"][setting] != other["settings"][setting]:
      raise ValueError(f"the results have different {setting}: they have no prompts to compare")
  # Different weights are what is compared; every other difference weakens the comparison.
  changed = [
    text for text in results.differences(one["settings"], other["settings"]) if not text.startswith("weights:")
  ]
  for text in changed:
    print(f"warning: the results differ in {text}", file=sys.stderr)
  rows = results.paired(one, other)
  if arguments.json:
    print(json.dumps({"differing_settings": changed, "rows": rows}, indent=1))
    return 0
  width = max(len(row["category"]) for row in rows)
  print(f"{'':{width}}  prompts       A       B   B - A  95 % interval     wins losses")
  for row in rows:
    interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
    print(
      f"{row['category']:{width}}  {row['count']:7}  {row['a']:6.3f}  {row['b']:6.3f}  {row['difference']:+6.3f}"
      f"  {interval:16}  {row['wins']:4} {row['losses']:6}"
    )
  return 0
