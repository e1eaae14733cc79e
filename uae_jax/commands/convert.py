"""`uae-jax convert`: writes weights that `UAE.load` reads as Orbax, PEFT adapters or merged Hugging Face folders."""

from pathlib import Path
import sys

from uae_jax import files, outputs
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
    "--source",
    required=True,
    type=command_line.input_path,
    metavar="DIR",
    help="an official UAE folder, the workdir of a run, or an earlier export",
  )
  parser.add_argument(
    "--target",
    required=True,
    type=command_line.output_path,
    metavar="DIR",
    help="output folder, written atomically; absent or empty",
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
  commands = parser()
  arguments = commands.parse_args(argv)
  if arguments.to != "peft":
    commands.refuse_unused(arguments, ["adapters_only", "names"], "goes with --to peft")
  source, target = arguments.source, arguments.target.resolve()
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise ValueError(f"{target} exists and is not an empty folder: nothing is overwritten, choose another --target")
  outputs.require_folder(target, "--target")
  import jax

  # A conversion needs host memory, not accelerator memory.
  jax.config.update("jax_platforms", "cpu")
  convert(source, target, arguments.to, adapters_only=arguments.adapters_only, names=arguments.names)
  command_line.say(target)
  return 0


def convert(source: Path, target: Path, to: str, *, adapters_only: bool = False, names: str = "v5") -> None:
  """Reads `source` and writes `target` atomically: a failure leaves nothing behind.

  Args:
    source: anything that `UAE.load` reads.
    target: must be absent or an empty folder.
    to: one of `FORMATS`.
    adapters_only: omit the base weights; see `weights.export.write_uae`.
    names: naming scheme of modules, "v5" or "official"; see `weights.export.write_uae`.

  Raises:
    OSError: the target could not be written.
  """
  import jax

  from uae_jax import sharding
  from uae_jax.training import restore
  from uae_jax.weights import native, sources

  device = jax.local_devices(backend="cpu")[:1]
  loaded = restore.read(source, "auto", sharding.make_mesh(devices=device))
  if to == "huggingface" and loaded.inference.text_tower == "reference" and loaded.config.captioner_lora:
    print(
      "note: this model encodes captions with its adapters off; merged weights cannot, so images will differ "
      "(--to peft and --to orbax keep both)",
      file=sys.stderr,
    )
  try:
    with files.whole_folder(target) as folder:
      if to == "orbax":
        native.save(folder, loaded)
      else:
        write = sources.WRITERS[type(loaded.config)]
        write(folder, loaded, merged=to == "huggingface", adapters_only=adapters_only, names=names)
  except Exception as error:  # The exception for a full disk depends on the library that writes.
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise OSError(f"{target} could not be written, and nothing of it is left: {reason}") from error
