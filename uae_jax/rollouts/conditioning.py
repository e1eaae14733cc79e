"""What the decoder sees of captions: the connector's states of the caption re-encoded, of a prompt, or of the answer
itself.
"""

import flax.struct
import jax
import jax.numpy as jnp

from uae_jax.models.prompts import Prompts, generation_rows
from uae_jax.models.uae import UAE
from uae_jax.rollouts import captions


@flax.struct.dataclass
class Context:
  """The decoder's condition: states float[B, T, C] and mask bool[B, T]."""

  states: jax.Array
  mask: jax.Array

  def repeat(self, times: int) -> "Context":
    """Every row `times` times in a row."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


def encode_captions(prompts: Prompts, model: UAE, tokens: jax.Array) -> Context:
  """The decoder's context of captions int32[B, L], re-encoded as generation prompts."""
  rows, mask = generation_rows(prompts, tokens, captions.caption_mask(tokens, prompts))
  return Context(model.encode_text(rows, mask), mask)


def encode_negative(prompts: Prompts, model: UAE, length: int) -> Context:
  """One row: the negative prompt's context, padded to `length` slots.

  Raises:
    ValueError: the prompt is longer than that.
  """
  negative = prompts.negative
  if len(negative) > length:
    raise ValueError(
      f"the negative prompt has {len(negative)} tokens, contexts have {length}: raise data.caption_tokens"
    )
  row = jnp.full((1, length), prompts.pad, jnp.int32).at[0, : len(negative)].set(negative)
  mask = (jnp.arange(length) < len(negative))[None]
  return Context(model.encode_text(row, mask), mask)


def answer_context(prompts: Prompts, model: UAE, images: jax.Array, tokens: jax.Array) -> Context:
  """The connector's states at the positions of captions int32[B, L] that follow image and question."""
  prefix = captions.caption_prefix(model, prompts, images)
  _, at_token = captions.caption_hidden(model.captioner, prefix, tokens[:, None])
  return Context(model.connector(at_token[:, 0]), captions.caption_mask(tokens, prompts))
