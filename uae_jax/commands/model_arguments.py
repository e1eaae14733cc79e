"""Options shared by caption, generate and reconstruct, and loading of the model that they name."""

import argparse
import sys

SMALL_WORLD_NOTICE = (
  "this is a small-world model: it knows only synthetic scenes of colored shapes, "
  "so it will see every other image as such a scene"
)


def add_model_arguments(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
  parser.add_argument(
    "--model", required=is_required, metavar="DIR", help="workdir or checkpoint of a run, or an official UAE folder"
  )
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the parameters; default: as stored")
  parser.add_argument("--int8", action="store_true", help="store most weights as int8: half the memory of bfloat16")
  parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same result; default %(default)s")
  parser.add_argument("--batch-size", type=positive, default=8, help="images per batch; default %(default)s")


def add_image_argument(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--images", required=True, nargs="+", metavar="PATH", help="files, folders or globs")


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--max-new-tokens", type=positive, help="maximum tokens per caption; default: the model's own")
  parser.add_argument("--temperature", type=float, help="sampling temperature, 0 is greedy; default: the model's own")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--steps", type=positive, help="sampler steps; default: the model's own")
  parser.add_argument("--guidance", type=float, help="guidance scale, 1 disables guidance; default: the model's own")
  parser.add_argument("--height", type=positive, help="image height in pixels; default: the model's own")
  parser.add_argument("--width", type=positive, help="image width in pixels; default: the model's own")


def positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} is not a positive number")
  return value


def load(arguments: argparse.Namespace):
  """The model; says on stderr what a small-world model is."""
  from uae_jax.api import UAE  # brings jax

  uae = UAE.load(arguments.model, dtype=arguments.dtype or "auto", int8=arguments.int8)
  if uae.is_small_world:
    print(f"note: {SMALL_WORLD_NOTICE}", file=sys.stderr)
  return uae
