"""Reads the processor of a folder, whichever model it belongs to."""

from pathlib import Path

from uae_jax.data import janus_processing, processor_files
from uae_jax.data.janus_processing import JanusProcessor
from uae_jax.data.processing import Processor

# Type of the image processor in its settings -> class that reads the folder; `Processor` for all others.
KINDS: dict[str, type[Processor]] = dict.fromkeys(janus_processing.IMAGE_PROCESSORS, JanusProcessor)


def read(folder: str | Path) -> Processor:
  """Reads the processor of a folder; downloads nothing.

  Raises:
    ValueError: the folder or a file is missing or cannot be read, see `Processor.from_folder`.
  """
  folder = Path(folder)
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  _, settings = processor_files.image_settings(folder)
  kind = str(settings.get("image_processor_type") or "").removesuffix("Fast").removesuffix("Pil")
  return KINDS.get(kind, Processor).from_folder(folder)
