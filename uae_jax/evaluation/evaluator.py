"""Held-out metrics and samples after each stage of a run, and metrics and captions of one image while it trains.

Images, keys and noise are the same after every stage, so all differences between stages are paired.
"""

from collections.abc import Callable
import copy
import json
from pathlib import Path
from typing import Any

from absl import logging
import jax
import numpy as np
from PIL import Image

from uae_jax import trees
from uae_jax.data.processing import Processor
from uae_jax.evaluation import held_out, stage_suites
from uae_jax.evaluation.held_out import PAIRS, PLAIN, HeldOut
from uae_jax.evaluation.reconstruction import Reconstructor, paired_gain
from uae_jax.evaluation.stage_suites import StageSuites
from uae_jax.files import write_whole
from uae_jax.networks import Networks
from uae_jax.options import Experiment


class StageEvaluator:
  """Evaluates a UAE on held-out images and writes `evaluation/` and `samples/` of a workdir.

  All processes of a run evaluate together; process 0 writes the files.

  The first of `config.evaluation.embedders` gives the metric `reward_similarity`, the second `held_out_similarity`, and
  each further one `<kind>_similarity`.

  Args:
    config: held-out data and options of evaluation.
    networks: graph definitions, prompts and embedders.
    processor: tokenizer and image processor of the captioner.
    workdir: folder of the run.
    find_stage: name of a stage -> its `training.stages.spec.StageSpec`, which defines the metrics of the stage.
    uae: the model of the run for `config.evaluation.suites`, an `api.UAE` with any parameters.
  """

  def __init__(
    self,
    config: Experiment,
    networks: Networks,
    processor: Processor,
    workdir: Path,
    find_stage: Callable[[str], Any],
    uae: Any,
  ):
    self._find = find_stage
    section = config.evaluation
    self.workdir = Path(workdir)
    self.processor = processor
    self.section = section
    self.reconstructor = Reconstructor(networks, section)
    self.splits = held_out.load(config.data, processor, section.num_images)
    self._suites = StageSuites(
      stage_suites.find(section.suites), uae, self.reconstructor, section.embedders, self.workdir
    )
    names = ["reward_similarity", "held_out_similarity", *(f"{kind}_similarity" for kind in section.embedders[2:])]
    self.similarities = dict(zip(names, section.embedders, strict=False)) | {"psnr": "psnr"}

  def is_done(self, folder: str) -> bool:
    """Whether the metrics of a stage exist, or evaluation is disabled by `num_images` = 0."""
    return not self.section.num_images or self._figures_file(folder).exists()

  def evaluate(self, folder: str, stage: str, params: dict, before: dict) -> None:
    """Writes `evaluation/<folder>.json`, the held-out metrics after a stage.

    Args:
      folder: name of the stage's folder, `<stage>` or `<stage>_round<k>`.
      stage: name of the stage.
      params: parameters after the stage.
      before: result of `training.stage.params_before`; empty if the metrics do not compare with them.
    """
    figures = self._find(stage).figures(self, folder, params, trees.replace(params, before) if before else None)
    self._write(self._figures_file(folder), figures)

  def evaluate_during(self, stage: str, step: int, params: dict) -> dict[str, float]:
    """Computes the held-out metrics of a stage while it trains, on fewer images; writes no file.

    Args:
      stage: name of the stage.
      step: number of updates done in it.
      params: averaged parameters.

    Returns:
      "evaluation_<metric>" -> value.
    """
    small = copy.copy(self)
    small.splits = {name: split.first(self.section.periodic.num_images) for name, split in self.splits.items()}
    figures = self._find(stage).figures(small, None, params, None)
    return {f"evaluation_{name}": value for name, value in figures.items()}

  def evaluate_suites(self, folder: str, step: int, params: dict) -> dict[str, float]:
    """Runs `config.evaluation.suites` and returns their metrics; see `stage_suites.StageSuites.evaluate`."""
    return self._suites.evaluate(folder, step, params)

  def embedder_figures(self, params: dict, name: str) -> dict:
    """Computes the embedder's mean similarity of held-out images to other images and, with ground truth, to edits."""
    split = self.splits[PLAIN]
    original = self.reconstructor.embed(params, name, split.images)
    others = {"other_similarity": np.roll(original, 1, axis=0)}
    if split.truth is not None:
      changed = self.reconstructor.embed(params, name, split.truth.edited_images())
      others = {"edit_similarity": changed, **others}
    return {key: float(np.mean(np.sum(original * other, axis=-1))) for key, other in others.items()}

  def vae_figures(self, params: dict) -> dict:
    """Computes the metrics of the VAE's own reconstructions, an upper bound for those of the UAE."""
    split = self.splits[PLAIN]
    reconstructions, psnr = self.reconstructor.autoencode(params, split.images)
    accuracy = {} if split.truth is None else split.truth.image_figures((reconstructions + 1.0) * 127.5)
    return {"psnr": float(np.mean(psnr)), **accuracy}

  def caption_figures(self, params: dict) -> dict:
    """Computes recall, precision and length of sampled and of greedy captions, and forced choices."""
    split = self.splits[PLAIN]
    figures: dict[str, float] = {}
    if split.truth is not None:
      tokens, _ = self.processor.caption_rows(split.captions, self.section.max_new_tokens)
      figures |= self.understanding_figures(params, split, tokens)
    for prefix, temperature in (("", 1.0), ("greedy_", 0.0)):
      tokens = self.reconstructor.caption(params, split.captioner_images, temperature=temperature)
      measured = split.figures(self._texts(tokens))
      figures |= {prefix + name: value for name, value in measured.items()}
    return figures

  def uae_figures(self, folder: str | None, params: dict, before: dict | None = None) -> dict:
    """Computes the metrics of captions and reconstructions, and writes the gallery of the stage.

    Args:
      folder: name of the stage's folder; None writes no gallery.
      params: parameters after the stage.
      before: all parameters from before the stage, to compute the paired gain from the same captions; None for no gain.
    """
    figures: dict[str, Any] = {}
    for prefix, name, temperature in (("", PLAIN, 1.0), ("greedy_", PLAIN, 0.0), ("held_out_pairs_", PAIRS, 1.0)):
      if name not in self.splits:
        continue
      split = self.splits[name]
      tokens = self.reconstructor.caption(params, split.captioner_images, temperature=temperature)
      noises = 1 if prefix else self.section.num_noises
      measured, reconstructions, details = self._measure(params, split, tokens, noises)
      figures |= {prefix + name: value for name, value in measured.items()}
      if not prefix:
        if folder is not None:
          self._write_gallery(folder, tokens, reconstructions, details)
        if before is not None:
          _, similarities = self._generate(before, split, tokens, noises)
          figures["paired"] = {
            name: paired_gain(similarities[key], details[key]) for name, key in self.similarities.items()
          }
    split = self.splits[PLAIN]
    if split.has_captions:
      tokens, _ = self.processor.caption_rows(split.captions, tokens.shape[1])
      measured, reconstructions, _ = self._measure(params, split, tokens)
      names = ("reward_similarity", "psnr", "object_accuracy")
      figures |= {f"true_caption_{name}": measured[name] for name in names if name in measured}
      if split.truth is not None:
        followed = split.truth.following((reconstructions + 1.0) * 127.5)
        figures |= {f"true_caption_{name}": value for name, value in followed.items()}
        figures |= self.understanding_figures(params, split, tokens)
    return figures

  def understanding_figures(self, params: dict, split: HeldOut, tokens: np.ndarray) -> dict:
    """Computes how often the true caption is more likely than one with a single change.

    Args:
      params: parameters of the UAE.
      split: held-out images with ground truth.
      tokens: int32[N, L], their true captions.
    """
    assert split.truth is not None
    choices = split.truth.forced_choices()
    changed = [self.processor.caption_rows(choice.captions, tokens.shape[1])[0] for choice in choices]
    log_probs = self.reconstructor.caption_log_probs(
      params, split.captioner_images, np.stack([tokens, *changed], axis=1)
    )
    return split.truth.choice_figures(choices, log_probs[:, :1] > log_probs[:, 1:])

  def observe(self, folder: str, step: int, params: dict) -> dict:
    """Computes caption metrics of one batch of held-out images during a stage, and records the caption of one image."""
    split = self.splits[PLAIN].first(min(self.section.batch_size, self.section.num_images))
    rows = self._texts(self.reconstructor.caption(params, split.captioner_images, temperature=1.0))
    self._remember(folder, step, split, rows)
    figures = split.figures(rows)
    return {
      name: figures[name] for name in ("caption_recall", "caption_precision", "caption_length") if name in figures
    }

  def _texts(self, tokens: np.ndarray) -> list[str]:
    return [self.processor.caption_text(row) for row in tokens]

  def _generate(self, params: dict, split: HeldOut, tokens: np.ndarray, num_noises: int) -> tuple[np.ndarray, dict]:
    return self.reconstructor.generate(
      params, split.images, tokens, captioner_images=split.captioner_images, num_noises=num_noises
    )

  def _measure(self, params: dict, split: HeldOut, tokens: np.ndarray, num_noises: int = 1):
    """Computes (metrics, reconstructions of the first noise, similarities per image) from captions of a split."""
    reconstructions, similarities = self._generate(params, split, tokens, num_noises)
    figures = split.figures(self._texts(tokens))
    for name, key in self.similarities.items():
      figures |= {name: float(np.mean(similarities[key])), **split.by_source(name, np.asarray(similarities[key]))}
    if split.truth is not None:
      figures |= split.truth.image_figures((reconstructions + 1.0) * 127.5)
    return figures, reconstructions, similarities

  # --- Files ---------------------------------------------------------------------------------------------------------

  def _figures_file(self, folder: str) -> Path:
    return self.workdir / "evaluation" / f"{folder}.json"

  def _write(self, file: Path, value) -> None:
    if jax.process_index() > 0:
      return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(value, indent=1) + "\n")

  def _write_gallery(self, folder: str, tokens: np.ndarray, reconstructions: np.ndarray, similarities: dict) -> None:
    if jax.process_index() > 0:
      return
    directory = self.workdir / "samples" / folder
    directory.mkdir(parents=True, exist_ok=True)
    split = self.splits[PLAIN].first(self.section.gallery_images)
    rows = self._texts(tokens[: len(split.images)])
    verdicts = self._verdicts(split, rows)
    items = []
    for i, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
      Image.fromarray(split.images[i]).save(directory / f"orig_{i}.png")
      Image.fromarray(to_uint8(reconstructions[i])).save(directory / f"recon_{i}.png")
      scores = {name: float(similarities[key][i]) for name, key in self.similarities.items()}
      items.append(
        {
          "name": f"image {i}",
          "original": f"orig_{i}.png",
          "reconstruction": f"recon_{i}.png",
          "caption": row,
          "true_caption": split.captions[i],
          "reward": scores["reward_similarity"],
          "held_out": scores.get("held_out_similarity"),
          **verdict,
        }
      )
    self._write(directory / "gallery.json", {"items": items})

  def _verdicts(self, split: HeldOut, rows: list[str]) -> list[dict]:
    """Returns the words of each caption with their verdicts, and what is missing; empty dicts without ground truth."""
    if split.truth is None:
      return [{} for _ in rows]
    return [
      {"words": [list(word) for word in score.words], "missing": list(score.missing)} for score in split.scores(rows)
    ]

  def _remember(self, folder: str, step: int, split: HeldOut, rows: list[str]) -> None:
    """Appends this step's caption of one image, the one with the richest ground truth, to `captions.json`."""
    if jax.process_index() > 0:
      return
    directory = self.workdir / "samples" / folder
    directory.mkdir(parents=True, exist_ok=True)
    scores = split.scores(rows)
    index = int(np.argmax([score.num_true for score in scores])) if scores else 0
    file = directory / "captions.json"
    # A resumed run repeats the steps after its checkpoint.
    steps = [entry for entry in remembered(file) if entry["step"] < step]
    steps.append({"step": step, "caption": rows[index], **self._verdicts(split, rows)[index]})
    Image.fromarray(split.images[index]).save(directory / "orig.png")
    self._write(file, {"image": "orig.png", "true_caption": split.captions[index], "steps": steps})


def remembered(file: Path) -> list[dict]:
  """Reads the steps of a `captions.json`; none if it does not exist or is damaged, which must not end a run."""
  try:
    return [entry for entry in json.loads(file.read_bytes())["steps"] if isinstance(entry["step"], int)]
  except FileNotFoundError:
    return []
  except (ValueError, KeyError, TypeError, RecursionError):
    logging.warning("%s is damaged: the captions of earlier steps are lost", file)
    return []


def to_uint8(image: np.ndarray) -> np.ndarray:
  """Converts float[..., 3] in [-1, 1] to uint8[..., 3]."""
  return np.round((np.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
