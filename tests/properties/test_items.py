"""One bad item never ends a command of many, results are on disk as they come, and names of results are unambiguous."""

from contextlib import closing
import errno
import json
from pathlib import Path

import pytest

from uae_jax.commands.items import Items, JsonLines, OutputError
from uae_jax.data.image_files import result_names

pytestmark = pytest.mark.fast

WORDS = ["one", "two", "bad", "four", "five"]


def refuse(word):
  if word == "bad":
    raise TypeError("no good")
  return word


def test_reading_and_work_fail_item_by_item(capsys):
  def work(indices, words):
    assert indices == [WORDS.index(word) for word in words]
    return [refuse(word).upper() for word in words]

  for read, num_calls in ((refuse, 2), (str, 5)):
    items, calls = Items("test"), []

    def counted(indices, words, calls=calls):
      calls.append(indices)
      return work(indices, words)

    found = [(i, item, result) for i, item, _, result in items.results(WORDS, read, counted, batch_size=3, unit="word")]
    assert found == [(0, "one", "ONE"), (1, "two", "TWO"), (3, "four", "FOUR"), (4, "five", "FIVE")]
    assert items.failed == ["bad"] and len(calls) == num_calls
    assert "uae-jax test: error: bad: TypeError: no good" in capsys.readouterr().err


def test_a_single_item_is_tried_once():
  calls = []

  def work(indices, words):
    calls.append(indices)
    raise ValueError("no good")

  assert list(Items("test").results(["a", "b"], str, work, batch_size=1, unit="word")) == []
  assert calls == [[0], [1]]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full", "a.png"), OutputError(errno.EACCES, "no", "x.jsonl")])
def test_what_no_further_item_survives_ends_the_command(error):
  items = Items("test")
  with pytest.raises(OSError), items.item("one"):
    raise error
  with items.item("two"):
    raise OSError(errno.ENAMETOOLONG, "too long", "b.png")
  assert items.failed == ["two"]


def test_lines_are_on_disk_at_once_and_an_earlier_file_until_then(tmp_path):
  file = tmp_path / "new" / "a.jsonl"
  with closing(JsonLines(file)):
    assert not file.parent.exists()
  (tmp_path / "a.jsonl").write_text("earlier")
  lines = JsonLines(tmp_path / "a.jsonl")
  assert (tmp_path / "a.jsonl").read_text() == "earlier"
  name = b"caf\xe9 \xc3\xa9.png"
  lines.write({"image": name.decode(errors="surrogateescape")})
  text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
  assert "é" in text and json.loads(text)["image"].encode(errors="surrogateescape") == name
  lines.close()
  with pytest.raises(OutputError, match="a.jsonl"):
    JsonLines(tmp_path / "a.jsonl" / "b.jsonl").write({})


@pytest.mark.parametrize(
  ("paths", "names"),
  [
    (["a.jpg", "b.png"], ["recon_a.png", "recon_b.png"]),
    (["a.jpg", "a.png"], ["recon_a.jpg.png", "recon_a.png.png"]),
    (["A.jpg", "a.png"], ["recon_A.jpg.png", "recon_a.png.png"]),
    (["a.jpg", "x/A.jpg"], ["recon_a.jpg_2.png", "recon_A.jpg_3.png"]),
    (["a.jpg", "a.png", "a.jpg.png"], ["recon_a.jpg_2.png", "recon_a.png.png", "recon_a.jpg.png.png"]),
    # The name of the first one's reconstruction would be the name of another original.
    (["a.jpg", "recon_a.png"], ["recon_a.jpg.png", "recon_recon_a.png"]),
    (["a.jpg", "x/a.jpg", "a.jpg_2.png"], ["recon_a.jpg_3.png", "recon_a.jpg_4.png", "recon_a.jpg_2.png"]),
  ],
)
def test_names_of_reconstructions_fit_one_image_each(paths, names):
  assert result_names([Path(path) for path in paths]) == names
