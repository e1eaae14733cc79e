"""Shell text for the far side, where the job runs: quoting, and secrets that are fetched there by reference."""

from collections.abc import Sequence
import shlex

from launch.job import Job

# Reads one secret with the identity of the machine or pod; the standard library only, because images differ.
FETCH = """import base64, json, sys
from urllib.request import Request, urlopen
metadata = "http://metadata.google.internal/computeMetadata/v1/instance/service-accounts/default/token"
token = json.load(urlopen(Request(metadata, headers={"Metadata-Flavor": "Google"}), timeout=60))["access_token"]
url = "https://secretmanager.googleapis.com/v1/" + sys.argv[1] + ":access"
answer = json.load(urlopen(Request(url, headers={"Authorization": "Bearer " + token}), timeout=60))
sys.stdout.write(base64.b64decode(answer["payload"]["data"]).decode())
"""


def quote(word: str) -> str:
  """Quotes a word for bash on one line, even if it contains newlines or other control characters."""
  if word.isprintable():
    return shlex.quote(word)
  escaped = {"\\": "\\\\", "'": "\\'", "\n": "\\n"}
  spell = lambda c: c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in c.encode())  # noqa: E731
  return "$'" + "".join(escaped.get(c) or spell(c) for c in word) + "'"


def join(words: Sequence[str]) -> str:
  """A command for bash, on one line."""
  return " ".join(map(quote, words))


def export_secrets(job: Job) -> str:
  """Commands for bash, on one line, that export the secrets of Secret Manager; fails if one cannot be read."""
  found = [(name, reference) for name, reference in job.secrets if reference.startswith("projects/")]
  if not found:
    return ""
  fetch = f'secret() {{ python3 -c {quote(FETCH)} "$1"; }}'
  return "; ".join(
    ["set -e", fetch] + [f'{name}="$(secret {reference})"; export {name}' for name, reference in found] + [""]
  )


def script(job: Job) -> str:
  """The whole job for bash, on one line: secrets, then the program in place of the shell, so that it gets signals."""
  return export_secrets(job) + "exec " + join(job.command)
