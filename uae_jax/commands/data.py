"""`uae-jax data`: looks at a source of images and captions, or converts it to ArrayRecord files."""

from pathlib import Path
import sys
from typing import Any

from uae_jax import outputs
from uae_jax.commands import command_line

FIELDS = ("image_field", "caption_field", "max_bad_fraction", "image_px", "buckets", "max_crop")
# Options of one action.
INSPECT = ("split", "samples", "processor", "caption_tokens", "image_px", "buckets", "max_crop", "page")
CONVERT = ("records_per_shard",)
ACTIONS = ("inspect", "convert")


def parser() -> command_line.Parser:
  parser = command_line.Parser(
    "data",
    "Looks at a source of images and captions, or converts it to ArrayRecord files with the bytes of its images.",
    "inspect prints a table, and exits with 1 if more records are unreadable than --max-bad-fraction allows. convert "
    "writes DIR/SPLIT-*.array_record, which arrayrecord:DIR/{split}-* reads; interrupted, the same command goes on.",
  )
  parser.add_argument("action", choices=ACTIONS)
  parser.add_argument(
    "source", metavar="SOURCE", help="as config.data.source, such as parquet:photos/{split}-*.parquet"
  )
  parser.add_argument("--data-dir", default="", metavar="DIR", help="folder that names are relative to")
  parser.add_argument("--image-field", metavar="NAME", help="field, column or feature of the image")
  parser.add_argument("--caption-field", metavar="NAME", help="field, column or feature of the captions")
  parser.add_argument(
    "--max-bad-fraction",
    type=command_line.number(float, at_least=0, at_most=1),
    metavar="FRACTION",
    help="largest fraction of unreadable records; default 0.01",
  )
  parser.add_argument("--threads", type=command_line.number(int, at_least=1), default=4, metavar="N")
  inspect = parser.add_argument_group("inspect")
  inspect.add_argument("--split", choices=("train", "held_out"), default="train")
  inspect.add_argument(
    "--samples",
    type=command_line.number(int, at_least=0),
    default=1000,
    metavar="N",
    help="records to read, evenly spaced; 0 for all; default %(default)s",
  )
  inspect.add_argument(
    "--processor", type=command_line.input_path, metavar="DIR", help="tokenizer, for lengths in tokens"
  )
  inspect.add_argument(
    "--caption-tokens", type=command_line.number(int, at_least=2), default=512, metavar="N", help="default %(default)s"
  )
  inspect.add_argument(
    "--image-px", type=command_line.number(int, at_least=1), metavar="N", help="side of square images; default 512"
  )
  inspect.add_argument(
    "--buckets",
    type=lambda text: tuple(text.split(",")),
    metavar="HxW,...",
    help="sizes of images as in config.data.buckets, such as 512x512,512x768,768x512",
  )
  inspect.add_argument(
    "--max-crop",
    type=command_line.number(float, at_least=0, at_most=1),
    metavar="FRACTION",
    help="largest fraction of a picture that a bucket may crop; default 0.5",
  )
  inspect.add_argument(
    "--page", type=command_line.output_path, metavar="FILE", help="write a page with sample images as well"
  )
  convert = parser.add_argument_group("convert")
  convert.add_argument(
    "--out", type=command_line.output_path, metavar="DIR", help="absent or empty; whole or absent afterwards"
  )
  convert.add_argument(
    "--records-per-shard", type=command_line.number(int, at_least=1), default=4096, metavar="N", help="default 4096"
  )
  return parser


def main(argv: list[str]) -> int:
  commands = parser()
  arguments = commands.parse_args(argv)
  if (arguments.action == "convert") != (arguments.out is not None):
    commands.error("--out goes with convert, which needs it")
  if arguments.action == "convert":
    commands.refuse_unused(arguments, INSPECT, "goes with inspect")
    outputs.require_folder(arguments.out, "--out")
  else:
    commands.refuse_unused(arguments, CONVERT, "goes with convert")
  if arguments.page is not None:
    outputs.require_file(arguments.page, "--page", outputs.PAGE)

  from uae_jax.options import DataOptions

  given: dict[str, Any] = command_line.given(arguments, *FIELDS)
  data = DataOptions(source=arguments.source, data_dir=arguments.data_dir, **given)
  return inspect(data, arguments) if arguments.action == "inspect" else convert(data, arguments)


def inspect(data, arguments) -> int:
  from uae_jax.data import processors
  from uae_jax.data.sources import open_source
  from uae_jax.data.statistics import bucket_rows, inspect, table
  from uae_jax.files import shown

  processor = None if arguments.processor is None else processors.read(arguments.processor)
  source = open_source(data, arguments.split)
  found = inspect(source, arguments.samples, processor, arguments.caption_tokens, arguments.threads)
  rows = [*table(source, found), *bucket_rows(found.sizes, data)]
  width = max(len(name) for name, _ in rows)
  for name, value in rows:
    print(f"{name:{width}}  {value}")
  for line in found.unreadable[:10]:
    print(f"unreadable: {line}")
  for key, first in found.duplicates[:10]:
    print(f"duplicate: {shown(key)} has the pixels of {shown(first)}")
  if arguments.page is not None:
    from uae_jax.report.data_page import write_page

    write_page(arguments.page, f"{data.source} ({arguments.split})", rows, found)
    command_line.say(arguments.page)
  num_read = len(found.unreadable) + len(found.captions)
  if len(found.unreadable) > data.max_bad_fraction * num_read:
    raise ValueError(
      f"{len(found.unreadable)} of {num_read} records are unreadable, more than max_bad_fraction = "
      f"{data.max_bad_fraction}: repair or remove them, or raise --max-bad-fraction"
    )
  return 0


def convert(data, arguments) -> int:
  from uae_jax.data.conversion import NUM_NAMED, convert

  done = convert(data, arguments.out, records_per_shard=arguments.records_per_shard, num_threads=arguments.threads)
  for line in done.bad[:NUM_NAMED]:
    print(f"left out: {line}", file=sys.stderr)
  counts = ", ".join(f"{count:,} records of split {split}" for split, count in done.counts.items())
  print(f"{counts}; {len(done.bad):,} left out")
  command_line.say(Path(arguments.out))
  return 0
