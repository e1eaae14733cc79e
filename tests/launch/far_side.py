"""What happens between a manifest and the program: Kubernetes' expansion, then bash with fake programs."""

import os
from pathlib import Path
import re
import subprocess

# Words that no shell, YAML or Kubernetes may change.
HOSTILE = [
  '--config.note=it\'s "$(touch pwned)" $HOME `id` $$ $(NOTE)\nnew\tline; # é\x1b \\n {args} %s',
  "--config.list=(1,2)",
]


def expand(text: str, variables: dict[str, str]) -> str:
  """As Kubernetes does in commands and variables: $$ is $, $(NAME) the value of a known variable."""
  return re.sub(
    r"\$(\$|\(([\w.-]+)\))",
    lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]),
    text,
  )


def container_run(container: dict, secrets: dict[str, str], folder: Path) -> tuple[list[str], dict[str, str]]:
  """Runs a container's command with fakes of uae-jax and python3; returns what uae-jax was given.

  Returns:
    Arguments and environment.
  """
  variables = dict(secrets)
  for item in container["env"]:
    if "value" in item:
      variables[item["name"]] = expand(item["value"], variables)
  command = [expand(word, variables) for word in container["command"]]
  return run(command, variables, folder)


def run(command: list[str], variables: dict[str, str], folder: Path) -> tuple[list[str], dict[str, str]]:
  """Runs a command whose uae-jax records its arguments and environment, and whose python3 knows one secret."""
  programs = folder / "bin"
  programs.mkdir(exist_ok=True)
  fakes = {
    "uae-jax": f'printf "%s\\0" "$@" > {folder}/arguments; env -0 > {folder}/environment',
    "python3": f'case "$3" in */denied/*) exit 1;; esac; printf "%s" "value of $3" ; echo "$2" > {folder}/fetch',
  }
  for name, body in fakes.items():
    (programs / name).write_text(f"#!/bin/bash\n{body}\n")
    (programs / name).chmod(0o755)
  environment = variables | {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder)}
  subprocess.run(command, check=True, env=environment, cwd=folder)
  read = lambda name: (folder / name).read_bytes().decode().split("\0")[:-1]  # noqa: E731
  return read("arguments"), dict(item.split("=", 1) for item in read("environment"))
