"""Checks that this interpreter has what training and decoding need: the bounds of pyproject.toml, the first group alone.

Run by `./reproduce.sh --python PATH` and `CPDLM_PYTHON=PATH ./dev`, with that interpreter. Installs nothing. Exits 2 and
names what is missing or too old.
"""

import sys
from importlib import metadata
from pathlib import Path

NEEDED = ("torch", "transformers", "lightning", "torchmetrics", "numpy", "omegaconf")  # enough for a bundle of tokens


def main() -> int:
    if sys.version_info < (3, 11):
        print(f"error: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or later is needed", file=sys.stderr)
        return 2
    import tomllib

    from pip._vendor.packaging.requirements import Requirement

    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    wrong = []
    for requirement in map(Requirement, pyproject["project"]["dependencies"]):
        if requirement.name not in NEEDED:
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, {requirement.specifier} is needed")
    if wrong:
        print(
            f"error: {sys.executable}: {'; '.join(wrong)}. Install them there, or leave out --python", file=sys.stderr
        )
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
