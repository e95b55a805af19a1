"""The whole decoder, on every path: on a tabular toy (its distribution) and on real tiny models (their tokens).

Decoded sequences of `LENGTH` tokens are held to the exact autoregressive distribution (enumerated by the oracle),
chi-square at `oracle.FALSE_ALARM` = 1e-4 per fixed seed. Each planted fault, run through the same loop, is rejected
with probability >= .99 at this sample size: asserted from the exact distribution of the faulty decoder.
"""

import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpdlm.bench.contenders import hugging_face
from cpdlm.bench.timers import count_forwards
from cpdlm.config import resolve
from cpdlm.decoding import ModelProxy, Options, Sampling, decode, decode_batch, drafters
from cpdlm.model.build import build_language_model
from cpdlm.model.joint import Joint
from cpdlm.model.language_model import LanguageModel
from tests import oracle
from tests.planted_faults import FAULTS, Variant
from tests.toy import FILTERS, ToyModel, keep
from tests.toy import truth as exact

SAMPLES, ALONE = 4000, 2000  # rows of a batch; rows one after another
LENGTH = 4
PROMPT = (1,)


@cache
def toy(layout: str) -> ToyModel:
    return ToyModel(layout)


def truth(model: ToyModel, sampling: Sampling, eos: int | None = None) -> dict[oracle.History, float]:
    return exact(model, sampling, PROMPT, LENGTH, eos)


def sequences(model: ToyModel, sampling: Sampling, seed: int = 0, **options: Any) -> Counter[oracle.History]:
    """alone: so many rows one after another, which share a generator; otherwise one batch, each row with its own."""
    prompt, alone = torch.tensor(PROMPT), options.pop("alone", 0)
    if alone:
        generator = torch.Generator().manual_seed(seed)
        done = [decode(model, prompt, LENGTH, sampling, generator, **options) for _ in range(alone)]
    else:
        generators = [torch.Generator().manual_seed(seed * 10**6 + row) for row in range(SAMPLES)]
        done = decode_batch(model, [prompt] * SAMPLES, LENGTH, sampling, generators, **options)
    return Counter(tuple(each.tokens) for each in done)


# --- distribution ----------------------------------------------------------------------------------------------------

PATHS = [
    ("common", "unfiltered", {}),
    ("common", "unfiltered", {"alone": ALONE}),
    ("untied", "all", {"alone": ALONE // 2, "options": Options(use_cache=False), "eos": 1}),
    ("common", "unfiltered", {"options": Options(use_cache=False)}),
    ("common", "unfiltered", {"draft": "none"}),
    ("untied", "unfiltered", {}),
    ("untied", "all", {"eos": 1}),
    ("tied", "temperature", {}),
    ("tied", "unfiltered", {"eos": 2}),
    ("anchored", "unfiltered", {"options": Options(use_cache=False), "eos": 1}),
    ("anchored", "top-k", {}),
    ("anchored", "top-p", {}),
]


def fault_law(fault: str, model: ToyModel, sampling: Sampling, eos: int | None = None) -> dict[oracle.History, float]:
    return oracle.decoder_law(
        fault, model.oracle_target, model.oracle_draft, PROMPT, LENGTH, model.horizon, keep(sampling), eos
    )


@pytest.mark.parametrize(("layout", "setting", "options"), [path for path in PATHS if path[2].get("draft") != "none"])
def test_every_path_has_the_power_to_reject_every_fault(layout: str, setting: str, options: dict[str, Any]) -> None:
    model, sampling, eos = toy(layout), FILTERS[setting], options.get("eos")
    samples = options.get("alone", SAMPLES)
    for fault in "abd" if sampling.unfiltered else "bcd":  # (a) drafts unfiltered, (c) is a fault of filters
        assert oracle.power(fault_law(fault, model, sampling, eos), truth(model, sampling, eos), samples) >= 0.99, fault


@pytest.mark.parametrize(("layout", "setting", "options"), PATHS)
def test_the_decoder_writes_as_the_target(layout: str, setting: str, options: dict[str, Any]) -> None:
    model, sampling = toy(layout), FILTERS[setting]
    distribution = truth(model, sampling, options.get("eos"))
    assert oracle.p_value(sequences(model, sampling, **options), distribution) > oracle.FALSE_ALARM


@pytest.mark.parametrize("layout", ["common", "untied", "tied", "anchored"])
def test_the_procedure_is_exact_in_the_oracle(layout: str) -> None:
    model = toy(layout)
    for sampling in FILTERS.values():
        for eos in (None, 2):
            assert oracle.distance(fault_law("exact", model, sampling, eos), truth(model, sampling, eos)) < 1e-12


def plant(monkeypatch: pytest.MonkeyPatch, variant: Variant) -> None:
    monkeypatch.setattr(drafters, "sampled_chain", variant.draft)
    monkeypatch.setattr(drafters, "verify", variant.verify)


@pytest.mark.parametrize(
    ("fault", "setting"),
    [("a", "unfiltered"), ("b", "unfiltered"), ("c", "temperature"), ("c", "all"), ("d", "unfiltered")],
)
def test_every_planted_fault_is_rejected_by_the_whole_decoder(
    fault: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampling = toy("common"), FILTERS[setting]
    faulty = fault_law(fault, model, sampling)
    right = truth(model, sampling)
    assert oracle.power(faulty, right, SAMPLES) >= 0.99
    plant(monkeypatch, FAULTS[fault])
    counts = sequences(model, sampling)
    assert oracle.p_value(counts, right) < oracle.FALSE_ALARM
    assert oracle.p_value(counts, faulty) > oracle.FALSE_ALARM, "the planted fault is not the one whose power is stated"


def test_a_cache_that_is_not_rolled_back_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.toy.ToyCache.crop", lambda self, negative: None)
    model = toy("common")
    assert oracle.p_value(sequences(model, Sampling(), alone=500), truth(model, Sampling())) < oracle.FALSE_ALARM


# --- counts and limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.7, 2, 0.9)])
@pytest.mark.parametrize("draft", ["chain", "none"])
def test_length_forwards_and_depths_add_up(sampling: Sampling, draft: str) -> None:
    model = ToyModel("untied", rank=2, horizon=4, context=9)
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 9):
        model.calls = 0
        pieces: list[list[int]] = []
        options = Options(on_tokens=lambda row, tokens, pieces=pieces: pieces.append(tokens))
        done = decode(model, torch.tensor([0]), length, sampling, generator, draft=draft, options=options)
        assert len(done.tokens) == length == sum(done.emitted)
        assert (
            done.forwards == model.calls == len(pieces)
            and [token for piece in pieces for token in piece] == done.tokens
        )
        assert done.emitted[0] == 1 and max(done.emitted) <= (4 if draft == "chain" else 1)
        assert sum(done.accepted) == length - done.forwards  # each forward emits one token beside its drafts
        assert all(a <= r for a, r in zip(done.accepted, done.reached, strict=True))
        assert all(done.reached[k + 1] <= done.accepted[k] for k in range(2))


def perfect(model: ToyModel) -> ToyModel:
    """Makes the drafts of a rank-1 anchored toy certain and right under greedy: every window is accepted whole."""

    class Perfect(ModelProxy):
        def draft_joint(self, hidden_BD: Tensor, pending_B: Tensor) -> Any:
            code, token = int(hidden_BD[0, 0]), int(pending_B)
            rows = []
            for _ in range(self.horizon - 1):
                code = model.extend(code, token)
                token = int(model.own[code].argmax())
                rows.append(torch.full((model.vocab_size,), -40.0).index_fill(0, torch.tensor(token), 0.0))
            return Joint(torch.zeros(1, 1), torch.stack(rows)[None, :, None])

    return Perfect(model)  # type: ignore[return-value]


def test_whole_windows_and_eos_inside_one() -> None:
    model = ToyModel("common", horizon=4, vocab_size=2, context=10, seed=3)
    prompt, greedy = torch.tensor([1]), Sampling(0.0)
    plain = decode(model, prompt, 9, greedy, draft="none").tokens
    done = decode(perfect(model), prompt, 9, greedy)
    assert done.tokens == plain and done.emitted == [1, 4, 4]
    assert done.reached == done.accepted == [2, 2, 2]
    for eos in set(plain):
        expected = plain[: plain.index(eos) + 1]
        for decoder in (perfect(model), model):
            stopped = decode(decoder, prompt, 9, greedy, eos=eos)
            assert stopped.tokens == expected and sum(stopped.emitted) == len(expected)
            assert sum(stopped.accepted) <= len(expected)


def test_same_generator_same_text_and_the_global_one_is_left_alone() -> None:
    model, prompt = toy("untied"), torch.tensor(PROMPT)
    before = torch.random.get_rng_state()
    texts = [decode(model, prompt, 4, Sampling(), torch.Generator().manual_seed(7)).tokens for _ in range(2)]
    assert texts[0] == texts[1] and torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.5, 2, 0.9)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_broken_target_names_the_position(sampling: Sampling, value: float) -> None:
    model = ToyModel("common", seed=1)
    model.own[model.code_of((1, 0))] = value
    model.own[model.code_of((1,))] = torch.tensor([0.0, -math.inf, -math.inf])
    with pytest.raises(ValueError, match=r"target distribution of token 2 \(the prompt is 0..0\) is NaN or -inf alone"):
        decode(model, torch.tensor([1]), 3, sampling, torch.Generator())


@pytest.mark.parametrize(
    ("prompt", "length", "options", "message"),
    [
        ([], 3, {}, "the prompt is empty; pass at least one token"),
        (
            [1, 1, 1],
            3,
            {},
            "prompt of 3 tokens and max_new_tokens=3 exceed the model's context of 5; pass max_new_tokens of at most 2",
        ),
        ([1] * 5, 1, {}, "pass a prompt of fewer than 5 tokens"),
        ([1], 0, {}, "max_new_tokens=0 writes nothing; pass a whole number, at least 1"),
        ([1], 2.5, {}, "max_new_tokens=2.5 writes nothing"),
        ([1], math.nan, {}, "max_new_tokens=nan writes nothing"),
        ([1], "2", {}, "max_new_tokens='2' writes nothing"),
        ([1], 2, {"eos": 2.0}, "eos=2.0 is no token id, nor several of them; pass whole numbers, or None"),
        ([1], 2, {"eos": "2"}, "eos='2' is no token id"),
        ([1], 2, {"generator": 0}, r"generator=0 is no generator; pass torch.Generator\(\).manual_seed\(0\)"),
        ([1], 2, {"options": Options(nodes="5"), "draft": "tree"}, "nodes='5' is no number of drafts"),
        ([1, 3], 2, {}, r"token id 3, the vocabulary is 0\.\.2"),
        ([-1], 2, {}, "token id -1"),
        ([1], 2, {"generator": None}, "sampling needs a generator"),
        ([[1]], 2, {}, r"shape \(1, 1\); pass one row of token ids"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    prompt: list[Any], length: Any, options: dict[str, Any], message: str
) -> None:
    model = ToyModel()
    with pytest.raises(ValueError, match=message):
        decode(model, torch.tensor(prompt, dtype=torch.long), length, **({"generator": torch.Generator()} | options))
    assert model.calls == 0


def test_a_count_may_be_numpys_or_torchs_and_a_batch_one_tensor() -> None:
    model, ids_BT = real("llama", 2, "none", False, True), torch.tensor([[1, 2], [3, 4]])
    right = [decode(model, row_T, 4, Sampling(0.0), eos=[5, 6]) for row_T in ids_BT]
    assert decode_batch(model, ids_BT, np.int64(4), Sampling(0.0), eos=torch.tensor([5, 6])) == right
    assert decode(model, ids_BT[0], torch.tensor(4), Sampling(0.0), eos=np.int64(5)) == decode(
        model, ids_BT[0], 4, Sampling(0.0), eos=5
    )
    with pytest.raises(ValueError, match=r"the prompt is a list; pass one row of token ids: torch.tensor\(\[1, 2\]\)"):
        decode(model, [1, 2], 4, Sampling(0.0))  # type: ignore[arg-type]


# --- real models ------------------------------------------------------------------------------------

BASE = {
    "size": "micro",
    "data.context": 64,
    "decode.prompt_tokens": 8,
    "decode.new_tokens": 8,
    "model.tie_embeddings": False,
}


@cache
def real(
    family: str,
    rank: int,
    anchor: str,
    tie: bool,
    common: bool,
    horizon: int = 4,
    vocabulary: int = 17,
    sharp: float = 1.0,
) -> LanguageModel:
    """A tiny model with random weights, scaled so that its text wanders and some drafts are right. Float64."""
    torch.manual_seed(0)
    base = BASE | {"model.family": family}
    overrides = base | {"rank": rank, "link": anchor, "model.tie_first": tie, "horizon": horizon}
    trunk = build_language_model(resolve(base | {"rank": 1, "horizon": 1}), vocabulary) if common else None
    model = build_language_model(resolve(overrides | ({"model.trunk": "frozen"} if common else {})), vocabulary, trunk)
    model = model.double().eval()
    # Own weights: the power below must not hang on how models are initialised.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                scale = 2.0 if name.startswith("trunk") else sharp
                parameter.copy_(scale * noise / parameter.shape[-1] ** 0.5)
    return model


REAL = [
    *(
        ("llama", 4, anchor, tie, common)
        for anchor, tie, common in (
            ("none", False, False),
            ("none", True, False),
            ("token", False, False),
            ("none", False, True),
            ("token", False, True),
        )
    ),
    ("llama", 1, "none", False, False),
    *(("gpt2", rank, "token", False, True) for rank in (1, 4)),
    ("gpt2", 4, "none", False, False),
]


@pytest.mark.parametrize(("family", "rank", "anchor", "tie", "common"), REAL)
def test_greedy_is_autoregressive_is_transformers(family: str, rank: int, anchor: str, tie: bool, common: bool) -> None:
    model = real(family, rank, anchor, tie, common)
    generate = hugging_face(model)
    assert (generate is None) == (not (tie or common or anchor == "token"))
    prompt = torch.randint(0, 17, (6,), generator=torch.Generator().manual_seed(0))
    with count_forwards(model) as forwards:
        done = decode(model, prompt, 40, Sampling(0.0))
    assert forwards.count == done.forwards
    alone = decode(model, prompt, 40, Sampling(0.0), draft="none")
    assert alone.forwards == 40 and done.tokens == alone.tokens and len(set(alone.tokens)) > 3
    assert decode(model, prompt, 40, Sampling(0.0), options=Options(use_cache=False)).tokens == alone.tokens
    if generate is not None:
        assert generate(prompt, 40, Sampling(0.0), 0) == alone.tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cache_after_rollback_is_the_cache_recomputed(family: str) -> None:
    """Keys and values after a decode equal those of one forward over the text."""
    model = real(family, 4, "token", False, True)
    caches = []

    class Spy(ModelProxy):
        def new_cache(self) -> Any:
            caches.append(model.new_cache())
            return caches[-1]

    prompt = torch.tensor([3, 1, 4])
    done = decode(Spy(model), prompt, 30, Sampling(1.5), torch.Generator().manual_seed(1))
    assert 0 < sum(done.accepted) < sum(done.reached), "the run must keep some drafts and reject some"
    text = torch.cat([prompt, torch.tensor(done.tokens)])
    fresh = model.new_cache()
    with torch.inference_mode():
        model.hidden(text[None], cache=fresh)
    # The last window is not rolled back: nothing follows it. Compare what every earlier forward left behind.
    length = len(text) - done.emitted[-1]
    for used, right in zip(caches[0].layers, fresh.layers, strict=True):
        torch.testing.assert_close(used.keys[:, :, :length], right.keys[:, :, :length], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(used.values[:, :, :length], right.values[:, :, :length], rtol=1e-9, atol=1e-9)


def test_a_real_model_writes_as_its_target() -> None:
    """A tiny Llama, rank 4, target eq. 11: through cache, heads and rollback. Power: (d) here, all on the toys."""
    model, prompt, samples = real("llama", 4, "none", False, False, horizon=3, vocabulary=3, sharp=1.0), (2, 0), 1000

    def state(history: oracle.History) -> Tensor:
        return model.hidden(torch.tensor([history]))[:, -1].detach()

    @cache
    def target(history: oracle.History) -> list[float]:
        return model.target_log_probs(state(history))[0].detach().exp().tolist()

    def draft(history: oracle.History, pending: int) -> tuple[oracle.Law, list[list[oracle.Law]]]:
        joint = model.draft_joint(state(history), torch.tensor([pending]))
        return joint.log_weights_R[0].detach().exp().tolist(), joint.log_factors_NRV[0].detach().exp().tolist()

    right = oracle.autoregressive_law(target, prompt, 4)
    for fault in "d":
        faulty = oracle.decoder_law(fault, target, draft, prompt, 4, 3, list)
        assert oracle.power(faulty, right, samples) >= 0.99, fault
    generators = [torch.Generator().manual_seed(row) for row in range(samples)]
    done = decode_batch(model, [torch.tensor(prompt)] * samples, 4, Sampling(), generators)
    counts = Counter(tuple(each.tokens) for each in done)
    assert oracle.p_value(counts, right) > oracle.FALSE_ALARM


def test_a_model_in_training_mode_is_refused() -> None:
    model = real("llama", 1, "none", False, False).train()
    try:
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            decode(model, torch.tensor([1]), 2, Sampling(0.0))
    finally:
        model.eval()
