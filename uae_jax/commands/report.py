"""`uae-jax report`: writes the report of a run and prints its path."""

from uae_jax.commands import command_line


def parser() -> command_line.Parser:
  parser = command_line.Parser("report", "Writes DIR/report/index.html, one self-contained page about a training run.")
  parser.add_argument(
    "--workdir", required=True, type=command_line.path, metavar="DIR", help="workdir of a run, finished or in progress"
  )
  return parser


def main(argv: list[str]) -> int:
  arguments = parser().parse_args(argv)

  from uae_jax.report.page import write_report

  command_line.say(write_report(arguments.workdir))
  return 0
