"""Options of rewards that have any: text rewards and external reward models."""

import dataclasses

from uae_jax import http_client
from uae_jax.options.base import Options, option

# What a name in `reward_weights` means if it is not an embedder.
TEXT_REWARDS = ("length", "repetition", "format", "truncation")
EXTERNAL = "http"
# KIND_text is the match of image and text under both towers of an embedder.
IMAGE_TEXT = "_text"
# KIND_patches compares the patches of an embedder one by one.
PATCHES = "_patches"
ON_FAILURE = ("drop", "zero", "fail")


def image_text_kind(reward: str) -> str:
  """Kind of the embedder whose two towers give a reward for the match of image and text; "" for other rewards."""
  return reward.removesuffix(IMAGE_TEXT) if reward.endswith(IMAGE_TEXT) else ""


def embedder_of(reward: str) -> str:
  """Kind of the embedder of a similarity, which compares whole images, or patches as KIND_patches."""
  return reward.removesuffix(PATCHES)


def is_similarity(reward: str) -> bool:
  """Whether a reward is an embedder's similarity of reconstruction and original."""
  return reward not in (*TEXT_REWARDS, EXTERNAL) and not image_text_kind(reward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRewardOptions(Options):
  """Rewards computed from the tokens of a caption alone.

  Attributes:
    length_free_tokens: captions up to this length have "length" reward 0; 0 makes it a plain price per token.
    repetition_ngram: n of "repetition".
    forbidden_tokens: token ids that "format" accepts nowhere before the closing token; empty means all that are
      not text. The sampler never draws those.
  """

  length_free_tokens: int = option(0, at_least=0)
  repetition_ngram: int = option(3, at_least=1)
  forbidden_tokens: tuple[int, ...] = ()

  def check(self) -> None:
    if any(token < 0 for token in self.forbidden_tokens):
      raise ValueError(f"forbidden_tokens = {self.forbidden_tokens}: expected ids of 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExternalRewardOptions(Options):
  """A reward model behind HTTP; see `rewards.external` for the protocol.

  Attributes:
    url: http:// or https:// address without a user name, password or key in it; "" for none.
    timeout_seconds: limit of one attempt, from connecting to the last byte.
    retries: attempts after the first one failed.
    backoff_seconds: wait before the first retry; doubles each time, with jitter of up to the same length.
    max_concurrency: groups in flight at the same time, per process.
    num_pieces: pieces in which the prompts of a step are generated, one after the other; while a piece is generated,
      the server rewards the earlier ones. Divides the prompts of each chip. Pieces draw other random numbers than a
      whole step.
    cache_size: number of rollouts whose rewards are kept in memory of each process and not asked for again, by their
      caption, image, original and metadata; 0 asks always, as a server needs that is random or compares the rollouts
      of a group.
    on_failure: a rollout without a finite reward is left out of its group's statistics with advantage 0 ("drop"), gets
      reward 0 ("zero"), or ends the run ("fail"). A server that refuses every group of a batch ends the run under
      each of them.
    max_failed_in_a_row: batches in a row without a single reward, for whatever reason, that end the run.
    sends_images: False sends captions only.
    token_variable: environment variable that holds a bearer token; "" for none.
  """

  url: str = ""
  timeout_seconds: float = option(30.0, at_least=1e-3)
  retries: int = option(3, at_least=0)
  backoff_seconds: float = option(0.5, at_least=0)
  max_concurrency: int = option(8, at_least=1)
  num_pieces: int = option(1, at_least=1)
  cache_size: int = option(0, at_least=0)
  on_failure: str = option("drop", choices=ON_FAILURE)
  max_failed_in_a_row: int = option(5, at_least=1)
  sends_images: bool = True
  token_variable: str = ""

  def check(self) -> None:
    if self.url:
      http_client.check_url("url", self.url)
    if self.token_variable:
      http_client.check_variable("token_variable", self.token_variable)
