"""`uae-jax caption`: one caption per image, as JSON lines."""

from contextlib import closing
from pathlib import Path

from uae_jax import outputs
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.items import Items, JsonLines
from uae_jax.data import image_files


def parser() -> command_line.Parser:
  parser = command_line.Parser("caption", "Captions images.")
  model_arguments.add_model_arguments(parser)
  model_arguments.add_image_arguments(parser)
  model_arguments.add_caption_arguments(parser)
  parser.add_argument(
    "--out",
    type=command_line.path,
    default=Path("captions.jsonl"),
    help="JSON lines, one object per image; - is stdout; default %(default)s",
  )
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  paths = image_files.expand(arguments.images)
  image_files.require_some(paths)
  outputs.require_file(arguments.out, "--out", outputs.JSON, paths)
  read = model_arguments.reader(arguments)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, *model_arguments.CAPTION_OPTIONS)

  def caption(indices, images):
    return uae.caption(images, seed=arguments.seed, indices=indices, **options)

  items = Items("caption")
  with closing(JsonLines(arguments.out)) as out:
    for _, path, _, text in items.results(
      paths, read, caption, batch_size=arguments.batch_size or model_arguments.WINDOW, unit="image"
    ):
      out.write({"image": str(path), "caption": text})
  if len(items.failed) < len(paths) and arguments.out != Path("-"):
    command_line.say(arguments.out)
  return 1 if items.failed else 0
