"""The public Python API: a class around a trained UAE, loaded from the official weights, a run, or an export."""

from collections.abc import Iterable, Sequence
import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from PIL import Image

from uae_jax import sharding
from uae_jax.api_arguments import checked_whole, keys_of, noise_of, or_default
from uae_jax.api_batches import batches_of, fitting
from uae_jax.data.texts import checked_texts
from uae_jax.files import input_path, local_path
from uae_jax.layers.quantized import quantize
from uae_jax.models.prompts import Prompts, Questions
from uae_jax.models.uae import UAE as Model
from uae_jax.networks import merge_uae
from uae_jax.options import CaptionOptions, GenerationOptions
from uae_jax.options.sampling import EVERYWHERE
from uae_jax.plain import from_plain
from uae_jax.rollouts import captions as caption_rollouts
from uae_jax.rollouts import reconstruct
from uae_jax.rollouts.conditioning import Context
from uae_jax.training import restore
from uae_jax.weights import checksums
from uae_jax.weights.checkpoint import LoadedUAE

Images = Iterable[Image.Image | str | os.PathLike]
KEPT_NAMES = ("top_k", "top_p", "min_p")
# Prompts are padded to a multiple of this if the decoder does not attend to padding.
MASKED_BUCKET = 16
# Questions are padded to a multiple of this many tokens, so that few programs serve all of them.
QUESTION_BUCKET = 32
NOT_FINITE = "another dtype may help, or the weights are damaged"


class UAE:
  """A trained UAE: captions images, generates images from text, and reconstructs images through their captions.

  Attributes:
    params: nested dict of arrays.
    processor: tokenizer and image processor.
    inference: `InferenceSettings`, the defaults of all methods.
  """

  def __init__(self, loaded: LoadedUAE, mesh: jax.sharding.Mesh | None = None):
    self.params = loaded.params
    self.processor = loaded.processor
    self.inference = loaded.inference
    self._graphdef = loaded.graphdef
    self._config = loaded.config
    # Results are whole on every device, and thus in every process.
    self._whole = NamedSharding(mesh, PartitionSpec()) if mesh is not None and mesh.size > 1 else None
    # Jitted functions by a key of method, input shapes and static arguments.
    self._programs: dict = {}
    self._prompts_of_grid: dict[tuple[int, int], Prompts] = {}

  @property
  def is_small_world(self) -> bool:
    """Whether the weights were trained on the procedural scenes only."""
    return self.inference.is_small_world

  @classmethod
  def load(
    cls,
    path: str | os.PathLike,
    dtype: str = "bfloat16",
    mesh: jax.sharding.Mesh | None = None,
    *,
    int8: bool = False,
  ) -> "UAE":
    """Loads a UAE from the official folder layout, the workdir of a run, or an export of `uae-jax convert`.

    Args:
      path: folder with `llm_model/`, `dit/`, ...; or a workdir with `config.json` and `checkpoints/`, or
        `checkpoints/<stage>` in it; or an export.
      dtype: dtype of the parameters: "bfloat16", "float32", or "auto" for that of the files.
      mesh: mesh over which the parameters are sharded; the first device of this process by default.
      int8: store the matrices of captioner and decoder as int8; see `layers.quantized`.

    Raises:
      FileNotFoundError: the folder does not exist or has none of these layouts.
      ValueError: the dtype is unknown, or the source is damaged.
      weights.table.WeightError: tensors are missing, unexpected or have a wrong shape.
    """
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    loaded = restore.read(input_path(path), dtype, mesh)
    if int8:
      loaded = dataclasses.replace(loaded, params=quantize(loaded.params))
    return cls(loaded, mesh)

  def fingerprint(self) -> str:
    """Returns 16 hexadecimal digits of the weights' bits: the same weights in the same dtype have the same."""
    return checksums.fingerprint(self.params)

  # --- Understanding -----------------------------------------------------------------------------------------------

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

  # --- Generation --------------------------------------------------------------------------------------------------

  def encode_text(self, prompts: list[str], length: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Encodes prompts in the generation template as conditioning of the decoder.

    Args:
      prompts: B texts; they are right-padded to a common length T.
      length: T; by default the length of the longest prompt.

    Returns:
      (context float[B, T, C], mask bool[B, T], True at the slots that are not padding). The official decoder attends to
      the padding too.

    Raises:
      ValueError: there is no prompt, one is no text, or one has more than `length` tokens.
    """
    rows = [self.processor.generation_prompt(prompt) for prompt in checked_texts("prompts", prompts)]
    if not rows:
      raise ValueError("prompts = []: expected at least one text")
    return self._encode_rows(rows, length)

  def _encode_rows(self, rows: Sequence[Sequence[int]], length: int | None) -> tuple[jax.Array, jax.Array]:
    tokens, mask = self.processor.pad_rows(rows, length)
    run = self._program(("encode_text", tokens.shape), self._encode_text)
    return run(self.params, tokens, mask), jnp.asarray(mask)

  def _encode_text(self, params, tokens, mask):
    return self._model(params, adapters=self.inference.text_tower == "policy").encode_text(tokens, mask)

  def velocity(self, latents, timesteps, context, pooled=None, context_mask=None) -> jax.Array:
    """Evaluates the decoder with its adapters.

    Args:
      latents: float[B, h, w, 16], scaled.
      timesteps: float[B] in 0..1000; 1000 is pure noise.
      context: float[B, T, C], conditioning.
      pooled: float[B, P]; by default the stored embedding of the empty prompt.
      context_mask: bool[B, T]; used if the model's config sets `mask_context`. None attends to all slots.

    Returns:
      float32[B, h, w, 16].
    """
    self._require_latents("velocity")
    run = self._program(("velocity", pooled is None, context_mask is None), self._velocity)
    return run(self.params, latents, timesteps, context, pooled, context_mask)

  def _velocity(self, params, latents, timesteps, context, pooled, context_mask):
    return self._model(params).velocity(latents, timesteps / 1000.0, context, context_mask, pooled=pooled)

  def encode_image(self, images) -> jax.Array:
    """Encodes images float[B, H, W, 3] in [-1, 1] as the posterior's mode, scaled latents float32[B, h, w, 16]."""
    self._require_latents("encode_image")
    run = self._program("encode_image", lambda params, x: self._model(params).encode_image(x))
    return run(self.params, jnp.asarray(images))

  def decode_latents(self, latents) -> jax.Array:
    """Decodes scaled latents float[B, h, w, 16] to float32[B, H, W, 3], nominally in [-1, 1], not clipped."""
    self._require_latents("decode_latents")
    run = self._program("decode_latents", lambda params, z: self._model(params).decode_latents(z))
    return run(self.params, jnp.asarray(latents))

  def _require_latents(self, method: str) -> None:
    if self._config.generates_by_captioner:
      raise ValueError(f"{method}: images of this model are tokens, it has no latents")

  def latents_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """Shape (h, w, C) of the latents of an image.

    Args:
      height: height in pixels; by default that of the weights.
      width: width in pixels; same default.

    Raises:
      ValueError: the decoder's patches or position table do not allow the size.
    """
    height = checked_whole("height", or_default(height, self.inference.resolution_px), -math.inf, math.inf)
    width = checked_whole("width", or_default(width, self.inference.resolution_px), -math.inf, math.inf)
    return self._config.latents_shape(height, width)

  def generate(
    self,
    prompts: list[str],
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    latents=None,
    output: str = "pil",
    *,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    guidance_interval: Sequence[float] | None = None,
  ):
    """Generates one image per prompt.

    Args:
      prompts: B texts.
      steps: number of Euler steps; by default that of the weights (official: 40).
      guidance: scale of classifier-free guidance, 1 disables it; by default that of the weights (official: 5).
      height: height of the images in pixels; by default that of the weights (official: 1024).
      width: width of the images in pixels; same default.
      seed: random seed, 0 to 2^32 - 1; the initial noise of an image depends only on the seed and the image's index.
      latents: initial noise float[B, h, w, 16]; None draws it from the seed.
      output: "pil", or "array" for float32[B, H, W, 3] in 0..1.
      indices: index of each image in a larger job, for the same results in any batches; by default 0, 1, ...
      batch_size: maximum number of images per batch; by default 2 at 1024 px, 8 at 512 px. Prompts of one length share
        batches, which are padded to a power of two; an image does not depend on its batch, up to rounding.
      guidance_interval: noise levels (low, high] with guidance, half the work outside of it; by default that of the
        weights (all levels).

    Raises:
      ValueError: the decoder's patches or position table do not allow the size, the output is unknown, an option is out
        of range, the latents have another shape, or the model's numbers are not finite.
    """
    prompts = checked_texts("prompts", prompts)
    if output not in ("pil", "array"):
      raise ValueError(f"output = {output!r}: expected 'pil' or 'array'")
    for name, field, value in (("steps", "sampler_steps", steps), ("guidance_interval",) * 2 + (guidance_interval,)):
      if value is not None and field in self._config.inert_options:
        raise ValueError(f"{name} = {value}: this model generates images token by token, remove it")
    steps, guidance = or_default(steps, self.inference.steps), or_default(guidance, self.inference.guidance)
    if guidance_interval is None:
      guidance_interval = EVERYWHERE if guidance == 1.0 else self.inference.guidance_interval
    interval: Any = tuple(or_default(limit, 0.0) for limit in guidance_interval)
    options = GenerationOptions(sampler_steps=steps, guidance=guidance, guidance_interval=interval)
    shape = self.latents_shape(height, width)
    if latents is None:
      noise = noise_of(keys_of(seed, indices, len(prompts)), shape)
    else:
      noise = np.asarray(latents, np.float32)
      expected = (len(prompts), *(shape if height or width else (*np.shape(latents)[1:3], shape[-1])))
      if np.shape(latents) != expected:
        raise ValueError(f"latents have the shape {list(np.shape(latents))}, expected {list(expected)}")
      pixels_per_cell = or_default(height, self.inference.resolution_px) // shape[0]
      self._config.latents_shape(*(pixels_per_cell * side for side in expected[1:3]))
    negative = [] if guidance == 1.0 else [self.processor.negative_row()]
    texts = [self.processor.generation_prompt(prompt) for prompt in prompts]
    lengths = self._context_lengths(texts, negative)
    generated = [np.zeros(0)] * len(prompts)
    for rows in batches_of(lengths, or_default(batch_size, fitting(shape))):
      context, mask = self._encode_rows([*negative, *(texts[row] for row in rows)], lengths[rows[0]])
      batch = noise[np.asarray(rows)]
      run = self._program(("generate", batch.shape, context.shape, options), self._generate_batch(options))
      images = np.asarray(run(self.params, batch, context, mask))
      if not np.all(np.isfinite(images)):
        raise ValueError(f"a generated image has pixels that are not finite numbers: {NOT_FINITE}")
      for row, image in zip(rows, images, strict=True):
        generated[row] = image
    clipped = [np.clip(image / 2 + 0.5, 0.0, 1.0) for image in generated]
    if output == "array":
      size = (height or self.inference.resolution_px, width or self.inference.resolution_px)
      return np.stack(clipped) if clipped else np.zeros((0, *size, 3), np.float32)
    return [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in clipped]

  def _context_lengths(self, texts: Sequence[Sequence[int]], negative: Sequence[Sequence[int]]) -> list[int]:
    """Number of tokens to which each templated prompt is padded.

    As in the official pipeline, that is the longer one of prompt and negative prompt: the official decoder attends to
    the padding. A decoder that masks it needs fewer programs with multiples of `MASKED_BUCKET`.
    """
    least, *_ = *map(len, negative), 0
    bucket = MASKED_BUCKET if self._config.masks_padding else 1
    lengths = [max(least, len(text)) for text in texts]
    return [math.ceil(length / bucket) * bucket for length in lengths]

  def _generate_batch(self, options: GenerationOptions):
    # As `rollouts.reconstruct.generator`.
    adapters = not self._config.generates_by_captioner or self.inference.text_tower == "policy"

    def run(params, noise, context, mask):
      model, count = self._model(params, adapters=adapters), len(noise)
      negative = None if options.guidance == 1.0 else Context(context[:1], mask[:1])
      own = Context(context[-count:], mask[-count:])
      return reconstruct.generate(
        model,
        own,
        negative,
        noise,
        guidance=options.guidance,
        guidance_interval=options.guidance_interval,
        sampler_steps=options.sampler_steps,
        shift=self.inference.shift,
      )

    return run

  def reconstruct(self, images: Images, **options) -> tuple[list[str], list]:
    """Captions images and generates images from the captions.

    Args:
      images: PIL images or paths, of any mode and size.
      **options: arguments of `caption` and of `generate`; `seed`, `indices` and `batch_size` are passed to both.

    Returns:
      (captions, images).

    Raises:
      TypeError: an option is unknown.
    """
    shared = ("seed", "indices", "batch_size")
    caption_names = ("max_new_tokens", "temperature", "repetition_penalty", *KEPT_NAMES, *shared)
    generate_names = ("steps", "guidance", "guidance_interval", "height", "width", "latents", "output", *shared)
    unknown = set(options) - set(caption_names) - set(generate_names)
    if unknown:
      raise TypeError(f"reconstruct has no option {sorted(unknown)}")
    captions = self.caption(images, **{name: options[name] for name in caption_names if name in options})
    return captions, self.generate(captions, **{name: options[name] for name in generate_names if name in options})

  # --- Internal ----------------------------------------------------------------------------------------------------

  def _prepare(self, images: Images):
    """Yields (image uint8[h, w, 3] at the captioner's resolution, prompts for its patch grid)."""
    is_one = isinstance(images, str | os.PathLike | Image.Image)
    if is_one or (isinstance(images, np.ndarray) and images.ndim < 4):
      raise ValueError(f"images is one {type(images).__name__}, expected a list of images or paths")
    for image in images:
      if isinstance(image, str | os.PathLike):
        image = local_path(image)
      pixels = np.asarray(self.processor.resize(image))
      yield pixels, self._prompts(self._grid(pixels))

  def _grid(self, pixels: np.ndarray) -> tuple[int, int]:
    """(rows, columns) of patches of an image uint8[h, w, 3]."""
    patch = self._config.captioner.patch_size
    return pixels.shape[0] // patch, pixels.shape[1] // patch

  def _prompts(self, grid: tuple[int, int]) -> Prompts:
    if grid not in self._prompts_of_grid:
      self._prompts_of_grid[grid] = Prompts.from_processor(self.processor, grid)
    return self._prompts_of_grid[grid]

  def _model(self, params: dict, *, adapters: bool = True) -> Model:
    return merge_uae(self._graphdef, params, adapters=adapters)

  def _program(self, key, function):
    """Returns the jitted function of a key; `function` is ignored if the key is known, so it is traced only once."""
    if key not in self._programs:
      self._programs[key] = jax.jit(function, out_shardings=self._whole)
    return self._programs[key]
