"""Commands of many items go on where they were killed, with what the same command would make."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.stand_in_model import StandIn, lines, run

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("command", "damaged"), [("caption", []), ("reconstruct", [0])])
def test_the_same_command_goes_on(model, photographs, monkeypatch, command, damaged):
  """Items that are done are not made again, unless their image is damaged; a torn line is no item."""
  calls, make = [], getattr(StandIn, command)
  words = (command, "--model", model, "--images", photographs, "--batch-size", 2)
  words += ("--out", "out/captions.jsonl" if command == "caption" else "out")

  def interrupted(self, images, seed=0, **options):
    calls.append(options["indices"])
    if len(calls) == 3:
      raise KeyboardInterrupt
    return make(self, images, seed, **options)

  monkeypatch.setattr(StandIn, command, interrupted)
  assert run(*words) == 130
  found = lines(Path("out/captions.jsonl"))
  assert len(found) == 4
  for index in damaged:
    (Path("out") / found[index]["reconstruction"]).write_bytes(b"damaged")
  with open("out/captions.jsonl.unfinished/items.jsonl", "a") as file:
    file.write('{"key": "torn')
  assert run(*words) == 0
  assert calls[:3] == [[0, 1], [2, 3], [4, 5]] and sum(calls[3:], []) == [*damaged, 4, 5, 6, 7, 8]
  assert [row["image"] for row in lines(Path("out/captions.jsonl"))] == sorted(map(str, photographs.iterdir()))
  assert not list(Path("out").glob("*.unfinished"))


def test_items_of_other_settings_are_made_again(model, photographs):
  (photographs / "text.jpg").write_text("no image")
  words = ("caption", "--model", model, "--images", photographs)
  for options, number in (((), 9), ((), 0), (("--seed", 1), 9), (("--seed", 1, "--batch-size", 3), 0)):
    assert run(*words, *options) == 1
    assert sum(call[1] for call in StandIn.calls if call[0] == "caption") == number
  (photographs / "text.jpg").unlink()
  assert run(*words, "--seed", 1) == 0 and not Path("captions.jsonl.unfinished").exists()
  assert len(lines(Path("captions.jsonl"))) == 9


def test_damaged_rows_and_settings_are_no_obstacle(model, photographs):
  """A row without a record is made again; without readable settings, all are."""
  (photographs / "text.jpg").write_text("no image")
  words = ("caption", "--model", model, "--images", photographs)
  folder = Path("captions.jsonl.unfinished")
  assert run(*words) == 1
  first, *others = (folder / "items.jsonl").read_text().splitlines()
  row = {name: value for name, value in json.loads(first).items() if name != "record"}
  content = "\n".join([json.dumps(row), *others, ""])
  for name, text, number in (("items.jsonl", content, 1), ("settings.json", "{", 9)):
    (folder / name).write_text(text)
    assert run(*words) == 1
    assert sum(call[1] for call in StandIn.calls if call[0] == "caption") == number
