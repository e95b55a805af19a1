"""The layout's own laws: imports point one way, modules say why they exist, and decoding needs no optional package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "config",
    "files",
    "processes",
    "progress",
    "terminal",
    "data",
    "model",
    "decoding",
    "training",
    "baselines",
    "bench",
    "hf",
    "text",
    "generate",
    "speed_up",
    "benchmark",
    "cli",
    "__main__",
    "__init__",
]  # each may import itself and those before
MODULES = sorted(
    path for folder in ("cpdlm", "experiments", "tests", "paper_figures") for path in (ROOT / folder).rglob("*.py")
)
OPTIONAL = ("mlflow", "datasets", "matplotlib", "tokenizers", "psutil", "gguf", "accelerate", "peft", "xllamacpp")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(name: str) -> str | None:
    words = name.split(".")
    return words[1] if words[0] == "cpdlm" and len(words) > 1 else None


def test_no_code_comes_with_a_model() -> None:
    """transformers asks on the terminal, or takes what standard input says, unless it is told not to."""
    said = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())) if not name(path).startswith("tests/") else []:
            if isinstance(node, ast.Call) and re.fullmatch(
                r"Auto\w+\.from_(pretrained|config)", ast.unparse(node.func)
            ):
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                said.append((f"{name(path)}:{node.lineno}", words.get("trust_remote_code")))
    assert len(said) > 8 and not [where for where, word in said if word != "False"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in MODULES if name(path).startswith("cpdlm/")], ids=name)
def test_imports_point_one_way(path: Path) -> None:
    mine = path.relative_to(ROOT / "cpdlm").parts[0].removesuffix(".py")
    for imported in imports(path):
        assert not imported.startswith(("experiments", "tests", "paper_figures")), f"the library imports {imported}"
        other = part(imported)
        if other is None or other == "__version__":
            continue
        assert other in ORDER, f"{imported} is not for the library's own use"
        assert ORDER.index(other) <= ORDER.index(mine), f"{mine} comes before {other}: {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_says_why_it_exists(path: Path) -> None:
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip(), "no module docstring"
    assert path.stem not in ("utils", "util", "helpers", "misc", "common"), "a name that says nothing"


@pytest.mark.parametrize("path", [path for path in MODULES if name(path).startswith("cpdlm/")], ids=name)
def test_nothing_prints_to_standard_output_in_the_library(path: Path) -> None:
    """Only entry points print; a word to the person at the keyboard goes to standard error."""
    if path.name == "__main__.py":
        return
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert any(keyword.arg == "file" for keyword in node.keywords), f"line {node.lineno} prints"


def test_the_offline_stages_import_without_any_optional_package() -> None:
    code = f"""
import importlib, pkgutil, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL!r} and not sys._getframe(1).f_globals.get('__allowed__'):
            frame = sys._getframe(1)
            while frame is not None:
                origin = frame.f_globals.get('__name__', '')
                if origin.startswith(('cpdlm', 'experiments')):
                    raise ImportError(f'{{origin}} needs {{name}}')
                if origin.split('.')[0] in ('transformers', 'lightning', 'torchmetrics', 'torch'):
                    return None  # their own optional imports are theirs to guard
                frame = frame.f_back
        return None
sys.meta_path.insert(0, Blocked())
import cpdlm
count = 0
for part in ('data', 'model', 'training', 'decoding', 'bench'):
    package = importlib.import_module('cpdlm.' + part)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f'cpdlm.{{part}}.{{module.name}}')
        count += 1
importlib.import_module('experiments.cell')
importlib.import_module('experiments.sweep')
print(count)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) >= 15


@pytest.mark.parametrize("path", [path for path in MODULES if name(path).startswith("cpdlm/")], ids=name)
def test_optional_packages_are_imported_where_they_are_needed(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for imported in names:
            assert imported.split(".")[0] not in OPTIONAL, f"line {node.lineno} imports {imported} at import time"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_files_functions_and_parameter_lists_stay_small(path: Path) -> None:
    """The house's sizes: what the formatter cannot hold. A test is as long as its case."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400 and not re.search(r"#\s*fmt:", text)
    assert max(map(len, text.splitlines())) <= 120
    for node in ast.walk(ast.parse(text)) if not name(path).startswith("tests/") else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            # Signatures of torch and of transformers are not ours to shorten.
            named = [argument for argument in given if argument.arg not in ("self", "cls", "ctx")]
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 60, f"{node.name} is too long"
            assert len(named) <= 8 or node.name == "forward", f"{node.name} takes {len(named)} parameters"
