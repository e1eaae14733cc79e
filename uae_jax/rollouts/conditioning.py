"""Conditioning of the decoder: connector outputs for a re-encoded caption, a prompt, or the captioner's own answer."""

import flax.struct
import jax
import jax.numpy as jnp

from uae_jax.models.prompts import Prompts, generation_rows
from uae_jax.models.system import System
from uae_jax.models.uae import UAE
from uae_jax.rollouts import captions


@flax.struct.dataclass
class Context:
  """Conditioning of the decoder.

  Made by `encode_captions`, `encode_negative` and `answer_context`, and in stage 2 from states of the rollout; read by
  `images.velocity_field` and by the flow loss of stage 0.

  Attributes:
    states: float[B, T, C], outputs of the connector.
    mask: bool[B, T], True at the slots that are not padding.
  """

  states: jax.Array
  mask: jax.Array

  def repeat(self, times: int) -> "Context":
    """Repeats every row `times` times, in consecutive rows."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)


def encode_captions(prompts: Prompts, model: System, tokens: jax.Array) -> Context:
  """Encodes captions int32[B, L] in the generation template, B rows of conditioning."""
  rows, mask = generation_rows(prompts, tokens, captions.caption_mask(tokens, prompts))
  return Context(model.encode_text(rows, mask), mask)


def encode_negative(prompts: Prompts, model: System, length: int) -> Context:
  """Encodes the negative prompt as one row, padded to `length` slots.

  Raises:
    ValueError: the prompt is longer than `length`.
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
  """Conditions on the captioner's states at the positions of captions int32[B, L] after image and question."""
  prefix = captions.caption_prefix(model, prompts, images)
  _, at_token = captions.caption_hidden(model.captioner, prefix, tokens[:, None])
  return Context(model.connector(at_token[:, 0]), captions.caption_mask(tokens, prompts))
