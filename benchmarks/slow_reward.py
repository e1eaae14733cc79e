"""What a slow external reward adds to a step: all requests after generation, or piece by piece during it.

    python -m benchmarks.slow_reward --seconds 1 --prompts 32 --pieces 1 2 4 8

The generation is a loop of matrix products of a known duration; the requests, their server and the step are real.
"""

import argparse
import dataclasses
import http.server
import json
import os
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax.options import ExternalRewardOptions
from uae_jax.rewards.external import ExternalReward
from uae_jax.training.rl.external import make_external_reward
from uae_jax.training.rl.host_rewards import RewardInputs
from uae_jax.training.rl.phases import Phases
from uae_jax.training.stage import phased_step
from uae_jax.training.state import create

ROLLOUTS, SIDE, WIDTH = 4, 64, 128


def serve(seconds: float) -> http.server.ThreadingHTTPServer:
  """Starts a server that answers each group after `seconds`; as many groups at a time as are asked."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      time.sleep(seconds)
      body = json.dumps({"rewards": [float(len(caption)) for caption in request["captions"]]}).encode()
      self.send_response(200)
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  return server


class Lengths:
  """Stands for a processor: the token is the length of the caption."""

  def caption_text(self, tokens: np.ndarray) -> str:
    return "a" * int(tokens[0])


def phases(trips_per_prompt: int) -> Phases:
  """A stage whose generation takes a time proportional to its prompts."""

  def rollout(params, batch, key, step, piece=None):
    del key, step, piece
    prompts = batch["index"].shape[0]
    state = jax.lax.fori_loop(0, trips_per_prompt * prompts, lambda _, x: jnp.tanh(x @ params["w"]), params["w"])
    return batch["index"][:, None] + (state[0, 0] > 1).astype(jnp.int32)  # Never, but the loop is needed.

  def reward_and_inputs(params, batch, tokens, key):
    del params, key
    images = jnp.broadcast_to(batch["image"][:, None], (tokens.shape[0], ROLLOUTS, SIDE, SIDE, 3))
    return ({}, {}), RewardInputs(tokens[:, None], images)

  return Phases(
    rollout=rollout,
    reward=lambda *_: None,
    advantages=lambda rewards: (rewards["http"], {}),
    update=lambda state, batch, trajectory, values: (state, {"values": values}),
    reward_and_inputs=reward_and_inputs,
  )


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
  """Seconds of a step, and those that it waits for the server after its generation, for each number of pieces."""
  batch = {
    "index": jnp.arange(options.prompts, dtype=jnp.int32),
    "image": jnp.zeros((options.prompts, SIDE, SIDE, 3), jnp.uint8),
  }
  params = {"w": jnp.eye(WIDTH) / 2}
  run = jax.jit(phases(200).rollout)
  jax.block_until_ready(run(params, batch, None, None))
  start = time.perf_counter()
  jax.block_until_ready(run(params, batch, None, None))
  trips = max(1, round(200 * options.generation / (time.perf_counter() - start)))
  server, rows = serve(options.seconds), []
  url = f"http://127.0.0.1:{server.server_address[1]}/score"
  for pieces in options.pieces:
    reward = ExternalReward(ExternalRewardOptions(url=url, max_concurrency=options.concurrency))
    judged = dataclasses.replace(
      phases(trips), host_rewards=(make_external_reward(reward, Lengths()),), num_pieces=pieces
    )
    step = phased_step(judged)
    state = create({"w": params["w"] + 0}, lambda _: True, optax.sgd(0.1), jax.random.key(0), has_ema=False)
    state, _ = step(state, batch)  # Compiles.
    start = time.perf_counter()
    _, metrics = step(state, batch)
    seconds = time.perf_counter() - start
    expected = np.tile(np.arange(options.prompts)[:, None], ROLLOUTS)
    np.testing.assert_array_equal(metrics["values"], expected)
    rows.append({"pieces": pieces, "step": seconds, "generation": metrics["seconds_rollout"]})
  server.shutdown()
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seconds", type=float, default=1.0, help="latency of the server (default: %(default)s)")
  parser.add_argument("--generation", type=float, default=8.0, help="seconds of generation (default: %(default)s)")
  parser.add_argument("--prompts", type=int, default=32, help="(default: %(default)s)")
  parser.add_argument("--concurrency", type=int, default=8, help="http_reward.max_concurrency (default: %(default)s)")
  parser.add_argument("--pieces", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of pieces to measure")
  options = parser.parse_args()
  os.environ["NO_PROXY"] = "127.0.0.1"
  for row in measure(options):
    added = row["step"] - row["generation"]
    print(
      f"{row['pieces']} pieces: {row['step']:.1f} s a step, {row['generation']:.1f} s generation, {added:.1f} s more"
    )


if __name__ == "__main__":
  main()
