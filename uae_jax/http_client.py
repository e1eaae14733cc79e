"""A client that posts JSON to an untrusted server; used by external rewards and the caption judge.

- Redirects are not followed: they would send the bearer token to another host.
- One deadline covers connecting, sending, headers and body. Only name resolution, done by the system, is not covered.
- Headers, body and nesting of a response are bounded.
- The token comes from an environment variable and is removed from everything the server returns.
"""

from collections.abc import Callable, Mapping
import dataclasses
import email.message
import functools
import http.client
import io
import json
import math
import os
import random
import re
import socket
import time
from typing import Any, TypeVar
import urllib.error
import urllib.parse
import urllib.request

MAX_ANSWER_BYTES = 1 << 20
MAX_WAIT_SECONDS = 60.0
# Retried in addition to 5xx: timeouts, conflicts and too many requests are often temporary.
RETRIED_STATUSES = (408, 409, 425, 429)
SEND_BYTES = 1 << 16
SECRET_NAME = re.compile(r"key|token|secret|passw|pwd|auth|sig|cred|session|jwt|bearer", re.IGNORECASE)
SECRET_VALUE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9_.~+/=-]{20,}|sk-.*")
SECRET_SEGMENT = re.compile(r"sk-.{8,}|hf_\w{20,}")
REMOVED = "[token]"

Result = TypeVar("Result")


class HttpFailure(Exception):
  """A request without a usable response.

  Attributes:
    status: HTTP status of the response; 0 if the failure is not due to the status.
  """

  def __init__(self, message: str, status: int = 0):
    super().__init__(message)
    self.status = status


class RefusedError(HttpFailure):
  """A failure that a retry cannot fix."""


class PassingError(HttpFailure):
  """A failure that a retry may fix.

  Attributes:
    wait_seconds: wait requested by the server, at most `MAX_WAIT_SECONDS`.
  """

  def __init__(self, message: str, status: int = 0, wait_seconds: float = 0.0):
    super().__init__(message, status)
    self.wait_seconds = wait_seconds


def check_url(name: str, url: str) -> None:
  """Rejects an address that is not plain http(s) or may contain a secret, because logs and reports show addresses.

  Raises:
    ValueError: the address is rejected; the message names the option and never repeats the address.
  """
  try:
    parts = urllib.parse.urlsplit(url)
    is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
  except ValueError:
    is_address = False
  if not is_address or not re.fullmatch(r"[!-~]+", url):
    raise ValueError(f"{name}: the address is not understood; expected http://host[:port]/path or https://...")
  remedy = "put the key into an environment variable and give the name of that variable instead"
  if "@" in parts.netloc:
    raise ValueError(f"{name}: the address has a user name or password in it; {remedy}")
  if any(SECRET_SEGMENT.fullmatch(segment) for segment in parts.path.split("/")):
    raise ValueError(f"{name}: the address has what looks like a key in its path; {remedy}")
  query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
  if parts.fragment or any(
    SECRET_NAME.search(key) or SECRET_VALUE.fullmatch(key) or SECRET_VALUE.fullmatch(value) for key, value in query
  ):
    raise ValueError(f"{name}: the address has what looks like a key in its query or fragment; {remedy}")


def check_variable(option: str, variable: str) -> None:
  """Rejects what is not the name of an environment variable, which may be the key itself.

  Raises:
    ValueError: it is no such name; the message never repeats it.
  """
  is_name = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable)
  if not is_name or (variable not in os.environ and SECRET_VALUE.fullmatch(variable)):
    raise ValueError(f"{option}: expected the name of an environment variable that holds the key, not the key itself")


def read_token(option: str, variable: str, *, is_required: bool) -> str:
  """Reads the bearer token from an environment variable; "" if there is none and none is required.

  Args:
    option: name of the option, for error messages.
    variable: name of the environment variable.
    is_required: raise if the variable is absent or empty.

  Raises:
    ValueError: the variable is missing, or its value is not valid in a header. The message never repeats the value.
  """
  if variable:
    check_variable(option, variable)
  token = os.environ.get(variable, "")
  if not token and is_required:
    raise ValueError(f"{option}: the environment variable {variable} is not set or empty")
  if token and not re.fullmatch(r"[!-~]+", token):
    raise ValueError(
      f"{option}: the value of the environment variable {variable} has a space, line break, control character or "
      "non-Latin character in it; expected printable ASCII (a line break at the end often comes from reading a file)"
    )
  return token


@dataclasses.dataclass(frozen=True)
class JsonClient:
  """A client that posts JSON to one address.

  Attributes:
    url: address that has passed `check_url`.
    timeout_seconds: time limit of one request, from connecting to the last byte of the response.
    token: bearer token; "" for none.
    max_answer_bytes: maximum size of a response body; longer ones are refused.
  """

  url: str
  timeout_seconds: float
  token: str = dataclasses.field(default="", repr=False)
  max_answer_bytes: int = MAX_ANSWER_BYTES

  def post(self, content: Mapping[str, Any]) -> Any:
    """Sends one request and returns the decoded JSON response, with the token removed.

    Raises:
      PassingError: a retry may help: no connection, timeout, a retried status, or a response that is not JSON.
      RefusedError: a retry cannot help: any other status, including redirects, or a response that is too long or too
        deeply nested.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if self.token:
      headers["Authorization"] = f"Bearer {self.token}"
    request = urllib.request.Request(self.url, json.dumps(content).encode(), headers, method="POST")
    deadline = time.monotonic() + self.timeout_seconds
    try:
      with _opener(deadline).open(request, timeout=self.timeout_seconds) as response:
        body = self._body(response)
    except urllib.error.HTTPError as error:
      error.close()
      # The message repeats neither the server's text nor the address of a redirect.
      if error.code >= 500 or error.code in RETRIED_STATUSES:
        raise PassingError(f"HTTP {error.code}", error.code, _retry_after(error.headers)) from None
      raise RefusedError(f"HTTP {error.code}", error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
      if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
        raise PassingError(f"no whole answer within {self.timeout_seconds:g} seconds") from None
      reason = getattr(error, "reason", error)
      # Messages of other types may quote what the server sent, or the password in the address of a proxy.
      text = f": {reason}" if isinstance(reason, OSError) else ""
      raise PassingError(self.redact(f"{type(reason).__name__}{text}")[:200]) from None
    try:
      return self._redacted(json.loads(body))
    except RecursionError:
      raise RefusedError("the answer is nested too deeply") from None
    except ValueError as error:
      raise PassingError(f"the answer is not JSON ({type(error).__name__})") from None

  def redact(self, text: str) -> str:
    """Replaces the token in a text."""
    return text.replace(self.token, REMOVED) if self.token else text

  def _redacted(self, value: Any) -> Any:
    if isinstance(value, str):
      return self.redact(value)
    if isinstance(value, list):
      return [self._redacted(item) for item in value]
    if isinstance(value, dict):
      return {self.redact(key): self._redacted(item) for key, item in value.items()}
    return value

  def _body(self, response: http.client.HTTPResponse) -> bytes:
    parts, size = [], 0
    while part := response.read1(SEND_BYTES):
      parts.append(part)
      size += len(part)
      if size > self.max_answer_bytes:
        raise RefusedError(f"the answer is longer than {self.max_answer_bytes} bytes")
    return b"".join(parts)


def with_retries(attempt: Callable[[], Result], retries: int, backoff_seconds: float) -> Result:
  """Calls `attempt` until it does not raise `PassingError`, and returns its result.

  Args:
    attempt: called up to `retries` + 1 times.
    retries: number of attempts after the first.
    backoff_seconds: pause before the first retry; doubles each time, times a random factor in [1, 2). A longer wait
      requested by the server takes precedence.

  Raises:
    PassingError: the last attempt failed.
    RefusedError: an attempt raised it; there is no retry.
  """
  for number in range(retries + 1):
    try:
      return attempt()
    except PassingError as error:
      if number == retries:
        raise PassingError(f"{error} (after {number + 1} attempts)" if number else str(error), error.status) from None
      time.sleep(max(error.wait_seconds, backoff_seconds * 2**number * (1 + random.random())))
  raise ValueError(f"retries = {retries}: expected 0 or more")


def _retry_after(headers: email.message.Message) -> float:
  """Wait requested by the server, in seconds, at most `MAX_WAIT_SECONDS`."""
  try:
    seconds = float(headers.get("Retry-After", 0))
  except ValueError:
    return 0.0
  return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), MAX_WAIT_SECONDS)


class _Remaining:
  """The time left until a deadline, used as the timeout of a socket's next operation."""

  def __init__(self, deadline: float):
    self._deadline = deadline

  def set(self, sock: socket.socket) -> socket.socket:
    left = self._deadline - time.monotonic()
    if left <= 0:
      raise TimeoutError("timed out")
    sock.settimeout(left)
    return sock


class _Incoming(io.RawIOBase):
  """A socket's received bytes, within a deadline: the timeout of a socket bounds a single read, not the response."""

  def __init__(self, sock: socket.socket, remaining: _Remaining):
    self._stream, self._sock, self._remaining = sock.makefile("rb", buffering=0), sock, remaining

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int | None:
    self._remaining.set(self._sock)
    return self._stream.readinto(buffer)

  def close(self) -> None:
    self._stream.close()
    super().close()


class _TimedSocket:
  """The methods of a connected socket that http.client uses, within a deadline."""

  def __init__(self, sock: socket.socket, remaining: _Remaining):
    self._sock, self._remaining = sock, remaining

  def sendall(self, content: bytes) -> None:
    view = memoryview(content)
    while view:
      view = view[self._remaining.set(self._sock).send(view[:SEND_BYTES]) :]

  def makefile(self, mode: str) -> io.BufferedReader:
    assert mode == "rb"
    return io.BufferedReader(_Incoming(self._sock, self._remaining))

  def close(self) -> None:
    self._sock.close()


class _HttpConnection(http.client.HTTPConnection):
  """A connection whose operations all end by the deadline."""

  sock: Any  # a socket, and once connected a `_TimedSocket`

  def __init__(self, *arguments, remaining: _Remaining, **keywords):
    super().__init__(*arguments, **keywords)
    self._remaining = remaining
    self._create_connection = self._dial

  def _dial(self, address: tuple[str, int], *_unused) -> socket.socket:
    # Like socket.create_connection, which would grant the full timeout to each address of a host.
    failure = OSError("the host has no address")
    for family, kind, protocol, _, target in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
      sock = socket.socket(family, kind, protocol)
      try:
        self._remaining.set(sock).connect(target)
        return self._remaining.set(sock)
      except OSError as error:
        sock.close()
        failure = error
    raise failure

  def connect(self) -> None:
    super().connect()
    self.sock = _TimedSocket(self.sock, self._remaining)


class _HttpsConnection(_HttpConnection, http.client.HTTPSConnection):
  # `super()` in `_HttpConnection` is HTTPSConnection here.
  pass


class _Handler(urllib.request.AbstractHTTPHandler):
  """A handler that opens connections within the deadline."""

  def __init__(self, remaining: _Remaining):
    super().__init__()
    self._remaining = remaining

  def http_open(self, request):
    return self.do_open(functools.partial(_HttpConnection, remaining=self._remaining), request)

  def https_open(self, request):
    return self.do_open(functools.partial(_HttpsConnection, remaining=self._remaining), request)

  http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def _opener(deadline: float) -> urllib.request.OpenerDirector:
  """An opener that supports proxies and does not follow redirects."""
  opener = urllib.request.OpenerDirector()
  for handler in (
    urllib.request.ProxyHandler(),
    _Handler(_Remaining(deadline)),
    urllib.request.HTTPDefaultErrorHandler(),
    urllib.request.HTTPErrorProcessor(),
  ):
    opener.add_handler(handler)
  return opener
