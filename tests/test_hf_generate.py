"""`generate` writes what the stock loop writes.

The judge is not ours: `generate` of `transformers` on the Hugging Face model of trunk and unembedding where the target
is its softmax, and the stock loop on our `forward` where it is eq. 11.
"""

import copy
import math
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput

from cpdlm.decoding import Costs
from cpdlm.decoding.drafters import DRAFTERS
from cpdlm.hf import CpdlmForCausalLM
from tests.hf_models import COMMON, LAYOUTS, OWN, batch, plain, stock, wrap, wrapped
from tests.test_loop import real


@cache
def usual(layout: str, rows: int, tokens: int = 24) -> list[int]:
    """What the first row says: options are chosen from it so that they matter."""
    return stock(layout, **batch(rows), max_new_tokens=tokens, pad_token_id=0)[0, 7:].tolist()


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
        "stopping_criteria": {"max_new_tokens": 24, "stopping_criteria": [Multiple()], "eos_token_id": 16},
        "watermark": {"max_new_tokens": 24, "watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
        "use_cache": {"max_new_tokens": 24, "use_cache": False},
    }


OPTIONS = list(options(list(range(12))))


@cache
def stock_text(name: str, layout: str, rows: int) -> tuple[dict[str, Any], list[list[int]]]:
    """(the options of that name, what the library writes with them)."""
    chosen = {"pad_token_id": 0} | options(usual(layout, rows))[name]
    return chosen, stock(layout, **batch(rows), **chosen).tolist()


# Few options know the layout: those that read the size or sign of scores, which are log-probabilities under eq. 11.
ELSEWHERE = {
    "own": (
        *("repetition_penalty", "encoder_repetition_penalty", "sequence_bias", "min_new_tokens", "length penalty"),
        *("several eos", "own processor", "use_cache"),
    ),
    "tied": ("max_new_tokens", "several eos", "use_cache"),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [("common", name) for name in OPTIONS] + [(layout, name) for layout, names in ELSEWHERE.items() for name in names],
)
def test_greedy_is_what_the_library_writes(layout: str, name: str) -> None:
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
    chosen = {"max_new_tokens": 20, "pad_token_id": 0, "repetition_penalty": 1.3}
    chosen |= {"prefix_allowed_tokens_fn": successors}
    theirs = stock("common", **batch(2), **chosen)
    for costs in (None, Costs({1: 1.0, 8: 2.0, 32: 9.0}, {1: 0.1})):
        ours = wrapped("common").generate(**batch(2), **chosen, draft=draft, nodes=5, costs=costs)
        assert ours.tolist() == theirs.tolist()


def test_options_do_something_and_drafts_are_accepted() -> None:
    """The comparisons above are of texts that differ, written in fewer passes than tokens."""
    texts = {tuple(stock_text(name, "common", 1)[1][0]) for name in OPTIONS}
    assert len(texts) >= len(OPTIONS) - 4
    assert 1 < forwards(1) < 24
    assert forwards(16) == 24, "rows that fill a processor's forward leave drafts out"


def forwards(rows: int) -> int:
    """Of `generate`, for so many equal texts."""
    calls, same = [], {name: each.repeat(rows, 1) for name, each in batch(1).items()}
    handle = wrapped("tied").model.trunk.body.register_forward_hook(lambda *arguments: calls.append(1))
    try:
        wrapped("tied").generate(**same, max_new_tokens=24, pad_token_id=0)
    finally:
        handle.remove()
    return len(calls)


class Heard:
    def __init__(self) -> None:
        self.all: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.all.append(value.tolist())

    def end(self) -> None:
        self.all.append("end")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_is_told_what_the_library_tells_it(rows: int) -> None:
    chosen = {"max_new_tokens": 20, "eos_token_id": usual("common", rows)[6], "pad_token_id": 1}
    ours, theirs = Heard(), Heard()
    wrapped("common").generate(**batch(rows), **chosen, streamer=ours)
    stock("common", **batch(rows), **chosen, streamer=theirs)
    assert ours.all == theirs.all and theirs.all[-1] == "end"


def test_return_dict_and_the_models_own_generation_config() -> None:
    model = wrap(real(*COMMON))
    model.generation_config = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    done = model.generate(torch.tensor([[1, 2]]), return_dict_in_generate=True)
    assert isinstance(done, GenerateDecoderOnlyOutput) and done.sequences.shape == (1, 7) and done.scores is None
    given = GenerationConfig(max_new_tokens=3, pad_token_id=0)
    assert model.generate(torch.tensor([[1, 2]]), given).shape == (1, 5)
    assert model.generate(torch.tensor([[1, 2]]), given, max_new_tokens=4).shape == (1, 6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search is not for this loop.*GenerationMixin.generate"),
    "beam sample": ({"num_beams": 2, "do_sample": True}, "beam sample"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not for this loop"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation is not for this loop"),
    "dola": ({"dola_layers": "low"}, "dola generation"),
    "early exit": ({"assistant_early_exit": 1}, "is not needed, this model drafts for itself.*; leave it out"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "output_scores=True: this loop returns"),
    "guidance": ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor keeps a state"),
    "cache": ({"past_key_values": object()}, "past_key_values would have to hold.*pass the whole text"),
    "cache, by its newer name": ({"cache": object()}, "cache would have to hold.*pass the whole text"),
    "static cache": ({"cache_implementation": "static"}, "'static' is not for this loop.*; leave it out$"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 2, 64)}, "this model reads token ids; pass input_ids"),
    "positions": ({"position_ids": torch.tensor([[0, 1]])}, "position_ids is not for this loop"),
    "healing": ({"token_healing": True}, "token_healing=True is not for this loop"),
    "stop strings": ({"stop_strings": "x"}, "stop_strings need the tokenizer"),
    "draft": ({"draft": "guess"}, "draft='guess' is not one of none, chain"),
    "temperature": ({"do_sample": True, "temperature": 0.0}, "temperature"),
    "empty": ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty; pass at least one token"),
    "large id": ({"inputs": torch.tensor([[1, 17]])}, "token id 17, the vocabulary is 0..16"),
    "nothing to pad with": (batch(2) | {"inputs": None, "stopping_criteria": [Multiple()]}, "pass pad_token_id"),
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


@pytest.mark.parametrize(
    "longer", [{"generation_config": GenerationConfig(max_new_tokens=256)}, {"max_new_tokens": 256}]
)
def test_a_text_ends_at_the_context(longer: dict[str, Any]) -> None:
    """pipeline(...) without options asks for 256 new tokens, in the one way or the other."""
    with pytest.warns(UserWarning, match="the text ends at the model's context of 64 tokens"):
        done = wrapped("common").generate(torch.tensor([[1, 2]]), **longer)
    assert done.shape[1] == 64 and done.tolist() == stock("common", torch.tensor([[1, 2]]), max_length=64).tolist()


def test_a_frozen_target_decodes_while_its_heads_train() -> None:
    ids = torch.tensor([[1, 2, 5, 3]])
    expected = wrapped("common").generate(ids, max_new_tokens=9)
    training = wrap(copy.deepcopy(wrapped("common").model)).train()
    assert torch.equal(training.generate(ids, max_new_tokens=9), expected)


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
    with own.disable_adapter():
        assert own.generate(**batch(1), **chosen).tolist() == stock("own", **batch(1), **chosen).tolist()


def test_embeddings_that_an_adapter_trains_are_the_targets() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3, 5])
    adapted = peft.get_peft_model(wrap(copy.deepcopy(real(*COMMON))), config).eval()
    torch.manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter)
    ours = adapted.generate(**batch(2), max_new_tokens=24, pad_token_id=0)
    assert ours.tolist() != stock("common", **batch(2), max_new_tokens=24, pad_token_id=0).tolist()
    theirs = GenerationMixin.generate(adapted.get_base_model(), **batch(2), max_new_tokens=24, pad_token_id=0)
    assert ours.tolist() == theirs.tolist()


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
    theirs = stock("common", **batch(1), max_new_tokens=4).tolist()
    assert tuned.get_base_model().generate(**batch(1), max_new_tokens=4).tolist() == theirs
    with tuned.disable_adapter():
        assert tuned.generate(**batch(1), max_new_tokens=4).tolist() == theirs


def test_the_stock_loop_searches_with_beams_as_a_refusal_says() -> None:
    ids, chosen = torch.tensor([[1, 2, 5, 3]]), {"num_beams": 3, "max_new_tokens": 12, "pad_token_id": 0}
    ours = GenerationMixin.generate(wrapped("common"), ids, **chosen)
    assert torch.equal(ours, plain(wrapped("common").model).generate(ids, **chosen))
