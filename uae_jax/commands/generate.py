"""`uae-jax generate`: one image per prompt."""

import argparse

from uae_jax import outputs
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.items import Items
from uae_jax.data.prompt_lines import Line, read_lines


def parser() -> command_line.Parser:
  parser = command_line.Parser("generate", "Generates images from prompts.", command_line.PROCESSES)
  model_arguments.add_model_arguments(parser)
  prompts = parser.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
  prompts.add_argument(
    "--prompts",
    type=command_line.input_path,
    metavar="FILE",
    help='text file with one prompt per line, or .jsonl file with a field "prompt" or "caption"',
  )
  model_arguments.add_generation_arguments(parser)
  parser.add_argument(
    "--out",
    required=True,
    type=command_line.output_path,
    metavar="DIR",
    help="output folder: images.jsonl, and 00000.png, ... by position of the prompt",
  )
  command_line.add_process_arguments(parser)
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  return command_line.in_processes(arguments, lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
  from uae_jax.commands.unfinished import Unfinished  # brings jax
  from uae_jax.training import processes

  if arguments.prompts:
    lines = read_lines(arguments.prompts)
  else:
    lines = [Line(f"prompt {number}", text) for number, text in enumerate(arguments.prompt, 1)]
  names = [f"{index:05d}.png" for index in range(len(lines))]
  index_file = arguments.out / "images.jsonl"

  def check() -> None:
    outputs.require_folder(arguments.out, "--out")
    outputs.require_own(arguments.out, "--out", index_file.name, names)

  processes.on_first(check)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, *model_arguments.GENERATION_OPTIONS)
  uae.latents_shape(arguments.height, arguments.width)  # refuses an impossible size once, not once per item

  def generate(indices, prompts):
    images = uae.generate(prompts, seed=arguments.seed, indices=indices, **options)
    return list(zip(prompts, images, strict=True))

  def keep(index, result):
    prompt, image = result
    model_arguments.write_image(index_file, names[index], image)
    return {"image": names[index], "prompt": prompt}, [names[index]]

  items = Items("generate")
  keys = [f"{index} {line.text}" for index, line in enumerate(lines)]
  unfinished = Unfinished(index_file, model_arguments.settings(arguments, uae), keys)
  batch_size = arguments.batch_size or model_arguments.WINDOW
  if unfinished.run(items, lines, Line.prompt, generate, keep, batch_size=batch_size, unit="image"):
    command_line.say(arguments.out)
  return 1 if items.failed else 0
