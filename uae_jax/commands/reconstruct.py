"""`uae-jax reconstruct`: image -> caption -> image, and a page that shows both images."""

from contextlib import closing

from uae_jax import files, outputs
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.items import Items, JsonLines
from uae_jax.data import image_files


def parser() -> command_line.Parser:
  parser = command_line.Parser("reconstruct", "Captions images and regenerates them from the captions.")
  model_arguments.add_model_arguments(parser)
  model_arguments.add_image_arguments(parser)
  model_arguments.add_caption_arguments(parser)
  model_arguments.add_generation_arguments(parser)
  parser.add_argument(
    "--out",
    required=True,
    type=command_line.path,
    metavar="DIR",
    help="output folder: captions.jsonl, recon_<stem>.png and index.html; recon_<file name>.png if stems are equal",
  )
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  paths = image_files.expand(arguments.images)
  names = image_files.result_names(paths)
  image_files.require_some(paths)
  outputs.require_folder(arguments.out, "--out")
  outputs.require_own(arguments.out, "--out", "captions.jsonl", [*names, "index.html"])
  read = model_arguments.reader(arguments)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, *model_arguments.CAPTION_OPTIONS, *model_arguments.GENERATION_OPTIONS)
  uae.latents_shape(arguments.height, arguments.width)  # refuses an impossible size once, not once per item

  from uae_jax.report import reconstructions

  def reconstruct(indices, images):
    return list(zip(*uae.reconstruct(images, seed=arguments.seed, indices=indices, **options), strict=True))

  out = arguments.out
  pairs: list[reconstructions.Pair] = []
  items = Items("reconstruct")
  with closing(JsonLines(out / "captions.jsonl")) as index_file:
    results = items.results(
      paths, read, reconstruct, batch_size=arguments.batch_size or model_arguments.WINDOW, unit="image"
    )
    for index, path, original, (caption, image) in results:
      with items.item(path):
        out.mkdir(parents=True, exist_ok=True)
        files.write_whole(out / names[index], files.image_bytes(image))
        index_file.write({"image": str(path), "caption": caption, "reconstruction": names[index]})
        pairs.append(reconstructions.Pair.of(path, original, caption, names[index], image))
  if pairs:
    notice = f"Note: {model_arguments.SMALL_WORLD_NOTICE}." if uae.is_small_world else ""
    command_line.say(reconstructions.write_page(out, pairs, items.failed, notice))
  return 1 if items.failed else 0
