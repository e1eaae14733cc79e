"""A real client of OpenAI's API gets answers and images from `uae-jax serve`, batched, limited, and until the end."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import threading
import time
import types

import numpy as np
import openai
from PIL import Image
import pytest

from uae_jax import files
from uae_jax.commands import model_arguments, serve
from uae_jax.serving.model import Model
from uae_jax.serving.queue import Queue
from uae_jax.serving.server import Server, Service, is_loopback
from uae_jax.weights.checkpoint import InferenceSettings

pytestmark = pytest.mark.fast

PROMPT = "a red circle"


class StandIn:
  """Stands for a model: what it returns says what it was asked; counts its calls, and waits for `gate` in each."""

  inference = InferenceSettings(resolution_px=16, max_new_tokens=8)
  processor = types.SimpleNamespace(encode=str.split)

  def __init__(self):
    self.calls, self.gate = [], threading.Event()
    self.gate.set()

  def latents_shape(self, height, width):
    if height % 16 or width % 16:
      raise ValueError("sides must be multiples of 16")

  def _called(self, texts, options):
    self.calls.append((list(texts), options))
    assert self.gate.wait(30)
    if "fail" in texts:
      raise ValueError("cannot do it")

  def generate(self, prompts, height=16, width=16, **options):
    self._called(prompts, options)
    return [Image.new("RGB", (width, height), (options["seed"], index, 7)) for index in options["indices"]]

  def answer(self, images, questions, **options):
    self._called(questions, options)
    shades = [int(np.asarray(image).mean()) for image in images]
    return [f"{question} {shade}" for question, shade in zip(questions, shades, strict=True)]


class World:
  """A running server and a client of it."""

  def __init__(self, **settings):
    self.model = StandIn()
    self.server = Server("127.0.0.1", 0)
    defaults = dict(
      name="uae",
      queue=Queue(Model(self.model, 3, None), 4),
      max_new_tokens=8,
      count_tokens=lambda text: len(text.split()),
      check_size=self.model.latents_shape,
      timeout_seconds=30.0,
      max_requests=16,
    )
    self.server.serve(Service(**{**defaults, **settings}))
    self.client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="key", max_retries=0)

  def close(self):
    self.model.gate.set()
    self.server.drain()

  def ask(self, question, shade=40, **options):
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": picture(shade)}}]
    return self.client.chat.completions.create(model="uae", messages=[{"role": "user", "content": content}], **options)

  def post(self, path, body, **headers):
    connection = http.client.HTTPConnection(*self.server.server_address[:2], timeout=30)
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def picture(shade) -> str:
  return files.data_uri(Image.new("RGB", (4, 4), (shade,) * 3))


def pixels(item) -> tuple:
  image = Image.open(io.BytesIO(base64.b64decode(item.b64_json)))
  return (*image.size, *image.getpixel((0, 0)))


@pytest.fixture
def world():
  with contextlib.closing(World()) as world:
    yield world


def all_at_once(*calls):
  """Runs calls in threads; returns the threads, started in order."""
  threads = []
  for call in calls:
    threads.append(threading.Thread(target=call))
    threads[-1].start()
  return threads


def wait_until(holds):
  deadline = time.monotonic() + 20
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_question_about_an_image_is_answered(world):
  answer = world.ask("what is it?", shade=40, temperature=0, max_tokens=100, seed=5)
  assert answer.choices[0].message.content == "what is it? 40"
  assert answer.choices[0].finish_reason == "stop" and answer.model == "uae"
  ((_, options),) = world.model.calls
  assert options == {"max_new_tokens": 8, "temperature": 0.0, "seed": 5, "indices": [0]}


def test_an_answer_that_fills_its_limit_was_cut(world):
  assert world.ask("two words", max_completion_tokens=3).choices[0].finish_reason == "length"


def test_images_have_the_size_number_and_seed_that_were_asked_for(world):
  made = world.client.images.generate(
    model="uae", prompt=PROMPT, n=2, size="32x16", response_format="b64_json", extra_body={"seed": 9, "steps": 5}
  )
  assert [pixels(item) for item in made.data] == [(32, 16, 9, 0, 7), (32, 16, 9, 1, 7)]
  assert world.model.calls[0][1]["steps"] == 5


def test_a_guidance_interval_reaches_the_model_or_is_refused(world):
  def ask(**extra):
    return world.client.images.generate(model="uae", prompt=PROMPT, extra_body=extra)

  ask(guidance=3.0, guidance_interval=[0.2, 0.5])
  assert world.model.calls[0][1]["guidance_interval"] == (0.2, 0.5)
  for extra in ({"guidance_interval": [0.5, 0.2]}, {"guidance": 1.0, "guidance_interval": [0.2, 0.5]}):
    with pytest.raises(openai.BadRequestError, match="guidance_interval") as caught:
      ask(**extra)
    assert caught.value.body["param"] == "guidance_interval"


def test_images_without_a_seed_differ(world):
  first, second = (world.client.images.generate(model="uae", prompt=PROMPT).data[0] for _ in range(2))
  assert pixels(first) == (16, 16, 3, 0, 7) and pixels(second) == (16, 16, 3, 1, 7)


def test_the_model_is_listed_and_the_server_healthy(world):
  assert [model.id for model in world.client.models.list()] == ["uae"]
  connection = http.client.HTTPConnection(*world.server.server_address[:2])
  connection.request("GET", "/health")
  assert connection.getresponse().status == 200


def test_waiting_requests_of_one_kind_share_a_batch(world):
  """Six questions and an image wait while the first request is in work; batches have four rows."""
  world.model.gate.clear()
  answers = {}

  def ask(number):
    answers[number] = world.ask(f"question {number}", shade=number, temperature=0).choices[0].message.content

  threads = all_at_once(lambda: ask(0))
  wait_until(lambda: world.model.calls)
  threads += all_at_once(*(lambda number=number: ask(number) for number in range(1, 7)))
  threads += all_at_once(lambda: world.client.images.generate(model="uae", prompt=PROMPT))
  wait_until(lambda: len(world.server.service.queue._waiting) == 7)
  world.model.gate.set()
  for thread in threads:
    thread.join()
  assert answers == {number: f"question {number} {number}" for number in range(7)}
  sizes = sorted(len(texts) for texts, options in world.model.calls if "temperature" in options)
  assert sizes == [1, 2, 4] and len(world.model.calls) == 4


def test_a_failing_request_fails_alone(world):
  world.model.gate.clear()
  failures, answers = [], []

  def fail():
    with pytest.raises(openai.BadRequestError, match="cannot do it") as caught:
      world.ask("fail")
    failures.append(caught)

  threads = all_at_once(lambda: world.ask("first"))
  wait_until(lambda: world.model.calls)
  threads += all_at_once(fail, lambda: answers.append(world.ask("good")))
  wait_until(lambda: len(world.server.service.queue._waiting) == 2)
  world.model.gate.set()
  for thread in threads:
    thread.join()
  assert len(failures) == 1 and answers[0].choices[0].message.content == "good 40"


@pytest.mark.parametrize(
  "change, param, said",
  [
    ({"stream": True}, "stream", "not supported"),
    ({"temperature": -1}, "temperature", "out of range"),
    ({"extra_body": {"guided_choice": ["a"]}}, "guided_choice", "not supported"),
    ({"seed": -1}, "seed", "expected 0 to"),
    ({"n": 11}, "n", "out of range"),
    ({"model": "gpt-4o"}, "model", "this server has 'uae'"),
    ({"messages": [{"role": "user", "content": "no image"}]}, "messages", "0 images"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "expected one user message"),
  ],
)
def test_what_the_model_cannot_do_is_refused(world, change, param, said):
  content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": picture(1)}}]
  request = {"model": "uae", "messages": [{"role": "user", "content": content}], **change}
  with pytest.raises(openai.APIStatusError, match=said) as caught:
    world.client.chat.completions.create(**request)
  assert caught.value.body["param"] == param and caught.value.body["type"] == "invalid_request_error"
  assert not world.model.calls


@pytest.mark.parametrize(
  "url, said",
  [
    ("http://127.0.0.1:1/secret.png", "addresses are not fetched"),
    ("file:///etc/passwd", "addresses are not fetched"),
    ("data:image/png;base64,####", "not base64"),
    ("data:image/png;base64,aGVsbG8=", "not a readable image"),
  ],
)
def test_images_come_as_data_only(world, url, said):
  content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
  with pytest.raises(openai.BadRequestError, match=said):
    world.client.chat.completions.create(model="uae", messages=[{"role": "user", "content": content}])


@pytest.mark.parametrize("size, said", [("17x16", "multiples of 16"), ("big", "WIDTHxHEIGHT"), ("99999999x1", "WIDTH")])
def test_sizes_that_the_model_does_not_have_are_refused(world, size, said):
  with pytest.raises(openai.BadRequestError, match=said):
    world.client.images.generate(model="uae", prompt=PROMPT, size=size)


@pytest.mark.parametrize(
  "body, headers, status",
  [
    ("{", {}, 400),
    ("[]", {}, 400),
    ("[" * 100_000, {}, 400),
    ("{}", {"Content_Type": "text/plain"}, 415),
    ("", {"Content_Length": str(1 << 40)}, 413),
    ("", {"Content_Length": "-1"}, 411),
    (json.dumps({"prompt": "\ud800"}), {}, 400),
  ],
)
def test_broken_requests_get_an_error_in_openai_form(world, body, headers, status):
  found, answer = world.post("/v1/images/generations", body, **headers)
  assert found == status and answer["error"]["message"] and answer["error"]["type"]


def test_an_unknown_address_and_method_get_one_too(world):
  assert world.post("/v1/embeddings", "{}")[0] == 404
  connection = http.client.HTTPConnection(*world.server.server_address[:2])
  connection.request("DELETE", "/v1/models")
  assert json.loads(connection.getresponse().read())["error"]["type"] == "server_error"


def test_a_token_is_needed_where_one_is_set():
  with contextlib.closing(World(token="key")) as world:
    world.ask("allowed")
    other = openai.OpenAI(base_url=f"{world.server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
      other.models.list()


def test_a_result_that_takes_too_long_is_given_up_and_not_computed():
  with contextlib.closing(World(timeout_seconds=0.3)) as world:
    world.model.gate.clear()
    threads = all_at_once(lambda: pytest.raises(openai.APIStatusError, world.ask, "slow"))
    wait_until(lambda: world.model.calls)
    with pytest.raises(openai.APIStatusError, match="no result within") as caught:
      world.ask("late")
    assert caught.value.status_code == 504
    threads[0].join()
  assert len(world.model.calls) == 1


def test_more_requests_than_allowed_are_told_to_come_back():
  with contextlib.closing(World(max_requests=1)) as world:
    world.model.gate.clear()
    threads = all_at_once(lambda: world.ask("first"))
    wait_until(lambda: world.model.calls)
    with pytest.raises(openai.RateLimitError):
      world.ask("second")
  threads[0].join()


def test_a_signal_ends_the_server_after_the_accepted_requests(monkeypatch, capsys):
  model = StandIn()
  monkeypatch.setattr(model_arguments, "load", lambda arguments: model)
  answers, urls = [], []

  def use():
    wait_until(lambda: urls.append(capsys.readouterr().out) or "http" in urls[-1])
    client = openai.OpenAI(base_url=urls[-1].split()[-1], api_key="key", max_retries=0)
    model.gate.clear()
    threads = all_at_once(
      *[lambda: answers.append(client.images.generate(model="uae", prompt=PROMPT, size="16x16"))] * 2
    )
    wait_until(lambda: model.calls)
    time.sleep(0.2)  # the second request waits
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    model.gate.set()
    for thread in threads:
      thread.join()

  user = all_at_once(use)[0]
  assert serve.main(["--model", "m", "--port", "0"]) == 0
  user.join()
  assert len(answers) == 2


def test_only_addresses_of_this_machine_are_loopback():
  assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.9.9.9")))
  assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "example.org")))


def test_a_taken_port_is_reported_before_the_model_is_loaded(world, monkeypatch):
  monkeypatch.setattr(model_arguments, "load", lambda arguments: pytest.fail("loaded"))
  with pytest.raises(OSError, match="cannot listen on 127.0.0.1"):
    serve.main(["--model", "m", "--port", str(world.server.server_address[1])])
