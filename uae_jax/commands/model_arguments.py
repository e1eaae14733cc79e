"""Options shared by caption, generate and reconstruct, and loading of the model that they name."""

import argparse
from collections.abc import Callable
from pathlib import Path
import platform
import sys
from typing import Any

from uae_jax.commands.command_line import input_path, number
from uae_jax.files import cache_folder, image_bytes, write_whole
from uae_jax.options.sampling import LARGEST_SEED

positive = number(int, at_least=1)
CAPTION_OPTIONS = ("batch_size", "max_new_tokens", "temperature", "top_k", "top_p", "min_p")
GENERATION_OPTIONS = ("batch_size", "steps", "guidance", "guidance_interval", "height", "width")
# Arguments that say where things are and how they are made, not what is made.
NOT_SETTINGS = (
  "batch_size",
  "coordinator",
  "images",
  "model",
  "num_processes",
  "out",
  "process_id",
  "prompt",
  "prompts",
)
# Items after which results are written, unless --batch-size is given.
WINDOW = 8
MAX_PROGRAM_BYTES = 4 * 2**30  # of all commands; the programs that were used last stay
SMALL_WORLD_NOTICE = (
  "this is a small-world model: it knows only synthetic scenes of colored shapes, "
  "so it will see every other image as such a scene"
)


def add_model_arguments(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
  parser.add_argument(
    "--model",
    required=is_required,
    type=input_path,
    metavar="DIR",
    help="workdir or checkpoint of a run, or an official UAE folder",
  )
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="dtype of the parameters; default: as stored")
  parser.add_argument("--int8", action="store_true", help="store most weights as int8: half the memory of bfloat16")
  parser.add_argument(
    "--seed",
    type=number(int, at_least=0, at_most=LARGEST_SEED),
    default=0,
    help="the noise of an image depends on the seed and the image's position only; default 0",
  )
  parser.add_argument(
    "--batch-size",
    type=positive,
    help=f"images that the model works on together; default: {WINDOW}, fewer for generated images over 512 px",
  )


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--images", required=True, nargs="+", type=input_path, metavar="PATH", help="files, folders or globs"
  )
  parser.add_argument(
    "--pixels",
    choices=("displayed", "official"),
    default="displayed",
    help="displayed: upright by EXIF, transparency on white, 16 bits scaled; official: as in the official demo, "
    "without these except RGBA on white; default %(default)s",
  )


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--max-new-tokens", type=positive, help="maximum tokens per caption; default: the model's own")
  parser.add_argument(
    "--temperature", type=number(float, at_least=0), help="sampling temperature, 0 is greedy; default 0.7"
  )
  parser.add_argument(
    "--top-k",
    type=number(int, at_least=0),
    help="sample among the K most likely tokens, 0 disables it; default: the model's own",
  )
  parser.add_argument(
    "--top-p",
    type=number(float, more_than=0, at_most=1),
    help="sample among the most likely tokens whose probabilities sum to P, 1 disables it; default: the model's own",
  )
  parser.add_argument(
    "--min-p",
    type=number(float, at_least=0, at_most=1),
    help="sample among tokens with at least P times the highest probability, 0 disables it; default: the model's own",
  )


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--steps", type=positive, help="sampler steps; default: the model's own")
  parser.add_argument(
    "--guidance", type=number(float, at_least=0), help="guidance scale, 1 disables guidance; default: the model's own"
  )
  parser.add_argument(
    "--guidance-interval",
    nargs=2,
    type=number(float, at_least=0, at_most=1),
    metavar=("LOW", "HIGH"),
    help="guide only at noise levels over LOW and up to HIGH, half the work elsewhere; default: the model's own",
  )
  parser.add_argument("--height", type=positive, help="image height in pixels; default: the model's own")
  parser.add_argument("--width", type=positive, help="image width in pixels; default: the model's own")


def settings(arguments: argparse.Namespace, uae: Any) -> dict[str, Any]:
  """What the results of a command depend on besides the items themselves; JSON."""
  from uae_jax.plain import to_plain

  given = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS and value is not None}
  return {"weights": uae.fingerprint(), "inference": to_plain(uae.inference), **given}


def reader(arguments: argparse.Namespace) -> Callable[[Path], Any]:
  """The function that reads an image file as `--pixels` says."""
  from uae_jax.data.images import read_image
  from uae_jax.data.official_pixels import demo_rgb

  return demo_rgb if arguments.pixels == "official" else read_image


def write_image(index_file: Path, name: str, image: Any) -> None:
  """Writes an image beside the file of an earlier call that lists the images, which is then removed: it is outdated."""
  index_file.parent.mkdir(parents=True, exist_ok=True)
  index_file.unlink(missing_ok=True)
  write_whole(index_file.with_name(name), image_bytes(image))


def keep_programs() -> None:
  """Keeps compiled programs on disk for the next command, because compiling takes longer than running them.

  A compilation cache that JAX already has is left as it is. Without a writable folder, programs are not kept.
  """
  import jax

  if jax.config.values["jax_compilation_cache_dir"] is not None:
    return
  # Programs of a CPU use its own instructions, and several machines may share a home folder.
  folder = cache_folder() / "programs" / platform.node()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # A killed process leaves a program without the file of its last use, on which JAX's deletion then fails.
    for program in folder.glob("*-cache"):
      if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
        program.unlink(missing_ok=True)
  except OSError:
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", MAX_PROGRAM_BYTES)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def load(arguments: argparse.Namespace):
  """The model; says on stderr what a small-world model is."""
  from uae_jax.api import UAE  # brings jax

  keep_programs()
  uae = UAE.load(arguments.model, dtype=arguments.dtype or "auto", int8=arguments.int8)
  if uae.is_small_world:
    print(f"note: {SMALL_WORLD_NOTICE}", file=sys.stderr)
  return uae
