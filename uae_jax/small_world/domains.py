"""Small-world pictures that no stage trains on, a folder per kind of novelty, with their ground truth.

  python -m uae_jax.small_world.domains --out transfer --images 64
  uae-jax evaluate --suite transfer --prompts transfer --model runs/demo --embedders runs/demo --out out/transfer

| folder | what is new |
|---|---|
| `seen` | nothing: held-out scenes, to compare with |
| `pairs` | pairs of shape and color |
| `shapes`, `colors`, `sizes` | shapes, colors or sizes that have no word |
| `layouts` | objects between the cells |
| `counts` | no object, or one in every cell (and one in the middle of a grid of 2) |
| `reordered` | the prompt: the words of the full caption in another order, instead of the model's caption |
| `abstract` | the prompt: a sentence with words that the small world does not have |

`truth.jsonl` has a line per picture: its attributes that have a word. What has none, such as a new shape, is left out,
so that recall counts only what can be said, and a word for it is wrong.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uae_jax import files
from uae_jax.draws import Draws
from uae_jax.small_world import caption_scores, phrases, render, scenes
from uae_jax.small_world.scenes import IMAGE_PX, Scene, SceneConfig

TRUTH = "truth.jsonl"
NEW_SHAPES = ("diamond", "ring", "bar")
NEW_COLORS = tuple(render.MORE_COLOR_RGB)
NEW_SIZES = {"tiny": 0.25, "medium": 0.65, "huge": 1.0}
SIZES = dict(zip(scenes.SIZES, SceneConfig().size_shares, strict=True)) | NEW_SIZES
# The other variants have captions without fixed phrases.
VARIANTS = tuple(name for name, config in scenes.VARIANTS.items() if not config.is_paraphrased)
BACKGROUNDS = dict(zip(scenes.BACKGROUNDS, render.BACKGROUND_RGB, strict=True))
DOMAINS = ("seen", "pairs", "shapes", "colors", "sizes", "layouts", "counts", "reordered", "abstract")
_STREAM, _SUPERSAMPLING = 4, 8


@dataclasses.dataclass(frozen=True)
class Thing:
  """One object: its words, which need not be words of the small world, and its center (y, x) in pixels."""

  place: str
  size: str
  color: str
  shape: str
  center: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A background and objects; `prompt` replaces the model's caption if it is not empty."""

  background: str
  things: Sequence[Thing]
  prompt: str = ""


def paint(picture: Picture, config: SceneConfig) -> np.ndarray:
  """Renders a picture as uint8[32, 32, 3]; known scenes are those of `render.render`."""
  grid = (np.arange(IMAGE_PX * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
  image = np.broadcast_to(BACKGROUNDS[picture.background], (IMAGE_PX, IMAGE_PX, 3)).astype(np.float32)
  for thing in picture.things:
    y, x = grid[:, None] - thing.center[0], grid[None, :] - thing.center[1]
    inside = render.covers(thing.shape, y, x, SIZES[thing.size] * (config.cell_px / 2 - config.shift_px))
    alpha = inside.reshape(IMAGE_PX, _SUPERSAMPLING, IMAGE_PX, _SUPERSAMPLING).mean((1, 3))[..., None]
    image = image + alpha * (render.RGB[thing.color] - image)
  return np.round(image).astype(np.uint8)


def of_scene(scene: Scene) -> Picture:
  """The picture of one scene; shifts within cells are left out."""
  half, found = scene.config.cell_px / 2, phrases.attributes(scene)
  corners = dict(zip(scene.config.places, render.corners(scene.config), strict=True))
  things = []
  for item in found["objects"]:
    y, x = corners[item["place"]]
    things.append(Thing(item["place"], item["size"], item["color"], item["shape"], (y + half, x + half)))
  return Picture(found["background"], things)


def change(picture: Picture, domain: str, config: SceneConfig, draws: Draws) -> Picture:
  """Makes the picture of a held-out scene new in the way of a domain."""
  things = list(picture.things)
  if domain in ("shapes", "colors", "sizes"):
    words = {"shapes": NEW_SHAPES, "colors": NEW_COLORS, "sizes": tuple(NEW_SIZES)}[domain]
    which = draws.integers(len(words), len(things))
    changed = [dataclasses.replace(thing, **{domain[:-1]: words[i]}) for thing, i in zip(things, which, strict=True)]
    return dataclasses.replace(picture, things=changed)
  if domain == "layouts":
    shifts = (2 * draws.integers(2, len(things), 2) - 1) * config.cell_px / 4
    centers = [
      tuple(np.clip(thing.center + shift, config.cell_px / 4, IMAGE_PX - config.cell_px / 4).tolist())
      for thing, shift in zip(things, shifts, strict=True)
    ]
    moved = [dataclasses.replace(thing, center=center) for thing, center in zip(things, centers, strict=True)]
    return dataclasses.replace(picture, things=moved)
  if domain == "counts":
    return dataclasses.replace(picture, things=_crowd(picture, config, draws) if draws.integers(2) else [])
  if domain == "reordered":
    said = [f"{thing.shape} {thing.color} {thing.size} {thing.place} ;" for thing in reversed(things)]
    return dataclasses.replace(picture, prompt=" ".join([*said, f"background {picture.background} ;"]))
  if domain == "abstract":
    said = [f"a {thing.size} {thing.color} {thing.shape} at the {thing.place}" for thing in things]
    return dataclasses.replace(picture, prompt=f"a {picture.background} background with {' and '.join(said)}")
  return picture


def _crowd(picture: Picture, config: SceneConfig, draws: Draws) -> list[Thing]:
  """An object in every cell; in a grid of 2, which training fills as well, a small one in the middle too."""
  centers = [(y + config.cell_px / 2, x + config.cell_px / 2) for y, x in render.corners(config)]
  cells = list(zip(config.places, centers, strict=True))
  cells += [("center", (IMAGE_PX / 2,) * 2)] if config.grid == 2 else []
  drawn = [draws.integers(len(words), len(cells)) for words in (scenes.COLORS, scenes.SHAPES)]
  return [
    Thing(place, "small", scenes.COLORS[color], scenes.SHAPES[shape], center)
    for (place, center), color, shape in zip(cells, *drawn, strict=True)
  ]


def make(domain: str, count: int, config: SceneConfig) -> list[Picture]:
  """Makes the first `count` pictures of a domain; they are always the same."""
  split = "held_out_pairs" if domain == "pairs" else "held_out"
  held_out = scenes.scenes(np.arange(count), split, dataclasses.replace(config, shift_px=0))
  return [change(of_scene(held_out[i]), domain, config, Draws(i, _STREAM, DOMAINS.index(domain))) for i in range(count)]


def truth(picture: Picture) -> dict[str, Any]:
  """The attributes of a picture that have a word, and the prompt if there is one."""
  things = [
    {name: word for name in ("place", "size", "color", "shape") if (word := getattr(thing, name)) in phrases.WORDS}
    for thing in picture.things
  ]
  return {"background": picture.background, "objects": things} | ({"prompt": picture.prompt} if picture.prompt else {})


def write(folder: Path, count: int, variant: str = "plain") -> None:
  """Writes `count` pictures of each domain, and `truth.jsonl`."""
  config, lines = scenes.variant(variant), []
  for domain in DOMAINS:
    (folder / domain).mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(make(domain, count, config)):
      name = f"{domain}/{number:04}.png"
      files.write_whole(folder / name, files.image_bytes(Image.fromarray(paint(picture, config))))
      lines.append(json.dumps({"image": name, "variant": variant, **truth(picture)}))
  files.write_whole(folder / TRUTH, "\n".join([*lines, ""]))


# --- Scores -----------------------------------------------------------------------------------------------------------


def figures(row: Mapping[str, Any], caption: str, reconstruction: np.ndarray) -> dict[str, float]:
  """Scores a caption and a reconstruction against a line of `truth.jsonl`.

  Args:
    row: the line.
    caption: any text.
    reconstruction: uint8[32, 32, 3].

  Returns:
    `caption recall` and `caption precision`; and `attributes right`, the fraction of background and attributes that the
    reconstruction shows, where an object in a cell that should be empty counts as a wrong attribute.
  """
  said = [list(thing.values()) for thing in row["objects"]]
  length = 3 + sum(1 + len(words) for words in said)
  score = caption_scores.score_words(caption, said, row["background"], length)
  config = dataclasses.replace(scenes.variant(row["variant"]), shift_px=0)
  objects, background = render.detect(reconstruction[None], config)
  seen = phrases.attributes(Scene.from_array(np.concatenate([background[:, None], objects], -1), config)[0])
  shown = {thing["place"]: thing for thing in seen["objects"]}
  right, total = float(seen["background"] == row["background"]), 1
  for thing in row["objects"]:
    if thing["place"] in config.places:
      found = shown.pop(thing["place"], {})
      wanted = {name: word for name, word in thing.items() if name != "place"}
      right += sum(found.get(name) == word for name, word in wanted.items())
      total += len(wanted)
  return {
    "caption recall": score.recall,
    "caption precision": score.precision,
    "attributes right": right / (total + len(shown)),
  }


def read_truth(folder: Path) -> dict[str, dict[str, Any]]:
  """Reads the ground truth of a folder: path below it -> line; empty if there is none.

  Raises:
    ValueError: a line is not understood; the message names it.
  """
  file = folder / TRUTH
  found: dict[str, dict[str, Any]] = {}
  for number, line in enumerate(files.read_lines(file) if file.exists() else (), 1):
    try:
      row = json.loads(line)
      scenes.variant(row["variant"])
      found[row["image"]] = row | {"objects": [dict(thing) for thing in row["objects"] if thing["place"]]}
      if row["background"] not in BACKGROUNDS:
        raise ValueError(f"background {row['background']!r}")
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{file}, line {number}: not ground truth of the small world ({error})") from error
  return found


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m uae_jax.small_world.domains",
    description="Writes small-world pictures that no stage trains on, a folder per kind of novelty.",
  )
  parser.add_argument("--out", required=True, type=Path, help="output folder")
  parser.add_argument("--images", type=int, default=64, help="pictures per folder; default %(default)s")
  parser.add_argument("--variant", default="plain", choices=VARIANTS, help="variant of the small world")
  arguments = parser.parse_args(argv)
  if arguments.images < 1:
    parser.error("--images: expected 1 or more")
  write(arguments.out, arguments.images, arguments.variant)
  print(arguments.out)
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
