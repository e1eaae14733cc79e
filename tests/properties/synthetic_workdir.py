"""A small made-up finished run: the files that `uae-jax train` writes, with the metrics of a good run."""

import json
import math
from pathlib import Path
import random

from PIL import Image, ImageDraw

COLORS = {"red": "#d8342b", "green": "#2f9e44", "blue": "#2f6fdb", "yellow": "#f2c12e", "white": "#f5f5f5"}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
SHAPES = ("circle", "square", "triangle", "cross")
MOMENTS = ("cold_start", "generation_for_understanding", "understanding_for_generation")
SEEN = {"cold_start": 0.45, "generation_for_understanding": 0.95, "understanding_for_generation": 0.97}


def write_json(file: Path, content) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content))


def random_scene(rng: random.Random) -> list[tuple[str, str, str, str]]:
  places = rng.sample(PLACES, rng.randint(1, 4))
  return [
    (place, rng.choice(("large", "small")), rng.choice(list(COLORS)), rng.choice(SHAPES))
    for place in PLACES
    if place in places
  ]


def paint(scene) -> Image.Image:
  image = Image.new("RGB", (32, 32), "#15181d")
  draw = ImageDraw.Draw(image)
  for place, size, color, shape in scene:
    x, y = (16 if "right" in place else 0) + 8, (16 if "bottom" in place else 0) + 8
    r = 6 if size == "large" else 3
    if shape == "circle":
      draw.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[color])
    elif shape == "square":
      draw.rectangle((x - r, y - r, x + r, y + r), fill=COLORS[color])
    elif shape == "triangle":
      draw.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=COLORS[color])
    else:
      draw.rectangle((x - r, y - 1, x + r, y + 1), fill=COLORS[color])
      draw.rectangle((x - 1, y - r, x + 1, y + r), fill=COLORS[color])
  return image


def say(scene, share: float, rng: random.Random) -> dict:
  """A caption that contains a fraction of the truth with occasional errors, judged word by word."""
  said, words, missing = [], [["black", "right"], ["background", "right"], [";", "neutral"]], []
  for place, size, color, shape in scene:
    if rng.random() > share + 0.2:
      missing.append(f"{place} {size} {color} {shape}")
      continue
    kept_size, kept_color = rng.random() < share, rng.random() < share
    wrong = rng.random() > 0.93
    painted = rng.choice(list(COLORS)) if wrong or not kept_color else color
    said.append((place, size if kept_size else "small", painted, shape))
    words.append([place, "right"])
    words += [[size, "right"]] if kept_size else []
    words += [[painted, "right" if painted == color else "wrong"]] if kept_color else []
    words += [[shape, "right"], [";", "neutral"]]
    missing += [] if kept_size else [f"{place} {size}"]
    missing += [] if kept_color else [f"{place} {color}"]
  caption = " ".join(word for word, _ in words)
  return {"caption": caption, "words": words, "missing": missing, "painted": said}


def write_gallery(folder: Path, share: float, items: int) -> None:
  folder.mkdir(parents=True)
  listed = []
  for i in range(items):
    rng = random.Random(i)
    scene = random_scene(rng)
    told = say(scene, share, random.Random(1000 * i + round(100 * share)))
    paint(scene).save(folder / f"orig_{i}.png")
    paint(told.pop("painted")).save(folder / f"recon_{i}.png")
    truth = "black background ; " + " ".join(f"{' '.join(thing)} ;" for thing in scene)
    scores = {"reward": 0.3 + 0.68 * share, "held_out": 0.3 + 0.64 * share}
    listed.append(
      {
        "name": f"scene {8 * i}",
        "original": f"orig_{i}.png",
        "reconstruction": f"recon_{i}.png",
        "true_caption": truth,
        **told,
        **scores,
      }
    )
  write_json(folder / "gallery.json", {"items": listed})


def write_captions(folder: Path, steps: int) -> None:
  rng = random.Random(5)
  scene = random_scene(rng)
  folder.mkdir(parents=True, exist_ok=True)
  paint(scene).save(folder / "orig.png")
  entries = []
  for k in range(steps):
    share = 0.35 + 0.62 * (1 - math.exp(-3 * k / steps))
    told = say(scene, share, random.Random(k))
    told.pop("painted")
    entries.append({"step": 10 * k, "reward": 0.3 + 0.66 * share, **told})
  truth = "black background ; " + " ".join(f"{' '.join(thing)} ;" for thing in scene)
  write_json(folder / "captions.json", {"image": "orig.png", "true_caption": truth, "steps": entries})


def metric_lines() -> list[dict]:
  rng = random.Random(0)
  lines, clock = [], 0.0
  for stage, steps, per_step in (
    ("embedders", 350, 0.11),
    ("vae", 1000, 0.04),
    ("captioner", 1000, 0.11),
    ("pretrain", 1500, 0.12),
    ("cold_start", 60, 0.5),
  ):
    for step in range(10, steps + 1, 10):
      clock += 10 * per_step
      loss = 0.2 + 2 * math.exp(-4 * step / steps) + rng.gauss(0, 0.03)
      learning_rate = 3e-3 * (1 - step / steps)
      lines.append(
        {"stage": stage, "step": step, "round": 0, "seconds": clock, "loss": loss, "learning_rate": learning_rate}
      )
  for stage, steps in (("generation_for_understanding", 120), ("understanding_for_generation", 60)):
    tokens = stage == "generation_for_understanding"
    for step in range(1, steps + 1):
      clock += 1.25
      grown = 1 - math.exp(-4 * step / steps)
      reward = (0.45 + 0.5 * grown if tokens else 0.94 + 0.015 * grown) + rng.gauss(0, 0.012 if tokens else 0.004)
      line = {
        "stage": stage,
        "step": step,
        "round": 0,
        "seconds": clock,
        "reward": reward,
        "held_out_reward": reward - 0.02 + rng.gauss(0, 0.008),
        "reward_std_in_group": max(0.004, 0.2 * (1 - grown) + rng.gauss(0, 0.006)),
        "kl": 0.35 * grown + abs(rng.gauss(0, 0.02)),
        "clip_fraction": abs(rng.gauss(0.02, 0.01)),
        "clip_fraction_low": abs(rng.gauss(0.008, 0.004)),
        "clip_fraction_high": abs(rng.gauss(0.012, 0.006)),
        "log_prob_difference": 0.0,
        "zero_std_fraction": 0.1 * grown,
        "grad_norm": 0.6 + 0.8 * (1 - grown) + abs(rng.gauss(0, 0.1)),
        "loss": rng.gauss(0, 0.01),
        "ratio_mean": 1 + rng.gauss(0, 1e-3),
        "learning_rate": 5e-4,
        "seconds_rollout": 0.55,
        "seconds_reward": 0.12,
        "seconds_update": 0.43,
        "seconds_data": 0.02,
        "seconds_step": 1.15,
        "images_per_second_per_chip": 102 + rng.gauss(0, 0.1),
        "mfu": 0.412,
      }
      if tokens:
        line |= {
          "caption_length": 7.6 + 7.2 * grown + rng.gauss(0, 0.2),
          "caption_recall": min(1, 0.44 + 0.53 * grown + rng.gauss(0, 0.01)),
          "caption_precision": min(1, 0.89 + 0.08 * grown + rng.gauss(0, 0.01)),
          "entropy": 0.8 * (1 - grown) + 0.09,
          "truncated_fraction": 0.01,
          "distinct_captions": 7.9 - 4 * grown,
          "tokens_per_second_per_chip": 1530,
        }
      lines.append(line)
  return lines


def figures(recall, precision, length, reward, held_out, pairs, objects, psnr) -> dict:
  return {
    "caption_recall": recall,
    "caption_precision": precision,
    "caption_length": length,
    "true_caption_length": 14.95,
    "reward_similarity": reward,
    "held_out_similarity": held_out,
    "held_out_pairs_reward_similarity": pairs,
    "object_accuracy": objects,
    "psnr": psnr,
    "greedy_caption_recall": min(1, recall + 0.02),
  }


EVALUATIONS = {
  "embedders": {"retrieval_accuracy": 0.98},
  "vae": {"reconstruction_psnr": 29.7},
  "captioner": {
    "caption_recall": 0.43,
    "caption_precision": 0.889,
    "caption_length": 7.62,
    "true_caption_length": 14.95,
  },
  "pretrain": figures(0.430, 0.889, 7.62, 0.330, 0.327, 0.286, 0.035, 11.63),
  "cold_start": figures(0.430, 0.889, 7.62, 0.423, 0.429, 0.360, 0.107, 12.06),
  "generation_for_understanding": figures(0.961, 0.965, 14.89, 0.925, 0.919, 0.884, 0.377, 21.80),
  "understanding_for_generation": figures(0.961, 0.965, 14.89, 0.942, 0.931, 0.899, 0.407, 21.97),
}

CONFIG = {
  "seed": 0,
  "stages": list(EVALUATIONS),
  "rounds": 1,
  "data": {"source": "scenes", "image_px": 32, "max_objects": 4},
  "generation_for_understanding": {
    "total_steps": 120,
    "rollouts": 8,
    "learning_rate": 5e-4,
    "clip": {"low": 0.2, "high": 0.2},
  },
}


def write_workdir(workdir: Path, *, items: int = 3) -> Path:
  """Writes a finished run with every file that the report reads."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(workdir / "config.json", CONFIG)
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
  for stage, content in EVALUATIONS.items():
    write_json(workdir / "evaluation" / f"{stage}.json", content)
  for stage in MOMENTS:
    write_gallery(workdir / "samples" / stage, SEEN[stage], items)
  write_captions(workdir / "samples" / "generation_for_understanding", 24)
  return workdir
