"""A server on this machine with the part of Google Cloud Storage's JSON interface that files need."""

import base64
from collections import defaultdict
from collections.abc import Iterator
import contextlib
import datetime
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import threading
import time
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

BUCKET = "pictures"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class ObjectStore:
  """One bucket in memory.

  Attributes:
    objects: name -> (content, generation).
    faults: name -> HTTP statuses that the next downloads of the object get; -1 cuts the answer short, and -2 gives none
      for a second. For the name "" they are those of the next lists, and for "PUT NAME" those of the next uploads.
    downloads: names of the objects that were sent.
    uploads: names of the objects that were written, in order.
  """

  def __init__(self):
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.faults: dict[str, list[int]] = defaultdict(list)
    self.downloads: list[str] = []
    self.uploads: list[str] = []
    self._generation = 1_700_000_000_000_000

  def put(self, name: str, content: bytes) -> None:
    # Microseconds, as in Google's storage; two writes never have the same one.
    self._generation = max(self._generation + 1, round(time.time() * 1e6))
    self.objects[name] = content, self._generation

  def upload(self, folder: Path, prefix: str) -> None:
    for file in folder.rglob("*"):
      if file.is_file():
        self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())

  def info(self, name: str) -> dict:
    content, generation = self.objects[name]
    crc = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
    md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
    about = {"name": name, "bucket": BUCKET, "size": str(len(content)), "generation": str(generation), "crc32c": crc}
    return about | {
      "md5Hash": md5,
      "updated": datetime.datetime.fromtimestamp(generation / 1e6, datetime.UTC).strftime(TIME_FORMAT),
    }

  @contextlib.contextmanager
  def serve(self) -> Iterator[str]:
    """Yields the server's URL."""
    store = self

    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *_):
        pass

      def answer(self, status: int, content: bytes, length: int | None = None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

      def do_GET(self):
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        name = unquote(name.removeprefix("/"))
        is_download = query.get("alt") == ["media"]
        faults = store.faults[name] if is_download or not name else []
        status = faults.pop(0) if faults else 200
        if status == -2:
          time.sleep(1.0)
          self.close_connection = True
          return
        if bucket != BUCKET or (name and name not in store.objects):
          status = 404
        if status not in (-1, 200):
          self.answer(status, json.dumps({"error": {"message": f"status {status}"}}).encode())
        elif not name:
          prefix = query.get("prefix", [""])[0]
          found = [store.info(name) for name in sorted(store.objects) if name.startswith(prefix)]
          self.answer(200, json.dumps({"items": found}).encode())
        elif is_download:
          store.downloads.append(name)
          content = store.objects[name][0]
          start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
          content = content[start:]
          self.answer(206 if start else 200, content[: len(content) // 2] if status < 0 else content, len(content))
          self.close_connection = status < 0
        else:
          self.answer(200, json.dumps(store.info(name)).encode())

      def do_POST(self):
        """An upload in one request, or the start of one in parts, or its only part: tests write nothing longer."""
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "upload_id" in query:
          self.store_whole(url, query["upload_id"][0], body)
          return
        if query["uploadType"] == ["resumable"]:
          name = query["name"][0]
          place = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?upload_id={quote(name, safe='')}"
          self.send_response(200)
          self.send_header("Location", place)
          self.send_header("Content-Length", "0")
          self.end_headers()
          return
        head, _, rest = body.partition(b"\n--==0==\nContent-Type: ")
        name = json.loads(head.partition(b"\n\n")[2])["name"]
        self.store_whole(url, name, rest.partition(b"\n\n")[2].removesuffix(b"\n--==0==--"))

      def store_whole(self, url, name: str, content: bytes):
        status = store.faults[f"PUT {name}"].pop(0) if store.faults[f"PUT {name}"] else 200
        status = status if f"/b/{BUCKET}/" in url.path else 404
        if status == 200:
          store.put(name, content)
          store.uploads.append(name)
        about = store.info(name) if status == 200 else {"error": {"message": f"status {status}"}}
        self.answer(status, json.dumps(about).encode())

      def do_DELETE(self):
        name = unquote(urlsplit(self.path).path.partition("/o/")[2])
        self.answer(204 if store.objects.pop(name, None) else 404, b"")

    class Server(ThreadingHTTPServer):
      def handle_error(self, *_):
        """Says nothing of clients that end a connection: gcsfs asks two questions at once and takes one answer."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()
      server.server_close()


@contextlib.contextmanager
def served(monkeypatch, folder: Path) -> Iterator[ObjectStore]:
  """A store that clients of this process use, with copies in a new cache below `folder`."""
  monkeypatch.setenv("UAE_JAX_CACHE", str(folder / "cache"))
  store = ObjectStore()
  with store.serve() as url:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    monkeypatch.setattr("gcsfs.core.GCSFileSystem._cache", {})
    yield store
