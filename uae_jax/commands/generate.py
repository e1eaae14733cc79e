"""`uae-jax generate`: one image per prompt."""

import json
from pathlib import Path
import sys

from uae_jax import files
from uae_jax.commands import command_line, model_arguments


def parser() -> command_line.Parser:
  parser = command_line.Parser("generate", "Generates images from prompts.")
  model_arguments.add_model_arguments(parser)
  prompts = parser.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
  prompts.add_argument(
    "--prompts",
    metavar="FILE",
    help='text file with one prompt per line, or .jsonl file with a field "prompt" or "caption"',
  )
  model_arguments.add_generation_arguments(parser)
  parser.add_argument("--out", required=True, metavar="DIR", help="output folder: 00000.png, ... and images.jsonl")
  return parser


def read_prompts(file: Path) -> list[str]:
  """Reads the prompts of a text or JSON lines file; empty lines are skipped.

  Raises:
    ValueError: the file has no prompt, or a line (named in the message) has none.
  """
  prompts = []
  for number, line in enumerate(files.read_lines(file), 1):
    if not line.strip():
      continue
    if file.suffix != ".jsonl":
      prompts.append(line.strip())
      continue
    try:
      record = json.loads(line)
      prompt = record["prompt"] if "prompt" in record else record["caption"]
      if not isinstance(prompt, str):
        raise TypeError(type(prompt).__name__)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(f'{file}:{number}: expected a JSON object with the text "prompt" or "caption"') from error
    prompts.append(prompt)
  if not prompts:
    raise ValueError(f"{file}: no prompt in this file")
  return prompts


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  prompts = arguments.prompt or read_prompts(Path(arguments.prompts))
  uae = model_arguments.load(arguments)
  options = command_line.given(arguments, "steps", "guidance", "height", "width")

  from tqdm import tqdm

  out = Path(arguments.out)
  out.mkdir(parents=True, exist_ok=True)
  with (
    open(out / "images.jsonl", "w", encoding="utf-8") as index,
    tqdm(total=len(prompts), desc="generate", unit="image", file=sys.stderr) as bar,
  ):
    for start in range(0, len(prompts), arguments.batch_size):
      batch = prompts[start : start + arguments.batch_size]
      # Each batch gets its own seed: with a shared seed, two batches would start from the same noise.
      for offset, image in enumerate(uae.generate(batch, seed=arguments.seed + start, **options)):
        name = f"{start + offset:05d}.png"
        files.write_whole(out / name, files.image_bytes(image))
        print(json.dumps({"image": name, "prompt": batch[offset]}, ensure_ascii=False), file=index, flush=True)
      bar.update(len(batch))
  print(out)
  return 0
