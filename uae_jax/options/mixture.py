"""The text of a mixture of sources: `WEIGHT*SOURCE;WEIGHT*SOURCE`, such as `0.7*jsonl:a.jsonl;0.3*folder:b`."""

MIXTURE = "mix"
SEPARATOR = ";"


def parse(text: str) -> list[tuple[float, str]]:
  """Reads the text of a mixture.

  Returns:
    (weight, source) pairs.

  Raises:
    ValueError: a part is no such pair, a weight is not above 0, or a source is named twice.
  """
  parts = []
  for part in text.split(SEPARATOR):
    weight, star, source = part.strip().partition("*")
    try:
      value = float(weight)
    except ValueError:
      value = 0.0
    if not star or not source or not 0 < value < float("inf"):
      raise ValueError(f"{part.strip()!r}: expected WEIGHT*KIND:NAME with a weight above 0, separated by {SEPARATOR!r}")
    parts.append((value, source.strip()))
  if len({source for _, source in parts}) < len(parts):
    raise ValueError(f"{text!r}: a source is named twice")
  return parts
