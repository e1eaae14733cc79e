"""Renders chat templates of others in a process of their own, with bounded time and memory.

A template is a program: nested loops may run for years, and one expression may fill the memory. This file is also the
program of that process, so it imports only the standard library at its top, and jinja2 there.
"""

import functools
import json
import subprocess
import sys
from typing import Any

# Stands for the text of a message while a template is rendered. A template that strips or escapes text changes it.
TEXT = " \ue000 "
CPU_SECONDS, WALL_SECONDS = 10, 120
MEMORY_BYTES, OUTPUT_BYTES = 512 * 2**20, 2**20


def render(
  template: str, role: str, *, has_image: bool, special_tokens: dict[str, str], image_first: bool = False
) -> str:
  """Renders one message whose text is `TEXT`, and the start of the answer.

  Args:
    template: Jinja source, for the environment that transformers gives to chat templates.
    role: role of the message.
    has_image: whether the message has an image, after the text.
    special_tokens: name -> text of the tokenizer's special tokens, such as `eos_token`.
    image_first: put the image before the text; default False.

  Raises:
    ValueError: the template is wrong, or takes too much time or memory.
  """
  return _rendered(template, role, has_image, image_first, tuple(sorted(special_tokens.items())))


@functools.lru_cache(maxsize=64)
def _rendered(
  template: str, role: str, has_image: bool, image_first: bool, special_tokens: tuple[tuple[str, str], ...]
) -> str:
  content = [{"type": "text", "text": TEXT}, *([{"type": "image"}] if has_image else [])]
  content = content[::-1] if image_first else content
  variables = dict(special_tokens) | {
    "messages": [{"role": role, "content": content}],
    "tools": None,
    "documents": None,
    "add_generation_prompt": True,
  }
  try:
    done = subprocess.run(
      # -P: the folder of this file is not searched for modules, whose names may be those of others.
      [sys.executable, "-P", __file__],
      input=json.dumps({"template": template, "variables": variables, "cpu_seconds": CPU_SECONDS}).encode(),
      capture_output=True,
      timeout=WALL_SECONDS,
      check=False,
    )
    answer = json.loads(done.stdout)
  except (subprocess.TimeoutExpired, ValueError) as error:
    raise ValueError(f"takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB for one message") from error
  if "error" in answer:
    raise ValueError(answer["error"])
  return answer["text"]


def main() -> None:
  """Reads {"template", "variables", "cpu_seconds"} from stdin; writes {"text"} or {"error"} to stdout."""
  import resource

  request = json.load(sys.stdin)
  resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"],) * 2)
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    answer = {"text": _run(request["template"], request["variables"])}
  except MemoryError:
    sys.exit(1)
  except Exception as error:  # A template can raise anything.
    answer = {"error": f"{type(error).__name__}: {error}"[:500]}
  json.dump(answer, sys.stdout)


def _run(template: str, variables: dict[str, Any]) -> str:
  """Renders in the sandbox of transformers 5.23, utils/chat_template_utils.py."""
  import datetime

  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %} marks the parts that a model wrote; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def raise_exception(message: str):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = tojson
  environment.globals |= {
    "raise_exception": raise_exception,
    "strftime_now": lambda format: datetime.datetime.now().strftime(format),
  }
  pieces, size = [], 0
  for piece in environment.from_string(template).generate(**variables):
    size += len(piece)
    if size > OUTPUT_BYTES:
      raise ValueError(f"writes more than {OUTPUT_BYTES >> 20} MiB for one message")
    pieces.append(piece)
  return "".join(pieces)


if __name__ == "__main__":
  main()
