"""The pieces of a run on an accelerator, by importance: each is a few suites, and ends well within eight minutes."""

import dataclasses

# Sizes of a preset: (usual, with SD3.5-large), at full size and for a check of the harness.
PRESETS = {
  "gpu": {"full": ("gpu", "gpu_large"), "small": ("small_dual", "small_large")},
  "tpu": {"full": ("tpu", "tpu_large"), "small": ("small_dual", "small_large")},
}
# The compiled peer comes before the eager one: ratios are against the faster, and time may end.
BACKENDS = {"gpu": ("uae_jax", "torch_compiled", "torch"), "tpu": ("uae_jax",)}


@dataclasses.dataclass(frozen=True)
class Piece:
  """Suites that run together.

  Attributes:
    name: value of `--piece`.
    suites: names of suites.
    has_large: whether they run with SD3.5-large.
  """

  name: str
  suites: tuple[str, ...]
  has_large: bool = False


PIECES = (
  Piece("roofs", ("roof",)),
  Piece("sampling", ("sampling",)),
  Piece("rollout", ("rollout",)),
  Piece("flow_grpo", ("flow_grpo",)),
  Piece("token_grpo", ("token_grpo",)),
  Piece("stage2", ("stage2",)),
  Piece("stage3", ("stage3",)),
  Piece("learning", ("learning",)),
  Piece("encoders", ("embedders", "vae")),
  Piece("sampling_large", ("sampling",), has_large=True),
)


def choose(text: str) -> list[Piece]:
  """The pieces of a comma-separated choice of names and numbers from 1; all of them for "all".

  Raises:
    ValueError: a piece is unknown.
  """
  if text == "all":
    return list(PIECES)
  by_name = {str(i): piece for i, piece in enumerate(PIECES, 1)} | {piece.name: piece for piece in PIECES}
  for name in text.split(","):
    if name not in by_name:
      known = ", ".join(f"{i} {piece.name}" for i, piece in enumerate(PIECES, 1))
      raise ValueError(f"--piece: {name!r} is not known; expected all, or some of {known}")
  return [by_name[name] for name in text.split(",")]
