"""Images of every mode, depth and transparency keep their look; what cannot is refused by name."""

import io
import os
import re

import numpy as np
from PIL import EpsImagePlugin, Image, ImageCms
import pytest

from uae_jax.data import official_pixels
from uae_jax.data.images import from_array, image_from_bytes, read_image

pytestmark = pytest.mark.fast

RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(8, 0)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def grays(image: Image.Image) -> np.ndarray:
  pixels = np.asarray(image)
  assert pixels.shape == (8, 64, 3) and (pixels == pixels[:1, :, :1]).all()
  return pixels[0, :, 0].astype(float)


@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("unit.tiff", RAMP),
    ("bytes.tiff", RAMP * 255),
    ("deep.tiff", RAMP * 65535),
    ("overshoot.tiff", RAMP * 1.04 - 0.02),
    ("int32.tiff", (RAMP * 65535).astype(np.int32)),
    ("int32_of_bytes.tiff", (RAMP * 255).astype(np.int32)),
    ("16_bit.tiff", (RAMP * 65535).astype(np.uint16)),
    ("16_bit.png", (RAMP * 65535).astype(np.uint16)),
  ],
)
def test_deep_and_float_files_keep_their_range(tmp_path, name, values):
  Image.fromarray(values).save(tmp_path / name)
  np.testing.assert_allclose(grays(read_image(tmp_path / name)), np.linspace(0, 255, 64), atol=6)


@pytest.mark.parametrize("scale", (255, 65535))
def test_dark_16_bit_images_stay_dark(tmp_path, scale):
  """A 16-bit file says its range, so a small maximum means a dark image."""
  Image.fromarray((RAMP * 0.02 * 65535).astype(np.uint16)).save(tmp_path / "dark.png")
  header = f"P5\n64 8\n{scale}\n".encode()
  (tmp_path / "dark.pgm").write_bytes(header + (RAMP * 0.02 * scale).astype(">u2" if scale > 255 else "u1").tobytes())
  for name in ("dark.png", "dark.pgm"):
    assert 4 <= grays(read_image(tmp_path / name)).max() <= 6


@pytest.mark.parametrize(
  "values",
  [RAMP * 4095, RAMP * 7, RAMP * 1e6, RAMP - 0.5, RAMP * np.nan, RAMP + np.inf, (RAMP * 4e6).astype(np.int32)],
  ids=["12_bit", "high_dynamic_range", "large", "negative", "nan", "infinite", "large_integers"],
)
def test_an_unclear_range_is_refused_by_name(tmp_path, values):
  Image.fromarray(values).save(tmp_path / "a.tiff")
  with pytest.raises(ValueError, match=r"cannot read image .*a\.tiff: .*expected values that fill 0\.\.(1|255) or"):
    read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_of_every_mode_becomes_white(mode):
  image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
  image.paste((255, 255, 255, 255) if mode in ("LA", "La") else (*RED, 255), (2, 0, 4, 2))
  for middle in {"PA": ("P", "PA"), "La": ("LA", "La")}.get(mode, (mode,)):
    image = image.convert(middle)
  pixels = np.asarray(read_image(image))
  assert tuple(pixels[0, 0]) == WHITE or mode == "PA"  # Converting to P loses the alpha.
  assert tuple(pixels[0, 3]) == (WHITE if mode in ("LA", "La") else RED)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1", "I;16"])
def test_a_transparent_color_becomes_white(tmp_path, mode):
  image = Image.fromarray(np.zeros((2, 2), np.uint16)) if mode == "I;16" else Image.new(mode, (2, 2), 0)
  if mode == "P":
    image.putpalette([0, 0, 0, *RED] + [0] * 762)
  image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
  assert tuple(np.asarray(read_image(tmp_path / "a.png"))[0, 0]) == WHITE


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_without_transparency_keep_their_colors(mode):
  image = Image.new("RGB", (2, 2), "white")
  if mode == "LAB":
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
  else:
    image = image.convert(mode)
  np.testing.assert_allclose(np.asarray(read_image(image)), 255, atol=2)


def test_arrays_of_every_kind_become_the_same_rgb():
  gray = np.full((4, 5), 51, np.uint8)
  for pixels in (
    gray,
    gray[..., None],
    gray[..., None].repeat(3, -1),
    np.stack([gray, gray * 0 + 255], -1),
    np.stack([gray, gray, gray, gray * 0 + 255], -1),
    gray.astype(np.uint16) * 257,
  ):
    np.testing.assert_array_equal(np.asarray(from_array(pixels)), np.full((4, 5, 3), 51))
  unit = np.zeros((2, 2, 3), np.float32)
  unit[0] = 1
  np.testing.assert_array_equal(np.asarray(from_array(unit))[:, 0, 0], [255, 0])
  np.testing.assert_array_equal(np.asarray(from_array(unit[..., :1] > 0))[:, 0, 0], [255, 0])
  transparent = np.zeros((2, 2, 2), np.uint8)
  np.testing.assert_array_equal(np.asarray(from_array(transparent)), np.full((2, 2, 3), 255))


@pytest.mark.parametrize("shape", [(4,), (4, 4, 5), (2, 4, 4, 3), (0, 4, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
  with pytest.raises(ValueError, match=re.escape(f"uint8{list(shape)}")):
    read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tiff", ".png"])
def test_the_first_of_several_frames_is_read(tmp_path, suffix):
  frames = [Image.new("RGB", (8, 8), color) for color in ("lime", "blue")]
  frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
  np.testing.assert_allclose(np.asarray(read_image(tmp_path / f"a{suffix}"))[4, 4], (0, 255, 0), atol=4)


def test_photographs_of_cameras(tmp_path):
  """Two pictures in one JPEG (MPO), a turned one, and one with a color profile."""
  half = Image.new("RGB", (40, 20), "red")
  half.paste("blue", (20, 0, 40, 20))
  exif = Image.Exif()
  exif[0x0112] = 6
  half.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[half.rotate(90)], exif=exif, quality=95)
  image = read_image(tmp_path / "a.jpg")
  assert image.size == (20, 40) and np.asarray(image)[5, 10, 0] > 200
  half.save(tmp_path / "b.jpg", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
  assert np.asarray(read_image(tmp_path / "b.jpg"))[10, 5, 0] > 200


def test_torn_and_foreign_files_are_named(tmp_path):
  data = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)).save(data, "JPEG")
  (tmp_path / "torn.jpg").write_bytes(data.getvalue()[:2000])
  (tmp_path / "empty.png").touch()
  (tmp_path / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  (tmp_path / "missing.jpg").write_text("\n<!DOCTYPE html><title>404</title>")
  (tmp_path / "no_pixels.ppm").write_bytes(b"P6\n0 5\n255\n")
  os.mkfifo(tmp_path / "pipe.png")
  (tmp_path / "folder.png").mkdir()
  (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
  for name, reason in {
    "torn.jpg": "truncated",
    "empty.png": "an empty file",
    "lfs.png": "git lfs pull",
    "missing.jpg": "a web page",
    "no_pixels.ppm": "cannot identify",
    "pipe.png": "is a named pipe, expected a file",
    "folder.png": "is a folder, expected a file",
    "link.png": "no such file",
  }.items():
    with pytest.raises(ValueError, match=f"cannot read image {tmp_path / name}: .*{reason}"):
      read_image(tmp_path / name)


def test_postscript_is_not_run(tmp_path, monkeypatch):
  """PIL would start the program `gs` to draw it."""
  trap = tmp_path / "trap"
  (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {trap}\n")
  (tmp_path / "gs").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
  Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
  (tmp_path / "a.png").write_bytes((tmp_path / "a.eps").read_bytes())
  for read in (
    lambda: read_image(tmp_path / "a.png"),
    lambda: image_from_bytes((tmp_path / "a.png").read_bytes(), "it"),
    lambda: official_pixels.benchmark_rgb(tmp_path / "a.png"),
  ):
    with pytest.raises(ValueError, match="PostScript|identify"):
      read()
  assert not trap.exists()


def test_what_is_no_image_is_named_without_objects_in_memory():
  with pytest.raises(ValueError, match="^cannot read it: UnidentifiedImageError: .* begins with b'GIF7'$"):
    image_from_bytes(b"GIF7", "it")
