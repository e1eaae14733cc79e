"""A command of many items until all are done: it goes on where it was killed, and connected processes share the items.

    NAME.unfinished/settings.json          what the items depend on; items of other settings are made again
    NAME.unfinished/items.jsonl            a row per finished item: key, record, names of its images
    NAME.unfinished/items-0-of-2.jsonl     the same of process 0 of 2
    NAME                                   the records in the order of the items, written at the end

The folder is made with the first row, and removed when no item is missing.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
from pathlib import Path
from typing import Any

import jax

from uae_jax import files, json_files, outputs
from uae_jax.commands.items import Items, JsonLines, OutputError
from uae_jax.evaluation import rows
from uae_jax.training import processes

SETTINGS = "settings.json"


class Unfinished:
  """The finished items of a command, kept until all are finished.

  Args:
    result: the file of JSON lines that the command writes; its images are in the same folder.
    settings: what a record depends on besides its item; JSON.
    keys: what identifies each item and its noise, for a later start of the command.

  Raises:
    ValueError: the processes have different items or settings.
  """

  def __init__(self, result: Path, settings: Mapping[str, Any], keys: Sequence[str]):
    self.result = result
    self.folder = result.with_name(result.name + outputs.UNFINISHED)
    self._settings = json.loads(json.dumps(settings))
    self._keys = list(keys)
    if processes.of_first([self._settings, self._keys]) != [self._settings, self._keys]:
      raise ValueError("this process has other items, weights or options than process 0: start all with the same")
    processes.on_first(self._remove_others)

  def run(
    self,
    items: Items,
    things: Sequence[Any],
    read: Callable[[Any], Any],
    work: Callable[[list[int], list[Any]], Sequence[Any]],
    keep: Callable[[int, Any], tuple[dict[str, Any], list[str]]],
    *,
    batch_size: int,
    unit: str,
  ) -> dict[int, dict[str, Any]]:
    """Makes what is missing and writes the result; processes share the work.

    Args:
      items: counts failures; has those of all processes at the end.
      things: all items.
      read: see `Items.results`.
      work: see `Items.results`.
      keep: (index, result of the item) -> (its record, names of the images that it wrote).
      batch_size: see `Items.results`.
      unit: see `Items.results`.

    Returns:
      Index -> record of all finished items, in process 0; the others have none.
    """
    # Process 0 says what is missing, because the others may see rows that were written since.
    missing = processes.value_of_first(lambda: sorted(set(range(len(self._keys))) - set(self._records())))
    own = processes.share(missing)
    parts = (jax.process_index(), jax.process_count())
    try:
      with contextlib.closing(JsonLines(self.folder / rows.file_name(parts))) as lines:
        for index, thing, _, result in items.results(things, read, work, batch_size=batch_size, unit=unit, indices=own):
          with items.item(thing):
            record, images = keep(index, result)
            self._write_settings()
            lines.write({"key": self._keys[index], "files": images, "record": record})
    except BaseException:
      if jax.process_index() == 0:
        with contextlib.suppress(OSError, ValueError):  # The reason why it ends is more important.
          self._write_result(self._records())
      raise
    items.failed[:] = [name for failed in processes.gather(items.failed) for name in failed]
    if jax.process_index() > 0:
      return {}
    records = self._records()
    self._write_result(records)
    if not items.failed:
      self._remove()
    return records

  def _records(self) -> dict[int, dict[str, Any]]:
    """Index -> record of the finished items, in their order."""
    whole = rows.whole(self.result.parent, self.folder)
    found = {index: whole.get(key, {}).get("record") for index, key in enumerate(self._keys)}
    return {index: record for index, record in found.items() if isinstance(record, dict)}

  def _write_result(self, records: Mapping[int, Mapping[str, Any]]) -> None:
    """Writes the records; without any, an earlier result stays."""
    if records:
      files.write_whole(self.result, "".join(files.json_text(record) + "\n" for record in records.values()))

  def _write_settings(self) -> None:
    file = self.folder / SETTINGS
    if file.exists():
      return
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      files.write_whole(file, files.json_text(self._settings, indent=1))
    except OSError as error:
      raise OutputError(error.errno, error.strerror, str(file)) from error

  def _remove_others(self) -> None:
    """Removes rows of other settings, or of settings that cannot be read."""
    settings = None
    with contextlib.suppress(ValueError):
      settings = json_files.read_object(self.folder / SETTINGS, default={})
    if settings != self._settings:
      self._remove()

  def _remove(self) -> None:
    """Removes the folder, but nothing in it that is of someone else."""
    if self.folder.exists():
      for file in (*self.folder.glob("items*.jsonl"), self.folder / SETTINGS):
        file.unlink(missing_ok=True)
      self.folder.rmdir()
