"""`uae-jax generate`: one image per prompt."""

from contextlib import closing
import dataclasses
import json
from pathlib import Path

from uae_jax import files
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.items import Items, JsonLines


def parser() -> command_line.Parser:
  parser = command_line.Parser("generate", "Generates images from prompts.")
  model_arguments.add_model_arguments(parser)
  prompts = parser.add_mutually_exclusive_group(required=True)
  prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
  prompts.add_argument(
    "--prompts",
    type=command_line.path,
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


JSON_SUFFIXES, TABLES = (".jsonl", ".json"), (".csv", ".tsv", ".parquet", ".xlsx")


@dataclasses.dataclass(frozen=True)
class Line:
  """A prompt as it was given, not yet read; its string names it in messages."""

  place: str
  text: str
  is_json: bool = False

  def __str__(self) -> str:
    return self.place

  def prompt(self) -> str:
    """The prompt.

    Raises:
      ValueError: the line has none.
    """
    prompt = _prompt_of(self.text) if self.is_json else self.text
    if files.SURROGATES.search(prompt):
      raise ValueError("the prompt has characters that are not Unicode text")
    return prompt


def _prompt_of(line: str) -> str:
  try:
    record = json.loads(line)
    prompt = record["prompt"] if "prompt" in record else record["caption"]
    if not isinstance(prompt, str):
      raise TypeError(type(prompt).__name__)
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError('expected a JSON object with the text "prompt" or "caption"') from error
  return prompt


def read_lines(file: Path) -> list[Line]:
  """Reads a text or JSON lines file; empty lines are skipped.

  Raises:
    ValueError: the file is a table, or has no prompt.
  """
  suffix = file.suffix.lower()
  if suffix in TABLES:
    raise ValueError(f"{file}: a table: write its prompts as text, one per line, or as JSON lines")
  numbered = enumerate(files.read_lines(file), 1)
  lines = [Line(f"{file}:{n}", text.strip(), suffix in JSON_SUFFIXES) for n, text in numbered if text.strip()]
  if not lines:
    raise ValueError(f"{file}: no prompt in this file")
  return lines


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)
  if arguments.prompts:
    lines = read_lines(arguments.prompts)
  else:
    lines = [Line(f"prompt {number}", text) for number, text in enumerate(arguments.prompt, 1)]
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
        name = f"{index:05d}.png"
        arguments.out.mkdir(parents=True, exist_ok=True)
        files.write_whole(arguments.out / name, files.image_bytes(image))
        out.write({"image": name, "prompt": prompt})
  if len(items.failed) < len(lines):
    command_line.say(arguments.out)
  return 1 if items.failed else 0
