"""Requests of OpenAI's API, checked field by field: what the model cannot do is refused, never ignored.

Sources: platform.openai.com/docs/api-reference, chat completions and images; `top_k`, `min_p` and `repetition_penalty`
as in vLLM's server. `steps`, `guidance` and `guidance_interval` are our own.
"""

import base64
import binascii
from collections.abc import Callable, Mapping
import dataclasses
import io
import math
import re
import threading
from typing import Any

from PIL import Image

from uae_jax.data.images import START_BYTES, open_image, read_image, why_unreadable
from uae_jax.files import SURROGATES
from uae_jax.options.sampling import LARGEST_SEED, MAX_TEXT_CHARACTERS, GenerationOptions

MAX_COUNT = 10
MAX_STEPS = 1000
MAX_IMAGE_PIXELS = 50_000_000
# Fields that say nothing about the result, and fields of which only these values are understood.
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "stream_options", "service_tier"}
FIXED: Mapping[str, tuple] = {
  "stream": (False,),
  "frequency_penalty": (0,),
  "presence_penalty": (0,),
  "logprobs": (False,),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "stop": ([],),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
}
FIXED_IMAGES: Mapping[str, tuple] = {
  "stream": (False,),
  "response_format": ("b64_json",),
  "output_format": ("png",),
  "quality": ("auto", "standard"),
  "background": ("auto", "opaque"),
  "moderation": ("auto", "low"),
}
# Decoded images are large; more threads than these wait.
_DECODING = threading.BoundedSemaphore(4)


class RequestError(Exception):
  """A request that gets an error in place of a result.

  Attributes:
    status: HTTP status.
    param: field of the request that is wrong; None if it is not one field.
    code: OpenAI's code of the error, or None.
  """

  def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.param, self.code = status, param, code

  @property
  def body(self) -> dict:
    """The error in OpenAI's form."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
    kind = kind if self.status < 500 else "server_error"
    return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
  """One request whose fields are valid.

  Attributes:
    kind: "chat" or "image".
    text: the question, or the prompt.
    image: image of a question; None for a prompt.
    count: number of results, `n`.
    seed: seed of the client, or None.
    settings: further arguments of the model's method; requests of equal settings share a batch.
  """

  kind: str
  text: str
  image: Image.Image | None = None
  count: int = 1
  seed: int | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def group(self) -> tuple:
    """Equal for requests that one call of the model can answer."""
    return self.kind, self.seed, tuple(sorted(self.settings.items()))


def chat(body: Mapping[str, Any], model: str, max_new_tokens: int) -> Request:
  """Checks a request for chat completions: one user message with one image.

  Args:
    body: the decoded request.
    model: name of the served model.
    max_new_tokens: most tokens of an answer; a higher limit of the client is lowered to this.

  Raises:
    RequestError: a field is missing, unknown or invalid.
  """
  fields = _Fields(body, FIXED)
  fields.check_model(model)
  text, image = _message(fields.take("messages", list))
  wanted = [fields.number(name, int, at_least=1) for name in ("max_completion_tokens", "max_tokens")]
  settings = {
    "max_new_tokens": min([max_new_tokens, *(limit for limit in wanted if limit is not None)]),
    "temperature": fields.number("temperature", float, at_least=0, at_most=100),
    "top_p": fields.number("top_p", float, more_than=0, at_most=1),
    "top_k": fields.number("top_k", int, at_least=0),
    "min_p": fields.number("min_p", float, at_least=0, at_most=1),
    "repetition_penalty": fields.number("repetition_penalty", float, more_than=0),
  }
  return fields.request("chat", text, settings, image)


def image(body: Mapping[str, Any], model: str, check_size: Callable[[int, int], Any]) -> Request:
  """Checks a request for image generations.

  Args:
    body: the decoded request.
    model: name of the served model.
    check_size: (height, width in pixels) -> None; raises `ValueError` for a size that the model does not have.

  Raises:
    RequestError: a field is missing, unknown or invalid.
  """
  fields = _Fields(body, FIXED_IMAGES)
  fields.check_model(model)
  prompt = _text(fields.take("prompt", str), "prompt")
  settings: dict[str, Any] = {
    "steps": fields.number("steps", int, at_least=1, at_most=MAX_STEPS),
    "guidance": fields.number("guidance", float, more_than=0, at_most=1000),
  }
  interval = fields.take("guidance_interval", list, None)
  if interval is not None:
    try:
      # Without a guidance of its own the request has that of the model, which checks it against the interval.
      options = GenerationOptions(guidance=settings["guidance"] or math.e, guidance_interval=interval)
    except ValueError as error:
      raise RequestError(str(error), param="guidance_interval") from error
    settings["guidance_interval"] = options.guidance_interval
  size = fields.take("size", str, "auto")
  if size != "auto":
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match:
      raise RequestError(f"size = {size!r}: expected WIDTHxHEIGHT in pixels, or auto", param="size")
    settings |= {"width": int(match[1]), "height": int(match[2])}
    try:
      check_size(settings["height"], settings["width"])
    except ValueError as error:
      raise RequestError(f"size = {size!r}: {error}", param="size") from error
  return fields.request("image", prompt, settings)


_REQUIRED = object()


class _Fields:
  """The fields of a request, taken one by one; what is left over in the end is unknown."""

  def __init__(self, body: Mapping[str, Any], fixed: Mapping[str, tuple]):
    self._left = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name, values in fixed.items():
      found = self._left.pop(name, values[0])
      if found not in values:
        expected = " or ".join(repr(value) for value in values)
        raise RequestError(f"{name} = {str(found)[:100]!r} is not supported; expected {expected}", param=name)

  def take(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
    value = self._left.pop(name, default)
    if value is _REQUIRED:
      raise RequestError(f"{name} is missing", param=name)
    if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
      raise RequestError(f"{name}: found {type(value).__name__}, expected another type", param=name)
    return value

  def number(
    self,
    name: str,
    kind: type,
    *,
    at_least: float = -math.inf,
    more_than: float = -math.inf,
    at_most: float = math.inf,
  ) -> Any:
    value = self.take(name, (int, float) if kind is float else int, None)
    if value is not None and not (math.isfinite(value) and at_least <= value <= at_most and value > more_than):
      raise RequestError(f"{name} = {value}: out of range", param=name)
    return value if value is None else kind(value)

  def check_model(self, model: str) -> None:
    found = self.take("model", str, model)
    if found != model:
      message = f"no model {found[:100]!r}; this server has {model!r}"
      raise RequestError(message, status=404, param="model", code="model_not_found")

  def request(self, kind: str, text: str, settings: Mapping[str, Any], image: Image.Image | None = None) -> Request:
    count, seed = self.number("n", int, at_least=1, at_most=MAX_COUNT), self.number("seed", int)
    if self._left:
      name = next(iter(self._left))
      raise RequestError(f"{name[:100]} is not supported", param=name[:100], code="unknown_parameter")
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
      raise RequestError(f"seed = {seed}: expected 0 to {LARGEST_SEED}", param="seed")
    given = {name: value for name, value in settings.items() if value is not None}
    return Request(kind=kind, text=text, image=image, count=count or 1, seed=seed, settings=given)


def _text(text: str, name: str) -> str:
  if not text.strip():
    raise RequestError(f"{name} is empty", param=name)
  if SURROGATES.search(text):
    raise RequestError(f"{name} has characters that are not Unicode text", param=name)
  if len(text) > MAX_TEXT_CHARACTERS:
    message = f"{name} has {len(text)} characters, expected {MAX_TEXT_CHARACTERS} or fewer"
    raise RequestError(message, param=name, code="string_above_max_length")
  return text


def _message(messages: list) -> tuple[str, Image.Image]:
  """The question and the image of the only message; several texts become lines of one question."""

  def refuse(found: str) -> RequestError:
    return RequestError(f"messages: {found}; expected one user message with a text and an image", param="messages")

  if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != "user":
    roles = [str(message.get("role"))[:20] if isinstance(message, dict) else "?" for message in messages[:10]]
    raise refuse(f"{len(messages)} of the roles {', '.join(roles)}")
  content = messages[0].get("content")
  texts: list[str] = []
  urls: list[str] = []
  for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image_url"):
      raise refuse(f"a part of type {str(kind)[:20]}")
    value = part.get(kind)
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str):
      raise refuse(f"a part of type {kind} without {kind}")
    (texts if kind == "text" else urls).append(url)
  if len(urls) != 1:
    raise refuse(f"{len(urls)} images")
  return _text("\n".join(texts), "messages"), _image_of(urls[0])


def _image_of(url: str) -> Image.Image:
  """Decodes a data URL; addresses are not fetched, or anyone could make this machine ask hosts behind its firewall."""
  head, comma, data = url.partition(",")
  if not (comma and re.fullmatch(r"data:image/[\w.+-]+;base64", head)):
    raise RequestError("image_url: expected data:image/...;base64,...; addresses are not fetched", param="messages")
  with _DECODING:
    try:
      content = base64.b64decode(data, validate=True)
      file = open_image(io.BytesIO(content))
      if file.width * file.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{file.width} x {file.height} px, expected {MAX_IMAGE_PIXELS} pixels or fewer")
      return read_image(file)
    except binascii.Error as error:
      raise RequestError("image_url: not base64", param="messages") from error
    except Exception as error:  # PIL's decoders raise a dozen exception types for corrupt files.
      raise RequestError(
        f"image_url: not a readable image ({why_unreadable(content[:START_BYTES], error)})",
        param="messages",
        code="invalid_image",
      ) from error
