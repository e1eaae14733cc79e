"""`uae-jax caption`: one caption per image, as JSON lines."""

import contextlib
import json
from pathlib import Path

from uae_jax.commands import command_line, image_files, model_arguments


def parser() -> command_line.Parser:
  parser = command_line.Parser("caption", "Captions images.")
  model_arguments.add_model_arguments(parser)
  model_arguments.add_image_argument(parser)
  model_arguments.add_caption_arguments(parser)
  parser.add_argument(
    "--out",
    default="captions.jsonl",
    help="JSON lines, one object per image; - is stdout; default %(default)s",
  )
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  paths = image_files.expand(arguments.images)
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, "max_new_tokens", "temperature")
  batches = image_files.ImageBatches("caption", paths, arguments.batch_size)
  done = 0
  with contextlib.ExitStack() as stack:
    out = None
    for batch_paths, images in batches:
      # Opened only once there is something to write, so that a run without captions keeps an earlier file.
      if out is None and arguments.out != "-":
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        out = stack.enter_context(open(arguments.out, "w", encoding="utf-8"))
      captions = uae.caption(images, seed=arguments.seed + done, **options)
      for path, caption in zip(batch_paths, captions, strict=True):
        print(json.dumps({"image": str(path), "caption": caption}, ensure_ascii=False), file=out, flush=True)
      done += len(images)
  if out is not None:
    print(arguments.out)
  return 1 if batches.failed else 0
