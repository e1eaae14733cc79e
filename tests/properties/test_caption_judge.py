"""Unified-Bench, protocol 2, with a local server that implements the API."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import threading

from PIL import Image
import pytest

from uae_jax import cli, http_client
from uae_jax.evaluation import caption_judge
from uae_jax.evaluation.caption_judge import Judge, WinRate, both_orders, read_verdict

pytestmark = pytest.mark.fast

KEY = "sk-very-secret-0123456789"


class Server:
  """Answers chat completions with a function of (caption A, caption B); records the requests."""

  def __init__(self, answer):
    self.requests, self.headers, self.failures, self.body = [], [], [], b""
    outer = self

    class Handler(BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        outer.requests.append(body)
        outer.headers.append(dict(self.headers))
        status = outer.failures.pop(0) if outer.failures else 200
        text = body["messages"][0]["content"][1]["text"]
        a, b = text.split("Caption A:\n")[1].split("\n\nCaption B:\n")
        content = answer(a, b.split("\n\nAnswer")[0])
        reply = {"choices": [{"message": {"role": "assistant", "content": content}}]}
        if status != 200:
          reply = {"error": {"message": f"wrong key {outer.headers[-1].get('Authorization')}"}}
        self.send_response(status)
        if status == 302:
          self.send_header("Location", f"{outer.url}/elsewhere")
        self.end_headers()
        self.wfile.write(outer.body or json.dumps(reply).encode())

      def log_message(self, *arguments):
        pass

    self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()


@pytest.fixture
def serve(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  servers = []

  def start(answer):
    servers.append(Server(answer))
    return servers[-1]

  yield start
  for server in servers:
    server.close()


def longer(a, b):
  return "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def test_both_orders_are_asked(serve):
  server = serve(longer)
  judge = Judge(server.url, "eyes")
  assert both_orders(judge, "data:,", "a long caption", "short") == 1.0
  assert both_orders(judge, "data:,", "short", "a long caption") == 0.0
  assert both_orders(judge, "data:,", "equal", "equal") == 0.5
  assert len(server.requests) == 6
  assert server.requests[0]["model"] == "eyes"
  kinds = [part["type"] for part in server.requests[0]["messages"][0]["content"]]
  assert kinds == ["image_url", "text"]


def test_a_judge_that_follows_the_order_gives_ties(serve):
  assert both_orders(Judge(serve(lambda a, b: "A").url, "eyes"), "data:,", "one", "two") == 0.5


def test_failures_that_pass_are_retried(serve):
  server = serve(longer)
  server.failures = [500, 429]
  assert Judge(server.url, "eyes", wait_seconds=0.01).verdict("data:,", "longer", "x") == "A"
  assert len(server.requests) == 3
  server.failures = [500] * 9
  with pytest.raises(caption_judge.JudgeError, match="HTTP 500 .after 3 attempts"):
    Judge(server.url, "eyes", wait_seconds=0.01, retries=2).verdict("data:,", "longer", "x")


def test_an_answer_without_verdict_is_asked_again(serve):
  answers = iter(["I cannot say.", "**B**"])
  assert Judge(serve(lambda a, b: next(answers)).url, "eyes", wait_seconds=0.01).verdict("data:,", "x", "y") == "B"


def test_a_refusal_is_not_retried_and_does_not_tell_the_key(serve):
  server = serve(longer)
  server.failures = [401]
  with pytest.raises(caption_judge.RefusedError) as error:
    Judge(server.url, "eyes").verdict("data:,", "x", "y")
  assert len(server.requests) == 1 and KEY not in str(error.value)


def test_the_key_does_not_follow_a_redirect(serve):
  server = serve(longer)
  server.failures = [302]
  with pytest.raises(caption_judge.JudgeError, match="HTTP 302"):
    Judge(server.url, "eyes").verdict("data:,", "x", "y")
  assert len(server.requests) == 1


def test_a_deep_or_endless_answer_costs_its_pair_alone(serve):
  judge = Judge(serve(lambda a, b: "a" * (1 << 21)).url, "eyes", retries=0)
  with pytest.raises(caption_judge.JudgeError, match="longer than"):
    judge.verdict("data:,", "x", "y")
  server = serve(longer)
  server.body = b"[" * 500_000
  with pytest.raises(caption_judge.JudgeError, match="nested too deeply"):
    Judge(server.url, "eyes", retries=0).verdict("data:,", "x", "y")


def test_a_key_that_no_header_holds_is_refused_at_start(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
  with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
    Judge("http://host/v1", "eyes")
  assert KEY not in str(error.value)


def test_answers_are_cached_without_the_key(serve, tmp_path):
  server = serve(lambda a, b: f"your key is {KEY}: A")
  judge = Judge(server.url, "eyes", cache=tmp_path / "cache")
  assert judge.verdict("data:,", "x", "y") == judge.verdict("data:,", "x", "y") == "A"
  assert len(server.requests) == 1
  assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
  assert judge.verdict("data:,", "y", "x") == "A" and len(server.requests) == 2, "another order is another question"
  kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
  assert kept and KEY.encode() not in kept


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://name:word@host/v1", "host/v1", "https://host/v1?key=1"])
def test_addresses_that_could_hold_a_key_are_refused(url):
  with pytest.raises(ValueError, match="address"):
    Judge(url, "eyes")


@pytest.mark.parametrize(
  ("answer", "verdict"),
  [
    ("A", "A"),
    ("**B**.", "B"),
    ("It is a tie", "TIE"),
    ("Tie.", "TIE"),
    ("A is good, but B names the dog.\nB", "B"),
    ("Verdict: B", "B"),
    ("**Answer:** A", "A"),
    ('{"verdict": "B"}', "B"),
    ("'A'", "A"),
    ("A\r\nB misses the color.", "A"),
    ("Both name the dog.\n\nThe better caption is B.", "B"),
    ("A is better than B.", "A"),
    ("Caption B describes the image better than Caption A.", "B"),
    ("I prefer A.", "A"),
  ],
)
def test_verdicts(answer, verdict):
  assert read_verdict(answer) == verdict


@pytest.mark.parametrize(
  "answer",
  [
    "",
    "I cannot say.",
    "A, because B invents a dog.",
    "**A** - it is more complete than B",
    "B. A misses the color.",
    "I prefer A over B",
    "A > B",
    "A or B",
    "Answer: A (not a tie)",
    "A\nB",
    "A\nOn reflection, the better one is B.",
    "A is not better than B.",
    "A isn't better.",
    "Not A.",
    "B is worse.",
    "B is too long.",
    "The first caption is better than B.",
    "A dog is missing in both.",
    "B would be better if it named the dog.",
  ],
)
def test_an_answer_that_is_not_clear_is_no_verdict(answer):
  with pytest.raises(http_client.PassingError, match="no clear verdict"):
    read_verdict(answer)


def test_an_unclear_answer_is_asked_again_and_never_inverted(serve):
  answers = iter(["A > B", "B. A misses the color.", "A"])
  judge = Judge(serve(lambda a, b: next(answers)).url, "eyes", wait_seconds=0.01)
  assert judge.verdict("data:,", "x", "y") == "A"


def test_an_image_that_cannot_be_judged_fails_alone(serve, tmp_path, monkeypatch):
  images = {}
  for name in ("good.png", "torn.png", "odd.png"):
    images[name] = tmp_path / name
    Image.new("RGB", (4, 4)).save(images[name])
  images["torn.png"].write_bytes(b"no image")
  captions = {name: "a caption" for name in images}
  original = caption_judge.data_uri

  def data_uri(file):
    if file.name == "odd.png":
      raise OverflowError("too large")
    return original(file)

  monkeypatch.setattr(caption_judge, "data_uri", data_uri)
  outcomes, failed = caption_judge.compare(Judge(serve(longer).url, "eyes"), images, captions, captions, workers=2)
  assert outcomes == {"good.png": 0.5} and set(failed) == {"torn.png", "odd.png"}
  assert "OverflowError: too large" in failed["odd.png"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"verdict": "C"}', b"[" * 100_000])
def test_a_damaged_answer_in_the_cache_is_asked_again(serve, tmp_path, content):
  server = serve(longer)
  judge = Judge(server.url, "eyes", cache=tmp_path)
  assert judge.verdict("data:,", "longer", "x") == "A"
  (file,) = tmp_path.iterdir()
  file.write_bytes(content)
  assert judge.verdict("data:,", "longer", "x") == "A" and len(server.requests) == 2
  assert judge.verdict("data:,", "longer", "x") == "A" and len(server.requests) == 2


def test_captions_are_read_as_they_were_written(tmp_path):
  file = tmp_path / "captions.jsonl"
  lines = [json.dumps({"image": f"x/{i}.png", "caption": f"one{i}\u2028\x85two"}, ensure_ascii=False) for i in "ab"]
  file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", "  "]).encode())
  assert caption_judge.read_captions(file) == {"a.png": "onea\u2028\x85two", "b.png": "oneb\u2028\x85two"}
  file.write_text('{"image": "a.png", "caption": null}\n')
  with pytest.raises(ValueError, match="captions.jsonl:1"):
    caption_judge.read_captions(file)


def test_confidence_intervals():
  """Wilson's interval; 8 of 10 is a textbook case."""
  rate = WinRate.of([1.0] * 8 + [0.0] * 2)
  assert (rate.wins, rate.ties, rate.losses) == (8, 0, 2)
  assert rate.low == pytest.approx(0.4902, abs=1e-4) and rate.high == pytest.approx(0.9433, abs=1e-4)
  sure = WinRate.of([1.0] * 10)
  assert sure.high == pytest.approx(1.0) and sure.low == pytest.approx(0.7225, abs=1e-4)
  assert WinRate.of([0.5] * 4).rate == 0.5


def captions(file, texts):
  file.write_text("".join(json.dumps({"image": f"x/{name}", "caption": text}) + "\n" for name, text in texts.items()))


def test_the_command(serve, tmp_path, capsys):
  server = serve(longer)
  for number in range(1, 5):
    Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
  captions(tmp_path / "ours.jsonl", {"1.png": "a long one", "2.png": "a long one", "3.png": "equal", "4.png": "x"})
  captions(tmp_path / "theirs.jsonl", {"1.png": "short", "2.png": "short", "3.png": "equal"})
  argv = ["bench", "--references", str(tmp_path), "--captions", str(tmp_path / "ours.jsonl")]
  argv += ["--against", str(tmp_path / "theirs.jsonl"), "--judge-url", server.url, "--judge-model", "eyes"]
  argv += ["--judge-model", "more-eyes", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out.json")]
  assert cli.main(argv) == 0
  result = json.loads((tmp_path / "out.json").read_text())
  assert result["judges"]["eyes"]["wins"] == 2 and result["judges"]["eyes"]["ties"] == 1
  assert result["overall"]["rate"] == pytest.approx(5 / 6)
  asked = len(server.requests)
  assert asked == 10, "two judges, two orders, and one question that is the same in both orders"
  assert cli.main(argv) == 0 and len(server.requests) == asked, "the second run is answered from the cache"
  printed = capsys.readouterr()
  kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
  assert KEY not in printed.out + printed.err and KEY.encode() not in kept


def test_a_refusing_endpoint_stops_the_command(serve, tmp_path, capsys):
  server = serve(longer)
  server.failures = [401] * 50
  for number in range(20):
    Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
  for name in ("ours", "theirs"):
    captions(tmp_path / f"{name}.jsonl", {f"{number}.png": name for number in range(20)})
  argv = ["bench", "--references", str(tmp_path), "--captions", str(tmp_path / "ours.jsonl")]
  argv += ["--against", str(tmp_path / "theirs.jsonl"), "--judge-url", server.url, "--judge-model", "eyes"]
  assert cli.main([*argv, "--workers", "1", "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o.json")]) == 1
  error = capsys.readouterr().err
  assert "HTTP 401" in error and KEY not in error and not (tmp_path / "o.json").exists()
  assert len(server.requests) < 10
