"""llama.cpp as a contender, by the package xllamacpp: the same GGUF file, prompts and threads, in this process.

Its server takes ids and tells how many tokens it wrote, not which. It ends a text at any of the file's end tokens.

Letters: T positions of a prompt.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpdlm.config import ConfigError
from cpdlm.decoding import Sampling

UNTOLD = -1  # the id of a token that was written, but not told
SLOTS = 4096  # of its cache


class LlamaCpp:
    """Called with (prompt_T, seed). speculation: none, or what xllamacpp calls NGRAM_SIMPLE and the like.

    Raises ConfigError without a file, and where xllamacpp is not installed.
    """

    def __init__(self, file: Path | None, new_tokens: int, sampling: Sampling, speculation: str = "") -> None:
        if file is None:
            raise ConfigError("--methods llama.cpp reads a GGUF file of the same model; give it: --gguf FILE")
        self.server = _server(str(file), torch.get_num_threads(), speculation)
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
        answer: dict[str, Any] = self.server.handle_completions(asked)
        if "usage" not in answer:
            raise ConfigError(f"llama.cpp refused a prompt of {len(prompt_T)} tokens: {answer}")
        tokens = int(answer["usage"]["completion_tokens"])
        self.made = tokens - int(answer["timings"].get("draft_n_accepted", 0))
        return [UNTOLD] * tokens

    def forwards(self, hooked: int) -> int:
        """Of the last call: a token each, but for accepted drafts."""
        return self.made


@lru_cache(maxsize=4)
def _server(file: str, threads: int, speculation: str) -> Any:
    """Shared by the modes; the file is read once."""
    try:
        import xllamacpp
    except ImportError as error:
        raise ConfigError("--methods llama.cpp: xllamacpp is not installed; type pip install xllamacpp") from error
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = file, SLOTS, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    if speculation:
        name = f"COMMON_SPECULATIVE_TYPE_{speculation}"
        kind = getattr(xllamacpp.common_speculative_type, name, None)
        if kind is None:
            raise ConfigError(f"this xllamacpp has no {name}; type pip install --upgrade xllamacpp")
        params.speculative.types = [kind]
    return xllamacpp.Server(params)
