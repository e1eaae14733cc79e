"""Template environment of the HTML pages in this folder."""

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def environment() -> Environment:
  """A jinja2 environment with autoescape: captions, paths and config values are never markup."""
  return Environment(
    loader=PackageLoader("uae_jax", "report"),
    autoescape=select_autoescape(default=True, default_for_string=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
