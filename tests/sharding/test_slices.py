"""Slices: all of them must join, only `data` spans them, and their step is that of one process."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.sharding import slice_step
from uae_jax import sharding
from uae_jax.training import processes

VARIABLES = ("MEGASCALE_NUM_SLICES", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")


def test_two_slices_of_two_processes_step_like_one_process():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    coordinator = f"localhost:{probe.getsockname()[1]}"
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  environment["MEGASCALE_NUM_SLICES"] = "2"
  members = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.sharding.slice_step", coordinator, "4", str(i)],
      env=environment | {"MEGASCALE_SLICE_ID": str(i // 2)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(4)
  ]
  try:
    outputs = [member.communicate(timeout=600)[0] for member in members]
  finally:
    for member in members:
      member.kill()
  alone = slice_step.run(jax.devices()[:4])
  for output in outputs:
    found = json.loads(output.splitlines()[-1])
    assert found["processes"] == [[0, 1], [2, 3]]  # each slice has its processes to itself
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-6)
    np.testing.assert_allclose(found["weight"], alone["weight"], rtol=1e-6, atol=1e-7)


def test_slices_of_cpus_need_a_data_axis(monkeypatch):
  monkeypatch.setenv("MEGASCALE_NUM_SLICES", "4")
  with pytest.raises(ValueError, match="data = 2 does not divide by 4 slices.*change config.mesh.data"):
    sharding.make_mesh(data=2, fsdp=4)


class Device:
  """The attributes of a TPU that are accessed before a mesh is refused."""

  slice_index = 0


def test_a_slice_that_did_not_join_is_named(monkeypatch):
  monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
  monkeypatch.setattr(jax, "devices", lambda: [Device()] * 4)
  with pytest.raises(ValueError, match="MEGASCALE_NUM_SLICES = 2, but the devices are of 1 slices: not all slices"):
    sharding.make_mesh(data=2, fsdp=2)


@pytest.mark.parametrize(("name", "value"), [*zip(VARIABLES, ("2", "1", "a,b"), strict=True)])
def test_a_process_of_several_does_not_train_alone(monkeypatch, name, value):
  """In a pod without jax[k8s], JAX finds no cluster; N runs on one workdir would follow."""

  def initialize():
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  for variable in VARIABLES:
    monkeypatch.delenv(variable, raising=False)
  processes.join(None, None, None)
  monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=rf"{name}={value} is a sign of other processes.*jax\[k8s\].*--coordinator"):
    processes.join(None, None, None)
