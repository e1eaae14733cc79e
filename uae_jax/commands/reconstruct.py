"""`uae-jax reconstruct`: image -> caption -> image, and a page that shows both images."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uae_jax import outputs
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.items import Items
from uae_jax.data import image_files


def parser() -> command_line.Parser:
  description = "Captions images and regenerates them from the captions."
  parser = command_line.Parser("reconstruct", description, command_line.PROCESSES)
  model_arguments.add_model_arguments(parser)
  model_arguments.add_image_arguments(parser)
  model_arguments.add_caption_arguments(parser)
  model_arguments.add_generation_arguments(parser)
  parser.add_argument(
    "--out",
    required=True,
    type=command_line.output_path,
    metavar="DIR",
    help="output folder: captions.jsonl, recon_<stem>.png and index.html; recon_<file name>.png if stems are equal",
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
  names = image_files.result_names(paths)
  image_files.require_some(paths)
  index_file = arguments.out / "captions.jsonl"

  def check() -> None:
    outputs.require_folder(arguments.out, "--out")
    outputs.require_own(arguments.out, "--out", index_file.name, [*names, "index.html"])

  processes.on_first(check)
  read = model_arguments.reader(arguments)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, *model_arguments.CAPTION_OPTIONS, *model_arguments.GENERATION_OPTIONS)
  uae.latents_shape(arguments.height, arguments.width)  # refuses an impossible size once, not once per item

  def reconstruct(indices, images):
    return list(zip(*uae.reconstruct(images, seed=arguments.seed, indices=indices, **options), strict=True))

  def keep(index, result):
    caption, image = result
    model_arguments.write_image(index_file, names[index], image)
    return {"image": str(paths[index]), "caption": caption, "reconstruction": names[index]}, [names[index]]

  items = Items("reconstruct")
  keys = [f"{index} {path}" for index, path in enumerate(paths)]
  unfinished = Unfinished(index_file, model_arguments.settings(arguments, uae), keys)
  batch_size = arguments.batch_size or model_arguments.WINDOW
  records = unfinished.run(items, paths, read, reconstruct, keep, batch_size=batch_size, unit="image")
  if records:
    write_page(arguments.out, paths, records, read, items.failed, uae.is_small_world)
  return 1 if items.failed else 0


def write_page(
  out: Path,
  paths: Sequence[Path],
  records: Mapping[int, Mapping[str, Any]],
  read: Callable[[Path], Any],
  failed: Sequence[str],
  is_small_world: bool,
) -> None:
  """Writes the page of all records, whose images may be those of earlier calls and other processes."""
  from uae_jax.data.images import open_image
  from uae_jax.report import reconstructions

  pairs = []
  for index, record in records.items():
    with open_image(out / record["reconstruction"]) as image:
      pairs.append(
        reconstructions.Pair.of(paths[index], read(paths[index]), record["caption"], record["reconstruction"], image)
      )
  notice = f"Note: {model_arguments.SMALL_WORLD_NOTICE}." if is_small_world else ""
  command_line.say(reconstructions.write_page(out, pairs, failed, notice))
