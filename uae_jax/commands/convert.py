"""`uae-jax convert`: writes weights that `UAE.load` reads as Orbax, PEFT adapters or merged Hugging Face folders."""

import os
from pathlib import Path
import shutil
import sys

from uae_jax.commands import command_line

FORMATS = ("orbax", "peft", "huggingface")


def parser() -> command_line.Parser:
  parser = command_line.Parser(
    "convert",
    "Writes weights in another format. Except for merged adapters, values are copied bit for bit.",
    "orbax: one checkpoint that restores onto any mesh. peft: LoRA adapters that PEFT loads, with their base "
    "weights. huggingface: adapters merged into folders that transformers and diffusers load.",
  )
  parser.add_argument(
    "--source", required=True, metavar="DIR", help="an official UAE folder, the workdir of a run, or an earlier export"
  )
  parser.add_argument(
    "--target", required=True, metavar="DIR", help="output folder, written atomically; absent or empty"
  )
  parser.add_argument("--to", required=True, choices=FORMATS)
  parser.add_argument(
    "--adapters-only", action="store_true", help="with --to peft: write adapters and connector without their base"
  )
  parser.add_argument(
    "--names",
    choices=("v5", "official"),
    default="v5",
    help="with --to peft: module names of transformers 4.52 and later (v5), or of 4.50 (official); default %(default)s",
  )
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  if arguments.adapters_only and arguments.to != "peft":
    parser().error("--adapters-only goes with --to peft")
  source, target = Path(arguments.source), Path(arguments.target)
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise ValueError(f"{target} exists and is not an empty folder: nothing is overwritten, choose another --target")
  import jax

  # A conversion needs host memory, not accelerator memory.
  jax.config.update("jax_platforms", "cpu")
  convert(source, target, arguments.to, adapters_only=arguments.adapters_only, names=arguments.names)
  print(target)
  return 0


def convert(source: Path, target: Path, to: str, *, adapters_only: bool = False, names: str = "v5") -> None:
  """Reads `source` and writes `target` atomically: a failure leaves nothing behind.

  Args:
    source: anything that `UAE.load` reads.
    target: must be absent or an empty folder.
    to: one of `FORMATS`.
    adapters_only: omit the base weights; see `weights.export.write_uae`.
    names: naming scheme of modules, "v5" or "official"; see `weights.export.write_uae`.
  """
  import jax

  from uae_jax import sharding
  from uae_jax.training import restore
  from uae_jax.weights import export, native

  device = jax.local_devices(backend="cpu")[:1]
  loaded = restore.read(source, "auto", sharding.make_mesh(devices=device))
  target = target.absolute()
  partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
  partial.mkdir(parents=True)
  try:
    if to == "orbax":
      native.save(partial, loaded)
    else:
      merged = to == "huggingface"
      if merged and loaded.inference.text_tower == "reference" and loaded.config.captioner_lora:
        print(
          "note: this model encodes captions with its adapters off; merged weights cannot, so images will differ "
          "(--to peft and --to orbax keep both)",
          file=sys.stderr,
        )
      export.write_uae(partial, loaded, merged=merged, adapters_only=adapters_only, names=names)
    # An empty folder is removed; anything else makes the rename fail.
    if target.exists():
      target.rmdir()
    partial.rename(target)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
