"""The captioner's processor: tokenizer, chat template and image sizes, read from a Hugging Face folder.

Source: transformers 5.23 Qwen2_5_VLProcessor and Qwen2VLImageProcessorPil; the demo of PKU-YuanGroup/UAE for the
prompts and the double resizing. Pixels are normalized on the device (`models.qwen25_vl.vision`).
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uae_jax.data.preprocessing import ImageSource, read_image

IMAGE_TOKEN = "<|image_pad|>"
QUESTION = (
  "You are an expert vision-language model.  \n"
  "Your task is: Given an input image, generate a **textual description** of the image. "
  'If there is text in the image, transcribe it inside double quotes "".  \n'
  "Now, carefully analyze the input image and output the full description. "
)
NEGATIVE_PROMPT = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."
# The demo's client resizes images to 4 to 16384 merged cells before the image processor sees them.
CLIENT_CELLS = (4, 16384)
MAX_ASPECT_RATIO = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
  """Converts text to token ids and back, and images to the sizes that the vision tower accepts.

  Attributes:
    tokenizer: a transformers tokenizer.
    chat_template: Jinja source of the chat template.
    patch_size: side of a patch, in pixels.
    merge_size: side, in patches, of the cell that becomes one token.
    min_pixels: smallest image area after `resize`, in pixels.
    max_pixels: largest image area after `resize`, in pixels.
    resample: PIL's number of the resampling filter.
    pad_id: id of the padding token.
    end_ids: ids that close a caption; the first one is the end of turn of the chat template.
    question: question about the image in the caption prompt.
    negative_prompt: prompt of the negative branch of classifier-free guidance.
  """

  tokenizer: Any
  chat_template: str
  patch_size: int
  merge_size: int
  min_pixels: int
  max_pixels: int
  resample: int
  pad_id: int
  end_ids: tuple[int, ...]
  question: str = QUESTION
  negative_prompt: str = NEGATIVE_PROMPT

  @classmethod
  def from_folder(
    cls, path: str | Path, *, question: str = QUESTION, negative_prompt: str = NEGATIVE_PROMPT
  ) -> "Processor":
    """Reads a processor from a local folder; downloads nothing.

    It reads the tokenizer's files, `preprocessor_config.json` and, if they exist, `chat_template.json` and
    `generation_config.json`.

    Raises:
      FileNotFoundError: the folder does not exist, or has no `preprocessor_config.json`.
      ValueError: the tokenizer cannot be read, or has no chat template, padding token or image token.
    """
    from transformers import AutoTokenizer  # Imported late: it loads half of transformers.

    path = Path(path)
    if not (path / "preprocessor_config.json").is_file():
      raise FileNotFoundError(f"{path}: no preprocessor_config.json, so this is not the folder of a processor")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    try:
      tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
      raise ValueError(f"{path}: the tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    template = _optional(path / "chat_template.json").get("chat_template") or tokenizer.chat_template
    if not template:
      raise ValueError(f"{path}: no chat template in chat_template.json or in the tokenizer's files")
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
      raise ValueError(f"{path}: the tokenizer has no pad_token or no eos_token")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
      raise ValueError(f"{path}: the tokenizer has no token {IMAGE_TOKEN}")
    ends = _optional(path / "generation_config.json").get("eos_token_id", [])
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    size = settings.get("size") or {}
    return cls(
      tokenizer=tokenizer,
      chat_template=template,
      patch_size=settings.get("patch_size", 14),
      merge_size=settings.get("merge_size", 2),
      min_pixels=settings.get("min_pixels") or size.get("shortest_edge", 56 * 56),
      max_pixels=settings.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
      resample=settings.get("resample", Image.Resampling.BICUBIC),
      pad_id=tokenizer.pad_token_id,
      end_ids=tuple(dict.fromkeys(ends)),
      question=question,
      negative_prompt=negative_prompt,
    )

  # --- Images ------------------------------------------------------------------------------------------------------

  @property
  def cell_px(self) -> int:
    """Side, in pixels, of a cell, which becomes one token."""
    return self.patch_size * self.merge_size

  def resize(self, image: ImageSource, *, demo_resize: bool = True) -> Image.Image:
    """Resizes an image to upright RGB whose sides are multiples of a cell and whose area is within the limits.

    Args:
      image: a PIL image of any mode and size, a path, or uint8[H, W, 3].
      demo_resize: first resize to multiples of a cell, as the official demo does; above `max_pixels` this changes the
        result, and sometimes the grid. False applies the image processor alone.

    Raises:
      ValueError: the file cannot be read (the message names it), or the image is too narrow.
    """
    image = read_image(image)
    if demo_resize:
      area = self.cell_px**2
      height, width = self.fit(image.height, image.width, CLIENT_CELLS[0] * area, CLIENT_CELLS[1] * area)
      image = image.resize((width, height), Image.Resampling.BICUBIC)
    height, width = self.fit(image.height, image.width, self.min_pixels, self.max_pixels)
    return image.resize((width, height), self.resample)

  def fit(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) as multiples of a cell, close to the aspect ratio, with an area between the limits.

    Raises:
      ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
      raise ValueError(f"an image of {width} x {height} pixels is narrower than 1 to {MAX_ASPECT_RATIO}")
    cell = self.cell_px
    # Python's rounding half to even is part of the definition.
    rounded = round(height / cell) * cell, round(width / cell) * cell
    if rounded[0] * rounded[1] > max_pixels:
      shrink = math.sqrt(height * width / max_pixels)
      height, width = (max(cell, math.floor(side / shrink / cell) * cell) for side in (height, width))
      return height, width
    if rounded[0] * rounded[1] < min_pixels:
      grow = math.sqrt(min_pixels / (height * width))
      height, width = (math.ceil(side * grow / cell) * cell for side in (height, width))
      return height, width
    return rounded

  def square_px(self, side: int) -> int:
    """Side, in pixels, of a square image after `resize` with `demo_resize=False`."""
    return self.fit(side, side, self.min_pixels, self.max_pixels)[0]

  # --- Text --------------------------------------------------------------------------------------------------------

  @property
  def vocab_size(self) -> int:
    """Number of tokens of the tokenizer; the vocabulary of a model may be larger."""
    return len(self.tokenizer)

  @property
  def image_token_id(self) -> int:
    return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

  @property
  def control_ids(self) -> tuple[int, ...]:
    """Ids of all tokens that are not text: those of images, roles, tools and code files, closing tokens, padding.

    These are the tokens that the tokenizer adds to its vocabulary. It calls only some of them special: Qwen2.5-VL's
    `<|fim_prefix|>` and `<tool_call>`, for example, are not.
    """
    return tuple(sorted({*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}))

  def encode(self, text: str) -> list[int]:
    """Token ids of plain text."""
    return self.tokenizer.encode(text, add_special_tokens=False)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids, without special tokens."""
    ids = [int(i) for i in ids]
    return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

  def caption_prompt(self, grid: tuple[int, int]) -> list[int]:
    """Token ids of the question, then the image, up to where the caption starts.

    Args:
      grid: (rows, columns) of patches.

    Raises:
      ValueError: the grid does not divide into cells.
    """
    rows, columns = grid
    if rows % self.merge_size or columns % self.merge_size:
      raise ValueError(f"a grid of {rows} x {columns} patches does not divide into cells of {self.merge_size}")
    content = [{"type": "text", "text": self.question}, {"type": "image"}]
    ids = self._templated("user", content)
    tokens = rows * columns // self.merge_size**2
    return [i for token in ids for i in ([token] * tokens if token == self.image_token_id else [token])]

  def generation_prompt(self, text: str) -> list[int]:
    """Token ids of the chat that the decoder's context is computed from: one message of role `generate`."""
    return self._templated("generate", [{"type": "text", "text": text}])

  def _templated(self, role: str, content: list[dict]) -> list[int]:
    text = self.tokenizer.apply_chat_template(
      [{"role": role, "content": content}],
      chat_template=self.chat_template,
      tokenize=False,
      add_generation_prompt=True,
    )
    return self.encode(text)

  @functools.cached_property
  def seam_word(self) -> str:
    """A single-token word that occurs once in its own generation prompt; shows where the template puts the caption.

    Raises:
      ValueError: the vocabulary has no such word.
    """
    for token in range(len(self.tokenizer)):
      word = self.tokenizer.decode([token])
      if word.isascii() and word.isalpha() and self.encode(word) == [token]:
        if self.generation_prompt(word).count(token) == 1:
          return word
    raise ValueError("the tokenizer has no word of one token that the generation template leaves whole")

  def caption_text(self, tokens: Iterable[int]) -> str:
    """Text of a caption int[L] up to, and without, its closing token."""
    tokens = np.asarray(tokens)
    ends = np.flatnonzero(np.isin(tokens, self.end_ids))
    return self.decode(tokens[: ends[0]] if len(ends) else tokens)

  def caption_rows(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of captions, closed and padded on the right; longer ones are truncated and lack the closing token.

    Args:
      texts: B captions.
      length: L, number of tokens per row.

    Returns:
      (tokens int32[B, L], length int32[B], the number of tokens without padding).
    """
    rows = [[*self.encode(text), self.end_ids[0]][:length] for text in texts]
    return self.pad_rows(rows, length)[0], np.asarray([len(row) for row in rows], np.int32)

  def pad_rows(self, rows: Sequence[Sequence[int]], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of ids on the right.

    Args:
      rows: B lists of ids.
      length: T; default: the length of the longest row.

    Returns:
      (tokens int32[B, T], mask bool[B, T]).

    Raises:
      ValueError: a row is longer than `length`.
    """
    longest = max(map(len, rows), default=0)
    length = longest if length is None else length
    if longest > length:
      raise ValueError(f"a row of {longest} tokens is longer than {length}")
    mask = np.arange(length) < np.asarray([len(row) for row in rows], np.int32)[:, None]
    tokens = np.full(mask.shape, self.pad_id, np.int32)
    tokens[mask] = [token for row in rows for token in row]
    return tokens, mask


def _optional(path: Path) -> dict:
  return json.loads(path.read_text()) if path.is_file() else {}
