"""`uae-jax compare`: scored results side by side, prompt by prompt."""

import json
from pathlib import Path
import string
import sys
from typing import Any

from uae_jax import outputs
from uae_jax.commands import command_line, model_arguments

EPILOG = """
The first result is the baseline: every other one is compared with it over the prompts that both have. Results of other
prompts are refused; settings that differ are shown.
"""


def parser() -> command_line.Parser:
  parser = command_line.Parser("compare", "Compares scored results of a benchmark, prompt by prompt.", EPILOG)
  parser.add_argument(
    "results",
    nargs="+",
    type=command_line.input_path,
    metavar="RESULT",
    help="results.json of uae-jax evaluate, or its folder, or an official result file; two to 26 of them",
  )
  parser.add_argument("--suite", metavar="NAME", help="suite of the official result files")
  parser.add_argument(
    "--prompts", type=command_line.input_path, metavar="PATH", help="the official prompts, with --suite"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument(
    "--page",
    type=command_line.output_path,
    metavar="FILE",
    help="also write a page with galleries: FILE, or FILE/compare.html",
  )
  parser.add_argument(
    "--gallery",
    type=model_arguments.positive,
    default=8,
    metavar="N",
    help="largest gains and losses shown on the page, N each; default %(default)s",
  )
  return parser


def main(argv: list[str]) -> int:
  commands = parser()
  arguments = commands.parse_args(argv)
  if bool(arguments.suite) != bool(arguments.prompts):
    commands.error("--suite and --prompts go together: they say what official result files are about")
  if arguments.page:
    outputs.require_file(page_file(arguments.page), "--page", outputs.PAGE, arguments.results)
  else:
    commands.refuse_unused(arguments, ["gallery"], "goes with --page")
  if not 2 <= len(arguments.results) <= len(string.ascii_uppercase):
    raise ValueError(f"{len(arguments.results)} results: expected 2 to {len(string.ascii_uppercase)}")

  from uae_jax.evaluation import comparison, suites
  from uae_jax.evaluation.suites.task import Task

  suite = suites.find(arguments.suite) if arguments.suite else None
  if isinstance(suite, Task):
    raise ValueError(f"--suite {suite.name} is scored by uae-jax evaluate: it has no official result files")
  first, *others = [comparison.read(path, suite, arguments.prompts) for path in arguments.results]
  compared = []
  for label, other in zip(string.ascii_uppercase[1:], others, strict=False):
    changed = comparison.differences(first, other)
    shared = comparison.shared_metrics(first, other).items()
    metrics = {name: comparison.paired(*both) for name, both in shared}
    compared.append({"a": str(first.path), "b": str(other.path), "differing_settings": changed, "metrics": metrics})
    for text in changed:
      print(f"warning: A and {label} differ: {text}", file=sys.stderr)
  if arguments.json:
    print(json.dumps(compared, indent=1))
  else:
    print("\n\n".join(table(label, each) for label, each in zip(string.ascii_uppercase[1:], compared, strict=False)))
  if arguments.page:
    command_line.say(write_page(arguments.page, [first, *others], compared, arguments.gallery))
  return 0


def table(label: str, compared: dict) -> str:
  """The differences of one result from the baseline, a block per metric."""
  blocks = compared["metrics"]
  width = max(len(row["category"]) for rows in blocks.values() for row in rows)
  lines = [f"A: {compared['a']}", f"{label}: {compared['b']}"]
  for metric, rows in blocks.items():
    lines += ["", metric] if metric else []
    lines.append(f"{'':{width}}  prompts       A       {label}   {label} - A  95 % interval     wins losses")
    for row in rows:
      interval = f"[{row['low']:+.3f}, {row['high']:+.3f}]"
      lines.append(
        f"{row['category']:{width}}  {row['count']:7}  {row['a']:6.3f}  {row['b']:6.3f}  {row['difference']:+6.3f}"
        f"  {interval:16}  {row['wins']:4} {row['losses']:6}"
      )
  return "\n".join(lines)


def page_file(target: Path) -> Path:
  """The file of `--page`, which may name a folder."""
  return target if target.suffix == ".html" else target / "compare.html"


def write_page(target: Path, results: list, compared: list[dict], count: int) -> Path:
  """Writes the page of a comparison and returns its path."""
  from uae_jax.evaluation import comparison
  from uae_jax.report import compare_page

  file = page_file(target)
  first, *others = results
  pairs = []
  for label, other, each in zip(string.ascii_uppercase[1:], others, compared, strict=False):
    metrics = [
      compare_page.Metric(
        metric,
        each["metrics"][metric],
        *(_examples(*both, keys) for keys in comparison.extremes(*both, count)),
      )
      for metric, both in comparison.shared_metrics(first, other).items()
    ]
    pairs.append(compare_page.Pair(label, each["differing_settings"], metrics))
  contenders = [
    compare_page.Contender(label, str(result.path), result.scale * result.overall, result.settings, result.notes)
    for label, result in zip(string.ascii_uppercase, results, strict=False)
  ]
  compare_page.write_page(file, str(first.settings["suite"]), first.scale, contenders, pairs)
  return file


def _examples(first: Any, other: Any, keys: list[str]) -> list:
  """What the page shows of some prompts under one metric."""
  from uae_jax.report import compare_page

  return [
    compare_page.Example(
      text=first.texts.get(key) or other.texts.get(key) or key,
      category=first.categories.get(key, ""),
      scores=(first.scale * first.items[key], first.scale * other.items[key]),
      files=tuple([result.folder / name for name in result.images.get(key, ())] for result in (first, other)),
    )
    for key in keys
  ]
