"""Manifests of a JobSet say what a job says, arrive intact in the container, and fit the cluster's schemas."""

import json
import os
from pathlib import Path
import re
import sys

import pytest
import yaml

from launch import jobset
from tests.launch.far_side import HOSTILE, container_run

pytestmark = pytest.mark.fast

JOB = [
  "--config=configs/scenes.py",
  "--workdir=gs://my-bucket/runs/one",
  "--image=us-docker.pkg.dev/lab/images/uae-jax:v1",
]
TWO = [*JOB, "--topology=v5e:4x4", "--slices=2"]
LOST = {"exit": 1, "stderr": "Unable to connect to the server: dial tcp 10.0.0.1:443: i/o timeout"}

FAKE_KUBECTL = """#!{python} -IS
import json, os, sys
folder = os.environ["FAKE"]
verb = sys.argv[2]
documents = sys.stdin.read() if verb == "create" else ""
with open(folder + "/calls", "a") as file:
  file.write(json.dumps([sys.argv[1:], documents]) + "\\n")
plan = json.load(open(folder + "/plan"))
answer = (plan.get(verb) or [None]).pop(0) or {{}}
json.dump(plan, open(folder + "/plan", "w"))
print(answer.get("stderr", ""), file=sys.stderr)
print(answer.get("stdout", "{{}}"))
sys.exit(answer.get("exit", 0))
"""


class Cluster:
  """The folder of a fake kubectl: its calls, and the answers planned for a verb."""

  def __init__(self, folder: Path):
    self.folder = folder

  def plan(self, **answers):
    (self.folder / "plan").write_text(json.dumps(answers))

  def calls(self) -> list[tuple[list[str], str]]:
    file = self.folder / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  def verbs(self) -> list[str]:
    return [" ".join([words[1], *words[2:-2]]) if words[1] == "delete" else words[1] for words, _ in self.calls()]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  program = tmp_path / "kubectl"
  program.write_text(FAKE_KUBECTL.format(python=sys.executable))
  program.chmod(0o755)
  monkeypatch.setenv("FAKE", str(tmp_path))
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  cluster = Cluster(tmp_path)
  cluster.plan()
  return cluster


def launch(command: str, *flags: str, name="one") -> int:
  return jobset.main([command, name, *flags])


def rendered(capsys, *flags: str) -> dict:
  assert launch("render", *flags) == 0
  return yaml.safe_load(capsys.readouterr().out)


def pod(manifest: dict) -> dict:
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


def test_a_manifest_says_what_the_job_says(capsys):
  manifest = rendered(capsys, *TWO, "--queue=tpu", "--spot", "--zone=us-west4-a", "--", "--config.seed=1")
  assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tpu"
  exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  assert manifest["metadata"]["annotations"] == exclusive
  (job,) = manifest["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 4
  spec = pod(manifest)["spec"]
  assert spec["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
    "cloud.google.com/gke-spot": "true",
    "topology.kubernetes.io/zone": "us-west4-a",
  }
  (container,) = spec["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["command"] == [
    *("uae-jax", "train", "--config=configs/scenes.py", "--workdir=/mnt/bucket/runs/one", "--config.seed=1"),
    "--preempted_exit_code=143",
  ]
  assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/mnt/bucket/compilation_cache"} in container["env"]
  assert spec["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
  assert spec["terminationGracePeriodSeconds"] == 300


def test_a_preemption_restarts_all_slices_and_does_not_count(capsys):
  manifest = rendered(capsys, *TWO, "--max-restarts=3")
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  preempted, saved = job["podFailurePolicy"]["rules"]
  assert preempted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
  assert saved["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [143]}
  (rule,) = manifest["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3 and job["backoffLimit"] == 0
  # A pod failure policy needs pods that are not restarted in place.
  assert pod(manifest)["spec"]["restartPolicy"] == "Never"


def test_a_workdir_after_two_dashes_may_be_a_word_of_its_own(capsys):
  config, workdir, *rest = TWO
  manifest = rendered(capsys, *rest, "--", *config.split("="), *workdir.split("="))
  assert manifest == rendered(capsys, *rest, "--", config, workdir) == rendered(capsys, *TWO)


def test_a_workdir_that_a_restart_loses_is_said(capsys):
  assert launch("render", TWO[0], *TWO[2:], "--workdir=runs/one") == 0
  assert "only what is under /mnt/bucket outlives" in capsys.readouterr().err
  assert launch("render", *TWO) == 0
  assert capsys.readouterr().err == ""


def test_a_config_that_the_repository_does_not_have_is_said(capsys):
  assert launch("render", "--config=configs/scnes.py:smoke", *TWO[1:]) == 0
  assert re.fullmatch(r"note: there is no configs/scnes.py in \S+: the run fails .*\n", capsys.readouterr().err)


def test_slices_of_one_host_share_a_node_pool(capsys):
  assert "annotations" not in rendered(capsys, *JOB, "--topology=v6e:2x4", "--slices=3")["metadata"]


@pytest.mark.parametrize("secret", [[], ["--secret=TOKEN=projects/p/secrets/s"]])
def test_words_with_shell_syntax_arrive_intact(capsys, tmp_path, secret):
  note = HOSTILE[0].partition("=")[2]
  manifest = rendered(capsys, *TWO, f"--env=NOTE={note}", *secret, "--", *HOSTILE)
  arguments, environment = container_run(pod(manifest)["spec"]["containers"][0], {}, tmp_path)
  assert arguments[3:-1] == HOSTILE
  assert environment["NOTE"] == note
  assert environment.get("TOKEN") == ("value of projects/p/secrets/s/versions/latest" if secret else None)
  assert not (tmp_path / "pwned").exists()


def test_no_manifest_contains_a_secret(capsys, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_1234")
  flags = [*TWO, "--env=HF_TOKEN", "--secret=KEY=k8s:judge/key"]
  manifest = rendered(capsys, *flags)
  env = {
    item["name"]: item.get("valueFrom", {}).get("secretKeyRef")
    for item in pod(manifest)["spec"]["containers"][0]["env"]
  }
  assert env["HF_TOKEN"] == {"name": "one-env", "key": "HF_TOKEN"}
  assert env["KEY"] == {"name": "judge", "key": "key"}
  assert launch("apply", *flags, "--dry-run") == 0
  assert "hf_1234" not in capsys.readouterr().out
  assert launch("render", *TWO, "--env=HF_TOKEN=hf_1234") == 1
  error = capsys.readouterr().err
  assert "--secret=HF_TOKEN=..." in error and "hf_1234" not in error


def test_apply_creates_the_secret_through_stdin_and_then_the_jobset(cluster, capfd, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_1234")
  assert launch("apply", *TWO, "--env=HF_TOKEN") == 0
  (first, secret), (second, jobs) = cluster.calls()
  assert first == second == ["--namespace=default", "create", "--filename=-"]
  assert yaml.safe_load(secret)["stringData"] == {"HF_TOKEN": "hf_1234"}
  assert yaml.safe_load(jobs)["kind"] == "JobSet"
  said = "".join(capfd.readouterr())
  assert "hf_1234" not in said and "about 38.40 USD per hour" in said


def test_a_missing_local_variable_is_reported_before_anything_is_created(cluster, capsys, monkeypatch):
  monkeypatch.delenv("HF_TOKEN", raising=False)
  assert launch("apply", *TWO, "--env=HF_TOKEN") == 1
  assert "HF_TOKEN is not set" in capsys.readouterr().err and cluster.calls() == []


@pytest.mark.parametrize(
  ("answers", "verbs", "message"),
  [
    # The name is taken: what runs under it is not touched.
    (
      [None, {"exit": 1, "stderr": 'Error from server (AlreadyExists): jobsets "one" already exists'}],
      ["create", "create", "delete secret/one-env"],
      "choose another name",
    ),
    (
      [{"exit": 1, "stderr": 'Error from server (AlreadyExists): secrets "one-env" already exists'}],
      ["create"],
      "secret:",
    ),
    # The answer was lost: the JobSet may exist, and is deleted.
    ([None, LOST], ["create", "create", "delete jobset/one secret/one-env"], "connection was lost"),
    (
      [None, {"exit": 1, "stderr": 'error: resource mapping not found: no matches for kind "JobSet" in version "x"'}],
      ["create", "create", "delete jobset/one secret/one-env"],
      "the cluster has no JobSet controller",
    ),
    (
      [None, {"exit": 1, "stderr": "Error from server (Forbidden): jobsets is forbidden: exceeded quota: compute"}],
      ["create", "create", "delete jobset/one secret/one-env"],
      "quota is too small",
    ),
  ],
)
def test_a_failed_apply_leaves_nothing_behind(cluster, capsys, monkeypatch, answers, verbs, message):
  monkeypatch.setenv("HF_TOKEN", "hf_1234")
  cluster.plan(create=answers)
  assert launch("apply", *TWO, "--env=HF_TOKEN") == 1
  assert cluster.verbs() == verbs
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("jobset: error:") and message in error


def test_a_delete_that_fails_says_what_may_still_run(cluster, capsys):
  cluster.plan(delete=[LOST] * 4)
  assert launch("delete", "--backoff-seconds=0") == 1
  assert len(cluster.calls()) == 4
  assert "jobset/one and secret/one-env may still exist, and a JobSet keeps its TPUs" in capsys.readouterr().err
  cluster.plan(delete=[LOST])
  assert launch("delete", "--backoff-seconds=0") == 0


def test_status_and_logs_ask_for_the_pods_of_the_jobset(cluster, capfd):
  assert launch("status") == 0
  assert launch("logs") == 0
  (jobs, _), (pods, _), (logs, _) = cluster.calls()
  assert jobs[1:] == ["get", "jobset/one"]
  assert pods[1:] == ["get", "pods", "--selector=jobset.sigs.k8s.io/jobset-name=one"]
  assert logs[1] == "logs" and "--container=train" in logs


@pytest.mark.parametrize(
  ("name", "flags", "message"),
  [
    ("One", TWO, "'One': expected at most 63 of a-z"),
    ("--rm", TWO, "required: name"),
    ("a" * 60, TWO, "too long a name"),
    ("one", [*TWO, "--bucket=other"], "--workdir is in the bucket my-bucket, but --bucket says other"),
    ("one", [*TWO, "--secret=KEY=hf_1234"], "not the secret itself"),
    ("one", [*TWO, "--env=A-B=hf_1234"], "expected NAME=VALUE"),
    ("one", [*TWO, "--env=A=1", "--env=A=2"], "--env and --secret give A twice"),
    ("one", [*TWO, "--env=KEY", "--secret=KEY=k8s:a/b"], "--env and --secret give KEY twice"),
    ("one", [*TWO, "--image=-rm"], "expected an image"),
    ("one", [*TWO, "--spot", "--flex-start"], "not allowed with argument"),
    ("one", JOB, "required: --topology"),
    ("one", [*TWO, "--zone=us-west4"], "'us-west4': expected a zone such as us-west4-a"),
    ("one", [*TWO, "--flex-start", "--max-run-duration=10h"], "in GKE the node pool has it"),
    ("one", [*TWO, "--", "--workdir=/mnt/bucket/two"], "--workdir is given 2 times"),
    ("one", [*TWO, "--", "--config", "configs/other.py"], "--config is given 2 times"),
    ("one", [TWO[0], *TWO[2:], "--workdir=/mnt/bucket/runs/one"], "no bucket is mounted there: give --bucket=NAME"),
  ],
)
def test_wrong_options_are_one_line(cluster, capsys, name, flags, message):
  with pytest.raises(SystemExit, match="2"):
    launch("apply", *flags, name=name)
  error = capsys.readouterr().err.strip()
  assert message in error and "\n" not in error and "hf_1234" not in error
  assert cluster.calls() == []


def strict(schema):
  """A schema of Kubernetes as a JSON schema that refuses unknown fields."""
  if isinstance(schema, list):
    return [strict(item) for item in schema]
  if not isinstance(schema, dict):
    return schema
  schema = {key: strict(value) for key, value in schema.items() if key != "format"}
  if schema.get("x-kubernetes-int-or-string"):
    schema.pop("type", None)
  if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
    schema.setdefault("additionalProperties", False)
  return schema


@pytest.mark.skipif("UAE_CRDS" not in os.environ, reason="needs UAE_CRDS, a folder with the CRDs of JobSet and Kueue")
def test_manifests_fit_the_schemas_of_jobset_and_kueue(capsys):
  jsonschema = pytest.importorskip("jsonschema")
  schemas = {}
  for file in Path(os.environ["UAE_CRDS"]).rglob("*.yaml"):
    definition = yaml.safe_load(file.read_text())
    for version in definition["spec"]["versions"]:
      schema = strict(version["schema"]["openAPIV3Schema"])
      schema["properties"]["metadata"] = {"type": "object"}
      key = f"{definition['spec']['group']}/{version['name']}", definition["spec"]["names"]["kind"]
      schemas[key] = schema
  flags = ["--queue=tpu", "--priority-class=high", "--service-account=sa", "--user=0", "--reservation=r", "--env=C"]
  documents = [
    rendered(capsys, *TWO, *flags, "--secret=A=projects/p/secrets/s", "--secret=B=k8s:x/y", "--", *HOSTILE),
    rendered(capsys, *JOB, "--topology=tpu7x:4x4x4", "--flex-start"),
  ]
  assert launch("render-queue", "--topology=v5e:4x4", "--chips=64", name="tpu") == 0
  documents += yaml.safe_load_all(capsys.readouterr().out)
  for document in documents:
    schema = schemas[document["apiVersion"], document["kind"]]
    jsonschema.Draft7Validator(schema).validate(document)
    with pytest.raises(jsonschema.ValidationError):
      jsonschema.Draft7Validator(schema).validate(document | {"spec": document["spec"] | {"unknown": 1}})
