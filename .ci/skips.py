"""Compares the tests that were skipped with the committed list, so that a test cannot fall silent unnoticed.

    python .ci/skips.py tests/skips.txt JUNIT.xml [JUNIT.xml ...]

Exits 1 where a test was skipped that the list does not name, or the list names one that ran or is gone. A line of the
list is a test's id, `tests/test_x.py::test_name[parameters]`, and anything after " #" is the reason; a line that
starts with "?" may be skipped or not (it depends on the machine). Expected failures (xfail) are no skips.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def skipped(report: Path) -> set[str]:
    """Ids of the skipped tests of one pytest report in the xunit1 format; a whole skipped file has the file's path."""
    found = set()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        mark = case.find("skipped")
        if mark is not None and mark.get("type") != "pytest.xfail":
            file, name, group = case.get("file"), case.get("name", ""), case.get("classname", "")
            if not group:  # a file that was skipped as it was collected: its name is the module's
                found.add(name.replace(".", "/") + ".py")
                continue
            path = file or group.replace(".", "/") + ".py"
            inner = group.removeprefix(path.removesuffix(".py").replace("/", ".")).strip(".")
            found.add("::".join(part for part in (path, *inner.split("."), name) if part))
    return found


def listed(text: str) -> tuple[set[str], set[str]]:
    """(tests that must be skipped, tests that may be)."""
    must, may = set(), set()
    for line in text.splitlines():
        entry = "" if line.startswith("#") else line.split(" #")[0].strip()
        if entry.startswith("?"):
            may.add(entry[1:].strip())
        elif entry:
            must.add(entry)
    return must, may


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print("usage: python .ci/skips.py tests/skips.txt JUNIT.xml [JUNIT.xml ...]", file=sys.stderr)
        return 2
    must, may = listed(Path(arguments[0]).read_text())
    found: set[str] = set()
    for report in arguments[1:]:
        try:
            found |= skipped(Path(report))
        except (OSError, ElementTree.ParseError) as error:
            print(f"{report} is no test report: {error}", file=sys.stderr)
            return 1
    unexpected, missing = sorted(found - must - may), sorted(must - found)
    for test in unexpected:
        print(f"skipped, but not in {arguments[0]}: {test}")
    for test in missing:
        print(f"in {arguments[0]}, but not skipped: {test}")
    if unexpected or missing:
        return 1
    print(f"skipped tests: {len(found)}, as listed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
