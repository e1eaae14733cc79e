"""Groups of captions sampled on one shared image prefix, and their log-probabilities by teacher forcing over it."""

from collections.abc import Sequence
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.algorithms import kl
from uae_jax.models.captioner import TokenModel
from uae_jax.models.prompts import Prompts, Questions
from uae_jax.models.uae import UAE
from uae_jax.rollouts import token_distribution


@flax.struct.dataclass
class Captions:
  """R sampled captions per image.

  Made by `sample_captions`; read by the reward and update phases of stage 2, by evaluation and by the Python API.

  Attributes:
    tokens: int32[B, R, L], including the closing token; padding after it.
    mask: bool[B, R, L], True up to and including the closing token.
    log_probs: float32[B, R, L], log-probabilities of the tokens in the sampled distribution; 0 outside the mask.
    is_closed: bool[B, R], False where the caption reached L tokens without a closing one.
    kept: uint8[B, R, L, ceil(V / 8)], packed sets of the tokens that truncation kept, for replay; None if nothing was
      truncated or nothing will be replayed.
  """

  tokens: jax.Array
  mask: jax.Array
  log_probs: jax.Array
  is_closed: jax.Array
  kept: jax.Array | None = None


@flax.struct.dataclass
class Prefix:
  """Image and question as processed by the captioner; all captions of an image share it.

  Made by `caption_prefix`; read by `sample_captions` and `caption_hidden`.

  Attributes:
    cache: keys and values of image and question, in the captioner's own format.
    last_hidden: float[B, D], the state that predicts the first token of a caption.
    next_position: int32[B], position of the first token of a caption.
  """

  cache: Any
  last_hidden: jax.Array
  next_position: jax.Array


def caption_prefix(model: UAE, prompts: Prompts, images: jax.Array, questions: Questions | None = None) -> Prefix:
  """Runs the captioner on image and question, once per image.

  Args:
    model: UAE whose captioner is used.
    prompts: templates as token ids.
    images: uint8[B, h, w, 3] at the captioner's resolution.
    questions: a prompt per image; by default the caption prompt.
  """
  captioner = model.captioner
  embeddings, positions, mask = captioner.prompt(prompts, images, questions)
  hidden, cache = captioner.prefill(embeddings, positions, mask)
  last_hidden = hidden[:, -1]
  if questions is not None:
    last = jnp.sum(questions.mask, axis=1) - 1
    last_hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  return Prefix(cache=cache, last_hidden=last_hidden, next_position=captioner.next_position(positions, mask))


def sample_captions(
  captioner: TokenModel,
  prompts: Prompts,
  prefix: Prefix,
  key: jax.Array | None,
  *,
  num_rollouts: int,
  max_tokens: int,
  temperature: float | jax.Array,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  repetition_penalty: float = 1.0,
  records_kept: bool = False,
  questions: Questions | None = None,
  uniforms: jax.Array | None = None,
) -> Captions:
  """Samples R captions per image; the loop ends as soon as every caption is closed.

  Tokens that are neither text nor close a caption (images, roles, tools) have probability 0.

  Weights that are sharded over `fsdp` are all-gathered once, before the loop, not once per token.

  Args:
    captioner: the policy, with adapters enabled or disabled by the caller.
    prompts: provides the ids of closing tokens and padding.
    prefix: result of `caption_prefix`.
    key: one key for the whole batch, or keys[B], with which a caption does not depend on the other images.
    num_rollouts: R.
    max_tokens: L, maximum length, including the closing token.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: samples among the k most likely tokens; 0 disables it.
    top_p: samples among the most likely tokens whose probabilities sum to p; 1 disables it.
    min_p: samples among tokens with at least min_p times the probability of the most likely one; 0 disables it.
    repetition_penalty: logits of tokens that the prompt or the caption already contains are divided by it if positive
      and multiplied by it if negative, as in transformers. 1 disables it; only then are the log-probabilities those of
      the policy.
    records_kept: record the tokens that truncation kept, which replay needs; B * R * L * V bits.
    questions: the prompts of `prefix` if it was made with some; the repetition penalty reads them.
    uniforms: float32[2, B, R, L] in [0, 1], the random numbers of every token; then there is no key.
  """
  batch = prefix.next_position.shape[0]
  shape = (batch, num_rollouts)
  end = jnp.asarray(prompts.end)
  language = captioner.for_decoding()
  logits = jnp.broadcast_to(language.logits(prefix.last_hidden)[:, None], (*shape, language.vocab_size))
  suffix = language.init_suffix(batch, num_rollouts, max_tokens, prefix.cache.dtype)
  vocabulary = jnp.asarray(prompts.vocabulary(language.vocab_size))
  is_truncated = token_distribution.truncates(top_k, top_p, min_p)

  def random_pair(t):
    if uniforms is not None:
      return uniforms[..., t]
    assert key is not None, "either a key or uniform numbers"
    return uniform_pair(fold_in(key, t), shape)

  def is_running(carry):
    t, _, _, _, done, *_ = carry
    return (t < max_tokens) & ~jnp.all(done)

  def step(carry):
    t, tokens, log_probs, kept, done, logits, suffix, seen = carry
    if repetition_penalty != 1.0:
      repeated = jnp.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
      logits = jnp.where(seen, repeated, logits)
    scores = token_distribution.remove(logits / jnp.where(temperature > 0, temperature, 1.0), vocabulary)
    if is_truncated:
      is_kept = token_distribution.kept_tokens(scores, top_k=top_k, top_p=top_p, min_p=min_p)
      scores = token_distribution.remove(scores, is_kept)
      if kept is not None:
        kept = kept.at[:, :, t].set(token_distribution.pack(is_kept))
    log_p = jax.nn.log_softmax(scores)
    token = jax.lax.cond(
      temperature > 0,
      lambda: pick(jnp.exp(log_p), *random_pair(t)),
      lambda: jnp.argmax(scores, axis=-1).astype(jnp.int32),
    )
    log_prob = jnp.take_along_axis(log_p, token[..., None], axis=-1)[..., 0]
    tokens = tokens.at[:, :, t].set(jnp.where(done, prompts.pad, token))
    log_probs = log_probs.at[:, :, t].set(jnp.where(done, 0.0, log_prob))
    done = done | jnp.isin(token, end)
    if repetition_penalty != 1.0:
      seen = seen | (token[..., None] == jnp.arange(logits.shape[-1]))
    embeddings = language.embed(token)[:, :, None]
    positions = language.continuation_positions(prefix.next_position, t, num_rollouts, 1)
    hidden, suffix = language.extend(embeddings, positions, prefix.cache, suffix, start=t)
    return t + 1, tokens, log_probs, kept, done, language.logits(hidden[:, :, 0]), suffix, seen

  tokens = jnp.full((*shape, max_tokens), prompts.pad, jnp.int32)
  seen = None
  if repetition_penalty != 1.0:
    asked, is_asked = jnp.asarray(prompts.caption)[None], jnp.bool_(True)
    if questions is not None:
      asked, is_asked = questions.tokens, questions.mask
    seen = jnp.zeros((len(asked), language.vocab_size), bool).at[jnp.arange(len(asked))[:, None], asked].max(is_asked)
    seen = jnp.broadcast_to(seen[:, None], logits.shape)
  kept = None
  if is_truncated and records_kept:
    kept = jnp.zeros((*shape, max_tokens, -(-language.vocab_size // 8)), jnp.uint8)
  log_probs, done = jnp.zeros((*shape, max_tokens)), jnp.zeros(shape, bool)
  carry = (jnp.int32(0), tokens, log_probs, kept, done, logits, suffix, seen)
  _, tokens, log_probs, kept, done, *_ = jax.lax.while_loop(is_running, step, carry)
  return Captions(tokens, caption_mask(tokens, prompts), log_probs, is_closed=done, kept=kept)


def fold_in(key: jax.Array, t: jax.Array) -> jax.Array:
  """Folds a step into one key, or into each of keys[B]."""
  return jax.vmap(jax.random.fold_in, (0, None))(key, t) if key.ndim else jax.random.fold_in(key, t)


def uniform_pair(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws float32[2, *shape] in [0, 1) from one key, or the rows of axis 1 from keys[B] each."""
  if not key.ndim:
    return jax.random.uniform(key, (2, *shape))
  return jnp.moveaxis(jax.vmap(lambda key: jax.random.uniform(key, (2, *shape[1:])))(key), 0, 1)


def pick(weights: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
  """Samples int32[...] from distributions that are proportional to weights float32[..., V].

  Inverts the cumulative distribution over groups of entries, then over the entries of the chosen group, with one
  uniform number float32[...] in [0, 1] each. `jax.random.categorical` draws noise for every entry instead: on CPU, for
  16 x 16384 entries, 9 ms instead of 0.3 ms.
  """

  def invert(weights, uniform):
    cumulative = jnp.cumsum(weights, axis=-1)
    # The largest number that `jax.random.uniform` draws: 1 itself would be beyond the last entry.
    below = jnp.minimum(uniform, 1 - 2**-23)[..., None] * cumulative[..., -1:]
    return jnp.sum(cumulative <= below, axis=-1, dtype=jnp.int32)

  num_groups = math.gcd(weights.shape[-1], 128)
  groups = weights.reshape(*weights.shape[:-1], num_groups, -1)
  group = invert(jnp.sum(groups, axis=-1), first)
  inside = jnp.take_along_axis(groups, group[..., None, None], axis=-2)[..., 0, :]
  return group * groups.shape[-1] + invert(inside, second)


def caption_mask(tokens: jax.Array, prompts: Prompts) -> jax.Array:
  """Masks tokens int32[..., L]: bool[..., L], True up to and including the first closing token."""
  is_end = jnp.isin(tokens, jnp.asarray(prompts.end))
  closed_before = jnp.cumsum(is_end, axis=-1) - is_end > 0
  return ~closed_before


def caption_hidden(captioner: TokenModel, prefix: Prefix, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes hidden states of given captions by teacher forcing over the shared prefix.

  Args:
    captioner: the policy.
    prefix: result of `caption_prefix`.
    tokens: int32[B, R, L].

  Returns:
    (states that predict each token float[B, R, L, D], states at each token float[B, R, L, D]).
  """
  batch, num_rollouts, length = tokens.shape
  positions = captioner.continuation_positions(prefix.next_position, 0, num_rollouts, length)
  at_token, _ = captioner.extend(captioner.embed(tokens), positions, prefix.cache)
  first = jnp.broadcast_to(prefix.last_hidden[:, None, None], (batch, num_rollouts, 1, at_token.shape[-1]))
  return jnp.concatenate([first, at_token[:, :, :-1]], axis=2), at_token


def token_log_probs(
  captioner: TokenModel,
  hidden: jax.Array,
  tokens: jax.Array,
  *,
  temperature: float = 1.0,
  vocabulary: np.ndarray | None = None,
  kept: jax.Array | None = None,
  num_chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Computes log-probabilities and entropies of tokens without materializing all logits at once.

  Args:
    captioner: provides the output head.
    hidden: float[B, R, L, D], the states that predict `tokens`.
    tokens: int32[B, R, L].
    temperature: divides the logits, as in sampling.
    vocabulary: bool[V], tokens with a probability, see `Prompts.vocabulary`; None for all.
    kept: `Captions.kept` of captions sampled with truncation.
    num_chunks: number of chunks of L, each of which is rematerialized; 1 holds all logits.

  Returns:
    (log_probs float32[B, R, L], entropy float32[B, R, L]).

  Raises:
    ValueError: `num_chunks` does not divide L.
  """
  length = tokens.shape[-1]
  if length % num_chunks:
    raise ValueError(f"num_chunks = {num_chunks} does not divide the caption budget of {length} tokens")

  def chunk(hidden, tokens, kept):
    log_p = jax.nn.log_softmax(_scores(captioner, hidden, temperature, vocabulary, kept))
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0], entropy

  if num_chunks == 1:
    return chunk(hidden, tokens, kept)
  chunks = [jax.checkpoint(chunk)(*part) for part in _split((hidden, tokens, kept), num_chunks)]
  log_probs, entropy = (jnp.concatenate(part, axis=2) for part in zip(*chunks, strict=True))
  return log_probs, entropy


def caption_log_probs(
  model: UAE,
  prompts: Prompts,
  images: jax.Array,
  tokens: jax.Array,
  *,
  temperature: float = 1.0,
  has_whole_vocabulary: bool = False,
  kept: jax.Array | None = None,
  num_chunks: int = 1,
  questions: Questions | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Replays given captions: their log-probabilities and entropies, with the prefix computed once per image.

  Args:
    model: UAE whose captioner is the policy.
    prompts: templates as token ids.
    images: uint8[B, h, w, 3].
    tokens: int32[B, R, L].
    temperature: divides the logits, as in sampling.
    has_whole_vocabulary: give a probability to tokens that are never sampled too, as in next-token prediction.
    kept: `Captions.kept` of captions sampled with truncation.
    num_chunks: number of rematerialized chunks of L, see `token_log_probs`.
    questions: a prompt per image; by default the caption prompt.

  Returns:
    (log_probs float32[B, R, L], entropy float32[B, R, L]), padding not masked.
  """
  return replay(
    model.captioner,
    caption_prefix(model, prompts, images, questions),
    tokens,
    temperature=temperature,
    vocabulary=None if has_whole_vocabulary else prompts.vocabulary(model.captioner.vocab_size),
    kept=kept,
    num_chunks=num_chunks,
  )


def replay(captioner: TokenModel, prefix: Prefix, tokens: jax.Array, **scoring) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities and entropies float32[B, R, L] of tokens int32[B, R, L] after a prefix.

  Args:
    captioner: the policy.
    prefix: the prompts as processed by it.
    tokens: int32[B, R, L].
    **scoring: keyword arguments of `token_log_probs`.
  """
  hidden, _ = caption_hidden(captioner, prefix, tokens)
  return token_log_probs(captioner, hidden, tokens, **scoring)


def exact_kl(
  policy: Sequence[Any],
  reference: Sequence[Any],
  tokens: jax.Array,
  *,
  temperature: float = 1.0,
  vocabulary: np.ndarray | None = None,
  kept: jax.Array | None = None,
  num_chunks: int = 1,
) -> jax.Array:
  """Computes KL(policy, reference) over all tokens that can be sampled at each token, differentiable in the policy.

  Args:
    policy: the `TokenModel` that learns, and the `Prefix` of the prompts as processed by it.
    reference: the model to compare with, and its prefix; no gradient flows into it.
    tokens: int32[B, R, L].
    temperature: divides the logits of both.
    vocabulary: bool[V], tokens with a probability; None for all.
    kept: `Captions.kept` of captions sampled with truncation.
    num_chunks: number of rematerialized chunks of L.

  Returns:
    float32[B, R, L], padding not masked.
  """
  hidden = [caption_hidden(model, prefix, tokens)[0] for model, prefix in (policy, reference)]
  hidden[1] = jax.lax.stop_gradient(hidden[1])

  def chunk(own, other, kept):
    scores, others = (
      _scores(captioner, h, temperature, vocabulary, kept)
      for (captioner, _), h in zip((policy, reference), (own, other), strict=True)
    )
    return kl.exact(scores, jax.lax.stop_gradient(others))

  return jnp.concatenate([jax.checkpoint(chunk)(*part) for part in _split((*hidden, kept), num_chunks)], axis=2)


def _scores(
  captioner: TokenModel,
  hidden: jax.Array,
  temperature: float,
  vocabulary: np.ndarray | None,
  kept: jax.Array | None,
) -> jax.Array:
  """Scores float32[B, R, L, V] of the states that predict the tokens; what the sampler removed is removed here too."""
  scores = captioner.logits(hidden) / temperature
  if kept is not None:
    return token_distribution.remove(scores, token_distribution.unpack(kept, captioner.vocab_size))
  return scores if vocabulary is None else token_distribution.remove(scores, jnp.asarray(vocabulary))


def _split(parts: tuple[jax.Array | None, ...], num_chunks: int) -> list[tuple[jax.Array | None, ...]]:
  """Splits arrays [B, R, L, ...] into chunks of L; None stays None."""
  chunks = [[x] * num_chunks if x is None else jnp.split(x, num_chunks, axis=2) for x in parts]
  return list(zip(*chunks, strict=True))
