"""llama.cpp as a contender, by the package xllamacpp: the same GGUF file, prompts and number of threads.

Its server takes ids and tells how many tokens it wrote, not which. It ends a text at any of the file's end tokens.

Letters: T positions of a prompt.
"""

import contextlib
import json
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from select import select
from subprocess import PIPE, Popen
from typing import Any

import torch
from torch import Tensor

from cpdlm.config import ConfigError
from cpdlm.decoding import Sampling

UNTOLD = -1  # the id of a token that was written, but not told
LIMIT = 300  # seconds
SCRIPT = Path(__file__).with_name("llama_server.py")


class LlamaCpp:
    """Called with (prompt_T, seed). speculation: none, or what xllamacpp calls NGRAM_SIMPLE and the like.

    Raises ConfigError without a file, and where xllamacpp is not installed.
    """

    def __init__(self, file: Path | None, new_tokens: int, sampling: Sampling, speculation: str = "") -> None:
        if file is None:
            raise ConfigError("--methods llama.cpp reads a GGUF file of the same model; give it: --gguf FILE")
        self.server = server(str(file), torch.get_num_threads(), speculation)
        self.question = {
            "n_predict": new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "cache_prompt": False,
        }
        self.made = 0

    def __call__(self, prompt_T: Tensor, seed: int) -> list[int]:
        asked = self.question | {"prompt": prompt_T.tolist(), "seed": seed % 2**32}
        answer = self.server.ask(asked)
        if "usage" not in answer:
            raise ConfigError(f"llama.cpp refused a prompt of {len(prompt_T)} tokens: {answer}")
        tokens = int(answer["usage"]["completion_tokens"])
        self.made = tokens - int(answer["timings"].get("draft_n_accepted", 0))
        return [UNTOLD] * tokens

    def forwards(self, hooked: int) -> int:
        """Of the last call: a token each, but for accepted drafts."""
        return self.made


class Server:
    """Answers a question at a time; ends with this process, or after `LIMIT` without an answer."""

    def __init__(self, file: str, threads: int, speculation: str) -> None:
        if find_spec("xllamacpp") is None:
            raise ConfigError("--methods llama.cpp: xllamacpp is not installed; type pip install xllamacpp")
        words = [sys.executable, "-P", str(SCRIPT), file, str(threads), speculation]
        self.process = Popen(words, stdin=PIPE, stdout=PIPE, text=True)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None and answers is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=asked, flush=True)
        line = answers.readline() if select([answers], [], [], LIMIT)[0] else ""
        if not line:
            self.process.kill()
            raise ConfigError(f"llama.cpp gave no answer (exit code {self.process.wait()}); what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# Shared by the modes; the file is read once.
server = lru_cache(maxsize=4)(Server)
