"""`uae-jax bench`: Unified-Bench. Protocol 1 scores reconstructions; protocol 2 has judge models compare captions."""

import json
from pathlib import Path
import sys

from uae_jax.commands import command_line
from uae_jax.embedders import KINDS
from uae_jax.files import write_whole


def parser() -> command_line.Parser:
  parser = command_line.Parser(
    "bench",
    "Runs Unified-Bench. --embedders measures the similarity of originals and reconstructions; --judge-url asks a "
    "vision-language model which of two systems' captions it prefers.",
  )
  parser.add_argument("--references", required=True, metavar="DIR", help="folder of original images")
  parser.add_argument("--out", default="results.json", help="JSON file for the results; default %(default)s")
  one = parser.add_argument_group("protocol 1: reconstructions")
  one.add_argument(
    "--images",
    metavar="DIR",
    help="reconstructions: same file name or stem as the original, or recon_<stem>",
  )
  one.add_argument(
    "--embedders", metavar="KIND=PATH,...", help=f"checkpoints of {', '.join(KINDS)}; the score is their mean"
  )
  one.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
  one.add_argument("--pairs", type=int, default=8, help="best and worst pairs shown on the page; default %(default)s")
  two = parser.add_argument_group("protocol 2: captions")
  two.add_argument("--captions", metavar="FILE", help="captions.jsonl of `uae-jax caption`")
  two.add_argument("--against", metavar="FILE", help="captions of the other system, in the same format")
  two.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint, such as https://host/v1")
  two.add_argument("--judge-model", action="append", metavar="NAME", help="may be repeated")
  two.add_argument(
    "--key-variable", default="OPENAI_API_KEY", help="environment variable that holds the API key; default %(default)s"
  )
  two.add_argument(
    "--cache", default="judge_cache", metavar="DIR", help="folder for cached answers; default %(default)s"
  )
  two.add_argument("--workers", type=int, default=4, help="concurrent requests; default %(default)s")
  return parser


def main(argv: list[str]) -> int:
  commands = parser()
  arguments = commands.parse_args(argv)
  if (arguments.embedders is None) == (arguments.judge_url is None):
    commands.error("give --embedders for protocol 1, or --judge-url for protocol 2")
  needed = ("images",) if arguments.embedders else ("captions", "against", "judge_model")
  for name in needed:
    if not getattr(arguments, name):
      commands.error(f"--{name.replace('_', '-')} is needed")
  if arguments.embedders:
    return score(arguments, commands)
  return judge(arguments)


def parse_embedders(text: str) -> dict[str, str]:
  """Parses `clip=DIR,dinov2=DIR` into a dict.

  Raises:
    ValueError: an entry does not have this form, or its kind is unknown or repeated.
  """
  found: dict[str, str] = {}
  for entry in text.split(","):
    kind, _, path = entry.strip().partition("=")
    if kind not in KINDS or not path or kind in found:
      raise ValueError(f"--embedders: {entry!r}: expected KIND=PATH, each of {', '.join(KINDS)} once at most")
    found[kind] = path
  return found


def score(arguments, commands) -> int:
  """Runs protocol 1; writes results.json, results.csv and results.html."""
  try:
    kinds = parse_embedders(arguments.embedders)
  except ValueError as error:
    commands.error(str(error))

  from uae_jax import embedders
  from uae_jax.data.preprocessing import read_image
  from uae_jax.evaluation import unified_bench
  from uae_jax.report.bench_page import ScoredPair, write_page

  references = unified_bench.image_files(Path(arguments.references))
  pairs = unified_bench.pair(references, unified_bench.image_files(Path(arguments.images)))
  loaded = {kind: embedders.load(kind, path, dtype=arguments.dtype) for kind, path in kinds.items()}
  scores = unified_bench.score(pairs, {kind: model.embed for kind, model in loaded.items()}, read_image)

  result = unified_bench.official_result(scores)
  out = Path(arguments.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  write_whole(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
  unified_bench.write_table(out.with_suffix(".csv"), scores)
  ranked = scores.ranked()
  count = min(arguments.pairs, len(ranked))

  def scored(chosen):
    return [
      ScoredPair(
        reference,
        image,
        {kind: values[reference.name] for kind, values in scores.similarities.items()},
        scores.mean(reference.name),
      )
      for reference in chosen
      if (image := pairs[reference]) is not None  # always so: `ranked` has whole pairs only
    ]

  unpaired = [reference.name for reference, image in pairs.items() if image is None]
  notes = [f"{name}: no reconstruction" for name in unpaired] + list(scores.unreadable.values())
  groups = {"Best pairs": scored(ranked[:count]), "Worst pairs": scored(ranked[::-1][:count])}
  overall = result["summary"]["overall_average"]
  write_page(out.with_suffix(".html"), scores.averages, overall, groups, notes)
  for kind, average in scores.averages.items():
    print(f"{kind:10} {100 * average:.2f}")
  print(f"{'unified':10} {100 * overall:.2f}   {len(ranked)} of {len(pairs)} images")
  print(out)
  for note in notes:
    print(f"uae-jax bench: error: {note}", file=sys.stderr)
  return 1 if notes else 0


def judge(arguments) -> int:
  """Runs protocol 2; writes results.json with win rates."""
  from uae_jax.evaluation import caption_judge, unified_bench

  images = {file.name: file for file in unified_bench.image_files(Path(arguments.references))}
  ours, theirs = (caption_judge.read_captions(Path(file)) for file in (arguments.captions, arguments.against))
  judges = {}
  for model in arguments.judge_model:
    one = caption_judge.Judge(
      arguments.judge_url, model, key_variable=arguments.key_variable, cache=Path(arguments.cache)
    )
    judges[model] = caption_judge.compare(one, images, ours, theirs, workers=arguments.workers)
  result = caption_judge.result(judges)
  out = Path(arguments.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  write_whole(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
  for name, rate in (*result["judges"].items(), ("overall", result["overall"])):
    if rate:
      print(f"{name}: wins {100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]")
  print(out)
  failed = {key: why for _, (_, failures) in judges.items() for key, why in failures.items()}
  for key, why in failed.items():
    print(f"uae-jax bench: error: {key}: {why}", file=sys.stderr)
  return 1 if failed else 0
