"""The processor of Janus: images padded to a square of one size, and prompts that begin images.

Source: transformers 5.23 JanusProcessor and JanusImageProcessorPil; DeepSeek's VLChatProcessor.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image

from uae_jax import json_files
from uae_jax.data import chat_template as templates
from uae_jax.data import processor_files
from uae_jax.data.images import ImageSource, read_image
from uae_jax.data.processing import QUESTION, Processor

DEEPSEEK = "VLMImageProcessor"
IMAGE_PROCESSORS = ("JanusImageProcessor", DEEPSEEK)
# Setting -> supported values, the first one by default. Images are normalized on the device (`models.janus.model`).
FIXED_SETTINGS: dict[str, tuple] = {
  "do_resize": (True,),
  "do_rescale": (True,),
  "do_normalize": (True, None),
  "do_pad": (True, None),
  "do_convert_rgb": (True, None),
  "image_mean": ([0.5, 0.5, 0.5],),
  "image_std": ([0.5, 0.5, 0.5],),
  "background_color": ([127, 127, 127], None),
}
BACKGROUND = (127, 127, 127)
# DeepSeek's folders have no template: their code writes this conversation.
DEEPSEEK_TEMPLATE = (
  "{% for message in messages %}<|User|>: {% for part in message['content'] %}{% if part['type'] == 'image' %}"
  "<image_placeholder>{% else %}{{ part['text'].strip() }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}"
  "{% endfor %}{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class JanusProcessor(Processor):
  """Converts text to token ids and back, and images to the one size that Janus reads.

  The negative prompt of its classifier-free guidance is padding.

  Attributes:
    image_px: side of every image, in pixels.
    least_px: the shorter side of an image is never resized to less, in pixels.
  """

  image_px: int
  least_px: int

  control_tokens: ClassVar[tuple[str, ...]] = ("<image_placeholder>", "<begin_of_image>", "<end_of_image>")
  # Templates of Janus strip the text of a message.
  text_mark: ClassVar[str] = templates.TEXT.strip()
  generation_role: ClassVar[str] = "user"

  @classmethod
  def from_folder(cls, path: str | Path, *, question: str = QUESTION, negative_prompt: str = "") -> Self:
    """As of `Processor`; there is no negative prompt of words."""
    del negative_prompt
    return super().from_folder(path, question=question, negative_prompt="")

  @classmethod
  def read_template(cls, path: Path, tokenizer: Any) -> str:
    """The chat template of a folder; that of DeepSeek's code for a folder of DeepSeek."""
    _, settings = processor_files.image_settings(path)
    is_deepseek = settings.get("image_processor_type") == DEEPSEEK
    return DEEPSEEK_TEMPLATE if is_deepseek else processor_files.chat_template(path, tokenizer)

  @classmethod
  def read_sizes(cls, path: Path) -> dict[str, Any]:
    """Fields from the settings of the image processor and `num_image_tokens`.

    Raises:
      ValueError: a setting is missing or not supported.
    """
    file, settings = processor_files.image_settings(path)
    for name, values in FIXED_SETTINGS.items():
      if settings.get(name, values[0]) not in values:
        raise ValueError(f"{file}: {name} is {settings[name]!r:.100}, only {values[0]!r} is supported")
    size = settings.get("size") or {}
    side = settings.get("image_size") or (size.get("height") if isinstance(size, dict) else None) or 384
    least, resample = settings.get("min_size", 14), settings.get("resample", Image.Resampling.BICUBIC)
    tokens = json_files.read_object(path / processor_files.WHOLE_PROCESSOR, default={}).get("num_image_tokens", 576)
    for name, value in {"size": side, "min_size": least, "num_image_tokens": tokens}.items():
      if type(value) is not int or not 0 < value < 2**16:
        raise ValueError(f"{file}: {name} is {value!r:.60}, expected a positive integer")
    if isinstance(size, dict) and size.get("width", side) != side:
      raise ValueError(f"{file}: size is {size!r:.100}, expected a square")
    if resample not in set(Image.Resampling):
      raise ValueError(f"{file}: resample is {resample!r:.60}, which is no filter of PIL")
    grid = math.isqrt(tokens)
    if grid**2 != tokens or side % grid:
      raise ValueError(f"{file}: {tokens} tokens (num_image_tokens) do not fill an image of {side} x {side} pixels")
    return {
      "patch_size": side // grid,
      "merge_size": 1,
      "min_pixels": side**2,
      "max_pixels": side**2,
      "resample": resample,
      "image_px": side,
      "least_px": least,
    }

  def resize(self, image: ImageSource, *, demo_resize: bool = True) -> Image.Image:
    """Resizes an image so that its longer side is `image_px`, and pads it with gray to a square.

    Args:
      image: a PIL image of any mode and size, a path, or uint8[H, W, 3].
      demo_resize: not used; there is one way to resize.

    Raises:
      ValueError: the file cannot be read; the message names it.
    """
    del demo_resize
    image, side = read_image(image), self.image_px
    scale = side / max(image.size)
    width, height = (max(round(length * scale), self.least_px) for length in image.size)
    image = image.resize((width, height), self.resample)
    if width == height:
      return image
    square = Image.new("RGB", (max(width, height),) * 2, BACKGROUND)
    square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
    return square

  def resized_size(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) of every image after `resize`."""
    del height, width
    return self.image_px, self.image_px

  @functools.cached_property
  def _caption_template(self) -> str:
    """The caption prompt, the image before the question as in all examples of Janus."""
    return self._rendered("user", has_image=True, image_first=True)

  @functools.cached_property
  def _begin(self) -> list[int]:
    """Ids with which the tokenizer begins every text."""
    return self.tokenizer.encode("", add_special_tokens=True)

  def _prompt(self, template: str, text: str) -> list[int]:
    return [*self._begin, *super()._prompt(template, text.strip())]

  def _with_image(self, ids: list[int], grid: tuple[int, int]) -> list[int]:
    """As of `Processor`, and with the tokens that begin and end an image."""
    _, begin, end = self.tokenizer.convert_tokens_to_ids(list(self.control_tokens))
    marked = [i for token in ids for i in ((begin, token, end) if token == self.image_token_id else (token,))]
    return super()._with_image(marked, grid)

  def generation_prompt(self, text: str) -> list[int]:
    """Token ids of one message of the user and the start of the answer, up to where the image starts."""
    return [*super().generation_prompt(text), self.tokenizer.convert_tokens_to_ids(self.control_tokens[1])]

  def negative_row(self) -> list[int]:
    """Padding, see `rollouts.image_tokens.negative_prompts`."""
    return [self.pad_id]
