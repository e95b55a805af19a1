"""What is timed: our decoding, and Hugging Face's generate on the same weights, prompt by prompt; ours in batches too.

Letters: B prompts decoded at once, T positions of a prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

from cpdlm.bench.timers import count_calls
from cpdlm.config import ConfigError
from cpdlm.decoding import CapturedForwards, Captures, Decoded, Options, Sampling, decode_batch
from cpdlm.decoding.length import Costs, batch_limit
from cpdlm.model.language_model import LanguageModel

Generate = Callable[[Tensor, int, Sampling, int], list[int]]
Contender = Callable[[Tensor, int], Decoded | list[int]]
Ends = int | Sequence[int] | None  # ids that end a text
FILLER = -1  # of the shorter prompts of a batch


@runtime_checkable
class CountsItself(Protocol):
    """A contender that knows better than a hook how many forwards its last call made."""

    def forwards(self, hooked: int) -> int: ...


def forwards_of(contender: Contender, hooked: int) -> int:
    """Of its last call. hooked: how many a hook on the trunk counted."""
    return contender.forwards(hooked) if isinstance(contender, CountsItself) else hooked


class Ours:
    """Our decoding; on CUDA with captured forwards, made at the first prompt.

    Called with (prompt_T, seed), or with the prompts of a batch, (B, T) filled up with `FILLER`: the ids of all rows
    come then in a row, and the batch is launched kernel by kernel, with as many drafts as `generate` gives it.
    """

    def __init__(
        self,
        model: LanguageModel,
        new_tokens: int,
        sampling: Sampling,
        draft: str,
        nodes: int = 8,
        eos: Ends = None,
        costs: Costs | None = None,
    ) -> None:
        self.model, self.new_tokens, self.sampling, self.draft, self.nodes = model, new_tokens, sampling, draft, nodes
        self.eos, self.costs, self.captures = eos, costs, Captures(model)
        self.captured: CapturedForwards | None = None

    def __call__(self, prompt_T: Tensor, seed: int) -> Decoded | list[int]:
        self.captured = None
        if prompt_T.ndim == 2:
            rows = [row_T[row_T != FILLER] for row_T in prompt_T]
            seeds, limit = [seed + row for row in range(len(rows))], batch_limit(len(rows), prompt_T.device)
            return [token for text in self._written(rows, seeds, most_tokens=limit) for token in text.tokens]
        if self.costs is None:
            longest = len(prompt_T) + self.new_tokens
            self.captured = self.captures(1, longest, self.sampling, self.draft, self.nodes)
        return self._written([prompt_T], [seed], forwards=self.captured)[0]

    def timed(self, prompt_T: Tensor, seed: int, timer: Callable[[str], None]) -> Decoded:
        """The same, launched kernel by kernel; timer(part) is called at the end of each stretch of work."""
        return self._written([prompt_T], [seed], timer=timer)[0]

    def batch(self, prompts: Sequence[Tensor], seeds: Sequence[int]) -> list[Decoded]:
        """All at once, with the texts that single calls write; launched kernel by kernel."""
        return self._written(prompts, seeds)

    def _written(self, prompts: Sequence[Tensor], seeds: Sequence[int], **more: Any) -> list[Decoded]:
        """more: options of the loop."""
        return decode_batch(
            self.model,
            prompts,
            self.new_tokens,
            self.sampling,
            [torch.Generator(prompts[0].device).manual_seed(seed) for seed in seeds],
            draft=self.draft,
            eos=self.eos,
            options=Options(nodes=self.nodes, costs=self.costs, **more),
        )

    def forwards(self, hooked: int) -> int:
        """Forwards of the last call: counted by the hook or, where replayed (one in vain), on the device."""
        return hooked if self.captured is None else self.captured.forwards_run - 1


class EarlyExit:
    """Hugging Face's generate with drafts of the model's own first layers. Called with (prompt_T, seed)."""

    def __init__(self, model: LanguageModel, write: Contender) -> None:
        self.last_layer, self.write, self.made = model.trunk.layers()[-1], write, 0

    def __call__(self, prompt_T: Tensor, seed: int) -> Decoded | list[int]:
        with count_calls(self.last_layer) as calls:
            text = self.write(prompt_T, seed)
        self.made = calls.count
        return text

    def forwards(self, hooked: int) -> int:
        """Of the last call, those that reached the last layer."""
        return self.made


def exit_layer(model: LanguageModel) -> int:
    """A third of the layers. ConfigError for a body that runs all of them whatever its config says."""
    layers, config = model.trunk.layers(), model.trunk.config
    config.num_hidden_layers = few = max(1, len(layers) // 3)
    try:
        with count_calls(layers[-1]) as calls, torch.inference_mode():
            model.hidden(torch.zeros(1, 1, dtype=torch.long, device=model.trunk.embedding.device))
    finally:
        config.num_hidden_layers = len(layers)
    if calls.count:
        raise ConfigError(
            f"--methods generate-early-exit: a {config.model_type} model runs all of its layers in transformers; leave "
            "that method out"
        )
    return few


class Compiled:
    """Hugging Face's generate with a cache of fixed size and a compiled forward. Called with (prompt_T, seed).

    generate: of `hugging_face(static=True)`. longest: tokens of a prompt; the first call compiles for that many.
    """

    def __init__(self, generate: Generate, new_tokens: int, sampling: Sampling, longest: int) -> None:
        self.generate, self.new_tokens, self.sampling, self.made = generate, new_tokens, sampling, 0
        self.longest, self.compiled = longest, False

    def __call__(self, prompt_T: Tensor, seed: int) -> Decoded | list[int]:
        if not self.compiled:
            self.generate(prompt_T.new_zeros(self.longest), self.new_tokens, self.sampling, seed)
            self.compiled = True
        text = self.generate(prompt_T, self.new_tokens, self.sampling, seed)
        self.made = len(text)
        return text

    def forwards(self, hooked: int) -> int:
        """Of the last call: one for each token. The hook does not see what is compiled."""
        return self.made


def theirs(generate: Generate, new_tokens: int, sampling: Sampling) -> Contender:
    return lambda prompt_T, seed: generate(prompt_T, new_tokens, sampling, seed)


def hugging_face(
    model: LanguageModel, static: bool = False, eos: Ends = None, lookup: int | None = None, **more: Any
) -> Generate | None:
    """Hugging Face's generate on the model's own trunk and unembedding (shared, not copied).

    static: with its cache of fixed size, for which it compiles the model. eos: ids that end a text; they are
    written. lookup: tokens that its prompt lookup drafts. more: arguments of its generate. None where the target is
    not softmax(U h) (a self target that is not tied): no Hugging Face model has that distribution. The result is
    (prompt_T, new tokens, sampling, seed) -> ids. The global generator, which generate uses, is restored.
    """
    if not (model.first_is_tied or model.frozen_target):
        return None
    shell = as_hugging_face(model)

    def generate(prompt_T: Tensor, new_tokens: int, sampling: Sampling, seed: int) -> list[int]:
        choice: dict[str, Any] = {"eos_token_id": eos, "prompt_lookup_num_tokens": lookup}
        if not sampling.greedy:
            choice |= {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
        if static:
            choice |= {"cache_implementation": "static", "compile_config": compile_config(prompt_T.device)}
        settings = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=None,
            do_sample=not sampling.greedy,
            pad_token_id=0,
            use_cache=True,
            **choice,
        )
        shell.generation_config = settings
        devices = [prompt_T.device] if prompt_T.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            mask = torch.ones_like(prompt_T[None])
            text_1T = shell.generate(prompt_T[None], attention_mask=mask, generation_config=settings, **more)
        ids: list[int] = text_1T[0, len(prompt_T) :].tolist()
        return ids

    return generate


def compile_config(device: torch.device) -> CompileConfig:
    """As it is fastest there. transformers compiles on processors only if told so, by this attribute."""
    if device.type == "cuda":
        return CompileConfig()
    made: Any = CompileConfig(options={"freezing": True})
    made.mode, made._compile_all_devices = None, True  # torch takes a mode or options
    return made


def as_hugging_face(model: LanguageModel) -> Any:
    """A Hugging Face causal language model of the trunk and unembedding (shared, not copied), in evaluation mode."""
    with torch.device("meta"):  # the shell's own weights are never made
        shell = AutoModelForCausalLM.from_config(model.trunk.body.config, trust_remote_code=False)
    setattr(shell, shell.base_model_prefix, model.trunk.body)
    output = shell.get_output_embeddings()
    output.weight, output.bias = model.unembedding.weight, model.unembedding.bias
    return shell.eval()
