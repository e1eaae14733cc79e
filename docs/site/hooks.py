"""What the site shows beside this folder: README, CONTRIBUTING and CHANGELOG, the options reference, and linked files.

A page may link to any file of the repository, as it does on a git host: a link that leaves `docs/` is checked, the file
is copied into the site, and a link to a folder becomes plain text. A link to nothing ends a strict build.
"""

import logging
from pathlib import Path
import posixpath
import re
import sys

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import options_reference  # noqa: E402

log = logging.getLogger("mkdocs.hooks.repository")

# Files of the repository's root that are pages: where they are, and what they are called in the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
IS_ELSEWHERE = re.compile(r"^([a-z]+:|/)")


def on_files(files, config):
  """Adds the pages and the linked files that are not in `docs/`."""
  pages = {page.src_uri: Path(page.abs_src_path).read_text() for page in files.documentation_pages()}
  pages |= {uri: (ROOT / name).read_text() for name, uri in PAGES.items() if (ROOT / name).exists()}
  try:
    pages["reference/options.md"] = options_reference.page(options_reference.load(config.extra["options"]))
  except options_reference.UndocumentedError as error:
    raise PluginError(f"options reference:\n{error}") from error
  names = {uri: name for name, uri in PAGES.items()}
  for uri, text in sorted(pages.items()):
    place = posixpath.dirname(names.get(uri, f"docs/{uri}"))
    text, copied = _rewritten(text, place, posixpath.dirname(uri))
    if existing := files.get_file_from_path(uri):
      files.remove(existing)
    files.append(File.generated(config, uri, content=text))
    for path in copied - set(files.src_uris):
      files.append(File.generated(config, path, abs_src_path=str(ROOT / path.removeprefix("repository/"))))
  return files


def _rewritten(text: str, place: str, page_folder: str) -> tuple[str, set[str]]:
  """A page's text with links as the site needs them.

  Args:
    text: Markdown.
    place: the folder in the repository that the links are relative to.
    page_folder: the folder of the page in the site.

  Returns:
    (text, files to copy: "repository/" and the path in the repository).
  """
  copied = set()

  def rewrite(match):
    image, label, target, anchor = match.groups(default="")
    if IS_ELSEWHERE.match(target):
      return match.group()
    path = posixpath.normpath(posixpath.join(place, target))
    if path in PAGES:
      path = PAGES[path]
    elif path.startswith("docs/") and not path.endswith(".json"):
      path = path.removeprefix("docs/")
    elif (ROOT / path).is_dir():
      return label
    elif (ROOT / path).is_file() and not path.startswith(".."):
      path = f"repository/{path}"
      copied.add(path)
    else:
      log.warning("%s: no file %s in the repository", place or "the root", path)
    return f"{image}[{label}]({posixpath.relpath(path, page_folder or '.')}{anchor})"

  # A fenced block is code: what looks like a link there is none.
  parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
  return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts), copied


def on_config(config):
  missing = [name for name in PAGES if not (ROOT / name).exists()]
  if missing:
    raise PluginError(f"mkdocs.yml: {', '.join(missing)} missing in {ROOT}")
  return config
