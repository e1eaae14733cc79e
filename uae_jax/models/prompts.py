"""Chat templates around images and captions as token constants, applied to sampled captions on the device."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """Chat templates of one processor, rendered to token ids.

  Attributes:
    caption: int32[P], the caption prompt with placeholders for the image, up to where the caption starts.
    generation_prefix: int32[...], the generation template before the caption.
    generation_suffix: int32[...], the generation template after the caption.
    negative: int32[...], the complete generation prompt of the negative prompt.
    image_grid: (rows, columns) of merged cells of the image in `caption`.
    pad: id of the padding token.
    end: ids that close a caption; the first one is `<|im_end|>`.
    control: ids that are not text; of these, a caption contains only those in `end`.
    vocab_size: number of tokens of the tokenizer; larger ids of the model have no text.
  """

  caption: np.ndarray
  generation_prefix: np.ndarray
  generation_suffix: np.ndarray
  negative: np.ndarray
  image_grid: tuple[int, int]
  pad: int
  end: tuple[int, ...]
  control: tuple[int, ...]
  vocab_size: int

  @classmethod
  def from_processor(cls, processor, grid: tuple[int, int]) -> "Prompts":
    """Renders the templates of a `data.processing.Processor` for images of one patch grid (rows, columns)."""
    merge = processor.merge_size
    # The template puts the caption between a fixed prefix and a fixed suffix; a known word shows where.
    word = processor.tokenizer.encode(processor.seam_word, add_special_tokens=False)
    row = processor.generation_prompt(processor.seam_word)
    start = next(i for i in range(len(row)) if row[i : i + len(word)] == word)
    return cls(
      caption=np.asarray(processor.caption_prompt(grid), np.int32),
      generation_prefix=np.asarray(row[:start], np.int32),
      generation_suffix=np.asarray(row[start + len(word) :], np.int32),
      negative=np.asarray(processor.negative_row(), np.int32),
      image_grid=(grid[0] // merge, grid[1] // merge),
      pad=processor.pad_id,
      end=tuple(processor.end_ids),
      control=tuple(processor.control_ids),
      vocab_size=processor.vocab_size,
    )

  def for_image(self, grid: tuple[int, int], image_token_id: int) -> "Prompts":
    """The same templates with an image of another grid.

    Args:
      grid: (rows, columns) of merged cells.
      image_token_id: id of the placeholder of a cell in `caption`.
    """
    if grid == self.image_grid:
      return self
    places = np.flatnonzero(self.caption == image_token_id)
    image = np.full(grid[0] * grid[1], image_token_id, np.int32)
    caption = np.concatenate([self.caption[: places[0]], image, self.caption[places[-1] + 1 :]])
    return dataclasses.replace(self, caption=caption, image_grid=grid)

  def vocabulary(self, size: int) -> np.ndarray:
    """Marks the tokens that captions are sampled from, text and closing tokens: bool[size]; size is the model's V."""
    ids = np.arange(size)
    return (ids < self.vocab_size) & ~np.isin(ids, self.control) | np.isin(ids, self.end)


@flax.struct.dataclass
class Questions:
  """A prompt of its own for each image, in place of `Prompts.caption`; an argument of a program, not a constant.

  Attributes:
    tokens: int32[B, P], image placeholders and question up to where the answer starts, padded on the right.
    mask: bool[B, P]; False at padding.
  """

  tokens: jax.Array
  mask: jax.Array


def generation_rows(prompts: Prompts, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Generation prompts for captions given as token ids.

  Args:
    prompts: the templates.
    tokens: int32[B, L]; captions with their closing token, right-padded.
    mask: bool[B, L]; True on the caption and its closing token.

  Returns:
    (tokens int32[B, p + L + s], mask bool[B, p + L + s]): prefix, caption without its closing token, suffix, padding.
  """
  prefix, suffix = jnp.asarray(prompts.generation_prefix), jnp.asarray(prompts.generation_suffix)
  is_end = jnp.isin(tokens, jnp.asarray(prompts.end)) & mask
  length = jnp.sum(mask & ~is_end, axis=1, keepdims=True)
  place = jnp.arange(len(prefix) + tokens.shape[1] + len(suffix))[None, :] - len(prefix)
  caption = jnp.take_along_axis(
    tokens, jnp.clip(jnp.broadcast_to(place, (tokens.shape[0], place.shape[1])), 0, tokens.shape[1] - 1), axis=1
  )
  after = jnp.clip(place - length, 0, max(len(suffix) - 1, 0))
  row = jnp.where(place < length, caption, suffix[after] if len(suffix) else prompts.pad)
  row = jnp.where(place < 0, prefix[jnp.clip(place + len(prefix), 0, len(prefix) - 1)], row)
  row_mask = place < length + len(suffix)
  return jnp.where(row_mask, row, prompts.pad), row_mask


def fill_image(embeddings: jax.Array, is_image: jax.Array | np.ndarray, image: jax.Array) -> jax.Array:
  """Puts the tokens of one image per row in the places of their placeholders, in order.

  Args:
    embeddings: float[B, T, D].
    is_image: bool[B, T], True at placeholders.
    image: float[B, S, D], as many tokens as each row has placeholders.

  Returns:
    float[B, T, D].
  """
  place = jnp.clip(jnp.cumsum(jnp.asarray(is_image), axis=1) - 1, 0, image.shape[1] - 1)
  filled = jnp.take_along_axis(image, place[..., None], axis=1)
  return jnp.where(is_image[..., None], filled, embeddings)
