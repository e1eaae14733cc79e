"""Text rewards equal their definitions on lists; an ensemble adds, measures and refuses; external rewards may fail."""

import base64
import contextlib
import dataclasses
import functools
import http.server
import io
import json
from pathlib import Path
import threading
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from configs import scenes
from uae_jax.data.processing import Processor
from uae_jax.embedders.in_graph import EmbeddingNetwork
from uae_jax.embedders.kind import published
from uae_jax.networks import Networks
from uae_jax.options import (
  TEXT_REWARDS,
  AdvantageOptions,
  ExternalRewardOptions,
  RewardOptions,
  TextRewardOptions,
  read_config,
)
from uae_jax.rewards.ensemble import Ensemble
from uae_jax.rewards.external import Answer, ExternalReward, RewardError
from uae_jax.rewards.text import text_reward
from uae_jax.training.rl import external, host_rewards
from uae_jax.training.rl.host_rewards import RewardInputs
from uae_jax.training.rl.phases import Phases, compose
from uae_jax.training.stage import phased_step
from uae_jax.training.state import create
from uae_jax.training.validate import validate

pytestmark = pytest.mark.fast

CONFIGS = Path(__file__).parents[2] / "configs"
BUDGET, END, CONTROL = 8, 0, 9
CAPTIONS = [[], [1], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1, 1, 1, 1], [3, 4, 5], [3, CONTROL, 5], [1, 2, 3, 4, 5, 6, 7]]


def rows(captions=CAPTIONS):
  """(tokens, mask, is_closed) as in a rollout; a caption that uses the whole budget is not closed."""
  tokens = np.full((1, len(captions), BUDGET), 8, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, kept, caption in zip(tokens[0], mask[0], captions, strict=True):
    written = [*caption, END][:BUDGET]
    row[: len(written)], kept[: len(written)] = written, True
  return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray([[len(caption) < BUDGET for caption in captions]])


def by_hand(name, caption, free, n):
  if name == "length":
    return -min(max((len(caption) - free) / (BUDGET - free), 0), 1)
  if name == "repetition":
    ngrams = [tuple(caption[i : i + n]) for i in range(len(caption) - n + 1)]
    return -(len(ngrams) - len(set(ngrams))) / max(len(ngrams), 1)
  if name == "format":
    return float(0 < len(caption) < BUDGET and CONTROL not in caption)
  return -float(len(caption) >= BUDGET)


@pytest.mark.parametrize(("free", "n"), [(0, 1), (3, 2), (5, 3), (2, 9)])
@pytest.mark.parametrize("name", TEXT_REWARDS)
def test_text_rewards_equal_their_definitions(name, free, n):
  options = TextRewardOptions(length_free_tokens=free, repetition_ngram=n, forbidden_tokens=(CONTROL,))
  expected = [by_hand(name, caption, free, n) for caption in CAPTIONS]
  np.testing.assert_allclose(text_reward(name, options, *rows())[0], expected, atol=1e-6)


def test_padding_does_not_matter_to_text_rewards():
  tokens, mask, is_closed = rows()
  other = jnp.where(mask, tokens, CONTROL)
  for name in TEXT_REWARDS:
    options = TextRewardOptions(repetition_ngram=2, forbidden_tokens=(CONTROL,))
    np.testing.assert_array_equal(
      text_reward(name, options, tokens, mask, is_closed), text_reward(name, options, other, mask, is_closed)
    )


def embed(name, images):
  """Channel sums, scaled by a factor of the embedder's name."""
  values = jnp.sum(images, axis=(1, 2)) * (jnp.arange(3) + len(name))
  return values / jnp.linalg.norm(values, axis=-1, keepdims=True)


def test_an_ensemble_measures_every_reward_and_pays_for_the_weighted():
  random = np.random.default_rng(0)
  images, reconstructions = (jnp.asarray(random.normal(size=(n, 4, 4, 3)), jnp.float32) for n in (1, len(CAPTIONS)))
  ensemble = Ensemble((("clip", 1.0), ("length", 0.5), ("repetition", 0.0)), "dinov2")
  rewards, measured = ensemble.measure(embed, images, reconstructions, rows())
  assert set(rewards) == {"clip", "length", "repetition"} and "held_out_reward" in measured
  np.testing.assert_allclose(rewards["clip"][0], embed("clip", reconstructions) @ embed("clip", images)[0], atol=1e-6)
  values, metrics = ensemble.advantages(rewards, AdvantageOptions(scale="none"))
  total = np.asarray(rewards["clip"] + 0.5 * rewards["length"])
  np.testing.assert_allclose(values, total - total.mean(), atol=1e-5)
  assert metrics["reward"] == pytest.approx(total.mean(), abs=1e-6)
  assert metrics["reward_std_in_group"] == pytest.approx(total.std(), rel=1e-5)
  assert metrics["reward_repetition"] == pytest.approx(float(np.mean(rewards["repetition"])), abs=1e-6)
  assert metrics["reward_max"] == pytest.approx(total.max(), abs=1e-6)


def test_patches_are_compared_one_by_one():
  """A network of the run; half of the picture is changed."""
  size = published("dinov2")
  small = dataclasses.replace(size.network, image_px=32, patch=8, width=16, depth=1, num_heads=2, mlp_width=16)
  size = dataclasses.replace(size, network=small, image_px=32)
  graphdef, state = nnx.split(size.build(nnx.Rngs(0)))
  params = nnx.to_pure_dict(state)
  network = EmbeddingNetwork("dinov2", graphdef, size.image_px, size.mean, size.std)
  images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1.0)
  changed = images.at[:, 16:].set(0.5)

  def states(images):
    pixels = (0.5 * images + 0.5 - jnp.asarray(size.mean)) / jnp.asarray(size.std)
    found = nnx.merge(graphdef, params).patch_states(pixels)
    return found / jnp.linalg.norm(found, axis=-1, keepdims=True)

  each = jnp.sum(states(images) * states(changed), axis=-1)
  assert each.shape == (2, 16)
  networks = Networks(graphdef, None, {"dinov2": network})
  embed = functools.partial(networks.embed, {"embedders": {"dinov2": params}})
  ensemble = Ensemble((("dinov2_patches", 1.0),))
  ensemble.check(("dinov2",))
  rewards, _ = ensemble.measure(embed, images, changed)
  np.testing.assert_allclose(rewards["dinov2_patches"][:, 0], jnp.mean(each, axis=1), atol=1e-5)
  same, _ = ensemble.measure(embed, images, images)
  np.testing.assert_allclose(same["dinov2_patches"], 1.0, atol=1e-5)


def test_a_judge_that_is_only_measured_may_fail_without_harm():
  rewards = {"clip": jnp.array([[0.1, 0.4]]), "http": jnp.array([[np.nan, 1.0]])}
  measured = Ensemble((("clip", 1.0), ("http", 0.0)))
  values, metrics = measured.advantages(rewards, AdvantageOptions())
  assert np.all(np.asarray(values) != 0) and metrics["external_failures"] == 0.5 and metrics["reward_http"] == 1.0
  values, _ = Ensemble((("clip", 1.0), ("http", 1.0))).advantages(rewards, AdvantageOptions())
  assert not np.any(values)


@pytest.mark.parametrize(
  ("refused", "message"),
  [
    (lambda: Ensemble((("clip", 1.0), ("dinov2", 1.0)), "dinov2"), "reward hacking"),
    (lambda: Ensemble((("clip", 1.0), ("clip", 1.0))), "named twice"),
    (lambda: Ensemble((("dinov2_patches", 1.0),), "dinov2"), "reward hacking"),
    (lambda: RewardOptions(reward_weights=(("dinov2_patches", 1.0),), held_out_embedder="dinov2"), "reward hacking"),
    (lambda: Ensemble((("dinov3_patches", 1.0),)).check(("clip", "dinov2")), "dinov3_patches"),
    (lambda: Ensemble((("clip", 0.0),)), "nothing to learn"),
    (lambda: Ensemble((("clop", 1.0),)).check(("clip", "dinov2")), "clop"),
    (lambda: Ensemble((("clip", 1.0),), "dinov3").check(("clip", "dinov2")), "dinov3"),
    (lambda: TextRewardOptions(repetition_ngram=0), "repetition_ngram"),
    (lambda: text_reward("length", TextRewardOptions(length_free_tokens=BUDGET), *rows()), "leaves nothing"),
    (lambda: ExternalReward(ExternalRewardOptions()), "url is empty"),
    (lambda: ExternalRewardOptions(url="ftp://judge"), "expected http"),
    (lambda: ExternalRewardOptions(url="http://name:word@host/score"), "password"),
    (lambda: ExternalRewardOptions(url="http://host/score?api_key=1"), "looks like a key"),
    (lambda: ExternalRewardOptions(retries=-1), "retries"),
    (lambda: ExternalRewardOptions(on_failure="skip"), "on_failure"),
    (
      lambda: ExternalReward(ExternalRewardOptions(url="http://host", token_variable="NO_SUCH_VARIABLE_HERE")),
      "NO_SUCH_VARIABLE_HERE",
    ),
  ],
)
def test_wrong_options_are_refused(refused, message):
  with pytest.raises(ValueError, match=message):
    refused()


# --- The external reward ----------------------------------------------------------------------------------------------


class Judge(http.server.BaseHTTPRequestHandler):
  """A server that rewards a caption by its length; `server.script` lists the failures that come first."""

  def do_POST(self):
    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with self.server.lock:
      self.server.requests.append((request, dict(self.headers)))
      self.server.open += 1
      self.server.most_open = max(self.server.most_open, self.server.open)
      fault = self.server.script.pop(0) if self.server.script else None
    rewards = [float(len(caption)) for caption in request["captions"]]
    status, body = 200, json.dumps({"rewards": rewards})
    if isinstance(fault, int):
      status, body = fault, ""
    elif isinstance(fault, str):
      body = fault
    elif fault is not None:
      fault(self, rewards)
      body = json.dumps({"rewards": rewards})
    with contextlib.suppress(OSError):
      self.send_response(status)
      self.end_headers()
      self.wfile.write(body.encode())
    with self.server.lock:
      self.server.open -= 1

  def log_message(self, *arguments):
    del arguments


@pytest.fixture
def judge(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
  server.script, server.requests, server.lock, server.open, server.most_open = [], [], threading.Lock(), 0, 0
  server.url = f"http://127.0.0.1:{server.server_address[1]}/score"
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  yield server
  server.shutdown()
  server.server_close()
  thread.join()


def ask(judge, captions=(("a", "bcd"),), **options):
  fields = dict(url=judge.url, timeout_seconds=5.0, retries=2, backoff_seconds=0.01) | options
  originals = np.zeros((len(captions), 2, 2, 3), np.uint8)
  reconstructions = np.full((len(captions), len(captions[0]), 2, 2, 3), 200, np.uint8)
  return ExternalReward(ExternalRewardOptions(**fields))(captions, originals, reconstructions)


def test_groups_are_judged_with_their_pictures_at_the_same_time(judge, monkeypatch):
  monkeypatch.setenv("JUDGE_TOKEN", "secret")
  judge.script = [lambda *_: time.sleep(0.1)] * 6
  captions = [("a" * i, "b") for i in range(6)]
  rewards = ask(judge, captions, max_concurrency=3, token_variable="JUDGE_TOKEN")
  np.testing.assert_array_equal(rewards, [[i, 1] for i in range(6)])
  assert rewards.dtype == np.float32 and judge.most_open == 3
  request, headers = judge.requests[0]
  assert headers["Authorization"] == "Bearer secret"
  assert len(request["images"]) == 2
  picture = Image.open(io.BytesIO(base64.b64decode(request["images"][0])))
  np.testing.assert_array_equal(np.asarray(picture), np.full((2, 2, 3), 200))


def test_captions_alone_are_sent_if_asked(judge):
  ask(judge, sends_images=False)
  assert set(judge.requests[0][0]) == {"captions"}


@pytest.mark.parametrize(
  "fault", [500, 429, "no json", "[1, 2]", '{"rewards": [1]}', '{"scores": [1, 2]}', lambda *_: time.sleep(2.0)]
)
def test_what_may_pass_is_tried_again(judge, fault):
  judge.script = [fault, fault]
  # Only the slow answer needs a short timeout; for the others a busy machine may be slow.
  np.testing.assert_array_equal(ask(judge, timeout_seconds=1.0 if callable(fault) else 30.0), [[1, 3]])
  assert len(judge.requests) == 3


@pytest.mark.parametrize(("policy", "expected"), [("drop", [np.nan, np.nan]), ("zero", [0, 0])])
def test_a_judge_that_keeps_failing(judge, policy, expected):
  judge.script = [500] * 3
  np.testing.assert_array_equal(ask(judge, on_failure=policy), [expected])
  assert len(judge.requests) == 3
  judge.script = [500] * 3
  with pytest.raises(RewardError, match="2 of 2 rollouts have no external reward .*500"):
    ask(judge, on_failure="fail")


def test_a_refusal_is_not_repeated(judge):
  judge.script = [403]
  rewards = ask(judge, [("a", "bcd"), ("ef", "g")], max_concurrency=1)
  np.testing.assert_array_equal(rewards, [[np.nan, np.nan], [2, 1]])
  assert len(judge.requests) == 2


@pytest.mark.parametrize("policy", ["drop", "zero", "fail"])
@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_server_that_refuses_every_group_ends_the_run(judge, policy, status):
  judge.script = [status] * 3
  with pytest.raises(RewardError) as error:
    ask(judge, [("a", "b")] * 3, on_failure=policy)
  assert judge.url in str(error.value) and f"HTTP {status} for all 3 groups" in str(error.value)
  assert len(judge.requests) == 3, "none is repeated"


@pytest.mark.parametrize("policy", ["drop", "zero"])
@pytest.mark.parametrize("answer", [500, "no JSON", json.dumps({"rewards": [None, None]})])
def test_batches_in_a_row_without_a_reward_end_the_run(judge, policy, answer):
  reward = ExternalReward(ExternalRewardOptions(url=judge.url, retries=0, on_failure=policy, max_failed_in_a_row=3))
  images = np.zeros((1, 4, 4, 3), np.uint8)
  judge.script = [answer, answer, json.dumps({"rewards": [1, None]}), answer, answer, answer]
  for _ in range(5):
    reward([("a", "b")], images, np.zeros((1, 2, 4, 4, 3), np.uint8))
  with pytest.raises(RewardError, match="2 of 2 rollouts have no external reward .* in 3 batches in a row"):
    reward([("a", "b")], images, np.zeros((1, 2, 4, 4, 3), np.uint8))


@pytest.mark.parametrize("answer", ["[" * 500_000, '{"rewards": ' * 100_000, '"' + "a" * (1 << 21)])
def test_an_answer_that_is_too_deep_or_too_long_loses_its_group_alone(judge, answer):
  judge.script = [answer]
  np.testing.assert_array_equal(ask(judge), [[np.nan, np.nan]])
  assert len(judge.requests) == 1


def test_neither_the_log_nor_an_error_has_the_token(judge, monkeypatch, caplog):
  token = "sk-very-secret-0123456789"
  monkeypatch.setenv("REWARD_TOKEN", token)
  judge.script = [json.dumps({"rewards": f"Bearer {token}", token: [1]})] * 6
  with caplog.at_level("WARNING", logger="absl"):
    ask(judge, token_variable="REWARD_TOKEN")
  with pytest.raises(RewardError) as error:
    ask(judge, token_variable="REWARD_TOKEN", on_failure="fail")
  assert judge.requests[0][1]["Authorization"] == f"Bearer {token}"
  assert token not in caplog.text + str(error.value)
  monkeypatch.setenv("REWARD_TOKEN", token + "\n")
  with pytest.raises(ValueError, match="REWARD_TOKEN") as error:
    ExternalReward(ExternalRewardOptions(url=judge.url, token_variable="REWARD_TOKEN"))
  assert token not in str(error.value)


def test_an_address_with_a_key_is_refused_before_anything_is_written():
  """Even if the external reward is unused: the config is stored in the workdir and shown in the report."""
  config = scenes.get_config("smoke")
  validate(read_config(config))
  config.understanding_for_generation.http_reward.url = "http://name:sk-very-secret@host/"
  with pytest.raises(ValueError, match="config.understanding_for_generation.http_reward.url") as error:
    read_config(config)
  assert "sk-very-secret" not in str(error.value)


def test_any_failure_of_a_process_is_an_error_of_all(judge, monkeypatch):
  """The other processes wait for its answers, so an unexpected error must not leave them waiting."""
  reward = ExternalReward(ExternalRewardOptions(url=judge.url))
  gathered = []
  monkeypatch.setattr(host_rewards.processes, "gather", lambda value: gathered.append(value) or [value])

  class Broken:
    def caption_text(self, tokens):
      raise RecursionError("too deep")

  bring = external.make_external_reward(reward, Broken())
  inputs = RewardInputs(jnp.array([[[1, END]]]), jnp.zeros((1, 1, 2, 2, 3), jnp.uint8))
  with pytest.raises(RewardError, match="RecursionError: too deep"):
    bring({"image": np.zeros((1, 2, 2, 3), np.uint8)}, inputs)
  assert gathered == ["http: RecursionError: too deep"]


def test_pieces_of_a_step_are_judged_while_later_ones_are_generated(judge):
  """The server needs 0.3 s per group, and generation 0.3 s per piece: only the last piece is waited for."""
  judge.script = [lambda *_: time.sleep(0.3)] * 8
  reward = external.make_external_reward(ExternalReward(ExternalRewardOptions(url=judge.url)), Lengths())
  begun, lengths = [], jnp.arange(1, 9)
  for piece in range(4):
    time.sleep(0.3)
    tokens = jnp.stack([lengths[piece::4], jnp.full(2, END)], axis=-1)[:, None]
    inputs = RewardInputs(tokens, jnp.zeros((2, 2, 2, 2, 3), jnp.uint8))
    begun.append(reward.begin({"image": np.zeros((2, 2, 2, 3), np.uint8)}, inputs))
  answered = [len(judge.requests), judge.open]
  np.testing.assert_array_equal(reward.finish(begun), np.stack([lengths, lengths], axis=1))
  assert answered[0] - answered[1] >= 4, "the first pieces have their rewards before the last is generated"


def test_requests_that_wait_are_given_up(judge):
  judge.script = [lambda *_: time.sleep(0.2)] * 5
  reward = ExternalReward(ExternalRewardOptions(url=judge.url, max_concurrency=1))
  images = np.zeros((5, 1, 2, 2, 3), np.uint8)
  answers = reward.start([("a",)] * 5, images[:, 0], images)
  reward.cancel()
  assert sum(answer.cancelled() for answer in answers) >= 4
  assert reward([("abc",)], images[:1, 0], images[:1]) == 3, "and a later step asks again"


def test_known_rollouts_are_not_asked_for_again(judge):
  """In order; a rollout without a reward is asked for again, and the oldest are forgotten."""
  judge.script = ['{"rewards": [1, null, 3]}']
  reward = ExternalReward(ExternalRewardOptions(url=judge.url, cache_size=3))
  images = np.zeros((1, 4, 2, 2, 3), np.uint8)
  captions = [("a", "bb", "a", "ccc")]
  for expected in ([1, np.nan, 1, 3], [1, 2, 1, 3], [1, 2, 1, 3]):
    np.testing.assert_array_equal(reward(captions, images[:, 0], images), [expected])
  assert [request["captions"] for request, _ in judge.requests] == [["a", "bb", "ccc"], ["bb"]]
  assert [len(request["images"]) for request, _ in judge.requests] == [3, 1]
  reward(captions, images[:, 0] + 1, images)
  assert judge.requests[-1][0]["captions"] == ["a", "bb", "ccc"], "another original is another rollout"
  reward(captions, images[:, 0], images)
  assert judge.requests[-1][0]["captions"] == ["a", "bb", "ccc"], "no more than three are kept"


class Lengths:
  """Stands for a processor: the first token is the length of the caption."""

  def caption_text(self, tokens):
    return "a" * int(tokens[0])


def test_every_process_asks_for_its_share_and_takes_the_answers_of_all(judge, monkeypatch):
  tokens = jnp.array([[[2, END]], [[3, END]], [[5, END]]])
  batch = {"image": np.zeros((3, 2, 2, 3), np.uint8)}
  inputs = RewardInputs(tokens, jnp.zeros((3, 2, 2, 2, 3), jnp.uint8))
  bring = external.make_external_reward(ExternalReward(ExternalRewardOptions(url=judge.url)), Lengths())
  whole = bring(batch, inputs)
  judge.requests.clear()
  shares = []
  monkeypatch.setattr(host_rewards.jax, "process_count", lambda: 2)
  monkeypatch.setattr(external.multihost_utils, "process_allgather", lambda x, tiled: jax.tree.map(np.asarray, x))
  monkeypatch.setattr(host_rewards.processes, "gather", lambda own: shares.append(own) or [[[]], own])
  for process in range(2):
    monkeypatch.setattr(host_rewards.jax, "process_index", lambda process=process: process)
    bring(batch, inputs)
  assert [len(share) for (share,) in shares] == [1, 2] and len(judge.requests) == 3
  monkeypatch.setattr(host_rewards.processes, "gather", lambda own: json.loads(json.dumps(shares)))
  np.testing.assert_array_equal(bring(batch, inputs), whole)
  np.testing.assert_array_equal(whole, [[2, 2], [3, 3], [5, 5]])


def test_failures_are_counted_by_kind():
  reward = ExternalReward(ExternalRewardOptions(url="http://localhost:1/score", on_failure="fail"))
  answers = [Answer([np.nan], "HTTP 503"), Answer([1.0]), Answer([np.nan], "no answer"), Answer([np.nan], "HTTP 503")]
  with pytest.raises(RewardError, match=r"3 of 4 rollouts .* \(HTTP 503, 2 x; no answer, 1 x\)"):
    reward.accept(answers)


def test_prompts_are_judged_without_originals_and_with_their_metadata(judge):
  reward = ExternalReward(ExternalRewardOptions(url=judge.url))
  bring = external.make_external_reward(reward, Lengths(), lambda index: {"tag": f"t{index}"})
  inputs = RewardInputs(jnp.array([[[2, END]], [[3, END]]]), jnp.zeros((2, 2, 2, 2, 3), jnp.uint8))
  rewards = bring({"image": np.zeros((2, 2, 2, 3), np.uint8), "index": np.asarray([7, 5])}, inputs)
  np.testing.assert_array_equal(rewards, [[2, 2], [3, 3]])
  sent = sorted((request for request, _ in judge.requests), key=lambda request: request["captions"])
  assert [request["metadata"] for request in sent] == [{"tag": "t7"}, {"tag": "t5"}]
  assert all(len(request["images"]) == 2 and "original" not in request for request in sent)


def test_images_are_compared_with_their_text(monkeypatch):
  """Every process has its share of the prompts; a failure in one of them is an error of all."""

  def reward(captions, images):
    return np.asarray(
      [
        [len(text) + image.mean() for text, image in zip(*group, strict=True)]
        for group in zip(captions, images, strict=True)
      ]
    )

  tokens = jnp.array([[[2, END]], [[3, END]], [[5, END]]])
  inputs = RewardInputs(tokens, jnp.stack([jnp.full((2, 2, 2, 3), i, jnp.uint8) for i in range(3)]))
  bring = external.make_image_text_reward("clip_text", reward, Lengths())
  np.testing.assert_array_equal(bring({}, inputs), [[2, 2], [4, 4], [7, 7]])
  shares = []
  for process in range(2):
    monkeypatch.setattr(host_rewards.jax, "process_count", lambda: 2)
    monkeypatch.setattr(host_rewards.jax, "process_index", lambda process=process: process)
    monkeypatch.setattr(external.multihost_utils, "process_allgather", lambda x, tiled: jax.tree.map(np.asarray, x))
    monkeypatch.setattr(host_rewards.processes, "gather", lambda own: shares.append(own) or [own])
    bring({}, inputs)
  assert shares == [[[[2, 2]]], [[[4, 4], [7, 7]]]]
  monkeypatch.setattr(host_rewards.processes, "gather", lambda own: [[[[1, 1]]], "clip_text: OSError: torn"])
  with pytest.raises(RewardError, match="clip_text: OSError: torn"):
    bring({}, inputs)


def test_towers_are_looked_for_before_anything_is_loaded(tmp_path):
  config = scenes.get_config("smoke")
  config.stages = ("understanding_for_generation",)
  options = config.understanding_for_generation.options
  options.reward_weights, options.held_out_embedder = (("clip_text", 1.0),), "clip"
  with pytest.raises(ValueError, match="held_out_embedder = 'clip' is also in reward_weights"):
    read_config(config)
  options.held_out_embedder, config.evaluation.num_images = "", 0
  with pytest.raises(ValueError, match="reward_weights names 'clip_text': set config.embedders.clip to the folder"):
    validate(read_config(config))
  config.embedders.clip = str(tmp_path)
  with pytest.raises(ValueError, match=r"reward_weights names 'clip_text': .*config\.json"):
    validate(read_config(config))


def test_a_judge_that_is_not_there_costs_its_retries_and_no_more(judge):
  assert np.isnan(ask(judge, url="http://127.0.0.1:9/none", retries=1)).all()


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity", '"high"', "true", "1" + "0" * 400])
def test_a_number_that_is_none_loses_one_rollout(judge, value):
  judge.script = [f'{{"rewards": [{value}, 2]}}'] * 2
  rewards = ask(judge)
  assert not np.isfinite(rewards[0, 0]) and rewards[0, 1] == 2
  np.testing.assert_array_equal(ask(judge, on_failure="zero"), [[0, 2]])


def test_a_step_shows_the_judge_what_was_generated_and_learns_from_its_answer(judge):
  """Between the phases, on the host: advantages include the rewards of the embedder and of the external server."""

  class Words:
    end_ids = (END,)
    caption_text = Processor.caption_text

    def decode(self, ids):
      return "".join("ab"[int(i) - 1] for i in ids)

  reward_inputs = RewardInputs(jnp.array([[[1, 2, END], [1, END, 5]]]), jnp.zeros((1, 2, 2, 2, 3), jnp.uint8))

  def advantages(rewards):
    return rewards["clip"] + rewards["http"], {}

  def update(state, batch, trajectory, values):
    return state, {"values": values}

  phases = Phases(
    rollout=lambda params, batch, key, step: step,
    reward=lambda *_: None,
    advantages=advantages,
    update=update,
    reward_and_inputs=lambda *_: (({"clip": jnp.full((1, 2), 10.0)}, {}), reward_inputs),
    host_rewards=(external.make_external_reward(ExternalReward(ExternalRewardOptions(url=judge.url)), Words()),),
  )
  state = create({"w": jnp.ones(1)}, lambda _: True, optax.sgd(0.1), jax.random.key(0), has_ema=False)
  _, metrics = phased_step(phases)(state, {"image": np.zeros((1, 2, 2, 3), np.uint8)})
  np.testing.assert_array_equal(metrics["values"], [[12, 11]])
  assert judge.requests[0][0]["captions"] == ["ab", "a"]
  with pytest.raises(ValueError, match="external reward"):
    compose(phases)
