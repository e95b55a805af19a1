"""`generate` writes what the stock loop writes.

The judge is not ours: `generate` of `transformers` on the Hugging Face model of trunk and unembedding where the target
is its softmax, the stock loop on our `forward` where it is eq. 11, and the oracle's enumeration for sampling:
SAMPLES rows, chi-square at `oracle.FALSE_ALARM` = 1e-4 for the fixed seed, power of at least .99 against each fault.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer as TokenizerModel
from tokenizers.models import WordLevel
from torch import Tensor, distributed
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import GenerateDecoderOnlyOutput

from cpdlm.config import resolve
from cpdlm.decoding.drafters import DRAFTERS
from cpdlm.hf import CpdlmForCausalLM
from cpdlm.hf.refusals import STOCK
from cpdlm.model.language_model import LanguageModel, build_language_model
from cpdlm.model.trunk import CACHE
from tests import oracle
from tests.hf_models import COMMON, LAYOUTS, OWN, batch, plain, stock, wrap, wrapped
from tests.test_export import write_corpus
from tests.test_loop import real

SAMPLES = 1500


@cache
def usual(layout: str, rows: int, tokens: int = 24) -> list[int]:
    """What the first row says: options are chosen from it so that they matter."""
    return stock(layout, **batch(rows), max_new_tokens=tokens, pad_token_id=0)[0, 7:].tolist()


# --- greedy, against the library --------------------------------------------------------------------------------------


class Multiple(StoppingCriteria):
    """Stops a row after an id that is a multiple of 5."""

    stateless = True

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % 5 == 0


class Favour(LogitsProcessor):
    """Raises another id in every row: what a row gets must not depend on how rows are grouped."""

    stateless = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, 3 + row] += 2.0
        return scores


def successors(row: int, ids: Tensor) -> list[int]:
    """A grammar that knows no sentence but its own: odd and even ids in turn, after the prompt."""
    new = ids[7:].tolist()
    assert all(token % 2 == place % 2 for place, token in enumerate(new)), f"asked about {new}"
    return list(range(len(new) % 2, 17, 2))


successors.stateless = True  # type: ignore[attr-defined]


def options(said: list[int]) -> dict[str, dict[str, Any]]:
    """said: what is written without options."""
    return {
        "max_new_tokens": {"max_new_tokens": 24},
        "one token": {"max_new_tokens": 1},
        "max_length": {"max_length": 19},
        "default length": {},
        "one eos": {"max_new_tokens": 24, "eos_token_id": said[6]},
        "several eos": {"max_new_tokens": 24, "eos_token_id": [said[6], said[9], 16], "pad_token_id": 1},
        "repetition_penalty": {"max_new_tokens": 24, "repetition_penalty": 1.7},
        "no_repeat_ngram_size": {"max_new_tokens": 24, "no_repeat_ngram_size": 2},
        "encoder_repetition_penalty": {"max_new_tokens": 24, "encoder_repetition_penalty": 1.5},
        "encoder_no_repeat_ngram_size": {"max_new_tokens": 24, "encoder_no_repeat_ngram_size": 1},
        "bad_words_ids": {"max_new_tokens": 24, "bad_words_ids": [[said[3]], said[5:7]]},
        "sequence_bias": {"max_new_tokens": 24, "sequence_bias": [[[said[2]], -3.0], [[2, 5], 4.0]]},
        "min_new_tokens": {"max_new_tokens": 24, "min_new_tokens": 12, "eos_token_id": said[6]},
        "min_length": {"max_new_tokens": 24, "min_length": 17, "eos_token_id": said[6]},
        "forced_eos_token_id": {"max_new_tokens": 9, "forced_eos_token_id": 4},
        "length penalty": {"max_new_tokens": 24, "exponential_decay_length_penalty": (4, 1.5), "eos_token_id": said[6]},
        "suppress_tokens": {"max_new_tokens": 24, "suppress_tokens": said[:2], "begin_suppress_tokens": [said[4]]},
        "two processors": {"max_new_tokens": 24, "repetition_penalty": 1.3, "bad_words_ids": [[said[4]]]},
        "own processor": {"max_new_tokens": 24, "logits_processor": LogitsProcessorList([Favour()])},
        "prefix_allowed_tokens_fn": {"max_new_tokens": 16, "prefix_allowed_tokens_fn": successors},
        "stopping_criteria": {
            "max_new_tokens": 24,
            "stopping_criteria": StoppingCriteriaList([Multiple()]),
            "eos_token_id": 16,
        },
        "watermark": {"max_new_tokens": 24, "watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
        "use_cache": {"max_new_tokens": 24, "use_cache": False},
    }


OPTIONS = list(options(list(range(12))))


@cache
def stock_text(name: str, layout: str, rows: int) -> tuple[dict[str, Any], list[list[int]]]:
    """(the options of that name, what the library writes with them)."""
    chosen = {"pad_token_id": 0} | options(usual(layout, rows))[name]
    return chosen, stock(layout, **batch(rows), **chosen).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_greedy_is_what_the_library_writes(name: str, layout: str) -> None:
    for rows in (1, 3):
        chosen, theirs = stock_text(name, layout, rows)
        ours = wrapped(layout).generate(**batch(rows), **chosen)
        assert ours.dtype == torch.int64 and ours.tolist() == theirs


class Automaton(LogitsProcessor):
    """A grammar's matcher: it follows the text token by token, and forbids what it has seen last, of every row."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids[:, -1:])
        return scores.scatter(1, torch.cat(self.seen[-3:], dim=1), -math.inf)


class SomeRowOnce(StoppingCriteria):
    """As lm-eval's: a row that said a multiple of 5 once is done for ever, and nothing ends before all rows have."""

    def __init__(self) -> None:
        self.done: Tensor | bool = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.done = self.done | (input_ids[:, -1] % 5 == 0)
        return self.done.all().expand(len(input_ids))


def test_allowed_tokens_of_a_function_with_a_memory_are_those_of_the_stock_loop() -> None:
    def turns() -> dict[str, Any]:
        calls: list[int] = []

        def allowed(row: int, ids: Tensor) -> list[int]:
            calls.append(row)
            return [len(calls) % 17, (len(calls) + 5) % 17]

        return {"max_new_tokens": 12, "pad_token_id": 0, "prefix_allowed_tokens_fn": allowed}

    theirs = stock("common", **batch(2), **turns())
    with pytest.warns(UserWarning, match="allowed may keep something between calls"):
        assert wrapped("common").generate(**batch(2), **turns()).tolist() == theirs.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [Automaton, SomeRowOnce])
def test_what_has_a_memory_is_called_as_the_stock_loop_calls_it(kind: type[Any], layout: str) -> None:
    def chosen() -> dict[str, Any]:
        held = StoppingCriteriaList([kind()]) if kind is SomeRowOnce else LogitsProcessorList([kind()])
        name = "stopping_criteria" if kind is SomeRowOnce else "logits_processor"
        return {"max_new_tokens": 20, "pad_token_id": 0, name: held}

    theirs = stock(layout, **batch(3), **chosen())
    with pytest.warns(UserWarning, match=f"{kind.__name__} may keep something between calls.*stateless = True"):
        ours = wrapped(layout).generate(**batch(3), **chosen())
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("draft", [name for name in DRAFTERS if name != "chain"])
def test_every_way_to_draft_writes_the_same(draft: str) -> None:
    chosen = {
        "max_new_tokens": 20,
        "pad_token_id": 0,
        "repetition_penalty": 1.3,
        "prefix_allowed_tokens_fn": successors,
    }
    theirs = stock("common", **batch(2), **chosen)
    assert wrapped("common").generate(**batch(2), **chosen, draft=draft, nodes=5).tolist() == theirs.tolist()


def test_options_do_something_and_drafts_are_accepted() -> None:
    """The comparisons above are of texts that differ, written in fewer passes than tokens."""
    texts = {tuple(stock_text(name, "common", 1)[1][0]) for name in OPTIONS}
    assert len(texts) >= len(OPTIONS) - 4
    forwards = []
    model = wrapped("common").model
    handle = model.trunk.body.register_forward_hook(lambda *arguments: forwards.append(1))
    try:
        wrapped("common").generate(**batch(1), max_new_tokens=24)
    finally:
        handle.remove()
    assert 1 < len(forwards) < 24


@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_is_told_what_the_library_tells_it(rows: int) -> None:
    class Heard:
        def __init__(self) -> None:
            self.all: list[Tensor] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.all.append(value)

        def end(self) -> None:
            self.ended += 1

    chosen = {"max_new_tokens": 20, "eos_token_id": usual("common", rows)[6], "pad_token_id": 1}
    heard = [Heard(), Heard()]
    ours = wrapped("common").generate(**batch(rows), **chosen, streamer=heard[0])
    stock("common", **batch(rows), **chosen, streamer=heard[1])
    assert [each.tolist() for each in heard[0].all] == [each.tolist() for each in heard[1].all]
    assert heard[0].ended == heard[1].ended == 1
    assert torch.stack(heard[0].all[1:], dim=1).tolist() == ours[:, 7:].tolist()


def test_return_dict_and_the_models_own_generation_config() -> None:
    model = wrap(real(*COMMON))
    model.generation_config = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    done = model.generate(torch.tensor([[1, 2]]), return_dict_in_generate=True)
    assert isinstance(done, GenerateDecoderOnlyOutput) and done.sequences.shape == (1, 7) and done.scores is None
    given = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert model.generate(torch.tensor([[1, 2]]), given).shape == (1, 5)
    assert model.generate(torch.tensor([[1, 2]]), given, max_new_tokens=4).shape == (1, 6)


# --- sampling, against the oracle -------------------------------------------------------------------------------------

PROMPT = (2, 0)


@cache
def small() -> CpdlmForCausalLM:
    return wrap(real(*OWN, horizon=3, vocabulary=3))


@cache
def scores(history: oracle.History) -> tuple[float, ...]:
    return tuple(small()(torch.tensor([history])).logits[0, -1].detach().tolist())


def distribution(
    penalty: float = 1.0, length: int = 4, eos: int | None = None, **keep: Any
) -> dict[oracle.History, float]:
    """repetition_penalty by its definition (negative scores of what has been said are multiplied), then the filters."""

    def target(history: oracle.History) -> oracle.Law:
        changed = [each * penalty if token in history else each for token, each in enumerate(scores(history))]
        return oracle.filter_law(oracle.normalise([2.718281828459045**each for each in changed]), **keep)

    assert all(each < 0 for each in scores(PROMPT)), "eq. 11 gives log-probabilities"
    return oracle.autoregressive_law(target, PROMPT, length, eos)


SAMPLED = {
    "plain": ({"top_k": 0}, {}, {"temperature": 1.6}),
    "temperature": ({"top_k": 0, "temperature": 0.6}, {"temperature": 0.6}, {}),
    "top-k and top-p": ({"top_k": 2, "top_p": 0.9}, {"top_k": 2, "top_p": 0.9}, {}),
    "eos": ({"top_k": 0, "eos_token_id": 1}, {"eos": 1}, {"eos": 1, "temperature": 1.6}),
    "penalty": ({"top_k": 0, "repetition_penalty": 1.6}, {"penalty": 1.6}, {}),
    "penalty and filters": (
        {"temperature": 0.8, "top_k": 2, "repetition_penalty": 1.6, "eos_token_id": 1},
        {"temperature": 0.8, "top_k": 2, "penalty": 1.6, "eos": 1},
        {"temperature": 0.8, "top_k": 2, "eos": 1},
    ),
}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("draft", ["chain", "block"])
def test_samples_have_the_distribution_that_the_options_say(name: str, draft: str) -> None:
    """Power of .99 against the law without the option (plain: with a temperature that nobody asked for)."""
    chosen, right, wrong = SAMPLED[name]
    truth = distribution(**right)
    assert oracle.power(distribution(**wrong), truth, SAMPLES) >= 0.99
    torch.manual_seed(3)
    drawn = small().generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, 2),
        do_sample=True,
        max_new_tokens=4,
        num_return_sequences=SAMPLES,
        draft=draft,
        **({"pad_token_id": 0} | chosen),
    )
    assert drawn.shape[0] == SAMPLES and (drawn[:, :2] == torch.tensor(PROMPT)).all()
    assert oracle.p_value(texts_of(drawn, chosen.get("eos_token_id")), truth) > oracle.FALSE_ALARM


def texts_of(drawn: Tensor, eos: int | None) -> Counter[oracle.History]:
    counts: Counter[oracle.History] = Counter()
    for row in drawn[:, 2:].tolist():
        end = row.index(eos) + 1 if eos in row else len(row)
        assert set(row[end:]) <= {0}, "padding follows the end"
        counts[tuple(row[:end])] += 1
    return counts


NARROW: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 1e-6},
    "temperature": {"temperature": 1e-5},
    "min_p": {"min_p": 0.999},
    "typical_p": {"typical_p": 1e-6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.999},
    "renormalize_logits": {"top_k": 1, "renormalize_logits": True},
    "penalty": {"top_k": 1, "repetition_penalty": 1.6},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NARROW)
def test_a_distribution_of_one_token_is_sampled_as_the_library_samples_it(name: str, layout: str) -> None:
    """Every filter, so narrow that nothing is left to chance: the texts are equal."""
    chosen = {"do_sample": True, "top_k": 0, "max_new_tokens": 16, "pad_token_id": 0} | NARROW[name]
    assert wrapped(layout).generate(**batch(2), **chosen).tolist() == stock(layout, **batch(2), **chosen).tolist()


def test_the_global_seed_decides() -> None:
    model = wrapped("common")  # made before any seed is set

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        chosen: dict[str, Any] = {"do_sample": True, "max_new_tokens": 20, "pad_token_id": 0}
        return [
            *model.generate(**batch(2), **chosen).tolist(),
            *model.generate(**batch(2), **chosen).tolist(),
        ]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1)[:2] != drawn(1)[2:], "a second call goes on where the first has ended"


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search is not for this loop.*GenerationMixin.generate"),
    "beam sample": ({"num_beams": 2, "do_sample": True}, "beam sample"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not for this loop"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation is not for this loop"),
    "dola": ({"dola_layers": "low"}, "dola generation"),
    "early exit": (
        {"assistant_early_exit": 1},
        "assistant_early_exit is not needed, this model drafts for itself.*; leave it out",
    ),
    "assistant": ({"assistant_model": object()}, "assistant_model is not needed, this model drafts for itself"),
    "scores": (
        {"return_dict_in_generate": True, "output_scores": True},
        "output_scores=True: this loop returns `sequences`",
    ),
    "guidance": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor keeps a state"),
    "cache": ({"past_key_values": object()}, "past_key_values would have to hold.*pass the whole text"),
    "cache, by its newer name": ({"cache": object()}, "cache would have to hold.*pass the whole text"),
    "static cache": (
        {"cache_implementation": "static"},
        "cache_implementation='static' is not for this loop.*; leave it out$",
    ),
    "paged": ({"cache_implementation": "paged"}, "cache_implementation='paged' is not for this loop.*; leave it out$"),
    "embeddings": (
        {"inputs_embeds": torch.zeros(1, 2, 64)},
        "inputs_embeds: this model reads token ids; pass input_ids",
    ),
    "positions": ({"position_ids": torch.tensor([[0, 1]])}, "position_ids is not for this loop"),
    "healing": ({"token_healing": True}, "token_healing=True is not for this loop"),
    "stop strings": ({"stop_strings": "x"}, "stop_strings need the tokenizer"),
    "length": ({"max_new_tokens": 63}, "exceed the model's context of 64; pass max_new_tokens of at most 62"),
    "draft": ({"draft": "guess"}, "draft='guess' is not one of none, chain"),
    "temperature": ({"do_sample": True, "temperature": 0.0}, "temperature"),
    "top_p": ({"do_sample": True, "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    "empty": ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty; pass at least one token"),
    "large id": ({"inputs": torch.tensor([[1, 17]])}, "token id 17, the vocabulary is 0..16"),
    "negative id": ({"inputs": torch.tensor([[1, -2]])}, "token id -2"),
    "nothing to pad with": (
        batch(2) | {"inputs": None, "stopping_criteria": StoppingCriteriaList([Multiple()])},
        "pass pad_token_id",
    ),
    "padding": ({"attention_mask": torch.tensor([[1, 0]])}, "a prompt ends in padding.*padding_side='left'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_speculation_cannot_do_is_refused_by_name(name: str) -> None:
    chosen, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        wrapped("common").generate(**({"inputs": torch.tensor([[1, 2]]), "max_new_tokens": 4} | chosen))


class Forbid(LogitsProcessor):
    """Nothing may follow a text of six tokens."""

    stateless = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -math.inf) if input_ids.shape[1] >= 6 else scores


def test_processors_that_forbid_every_token_are_no_diverged_run() -> None:
    with pytest.raises(ValueError, match="the logits processors forbid every token at 6 .the prompt is 0..1.; loosen"):
        wrapped("common").generate(torch.tensor([[1, 2]]), logits_processor=[Forbid()], max_new_tokens=9)


def test_foreign_processors_that_forbid_every_token_do_not_write_token_0() -> None:
    foreign = Forbid()
    foreign.stateless = False
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="forbid every token at 6; loosen them"):
        wrapped("common").generate(torch.tensor([[1, 2]]), logits_processor=[foreign], max_new_tokens=9)


def test_a_length_that_no_call_asks_for_ends_at_the_context() -> None:
    """As pipeline(...) without options, whose default is 256 new tokens."""
    longer = GenerationConfig(max_new_tokens=256)
    with pytest.warns(UserWarning, match="the text ends at the model's context of 64 tokens"):
        done = wrapped("common").generate(torch.tensor([[1, 2]]), longer)
    assert done.shape[1] == 64 and done.tolist() == stock("common", torch.tensor([[1, 2]]), max_length=64).tolist()


def test_a_frozen_target_decodes_while_its_heads_train() -> None:
    ids = torch.tensor([[1, 2, 5, 3]])
    expected = wrapped("common").generate(ids, max_new_tokens=9)
    training = wrap(copy.deepcopy(wrapped("common").model)).train()
    assert torch.equal(training.generate(ids, max_new_tokens=9), expected)


def ids_like(tokenizer_size: int) -> PreTrainedTokenizerFast:
    letters = {chr(97 + place): place for place in range(tokenizer_size)}
    model = TokenizerModel(WordLevel(letters, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="b", eos_token="a", pad_token="a")


# What the stock loop is said to take or have, for our model and for the plain one.
TAKEN: dict[str, Callable[[PreTrainedModel], dict[str, Any]]] = {
    "beams": lambda model: {"num_beams": 3},
    "beam sample": lambda model: {"num_beams": 3, "do_sample": True},
    "lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"assistant_model": plain(wrapped("common").model)},
    "scores": lambda model: {"return_dict_in_generate": True, "output_scores": True},
    "logits": lambda model: {"return_dict_in_generate": True, "output_logits": True},
    "guidance": lambda model: {"guidance_scale": 1.5},
    "watermark": lambda model: {
        "do_sample": True,
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 1, 4], ngram_len=3),
    },
    "negative prompt": lambda model: {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[3]])},
    "cache": lambda model: {CACHE: model(torch.tensor([[1, 2]]))[CACHE]},
    "positions": lambda model: {"position_ids": torch.arange(4).unsqueeze(0)},
    "healing": lambda model: {"token_healing": True, "tokenizer": ids_like(17)},
    "processes": lambda model: {"synced_gpus": True},
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_refusal_says_of_the_stock_loop_is_so(name: str) -> None:
    ids, always = torch.tensor([[1, 2, 5, 3]]), {"max_new_tokens": 12, "pad_token_id": 0}
    with pytest.raises(ValueError, match=re.escape(STOCK)):
        wrapped("common").generate(ids, **always, **TAKEN[name](wrapped("common")))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        done = []
        for model in (wrapped("common"), plain(wrapped("common").model)):
            torch.manual_seed(0)
            done.append(GenerationMixin.generate(model, ids, **always, **TAKEN[name](model)))
    finally:
        distributed.destroy_process_group()
    ours, theirs = (
        [each] if isinstance(each, Tensor) else [each.sequences, *(each.scores or each.logits)] for each in done
    )
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


MOVED: dict[str, tuple[dict[str, Any], str]] = {
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive-search"),
    "dola": ({"dola_layers": "low"}, "dola"),
    "group beams": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group-beam-search"),
    "constraints": ({"num_beams": 2, "force_words_ids": [[[3]]]}, "constrained-beam-search"),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_transformers_has_no_more_is_where_the_refusal_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asks for the same repository, spelt as the refusal spells it. Its code is not run here."""
    chosen, repository = MOVED[name]
    call = {"custom_generate": f"transformers-community/{repository}", "trust_remote_code": True}
    ids, model = torch.tensor([[1, 2]]), plain(wrapped("common").model)
    with pytest.raises(ValueError, match=f"custom_generate='{call['custom_generate']}' and trust_remote_code=True"):
        wrapped("common").generate(ids, max_new_tokens=4, **chosen)
    with pytest.raises(ValueError, match=f"requires `trust_remote_code=True`.*{call['custom_generate']}"):
        GenerationMixin.generate(wrapped("common"), ids, max_new_tokens=4, **chosen)
    asked = []

    def load(self: Any, where: str, trust_remote_code: bool | None = None, **rest: Any) -> Any:
        asked.append((where, trust_remote_code))
        return lambda model, inputs, **options: inputs

    monkeypatch.setattr(GenerationMixin, "load_custom_generate", load)
    assert model.generate(ids, max_new_tokens=4, **chosen, **call) is ids and asked == [tuple(call.values())]


@pytest.mark.parametrize("name", ["attentions", "hidden_states"])
def test_what_the_loop_does_not_return_is_had_from_the_trunk(name: str) -> None:
    model, output = wrap(copy.deepcopy(real(*COMMON))), f"output_{name}"  # whose attention is set below
    with pytest.raises(ValueError, match=rf"model.model.trunk.body\(sequences, {output}=True\)"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, return_dict_in_generate=True, **{output: True})
    sequences = model.generate(torch.tensor([[1, 2]]), max_new_tokens=4)
    whole = plain(model.model)
    if name == "attentions":
        whole.set_attn_implementation("eager")  # of the body, which is the same
    theirs = whole(sequences, **{output: True})[name]
    ours = model.model.trunk.body(sequences, **{output: True})[name]
    assert len(ours) == len(theirs) > 0 and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_a_paged_cache_is_refused_wherever_it_is_asked_for() -> None:
    for call in (
        lambda model: model.generate_batch([[1, 2]], max_new_tokens=4),
        lambda model: GenerationMixin.generate(model, torch.tensor([[1, 2]]), cache_implementation="paged"),
    ):
        with pytest.raises(ValueError, match="continuous batching .* call generate with the prompts as one batch"):
            call(wrapped("common"))


@pytest.mark.parametrize("chosen", [{}, {"do_sample": True}, {"repetition_penalty": 1.3}])
def test_a_target_of_nan_is_named(chosen: dict[str, Any]) -> None:
    model = wrap(copy.deepcopy(real(*COMMON)))
    with torch.no_grad():
        model.model.trunk.body.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the target distribution of token 2 .* is NaN or -inf alone"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, **chosen)


def test_an_adapter_on_the_unembedding_is_the_targets_too() -> None:
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=["unembedding"], init_lora_weights=False, lora_alpha=16)
    adapted = peft.get_peft_model(wrap(copy.deepcopy(real(*COMMON))), config).eval()
    for name, parameter in adapted.named_parameters():  # peft leaves them as memory was
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    chosen = {"max_new_tokens": 24, "pad_token_id": 0}
    ours = adapted.generate(**batch(3), **chosen)
    assert ours.tolist() != stock("common", **batch(3), **chosen).tolist(), "the adapter matters"
    merged = adapted.merge_and_unload()
    assert ours.tolist() == plain(merged.model).generate(**batch(3), **chosen).tolist()
    own = peft.get_peft_model(wrap(copy.deepcopy(real(*OWN))), config).eval()
    with pytest.raises(ValueError, match="whose adapter the heads do not see; merge it first"):
        own.generate(**batch(1), **chosen)


def test_weights_that_drafts_cannot_read_are_refused(tmp_path: Path) -> None:
    """The trunk's modules are called, wherever their weights are; those of unembedding and heads are read."""
    wrap(copy.deepcopy(real(*COMMON))).save_pretrained(tmp_path)
    chosen, theirs = {"max_new_tokens": 9, "pad_token_id": 0}, stock("common", **batch(2), max_new_tokens=9).tolist()
    for part in ("unembedding", "heads", "trunk"):
        places = {f"model.{name}": "cpu" for name in ("trunk", "unembedding", "heads", "anchor")}
        places |= {f"model.{part}": "disk"}
        model = CpdlmForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / part)
        if part == "trunk":
            assert model.generate(**batch(2), **chosen).tolist() == theirs
            continue
        with pytest.raises(ValueError, match="unembedding or heads are offloaded"):
            model.generate(**batch(2), **chosen)
    model = CpdlmForCausalLM.from_pretrained(tmp_path)
    model.model.heads = torch.ao.quantization.quantize_dynamic(model.model.heads, {torch.nn.Linear})
    with pytest.raises(ValueError, match="quantised in place"):
        model.generate(**batch(2), **chosen)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_learnt_prompts_are_refused(kind: str) -> None:
    shape = {"num_layers": 2, "token_dim": 64, "num_attention_heads": 4, "num_transformer_submodules": 1}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **shape)
    tuned = peft.get_peft_model(wrap(copy.deepcopy(real(*COMMON))), config).eval()
    with pytest.raises(ValueError, match="prompt or prefix tuning .* which this loop does not see"):
        tuned.generate(**batch(1), max_new_tokens=4)


# --- slow -------------------------------------------------------------------------------------------------------------


def trained(text_T: Tensor, steps: int = 150) -> LanguageModel:
    """A trunk and heads that have learnt this text: drafts are often right, and near-ties are real ones."""
    base = {"size": "micro", "data.context": 128, "decode.prompt_tokens": 8, "decode.new_tokens": 8}
    torch.manual_seed(0)
    trunk = build_language_model(resolve(base | {"rank": 1, "horizon": 1}), 257)
    heads = build_language_model(resolve(base | {"rank": 4, "anchor": "token", "model.trunk": "frozen"}), 257, trunk)
    rows_RT = text_T[: len(text_T) // 64 * 64].view(-1, 64)
    for model in (trunk, heads):
        model.requires_grad_(model is trunk)
        if model is heads:
            for part in (model.heads, model.anchor):
                assert part is not None
                part.requires_grad_(True)
        optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=4e-3)
        for _ in range(steps):
            rows_BT = rows_RT[torch.randint(0, len(rows_RT), (16,))]
            hidden_BTD = model.hidden(rows_BT)
            if model is trunk:
                loss = -model.target_log_probs(hidden_BTD[:, :-1]).gather(-1, rows_BT[:, 1:, None]).mean()
            else:
                windows_PN = rows_BT.unfold(1, model.horizon, 1)[:, 1:].reshape(-1, model.horizon)
                hidden_PD = hidden_BTD[:, : -model.horizon].flatten(0, 1)
                loss = -model.draft_joint(hidden_PD, windows_PN[:, 0]).log_prob(windows_PN[:, 1:]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return heads.eval()


@pytest.mark.slow
def test_greedy_in_float32_on_a_hundred_prompts(tmp_path: Path) -> None:
    """100 prompts x 64 tokens, many of them accepted drafts: at most one text differs from the library's.

    Where it does, the target's two best, in float64, are within 1e-4 of each other.
    """
    write_corpus(tmp_path / "words.txt")
    text_T = torch.tensor([*(tmp_path / "words.txt").read_bytes()])
    model = trained(text_T[:200_000])
    ours, theirs = wrap(model), plain(model)
    exact = copy.deepcopy(model).double()
    generator, differing = torch.Generator().manual_seed(2), 0
    forwards: list[int] = []
    for start in range(10):
        lengths = [4 + (7 * (10 * start + row)) % 29 for row in range(10)]
        indices = torch.randint(200_000, len(text_T) - 64, (10,), generator=generator)
        ids = torch.stack([text_T[place : place + max(lengths)] for place in indices])
        mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
        chosen = {"max_new_tokens": 64, "pad_token_id": 0}
        other = theirs.generate(ids, attention_mask=mask, **chosen)
        handle = model.trunk.body.register_forward_hook(lambda *arguments: forwards.append(1))
        one = ours.generate(ids, attention_mask=mask, **chosen)
        handle.remove()
        assert one.shape == other.shape == (10, max(lengths) + 64)
        for row in range(10):
            unequal = (one[row] != other[row]).nonzero()
            if len(unequal) == 0:
                continue
            differing += 1
            prefix = one[row, : int(unequal[0])][max(lengths) - lengths[row] :]
            best = exact.target_log_probs(exact.hidden(prefix[None]))[0, -1].topk(2).values
            assert float(best[0] - best[1]) < 1e-4, f"prompt {10 * start + row} differs at token {int(unequal[0])}"
    assert differing <= 1
    assert len(forwards) < 10 * 45, "even the slowest row of a batch keeps many drafts"
