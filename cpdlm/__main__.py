"""`python -m cpdlm` is the command `cpdlm`."""

import sys

from cpdlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
