"""The captioner's processor: tokenizer, chat template and image sizes, read from a Hugging Face folder.

Source: transformers 5.23 Qwen2_5_VLProcessor and Qwen2VLImageProcessorPil; the demo of PKU-YuanGroup/UAE for the
prompts and the double resizing. Pixels are normalized on the device (`models.qwen25_vl.vision`).
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import itertools
import math
from pathlib import Path
import re
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from uae_jax.data import chat_template as templates
from uae_jax.data import processor_files
from uae_jax.data.images import ImageSource, read_image

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
# The second name is that of early Qwen2.5-VL folders.
IMAGE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
# Settings of an image processor that have one supported value.
FIXED_SETTINGS = {
  "do_resize": True,
  "do_rescale": True,
  "do_normalize": True,
  "do_convert_rgb": True,
  "rescale_factor": 1 / 255,
}
KNOWN_SETTINGS = (
  "size min_pixels max_pixels patch_size merge_size temporal_patch_size resample image_mean image_std".split()
)


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

  # The first one stands for an image, the others are needed too.
  control_tokens: ClassVar[tuple[str, ...]] = ("<|image_pad|>",)
  # What a template writes of a message whose text is `templates.TEXT`.
  text_mark: ClassVar[str] = templates.TEXT
  # Role of the message that an image is generated from.
  generation_role: ClassVar[str] = "generate"

  @classmethod
  def from_folder(cls, path: str | Path, *, question: str = QUESTION, negative_prompt: str = NEGATIVE_PROMPT) -> Self:
    """Reads a processor from a local folder; downloads nothing.

    It reads the tokenizer's files, `preprocessor_config.json` or `processor_config.json` of transformers 5 and, if they
    exist, `chat_template.json`, `chat_template.jinja` and `generation_config.json`.

    Raises:
      ValueError: the folder or a file is missing or cannot be read; the tokenizer has no padding token or no image
        token; the chat template is missing, or has no single place for the image and for the caption.
    """
    path = Path(path)
    if not path.is_dir():
      raise ValueError(f"{path}: no such folder")
    tokenizer = processor_files.read_tokenizer(path)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
      raise ValueError(f"{path}: the tokenizer has no pad_token or no eos_token")
    for token in cls.control_tokens:
      if token not in tokenizer.get_vocab():
        raise ValueError(f"{path}: the tokenizer has no token {token}")
    processor = cls(
      tokenizer=tokenizer,
      chat_template=cls.read_template(path, tokenizer),
      **cls.read_sizes(path),
      pad_id=tokenizer.pad_token_id,
      end_ids=tuple(dict.fromkeys([tokenizer.eos_token_id, *processor_files.end_ids(path)])),
      question=question,
      negative_prompt=negative_prompt,
    )
    try:
      processor.check_templates()
    except ValueError as error:
      raise ValueError(f"{path}: the chat template {error}") from error
    try:
      processor.negative_row()
      processor.generation_prompt(question)
      processor.caption_prompt((processor.merge_size, processor.merge_size))
    except Exception as error:  # Some wrong settings of a tokenizer show only when it is used, with any exception.
      raise ValueError(f"{path}: the tokenizer cannot be used: {processor_files.reason(error)}") from error
    return processor

  @classmethod
  def read_template(cls, path: Path, tokenizer: Any) -> str:
    """The chat template of a folder; raises as `processor_files.chat_template`."""
    return processor_files.chat_template(path, tokenizer)

  @classmethod
  def read_sizes(cls, path: Path) -> dict[str, Any]:
    """Fields from the settings of a folder's image processor.

    Raises:
      ValueError: a setting is missing, is not supported or is no positive integer.
    """
    return _sizes(*processor_files.image_settings(path))

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
      height, width = self.client_size(image.height, image.width)
      image = image.resize((width, height), Image.Resampling.BICUBIC)
    height, width = self.fit(image.height, image.width, self.min_pixels, self.max_pixels)
    return image.resize((width, height), self.resample)

  def client_size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) that the demo's client gives the image processor; unlike `fit`, no side rounds to 0 cells.

    Source: qwen-vl-utils 0.0.14 `smart_resize`.
    """
    area = self.cell_px**2
    return self.fit(height, width, CLIENT_CELLS[0] * area, CLIENT_CELLS[1] * area, fewest_cells=1)

  def fit(self, height: int, width: int, min_pixels: int, max_pixels: int, *, fewest_cells: int = 0) -> tuple[int, int]:
    """(height, width) as multiples of a cell, close to the aspect ratio, with an area between the limits.

    Raises:
      ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
      raise ValueError(f"an image of {width} x {height} pixels is narrower than 1 to {MAX_ASPECT_RATIO}")
    cell = self.cell_px
    # Python's rounding half to even is part of the definition.
    rows, columns = (max(fewest_cells, round(side / cell)) for side in (height, width))
    if rows * columns * cell**2 > max_pixels:
      shrink = math.sqrt(height * width / max_pixels)
      height, width = (max(cell, math.floor(side / shrink / cell) * cell) for side in (height, width))
      return height, width
    if rows * columns * cell**2 < min_pixels:
      grow = math.sqrt(min_pixels / (height * width))
      height, width = (math.ceil(side * grow / cell) * cell for side in (height, width))
      return height, width
    return rows * cell, columns * cell

  def resized_size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) of an image after `resize` with `demo_resize=False`."""
    return self.fit(height, width, self.min_pixels, self.max_pixels)

  # --- Text --------------------------------------------------------------------------------------------------------

  @property
  def vocab_size(self) -> int:
    """Number of tokens of the tokenizer; the vocabulary of a model may be larger."""
    return len(self.tokenizer)

  @property
  def image_token_id(self) -> int:
    return self.tokenizer.convert_tokens_to_ids(self.control_tokens[0])

  @property
  def control_ids(self) -> tuple[int, ...]:
    """Ids of all tokens that are not text: those of images, roles, tools and code files, closing tokens, padding."""
    return tuple(sorted({*self._control_tokens.values(), *self.tokenizer.all_special_ids}))

  def encode(self, text: str) -> list[int]:
    """Token ids of plain text, in which control tokens such as `<|im_end|>` are ordinary characters."""
    # The tokenizer takes apart those that it calls special; a cut after the first character does so with the others.
    cuts = [found.start() + 1 for found in self._other_controls.finditer(text)] if self._other_controls else []
    ids: list[int] = []
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
      ids += self.tokenizer.encode(text[start:end], add_special_tokens=False, split_special_tokens=True)
    if self._never_text.isdisjoint(ids):
      return ids
    # A vocabulary of whole words knows control tokens as words too.
    unknown = self.tokenizer.unk_token_id
    kept = (unknown if i in self._never_text else i for i in ids)
    return [i for i in kept if i is not None]

  @functools.cached_property
  def _control_tokens(self) -> dict[str, int]:
    """Text -> id of the added tokens that are not text, without the one for unknown words.

    A tokenizer calls only some of them special: Qwen2.5-VL's `<|fim_prefix|>` and `<tool_call>`, for example, are not.
    Others are text: DeepSeek's tokenizers add letters such as ü.
    """
    added = self.tokenizer.added_tokens_decoder
    return {
      str(token): i
      for i, token in added.items()
      if (token.special or _is_marker(str(token))) and i != self.tokenizer.unk_token_id
    }

  @functools.cached_property
  def _never_text(self) -> frozenset[int]:
    return frozenset(self._control_tokens.values())

  @functools.cached_property
  def _other_controls(self) -> re.Pattern | None:
    """Finds control tokens that the tokenizer does not call special; None if it has none."""
    added = self.tokenizer.added_tokens_decoder
    texts = [text for text, i in self._control_tokens.items() if not added[i].special]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None

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
    return self._with_image(self._prompt(self._caption_template, self.question), grid)

  def question_prompt(self, grid: tuple[int, int], question: str) -> list[int]:
    """Token ids of the image, then any question, up to where the answer starts: the order of Qwen2.5-VL's own chats.

    Args:
      grid: (rows, columns) of patches.
      question: plain text. A template that has a question of its own, as that of the small world, ignores it.

    Raises:
      ValueError: the grid does not divide into cells.
    """
    template = self._rendered("user", has_image=True, image_first=True)
    return self._with_image(self._prompt(template, question), grid)

  @property
  def ignores_questions(self) -> bool:
    """Whether the chat template has one question of its own in place of the user's, as that of the small world."""
    return self.text_mark not in self._rendered("user", has_image=True, image_first=True)

  def _with_image(self, ids: list[int], grid: tuple[int, int]) -> list[int]:
    """Repeats the image token of a prompt once per cell of the patch grid (rows, columns)."""
    rows, columns = grid
    if rows % self.merge_size or columns % self.merge_size:
      raise ValueError(f"a grid of {rows} x {columns} patches does not divide into cells of {self.merge_size}")
    tokens = rows * columns // self.merge_size**2
    return [i for token in ids for i in ([token] * tokens if token == self.image_token_id else [token])]

  def generation_prompt(self, text: str) -> list[int]:
    """Token ids of the chat that the decoder's context is computed from: one message of role `generate`."""
    return self._prompt(self._generation_template, text)

  def negative_row(self) -> list[int]:
    """Token ids of the negative branch of classifier-free guidance."""
    return self.generation_prompt(self.negative_prompt)

  def check_templates(self) -> None:
    """Renders the chat template for both prompts.

    Raises:
      ValueError: it cannot be rendered, has no single place for image or caption, or changes the text of a message.
    """
    image = self.control_tokens[0]
    roles = (("user", self._caption_template, 1), (self.generation_role, self._generation_template, 0))
    for name, template, num_images in roles:
      found = template.count(image)
      if found != num_images:
        raise ValueError(f"writes {found} times {image} for role {name}, expected {num_images}")
      places, marks = template.count(self.text_mark), template.count(templates.TEXT.strip())
      # A template may have a question of its own, as that of the small world has.
      if places != marks or places > 1 or (places == 0 and num_images == 0):
        raise ValueError(f"changes the text of a message, or does not write it once for role {name}")

  @functools.cached_property
  def _caption_template(self) -> str:
    """The caption prompt, with `templates.TEXT` for the question."""
    return self._rendered("user", has_image=True)

  @functools.cached_property
  def _generation_template(self) -> str:
    """The generation prompt, with `templates.TEXT` for the caption."""
    return self._rendered(self.generation_role, has_image=False)

  def _rendered(self, role: str, *, has_image: bool, image_first: bool = False) -> str:
    names = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return templates.render(
      self.chat_template, role, has_image=has_image, special_tokens=names, image_first=image_first
    )

  def _prompt(self, template: str, text: str) -> list[int]:
    """Token ids of a rendered template, whose control tokens are parsed, around a text, whose are not."""
    longest_first = sorted(self._control_tokens, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", template)
    ids: list[int] = []
    for i, piece in enumerate(pieces):
      # re.split puts the separators at odd places. The text is encoded together with what touches it.
      ids += [self._control_tokens[piece]] if i % 2 else self.encode(piece.replace(self.text_mark, text))
    return ids

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
    rows = [[*self._encode_start(text, length), self.end_ids[0]][:length] for text in texts]
    return self.pad_rows(rows, length)[0], np.asarray([len(row) for row in rows], np.int32)

  def _encode_start(self, text: str, length: int) -> list[int]:
    """At least the first `length` token ids of a text, if it has as many, without tokenizing the rest of a huge one.

    A cut changes only the tokens near it, so it is far beyond the tokens that are used.
    """
    size = 4096 + 64 * length
    ids = self.encode(text[:size])
    while size < len(text) and len(ids) < 2 * length:
      size *= 8
      ids = self.encode(text[:size])
    return ids

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


def _is_marker(text: str) -> bool:
  """Whether an added token looks like markup, such as `<tool_call>` or `[INST]`."""
  return len(text) > 2 and f"{text[0]}{text[-1]}" in ("<>", "[]")


def _sizes(file: Path, settings: dict[str, Any]) -> dict[str, int]:
  """The sizes of an image processor, as fields of `Processor`.

  Raises:
    ValueError: a setting is not supported or no positive integer.
  """
  kind = str(settings.get("image_processor_type") or IMAGE_PROCESSORS[0]).removesuffix("Fast").removesuffix("Pil")
  if kind not in IMAGE_PROCESSORS:
    raise ValueError(f"{file}: image_processor_type is {kind[:60]!r}, expected {IMAGE_PROCESSORS[0]!r}")
  processor_files.check_fixed(file, settings, FIXED_SETTINGS)
  processor_files.warn_unknown(file, settings, {*FIXED_SETTINGS, *KNOWN_SETTINGS})
  size = settings.get("size") or {}
  if not isinstance(size, dict):
    raise ValueError(f"{file}: size is {size!r:.60}, expected shortest_edge and longest_edge")
  sizes = {
    "patch_size": settings.get("patch_size", 14),
    "merge_size": settings.get("merge_size", 2),
    "min_pixels": settings.get("min_pixels") or size.get("shortest_edge", 56 * 56),
    "max_pixels": settings.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
    "resample": settings.get("resample", Image.Resampling.BICUBIC),
  }
  for name, value in sizes.items():
    if type(value) is not int and not isinstance(value, Image.Resampling) or not 0 < value < 2**31:
      raise ValueError(f"{file}: {name} is {value!r:.60}, expected a positive integer")
  if sizes["resample"] not in set(Image.Resampling):
    raise ValueError(f"{file}: resample is {sizes['resample']}, which is no filter of PIL")
  if sizes["min_pixels"] > sizes["max_pixels"]:
    raise ValueError(f"{file}: min_pixels {sizes['min_pixels']} is more than max_pixels {sizes['max_pixels']}")
  return sizes
