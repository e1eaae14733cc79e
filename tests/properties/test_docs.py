"""Links of the documentation lead somewhere, and the options reference leaves no field out."""

import importlib
from pathlib import Path
import re
import sys

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
PAGES = sorted(
  [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def without_code(page: Path) -> str:
  return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
  """Of the headings, as git hosts and the site name them."""
  headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
  return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  broken = []
  for link in LINK.findall(without_code(page)):
    if re.match(r"[a-z]+:", link):
      continue
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or not target.is_relative_to(ROOT):
      broken.append(f"{link}: no such file")
    elif anchor and target.suffix == ".md" and anchor not in anchors(target):
      broken.append(f"{link}: no such heading")
  assert not broken


def test_every_page_is_in_the_navigation():
  navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
  pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
  assert pages - set(re.findall(r"[\w./-]+\.md", navigation)) == set()


OPTIONS = '''
import dataclasses

@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  """One thing.

  Attributes:
    size_px: size of an image.
  """

  size_px: int = 8

@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
  """What others share.

  Attributes:
    seed: seed of the draws.
  """

  seed: int = 0

@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Base):
  """Another thing.

  Attributes:
    path: `a | b`, or a | b.
    rate: rate of learning; None for none.
    inner: the thing within.
    other: the other one.
  """

  path: str
  rate: float | None = None
  inner: Inner = Inner()
  other: Inner = dataclasses.field(default_factory=Inner)
'''


def reference(tmp_path, monkeypatch, source):
  pytest.importorskip("griffe", reason="part of the docs extra")
  monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
  monkeypatch.syspath_prepend(str(tmp_path))
  for name in ("options_reference", "some_options"):
    monkeypatch.delitem(sys.modules, name, raising=False)
  (tmp_path / "some_options.py").write_text(source)
  module = importlib.import_module("options_reference")
  return module, lambda: module.page(module.load("some_options:Outer"))


def test_the_reference_lists_type_default_and_documentation(tmp_path, monkeypatch):
  page = reference(tmp_path, monkeypatch, OPTIONS)[1]()
  assert "| `size_px` | `int` | `8` | size of an image. |" in page
  assert r"| `path` | `str` | required | `a | b`, or a \| b. |" in page
  assert "| `rate` | `float | None` | `None` | rate of learning; None for none. |" in page
  assert "| `inner` | [Inner](#inner) |  | the thing within. |" in page
  assert "## Inner\n\nOne thing.\n\nIn the config: `config.inner`, `config.other`." in page
  # Inherited fields have the documentation of their class.
  assert page.count("| `seed` | `int` | `0` | seed of the draws. |") == 1


@pytest.mark.parametrize(
  ("old", "new", "said"),
  [
    (
      "    rate: rate of learning; None for none.\n",
      "",
      "some_options.Outer.rate: is not documented under",
    ),
    ("    seed: seed of the draws.", "    sed: of draws.", "some_options.Outer.seed: is not documented"),
    ("  size_px: int = 8", "  size: int = 8", "some_options.Inner: documents size_px, which is no field"),
    ('"""One thing.\n\n  Attributes', '"""\n  Attributes', "some_options.Inner: has no summary above `Attributes:`"),
  ],
)
def test_an_undocumented_field_ends_the_build(tmp_path, monkeypatch, old, new, said):
  assert OPTIONS.count(old) == 1
  module, page = reference(tmp_path, monkeypatch, OPTIONS.replace(old, new))
  with pytest.raises(module.UndocumentedError, match=re.escape(said)):
    page()
