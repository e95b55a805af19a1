"""Packs the tokens that a profile needs, for a machine without a network or a package index.

    python -m experiments.bundle DIR --profile PROFILE        (./dev bundle DIR --profile PROFILE)

There: ./reproduce.sh --profile PROFILE --only train,decode --data DIR --python PATH
"""

import sys
from pathlib import Path

from cpdlm.config import ConfigError
from cpdlm.terminal import Parser
from experiments.profiles import PROFILES


def main(arguments: list[str]) -> int:
    from cpdlm.data.corpus import write_bundle
    from cpdlm.files import WriteError

    parser = Parser(prog="./dev bundle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default="bundle", metavar="DIR", help="to write (default: bundle)")
    parser.add_argument(
        "--profile", default="gpu", choices=PROFILES, metavar="NAME", help=f"{', '.join(PROFILES)} (default: gpu)"
    )
    options = parser.parse_args(arguments)
    profile, folder = options.profile, options.folder
    try:
        sizes = write_bundle([cell.config("runs/bundle") for cell in PROFILES[profile]()], Path(folder))
    except (ConfigError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, size in sizes.items():
        print(f"{size / 2**20:6.1f} MiB  {name}")
    print(
        f"bundle: {folder}; on the other machine: "
        f"./reproduce.sh --profile {profile} --only train,decode --data {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
