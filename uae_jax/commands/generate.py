"""`uae-jax generate`: one image per prompt."""

from contextlib import closing

from uae_jax import files, outputs
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.items import Items, JsonLines
from uae_jax.data.prompt_lines import Line, read_lines


def parser() -> command_line.Parser:
  parser = command_line.Parser("generate", "Generates images from prompts.")
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
    type=command_line.path,
    metavar="DIR",
    help="output folder: images.jsonl, and 00000.png, ... by position of the prompt",
  )
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  if arguments.prompts:
    lines = read_lines(arguments.prompts)
  else:
    lines = [Line(f"prompt {number}", text) for number, text in enumerate(arguments.prompt, 1)]
  names = [f"{index:05d}.png" for index in range(len(lines))]
  outputs.require_folder(arguments.out, "--out")
  outputs.require_own(arguments.out, "--out", "images.jsonl", names)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, *model_arguments.GENERATION_OPTIONS)
  uae.latents_shape(arguments.height, arguments.width)  # refuses an impossible size once, not once per item

  def generate(indices, prompts):
    return uae.generate(prompts, seed=arguments.seed, indices=indices, **options)

  items = Items("generate")
  with closing(JsonLines(arguments.out / "images.jsonl")) as out:
    results = items.results(
      lines, Line.prompt, generate, batch_size=arguments.batch_size or model_arguments.WINDOW, unit="image"
    )
    for index, line, prompt, image in results:
      with items.item(line):
        arguments.out.mkdir(parents=True, exist_ok=True)
        files.write_whole(arguments.out / names[index], files.image_bytes(image))
        out.write({"image": names[index], "prompt": prompt})
  if len(items.failed) < len(lines):
    command_line.say(arguments.out)
  return 1 if items.failed else 0
