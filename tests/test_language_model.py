"""The whole model: causality by gradient, packed documents, cache, layouts, and the chain rule through `forward`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.config import resolve
from cpdlm.model.build import build_language_model, parameter_counts
from cpdlm.model.language_model import LanguageModel
from tests.tiny import MICRO

V, T, N, R = 11, 8, 3, 2
FAMILIES = ("llama", "gpt2")
# name -> overrides; "common" is added by `make`
LAYOUTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "separate": {"model.head": "separate", "model.tie_embeddings": False},
    "low-rank": {"model.map_rank": 4},
    "mlp": {"model.map_hidden": 4},
    "blind": {"link": "blind"},
    "tied": {"model.tie_first": True},
    "anchored": {"link": "first"},
    "bias": {"balance": "bias"},
    "linked": {"link": "all", "model.link_width": 8},
    "hmm": {"joint": "hmm"},
    "offsets": {"model.component_rank": 4},
    "plain": {"horizon": 1, "rank": 1, "balance": "none"},
    "common": {"model.trunk": "a folder"},
    "common anchored": {"model.trunk": "a folder", "link": "first"},
}
WITH_MIXTURE = [name for name in LAYOUTS if name != "plain"]


def make(layout: str = "untied", family: str = "llama", seed: int = 0, **more: Any) -> LanguageModel:
    torch.manual_seed(seed)
    base = MICRO | {"rank": R, "horizon": N, "model.family": family, "data.context": 32}
    trunk = make("plain", family, seed) if layout.startswith("common") else None
    model = build_language_model(resolve(base | LAYOUTS[layout] | more), V, trunk).double()
    with torch.no_grad():
        if model.anchor is not None:  # as after some training
            model.anchor.out.weight.normal_(std=0.1)
        if model.heads is not None:
            model.heads.gate.weight.normal_(std=0.5)
            for name in ("link", "base"):
                if name in model.heads.maps:
                    model.heads.maps[name].normal_(std=0.1)
            if model.heads.transitions is not None:
                model.heads.transitions.weight.normal_(std=0.1)
    return model


def rows(count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Rows whose successors all exist."""
    stream = torch.randint(0, V, (count, T + N), generator=torch.Generator().manual_seed(seed))
    return {
        "tokens_BT": stream[:, :T],
        "position_ids_BT": torch.arange(T).expand(count, T),
        "future_BTN": torch.stack([stream[:, k + 1 : k + 1 + T] for k in range(N)], dim=-1),
        "successors_BT": torch.full((count, T), N),
    }


class Embeddings:
    """Turns each embedding look-up into a leaf, so that gradients say what was looked at. Calls in order."""

    def __init__(self, model: LanguageModel) -> None:
        self.calls: list[Tensor] = []
        self.handle = model.trunk.body.get_input_embeddings().register_forward_hook(self._hook)

    def _hook(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        self.calls.append(output.detach().requires_grad_())
        return self.calls[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["untied", "tied", "anchored", "hmm"])
def test_nothing_beyond_the_pending_token_leaks_into_the_draft(layout: str, family: str) -> None:
    """The loss of position t depends on the tokens up to t and, anchored, on the embedding of x_{t+1}, and no other."""
    for t in (0, 3, T - 1):
        model, batch = make(layout, family), rows(1)
        seen = Embeddings(model)
        weight = torch.zeros(1, T, dtype=torch.float64)
        weight[0, t] = 1
        model(**batch, first_weight_BT=torch.zeros_like(weight), rest_weight_BT=weight).loss.backward()
        trunk_gradient = seen.calls[0].grad
        assert trunk_gradient is not None
        reached = trunk_gradient[0].abs().amax(-1)
        assert (reached[: t + 1] > 0).all() and (reached[t + 1 :] == 0).all(), "a later token leaks through the trunk"
        if layout == "anchored":
            assert len(seen.calls) == 2 and seen.calls[1].shape[0] == 1, "the anchor looks up one token per position"
            assert seen.calls[1].grad is not None and seen.calls[1].grad.abs().max() > 0
            expected = model.trunk.body.get_input_embeddings().weight[batch["future_BTN"][0, t, 0]]
            torch.testing.assert_close(seen.calls[1][0], expected, msg="the anchor looks at another token than x_{t+1}")
        else:
            assert len(seen.calls) == 1


def test_a_linked_factor_sees_the_token_before_it_and_no_other() -> None:
    """Draft k is scored by the token before it, not by itself nor by what follows it."""
    model, batch = make("linked", horizon=4), rows(1)
    future = torch.randint(0, V, (1, T, 4), generator=torch.Generator().manual_seed(1))
    batch |= {"future_BTN": future, "successors_BT": torch.full((1, T), 4)}
    hidden_BD = model.hidden(batch["tokens_BT"])[:, 2]
    joint = model.joint(hidden_BD, future[:, 2, 0])
    chain = joint.chain(future[:, 2, 1:])[0]
    for changed in range(1, 4):
        other = future.clone()
        other[0, 2, changed] = (other[0, 2, changed] + 1) % V
        moved = (joint.chain(other[:, 2, 1:])[0] - chain).abs() > 1e-9
        assert not moved[: changed - 1].any() and moved[changed - 1 : changed + 1].all()
    weight = torch.zeros(1, T, dtype=torch.float64)
    weight[0, 2] = 1
    terms = model(**batch, first_weight_BT=torch.zeros_like(weight), rest_weight_BT=weight)
    torch.testing.assert_close(terms.rest_nll_P, -chain.sum()[None])


@pytest.mark.parametrize("layout", ["untied", "linked", "hmm", "offsets"])
def test_a_draft_vocabulary_of_all_tokens_changes_nothing(layout: str) -> None:
    model = make(layout)
    hidden_BD, pending_B = torch.randn(2, 64, dtype=torch.float64), torch.tensor([1, 2])
    window = torch.randint(0, V, (2, 2))
    whole = model.draft_joint(hidden_BD, pending_B).log_prob(window)
    order = torch.arange(V).flip(0)
    model.use_draft_vocabulary(order)
    torch.testing.assert_close(model.draft_joint(hidden_BD, pending_B).log_prob(model.indices(window)), whole)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_target_and_draft_distributions_of_each_layout(layout: str) -> None:
    model = make(layout)
    hidden_BTD = model.hidden(rows()["tokens_BT"])
    softmax = (hidden_BTD @ model.unembedding.weight.T).log_softmax(-1)
    target, own = model.target_log_probs(hidden_BTD), model.next_token_log_probs(hidden_BTD)
    torch.testing.assert_close(target.exp().sum(-1), torch.ones(2, T, dtype=torch.float64))
    if model.frozen_target or model.first_is_tied:
        torch.testing.assert_close(target, softmax)
    if model.first_is_tied:  # q_1 = p_1, exactly
        assert torch.equal(own, target)
    else:
        torch.testing.assert_close(own, model.joint(hidden_BTD).first())
        assert (own - softmax).abs().max() > 1e-3, "eq. 11 is another law than the trunk's softmax"
    if layout == "plain":
        return
    pending_B = torch.tensor([1, 2])
    draft = model.draft_joint(hidden_BTD[:, -1], pending_B)
    assert (draft.horizon, draft.rank, draft.vocab_size) == (N - 1, R, V)
    if not model.first_is_tied:
        whole, rest = model.joint(hidden_BTD[:, -1]), torch.tensor([[3, 4], [5, 6]])
        window = torch.cat([pending_B[:, None], rest], -1)
        torch.testing.assert_close(draft.log_prob(rest), whole.log_prob(window) - whole.log_prob(window[:, :1]))


@pytest.mark.parametrize("layout", [name for name in WITH_MIXTURE if name != "separate"])
def test_a_draft_vocabulary_restricts_the_distribution_to_it(layout: str) -> None:
    """Every factor renormalised on the list, untied the first one, too; the target stays as it is."""
    model, ids, pending_B = make(layout), torch.tensor([7, 0, 4, 9]), torch.tensor([4, 3])  # 4 is on the list, 3 is not
    hidden_BD = model.hidden(rows()["tokens_BT"])[:, -1]
    whole, target = model.joint(hidden_BD, pending_B), model.target_log_probs(hidden_BD)
    model.use_draft_vocabulary(ids)
    assert model.draft_ids is not None and torch.equal(model.draft_ids, ids)
    assert torch.equal(model.target_log_probs(hidden_BD), target)
    draft, skip = model.draft_joint(hidden_BD, pending_B), 0 if model.first_is_tied else 1
    assert (draft.horizon, draft.rank, draft.vocab_size) == (N - 1, R, len(ids))
    restricted = whole.log_factors_NRV[..., ids].log_softmax(-1)
    torch.testing.assert_close(draft.log_factors_NRV, restricted[:, skip:])
    weights = whole.log_weights_R.clone()
    if skip:
        weights[0] = (weights[0] + restricted[0, 0, :, 2]).log_softmax(-1)
        if whole.log_transitions_NRR is not None:
            weights = (weights.unsqueeze(-1) + whole.log_transitions_NRR[:, 0]).logsumexp(dim=-2)
    torch.testing.assert_close(draft.log_weights_R, weights)
    assert set(model.state_dict()) == set(make(layout).state_dict()), "a list is no part of a checkpoint"
    model.use_draft_vocabulary(None)
    assert model.draft_ids is None and model.draft_joint(hidden_BD, pending_B).vocab_size == V


@pytest.mark.parametrize(
    ("layout", "ids", "message"),
    [
        ("separate", [0, 1], "model.head=shared"),
        ("plain", [0, 1], "horizon 2 or more"),
        *(
            ("untied", ids, f"distinct token ids of 0..{V - 1}")
            for ids in ([0, V], [-1, 2], [3, 3], [[1, 2]], [0.5], [])
        ),
    ],
)
def test_what_is_no_draft_vocabulary_is_refused(layout: str, ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(layout).use_draft_vocabulary(torch.tensor(ids))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_forward_is_the_distribution_and_its_chain_sums_to_the_joint(layout: str) -> None:
    model, batch = make(layout), rows()
    if layout == "plain":
        batch["future_BTN"], batch["successors_BT"] = batch["future_BTN"][..., :1], torch.ones(2, T, dtype=torch.long)
    ones = torch.ones(2, T, dtype=torch.float64)
    terms = model(**batch, first_weight_BT=ones, rest_weight_BT=ones)
    hidden, future = model.hidden(batch["tokens_BT"]).flatten(0, 1), batch["future_BTN"].flatten(0, 1)
    first = -model.next_token_log_probs(hidden).gather(-1, future[:, :1]).squeeze(-1)
    torch.testing.assert_close(terms.first_nll_P, first)
    if layout == "plain":
        torch.testing.assert_close(terms.joint_nll(True), first)
        torch.testing.assert_close(terms.loss, first.sum())
        return
    joint = model.joint(hidden, future[:, 0])
    if model.first_is_tied:
        chain = torch.cat([first[:, None], -joint.chain(future[:, 1:])], dim=-1)
    else:
        chain = -joint.chain(future)
        torch.testing.assert_close(chain[:, 0], first)
    assert chain.shape == (2 * T, N)
    torch.testing.assert_close(terms.joint_nll(model.first_is_tied), chain.sum(-1))
    torch.testing.assert_close(terms.loss, (terms.first_nll_P + terms.rest_nll_P).sum())
    torch.testing.assert_close(terms.log_weights_PR, joint.log_weights_R)


@pytest.mark.parametrize("layout", ["untied", "anchored"])
def test_absent_successors_drop_out_of_the_loss(layout: str) -> None:
    """At a document's end the marginal over what exists counts, whatever stands in the empty places."""
    model, batch = make(layout), rows(1)
    batch["successors_BT"] = torch.tensor([[N, N, N, N, N, 2, 1, 0]])
    exists = (batch["successors_BT"] > 0).double()
    before = model(**batch, first_weight_BT=exists, rest_weight_BT=exists)
    empty = torch.arange(N) >= batch["successors_BT"][..., None]
    batch["future_BTN"] = batch["future_BTN"].masked_fill(empty, 0)
    after = model(**batch, first_weight_BT=exists, rest_weight_BT=exists)
    torch.testing.assert_close(after.loss, before.loss)
    hidden, future = model.hidden(batch["tokens_BT"])[0], batch["future_BTN"][0]
    for t, count in enumerate([N, N, N, N, N, 2, 1]):
        joint = model.joint(hidden[t], future[t, 0])
        skip = 1 if model.first_is_tied else 0
        exact = -joint.marginal(count - skip).log_prob(future[t, skip:count])
        torch.testing.assert_close(after.rest_nll_P[t], exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_ones(family: str) -> None:
    model = make(family=family)
    lengths = [[3, 5], [1, 4, 3]]
    tokens_BT = rows()["tokens_BT"]
    position_ids_BT = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed_BTD = model.hidden(tokens_BT, position_ids_BT)
    for b, row in enumerate(lengths):
        start = 0
        for n in row:
            alone = model.hidden(tokens_BT[b : b + 1, start : start + n])
            torch.testing.assert_close(packed_BTD[b, start : start + n], alone[0], rtol=1e-9, atol=1e-9)
            start += n
    assert (packed_BTD - model.hidden(tokens_BT)).abs().max() > 1e-3, "the mask would not matter"


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_parameter_counts_add_up(layout: str) -> None:
    model = make(layout)
    counts = parameter_counts(model)
    parts = ("trunk", "unembedding", "heads", "gate", "anchor")
    assert sum(counts[part] for part in parts) == counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["unembedding"] == 0, "tied ones count once, and of separate heads nothing would use it"
    assert counts["gate"] == (0 if layout == "plain" else R * 64 + (0 if layout == "bias" else R))
    assert counts["trained"] == counts["total"] - (counts["trunk"] if model.frozen_target else 0)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_a_frozen_trunk_is_the_target_and_stays_as_it_is(tie_embeddings: bool) -> None:
    trunk = make("plain", **{"model.tie_embeddings": tie_embeddings})
    config = resolve({"size": "micro", "rank": R, "horizon": N, "model.trunk": "x"})
    model = build_language_model(config, V, trunk).double()
    assert model.embeddings_are_tied == tie_embeddings
    frozen = [*model.trunk.parameters(), model.unembedding.weight]
    assert not any(parameter.requires_grad for parameter in frozen)
    batch, ones = rows(), torch.ones(2, T, dtype=torch.float64)
    model(**batch, first_weight_BT=ones, rest_weight_BT=ones).loss.backward()
    assert all(parameter.grad is None for parameter in frozen)
    assert model.heads is not None and all(parameter.grad is not None for parameter in model.heads.parameters())
    hidden = model.hidden(batch["tokens_BT"])
    assert torch.equal(model.target_log_probs(hidden), trunk.next_token_log_probs(trunk.hidden(batch["tokens_BT"])))


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("common")])
def test_every_parameter_of_a_from_scratch_model_is_used(layout: str, tie_embeddings: bool) -> None:
    """A parameter that no loss reaches is dead weight in the counts, and stops data-parallel training."""
    model, batch = make(layout, **{"model.tie_embeddings": tie_embeddings}), rows()
    ones = torch.ones(2, T, dtype=torch.float64)
    model(**batch, first_weight_BT=ones, rest_weight_BT=ones).loss.backward()
    for name, parameter in model.named_parameters():
        # A mixture of one component has no use for a gate, but keeps it: rank 1 is not another code path.
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_weight_zero_everywhere_is_free_and_finite(layout: str) -> None:
    model, batch = make(layout), rows()
    zero = torch.zeros(2, T, dtype=torch.float64)
    terms = model(**batch, first_weight_BT=zero, rest_weight_BT=zero)
    assert terms.loss.item() == 0 and terms.first_nll_P.numel() == 0 and terms.rest_nll_P.numel() == 0
