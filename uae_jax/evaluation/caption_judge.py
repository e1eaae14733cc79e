"""Unified-Bench, protocol 2: a vision-language model says which of two captions describes an image better.

Any endpoint that speaks OpenAI's chat completions will do. Every pair is asked in both orders: a verdict counts as a
win only if it names the same caption twice, or once beside a tie; a judge that changes its mind with the order gave a
tie.

Answers are cached on disk by a hash of the whole question. The key comes from an environment variable and is sent to
the endpoint, nowhere else.
"""

from collections.abc import Iterable, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
import re
from typing import Any
import urllib.parse

from tqdm import tqdm

from uae_jax import files, http_client
from uae_jax.data.preprocessing import read_image

INSTRUCTION = (
  "Two captions describe the image. Judge which one describes it better: more complete, more precise, and without "
  "anything that the image does not show. Length alone is no merit.\n\n"
  "Caption A:\n{a}\n\nCaption B:\n{b}\n\n"
  "Answer with one line: A, B or TIE."
)
# The endpoint refuses every question: a wrong key, model or address.
REFUSALS = (401, 403, 404)
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
    wait_seconds: before the first retry; it doubles each time, with up to as much again at random.
  """

  base_url: str
  model: str
  key_variable: str = "OPENAI_API_KEY"
  cache: Path | None = None
  retries: int = 5
  timeout_seconds: float = 120.0
  wait_seconds: float = 1.0

  def __post_init__(self):
    http_client.check_url("the judge's address", self.base_url)
    if urllib.parse.urlsplit(self.base_url).query:
      raise ValueError("the judge's address has a query; expected http(s)://host[:port]/path")
    http_client.read_token("the judge's key", self.key_variable, is_required=False)

  @functools.cached_property
  def _client(self) -> http_client.JsonClient:
    token = http_client.read_token("the judge's key", self.key_variable, is_required=False)
    return http_client.JsonClient(f"{self.base_url.rstrip('/')}/chat/completions", self.timeout_seconds, token)

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

    def attempt() -> tuple[str, str]:
      answer = self._ask(question)
      return answer, read_verdict(answer)

    try:
      answer, found = http_client.with_retries(attempt, self.retries, self.wait_seconds)
    except http_client.HttpFailure as error:
      kind = RefusedError if error.status in REFUSALS else JudgeError
      raise kind(f"{self.base_url}: {error} for model {self.model}") from None
    if file is not None:
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write_whole(file, json.dumps({"model": self.model, "verdict": found, "answer": answer}))
    return found

  def _ask(self, question: Mapping[str, Any]) -> str:
    """One request; the text of the answer."""
    answer = self._client.post(question)
    try:
      return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
      raise http_client.PassingError(f"not a chat completion ({type(error).__name__})") from None


# An answer is read line by line, without the marks of Markdown and JSON, and without quotes.
MARKS = re.compile(r"""[*_`~#>"“”\[\](){}]|(?<!\w)['‘’]|['’](?!\w)""")
LABEL = r"(?:(?:my |the |final )*(?:answer|verdict|choice|winner|judge?ment)(?: is)?\s*[:=-]?\s*)?"
ONE = r"(?:caption |option )?(A|B)"
ALONE = re.compile(rf"{LABEL}(?:{ONE}|(?:(?:it is |it['’]s )?a )?(tie))\s*[.!]*", re.IGNORECASE)
BETTER = re.compile(
  rf"{LABEL}{ONE} (?:is|describes the image|describes it) (?:clearly |slightly |much |far )?better than {ONE}\s*[.!]*",
  re.IGNORECASE,
)
# In a sentence, a capital A before a word in lower case is an article unless a verdict may continue with that word.
WORDS = re.compile(r"\b(?:(A)(?! (?!is\b|wins\b|describes\b|because\b)[a-z])|(B)|((?i:tie)))\b")
CHOICE = re.compile(
  r"\b(?:better|best|prefer\w*|superior|wins?|winner|choose|choice|pick|answer|verdict|vote|tie)\b|:\s*(?:A|B)[.!]*$",
  re.I,
)
# One caption may be named in order to reject it, or to compare the other one with it.
REJECTION = re.compile(
  r"\b(?:not|no|never|neither|nor|cannot|hardly|than|over|worse|worst|less|least|loses?|inferior|wrong|incorrect|"
  r"inaccurate|miss\w*|lack\w*|fail\w*|invent\w*|hallucinat\w*|omit\w*|ignor\w*|unlike|without|but|if|unless|"
  r"except|would|could|should|might)\b|n['’]t\b",
  re.IGNORECASE,
)


def read_verdict(answer: str) -> str:
  """ "A", "B" or "TIE", if the answer is clear.

  A clear answer has the verdict alone on a line, or its last line chooses one and names no other, or says that one
  caption is better than the other. Lines that disagree are no verdict.

  Raises:
    PassingError: the answer is not clear; the model may do better when asked again.
  """
  lines = [MARKS.sub("", line).strip(" \t-–—•") for line in re.split(r"[\r\n]+", answer)]
  lines = [line for line in lines if line]
  found = {(match[1] or match[2]).upper() for line in lines if (match := ALONE.fullmatch(line))}
  if lines and (last := _said(lines[-1])):
    found.add(last)
  if len(found) != 1:
    raise http_client.PassingError(f"no clear verdict in the answer {answer[-80:]!r}")
  return found.pop()


def _said(line: str) -> str:
  """The verdict of a sentence; "" if it has none that is clear."""
  if (match := BETTER.fullmatch(line)) and match[1].upper() != match[2].upper():
    return match[1].upper()
  words = {"".join(groups).upper() for groups in WORDS.findall(line)}
  return words.pop() if len(words) == 1 and CHOICE.search(line) and not REJECTION.search(line) else ""


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
  """A JPEG of at most 1024 pixels per side, so that every endpoint takes it."""
  image = read_image(file)
  image.thumbnail((LARGEST_PX, LARGEST_PX))
  return files.data_uri(image, "JPEG", quality=90)


def read_captions(file: Path) -> dict[str, str]:
  """File name of the image -> caption, from the JSON lines of `uae-jax caption`.

  Raises:
    ValueError: a line has no image or caption, or two lines have the same image.
  """
  captions: dict[str, str] = {}
  for number, line in enumerate(files.read_lines(file), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      name, caption = Path(record["image"]).name, record["caption"]
      if not isinstance(caption, str):
        raise TypeError(type(caption).__name__)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(f'{file}:{number}: expected a JSON object with "image" and "caption", both text') from error
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
