"""The half of the Python API that reads images: captions, answers, and log-probabilities."""

from collections.abc import Sequence
import math

import jax.numpy as jnp
import numpy as np

from uae_jax.api.arguments import keys_of, or_default
from uae_jax.api.batches import batches_of
from uae_jax.api.loaded import NOT_FINITE, Images, Loaded
from uae_jax.data.texts import checked_texts
from uae_jax.models.prompts import Prompts, Questions
from uae_jax.options import CaptionOptions
from uae_jax.plain import from_plain
from uae_jax.rollouts import captions as caption_rollouts
from uae_jax.rollouts import reconstruct

KEPT_NAMES = ("top_k", "top_p", "min_p")
# Questions are padded to a multiple of this many tokens, so that few programs serve all of them.
QUESTION_BUCKET = 32


class Understanding(Loaded):
  """Captions of images, answers about them, and how likely given ones are."""

  def caption(
    self,
    images: Images,
    max_new_tokens: int | None = None,
    temperature: float = 0.7,
    seed: int = 0,
    repetition_penalty: float | None = None,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 8,
  ) -> list[str]:
    """Samples one caption per image.

    Args:
      images: PIL images or paths, of any mode and size.
      max_new_tokens: maximum number of tokens per caption; by default that of the weights (official: 512).
      temperature: divides the logits; 0 takes the most likely token.
      seed: random seed, 0 to 2^32 - 1; the key of an image depends only on the seed and the image's index.
      repetition_penalty: divides positive and multiplies negative logits of tokens that question or caption already
        contain; 1 disables it. By default that of the weights, from their `generation_config.json`.
      top_k: sample among the k most likely tokens; 0 disables it. By default that of the weights; where their
        `generation_config.json` has none, 50 as in transformers.
      top_p: sample among the most likely tokens whose probabilities sum to p; 1 disables it. By default that of the
        weights.
      min_p: sample among tokens with at least min_p times the probability of the most likely one; 0 disables it. By
        default that of the weights.
      indices: index of each image in a larger job, for the same results in any batches; by default 0, 1, ...
      batch_size: maximum number of images per batch. Images of one patch grid share batches, which are padded to a
        power of two; the caption of an image does not depend on its batch, up to rounding.

    Raises:
      ValueError: an image cannot be read, an option is out of range, or the model's numbers are not finite.
    """
    return self._sample_text(
      list(self._prepare(images)),
      None,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      seed=seed,
      repetition_penalty=repetition_penalty,
      kept={"top_k": top_k, "top_p": top_p, "min_p": min_p},
      indices=indices,
      batch_size=batch_size,
    )

  def answer(
    self,
    images: Images,
    questions: Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    repetition_penalty: float | None = None,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 8,
  ) -> list[str]:
    """Answers one question per image, through the chat template of the model: image, then question.

    The image has the size that it has for captions. A chat template with a question of its own, as that of the small
    world, ignores the text of the question.

    Args:
      images: N PIL images or paths, of any mode and size.
      questions: N questions, plain text.
      max_new_tokens: maximum number of tokens per answer; by default that of the weights.
      temperature: divides the logits; 0, the default, takes the most likely token.
      seed: as in `caption`.
      repetition_penalty: as in `caption`.
      top_k: as in `caption`.
      top_p: as in `caption`.
      min_p: as in `caption`.
      indices: as in `caption`.
      batch_size: maximum number of images per batch. Images of one patch grid with questions of similar length share
        batches; an answer does not depend on its batch, up to rounding.

    Raises:
      ValueError: the numbers of images and questions differ, an image cannot be read, an option is out of range, or the
        model's numbers are not finite.
    """
    prepared = list(self._prepare(images))
    return self._sample_text(
      prepared,
      self._question_rows(prepared, questions),
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      seed=seed,
      repetition_penalty=repetition_penalty,
      kept={"top_k": top_k, "top_p": top_p, "min_p": min_p},
      indices=indices,
      batch_size=batch_size,
    )

  def choice_log_probs(
    self, images: Images, questions: Sequence[str], choices: Sequence[Sequence[str]], *, batch_size: int = 8
  ) -> list[np.ndarray]:
    """Computes how likely each of several given answers to a question is, over the whole vocabulary.

    Args:
      images: N PIL images or paths.
      questions: N questions, see `answer`.
      choices: N lists of possible answers, such as ("A", "B") or ("yes", "no").
      batch_size: maximum number of images per batch; image and question are computed once for all their choices.

    Returns:
      One float32[choices] per image: for each choice the sum of the log-probabilities of its tokens, without a closing
      token.

    Raises:
      ValueError: the numbers of images, questions and lists differ, or a choice has no token.
    """
    prepared = list(self._prepare(images))
    asked = self._question_rows(prepared, questions)
    if len(choices) != len(prepared):
      raise ValueError(f"{len(prepared)} images, but {len(choices)} lists of choices")
    encoded = [
      [self.processor.encode(choice) for choice in checked_texts(f"choices[{position}]", row)]
      for position, row in enumerate(choices)
    ]
    for texts, ids in zip(choices, encoded, strict=True):
      if not ids or not all(ids):
        raise ValueError(f"choices {list(texts)!r}: expected at least one, each with a token")
    longest = [max(map(len, row)) for row in encoded]
    groups = [
      (image[0].shape, len(own), len(row), length)
      for image, own, row, length in zip(prepared, asked, encoded, longest, strict=True)
    ]
    results = [np.zeros(0, np.float32)] * len(prepared)
    for rows in batches_of(groups, batch_size):
      padded = [self.processor.pad_rows(encoded[row], longest[row]) for row in rows]
      tokens, mask = (np.stack(part) for part in zip(*padded, strict=True))  # [B, choices, longest]
      pixels = np.stack([prepared[row][0] for row in rows])
      run = self._program(("choices", pixels.shape, *groups[rows[0]]), self._choices_batch(prepared[rows[0]][1]))
      log_probs = np.asarray(run(self.params, pixels, self._questions([asked[row] for row in rows]), tokens))
      if not np.all(np.isfinite(log_probs)):
        raise ValueError(f"the probabilities of an answer's tokens are not finite numbers: {NOT_FINITE}")
      for row, sums in zip(rows, np.sum(log_probs * mask, axis=-1), strict=True):
        results[row] = sums
    return results

  def _choices_batch(self, prompts: Prompts):
    return lambda params, images, questions, tokens: caption_rollouts.caption_log_probs(
      self._model(params), prompts, images, tokens, has_whole_vocabulary=True, questions=questions
    )[0]

  def _question_rows(self, prepared: Sequence, questions: Sequence[str]) -> list[np.ndarray]:
    """Token ids int32[P] of image and question per image, padded with -1 to a multiple of `QUESTION_BUCKET`."""
    questions = checked_texts("questions", questions)
    if len(questions) != len(prepared):
      raise ValueError(f"{len(prepared)} images, but {len(questions)} questions")
    rows = []
    for (pixels, _), question in zip(prepared, questions, strict=True):
      ids = self.processor.question_prompt(self._grid(pixels), question)
      padding = -len(ids) % QUESTION_BUCKET
      rows.append(np.pad(np.asarray(ids, np.int32), (0, padding), constant_values=-1))
    return rows

  def _questions(self, rows: Sequence[np.ndarray]) -> Questions:
    tokens = np.stack(rows)
    return Questions(jnp.asarray(np.where(tokens < 0, self.processor.pad_id, tokens)), jnp.asarray(tokens >= 0))

  def _sample_text(
    self,
    prepared: Sequence[tuple[np.ndarray, Prompts]],
    asked: Sequence[np.ndarray] | None,
    *,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    repetition_penalty: float | None,
    kept: dict[str, float | None],
    indices: Sequence[int] | None,
    batch_size: int,
  ) -> list[str]:
    """Samples captions, or answers to the questions `asked` of `_question_rows`."""
    max_new_tokens = or_default(max_new_tokens, self.inference.max_new_tokens)
    penalty = from_plain(float, or_default(repetition_penalty, self.inference.repetition_penalty), "repetition_penalty")
    checked = CaptionOptions(
      max_new_tokens=max_new_tokens,
      **{name: or_default(value, getattr(self.inference, name)) for name, value in kept.items()},
    )
    temperature = CaptionOptions(temperature=or_default(temperature, 0.7)).temperature
    # Without noise the most likely token is taken, which is always kept.
    kept = {name: getattr(checked, name) for name in KEPT_NAMES} if temperature else {}
    if not (math.isfinite(penalty) and penalty > 0):
      raise ValueError(f"repetition_penalty = {penalty}: expected a finite number, more than 0")
    keys = keys_of(seed, indices, len(prepared))
    lengths = [0] * len(prepared) if asked is None else [len(row) for row in asked]
    results = [""] * len(prepared)
    groups = [(image[0].shape, length) for image, length in zip(prepared, lengths, strict=True)]
    for rows in batches_of(groups, batch_size):
      pixels = np.stack([prepared[row][0] for row in rows])
      questions = None if asked is None else self._questions([asked[row] for row in rows])
      run = self._program(
        ("caption", pixels.shape, lengths[rows[0]], max_new_tokens, penalty, *kept.items()),
        self._caption_batch(prepared[rows[0]][1], max_new_tokens, penalty, kept),
      )
      sampled = run(self.params, pixels, keys[np.asarray(rows)], jnp.float32(temperature), questions)
      if not np.all(np.isfinite(sampled.log_probs)):
        raise ValueError(f"the probabilities of a caption's tokens are not finite numbers: {NOT_FINITE}")
      for row, tokens in zip(rows, np.asarray(sampled.tokens[:, 0]), strict=True):
        results[row] = self.processor.caption_text(tokens)
    return results

  def _caption_batch(self, prompts: Prompts, max_new_tokens: int, repetition_penalty: float, kept: dict):
    def run(params, images, keys, temperature, questions):
      return reconstruct.caption(
        self._model(params),
        prompts,
        images,
        keys,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        questions=questions,
        **kept,
      )

    return run

  def log_probs(self, images: Images, captions: list[str]) -> list[np.ndarray]:
    """Computes the log-probabilities of the tokens of given captions, over the whole vocabulary.

    Args:
      images: N PIL images or paths.
      captions: N captions, without the closing token.

    Returns:
      One float32[tokens] per image; the last entry is that of the closing `<|im_end|>`.

    Raises:
      ValueError: the numbers of captions and images differ.
    """
    prepared, captions = list(self._prepare(images)), checked_texts("captions", captions)
    if len(prepared) != len(captions):
      raise ValueError(f"{len(prepared)} images, but {len(captions)} captions")
    results = []
    for (pixels, prompts), caption in zip(prepared, captions, strict=True):
      ids = [*self.processor.encode(caption), prompts.end[0]]
      run = self._program(("log_probs", pixels.shape, len(ids)), self._log_probs_one(prompts))
      results.append(np.asarray(run(self.params, pixels[None], np.asarray(ids, np.int32)[None, None]))[0, 0])
    return results

  def _log_probs_one(self, prompts: Prompts):
    return lambda params, images, tokens: caption_rollouts.caption_log_probs(
      self._model(params), prompts, images, tokens, has_whole_vocabulary=True
    )[0]
