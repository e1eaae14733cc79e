"""The HTTP side: routes, limits, and errors in OpenAI's form. A thread per connection, one request per connection."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hmac
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import ipaddress
import json
import logging
import socket
import socketserver
import threading
import time
from typing import Any
import uuid

from uae_jax import files
from uae_jax.serving import requests
from uae_jax.serving.queue import Queue
from uae_jax.serving.requests import Request, RequestError

MAX_BODY_BYTES = 64 << 20
# Longest pause of a client in the middle of sending or receiving.
SOCKET_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
  """What the server offers.

  Attributes:
    name: name of the model in requests and responses.
    queue: queue of the model.
    max_new_tokens: most tokens of an answer.
    count_tokens: text -> number of its tokens.
    check_size: (height, width in pixels) -> None; raises `ValueError` for a size that the model does not have.
    timeout_seconds: longest time between a request and its result.
    max_requests: requests at a time; further ones get status 429.
    token: bearer token that requests have to bring; "" for none.
  """

  name: str
  queue: Queue
  max_new_tokens: int
  count_tokens: Callable[[str], int]
  check_size: Callable[[int, int], Any]
  timeout_seconds: float
  max_requests: int
  token: str = dataclasses.field(default="", repr=False)

  def result(self, request: Request) -> list:
    """Waits for the results of a request.

    Raises:
      RequestError: the model failed, or it took too long.
    """
    future = self.queue.submit(request)
    try:
      return future.result(self.timeout_seconds)
    except TimeoutError:
      future.cancel()
      raise RequestError(f"no result within {self.timeout_seconds:g} seconds", status=504, code="timeout") from None
    except ValueError as error:
      raise RequestError(str(error)) from error
    except Exception as error:  # JAX raises many types, when the device is out of memory for example.
      raise RequestError(f"{type(error).__name__}: {str(error)[:500]}", status=500) from error

  def chat(self, body: dict) -> dict:
    """Answers `POST /v1/chat/completions`."""
    request = requests.chat(body, self.name, self.max_new_tokens)
    limit = request.settings["max_new_tokens"]
    choices = [
      {
        "index": index,
        "message": {"role": "assistant", "content": text},
        # The answer's closing token is one of the tokens of the limit.
        "finish_reason": "stop" if self.count_tokens(text) < limit else "length",
        "logprobs": None,
      }
      for index, text in enumerate(self.result(request))
    ]
    return {
      "id": f"chatcmpl-{uuid.uuid4().hex}",
      "object": "chat.completion",
      "created": int(time.time()),
      "model": self.name,
      "choices": choices,
    }

  def images(self, body: dict) -> dict:
    """Answers `POST /v1/images/generations`."""
    request = requests.image(body, self.name, self.check_size)
    return {
      "created": int(time.time()),
      "data": [{"b64_json": files.png_base64(image)} for image in self.result(request)],
    }

  def models(self) -> dict:
    """Answers `GET /v1/models`."""
    return {"object": "list", "data": [{"id": self.name, "object": "model", "created": 0, "owned_by": "uae_jax"}]}


class Server(ThreadingHTTPServer):
  """A server that can wait until the requests that it has accepted are answered.

  The address is taken at once, before a model is loaded; connections are refused until `serve`.

  Args:
    host: address to listen on.
    port: port to listen on; 0 takes a free one.

  Raises:
    OSError: the address cannot be listened on.

  Attributes:
    service: what it offers; set by `serve`.
  """

  service: Service

  daemon_threads = True  # A connection without a request must not keep the process alive.
  request_queue_size = 128

  def __init__(self, host: str, port: int):
    self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    self._busy, self._changed = 0, threading.Condition()
    super().__init__((host, port), _Handler, bind_and_activate=False)
    try:
      self.server_bind()
    except OSError as error:
      self.server_close()
      raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error

  @property
  def url(self) -> str:
    host, port = str(self.server_address[0]), self.server_address[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

  def server_bind(self) -> None:
    socketserver.TCPServer.server_bind(self)  # HTTPServer's also looks up the host's name, which may take seconds.

  def serve(self, service: Service) -> None:
    """Starts to answer requests, in threads of its own."""
    self.service = service
    self.server_activate()
    threading.Thread(target=self.serve_forever, args=(0.1,), name="http", daemon=True).start()

  @contextlib.contextmanager
  def busy(self) -> Iterator[int]:
    """Context of one request; yields the number of requests at this time."""
    with self._changed:
      self._busy += 1
      count = self._busy
    try:
      yield count
    finally:
      with self._changed:
        self._busy -= 1
        self._changed.notify_all()

  def drain(self) -> None:
    """Accepts nothing more, and returns when all requests are answered."""
    self.shutdown()
    self.socket.close()
    self.service.queue.close()
    with self._changed:
      self._changed.wait_for(lambda: not self._busy)


def is_loopback(host: str) -> bool:
  """Whether only this machine reaches an address."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


class _Handler(BaseHTTPRequestHandler):
  """One request of a connection."""

  server: Server
  protocol_version = "HTTP/1.1"
  timeout = SOCKET_SECONDS
  server_version, sys_version = "uae_jax", ""

  def do_GET(self) -> None:
    with self.server.busy():
      service = self.server.service
      self._answer({"/health": lambda: {"status": "ok"}, "/v1/models": service.models})

  def do_POST(self) -> None:
    with self.server.busy() as count:
      service = self.server.service

      def call(method: Callable[[dict], dict]) -> dict:
        if count > service.max_requests:
          raise RequestError(f"{service.max_requests} requests are in work, try again later", status=429)
        return method(self._body())

      self._answer(
        {
          "/v1/chat/completions": lambda: call(service.chat),
          "/v1/images/generations": lambda: call(service.images),
        }
      )

  def _answer(self, routes: dict[str, Callable[[], dict]]) -> None:
    path = self.path.partition("?")[0]
    try:
      if path not in routes:
        raise RequestError(f"no such address: {self.command} {path[:100]}", status=404)
      if path != "/health":
        self._check_token()
      status, content = 200, routes[path]()
    except RequestError as error:
      status, content = error.status, error.body
    except OSError:  # The client has gone.
      self.close_connection = True
      return
    except Exception as error:  # A request must not end without an answer.
      logging.getLogger("uae_jax").exception("%s failed", path)
      status, content = 500, RequestError(type(error).__name__, status=500).body
    self._send(status, content)

  def _check_token(self) -> None:
    token = self.server.service.token
    given = self.headers.get("Authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
      raise RequestError("the bearer token is missing or wrong", status=401, code="invalid_api_key")

  def _body(self) -> dict:
    """Reads the JSON object of a request.

    Raises:
      RequestError: it is not one, or too long. Of other content types none is read: a web page of another host can send
        them without asking.
    """
    if self.headers.get_content_type() != "application/json":
      raise RequestError("expected Content-Type: application/json", status=415)
    length = self.headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()):
      raise RequestError("expected the header Content-Length", status=411)
    if int(length) > MAX_BODY_BYTES:
      raise RequestError(f"a body of {length[:20]} bytes, expected {MAX_BODY_BYTES} or fewer", status=413)
    deadline = time.monotonic() + self.server.service.timeout_seconds
    parts, left = [], int(length)
    while left:
      part = self.rfile.read1(min(left, 1 << 20))
      if not part or time.monotonic() > deadline:
        raise RequestError("the body is shorter than its Content-Length, or too slow", status=408)
      parts.append(part)
      left -= len(part)
    try:
      body = json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
      raise RequestError(f"the body is not JSON ({str(error)[:200]})") from error
    if not isinstance(body, dict):
      raise RequestError("expected a JSON object")
    return body

  def _send(self, status: int, content: dict) -> None:
    data = files.json_text(content).encode()
    self.close_connection = True
    with contextlib.suppress(OSError):  # The client has gone.
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(data)))
      self.send_header("Connection", "close")
      self.end_headers()
      self.wfile.write(data)

  def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
    """Answers what the base class refuses (methods, broken request lines) in OpenAI's form too."""
    self._send(code, RequestError(message or "the request is not understood", status=code).body)

  def log_message(self, format: str, *values: Any) -> None:
    """Writes no log line per request."""
