"""Results of a run as JSON lines, one per finished case; the table and the bars are rewritten after each."""

from collections.abc import Sequence
import json
from pathlib import Path

from benchmarks.plot import chart
from benchmarks.table import table

FILE = "results.jsonl"


class Results:
  """The rows in `folder/results.jsonl`; a run with the same folder goes on where the last one stopped.

  A line is a row of results, {"machine": ...} at the start of each run, or {"finished": [suite, size, backend]}.

  Args:
    folder: written to, and made if it is missing.
    retries: forget the cases that failed, so that they run again.

  Raises:
    ValueError: a line of the file is no JSON object.
  """

  def __init__(self, folder: Path, *, retries: bool = False):
    self._folder, self._file = folder, folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    lines = self._read()
    if retries:
      failed = {_suite(line) for line in lines if "error" in line}
      lines = [line for line in lines if "error" not in line and tuple(line.get("finished", ())) not in failed]
    self._lines = lines
    # Also drops a last line that a kill cut short, onto which the next one would be appended.
    self._file.write_text("".join(json.dumps(line) + "\n" for line in lines))

  def _read(self) -> list[dict]:
    lines: list[dict] = []
    texts = self._file.read_text().splitlines() if self._file.exists() else []
    for i, text in enumerate(texts, 1):
      try:
        lines.append(json.loads(text))
      except json.JSONDecodeError as error:
        if i < len(texts):
          raise ValueError(f"{self._file}, line {i} is damaged ({error}): delete the line") from error
    return lines

  @property
  def rows(self) -> list[dict]:
    return [line for line in self._lines if "suite" in line]

  def add(self, line: dict) -> None:
    self._lines.append(line)
    with open(self._file, "a") as file:
      file.write(json.dumps(line) + "\n")
    if "suite" in line:
      self.write_table()

  def write_table(self) -> str:
    """Writes `results.md` and `results.svg`; returns the table."""
    text = table(self.rows)
    (self._folder / "results.md").write_text(text)
    (self._folder / "results.svg").write_text(chart(self.rows))
    return text

  def is_finished(self, suite: str, size: str, backend: str) -> bool:
    """Whether every case of a suite has a row of this backend."""
    return any(line.get("finished") == [suite, size, backend] for line in self._lines)

  def finish(self, suite: str, size: str, backends: Sequence[str]) -> None:
    for backend in backends:
      self.add({"finished": [suite, size, backend]})

  def has(self, suite: str, size: str, case: str, backend: str) -> bool:
    return any((*_suite(row), row["case"]) == (suite, size, backend, case) for row in self.rows)


def _suite(line: dict) -> tuple:
  return line.get("suite"), line.get("size"), line.get("backend")
