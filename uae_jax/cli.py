"""Entry point of `uae-jax <command>`. Only the chosen command is imported."""

import argparse
from collections.abc import Sequence
import contextlib
import difflib
import importlib
from importlib import metadata
import os
import sys

from uae_jax import cloud_storage
from uae_jax.commands import command_line

INTERRUPTED, TERMINATED = 130, 143
# Commands that end in their own way after SIGTERM.
HANDLES_SIGTERM = ("train", "sweep", "serve")

# command -> (module with `main(argv) -> int | None`, help). `main` parses its arguments before heavy imports.
COMMANDS = {
  "train": ("uae_jax.commands.train", "train every stage of a config, or resume"),
  "caption": ("uae_jax.commands.caption", "caption images"),
  "generate": ("uae_jax.commands.generate", "generate images from prompts"),
  "reconstruct": (
    "uae_jax.commands.reconstruct",
    "caption images and regenerate them from the captions",
  ),
  "data": ("uae_jax.commands.data", "look at images and captions of any format, or convert them to ArrayRecord"),
  "convert": ("uae_jax.commands.convert", "write weights as Orbax, PEFT adapters or Hugging Face folders"),
  "bench": ("uae_jax.commands.bench", "score reconstructions (Unified-Bench) or compare captions with a judge model"),
  "evaluate": ("uae_jax.commands.evaluate", "generate the images of a benchmark, and read its official scores"),
  "compare": ("uae_jax.commands.compare", "compare results of evaluate or official result files, prompt by prompt"),
  "serve": ("uae_jax.commands.serve", "serve a model to other harnesses, with a subset of OpenAI's API"),
  "plan": ("uae_jax.commands.plan", "check whether a config fits a TPU slice, and what a step costs"),
  "report": ("uae_jax.commands.report", "write the HTML report of a training run"),
  "status": ("uae_jax.commands.status", "show how far runs are, how fast, and their goodput"),
  "sweep": ("uae_jax.commands.sweep", "train a config at many points, and compare the results on one page"),
}


def usage() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
  return "\n".join(
    [
      "usage: uae-jax <command> [options]",
      "",
      "Trains and uses UAE: image autoencoders whose latent is text.",
      "",
      *lines,
      "",
      "uae-jax <command> --help   options of a command",
      "uae-jax --version          the installed version",
      "--verbose                  with any command: show the traceback of an error",
    ]
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code, which is 0 only if everything succeeded.

  Args:
    argv: command and its arguments; None takes those of the process, and ends it after Ctrl-C or SIGTERM.
  """
  if argv is not None:
    return run(list(argv))
  code = run(sys.argv[1:])
  if code in (INTERRUPTED, TERMINATED):
    # Threads of XLA may still compile: they would crash while the interpreter shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


def run(argv: list[str]) -> int:
  """Runs one command and returns its exit code."""
  verbose = "--verbose" in argv
  argv = [argument for argument in argv if argument != "--verbose"]
  if not argv:
    print(usage(), file=sys.stderr)
    return 2
  command, rest = argv[0], argv[1:]
  if command in ("-h", "--help", "help"):
    print(usage())
    return 0
  if command == "--version":
    print(metadata.version("uae_jax"))
    return 0
  if command not in COMMANDS:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    print(f"uae-jax: error: no command {command!r}{hint} (see uae-jax --help)", file=sys.stderr)
    return 2
  try:
    with (
      contextlib.nullcontext() if verbose else command_line.one_line_messages(command),
      contextlib.nullcontext() if command in HANDLES_SIGTERM else command_line.ended_by_sigterm(),
      cloud_storage.writing_results(),
    ):
      return importlib.import_module(COMMANDS[command][0]).main(rest) or 0
  except BrokenPipeError:  # The reader of stdout has ended, as in `uae-jax ... | head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it flushes
    return 1
  except KeyboardInterrupt as reason:
    print(f"uae-jax {command}: interrupted{f', {reason}' if str(reason) else ''}", file=sys.stderr)
    return INTERRUPTED
  except command_line.Terminated:
    print(f"uae-jax {command}: terminated", file=sys.stderr)
    return TERMINATED
  except argparse.ArgumentError as error:
    command_line.report_error(command, error, verbose)
    return 2
  except Exception as error:  # Last resort: report any failure in one line.
    command_line.report_error(command, error, verbose)
    return 1


if __name__ == "__main__":
  sys.exit(main())
