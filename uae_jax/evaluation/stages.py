"""Held-out figures and samples after each stage of a run, and one image's captions while the captioner learns.

The scenes, keys and noises are the same after every stage, so all differences between stages are paired.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from uae_jax.data import scenes
from uae_jax.data.draws import Draws
from uae_jax.evaluation import captions as caption_scores
from uae_jax.evaluation.reconstruction import ReconstructionOptions, Reconstructor, paired_gain, texts
from uae_jax.networks import Networks

REWARD, HELD_OUT = "clip", "dinov2"
EDIT_STREAM = 3


class StageEvaluator:
  """Measures a UAE on held-out scenes and writes `evaluation/` and `samples/` of a workdir."""

  def __init__(self, config, networks: Networks, tokenizer, workdir: Path):
    section = config.evaluation
    self.workdir = Path(workdir)
    self.prompts, self.tokenizer = networks.prompts, tokenizer
    self.section = section
    fields = {name: section[name] for name in ReconstructionOptions.__dataclass_fields__ if name in section}
    self.reconstructor = Reconstructor(networks, ReconstructionOptions(**fields))
    world = scenes.variant(config.data.variant)
    indices = np.arange(section.num_images)
    self.scenes = {split: scenes.scenes(indices, split, world) for split in ("held_out", "held_out_pairs")}
    self.images = {split: scenes.render_batch(scene) for split, scene in self.scenes.items()}
    self.history: list[dict] = []

  def is_done(self, folder: str) -> bool:
    return self._figures_file(folder).exists()

  def evaluate(self, folder: str, stage: str, params: dict, before: dict) -> None:
    """Writes `evaluation/<folder>.json`: what can be measured once this stage is done.

    Args:
      folder: of the stage.
      stage: its name.
      params: after the stage.
      before: before it.
    """
    if stage in (REWARD, HELD_OUT):
      figures = self._encoder_figures(params, stage)
    elif stage == "autoencoder":
      figures = self._autoencoder_figures(params)
    elif stage == "captioner":
      figures = self._caption_figures(params)
    else:
      # Stage 3 leaves the captioner alone: its gain is measured image by image, from the same captions.
      figures = self._uae_figures(folder, params, before if stage == "understanding_for_generation" else None)
    self._write(self._figures_file(folder), figures)

  def _encoder_figures(self, params: dict, name: str) -> dict:
    """How far an encoder tells a held-out scene from an edit of it, and from another scene."""
    scene = self.scenes["held_out"]
    edited = scenes.render_batch(scenes.edit(scene, Draws(np.arange(self.section.num_images), EDIT_STREAM)))
    images = self.images["held_out"]
    original, changed = (self.reconstructor.embed(params, name, x) for x in (images, edited))
    other = np.roll(original, 1, axis=0)
    return {
      "edit_similarity": float(np.mean(np.sum(original * changed, axis=-1))),
      "other_similarity": float(np.mean(np.sum(original * other, axis=-1))),
    }

  def _autoencoder_figures(self, params: dict) -> dict:
    """The codec alone: the ceiling of every reconstruction."""
    painted, psnr = self.reconstructor.autoencode(params, self.images["held_out"])
    accuracy = scenes.detection_accuracy((painted + 1.0) * 127.5, self.scenes["held_out"])
    return {"psnr": float(np.mean(psnr)), **accuracy}

  def _caption_figures(self, params: dict) -> dict:
    figures = {}
    for prefix, temperature in (("", 1.0), ("greedy_", 0.0)):
      tokens = self.reconstructor.caption(params, self.images["held_out"], temperature=temperature)
      measured = caption_scores.aggregate(self._scores(tokens, self.scenes["held_out"]))
      figures |= {prefix + name: value for name, value in measured.items()}
    return figures

  def _uae_figures(self, folder: str, params: dict, before: dict | None) -> dict:
    figures = {}
    for prefix, split, temperature in (
      ("", "held_out", 1.0),
      ("greedy_", "held_out", 0.0),
      ("held_out_pairs_", "held_out_pairs", 1.0),
    ):
      tokens = self.reconstructor.caption(params, self.images[split], temperature=temperature)
      noises = 1 if prefix else self.section.num_noises
      measured, painted, details = self._measure(params, split, tokens, noises)
      figures |= {prefix + name: value for name, value in measured.items()}
      if not prefix:
        self._write_gallery(folder, tokens, painted, details)
        if before is not None:
          _, similarities = self.reconstructor.paint(before, self.images[split], tokens, num_noises=noises)
          figures["paired"] = {
            name: paired_gain(similarities[key], details[key])
            for name, key in (("reward_similarity", REWARD), ("held_out_similarity", HELD_OUT), ("psnr", "psnr"))
          }
    true_tokens = self._true_tokens("held_out", tokens.shape[1])
    measured, _, _ = self._measure(params, "held_out", true_tokens)
    figures |= {f"true_caption_{name}": measured[name] for name in ("reward_similarity", "psnr", "object_accuracy")}
    return figures

  def observe(self, folder: str, step: int, params: dict) -> dict:
    """Caption figures of one batch of held-out scenes, and the caption of the first one, while a stage runs."""
    count = min(self.section.batch_size, self.section.num_images)
    images, scene = self.images["held_out"][:count], self.scenes["held_out"][:count]
    tokens = self.reconstructor.caption(params, images, temperature=1.0)
    scored = self._scores(tokens, scene)
    best = int(np.argmax([score.num_true for score in scored]))
    rows = texts(tokens, self.prompts, self.tokenizer)
    self._remember(folder, step, scene[best], images[best], rows[best], scored[best])
    figures = caption_scores.aggregate(scored)
    return {name: figures[name] for name in ("caption_recall", "caption_precision", "caption_length")}

  def _scores(self, tokens: np.ndarray, scene) -> list[caption_scores.CaptionScore]:
    rows = texts(tokens, self.prompts, self.tokenizer)
    return [caption_scores.score(row, scene[i]) for i, row in enumerate(rows)]

  def _measure(self, params: dict, split: str, tokens: np.ndarray, num_noises: int = 1):
    """(figures, first reconstructions, per-image similarities) of captions of a split."""
    painted, similarities = self.reconstructor.paint(params, self.images[split], tokens, num_noises=num_noises)
    figures = caption_scores.aggregate(self._scores(tokens, self.scenes[split]))
    figures["reward_similarity"] = float(np.mean(similarities[REWARD]))
    figures["held_out_similarity"] = float(np.mean(similarities[HELD_OUT]))
    figures["psnr"] = float(np.mean(similarities["psnr"]))
    figures |= scenes.detection_accuracy((painted + 1.0) * 127.5, self.scenes[split])
    return figures, painted, similarities

  def _true_tokens(self, split: str, length: int) -> np.ndarray:
    """int32[N, L] of the full captions."""
    rows = np.full((self.section.num_images, length), self.prompts.pad, np.int32)
    for i, row in enumerate(rows):
      caption = scenes.full_caption(self.scenes[split][i])
      ids = [*self.tokenizer.encode(caption, add_special_tokens=False), self.prompts.end[0]][:length]
      row[: len(ids)] = ids
    return rows

  # --- Files ---------------------------------------------------------------------------------------------------------

  def _figures_file(self, folder: str) -> Path:
    return self.workdir / "evaluation" / f"{folder}.json"

  def _write(self, file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(file)

  def _write_gallery(self, folder: str, tokens: np.ndarray, painted: np.ndarray, similarities: dict) -> None:
    directory = self.workdir / "samples" / folder
    directory.mkdir(parents=True, exist_ok=True)
    count = self.section.gallery_images
    scored = self._scores(tokens[:count], self.scenes["held_out"][:count])
    rows = texts(tokens[:count], self.prompts, self.tokenizer)
    items = []
    for i, (row, score) in enumerate(zip(rows, scored, strict=True)):
      Image.fromarray(self.images["held_out"][i]).save(directory / f"orig_{i}.png")
      Image.fromarray(to_uint8(painted[i])).save(directory / f"recon_{i}.png")
      items.append(
        {
          "name": f"scene {i}",
          "original": f"orig_{i}.png",
          "reconstruction": f"recon_{i}.png",
          "caption": row,
          "true_caption": scenes.full_caption(self.scenes["held_out"][i]),
          "reward": float(similarities[REWARD][i]),
          "held_out": float(similarities[HELD_OUT][i]),
          "words": [list(word) for word in score.words],
          "missing": list(score.missing),
        }
      )
    self._write(directory / "gallery.json", {"items": items})

  def _remember(self, folder, step, scene, image, caption, score) -> None:
    directory = self.workdir / "samples" / folder
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "captions.json"
    steps = json.loads(file.read_text())["steps"] if file.exists() else []
    # A resumed run writes its steps again.
    steps = [entry for entry in steps if entry["step"] < step]
    steps.append(
      {
        "step": step,
        "caption": caption,
        "words": [list(word) for word in score.words],
        "missing": list(score.missing),
      }
    )
    Image.fromarray(image).save(directory / "orig.png")
    self._write(file, {"image": "orig.png", "true_caption": scenes.full_caption(scene), "steps": steps})


def to_uint8(image: np.ndarray) -> np.ndarray:
  """float[..., 3] in [-1, 1] -> uint8."""
  return np.round((np.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
