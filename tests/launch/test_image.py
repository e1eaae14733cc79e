"""The image is pinned, runs without privileges, and fits the manifests."""

from pathlib import Path
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest

from launch import image, job, jobset

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
  text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
  return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_base_is_pinned_by_digest_and_packages_by_hash():
  found = instructions()
  assert [word for word, _ in found].count("FROM") == 1
  assert re.fullmatch(r"python:3\.12\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", dict(found)["FROM"])
  for word, text in found:
    for command in text.split("&&") if word == "RUN" else []:
      if "pip install" in command:
        assert "--require-hashes" in command or "--no-deps" in command


def test_the_process_is_the_user_to_whom_the_bucket_belongs():
  found = instructions()
  assert ("USER", f"{jobset.USER_ID}:{jobset.USER_ID}") in found
  after = [word for word, _ in found[[word for word, _ in found].index("USER") :]]
  assert after == ["USER", "ENTRYPOINT", "CMD"]
  assert f"JAX_COMPILATION_CACHE_DIR={job.BUCKET_FOLDER}/compilation_cache" in dict(found)["ENV"]


def test_every_package_has_one_version_and_one_hash_and_fits_setup():
  rows = [row for row in image.REQUIREMENTS.read_text().splitlines() if not row.startswith("#")]
  assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", row) for row in rows)
  versions = {canonicalize_name(name): version for name, version in (row.split(" ")[0].split("==") for row in rows)}
  assert len(versions) == len(rows) and {"setuptools", "libtpu"} <= versions.keys()
  (wanted,) = re.findall(r"install_requires=\[(.*?)\n  \]", (ROOT / "setup.py").read_text(), re.DOTALL)
  for requirement in map(Requirement, re.findall(r'^ +"([^"]+)"', wanted, re.MULTILINE)):
    # After a change of setup.py: python -m launch.image lock
    assert versions[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_lock_is_what_pip_reports():
  wheel = {"archive_info": {"hashes": {"sha256": "ab"}}}
  archive = {"metadata": {"name": "Jax", "version": "1"}, "download_info": wheel}
  folder = {"metadata": {"name": "uae_jax", "version": "1"}, "download_info": {"dir_info": {}}}
  assert image.pinned({"install": [archive, folder]}).splitlines()[1:] == ["jax==1 --hash=sha256:ab"]


@pytest.mark.parametrize(
  ("argv", "commands"),
  [
    (
      ["build", "--image=r/p/uae:v1", "--ref=v1"],
      ["git -C", "tar -xf", "docker build --platform=linux/amd64"],
    ),
    (["push", "--image=r/p/uae:v1"], ["docker push r/p/uae:v1"]),
    (["lock"], ["docker run --rm --platform=linux/amd64"]),
  ],
)
def test_a_dry_run_prints_the_commands(capsys, argv, commands):
  assert image.main([*argv, "--dry-run"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(commands)
  assert all(line.startswith(command) for line, command in zip(lines, commands, strict=True))
