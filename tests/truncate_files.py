"""Simulates files that were truncated by a crash."""

from pathlib import Path


def truncate_files(folder: Path) -> None:
  """Truncates every file in a folder, recursively, to half its size."""
  for file in filter(Path.is_file, folder.rglob("*")):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
