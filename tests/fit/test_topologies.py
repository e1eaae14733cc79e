"""TPU slices by name, and plans for them if libtpu is installed."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from uae_jax import cli, sharding
from uae_jax.commands import plan as plan_command
from uae_jax.layers.attention import attend
from uae_jax.options import MeshOptions, new_config, read_config
from uae_jax.planning import tables, topology
from uae_jax.planning.chips import CHIPS
from uae_jax.planning.plan import EFFORTS
from uae_jax.planning.prices import PRICES, usd_per_1000_steps


def test_names_of_cloud_are_understood():
  assert topology.parse("v5e-16")[1] == topology.parse("v5litepod-16")[1] == "v5e:4x4"
  assert topology.parse("v5p-8")[1] == "v5p:2x2x1"
  assert topology.parse("v6e:4x4")[0].name == "v6e"
  assert topology.parse("tpu7x-8")[1] == "tpu7x:2x2x1"


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


@pytest.fixture
def plan(capsys, monkeypatch):
  """Runs the command on the smallest stage: flags -> (exit code, output, errors)."""

  def run(*flags: str) -> tuple[int, str, str]:
    config = ["--config=configs/scenes.py:smoke", "--config.evaluation.num_images=0", "--config.pretrain.batch_size=8"]
    arguments = ["plan", *config, "--stages=pretrain", *flags]
    # Config flags are read from sys.argv.
    monkeypatch.setattr(sys, "argv", ["uae-jax", *arguments])
    return cli.main(arguments), *capsys.readouterr()

  return run


def test_a_slice_that_does_not_exist(plan):
  pytest.importorskip("libtpu")
  code, _, error = plan("--topology=v5e:3x3")
  assert code == 1 and "--topology=v5e:3x3: libtpu knows no such slice" in error and error.count("\n") == 1


def test_a_mesh_of_another_size(plan):
  pytest.importorskip("libtpu")
  code, _, error = plan("--topology=v5e:2x4")
  assert code == 1 and "mesh (data=1, fsdp=1, tensor=1) needs 1 devices, found 8: change config.mesh" in error


def test_a_plan_of_two_slices(plan, tmp_path):
  """Compiles the smallest stage for a hybrid mesh."""
  pytest.importorskip("libtpu")
  mesh = ["--slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=4"]
  code, text, _ = plan("--topology=v5e:2x2", f"--json={tmp_path / 'plan.json'}", *mesh)
  (program,) = json.loads((tmp_path / "plan.json").read_text())["programs"]
  assert code == 0 and text.endswith("fits\n")
  assert program["memory"]["total"] < program["memory"]["limit"]
  assert program["work"]["flops"] > 0 and program["collectives"]["all-gather"]["count"] > 0


@pytest.mark.parametrize("slice_name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
  ("tokens", "heads", "kv_heads", "width", "is_causal"),
  [(1584, 6, 6, 64, False), (1024, 4, 2, 128, True), (4096, 1, 1, 512, False)],
  ids=["decoder", "language", "codec"],
)
def test_splash_compiles_for_every_generation(slice_name, tokens, heads, kv_heads, width, is_causal):
  """Compiles forward and backward at the models' attention shapes; the logits are never materialized."""
  pytest.importorskip("libtpu")
  _, devices = topology.slice_devices(slice_name)
  mesh = sharding.make_mesh(fsdp=len(devices), devices=devices)
  place = sharding.batch_sharding(mesh)
  q, k = (jax.ShapeDtypeStruct((8, tokens, n, width), jnp.bfloat16, sharding=place) for n in (heads, kv_heads))
  mask = jax.ShapeDtypeStruct((8, 1, 1, tokens), bool, sharding=place)

  def loss(q, k, v, mask):
    return jnp.sum(attend(q, k, v, mask=mask, is_causal=is_causal).astype(jnp.float32))

  # The float32 matmul precision of the tests does not apply to a bfloat16 kernel.
  with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, mask)
    compiled = lowered.compile(compiler_options=EFFORTS["low"])
  assert "tpu_custom_call" in compiled.as_text()
  logits = 2 * heads * tokens**2 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < logits


def test_a_chip_of_tpu7x_is_two_devices():
  chip = CHIPS["tpu7x"]
  assert (chip.device.hbm_bytes, chip.device.flops, chip.device.num_devices) == (chip.hbm_bytes / 2, chip.flops / 2, 1)
  assert CHIPS["v5e"].device == CHIPS["v5e"]
  config = read_config(new_config())
  assert plan_command.adapted(config, "tpu7x-8", 1).mesh == MeshOptions(data=1, fsdp=8)


@pytest.mark.parametrize(
  ("name", "num_slices", "tensor", "mesh"),
  [
    ("v5e-16", 1, 1, (1, 16, 1)),
    ("v5e-64", 1, 1, (2, 32, 1)),
    ("v6e-8", 2, 2, (2, 4, 2)),
    ("v5p:2x2x3", 1, 1, (1, 12, 1)),
  ],
)
def test_the_mesh_of_a_ranked_slice_has_all_its_devices(name, num_slices, tensor, mesh):
  config = new_config()
  config.mesh.tensor = tensor
  for stage in config.stages:
    config[stage].batch_size = 192
  found = plan_command.adapted(read_config(config), name, num_slices).mesh
  assert (found.data, found.fsdp, found.tensor) == mesh


def planned(name: str, *, fits=True, seconds=1.0, usd: float | None = None) -> dict:
  memory = {"total": 2**30, "limit": 2**31}
  cost = None if usd is None else {"pretrain": usd}
  about = {"topology": name, "num_chips": 4, "fits": fits, "step_seconds": {"pretrain": seconds}}
  return about | {"usd_per_1000_steps": cost, "programs": [{"memory": memory}]}


def test_slices_are_ranked_by_cost_among_those_that_fit():
  results = [
    planned("small", fits=False, usd=0.1),
    planned("unknown", seconds=0.1),
    planned("dear", usd=20.0),
    {"topology": "none", "fits": False, "error": "no such slice"},
    planned("cheap", usd=2.5),
  ]
  lines = tables.ranking(results).splitlines()
  assert [line.split()[0] for line in lines[1:6]] == ["cheap", "dear", "unknown", "small", "none"]
  assert "1.00 of 2.00" in lines[1] and lines[1].endswith("2.5") and lines[3].endswith("no price")
  assert "none: no such slice" in lines


def test_a_price_names_its_source():
  assert usd_per_1000_steps(3.6, 16, PRICES["v5e"]) == pytest.approx(16 * 1.2)
  assert str(PRICES["v5p"]) == "4.20 USD per chip-hour (us-east5, SkyPilot's catalog, 2026-11-28)"
