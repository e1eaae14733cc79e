"""XPK and SkyPilot get what their own parsers accepted, and words arrive intact on the far side."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import yaml

from launch import far_side, skypilot, xpk, yaml_text
from launch.job import Job
from tests.launch.far_side import HOSTILE, expand, run

pytestmark = pytest.mark.fast

TRAIN = ["--config=configs/scenes.py", "--workdir=gs://my-bucket/runs/one"]
IMAGE = "--image=us-docker.pkg.dev/lab/images/uae-jax:v1"
XPK = ["create", "one", "--cluster=tpus", "--topology=v5e:4x4", "--slices=2", IMAGE, *TRAIN]
SKY = ["one", "--topology=v5e:4x4", "--spot", "--zone=us-west4-a", *TRAIN]
SECRET = "--secret=TOKEN=projects/p/secrets/s"

# Options of `xpk workload create` and `xpk storage attach`, as XPK 1.16 prints them, of which the launcher has a use.
XPK_OPTIONS = {
  "workload": {
    *("--workload", "--cluster", "--tpu-type", "--num-slices", "--docker-image", "--command", "--env", "--storage"),
    *("--max-restarts", "--termination-grace-period-seconds", "--spot", "--flex", "--reservation"),
    *("--project", "--zone", "--force", "--filter-by-job"),
  },
  "storage": {"--bucket", "--type", "--size", "--auto-mount", "--readonly", "--mount-point", "--cluster"},
}


@pytest.fixture
def calls(tmp_path, monkeypatch):
  """Fakes xpk and sky, which record their arguments; $FAIL is what one of them says before it fails."""
  for name in ("xpk", "sky"):
    body = f'[ -z "$FAIL" ] || {{ echo "$FAIL"; exit 1; }}; printf "%s\\0" {name} "$@" END >> {tmp_path}/calls'
    (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
    (tmp_path / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  monkeypatch.setattr(skypilot, "ROOT", tmp_path)

  def read() -> list[list[str]]:
    file = tmp_path / "calls"
    return [call.split("\0")[:-1] for call in file.read_bytes().decode().split("END\0")[:-1]] if file.exists() else []

  return read


def test_xpk_attaches_the_bucket_and_creates_the_workload(calls, tmp_path):
  note = HOSTILE[0].partition("=")[2]
  assert xpk.main([*XPK, f"--env=NOTE={note}", SECRET, "--spot", "--", *HOSTILE]) == 0
  attach, create = calls()
  assert attach[:3] == ["xpk", "storage", "attach"] and "--bucket=my-bucket" in attach
  assert create[:3] == ["xpk", "workload", "create"] and "--storage=my-bucket" in create
  assert {"--tpu-type=v5litepod-4x4", "--num-slices=2", "--spot"} <= set(create)
  for call in (attach, create):
    assert {word.partition("=")[0] for word in call if word.startswith("--")} <= XPK_OPTIONS[call[1]]
  # XPK pastes the command into a block of YAML, one line, and values of variables between double quotes.
  command = next(word.partition("=")[2] for word in create if word.startswith("--command="))
  assert "\n" not in command
  value = next(word.partition("NOTE=")[2] for word in create if word.startswith("--env=NOTE="))
  assert expand(yaml.safe_load(f'"{value}"'), {}) == note
  arguments, environment = run(["bash", "-c", f"({expand(command, {})}) & wait $!"], {}, tmp_path)
  assert arguments[3:-1] == HOSTILE and environment["TOKEN"] == "value of projects/p/secrets/s/versions/latest"


def test_a_workload_of_unknown_fate_is_named(calls, capsys, monkeypatch):
  monkeypatch.setenv("FAIL", "[XPK] connection timed out")
  assert xpk.main([*[word for word in XPK if "workdir" not in word], "--workdir=/mnt/run"]) == 1
  assert "The workload one may exist and hold its TPUs" in capsys.readouterr().err


def test_a_dry_run_of_xpk_runs_nothing(calls, capsys):
  assert xpk.main([*XPK, "--dry-run"]) == 0
  assert xpk.main(["delete", "one", "--cluster=tpus", "--dry-run"]) == 0
  out = capsys.readouterr().out
  assert "xpk storage attach" in out and "xpk workload create" in out and calls() == []
  assert out.strip().endswith("xpk workload delete --workload=one --force --cluster=tpus")


def test_a_task_of_skypilot_recovers_and_mounts_the_bucket(capsys):
  assert skypilot.main(["render", *SKY, "--env=NOTE=1", "--env=HF_TOKEN"]) == 0
  task = yaml.safe_load(capsys.readouterr().out)
  assert task["resources"] == {
    "infra": "gcp/us-west4/us-west4-a",
    "accelerators": "tpu-v5litepod-16:1",
    "accelerator_args": {"tpu_vm": True, "runtime_version": "v2-alpha-tpuv5-lite"},
    "use_spot": True,
    "job_recovery": {"max_restarts_on_errors": 20, "recover_on_exit_codes": [143]},
  }
  assert task["file_mounts"] == {"/mnt/bucket": {"source": "gs://my-bucket", "mode": "MOUNT"}}
  assert task["secrets"] == {"HF_TOKEN": None} and task["envs"]["NOTE"] == "1"
  sky = pytest.importorskip("sky", reason="SkyPilot is not installed; its parser accepted this task at 0.14.1")
  assert sky.Task.from_yaml_config(task).name == "one"


def test_words_arrive_intact_through_skypilot(capsys, tmp_path):
  assert skypilot.main(["render", *SKY, SECRET, "--", *HOSTILE]) == 0
  script = yaml.safe_load(capsys.readouterr().out)["run"].replace("~/uae_venv/bin/uae-jax", "uae-jax")
  arguments, environment = run(["bash", "-c", script], {}, tmp_path)
  assert arguments[3:-1] == HOSTILE and "TOKEN" in environment


def test_skypilot_gets_the_name_of_a_local_variable_only(calls, tmp_path, monkeypatch, capfd):
  monkeypatch.setenv("HF_TOKEN", "hf_1234")
  assert skypilot.main(["launch", *SKY, "--env=HF_TOKEN"]) == 0
  said = "".join(capfd.readouterr()) + (tmp_path / "calls").read_text()
  assert "--secret=HF_TOKEN" in said
  assert "hf_1234" not in said + (tmp_path / "build/one.sky.yaml").read_text()
  monkeypatch.setenv("FAIL", "quota exceeded")
  assert skypilot.main(["launch", *SKY]) == 1
  assert "`sky jobs queue`" in capfd.readouterr().err


@pytest.mark.parametrize(
  ("main", "argv", "message"),
  [
    (xpk.main, ["create", "a" * 41, *XPK[2:]], "at most 40 characters"),
    (xpk.main, [*XPK, "--env=HF_TOKEN"], "give --secret=HF_TOKEN=projects/"),
    (xpk.main, [*XPK, "--secret=A=k8s:b/c"], "is for launch.jobset"),
    (xpk.main, [*XPK, "--topology=v5e:2x2"], "XPK has no slice v5e:2x2"),
    (xpk.main, [*XPK, "--flex-start", "--max-run-duration=10h"], "in GKE the node pool has it"),
    (xpk.main, [*XPK[:-1], "--workdir=/mnt/bucket/one"], "no bucket is mounted there"),
    (skypilot.main, ["render", *SKY[:-1], "--workdir=/mnt/bucket/one"], "no bucket is mounted there"),
    (skypilot.main, ["render", *SKY, "--zone=nowhere"], "expected a zone such as us-west4-a"),
    (skypilot.main, ["render", *SKY, "--slices=2"], "does not connect several slices"),
    (skypilot.main, ["render", "one", "--topology=tpu7x:4x4x4", *TRAIN], "no Cloud TPU VM tpu7x:4x4x4"),
    (skypilot.main, ["render", "one", "--topology=v5e:4x4", "--flex-start", *TRAIN], "on demand or --spot"),
  ],
)
def test_what_an_engine_cannot_do_is_one_line(calls, capsys, main, argv, message):
  with pytest.raises(SystemExit, match="2"):
    main(argv)
  error = capsys.readouterr().err.strip()
  assert message in error and "\n" not in error and calls() == []


def test_a_secret_is_read_with_the_identity_of_the_machine(tmp_path):
  """The snippet that runs on the far side, against a stand-in of the metadata server and of Secret Manager."""
  seen = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      seen.append((self.path, self.headers.get("Metadata-Flavor"), self.headers.get("Authorization")))
      payload = base64.b64encode(b"it's $(x)").decode()
      answer = {"access_token": "t1"} if "token" in self.path else {"payload": {"data": payload}}
      self.send_response(200)
      self.end_headers()
      self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://127.0.0.1:{server.server_port}"
  code = far_side.FETCH
  for host in ("http://metadata.google.internal", "https://secretmanager.googleapis.com"):
    assert host in code
    code = code.replace(host, address)
  out = subprocess.check_output([sys.executable, "-IS", "-c", code, "projects/p/secrets/s/versions/3"], text=True)
  server.shutdown()
  assert out == "it's $(x)"
  assert seen[0][1] == "Google" and seen[1][::2] == ("/v1/projects/p/secrets/s/versions/3:access", "Bearer t1")


def test_a_job_without_its_secret_does_not_start(tmp_path):
  job = Job("one", secrets=(("TOKEN", "projects/p/secrets/denied/versions/latest"),))
  with pytest.raises(subprocess.CalledProcessError):
    run(["bash", "-c", far_side.script(job).replace("/denied/", "/denied/x/")], {}, tmp_path)
  assert not (tmp_path / "arguments").exists()


ODD = ["", " a", "a\n", "a\n\nb\n", "true", "1.0", "1e3", "null", "a: b", "- a", "~", "4x4", "#", "é\u2028\U0001f600"]


@pytest.mark.parametrize("text", [*HOSTILE, *ODD])
def test_text_survives_yaml(text):
  document = {"key": text, "list": [text, {"a": text, "b": {}}, [], [[text]]], text or "k": 1, "n": None, "t": True}
  assert list(yaml.safe_load_all(yaml_text.dump([document, {"x": 1}]))) == [document, {"x": 1}]
