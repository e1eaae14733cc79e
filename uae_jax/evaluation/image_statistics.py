"""Statistics of single images that reward hacking moves: edges vanish with blur and empty backgrounds, grids add them.

Pixels are x in [0, 1], luma is Y = 0.299 R + 0.587 G + 0.114 B.
"""

import numpy as np

LUMA = (0.299, 0.587, 0.114)
EDGE_THRESHOLD = 0.1
BINS_PER_CHANNEL = 8


def edge_density(pixels: np.ndarray) -> float:
  """Share of pixels on an edge: mean over pixels of [sqrt(Yx^2 + Yy^2) > 0.1].

  Yx and Yy are differences of luma between a pixel and its right and lower neighbor; the last row and column do not
  count.

  Args:
    pixels: uint8[H, W, 3], H and W at least 2.
  """
  luma = pixels.astype(np.float64) / 255 @ np.asarray(LUMA)
  across, down = luma[:-1, 1:] - luma[:-1, :-1], luma[1:, :-1] - luma[:-1, :-1]
  return float(np.mean(np.hypot(across, down) > EDGE_THRESHOLD))


def color_entropy(pixels: np.ndarray) -> float:
  """Entropy of the colors in bits, 0 to 9: -sum_b p_b log2 p_b over 8 x 8 x 8 equal bins b of R, G, B.

  Args:
    pixels: uint8[H, W, 3].
  """
  bins = pixels.reshape(-1, 3).astype(np.int64) * BINS_PER_CHANNEL // 256
  counts = np.bincount(bins @ np.asarray([BINS_PER_CHANNEL**2, BINS_PER_CHANNEL, 1]))
  share = counts[counts > 0] / len(bins)
  return float(-np.sum(share * np.log2(share))) + 0.0  # not -0.0


def saturation(pixels: np.ndarray) -> float:
  """Mean saturation of HSV, 0 to 1: mean over pixels of (max - min) / max over R, G, B; 0 for black.

  Args:
    pixels: uint8[H, W, 3].
  """
  largest, smallest = pixels.max(axis=-1).astype(np.float64), pixels.min(axis=-1).astype(np.float64)
  return float(np.mean((largest - smallest) / np.maximum(largest, 1)))


def pairwise_distance(embeddings: np.ndarray) -> float:
  """Mean cosine distance of K images: mean over pairs i < j of 1 - e_i . e_j.

  Args:
    embeddings: float[K, E], rows of norm 1, K at least 2.
  """
  rows, columns = np.triu_indices(len(embeddings), k=1)
  return float(np.mean(1.0 - np.sum(embeddings[rows] * embeddings[columns], axis=-1)))


STATISTICS = {"edge density": edge_density, "color entropy": color_entropy, "saturation": saturation}
