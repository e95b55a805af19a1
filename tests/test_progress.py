"""Progress in a log: plain lines, seldom."""

import io
import time

import pytest

from cpdlm import progress


@pytest.mark.parametrize(("seconds", "lines"), [(0.1, 3), (60.0, 0)])
def test_a_log_gets_a_line_now_and_then(seconds: float, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr(progress, "LOG_SECONDS", seconds)
    with progress.Bar(total=10, desc="cells", unit="cell") as bar:
        for _ in range(10):
            time.sleep(0.04)
            bar.update()
    said = log.getvalue()
    assert "\r" not in said and lines <= len(said.splitlines()) <= 5 * lines
    assert not lines or said.splitlines()[-1].startswith("cells: 10 of 10, ")
    assert not lines or " left" in said
