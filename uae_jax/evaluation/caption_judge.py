"""Unified-Bench, protocol 2: a language model with eyes says which of two captions describes an image better.

Any endpoint that speaks OpenAI's chat completions will do. Every pair is asked in both orders: a verdict counts as a
win only if it names the same caption twice, or once beside a tie; a judge that changes its mind with the order gave a
tie.
Answers are cached on disk by a hash of the whole question. The key comes from an environment variable and is sent to
the endpoint, nowhere else.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import math
import os
from pathlib import Path
import re
import time
from typing import Any
import urllib.error
import urllib.parse
import urllib.request

from tqdm import tqdm

from uae_jax.data.preprocessing import read_image

INSTRUCTION = (
  "Two captions describe the image. Judge which one describes it better: more complete, more precise, and without "
  "anything that the image does not show. Length alone is no merit.\n\n"
  "Caption A:\n{a}\n\nCaption B:\n{b}\n\n"
  "Answer with one line: A, B or TIE."
)
VERDICTS = ("A", "B", "TIE")
REFUSALS = (401, 403, 404)
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
LARGEST_PX = 1024


class JudgeError(ValueError):
  """No verdict about one pair."""


class RefusedError(JudgeError):
  """The endpoint refuses every question: a wrong key, model or address."""


@dataclasses.dataclass(frozen=True)
class Judge:
  """One model at one endpoint.

  Attributes:
    base_url: up to and without `/chat/completions`.
    model: its name there.
    key_variable: environment variable that holds the key; endpoints without keys need none.
    cache: folder of answers, or None.
    retries: further attempts after a failure that may pass.
    timeout_seconds: of one request.
    wait_seconds: before the first retry; doubled at each.
  """

  base_url: str
  model: str
  key_variable: str = "OPENAI_API_KEY"
  cache: Path | None = None
  retries: int = 5
  timeout_seconds: float = 120.0
  wait_seconds: float = 1.0

  def __post_init__(self):
    parts = urllib.parse.urlsplit(self.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
      # A key in the address would end up in messages.
      raise ValueError("the judge's address must be http(s)://host[:port]/path, without a key or name in it")

  def verdict(self, image: str, a: str, b: str) -> str:
    """ "A", "B" or "TIE" for an image (data URI) and two captions.

    Raises:
      JudgeError: no verdict after all retries.
    """
    content = [
      {"type": "image_url", "image_url": {"url": image}},
      {"type": "text", "text": INSTRUCTION.format(a=a, b=b)},
    ]
    question = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    digest = hashlib.sha256(json.dumps([self.base_url, question], sort_keys=True).encode()).hexdigest()
    file = self.cache / f"{digest}.json" if self.cache else None
    if file is not None and file.exists():
      return json.loads(file.read_text())["verdict"]
    for attempt in range(self.retries + 1):
      try:
        answer = self._ask(question)
        found = read_verdict(answer)
        break
      except _PassingError as error:
        if attempt == self.retries:
          raise JudgeError(f"{self.base_url}: {error} (after {attempt + 1} attempts)") from error
        time.sleep(error.wait_seconds or self.wait_seconds * 2**attempt)
    if file is not None:
      file.parent.mkdir(parents=True, exist_ok=True)
      # Whole or not at all: several threads may write the same answer.
      temporary = file.with_suffix(f".{os.getpid()}.{id(question)}.tmp")
      temporary.write_text(json.dumps({"model": self.model, "verdict": found, "answer": answer}))
      temporary.replace(file)
    return found

  def _ask(self, question: Mapping[str, Any]) -> str:
    """One request; the text of the answer."""
    headers = {"Content-Type": "application/json"}
    key = os.environ.get(self.key_variable)
    if key:
      headers["Authorization"] = f"Bearer {key}"
    url = f"{self.base_url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(question).encode(), headers)
    try:
      with OPENER.open(request, timeout=self.timeout_seconds) as response:
        body = json.loads(response.read())
      answer = str(body["choices"][0]["message"]["content"] or "")
      # Answers are kept on disk; an endpoint that echoes the question's headers must not put the key there.
      return answer.replace(key, "[key]") if key else answer
    except urllib.error.HTTPError as error:
      # What the endpoint says is not repeated: some echo parts of the key.
      if error.code in RETRIED:
        raise _PassingError(f"HTTP {error.code}", _retry_after(error)) from None
      kind = RefusedError if error.code in REFUSALS else JudgeError
      raise kind(f"{self.base_url}: HTTP {error.code} for model {self.model}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
      raise _PassingError(str(getattr(error, "reason", error))) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
      raise _PassingError(f"not a chat completion ({type(error).__name__})") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """A redirect would carry the key to another host; it is an error instead."""

  def redirect_request(self, *arguments, **keywords):
    return None


OPENER = urllib.request.build_opener(_NoRedirects)


class _PassingError(Exception):
  """A failure that a retry may cure."""

  def __init__(self, message: str, wait_seconds: float = 0.0):
    super().__init__(message)
    self.wait_seconds = wait_seconds


def _retry_after(error: urllib.error.HTTPError) -> float:
  """Seconds that the endpoint asks to wait, a minute at most."""
  try:
    return min(max(float(error.headers.get("Retry-After", 0)), 0.0), 60.0)
  except ValueError:
    return 0.0


def read_verdict(answer: str) -> str:
  """The last of A, B, TIE that stands in an answer as a word by itself.

  Raises:
    _PassingError: there is none; the model may do better when asked again.
  """
  # An article is no verdict: only a capital letter, or the word tie in any case.
  words = re.findall(r"\b(A|B|[Tt][Ii][Ee])\b", answer)
  if not words:
    raise _PassingError(f"no verdict in the answer {answer[:80]!r}")
  return words[-1].upper()


def both_orders(judge: Judge, image: str, ours: str, theirs: str) -> float:
  """1 if `ours` is better, 0 if `theirs` is, 0.5 for a tie or for a judge that follows the order."""
  first = {"A": 1, "B": -1, "TIE": 0}[judge.verdict(image, ours, theirs)]
  second = {"A": -1, "B": 1, "TIE": 0}[judge.verdict(image, theirs, ours)]
  total = first + second
  return 0.5 if total == 0 else float(total > 0)


@dataclasses.dataclass(frozen=True)
class WinRate:
  """How often the first system's captions are preferred; ties are half a win.

  Attributes:
    wins: clear ones, of every judge.
    ties: all others.
    losses: clear ones, of every judge.
    rate: (wins + ties / 2) / pairs.
    low: of the 95 % confidence interval.
    high: likewise.
  """

  wins: int
  ties: int
  losses: int
  rate: float
  low: float
  high: float

  @classmethod
  def of(cls, outcomes: Sequence[float], z: float = 1.959964) -> "WinRate":
    """Wilson's score interval, which stays inside 0..1 and is honest for few pairs and for rates near the ends."""
    n, total = len(outcomes), sum(outcomes)
    rate = total / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    wins, losses = (sum(outcome == value for outcome in outcomes) for value in (1.0, 0.0))
    return cls(wins, n - wins - losses, losses, rate, max(0.0, middle - half), min(1.0, middle + half))


def compare(
  judge: Judge,
  images: Mapping[str, Path],
  ours: Mapping[str, str],
  theirs: Mapping[str, str],
  *,
  workers: int = 4,
) -> tuple[dict[str, float], dict[str, str]]:
  """Outcomes of every image that both systems captioned.

  Args:
    judge: whom to ask.
    images: key -> file.
    ours: key -> caption of the first system.
    theirs: key -> caption of the second.
    workers: requests at a time.

  Returns:
    (key -> 1, 0.5 or 0; key -> why there is no outcome).

  Raises:
    ValueError: no image has two captions, or the endpoint refuses everything.
  """
  keys = [key for key in images if key in ours and key in theirs]
  if not keys:
    raise ValueError("no image has a caption in both files")
  outcomes, failed = {}, {}
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = {
      pool.submit(lambda key=key: both_orders(judge, data_uri(images[key]), ours[key], theirs[key])): key
      for key in keys
    }
    done: Iterable = concurrent.futures.as_completed(futures)
    for future in tqdm(done, total=len(futures), desc=f"judge {judge.model}", unit="image"):
      try:
        outcomes[futures[future]] = future.result()
      except RefusedError:
        pool.shutdown(cancel_futures=True)
        raise
      except ValueError as error:
        failed[futures[future]] = str(error)
  return {key: outcomes[key] for key in keys if key in outcomes}, failed


def data_uri(file: Path) -> str:
  """A JPEG of at most 1024 pixels a side, so that every endpoint takes it."""
  image = read_image(file)
  image.thumbnail((LARGEST_PX, LARGEST_PX))
  data = io.BytesIO()
  image.save(data, "JPEG", quality=90)
  return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def read_captions(file: Path) -> dict[str, str]:
  """File name of the image -> caption, from the JSON lines of `uae-jax caption`.

  Raises:
    ValueError: a line has no image or caption, or two lines have the same image.
  """
  captions: dict[str, str] = {}
  for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      name, caption = Path(record["image"]).name, record["caption"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(f'{file}:{number}: expected a JSON object with "image" and "caption"') from error
    if name in captions:
      raise ValueError(f"{file}:{number}: a second caption of {name}")
    captions[name] = caption
  return captions


def result(judges: Mapping[str, tuple[dict[str, float], dict[str, str]]]) -> dict[str, Any]:
  """Win rates of every judge and of all together, and each outcome."""
  rates = {name: dataclasses.asdict(WinRate.of(list(o.values()))) if o else None for name, (o, _) in judges.items()}
  # Judges of one image do not make more images: the interval is over images, each with its judges' mean.
  by_image: dict[str, list[float]] = {}
  for outcomes, _ in judges.values():
    for key, value in outcomes.items():
      by_image.setdefault(key, []).append(value)
  means = [sum(values) / len(values) for values in by_image.values()]
  return {
    "judges": rates,
    "overall": dataclasses.asdict(WinRate.of(means)) if means else None,
    "outcomes": {name: outcomes for name, (outcomes, _) in judges.items()},
    "failed": {name: failed for name, (_, failed) in judges.items()},
  }
