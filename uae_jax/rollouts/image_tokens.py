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
from uae_jax.models.janus.system import JanusSystem
from uae_jax.models.language import PrefixCache, SuffixCache
from uae_jax.models.positions import next_position, text_positions
from uae_jax.models.prompts import Prompts
from uae_jax.rollouts.captions import Prefix, sample_captions
from uae_jax.rollouts.conditioning import Context
from uae_jax.rollouts.guidance_interval import Interval
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
  def num_tokens(self) -> int:
    """Tokens per image."""
    return self.model.config.num_image_tokens

  @property
  def prompts(self) -> Prompts:
    """For `rollouts.captions`: every token may be sampled, and none closes an image."""
    none = np.zeros(0, np.int32)
    return Prompts(none, none, none, none, self.model.config.image_grid, 0, (), (), self.vocab_size)

  def prefix(self, embeddings: jax.Array, mask: jax.Array, padding: jax.Array | None = None) -> Prefix:
    """Runs the prompts, which end in the token that begins an image.

    Args:
      embeddings: float[B, P, D] of the prompts, padded on the right.
      mask: bool[B, P]; False at padding.
      padding: float[1, P, D] or float[D], embedding of the padding token, of which negative prompts consist; not used
        without guidance.

    Raises:
      ValueError: there is guidance and no `padding`.
    """
    positions = text_positions(mask)
    start, last = next_position(positions, mask), jnp.sum(mask, axis=1) - 1
    if self.guidance != 1.0:
      if padding is None:
        raise ValueError(f"guidance = {self.guidance} needs negative prompts; 1 needs none")
      embeddings = jnp.concatenate([embeddings, negative_prompts(embeddings, mask, padding)])
      mask, last = twice(mask), twice(last)
      positions = jnp.concatenate([positions, positions], axis=1)
    hidden, cache = self.model.prefill(embeddings, positions, mask)
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


def negative_prompts(embeddings: jax.Array, mask: jax.Array, padding: jax.Array) -> jax.Array:
  """The negative prompts of the official system: padding that is attended to, between the first and the last token.

  Args:
    embeddings: float[B, P, D] of the prompts.
    mask: bool[B, P]; False at padding on the right.
    padding: float[1, P, D] or float[D], embedding of the padding token.

  Returns:
    float[B, P, D].
  """
  place, last = jnp.arange(mask.shape[1]), jnp.sum(mask, axis=1, keepdims=True) - 1
  is_kept = (place == 0) | (place == last)
  return jnp.where(is_kept[..., None], embeddings, padding)


def generate(
  model: JanusSystem,
  context: Context,
  negative: Context | None,
  noise: jax.Array,
  *,
  guidance: float,
  sampler_steps: int,
  shift: float,
  gradient_steps: int,
  guidance_interval: Interval,
) -> jax.Array:
  """Samples the tokens of images and decodes them, see `reconstruct.generate`.

  Noise is turned into uniform numbers, and these into tokens by the inverse of their cumulative distribution. So an
  image is a function of context and noise, as that of a diffusion model, and depends on nothing else in its batch.

  Args:
    model: the system.
    context: embeddings of the prompts, B rows.
    negative: embeddings of as many padding tokens, one row; None without guidance.
    noise: float32[B, h, w, 2], normally distributed.
    guidance: scale of classifier-free guidance on the logits; 1 disables it.
    sampler_steps, shift, guidance_interval: of a diffusion model; not used.
    gradient_steps: must be 0.

  Returns:
    float32[B, H, W, 3], nominally in [-1, 1], not clipped.

  Raises:
    ValueError: a gradient is asked for.
  """
  del sampler_steps, shift, guidance_interval
  if gradient_steps:
    raise ValueError(f"gradient_steps = {gradient_steps}: no gradient flows through image tokens, expected 0")
  policy = ImageTokens(model.captioner, guidance)
  prefix = policy.prefix(context.states, context.mask, None if negative is None else negative.states)
  count = policy.num_tokens
  uniforms = jnp.moveaxis(jax.scipy.stats.norm.cdf(noise).reshape(len(noise), 1, count, 2), -1, 0)
  sampled = sample_captions(
    policy, policy.prompts, prefix, None, num_rollouts=1, max_tokens=count, temperature=1.0, uniforms=uniforms
  )
  return model.decode_tokens(sampled.tokens[:, 0])
