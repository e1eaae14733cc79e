"""`uae-jax reconstruct`: image -> caption -> image, and a page that shows both images."""

import json
from pathlib import Path
import sys

from uae_jax import files
from uae_jax.commands import command_line, image_files, model_arguments


def parser() -> command_line.Parser:
  parser = command_line.Parser("reconstruct", "Captions images and regenerates them from the captions.")
  model_arguments.add_model_arguments(parser)
  model_arguments.add_image_argument(parser)
  model_arguments.add_caption_arguments(parser)
  model_arguments.add_generation_arguments(parser)
  parser.add_argument(
    "--out", required=True, metavar="DIR", help="output folder: captions.jsonl, recon_<stem>.png and index.html"
  )
  return parser


def unused_name(stem: str, used: set[str]) -> str:
  """`recon_<stem>.png`, numbered if two images share a stem."""
  name, number = f"recon_{stem}.png", 1
  while name in used:
    number += 1
    name = f"recon_{stem}_{number}.png"
  used.add(name)
  return name


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  paths = image_files.expand(arguments.images)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, "max_new_tokens", "temperature", "steps", "guidance", "height", "width")

  from uae_jax.report import reconstructions

  out = Path(arguments.out)
  pairs: list[reconstructions.Pair] = []
  used: set[str] = set()
  notice = f"Note: {model_arguments.SMALL_WORLD_NOTICE}." if uae.is_small_world else ""
  batches = image_files.ImageBatches("reconstruct", paths, arguments.batch_size)
  for batch_paths, originals in batches:
    out.mkdir(parents=True, exist_ok=True)
    captions, images = uae.reconstruct(originals, seed=arguments.seed + len(pairs), **options)
    with open(out / "captions.jsonl", "a" if pairs else "w", encoding="utf-8") as index:
      for path, original, caption, image in zip(batch_paths, originals, captions, images, strict=True):
        name = unused_name(path.stem, used)
        files.write_whole(out / name, files.image_bytes(image))
        record = {"image": str(path), "caption": caption, "reconstruction": name}
        print(json.dumps(record, ensure_ascii=False), file=index)
        pairs.append(reconstructions.Pair(str(path), original, caption, name, image.width))
  if pairs:
    print(reconstructions.write_page(out, pairs, [str(path) for path in batches.failed], notice))
  else:
    print("uae-jax reconstruct: error: none of the images could be read", file=sys.stderr)
  return 1 if batches.failed else 0
