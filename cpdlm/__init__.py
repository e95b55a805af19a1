"""Multi-token prediction with rank-r canonical probability decomposition, and lossless decoding from it.

import cpdlm

model = cpdlm.load("my-fast-llm")
print(model.generate("def main(", max_new_tokens=48))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpdlm.text import Model

__version__ = "0.1.0"


def load(source: str | Path, weights: str = "auto") -> Model:
    """A model with heads, ready to write text on this machine.

    source: folder that `cpdlm speed-up` or `cpdlm export` wrote, folder of a finished run, or smollm2. weights: how
    they are held, as of `cpdlm generate --weights`. Raises RuntimeError or ValueError, with what to type instead, where
    there is no such model or it has no heads.

    >>> model = cpdlm.load(folder)
    >>> model.generate("def f1(", max_new_tokens=8) == model.generate("def f1(", max_new_tokens=8, draft="none")
    True
    """
    from cpdlm.text import load_model  # torch and transformers take seconds

    return load_model(Path(source), weights)
