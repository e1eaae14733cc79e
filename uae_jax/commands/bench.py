"""`uae-jax bench`: Unified-Bench. Protocol 1 scores reconstructions; protocol 2 has judge models compare captions."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
import sys

from uae_jax import json_files, outputs
from uae_jax.commands import command_line
from uae_jax.embedders import KINDS
from uae_jax.files import IMAGE_SUFFIXES, input_path, json_text, local_path, shown, write_whole

# Options of one protocol.
RECONSTRUCTIONS = ("images", "dtype", "pixels", "suffixes", "pairs")
CAPTIONS = ("captions", "against", "judge_model", "key_variable", "cache", "workers")


def parser() -> command_line.Parser:
  parser = command_line.Parser(
    "bench",
    "Runs Unified-Bench. --embedders measures the similarity of originals and reconstructions; --judge-url asks a "
    "vision-language model which of two systems' captions it prefers.",
  )
  path, number, input_path = command_line.path, command_line.number, command_line.input_path
  parser.add_argument("--references", required=True, type=input_path, metavar="DIR", help="folder of original images")
  parser.add_argument(
    "--out",
    type=command_line.output_path,
    default=Path("results.json"),
    help="JSON file for the results; default %(default)s",
  )
  one = parser.add_argument_group("protocol 1: reconstructions")
  one.add_argument(
    "--images",
    type=input_path,
    metavar="DIR",
    help="reconstructions: same file name or stem as the original, or recon_<stem>; with subfolders",
  )
  one.add_argument(
    "--embedders",
    metavar="KIND=PATH,...",
    help=f"checkpoints of {', '.join(KINDS)}, or a run for its own; the score is their mean",
  )
  one.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
  one.add_argument(
    "--pixels",
    choices=("official", "displayed"),
    default="official",
    help="official: as the published figures, without transparency, EXIF rotation and scaling of 16 bits; displayed: "
    "with them; default %(default)s",
  )
  one.add_argument(
    "--suffixes",
    choices=("official", "all"),
    default="official",
    help="official: without .gif, .ppm and .tif; default %(default)s",
  )
  one.add_argument(
    "--pairs",
    type=number(int, at_least=0),
    default=8,
    help="best and worst pairs shown on the page; default %(default)s",
  )
  two = parser.add_argument_group("protocol 2: captions")
  two.add_argument("--captions", type=input_path, metavar="FILE", help="captions.jsonl of `uae-jax caption`")
  two.add_argument(
    "--against", type=input_path, metavar="FILE", help="captions of the other system, in the same format"
  )
  two.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint, such as https://host/v1")
  two.add_argument("--judge-model", action="append", metavar="NAME", help="may be repeated")
  two.add_argument(
    "--key-variable", default="OPENAI_API_KEY", help="environment variable that holds the API key; default %(default)s"
  )
  two.add_argument(
    "--cache",
    type=path,
    default=Path("judge_cache"),
    metavar="DIR",
    help="folder for cached answers; default %(default)s",
  )
  two.add_argument(
    "--workers", type=number(int, at_least=1), default=4, help="concurrent requests; default %(default)s"
  )
  return parser


def main(argv: list[str], originals: list[Path] | None = None) -> int:
  """Runs the command; `originals` are the files of --references that count, by default all."""
  commands = parser()
  arguments = commands.parse_args(argv)
  if bool(arguments.embedders) == bool(arguments.judge_url):
    commands.error("give --embedders for protocol 1, or --judge-url for protocol 2")
  needed = ("images",) if arguments.embedders else ("captions", "against", "judge_model")
  for name in needed:
    if not getattr(arguments, name):
      commands.error(f"--{name.replace('_', '-')} is needed")
  unused, why = (CAPTIONS, "--judge-url") if arguments.embedders else (RECONSTRUCTIONS, "--embedders")
  commands.refuse_unused(arguments, unused, f"goes with {why}")
  if arguments.out.suffix in (".csv", ".html"):
    commands.error(f"--out {shown(arguments.out)}: the table and the page get these suffixes, name the JSON file .json")
  for file, begins in files_of(arguments.out).items() if arguments.embedders else [(arguments.out, outputs.JSON)]:
    outputs.require_file(file, "--out", begins)
  if arguments.embedders:
    return score(arguments, commands, originals)
  return judge(arguments)


def files_of(out: Path) -> dict[Path, bytes]:
  """The files of protocol 1, and how each begins."""
  return {out: outputs.JSON, out.with_suffix(".csv"): outputs.TABLE, out.with_suffix(".html"): outputs.PAGE}


def parse_embedders(text: str) -> dict[str, str]:
  """Parses `clip=DIR,dinov2=DIR`, or the workdir of a run for all of its embedders, into a dict.

  Raises:
    ValueError: an entry does not have this form, its kind is unknown or repeated, or its path is an address.
  """
  found: dict[str, str] = {}
  for entry in text.split(","):
    kind, is_pair, path = entry.strip().partition("=")
    if not is_pair and (sizes := Path(local_path(kind)) / "model.json").is_file():
      kinds, path = list(json_files.read_object(sizes).get("embedders", {})), kind
    else:
      kinds = [kind]
    if not kinds or not path or any(kind not in KINDS or kind in found for kind in kinds):
      raise ValueError(
        f"--embedders: {entry!r}: expected KIND=PATH, each of {', '.join(KINDS)} once at most, or a run with embedders"
      )
    found |= dict.fromkeys(kinds, input_path(path))
  return found


def score(arguments, commands, originals: list[Path] | None = None) -> int:
  """Runs protocol 1; writes results.json and results.csv after each embedder, and results.html."""
  try:
    kinds = parse_embedders(arguments.embedders)
  except ValueError as error:
    commands.error(str(error))

  from uae_jax.data.images import read_image
  from uae_jax.data.official_pixels import benchmark_rgb
  from uae_jax.evaluation import bench_notes, unified_bench
  from uae_jax.report.bench_page import ScoredPair, write_page
  from uae_jax.training import restore

  # 1. Pairs.
  everything = originals or unified_bench.image_files(arguments.references, suffixes=IMAGE_SUFFIXES)
  counted = unified_bench.OFFICIAL_SUFFIXES if arguments.suffixes == "official" else IMAGE_SUFFIXES
  references = [file for file in everything if file.suffix.lower() in counted]
  pairs = unified_bench.pair(unified_bench.image_files(arguments.images, suffixes=counted), references)
  problems = bench_notes.missing(pairs, references, [file for file in everything if file not in references])
  if not any(pairs.values()):
    raise ValueError(
      f"no reconstruction in {arguments.images} has its original in {arguments.references}: names or stems must be "
      f"equal, or recon_ + stem ({problems[0]})"
    )
  causes = bench_notes.affected(pairs)
  subset = {image: pairs[image] for image in causes}

  # 2. Similarities, written after each embedder.
  readers = {"official": benchmark_rgb, "displayed": read_image}
  loaded = {kind: restore.load_embedder(kind, path, arguments.dtype) for kind, path in kinds.items()}
  out = arguments.out
  out.parent.mkdir(parents=True, exist_ok=True)
  similarities: dict[str, dict[Path, float | None]] = {}
  both: dict[str, dict] = {name: {} for name in readers}
  for kind, model in loaded.items():
    similarities[kind], failed = unified_bench.similarities(kind, pairs, model.embed, readers[arguments.pixels])
    problems += [problem for problem in failed.values() if problem not in problems]
    for name, read in readers.items() if causes else ():
      both[name][kind], _ = unified_bench.similarities(f"{kind}, {name} pixels", subset, model.embed, read)
    scores = unified_bench.Scores(pairs, similarities)
    result = unified_bench.official_result(scores)
    write_whole(out, json_text(result, indent=2) + "\n")
    unified_bench.write_table(out.with_suffix(".csv"), scores)
  notes = bench_notes.ambiguous(pairs) + bench_notes.both_readings(causes, both["official"], both["displayed"])

  # 3. Page and summary.
  ranked = list(scores.ranked().items())
  count = min(arguments.pairs, len(ranked))

  def scored(chosen: Iterable[tuple[Path, float]]) -> list[ScoredPair]:
    # `ranked` has only pairs that are whole and have all similarities.
    return [
      ScoredPair(
        reference,
        image,
        {kind: value for kind, values in similarities.items() if (value := values[image]) is not None},
        mean,
      )
      for image, mean in chosen
      if (reference := pairs[image]) is not None
    ]

  groups = {"Best pairs": scored(ranked[:count]), "Worst pairs": scored(ranked[::-1][:count])}
  averages = scores.averages | {"unified": result["summary"].get("overall_average")}
  write_page(out.with_suffix(".html"), averages, groups, [*problems, *notes], readers[arguments.pixels])
  for kind, average in averages.items():
    more = f"   {len(ranked)} of {len(pairs)} images" if kind == "unified" else ""
    print(f"{kind:10} {'-' if average is None else f'{100 * average:.2f}'}{more}")
  command_line.say(out)
  return report(problems, notes)


def judge(arguments) -> int:
  """Runs protocol 2; writes results.json with win rates after each judge."""
  from uae_jax.evaluation import caption_judge, unified_bench

  files = unified_bench.image_files(arguments.references, suffixes=IMAGE_SUFFIXES)
  images = {file.name: file for file in files}
  ours, theirs = (caption_judge.read_captions(file) for file in (arguments.captions, arguments.against))
  judges = [
    caption_judge.Judge(arguments.judge_url, model, key_variable=arguments.key_variable, cache=arguments.cache)
    for model in arguments.judge_model
  ]
  outcomes = {}
  out = arguments.out
  out.parent.mkdir(parents=True, exist_ok=True)
  for one in judges:
    outcomes[one.model] = caption_judge.compare(one, images, ours, theirs, workers=arguments.workers)
    result = caption_judge.result(outcomes)
    write_whole(out, json_text(result, indent=2) + "\n")
  for name, rate in (*result["judges"].items(), ("overall", result["overall"])):
    if rate:
      print(f"{name}: wins {100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]")
  command_line.say(out)
  failed = {key: why for _, (_, failures) in outcomes.items() for key, why in failures.items()}
  counts = Counter(file.name for file in files)
  notes = [f"{name}: {n} images of this name; the last one was judged" for name, n in counts.items() if n > 1]
  alone = len(set(ours) | set(theirs)) - len(set(ours) & set(theirs) & set(images))
  notes += [f"{alone} captions were not judged: they have no image, or no caption of the other system"] if alone else []
  return report([f"{key}: {why}" for key, why in failed.items()], notes)


def report(problems: list[str], notes: list[str]) -> int:
  """Prints problems and notes on stderr; returns the exit code."""
  for note in notes:
    print(f"note: {shown(note)}", file=sys.stderr)
  for problem in problems:
    print(f"uae-jax bench: error: {shown(problem)}", file=sys.stderr)
  return 1 if problems else 0
