"""Captured forwards write what growing ones write: the same tokens from the same random numbers, and the target's p.

On the CPU the step runs as it is; on a GPU (where there is one) it is a replayed graph, and the same tests hold it to
the growing forwards there.
"""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.config import resolve
from cpdlm.decoding import CapturedForwards, Captures, Options, Sampling, decode, decode_batch
from cpdlm.decoding.drafters import DRAFTERS, LOOKUP
from cpdlm.hf import CpdlmForCausalLM
from cpdlm.model.build import build_language_model
from cpdlm.model.language_model import LanguageModel
from tests import oracle
from tests.test_drafters import SAMPLES
from tests.test_drafters import p_values as of_any
from tests.toy import FILTERS, ToyModel

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class SlotToy(ToyModel):
    """The tabular model on a cache of slots: keys are codes of histories, values positions."""

    def hidden(
        self, tokens_BT: Tensor, position_ids_BT: Tensor | None = None, cache: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        assert position_ids_BT is not None and mask is not None
        nowhere_B1T1 = torch.full_like(tokens_BT, -1)[:, None, :, None]
        keys, values = (each[:, 0, :, 0] for each in cache.update(nowhere_B1T1, nowhere_B1T1, 0))
        index_BT = cache.layers[0].index.slots_BS
        codes = []
        for t in range(tokens_BT.shape[1]):
            seen_BL = mask[:, 0, t].expand(len(tokens_BT), -1).scatter(1, index_BT[:, t : t + 1], False)
            highest_B, slot_B = torch.where(seen_BL, values, -1).max(dim=1)
            code_B = torch.where(highest_B >= 0, keys.gather(1, slot_B[:, None])[:, 0], 0)
            position_B = position_ids_BT[:, t]
            right_B = (position_B == highest_B + 1) & (seen_BL.sum(dim=1) == position_B)
            new_B = self.extend(code_B, tokens_BT[:, t])
            new_B = torch.where(right_B | (position_B >= self.context - 1), new_B, self.extend(new_B, 0))
            for held, new in ((keys, new_B), (values, position_B)):
                held.scatter_(1, index_BT[:, t : t + 1], new[:, None])
            codes.append(new_B)
        return torch.stack(codes, dim=1)[..., None].double()


@cache
def toy(layout: str) -> SlotToy:
    return SlotToy(layout, context=6)


def p_values(layout: str, sampling: Sampling, draft: str, nodes: int = 8, eos: int | None = None) -> list[float]:
    model = toy(layout)
    forwards = CapturedForwards(
        model, 2 * SAMPLES, sampling, slots=model.context, draft=draft, nodes=nodes, device=torch.device("cpu")
    )
    return of_any(model, sampling, draft=draft, eos=eos, options=Options(nodes=nodes, forwards=forwards))


PATHS = [("common", "unfiltered", None), ("untied", "all", 1), ("anchored", "all", None)]


@pytest.mark.parametrize(("layout", "setting", "eos"), PATHS)
@pytest.mark.parametrize("draft", [name for name in DRAFTERS if not name.startswith(LOOKUP)])
def test_captured_forwards_write_as_the_target(draft: str, layout: str, setting: str, eos: int | None) -> None:
    assert min(p_values(layout, FILTERS[setting], draft, nodes=4, eos=eos)) > oracle.FALSE_ALARM / 2


def test_rejected_drafts_that_count_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = CapturedForwards._step

    def longer(self: CapturedForwards) -> None:
        before_B = self._lengths_B.clone()
        step(self)
        self._lengths_B.copy_(before_B + self.model.horizon)

    monkeypatch.setattr(CapturedForwards, "_step", longer)
    assert max(p_values("common", Sampling(), "chain")) < oracle.FALSE_ALARM


def test_a_tree_whose_path_is_not_moved_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CapturedForwards, "_move", lambda self, path_BJ: None)
    assert max(p_values("common", Sampling(), "tree", nodes=8)) < oracle.FALSE_ALARM


# --- a real model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draft", ["none", "chain", "tree"])
def test_narrow_precision_is_captured_too(draft: str, device: str) -> None:
    """Rounding may turn a near-tie; that all is well it shows by most of the text being the same."""
    model = real(device, dtype=torch.bfloat16)
    ours, theirs = (texts(model, Sampling(0.0), draft, captures) for captures in (True, False))
    assert sum(a.tokens[:8] == b.tokens[:8] for a, b in zip(ours, theirs, strict=True)) >= 2


@cache
def real(
    device: str, family: str = "llama", size: int = 0, dtype: torch.dtype = torch.float64, link: str = "first"
) -> LanguageModel:
    torch.manual_seed(0)
    base: dict[str, Any] = {
        "size": "micro",
        "model.family": family,
        "data.context": 96,
        "decode.prompt_tokens": 8,
        "decode.new_tokens": 32,
    }
    trunk = build_language_model(resolve(base | {"rank": 1, "horizon": 1}), 61)
    heads = base | {"rank": 3, "horizon": 4, "model.trunk": "random", "link": link}
    model = build_language_model(resolve(heads), 61, trunk).to(device, dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # preferences, so that the text wanders and some drafts are accepted
    if size:
        model.use_draft_vocabulary(torch.arange(0, 61, 3)[:size].to(device))
    return model


def texts(model: LanguageModel, sampling: Sampling, draft: str, captures: bool, rows: int = 3) -> Any:
    device = model.unembedding.weight.device
    random = torch.Generator().manual_seed(5)
    prompts = [torch.randint(61, (length,), generator=random).to(device) for length in (8, 3, 5)[:rows]]
    generators = None if sampling.greedy else [torch.Generator(device).manual_seed(row) for row in range(rows)]
    forwards = CapturedForwards(model, rows, sampling, draft=draft, slots=64) if captures else None
    return decode_batch(model, prompts, 48, sampling, generators, draft=draft, options=Options(forwards=forwards))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draft", ["none", "chain", "tree", "path"])
@pytest.mark.parametrize(("family", "size"), [("llama", 0), ("gpt2", 12)])
def test_greedy_texts_are_those_of_growing_forwards(family: str, size: int, draft: str, device: str) -> None:
    model = real(device, family, size)
    ours, theirs = (texts(model, Sampling(0.0), draft, captures) for captures in (True, False))
    assert [each.tokens for each in ours] == [each.tokens for each in theirs]
    assert len(set(ours[0].tokens)) > 3
    assert (sum(ours[0].accepted) > 0) == (draft != "none"), "the run must accept some drafts"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draft", ["none", "chain", "block", "tree"])
def test_the_same_random_numbers_write_the_same_text(draft: str, device: str) -> None:
    """But for the last window: growing forwards draft no further than the text goes."""
    sampling = Sampling(0.9, top_k=20, top_p=0.95)
    ours, theirs = (texts(real(device), sampling, draft, captures) for captures in (True, False))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.tokens[:-3] == other.tokens[:-3]
        assert len(mine.tokens) == len(other.tokens) == 48


def test_forwards_are_counted_and_can_be_used_again() -> None:
    model = real("cpu")
    forwards = CapturedForwards(model, 1, Sampling(0.0), slots=64)
    prompt = torch.tensor([1, 2, 3])
    first = decode(model, prompt, 24, Sampling(0.0), options=Options(forwards=forwards))
    assert forwards.forwards_run == first.forwards + 1  # the last was under way when the host saw the end
    assert (
        decode(model, torch.tensor([9] * 30), 24, Sampling(0.0), options=Options(forwards=forwards)).tokens
        != first.tokens
    )
    again = decode(model, prompt, 24, Sampling(0.0), options=Options(forwards=forwards))
    assert again == first
    stopped = decode(model, prompt, 24, Sampling(0.0), options=Options(forwards=forwards), eos=first.tokens[10])
    assert stopped.tokens == first.tokens[: first.tokens.index(first.tokens[10]) + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "tree"}, "captured for draft='chain', not 'tree'"),
        ({"sampling": Sampling(0.5)}, "captured for sampling=.*, not"),
        ({"max_new_tokens": 62}, "65, the captured forwards have 64 slots; make them with slots=65"),
        ({"options": {"use_cache": False}}, "neither target_scores nor costs nor use_cache=False"),
        ({"model": real("cpu", "gpt2")}, "captured for another model; make"),
    ],
)
def test_forwards_of_another_kind_are_refused(options: dict[str, Any], message: str) -> None:
    model = real("cpu")
    forwards = CapturedForwards(model, 1, Sampling(0.0), slots=64)
    given: dict[str, Any] = {"model": model, "max_new_tokens": 8, "sampling": Sampling(0.0)} | options
    chosen = Options(forwards=forwards, **given.pop("options", {}))
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=message):
        decode(prompt_T=torch.tensor([1, 2, 3]), generator=generator, options=chosen, **given)


def test_a_broken_target_is_named_by_captured_forwards() -> None:
    model = real("cpu")
    forwards = CapturedForwards(model, 1, Sampling(0.0), slots=64)
    weight = model.trunk.body.layers[0].self_attn.v_proj.weight
    before = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(ValueError, match="the target distribution of token 3 .* is NaN"):
            decode(model, torch.tensor([1, 2, 3]), 8, Sampling(0.0), options=Options(forwards=forwards))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    mended = decode(model, torch.tensor([1, 2, 3]), 8, Sampling(0.0), options=Options(forwards=forwards))
    assert mended.tokens == decode(model, torch.tensor([1, 2, 3]), 8, Sampling(0.0)).tokens


def test_a_model_in_training_mode_is_not_recorded() -> None:
    """A graph would go on with the dropout of its recording after model.eval()."""
    model = copy.deepcopy(real("cpu")).train()
    with pytest.raises(ValueError, match="in training mode, where dropout is random"):
        Captures(model, on="cpu")(1, 40, Sampling(0.0))
    assert Captures(model.eval(), on="cpu")(1, 40, Sampling(0.0)) is not None


def test_nothing_is_captured_for_texts_beyond_the_context() -> None:
    model = CpdlmForCausalLM.from_language_model(copy.deepcopy(real("cpu")))
    model.captures.on = "cpu"
    with pytest.raises(ValueError, match="context of 96"):
        model.generate(torch.ones(1, 96, dtype=torch.long), max_new_tokens=10_000, pad_token_id=0)
    assert model.captures.forwards is None


def test_captures_are_kept_for_the_next_text_of_the_same_kind() -> None:
    model = copy.deepcopy(real("cpu"))
    assert Captures(model)(1, 40, Sampling(0.0)) is None, "growing forwards are faster off CUDA"
    captures = Captures(model, on="cpu")
    first = captures(1, 40, Sampling(0.0))
    assert first is not None and first.slots == model.context
    assert captures(1, 60, Sampling(0.0)) is first
    assert captures(2, 40, Sampling(0.0)) is not first
    again = captures(1, 40, Sampling(0.0))
    model.use_draft_vocabulary(torch.arange(0, 61, 2))
    shorter = captures(1, 40, Sampling(0.0))
    assert again is not None and shorter is not None and shorter is not again
    other = copy.deepcopy(captures)
    assert other.forwards is None and other.model is not model
    prompt = torch.tensor([1, 2, 3])
    texts = [
        decode(model, prompt, 20, Sampling(0.0), options=Options(forwards=each)).tokens for each in (shorter, None)
    ]
    assert texts[0] == texts[1]


def test_generate_of_the_library_takes_captured_forwards() -> None:
    model = CpdlmForCausalLM.from_language_model(copy.deepcopy(real("cpu")), 1, 2)
    ids = torch.randint(3, 61, (2, 7))
    options = {"max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
    growing = model.generate(ids, **options)
    model.captures.on = "cpu"
    assert torch.equal(model.generate(ids, **options), growing)
    forwards = model.captures.forwards
    assert forwards is not None and forwards.forwards_run > 1
    model.generate(ids, repetition_penalty=1.3, **options)
    model.generate(ids, do_sample=True, temperature=0.7, **options)
    assert model.captures.forwards is not None and model.captures.forwards.sampling == Sampling(0.7, 50)
