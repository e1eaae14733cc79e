"""`uae-jax caption`: one caption per image, as JSON lines."""

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

from uae_jax import outputs
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.items import Items, JsonLines
from uae_jax.data import image_files


def parser() -> command_line.Parser:
  parser = command_line.Parser("caption", "Captions images.", command_line.PROCESSES)
  model_arguments.add_model_arguments(parser)
  model_arguments.add_image_arguments(parser)
  model_arguments.add_caption_arguments(parser)
  parser.add_argument(
    "--out",
    type=command_line.output_path,
    default=Path("captions.jsonl"),
    help="JSON lines, one object per image; - is stdout; default %(default)s",
  )
  command_line.add_process_arguments(parser)
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  return command_line.in_processes(arguments, lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
  from uae_jax.commands.unfinished import Unfinished  # brings jax
  from uae_jax.training import processes

  paths = image_files.expand(arguments.images)
  image_files.require_some(paths)
  processes.on_first(lambda: outputs.require_file(arguments.out, "--out", outputs.JSON, paths))
  is_stream = outputs.is_stream(arguments.out)
  if is_stream and processes.gather(None)[1:]:
    raise ValueError(f"--out {arguments.out} is for one process: name a file that all of them can access")
  read = model_arguments.reader(arguments)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, *model_arguments.CAPTION_OPTIONS)

  def caption(indices, images):
    return uae.caption(images, seed=arguments.seed, indices=indices, **options)

  def record(index, text):
    return {"image": str(paths[index]), "caption": text}, []

  items = Items("caption")
  how: Any = {"batch_size": arguments.batch_size or model_arguments.WINDOW, "unit": "image"}
  if is_stream:
    with closing(JsonLines(arguments.out)) as out:
      for index, _, _, text in items.results(paths, read, caption, **how):
        out.write(record(index, text)[0])
    return 1 if items.failed else 0
  keys = [f"{index} {path}" for index, path in enumerate(paths)]
  unfinished = Unfinished(arguments.out, model_arguments.settings(arguments, uae), keys)
  if unfinished.run(items, paths, read, caption, record, **how):
    command_line.say(arguments.out)
  return 1 if items.failed else 0
