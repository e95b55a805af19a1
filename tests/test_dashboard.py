"""The dashboard in a browser: from the printed address to the runs, to the curves of one, to the report."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from made_records import made

from experiments.records import write

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of the cells' view, as `./dev ui` prints it, over two imported records and a report."""
    pytest.importorskip("mlflow")
    for rank, seed in ((1, 0), (8, 1)):
        write(made(rank, seed=seed), tmp_path / "results" / "C1")
    (tmp_path / "paper_figures").mkdir()
    (tmp_path / "paper_figures" / "report.html").write_text("<h1>What the records say</h1>")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "experiments.tracking", "runs", "--results", "results", "--port", str(port)]
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))  # another mlflow may come first
    variables = os.environ | {"PYTHONPATH": paths}
    with open(tmp_path / "said", "w") as out:
        process = subprocess.Popen([sys.executable, *words], cwd=tmp_path, env=variables, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 300
        while True:
            said = (tmp_path / "said").read_text()
            if "startup complete" in said:
                break
            assert process.poll() is None and time.monotonic() < end, said
            time.sleep(0.2)
        yield re.findall(r"cells of cpdlm C1: (\S+)", said)[0]
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow  # a minute: the database is made, the server and the browser start
@pytest.mark.skipif(not PROGRAM, reason="needs a browser: apt install chromium")
def test_from_the_list_of_runs_to_curves_to_the_report(server: str, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(server)
        browser.says("2 matching runs", "r1 n4 code s0 tiny own", "joint_nll")
        left = "name => heads.find(head => head.innerText.trim() === name)?.getBoundingClientRect().x"
        heads = "const heads = [...document.querySelectorAll('.ag-header-cell')]"
        browser.wait(
            f"(() => {{ {heads}; const x = ['rank', 'seed', 'variant', 'joint_nll'].map({left});"
            " return x.every((at, n) => at > (x[n - 1] ?? 0)) })()"
        )
        cells = browser.ask("[...document.querySelectorAll('.ag-cell')].map(cell => cell.innerText.trim())")
        assert all(len(cell) <= 6 for cell in cells if re.fullmatch(r"\d+\.\d+", cell)), "numbers are rounded"
        browser.click("r8 n4 code s1 tiny own")
        browser.says("training.steps")
        browser.click("Model metrics")
        browser.says("train\n(", "validation\n(", "Model metrics\n(")
        page = browser.ask("document.body.innerText")
        assert page.index("train\n(") < page.index("Model metrics\n("), "curves come before bars"
        experiment = server.partition("?")[0]
        browser.open(f"{experiment}?workflowType=machine_learning")
        for entry in ("records: C1", "Artifacts", "figures", "report.html"):
            browser.click(entry)
        browser.frame_says("What the records say")
    finally:
        browser.close()
