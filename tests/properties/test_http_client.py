"""The HTTP client enforces its deadline and size limits and protects its token, against misbehaving local servers."""

import contextlib
import json
import socket
import threading
import time

import pytest

from uae_jax import http_client
from uae_jax.http_client import JsonClient, PassingError, RefusedError, check_url, read_token, with_retries
from uae_jax.options import ExternalRewardOptions

pytestmark = pytest.mark.fast

TOKEN = "sk-very-secret-0123456789"


class Server:
  """A server of raw bytes: `answer(connection)` writes arbitrary bytes after the request has been read."""

  def __init__(self, answer):
    self.requests: list[bytes] = []
    self._answer = answer
    self._listener = socket.create_server(("127.0.0.1", 0))
    self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/score"
    self._is_open = True
    self._thread = threading.Thread(target=self._serve, daemon=True)
    self._thread.start()

  def _serve(self):
    while self._is_open:
      with contextlib.suppress(OSError):
        connection, _ = self._listener.accept()
        threading.Thread(target=self._one, args=(connection,), daemon=True).start()

  def _one(self, connection):
    with contextlib.suppress(OSError), connection:
      request = b""
      while b"\r\n\r\n" not in request:
        request += self._received(connection)
      head, _, body = request.partition(b"\r\n\r\n")
      length = int(next(line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-len")))
      while len(body) < length:
        body += self._received(connection)
      self.requests.append(head + b"\r\n\r\n" + body)
      self._answer(connection)

  @staticmethod
  def _received(connection):
    """The received bytes; raises on a closed connection, so that the thread does not spin until the session ends."""
    if not (part := connection.recv(65536)):
      raise ConnectionError("closed before the request was whole")
    return part

  def close(self):
    self._is_open = False
    with contextlib.suppress(OSError):
      socket.create_connection(self._listener.getsockname()).close()
    self._thread.join()
    self._listener.close()


@pytest.fixture
def serve(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  servers = []

  def start(answer):
    if isinstance(answer, bytes):
      servers.append(Server(lambda connection: connection.sendall(answer)))
    else:
      servers.append(Server(answer))
    return servers[-1]

  yield start
  for server in servers:
    server.close()


def response(status=200, body="{}", headers=""):
  return f"HTTP/1.1 {status} Some reason\r\n{headers}\r\n{body}".encode()


def endless(connection, part, pause=0.0):
  while True:
    connection.sendall(part)
    time.sleep(pause)


def seconds(call, kind):
  start = time.monotonic()
  with pytest.raises(kind) as error:
    call()
  return time.monotonic() - start, str(error.value)


def test_json_goes_out_and_comes_back(serve):
  server = serve(response(body='{"rewards": [1, 2.5]}'))
  assert JsonClient(server.url, 5.0, TOKEN).post({"captions": ["é"]}) == {"rewards": [1, 2.5]}
  head, body = server.requests[0].split(b"\r\n\r\n")
  assert head.startswith(b"POST /score ") and f"Authorization: Bearer {TOKEN}".encode() in head
  assert json.loads(body) == {"captions": ["é"]}


def test_a_large_request_and_a_chunked_answer(serve):
  chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n"
  server = serve(chunks)
  assert JsonClient(server.url, 10.0).post({"image": "x" * 5_000_000}) == [1, 2]
  assert len(server.requests[0]) > 5_000_000


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_no_redirect_is_followed(serve, status):
  other = serve(response(body='{"rewards": [1]}'))
  where = f"Location: {other.url}?token=from-the-server\r\n"
  first = serve(response(status, headers=where))
  with pytest.raises(RefusedError) as error:
    JsonClient(first.url, 5.0, TOKEN).post({})
  assert str(error.value) == f"HTTP {status}" and error.value.status == status
  assert len(first.requests) == 1 and not other.requests


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://host/secret-path", "//", "http://["])
def test_the_address_of_a_redirect_is_not_repeated(serve, location):
  server = serve(response(302, headers=f"Location: {location}\r\n"))
  with pytest.raises(RefusedError, match="^HTTP 302$"):
    JsonClient(server.url, 5.0, TOKEN).post({})


@pytest.mark.parametrize(
  "answer",
  [
    lambda connection: time.sleep(3),
    lambda connection: endless(connection, b"H", 0.02),
    lambda connection: endless(connection, b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    lambda connection: (connection.sendall(b"HTTP/1.1 200 OK\r\n"), endless(connection, b"x", 0.02)),
    lambda connection: (connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n"), endless(connection, b" ", 0.02)),
    lambda connection: (
      connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
      endless(connection, b"1\r\n \r\n", 0.02),
    ),
  ],
  ids=["silence", "status", "continue", "headers", "body", "chunks"],
)
def test_the_deadline_covers_the_whole_answer(serve, answer):
  client = JsonClient(serve(answer).url, 0.4)
  took, message = seconds(lambda: client.post({}), PassingError)
  assert took < 1.5 and "within 0.4 seconds" in message


def test_the_deadline_covers_a_server_that_does_not_read():
  with socket.create_server(("127.0.0.1", 0)) as listener:
    client = JsonClient(f"http://127.0.0.1:{listener.getsockname()[1]}/", 0.4)
    took, _ = seconds(lambda: client.post({"image": "x" * 50_000_000}), PassingError)
  assert took < 15  # most of it encodes the 50 MB


def test_an_endless_body_is_cut(serve):
  def answer(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    endless(connection, b" " * 65536)

  took, message = seconds(lambda: JsonClient(serve(answer).url, 30.0).post({}), RefusedError)
  assert took < 5 and "longer than 1048576 bytes" in message


@pytest.mark.parametrize("head", [b"X-Long: " + b"x" * 100_000, b"X: y\r\n" * 1000])
def test_long_headers_are_no_answer(serve, head):
  with pytest.raises(PassingError):
    JsonClient(serve(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n{}").url, 5.0).post({})


@pytest.mark.parametrize("body", ["[" * 500_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000])
def test_deep_json_is_refused(serve, body):
  with pytest.raises(RefusedError, match="nested too deeply"):
    JsonClient(serve(response(body=body)).url, 5.0, TOKEN).post({})


@pytest.mark.parametrize("body", ["", "no json", "1" * 5000, "{", "\xff"])
def test_what_is_not_json_may_pass(serve, body):
  with pytest.raises(PassingError, match="not JSON"):
    JsonClient(serve(f"HTTP/1.1 200 OK\r\n\r\n{body}".encode("latin-1")).url, 5.0).post({})


@pytest.mark.parametrize(
  ("status", "kind"),
  [(408, PassingError), (409, PassingError), (425, PassingError), (429, PassingError), (500, PassingError)]
  + [(503, PassingError), (400, RefusedError), (401, RefusedError), (403, RefusedError), (404, RefusedError)],
)
def test_which_statuses_may_pass(serve, status, kind):
  with pytest.raises(kind, match=f"^HTTP {status}$"):
    JsonClient(serve(response(status, TOKEN)).url, 5.0, TOKEN).post({})


@pytest.mark.parametrize(
  ("value", "wait"), [("7", 7.0), ("3600", 60.0), ("-1", 0.0), ("nan", 0.0), ("inf", 60.0), ("soon", 0.0)]
)
def test_retry_after_is_kept_up_to_a_minute(serve, value, wait):
  with pytest.raises(PassingError) as error:
    JsonClient(serve(response(429, headers=f"Retry-After: {value}\r\n")).url, 5.0).post({})
  assert error.value.wait_seconds == wait


def test_pauses_double_and_a_server_may_ask_for_more(monkeypatch):
  pauses = []
  monkeypatch.setattr(http_client.time, "sleep", pauses.append)
  monkeypatch.setattr(http_client.random, "random", lambda: 0.5)
  failures = [PassingError("a"), PassingError("b"), PassingError("c", 429, 9.0), PassingError("d")]

  def attempt():
    if failures:
      raise failures.pop(0)
    return "done"

  assert with_retries(attempt, 4, 0.1) == "done"
  assert pauses == pytest.approx([0.15, 0.3, 9.0, 1.2])
  failures[:] = [PassingError("a", 500), PassingError("b", 503)]
  with pytest.raises(PassingError, match="b .after 2 attempts") as error:
    with_retries(attempt, 1, 0.1)
  assert error.value.status == 503
  failures[:] = [RefusedError("no", 401), PassingError("a")]
  with pytest.raises(RefusedError):
    with_retries(attempt, 4, 0.1)
  assert len(failures) == 1


def test_answers_and_errors_are_redacted(serve):
  body = json.dumps({"echo": [{"header": f"Bearer {TOKEN}"}], TOKEN: 1}).replace("sk-v", "\\u0073k-v")
  answer = JsonClient(serve(response(body=body)).url, 5.0, TOKEN).post({})
  assert TOKEN not in json.dumps(answer) and answer["echo"][0]["header"] == "Bearer [token]"
  client = JsonClient(serve(f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()).url, 5.0, TOKEN)
  with pytest.raises(PassingError) as error:
    client.post({})
  assert TOKEN not in str(error.value) and TOKEN not in repr(client)


@pytest.mark.parametrize(
  "token",
  [TOKEN + "\n", TOKEN + "\r", "\r\nX: y" + TOKEN, TOKEN + "\x00", "ключ" + TOKEN, "a b" + TOKEN, "\ufeff" + TOKEN],
)
def test_a_token_that_no_header_holds_is_refused_unseen(monkeypatch, token):
  # Environment variables cannot contain a NUL.
  monkeypatch.setattr(http_client.os, "environ", {"SOME_KEY": token})
  with pytest.raises(ValueError, match="SOME_KEY") as error:
    read_token("option", "SOME_KEY", is_required=False)
  assert TOKEN not in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("variable", [TOKEN, "hf_" + "a1B2" * 8, "A KEY", "A-KEY", "$KEY"])
def test_a_key_in_place_of_the_name_of_its_variable_is_refused_unseen(variable):
  for refuse in (
    lambda: read_token("option", variable, is_required=True),
    lambda: ExternalRewardOptions(url="http://host/", token_variable=variable),
  ):
    with pytest.raises(ValueError, match="expected the name of an environment variable") as error:
      refuse()
    assert variable not in str(error.value)


def test_the_password_of_a_proxy_is_not_in_a_message(monkeypatch):
  monkeypatch.setenv("http_proxy", "http://me:pass:word@host:port")
  with pytest.raises(PassingError) as error:
    JsonClient("http://127.0.0.2:9/", 2.0).post({})
  assert "word" not in str(error.value)


def test_a_missing_token(monkeypatch):
  monkeypatch.setenv("SOME_KEY", "")
  assert read_token("option", "SOME_KEY", is_required=False) == ""
  with pytest.raises(ValueError, match="SOME_KEY"):
    read_token("option", "SOME_KEY", is_required=True)


@pytest.mark.parametrize(
  "url",
  [
    f"http://name:{TOKEN}@host/score",
    f"https://{TOKEN}@host/score",
    f"https://host/score?key={TOKEN}",
    f"https://host/score?api_key={TOKEN}",
    f"https://host/score?x={TOKEN}",
    f"https://host/score?{TOKEN}",
    f"https://host/score#{TOKEN}",
    f"https://host/v1/{TOKEN}/score",
    "https://host/hf_" + "a1" * 17 + "/score",
    f"ftp://host/{TOKEN}",
    f"file:///{TOKEN}",
    f"{TOKEN}",
    f"http:///{TOKEN}",
    f"http://host:{TOKEN}/score",
    f"http://[{TOKEN}/score",
    f"http://host/sco\nre{TOKEN}",
    f"http://host/é{TOKEN}",
  ],
)
def test_an_address_with_a_secret_is_refused_unseen(url):
  with pytest.raises(ValueError, match="^http_reward.url: the address") as error:
    check_url("http_reward.url", url)
  assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
  "url", ["http://localhost:8000/score", "https://host/v1", "http://[::1]:80/", "http://host/a?version=2024-02-01&n=4"]
)
def test_plain_addresses_are_fine(url):
  check_url("http_reward.url", url)


def test_encrypted_connections_keep_the_deadline(serve):
  """The server answers a TLS handshake byte by byte with zeros."""
  with socket.create_server(("127.0.0.1", 0)) as listener:
    client = JsonClient(f"https://127.0.0.1:{listener.getsockname()[1]}/", 0.4)
    took, _ = seconds(lambda: client.post({}), PassingError)
  assert took < 2
