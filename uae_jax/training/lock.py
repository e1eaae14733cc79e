"""The lock of a workdir: at most one run writes to it.

`lock.json` names the process that holds it. The holder touches the file while it lives, its heartbeat. A lock is taken
over when its holder is gone: at once if it was a process of this machine, and for a process of another machine once its
heartbeat has stood still for `PATIENCE_SECONDS`, by the clock of the one who waits.
"""

import contextlib
import json
import os
from pathlib import Path
import secrets
import socket
import threading
import time

from absl import logging

LOCK_FILE = "lock.json"
HEARTBEAT_SECONDS, PATIENCE_SECONDS = 15.0, 60.0


def this_place() -> str:
  """Identifies the machine, since its last start, and the container within which process ids are valid."""
  place = socket.gethostname()
  with contextlib.suppress(OSError):  # Linux only.
    place += f" {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
  return place


def start_of(pid: int) -> str:
  """Returns the start time of a process of this machine, in ticks; "" if it does not run. Tells reused ids apart."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
  except (OSError, IndexError):
    pass
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return ""
  except OSError:
    pass
  return "" if Path("/proc/self/stat").exists() else "running"


class WorkdirLock:
  """Context manager that holds the lock of a workdir; used by process 0 of a run.

  Args:
    workdir: folder of the run.

  Raises (on entry):
    ValueError: another run holds the lock.
  """

  def __init__(self, workdir: Path):
    self._file = Path(workdir) / LOCK_FILE
    pid = os.getpid()
    self._own: dict[str, str | int] = {
      "host": socket.gethostname(),
      "pid": pid,
      "place": this_place(),
      "start": start_of(pid),
    }
    self._own["token"] = secrets.token_hex(8)
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._keep, name="workdir lock", daemon=True)

  def __enter__(self) -> "WorkdirLock":
    while not self._create():
      self._take_over(self._read())
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._thread.join()
    if self.is_held():
      self._file.unlink(missing_ok=True)

  def is_held(self) -> bool:
    """Whether this process still holds the lock; another one may have taken it while this one was suspended."""
    return self._read().get("token") == self._own["token"]

  def check(self) -> None:
    """Checks that this process still holds the lock.

    Raises:
      ValueError: another process has taken it over.
    """
    if not self.is_held():
      holder = describe(self._read())
      raise ValueError(f"{self._file.parent} was taken over by {holder}: this process saves nothing more")

  def _create(self) -> bool:
    """Creates the file with its content in one step; returns False if it exists."""
    temporary = self._file.with_name(f".{self._own['token']}.lock")
    temporary.write_text(json.dumps(self._own))
    try:
      os.link(temporary, self._file)
    except FileExistsError:
      return False
    except OSError:  # A file system without hard links.
      try:
        with self._file.open("x") as stream:
          stream.write(json.dumps(self._own))
      except FileExistsError:
        return False
    finally:
      temporary.unlink(missing_ok=True)
    return True

  def _read(self, file: Path | None = None) -> dict:
    """Reads the lock with the time of its last heartbeat; empty if it does not exist or cannot be read."""
    try:
      with (file or self._file).open("rb") as stream:
        content, beat = json.loads(stream.read()), os.fstat(stream.fileno()).st_mtime_ns
      return content | {"beat": beat} if isinstance(content, dict) else {}
    except (OSError, ValueError):
      return {}

  def _take_over(self, held: dict) -> None:
    """Removes a lock whose holder is gone.

    Raises:
      ValueError: the holder lives.
    """
    message = f"{self._file.parent} is in use by {describe(held)}: end that run first, or choose another --workdir"
    if held.get("place") == self._own["place"]:
      if held.get("start") and start_of(int(held.get("pid") or 0)) == held["start"]:
        raise ValueError(message)
    else:
      waiting = "%s is locked by %s: waiting up to %.0f s for a sign of life"
      logging.warning(waiting, self._file.parent, describe(held), PATIENCE_SECONDS)
      end = time.monotonic() + PATIENCE_SECONDS
      while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
        now = self._read()
        if now != held:
          if now.get("token") and now.get("token") == held.get("token"):
            raise ValueError(message)
          return
    # Of several processes that find the lock abandoned, one renames it.
    aside = self._file.with_name(f".{self._own['token']}.gone")
    with contextlib.suppress(FileNotFoundError):
      self._file.rename(aside)
      found = self._read(aside)
      if found.get("token") != held.get("token"):
        # Another process was faster, and this is its lock.
        with contextlib.suppress(FileExistsError):
          os.link(aside, self._file)
        aside.unlink()
        raise ValueError(f"{self._file.parent} is in use by {describe(found)}: end that run first")
      aside.unlink()
      logging.warning("%s: took over the lock of %s, which is gone", self._file.parent, describe(held))

  def _keep(self) -> None:
    """Touches the file until the end, or until another process has taken the lock."""
    while not self._ended.wait(HEARTBEAT_SECONDS) and self.is_held():
      with contextlib.suppress(OSError):
        os.utime(self._file)


def describe(held: dict) -> str:
  return f"process {held['pid']} on {held['host']}" if {"pid", "host"} <= held.keys() else "an unknown process"
