"""A server for the external reward `http`, with the standard library and Pillow; replace `score` by your own reward.

    python examples/reward_server.py --port 8000
    uae-jax train ... --config.STAGE.http_reward.url=http://localhost:8000/score

One POST per group of rollouts, several at the same time:

    request   {"captions": [text, ...], "images": [base64 PNG, ...], "original": base64 PNG, "metadata": {...}}
    answer    {"rewards": [number or null, ...]}, one per caption; null where there is no reward

`images` is absent if `http_reward.sends_images` is off. `original` is absent for prompts without pictures, which have
`metadata`: the other fields of their record. 4xx refuses a group for good; after 5xx the client tries again.
"""

import argparse
import base64
import http.server
import io
import json

from PIL import Image, ImageStat


def score(caption: str, image: Image.Image | None, original: Image.Image | None, metadata: dict) -> float | None:
  """Returns the reward of one rollout: here the contrast of the image, in [0, 1]. Replace it.

  Args:
    caption: caption or prompt that the image was generated from.
    image: the generated image; None if images are not sent.
    original: image that was captioned; None for prompts without pictures.
    metadata: the other fields of a prompt's record; empty if there are none.
  """
  del caption, original, metadata
  return None if image is None else ImageStat.Stat(image.convert("L")).stddev[0] / 127.5


def rewards(request: dict) -> list[float | None]:
  """Returns one reward per caption of a request.

  Raises:
    KeyError, TypeError, ValueError, OSError: the request is not understood.
  """
  captions = request["captions"]
  images = [decode(text) for text in request["images"]] if "images" in request else [None] * len(captions)
  original = decode(request["original"]) if "original" in request else None
  metadata = request.get("metadata", {})
  return [score(caption, image, original, metadata) for caption, image in zip(captions, images, strict=True)]


def decode(text: str) -> Image.Image:
  """Decodes a base64 PNG."""
  return Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"])


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers each request in its own thread; a model that is not safe to share needs a lock in `score`."""

  def do_POST(self) -> None:
    content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    try:
      status, answer = 200, {"rewards": rewards(json.loads(content))}
    except (KeyError, TypeError, ValueError, OSError) as error:
      status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
    body = json.dumps(answer).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)


def main() -> None:
  parser = argparse.ArgumentParser(description="A server for the external reward.")
  parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for all (default: %(default)s)")
  parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
  options = parser.parse_args()
  with http.server.ThreadingHTTPServer((options.host, options.port), Handler) as server:
    print(f"listening on http://{options.host}:{server.server_address[1]}/score", flush=True)
    server.serve_forever()


if __name__ == "__main__":
  main()
