"""Help on a narrow terminal, of every command."""

from collections.abc import Callable

import pytest

from cpdlm import cli
from experiments import bundle, compare, plan, run, sweep, verify
from experiments.report import __main__ as report
from experiments.tracking import __main__ as tracking

MAINS: dict[str, Callable[[list[str]], int]] = {
    "cpdlm": cli.main,
    **{f"cpdlm {name}": cli.main for name in cli.COMMANDS},
    **{each.__name__: each.main for each in (run, sweep, plan, tracking, report, bundle, verify, compare)},
}


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("name", MAINS)
def test_no_line_of_help_is_wider_than_the_terminal(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    try:
        code = MAINS[name]([*name.split()[1:], "--help"])
    except SystemExit as ended:  # argparse's
        code = ended.code
    said = capsys.readouterr().out
    assert code == 0 and said
    assert not [line for line in said.splitlines() if len(line) > width and len(line.split()) > 1]
