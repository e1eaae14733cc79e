"""What disks and kills do to files."""

from pathlib import Path


def tear(folder: Path) -> None:
  """Cuts every file in half."""
  for file in filter(Path.is_file, folder.rglob("*")):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
