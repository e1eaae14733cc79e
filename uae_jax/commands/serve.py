"""`uae-jax serve`: answers requests of OpenAI's API, for the harnesses of other benchmarks."""

import os
import signal
import sys

from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.command_line import number

EPILOG = """
POST /v1/chat/completions takes one user message with a text and an image as a data URL; POST /v1/images/generations
returns PNGs in base64; GET /v1/models and GET /health. Waiting requests with the same settings share a batch. SIGINT
and SIGTERM end the server after the requests that it has accepted; a second one ends it at once.
"""


def parser() -> command_line.Parser:
  parser = command_line.Parser("serve", "Serves a model with a subset of OpenAI's API.", EPILOG)
  model_arguments.add_model_arguments(parser)
  parser.add_argument(
    "--host",
    type=command_line.not_empty,
    default="127.0.0.1",
    help="address to listen on; default %(default)s, this machine only",
  )
  parser.add_argument(
    "--port",
    type=number(int, at_least=0, at_most=65535),
    default=8000,
    help="port, 0 takes a free one; default %(default)s",
  )
  parser.add_argument(
    "--name", type=command_line.not_empty, default="uae", help="name of the model in requests; default %(default)s"
  )
  parser.add_argument(
    "--max-new-tokens", type=model_arguments.positive, help="most tokens per answer; default: the model's own"
  )
  parser.add_argument(
    "--timeout",
    type=number(float, more_than=0),
    default=600.0,
    metavar="SECONDS",
    help="longest time from a request to its result; default %(default)s",
  )
  parser.add_argument(
    "--max-requests",
    type=model_arguments.positive,
    default=256,
    metavar="N",
    help="requests at a time, further ones get status 429; default %(default)s",
  )
  parser.add_argument(
    "--token-variable",
    default="",
    metavar="NAME",
    help="environment variable with a token that every request has to bring; default: none is needed",
  )
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)

  from uae_jax import http_client
  from uae_jax.serving.model import Model
  from uae_jax.serving.queue import Queue
  from uae_jax.serving.server import Server, Service, is_loopback

  token = ""
  if arguments.token_variable:
    token = http_client.read_token("--token-variable", arguments.token_variable, is_required=True)
  server = Server(arguments.host, arguments.port)
  uae = model_arguments.load(arguments)
  if not is_loopback(arguments.host):
    guard = "with the token" if token else "without a token (--token-variable)"
    print(f"uae-jax serve: warning: other machines can reach {server.url}, {guard}", file=sys.stderr)
  service = Service(
    name=arguments.name,
    queue=Queue(Model(uae, arguments.seed, arguments.batch_size), arguments.batch_size or model_arguments.WINDOW),
    max_new_tokens=arguments.max_new_tokens or uae.inference.max_new_tokens,
    count_tokens=lambda text: len(uae.processor.encode(text)),
    check_size=uae.latents_shape,
    timeout_seconds=arguments.timeout,
    max_requests=arguments.max_requests,
    token=token,
  )
  run(server, service)
  return 0


def run(server, service) -> None:
  """Serves until SIGINT or SIGTERM, then until all accepted requests are answered."""
  # The numbers of signals arrive at this file descriptor at once. A handler in Python would only run after the wait
  # that it should end, if the signal comes just before.
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  before = {name: signal.signal(name, lambda *_: None) for name in (signal.SIGINT, signal.SIGTERM)}
  server.serve(service)
  print(f"serving {service.name} at {server.url}/v1", flush=True)
  os.read(reader, 1)
  for name, handler in before.items():  # A second signal ends the process at once.
    signal.signal(name, handler)
  signal.set_wakeup_fd(previous_fd)
  os.close(reader)
  os.close(writer)
  print("uae-jax serve: ending after the accepted requests", file=sys.stderr)
  server.drain()
