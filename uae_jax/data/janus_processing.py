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
# Settings of the image processor that have one supported value. Images are normalized on the device
# (`models.janus.model`).
FIXED_SETTINGS: dict[str, Any] = {
  "do_resize": True,
  "do_rescale": True,
  "do_normalize": True,
  "do_pad": True,
  "do_convert_rgb": True,
  "rescale_factor": 1 / 255,
  "image_mean": [0.5] * 3,
  "image_std": [0.5] * 3,
  "background_color": [127] * 3,
}
# The same for `processor_config.json`: of transformers, and of DeepSeek's VLChatProcessor.
FIXED_PROMPTS: dict[str, Any] = {
  "use_default_system_prompt": False,
  "sft_format": "deepseek",
  "image_tag": "<image_placeholder>",
  "add_special_token": False,
}
BACKGROUND = (127, 127, 127)
# DeepSeek's folders have no template: their code writes this conversation, with the system prompt of `VLChatProcessor`
# if there is an image to read. Its padding is a token of this name, whatever the tokenizer says.
DEEPSEEK_PADDING = "<\uff5c\u2581pad\u2581\uff5c>"
DEEPSEEK_SYSTEM = (
  "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
  "provides, and assist the user with a variety of tasks using natural language."
)
DEEPSEEK_TEMPLATE = (
  "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}"
  + DEEPSEEK_SYSTEM
  + "{{ '\n\n' }}{% endfor %}<|User|>: {% for part in message['content'] %}{% if part['type'] == 'image' %}"
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
    rounds_down: whether the shorter side is rounded down, as by DeepSeek's code, or to the nearest.
  """

  image_px: int
  least_px: int
  rounds_down: bool

  control_tokens: ClassVar[tuple[str, ...]] = ("<image_placeholder>", "<begin_of_image>", "<end_of_image>")
  # Templates of Janus strip the text of a message.
  text_mark: ClassVar[str] = templates.TEXT.strip()
  generation_role: ClassVar[str] = "user"

  @classmethod
  def from_folder(cls, path: str | Path, *, question: str = QUESTION, negative_prompt: str = "") -> Self:
    """As of `Processor`; there is no negative prompt of words."""
    del negative_prompt
    processor = super().from_folder(path, question=question, negative_prompt="")
    padding = processor.tokenizer.get_vocab().get(DEEPSEEK_PADDING)
    is_deepseek = processor_files.image_settings(Path(path))[1].get("image_processor_type") == DEEPSEEK
    return dataclasses.replace(processor, pad_id=padding) if is_deepseek and padding is not None else processor

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
    kind = str(settings.get("image_processor_type") or "").removesuffix("Fast").removesuffix("Pil")
    processor_files.check_fixed(file, settings, FIXED_SETTINGS)
    for name in ("image_mean", "image_std"):
      if settings.get(name) is None:
        raise ValueError(f"{file}: no {name}; its default is that of CLIP, only {FIXED_SETTINGS[name]} is supported")
    processor_files.warn_unknown(file, settings, {*FIXED_SETTINGS, "size", "image_size", "min_size", "resample"})
    side: Any = settings.get("image_size") if kind == DEEPSEEK else _square(file, settings.get("size"))
    whole = path / processor_files.WHOLE_PROCESSOR
    prompts = json_files.read_object(whole, default={})
    processor_files.check_fixed(whole, prompts, FIXED_PROMPTS)
    least, tokens = settings.get("min_size", 14), prompts.get("num_image_tokens", 576)
    found = {
      "image_size" if kind == DEEPSEEK else "size": (file, side),
      "min_size": (file, least),
      "num_image_tokens": (whole, tokens),
    }
    for name, (source, value) in found.items():
      if type(value) is not int or not 0 < value < 2**16:
        raise ValueError(f"{source}: {name} is {value!r:.60}, expected a positive integer")
    resample = settings.get("resample")
    resample = int(Image.Resampling.BICUBIC) if resample is None else resample
    if type(resample) is not int or resample not in set(Image.Resampling):
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
      "rounds_down": kind == DEEPSEEK,
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
    longest = max(image.size)
    if self.rounds_down:
      sides = (int(length / longest * side) for length in image.size)
    else:
      scale = side / longest
      sides = (round(length * scale) for length in image.size)
    width, height = (max(length, self.least_px) for length in sides)
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


def _square(file: Path, size: Any) -> Any:
  """The side of a `size` in the forms of transformers, whose default is 384.

  Raises:
    ValueError: it is no square.
  """
  match size:
    case None:
      return 384
    case int():
      return size
    case {"height": height, "width": width, **others} if height == width and not any(others.values()):
      return height
  raise ValueError(f"{file}: size is {size!r:.100}, expected a square: height and width")
