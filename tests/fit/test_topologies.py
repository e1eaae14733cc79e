"""Slices by name, and plans for them where libtpu is installed."""

import json

import pytest

from uae_jax import cli
from uae_jax.planning import topology


def test_names_of_cloud_are_understood():
  assert topology.parse("v5e-16")[1] == topology.parse("v5litepod-16")[1] == "v5e:4x4"
  assert topology.parse("v5p-8")[1] == "v5p:2x2x1"
  assert topology.parse("v6e:4x4")[0].name == "v6e"


@pytest.mark.parametrize("name", ["v5e", "v5e-17", "v7x:2x2", "v5e:4by4", ""])
def test_a_name_of_nothing_is_refused(name):
  with pytest.raises(ValueError, match=f"--topology={name}: expected GENERATION:SHAPE .* such as v5e:4x4"):
    topology.parse(name)


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    ValueError, match=r"libtpu, the compiler for TPUs, is not installed: pip install 'uae_jax\[aot\]'"
  ):
    topology.slice_devices("v5e:4x4")


def plan(capsys, *arguments: str) -> tuple[int, str, str]:
  config = ["--config=configs/scenes.py:smoke", "--config.evaluation.num_images=0", "--stages=pretrain"]
  code = cli.main(["plan", *config, "--config.pretrain.batch_size=8", *arguments])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_a_slice_that_does_not_exist(capsys):
  pytest.importorskip("libtpu")
  code, _, error = plan(capsys, "--topology=v5e:3x3")
  assert code == 1 and "--topology=v5e:3x3: libtpu knows no such slice" in error and error.count("\n") == 1


def test_a_mesh_of_another_size(capsys):
  pytest.importorskip("libtpu")
  code, _, error = plan(capsys, "--topology=v5e:2x4")
  assert code == 1 and "mesh (data=1, fsdp=1, tensor=1) needs 1 devices, found 8: change config.mesh" in error


def test_a_plan_of_two_slices(capsys, tmp_path):
  """The smallest stage on a hybrid mesh, compiled for real."""
  pytest.importorskip("libtpu")
  mesh = ["--slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=4"]
  code, text, _ = plan(capsys, "--topology=v5e:2x2", f"--json={tmp_path / 'plan.json'}", *mesh)
  (program,) = json.loads((tmp_path / "plan.json").read_text())["programs"]
  assert code == 0 and text.endswith("fits\n")
  assert program["memory"]["total"] < program["memory"]["limit"]
  assert program["work"]["flops"] > 0 and program["collectives"]["all-gather"]["count"] > 0
