"""Unified-Bench, protocol 2: a vision-language model judges which of two captions describes an image better.

Any endpoint with OpenAI's chat completions API can be used. Every pair is judged in both orders. A caption wins if it
is preferred in both orders, or in one order with a tie in the other. If the judge prefers a different caption in each
order, the result is a tie.

Answers are cached on disk by a hash of the whole question. The key is read from an environment variable and sent to the
endpoint only.
"""

from collections.abc import Iterable, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
import re
from typing import Any
import urllib.parse

from tqdm import tqdm

from uae_jax import files, http_client
from uae_jax.data.images import read_image
from uae_jax.evaluation import intervals

INSTRUCTION = (
  "Two captions describe the image. Judge which one describes it better: more complete, more precise, and without "
  "anything that the image does not show. Length alone is no merit.\n\n"
  "Caption A:\n{a}\n\nCaption B:\n{b}\n\n"
  "Answer with one line: A, B or TIE."
)
# HTTP statuses of an endpoint that refuses every question: wrong key, model or address.
REFUSALS = (401, 403, 404)
LARGEST_PX = 1024
VERDICTS = {"A": 1, "B": -1, "TIE": 0}


class JudgeError(ValueError):
  """Raised when there is no verdict for a pair."""


class RefusedError(JudgeError):
  """Raised when the endpoint refuses every question: wrong key, model or address."""


@dataclasses.dataclass(frozen=True)
class Judge:
  """A vision-language model at a chat completions endpoint.

  Attributes:
    base_url: URL of the endpoint without `/chat/completions`.
    model: name of the model at the endpoint.
    key_variable: environment variable that holds the key; may be unset for endpoints without keys.
    cache: folder in which answers are cached; None disables the cache.
    retries: number of further attempts after a transient failure.
    timeout_seconds: limit of one request.
    wait_seconds: wait before the first retry; it doubles each time, with random jitter of up to the same length.
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
    """Judges two captions of an image: "A", "B" or "TIE".

    Args:
      image: data URI.
      a: caption shown as A.
      b: caption shown as B.

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
    if file is not None and (known := _cached(file)):
      return known

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
    """Sends one request and returns the text of the answer."""
    answer = self._client.post(question)
    try:
      return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
      raise http_client.PassingError(f"not a chat completion ({type(error).__name__})") from None


def _cached(file: Path) -> str:
  """The verdict of a cached answer; "" if there is none, or if the file is damaged and the question is asked again."""
  try:
    found = json.loads(file.read_bytes())["verdict"]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return ""
  return found if found in VERDICTS else ""


# Answers are read line by line, after removing quotes and the syntax characters of Markdown and JSON.
MARKS = re.compile(r"""[*_`~#>"“”\[\](){}]|(?<!\w)['‘’]|['’](?!\w)""")
LABEL = r"(?:(?:my |the |final )*(?:answer|verdict|choice|winner|judge?ment)(?: is)?\s*[:=-]?\s*)?"
ONE = r"(?:caption |option )?(A|B)"
ALONE = re.compile(rf"{LABEL}(?:{ONE}|(?:(?:it is |it['’]s )?a )?(tie))\s*[.!]*", re.IGNORECASE)
BETTER = re.compile(
  rf"{LABEL}{ONE} (?:is|describes the image|describes it) (?:clearly |slightly |much |far )?better than {ONE}\s*[.!]*",
  re.IGNORECASE,
)
# In a sentence, "A" before a lower-case word is taken for the article, unless a verdict could continue with that word.
WORDS = re.compile(r"\b(?:(A)(?! (?!is\b|wins\b|describes\b|because\b)[a-z])|(B)|((?i:tie)))\b")
CHOICE = re.compile(
  r"\b(?:better|best|prefer\w*|superior|wins?|winner|choose|choice|pick|answer|verdict|vote|tie)\b|:\s*(?:A|B)[.!]*$",
  re.I,
)
# A sentence with one of these words may name a caption in order to reject it or to compare it with the other one.
REJECTION = re.compile(
  r"\b(?:not|no|never|neither|nor|cannot|hardly|than|over|worse|worst|less|least|loses?|inferior|wrong|incorrect|"
  r"inaccurate|miss\w*|lack\w*|fail\w*|invent\w*|hallucinat\w*|omit\w*|ignor\w*|unlike|without|but|if|unless|"
  r"except|would|could|should|might)\b|n['’]t\b",
  re.IGNORECASE,
)


def read_verdict(answer: str) -> str:
  """Reads the verdict "A", "B" or "TIE" from a clear answer.

  An answer is clear if it has the verdict alone on a line, or if its last line chooses one verdict and names no other,
  or says that one caption is better than the other. Lines that contradict each other are not a verdict.

  Raises:
    PassingError: the answer is not clear; another request may give a clear one.
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
  """Reads the verdict of a sentence; "" if it has no clear one."""
  if (match := BETTER.fullmatch(line)) and match[1].upper() != match[2].upper():
    return match[1].upper()
  words = {"".join(groups).upper() for groups in WORDS.findall(line)}
  return words.pop() if len(words) == 1 and CHOICE.search(line) and not REJECTION.search(line) else ""


def both_orders(judge: Judge, image: str, ours: str, theirs: str) -> float:
  """Returns 1 if `ours` is better, 0 if `theirs` is, 0.5 for a tie or if the verdicts depend on the order."""
  total = VERDICTS[judge.verdict(image, ours, theirs)] - VERDICTS[judge.verdict(image, theirs, ours)]
  return 0.5 if total == 0 else float(total > 0)


@dataclasses.dataclass(frozen=True)
class WinRate:
  """Win rate of the first system's captions; a tie counts as half a win.

  Attributes:
    wins: number of outcomes of exactly 1.
    ties: number of all other outcomes.
    losses: number of outcomes of exactly 0.
    rate: mean outcome, in 0..1.
    low: lower end of the 95 % confidence interval.
    high: upper end of the 95 % confidence interval.
  """

  wins: int
  ties: int
  losses: int
  rate: float
  low: float
  high: float

  @classmethod
  def of(cls, outcomes: Sequence[float]) -> "WinRate":
    """Computes the win rate with Wilson's score interval, from outcomes in 0..1, one per image."""
    n = len(outcomes)
    wins, losses = (sum(outcome == value for outcome in outcomes) for value in (1.0, 0.0))
    return cls(wins, n - wins - losses, losses, sum(outcomes) / n, *intervals.wilson(outcomes))


def compare(
  judge: Judge,
  images: Mapping[str, Path],
  ours: Mapping[str, str],
  theirs: Mapping[str, str],
  *,
  workers: int = 4,
) -> tuple[dict[str, float], dict[str, str]]:
  """Judges every image that has a caption of both systems.

  Args:
    judge: the model that judges.
    images: key -> file.
    ours: key -> caption of the first system.
    theirs: key -> caption of the second system.
    workers: number of images judged at the same time.

  Returns:
    (key -> outcome 1, 0.5 or 0, see `both_orders`; key -> error message where there is no outcome).

  Raises:
    ValueError: no image has two captions, or the endpoint refuses everything.
  """
  keys = [key for key in images if key in ours and key in theirs]
  if not keys:
    raise ValueError("no image has a caption in both files")

  def outcome(key: str) -> float:
    return both_orders(judge, data_uri(images[key]), ours[key], theirs[key])

  outcomes, failed = {}, {}
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = {pool.submit(outcome, key): key for key in keys}
    done: Iterable = concurrent.futures.as_completed(futures)
    for future in tqdm(done, total=len(futures), desc=f"judge {judge.model}", unit="image"):
      try:
        outcomes[futures[future]] = future.result()
      except RefusedError:
        pool.shutdown(cancel_futures=True)
        raise
      except Exception as error:  # One image that cannot be judged, such as a damaged one, must not end the others.
        failed[futures[future]] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
  return {key: outcomes[key] for key in keys if key in outcomes}, failed


def data_uri(file: Path) -> str:
  """Encodes an image as a JPEG of at most 1024 pixels per side, which every endpoint accepts."""
  image = read_image(file)
  image.thumbnail((LARGEST_PX, LARGEST_PX))
  return files.data_uri(image, "JPEG", quality=90)


def read_captions(file: Path) -> dict[str, str]:
  """Reads {file name of the image: caption} from the JSON lines of `uae-jax caption`.

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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise ValueError(f'{file}:{number}: expected a JSON object with "image" and "caption", both text') from error
    if name in captions:
      raise ValueError(f"{file}:{number}: a second caption of {name}")
    captions[name] = caption
  return captions


def result(judges: Mapping[str, tuple[dict[str, float], dict[str, str]]]) -> dict[str, Any]:
  """Builds the result file: win rates of each judge and of all judges together, all outcomes, and all failures.

  Args:
    judges: name of the judge -> result of `compare`.
  """
  rates = {name: dataclasses.asdict(WinRate.of(list(o.values()))) if o else None for name, (o, _) in judges.items()}
  # Several judges do not add images, so the overall interval is over images, each with the mean of its judges.
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
