"""Items that are pictures: a folder, or JSON lines that name them; and what several suites do with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from uae_jax import files
from uae_jax.data.image_files import result_names
from uae_jax.data.images import read_image
from uae_jax.evaluation import unified_bench
from uae_jax.evaluation.suites.spec import Prompt, SuiteError, field, json_lines
from uae_jax.evaluation.suites.task import Run

RECONSTRUCTIONS = "reconstructions"


def read_folder(folder: Path) -> list[Prompt]:
  """Lists the pictures of a folder and its subfolders.

  Items have the path below the folder as key and the first subfolder as category; `record` has the `image`, and the
  name under which `uae-jax bench` finds its `reconstruction`.

  Raises:
    SuiteError: there is no such folder, or no picture in it.
  """
  if not folder.is_dir():
    raise SuiteError(f"{folder}: expected a folder of pictures")
  paths = unified_bench.image_files(folder, suffixes=files.IMAGE_SUFFIXES)
  items = []
  for index, (path, name) in enumerate(zip(paths, result_names(paths), strict=True)):
    below = path.relative_to(folder)
    category = below.parts[0] if len(below.parts) > 1 else ""
    items.append(Prompt(below.as_posix(), index, "", category, {"image": path, "reconstruction": name}))
  return items


def read(path: Path) -> list[Prompt]:
  """As `read_folder`, or reads JSON lines with `image`, a path from the file's folder, and maybe `references`.

  Raises:
    SuiteError: there is no picture, a line is not understood, or two lines have one image.
  """
  if path.is_dir():
    return read_folder(path)
  items: dict[str, Prompt] = {}
  for place, record in json_lines(path):
    name = field(place, record, "image", str)
    references = field(place, record, "references", list) if "references" in record else []
    if not all(isinstance(text, str) for text in references):
      raise SuiteError(f"{place}: references: expected a list of texts")
    if name in items:
      raise SuiteError(f"{place}: a second line of image {name!r}")
    items[name] = Prompt(name, len(items), "", "", {"image": path.parent / name, "references": references})
  if not items:
    raise SuiteError(f"{path}: no picture in it")
  return list(items.values())


def load(prompts: Sequence[Prompt]) -> list[Image.Image]:
  """The pictures of items, as displayed."""
  return [read_image(prompt.record["image"]) for prompt in prompts]


def reconstruct(
  run: Run, prompts: Sequence[Prompt]
) -> tuple[list[Image.Image], list[Image.Image], list[dict[str, Any]]]:
  """Captions and regenerates pictures, and writes the reconstructions into a folder of that name.

  An item whose `record` has a `prompt` is generated from it instead of the model's caption.

  Returns:
    (pictures, reconstructions, rows with `caption`, `reconstruction`, the path below the output folder, and `files`).
  """
  pictures, indices = load(prompts), [prompt.index for prompt in prompts]
  captions = run.uae.caption(pictures, seed=run.seed, indices=indices, **run.captions)
  captions = [prompt.record.get("prompt", caption) for prompt, caption in zip(prompts, captions, strict=True)]
  images = run.uae.generate(captions, seed=run.seed, indices=indices, **run.images)
  rows = []
  for prompt, caption, image in zip(prompts, captions, images, strict=True):
    file = run.out / RECONSTRUCTIONS / Path(prompt.key).parent / prompt.record["reconstruction"]
    write(file, image)
    name = file.relative_to(run.out).as_posix()
    rows.append({"caption": caption, "reconstruction": name, "files": [name]})
  return pictures, images, rows


def write(file: Path, image: Image.Image) -> None:
  """Writes a PNG whole, with its folder."""
  file.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(file, files.image_bytes(image))


def write_captions(run: Run, prompts: Sequence[Prompt], rows: Any) -> Path:
  """Writes `captions.jsonl` in the format of `uae-jax caption`, in the order of the items."""
  file = run.out / "captions.jsonl"
  lines = [
    files.json_text({"image": str(prompt.record["image"]), "caption": rows[prompt.key]["caption"]})
    for prompt in prompts
    if prompt.key in rows
  ]
  files.write_whole(file, "\n".join([*lines, ""]))
  return file
