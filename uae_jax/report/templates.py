"""How the HTML pages of this folder are filled in."""

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape


def environment() -> Environment:
  """jinja2 with autoescape: captions, paths and config values are text, never markup."""
  return Environment(
    loader=PackageLoader("uae_jax", "report"),
    autoescape=select_autoescape(default=True, default_for_string=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
