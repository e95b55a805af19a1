"""`python -m experiments.report`: redraw every table and figure from the records."""

import sys
from pathlib import Path

from cpdlm.files import WriteError
from cpdlm.terminal import Parser
from experiments.records import RecordError
from experiments.report import render


def main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m experiments.report", description="Redraw tables and figures from records.")
    parser.add_argument("--results", default="results", type=Path, help="folder of the records (default: results)")
    parser.add_argument(
        "--figures", default="paper_figures", type=Path, help="folder to draw into (default: paper_figures)"
    )
    parser.add_argument(
        "--readme", default=None, type=Path, help="README whose claims table is updated (default: none)"
    )
    options = parser.parse_args(arguments)
    try:
        report = render(options.results, options.figures, options.readme)
    except (RecordError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.text)
    for line in report.notes:
        print(f"note: {line}", file=sys.stderr)
    print(f"{len(report.files)} files under {options.figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
