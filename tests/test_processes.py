"""How a process of a run of several ends: with its exit code and output, and without the interpreter's own end."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What torch's threads do now and then: abort while the interpreter is taken down.
PROGRAM = """
import atexit, os, sys
from cpdlm.processes import leave

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

sys.kept = Aborts()
atexit.register(print, "at exit")
print("done")
{end}
"""


@pytest.mark.parametrize("code", [0, 3])
def test_it_leaves_with_its_code_and_output_and_is_not_aborted(code: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(end=f"leave({code})")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "done\nat exit\n"), done.stderr


def test_an_ordinary_end_would_be_aborted() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(end="sys.exit(0)")], capture_output=True, text=True)
    assert done.returncode < 0
