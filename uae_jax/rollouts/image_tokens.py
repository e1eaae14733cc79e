"""Image tokens as a policy: Janus under classifier-free guidance as a `models.captioner.TokenModel`.

Prompt and negative prompt are two rows of one batch, and a state is the pair of their states, so `rollouts.captions`
samples, replays and compares image tokens as it does words: groups share the prefix of their prompt, and the
distribution of the policy is the guided one.

Source: Chen et al. 2025 (arXiv 2501.17811); transformers 5.23 modeling_janus.py, `generate`.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.models.janus.model import Janus
from uae_jax.models.language import PrefixCache, SuffixCache
from uae_jax.models.positions import next_position, text_positions
from uae_jax.models.prompts import Prompts
from uae_jax.rollouts.captions import Prefix
from uae_jax.sharding import gathered


class ImageTokens(nnx.Module):
  """Continues prompts with image tokens.

  With guidance g, logits are u + g (c - u) of the logits c after the prompt and u after the negative prompt; with g = 1
  they are c, and there is no second branch.
  """

  def __init__(self, model: Janus, guidance: float = 1.0):
    self.model = model
    self.guidance = guidance

  @property
  def vocab_size(self) -> int:
    return self.model.config.vq.num_codes

  @property
  def prompts(self) -> Prompts:
    """For `rollouts.captions`: every token may be sampled, and none closes an image."""
    none = np.zeros(0, np.int32)
    return Prompts(none, none, none, none, self.model.config.image_grid, 0, (), (), self.vocab_size)

  def prefix(self, tokens: jax.Array, mask: jax.Array, negative: jax.Array | None = None) -> Prefix:
    """Runs the prompts, which end in the token that begins an image.

    Args:
      tokens: int32[B, P], padded on the right.
      mask: bool[B, P]; False at padding.
      negative: int32[B, P], the negative prompts, as long as the prompts; not used without guidance.

    Raises:
      ValueError: there is guidance and no negative prompt.
    """
    positions = text_positions(mask)
    start, last = next_position(positions, mask), jnp.sum(mask, axis=1) - 1
    if self.guidance != 1.0:
      if negative is None:
        raise ValueError(f"guidance = {self.guidance} needs negative prompts; 1 needs none")
      tokens, mask, last = jnp.concatenate([tokens, negative]), twice(mask), twice(last)
      positions = jnp.concatenate([positions, positions], axis=1)
    hidden, cache = self.model.prefill(self.model.embed(tokens), positions, mask)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return Prefix(cache=cache, last_hidden=self._pair(hidden), next_position=start)

  def embed(self, tokens: jax.Array) -> jax.Array:
    """What the language model reads of image tokens: int32[...] -> float[..., D]."""
    return self.model.embed_image_tokens(tokens)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Guided logits of the next image token: float[..., D], or float[..., 2 D] of both branches -> float32[..., V]."""
    if self.guidance == 1.0:
      return self.model.image_logits(hidden)
    conditional, unconditional = (self.model.image_logits(half) for half in jnp.split(hidden, 2, axis=-1))
    return unconditional + self.guidance * (conditional - unconditional)

  def continuation_positions(
    self, next_position: jax.Array, start: jax.Array | int, num_rollouts: int, length: int
  ) -> jax.Array:
    """As those of `LanguageModel`, one row per prompt."""
    return self.model.continuation_positions(next_position, start, num_rollouts, length)

  def init_suffix(self, batch: int, rollouts: int, length: int, dtype=jnp.float32) -> SuffixCache:
    """An empty cache for the continuations of `batch` prompts, and of their negative prompts."""
    branches = 1 if self.guidance == 1.0 else 2
    return self.model.init_suffix(branches * batch, rollouts, length, dtype)

  def extend(
    self,
    embeddings: jax.Array,
    positions: jax.Array,
    prefix: PrefixCache,
    suffix: SuffixCache | None = None,
    start: jax.Array | int = 0,
  ) -> tuple[jax.Array, SuffixCache | None]:
    """Runs T more tokens of each of R rollouts in both branches: float[B, R, T, D] -> float[B, R, T, 2 D]."""
    if self.guidance != 1.0:
      embeddings, positions = twice(embeddings), jnp.concatenate([positions, positions], axis=1)
    hidden, suffix = self.model.extend(embeddings, positions, prefix, suffix, start)
    return self._pair(hidden), suffix

  def for_decoding(self) -> "ImageTokens":
    """The same policy with weights all-gathered, see `LanguageModel.for_decoding`."""
    model = nnx.merge(*nnx.split(self.model))
    model.language = model.language.for_decoding()
    model.image_aligner, model.image_head = gathered(model.image_aligner), gathered(model.image_head)
    return ImageTokens(model, self.guidance)

  def _pair(self, hidden: jax.Array) -> jax.Array:
    """float[2 B, ..., D] -> float[B, ..., 2 D]; without guidance float[B, ..., D] as it is."""
    return hidden if self.guidance == 1.0 else jnp.concatenate(jnp.split(hidden, 2), axis=-1)


def twice(x: jax.Array) -> jax.Array:
  """[B, ...] -> [2 B, ...]."""
  return jnp.concatenate([x, x])


def negative_prompts(tokens: jax.Array, mask: jax.Array, *, kept: tuple[int, ...], pad: int) -> jax.Array:
  """The negative prompts of the official system: everything but a few control tokens is padding that is attended to.

  Args:
    tokens: int32[B, P].
    mask: bool[B, P]; False at padding, which stays as it is.
    kept: ids that stay: those that begin the text and the image.
    pad: id of the padding.

  Returns:
    int32[B, P].
  """
  return jnp.where(jnp.isin(tokens, jnp.asarray(kept)) | ~mask, tokens, pad)
