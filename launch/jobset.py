"""Runs a job in GKE as a JobSet: one Job per slice, one pod per host, restarted together; queued by Kueue.

python -m launch.jobset render one --config=configs/my.py --workdir=gs://my-bucket/runs/one --topology=v5e:4x4 \\
  --slices=2 --image=us-docker.pkg.dev/lab/images/uae-jax:v1 --queue=tpu -- --config.seed=1
python -m launch.jobset apply  one ...the same flags...
python -m launch.jobset status one
python -m launch.jobset delete one
python -m launch.jobset render-queue tpu --topology=v5e:4x4 --chips=64

kubectl's current context is the cluster. docs/launch/gke.md has the steps from cluster to deletion.
"""

import argparse
from collections.abc import Sequence
import sys

from launch import job as jobs
from launch.commands import EXISTS, LaunchError, run, with_retries
from launch.far_side import export_secrets
from launch.job import BUCKET_FOLDER, PREEMPTED_EXIT_CODE, Job, Parser
from launch.yaml_text import dump

# uid of the image's user, see Dockerfile. Files of the bucket belong to it.
USER_ID = 1000
CONTAINER = "train"
LABEL = "jobset.sigs.k8s.io"
RETRIES = 3


def escape(text: str) -> str:
  """Kubernetes expands $(NAME) in commands and variables, and reads $$ as $."""
  return text.replace("$", "$$")


def environment(job: Job) -> list[dict]:
  """The container's `env`: what may be shown as values, the rest as references to Kubernetes secrets."""
  from_secret = [(name, f"{job.name}-env", name) for name in job.local_env_names]
  for name, reference in job.secrets:
    if reference.startswith("k8s:"):
      from_secret.append((name, *reference.removeprefix("k8s:").split("/")))  # type: ignore[arg-type]
  return [
    *({"name": name, "value": escape(value)} for name, value in job.literal_env.items()),
    *({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for name, secret, key in from_secret),
  ]


def node_selector(job: Job) -> dict[str, str]:
  labels = {
    "cloud.google.com/gke-tpu-accelerator": job.shape.generation.gke_accelerator,
    "cloud.google.com/gke-tpu-topology": job.shape.topology,
  }
  labels |= {"topology.kubernetes.io/zone": job.zone} if job.zone else {}
  labels |= {"cloud.google.com/gke-spot": "true"} if job.spot else {}
  labels |= {"cloud.google.com/gke-flex-start": "true"} if job.flex_start else {}
  labels |= {"cloud.google.com/reservation-name": job.reservation} if job.reservation else {}
  return labels


def pod(job: Job, args: argparse.Namespace) -> dict:
  """The template of a pod, which is one host of a slice."""
  command = list(map(escape, job.command))
  if secrets := export_secrets(job):
    command = ["bash", "-c", escape(f'{secrets}exec "$@"'), CONTAINER, *command]
  container = {
    "name": CONTAINER,
    "image": job.image,
    "command": command,
    "env": environment(job),
    # libtpu's ports: between the hosts of a slice, and between slices.
    "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
    "resources": {"limits": {"google.com/tpu": job.shape.chips_per_host}},
    "securityContext": {"allowPrivilegeEscalation": False},
  }
  spec: dict = {
    "restartPolicy": "Never",
    "nodeSelector": node_selector(job),
    "terminationGracePeriodSeconds": job.grace_seconds,
    "containers": [container],
  }
  spec |= {"serviceAccountName": args.service_account} if args.service_account else {}
  spec |= {"securityContext": {"runAsUser": args.user}} if args.user is not None else {}
  metadata = {}
  if job.bucket:
    metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    container["volumeMounts"] = [{"name": "bucket", "mountPath": BUCKET_FOLDER}]
    options = f"implicit-dirs,uid={USER_ID},gid={USER_ID}"
    attributes = {"bucketName": job.bucket, "mountOptions": options}
    spec["volumes"] = [
      {"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    ]
  return {"metadata": metadata, "spec": spec} if metadata else {"spec": spec}


def manifest(job: Job, args: argparse.Namespace) -> dict:
  """The JobSet."""
  labels = {"app.kubernetes.io/name": "uae-jax"}
  labels |= {"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}
  labels |= {"kueue.x-k8s.io/priority-class": args.priority_class} if args.priority_class else {}
  metadata: dict = {"name": job.name, "labels": labels}
  if job.shape.num_hosts > 1:
    # A node pool of several hosts is one slice: no second Job may get a part of it. A pool of single hosts is many.
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  # A preempted pod fails its Job, and with it the JobSet, which restarts all slices without counting. Any other
  # failure restarts them too, at most max_restarts times.
  rules = [
    {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {
      "action": "FailJob",
      "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [PREEMPTED_EXIT_CODE]},
    },
  ]
  template = {
    "parallelism": job.shape.num_hosts,
    "completions": job.shape.num_hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {"rules": rules},
    "template": pod(job, args),
  }
  preempted = {
    "name": "preempted",
    "action": "RestartJobSetAndIgnoreMaxRestarts",
    "onJobFailureReasons": ["PodFailurePolicy"],
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [preempted]},
      "replicatedJobs": [{"name": "slice", "replicas": job.num_slices, "template": {"spec": template}}],
    },
  }


def secret(job: Job, values: dict[str, str]) -> dict:
  """The Kubernetes secret with the variables that come from the local environment."""
  return {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": f"{job.name}-env", "labels": {"app.kubernetes.io/name": "uae-jax"}},
    "type": "Opaque",
    "stringData": values,
  }


def queue_manifests(name: str, job: Job, num_chips: int, namespace: str) -> list[dict]:
  """Kueue's objects of one queue for one kind of slice: flavor, quota of chips, and the queue of a namespace."""
  version = "kueue.x-k8s.io/v1beta2"
  flavor = f"{job.shape.generation.gke_accelerator}-{job.shape.topology}"
  quota = {"name": flavor, "resources": [{"name": "google.com/tpu", "nominalQuota": num_chips}]}
  return [
    {
      "apiVersion": version,
      "kind": "ResourceFlavor",
      "metadata": {"name": flavor},
      "spec": {"nodeLabels": node_selector(job)},
    },
    {
      "apiVersion": version,
      "kind": "ClusterQueue",
      "metadata": {"name": name},
      "spec": {
        "namespaceSelector": {},
        "resourceGroups": [{"coveredResources": ["google.com/tpu"], "flavors": [quota]}],
      },
    },
    {
      "apiVersion": version,
      "kind": "LocalQueue",
      "metadata": {"name": name, "namespace": namespace},
      "spec": {"clusterQueue": name},
    },
  ]


def apply(job: Job, args: argparse.Namespace) -> None:
  """Creates the JobSet, and before it the secret with local variables; after a failure neither is left.

  Raises:
    LaunchError: nothing was created, or the message says what was.
  """
  kubectl = ["kubectl", f"--namespace={args.namespace}"]
  create, names = [*kubectl, "create", "--filename=-"], [f"jobset/{job.name}"]
  print(job.shape.cost(job.num_slices), file=sys.stderr)
  if job.local_env_names:
    values = dict.fromkeys(job.local_env_names, "...") if args.dry_run else job.local_env()
    run("secret", create, is_dry=args.dry_run, stdin=dump([secret(job, values)]))
    names.append(f"secret/{job.name}-env")
  try:
    run("apply", create, is_dry=args.dry_run, stdin=dump([manifest(job, args)]))
  except (LaunchError, KeyboardInterrupt) as error:
    existed = isinstance(error, LaunchError) and error.cause is EXISTS
    remove(names[1:] if existed else names, args, f"apply: {error}")
    raise


def remove(names: list[str], args: argparse.Namespace, reason: str = "") -> None:
  """Deletes what exists of `names`.

  Raises:
    LaunchError: something may be left, and still runs.
  """
  if not names:
    return
  command = ["kubectl", f"--namespace={args.namespace}", "delete", *names, "--ignore-not-found", "--wait"]
  try:
    with_retries(
      lambda: run("delete", command, is_dry=args.dry_run), retries=RETRIES, backoff_seconds=args.backoff_seconds
    )
  except LaunchError as error:
    raise LaunchError(
      f"{reason and reason + '; '}{error}. {' and '.join(names)} may still exist, and a JobSet keeps its TPUs: "
      "repeat delete"
    ) from error


def parser() -> argparse.ArgumentParser:
  common, kind, container = (Parser(add_help=False) for _ in range(3))
  jobs.add_place(common)
  common.add_argument("--namespace", type=jobs.name, default="default")
  common.add_argument("--backoff-seconds", type=jobs.seconds, default=10.0, help="wait before the first retry; doubles")
  jobs.add_capacity(kind)
  jobs.add_training(container)
  jobs.add_bucket(container)
  jobs.add_container(container)
  container.add_argument("--queue", type=jobs.name, help="Kueue's LocalQueue; default: no queue")
  container.add_argument("--priority-class", type=jobs.name, help="of Kueue's workload")
  container.add_argument("--service-account", type=jobs.name, help="of Kubernetes; needs access to the bucket")
  container.add_argument(
    "--user", type=jobs.natural, metavar="UID", help=f"user of the process; default: the image's, {USER_ID}"
  )
  top = Parser(prog="jobset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
  for name, summary, parents in (
    ("render", "write the manifests to stdout", (kind, container)),
    ("apply", "create the JobSet", (kind, container)),
    ("status", "state of the JobSet and its pods", ()),
    ("logs", "log of the first host", ()),
    ("delete", "delete the JobSet and what was created for it", ()),
    ("render-queue", "write the manifests of a queue of Kueue", (kind,)),
  ):
    command = commands.add_parser(name, help=summary, description=summary, parents=[common, *parents])
    if name == "render-queue":
      command.add_argument("--chips", type=jobs.count, required=True, help="quota of the queue")
  return top


def check(args: argparse.Namespace, job: Job) -> str | None:
  if job.slice and len(longest := f"{job.name}-slice-{job.num_slices - 1}-{job.shape.num_hosts - 1}-abcde") > 63:
    return f"{job.name}: too long a name, because its pods are called {longest}, and 63 characters are the most"
  if job.max_run_duration:
    return f"--max-run-duration: {jobs.OF_THE_POOL}"
  return jobs.no_bucket(job)


def execute(args: argparse.Namespace, job: Job) -> None:
  if args.command in ("render", "apply"):
    jobs.refuse_literal_secrets(job)
    jobs.warn_of_loss(job)
  if args.command == "render":
    if job.local_env_names:
      names = ", ".join(job.local_env_names)
      print(f"# `apply` creates the secret {job.name}-env from the local environment; its keys: {names}")
    print(dump([manifest(job, args)]), end="")
  elif args.command == "render-queue":
    print(dump(queue_manifests(job.name, job, args.chips, args.namespace)), end="")
  elif args.command == "apply":
    apply(job, args)
  elif args.command == "status":
    kubectl = ["kubectl", f"--namespace={args.namespace}", "get"]
    run("status", [*kubectl, f"jobset/{job.name}"], is_dry=args.dry_run)
    run("status", [*kubectl, "pods", f"--selector={LABEL}/jobset-name={job.name}"], is_dry=args.dry_run)
  elif args.command == "logs":
    first = f"{LABEL}/jobset-name={job.name},{LABEL}/job-index=0,batch.kubernetes.io/job-completion-index=0"
    words = [f"--selector={first}", f"--container={CONTAINER}", "--tail=-1"]
    run("logs", ["kubectl", f"--namespace={args.namespace}", "logs", *words], is_dry=args.dry_run)
  else:
    remove([f"jobset/{job.name}", f"secret/{job.name}-env"], args)


def main(argv: Sequence[str] | None = None) -> int:
  return jobs.main(parser(), argv, check, execute, "see status for what runs")


if __name__ == "__main__":
  sys.exit(main())
