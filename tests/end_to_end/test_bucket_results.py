"""Results of commands in a bucket, on a server of objects on this machine and with a fake model."""

import tempfile

from PIL import Image
import pytest

from tests.end_to_end.stand_in_model import StandIn, run
from tests.object_store import served
from uae_jax import cloud_storage
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions

pytestmark = pytest.mark.fast

OUT = "gs://pictures/out"


@pytest.fixture(name="store")
def fixture_store(monkeypatch, tmp_path):
  (tmp_path / "temporary").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
  with served(monkeypatch, tmp_path) as store:
    yield store


def kept(tmp_path) -> list[str]:
  """Names of the files that commands left on this machine."""
  return [file.name for file in (tmp_path / "temporary").rglob("*") if file.is_file()]


def test_a_result_in_a_bucket_is_that_of_this_machine(store, model, photographs, tmp_path, capsys):
  command = ("caption", "--model", model, "--images", photographs, "--out")
  assert run(*command, "local.jsonl") == run(*command, f"{OUT}/captions.jsonl") == 0
  assert store.objects["out/captions.jsonl"][0] == (tmp_path / "local.jsonl").read_bytes()
  assert capsys.readouterr().out.splitlines() == ["local.jsonl", f"{OUT}/captions.jsonl"]
  assert list(store.objects) == ["out/captions.jsonl"] and kept(tmp_path) == []


def test_a_command_goes_on_from_the_bucket(store, model, tmp_path, monkeypatch, capsys):
  command = ("generate", "--model", model, "--out", OUT, *(f"--prompt={text}" for text in ("a cat", "fail", "a dog")))
  assert run(*command) == 1
  assert {"out/00000.png", "out/00002.png", "out/images.jsonl"} < set(store.objects)
  assert store.uploads[-1] == "out/images.jsonl" and "out/images.jsonl.unfinished/items.jsonl" in store.objects
  asked = []

  def generate(_, prompts, **options):
    asked.extend(prompts)
    return [Image.new("RGB", (32, 32), "grey") for _ in prompts]

  monkeypatch.setattr(StandIn, "generate", generate)
  store.uploads.clear()
  assert run(*command) == 0 and asked == ["fail"]
  assert store.uploads == [".out.tmp", "out/00001.png", "out/images.jsonl"]  # The first is a trial, and gone.
  assert sorted(store.objects) == [*(f"out/0000{i}.png" for i in range(3)), "out/images.jsonl"]
  assert store.objects["out/images.jsonl"][0].count(b"\n") == 3


def test_a_bucket_that_cannot_be_written_is_said_before_the_work(store, model, photographs, tmp_path, capsys):
  store.faults["PUT out/.captions.jsonl.tmp"] = [403]
  StandIn.calls = []
  assert run("caption", "--model", model, "--images", photographs, "--out", f"{OUT}/captions.jsonl") == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and f"{OUT}/captions.jsonl: cannot be written (OSError: Forbidden" in error
  assert StandIn.calls == [] and store.objects == {}
  assert run("convert", "--source", model, "--target=gs://pictures", "--to=orbax") == 2
  assert "gs://pictures: expected gs://BUCKET/NAME, a place within the bucket" in capsys.readouterr().err


def test_results_that_do_not_reach_the_bucket_are_kept_here(store, model, photographs, tmp_path, capsys):
  store.faults["PUT out/captions.jsonl"] = [403]
  command = ("caption", "--model", model, "--images", photographs, "--out", f"{OUT}/captions.jsonl")
  assert run(*command) == 1
  error = capsys.readouterr().err.splitlines()[-1]
  assert f"{OUT}/captions.jsonl: cannot be written" in error and f"the results are in {tmp_path}/temporary/" in error
  assert kept(tmp_path) == ["captions.jsonl"] and store.objects == {}


def test_a_foreign_object_is_left_alone(store, model, photographs, capsys):
  store.put("out/captions.jsonl", b"my notes")
  assert run("caption", "--model", model, "--images", photographs, "--out", f"{OUT}/captions.jsonl") == 1
  assert f"--out {OUT}/captions.jsonl is not an earlier result" in capsys.readouterr().err
  assert store.objects["out/captions.jsonl"][0] == b"my notes"


def test_converted_data_are_read_from_the_bucket(store, photographs):
  source = f"folder:{photographs}"
  assert run("data", "convert", source, "--out", "gs://pictures/data/converted") == 0
  found = open_source(DataOptions(source="arrayrecord:gs://pictures/data/converted/*.array_record"), "train")
  assert len(found) == len(open_source(DataOptions(source=source), "train"))


@pytest.mark.parametrize("fault", [200, 503])
def test_large_objects_and_passing_faults(store, fault):
  content = b"0123456789" * 600_000
  with cloud_storage.writing_results():
    cloud_storage.result(f"{OUT}/weights").write_bytes(content)
    store.faults["PUT out/weights"] = [fault]
  assert store.objects["out/weights"][0] == content


def test_only_the_command_line_writes_to_buckets():
  with pytest.raises(ValueError, match="only the command line"):
    cloud_storage.result(f"{OUT}/x")
