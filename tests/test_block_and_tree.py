"""Block verification by enumeration, and drafts that are the likeliest: trees, windows and paths."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cpdlm.decoding import Sampling, accept, decode_batch, proposals
from cpdlm.decoding.drafters import _walked
from cpdlm.decoding.proposals import Proposal
from cpdlm.model.joint import Joint
from tests.toy import ToyModel

V3, K2 = 3, 2
Tables = dict[tuple[int, ...], list[float]]  # distribution behind each prefix of a window


def made_laws(seed: int, scale: float) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    histories = [history for length in range(K2 + 1) for history in itertools.product(range(V3), repeat=length)]
    return {
        h: (scale * torch.randn(V3, generator=generator, dtype=torch.float64)).softmax(-1).tolist() for h in histories
    }


def block_outcomes(p: Tables, q: Tables, draft: tuple[int, ...]) -> tuple[list[float], list[list[float]]]:
    """Algorithm 2 in plain Python: (h_1..h_K, the distribution of the token after 0..K accepted drafts)."""
    shares, keeps = [1.0], []
    for k in range(K2):
        shares.append(min(1.0, shares[-1] * p[draft[:k]][draft[k]] / q[draft[:k]][draft[k]]))
    for k in range(1, K2 + 1):
        left = sum(max(0.0, shares[k] * a - b) for a, b in zip(p[draft[:k]], q[draft[:k]], strict=True))
        keeps.append(shares[k] if k == K2 else left / (left + 1 - shares[k]) if left + 1 - shares[k] > 0 else 1.0)
    distributions = []
    for k in range(K2 + 1):
        distribution = p[draft[:k]]
        if k < K2:
            rest = [max(0.0, shares[k] * a - b) for a, b in zip(distribution, q[draft[:k]], strict=True)]
            distribution = [r / sum(rest) for r in rest] if sum(rest) > 0 else distribution
        distributions.append(distribution)
    return keeps, distributions


@pytest.mark.parametrize("seed", range(3))
def test_block_verification_is_exact_in_the_oracle(seed: int) -> None:
    """Over all drafts and outcomes: what is emitted, continued from p, is distributed as p."""
    p, q = made_laws(seed, 1.0), made_laws(seed + 10, 2.0)
    distribution: dict[tuple[int, ...], float] = {}
    for draft in itertools.product(range(V3), repeat=K2):
        mass = math.prod(q[draft[:k]][draft[k]] for k in range(K2))
        keeps, distributions = block_outcomes(p, q, draft)
        for kept in range(K2 + 1):
            chance = mass * (keeps[kept - 1] if kept else 1.0) * math.prod(1 - h for h in keeps[kept:])
            for token in range(V3):
                text = (*draft[:kept], token)
                distribution[text] = distribution.get(text, 0.0) + chance * distributions[kept][token]
    for window in itertools.product(range(V3), repeat=K2 + 1):
        found = sum(
            distribution.get(window[:n], 0.0) * math.prod(p[window[:k]][window[k]] for k in range(n, K2 + 1))
            for n in range(1, K2 + 2)
        )
        assert found == pytest.approx(math.prod(p[window[:k]][window[k]] for k in range(K2 + 1)), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_block_verification_is_the_oracles(seed: int) -> None:
    """Thresholds of the tests to 1e-9, and what follows each number of accepted drafts on a grid of 2,000 draws."""
    p, q = made_laws(seed, 1.0), made_laws(seed + 10, 2.0)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for draft in itertools.product(range(V3), repeat=K2):
        target = torch.tensor([p[draft[:k]] for k in range(K2 + 1)], dtype=torch.float64)
        probs_KV = torch.tensor([q[draft[:k]] for k in range(K2)], dtype=torch.float64)

        def run(uniforms: Tensor, target: Tensor = target, distributions: Tensor = probs_KV, draft: Any = draft) -> Any:
            rows = len(uniforms)
            tokens = torch.tensor(draft).expand(rows, -1)
            return accept.verify_block(
                target.expand(rows, -1, -1), distributions.expand(rows, -1, -1), tokens, uniforms
            )

        keeps, after = block_outcomes(p, q, draft)
        for k, h in enumerate(keeps):
            for shift, kept in ((-1e-9, k + 1), (1e-9, 0)):
                if 0 < h + shift < 1:
                    uniforms = torch.full((1, K2 + 1), 1 - 1e-15, dtype=torch.float64)
                    uniforms[0, k] = h + shift
                    if all(keep < 1 for index, keep in enumerate(keeps) if index != k):
                        assert run(uniforms)[0].item() == kept
        for kept in range(K2 + 1):
            uniforms = torch.full((2000, K2 + 1), 1 - 1e-15, dtype=torch.float64)
            uniforms[:, K2] = grid
            if kept:
                uniforms[:, kept - 1] = 0
            found, tokens = run(uniforms)
            if (found == kept).all():
                distribution = torch.bincount(tokens, minlength=V3) / 2000
                assert (distribution - torch.tensor(after[kept])).abs().max() < 1.5e-3


@pytest.mark.parametrize("verify", [accept.verify, accept.verify_block])
def test_a_broken_distribution_behind_a_good_draft_loses_nothing(verify: Any) -> None:
    """Of the first token, q(x) P(accepted | x) + P(none) residual(x), on a grid of draws: the target's, though q is
    far from it and the next q is NaN."""
    p, q = [0.7, 0.2, 0.1], [0.1, 0.3, 0.6]
    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    uniforms_BS = torch.cartesian_prod(grid, grid[:1], grid)
    rows, distribution = len(uniforms_BS), torch.zeros(V3, dtype=torch.float64)
    target_BSV = torch.tensor(p, dtype=torch.float64).expand(rows, 3, V3)
    good_B1V = torch.tensor(q, dtype=torch.float64).expand(rows, 1, V3)
    for first in range(V3):
        accepted_B, next_B = verify(
            target_BSV,
            torch.cat([good_B1V, torch.full_like(good_B1V, math.nan)], dim=1),
            torch.tensor([first, V3 - 1]).expand(rows, -1),
            uniforms_BS,
        )
        assert (accepted_B < 2).all()
        written_B = torch.where(accepted_B > 0, first, next_B)
        distribution += q[first] * torch.bincount(written_B, minlength=V3) / rows
    torch.testing.assert_close(distribution, torch.tensor(p, dtype=torch.float64), atol=5e-3, rtol=0)


@pytest.mark.parametrize("rank", [1, 3])
def test_blocks_accept_at_least_as_many(rank: int) -> None:
    model = ToyModel("common", rank=rank, horizon=4, context=9)
    accepted = {}
    for draft in ("chain", "block"):
        generators = [torch.Generator().manual_seed(seed) for seed in range(1000)]
        done = decode_batch(model, [torch.tensor([1])] * 1000, 8, Sampling(), generators, draft=draft)
        accepted[draft] = sum(len(each.tokens) for each in done) / sum(each.forwards for each in done)
    assert accepted["block"] > accepted["chain"] > 1


def joint(rank: int = 3, factors: int = 3, vocab: int = 4, batch: int = 2, seed: int = 0) -> Joint:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(batch, rank, generator=generator, dtype=torch.float64)
    scores = 2 * torch.randn(batch, factors, rank, vocab, generator=generator, dtype=torch.float64)
    return Joint(gate.log_softmax(-1), scores.log_softmax(-1))


def prefixes(distribution: Joint, row: int, depth: int) -> dict[tuple[int, ...], float]:
    """Every prefix of one row with its probability, by the joint's own log_prob."""
    found = {}
    for length in range(1, depth + 1):
        for window in torch.cartesian_prod(*[torch.arange(distribution.vocab_size)] * length).view(-1, length):
            batch = window.expand(distribution.log_weights_R.shape[0], -1)
            found[tuple(window.tolist())] = float(distribution.log_prob(batch)[row].exp())
    return found


@pytest.mark.parametrize("nodes", [1, 2, 5, 11, 30])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_tree_is_the_likeliest_prefixes(rank: int, nodes: int) -> None:
    distribution = joint(rank)
    grown = proposals.grow(distribution, 3, nodes)
    for row in range(2):
        paths = []
        for node in range(nodes):
            parent = int(grown.parents_BK[row, node])
            assert parent <= node, "parents come first"
            paths.append((*(paths[parent - 1] if parent else ()), int(grown.tokens_BK[row, node])))
            assert grown.depth_BS[row, node + 1] == len(paths[-1])
            seen = {index for index in range(nodes + 1) if grown.seen_BSS[row, node + 1, index]}
            ancestors = {0, node + 1} | {i + 1 for i, path in enumerate(paths) if path == paths[-1][: len(path)]}
            assert seen == ancestors
        assert len(set(paths)) == nodes
        every = prefixes(distribution, row, 3)
        wanted = sum(sorted(every.values(), reverse=True)[:nodes])
        assert sum(every[path] for path in paths) == pytest.approx(wanted)


@pytest.mark.parametrize(("shape", "nodes"), [("window", 64), ("path", 64)])
def test_the_best_window_by_enumeration(shape: str, nodes: int) -> None:
    """A beam as wide as there are windows is exact."""
    distribution = joint(batch=3)
    drafts = proposals.best_window(distribution, 3, shape, nodes)
    for row in range(3):
        every = prefixes(distribution, row, 3)
        value = {
            w: every[w] if shape == "window" else sum(every[w[:k]] for k in (1, 2, 3)) for w in every if len(w) == 3
        }
        assert tuple(drafts[row].tolist()) == max(value, key=lambda w: value[w])


def test_behind_a_leaf_no_draft_was_tested() -> None:
    """Nodes 5, 6 behind it, and 7: what the target chooses behind 7 says nothing of a second draft."""
    tree = Proposal(torch.tensor([[5, 6, 7]]), parents_BK=torch.tensor([[0, 1, 0]]), deepest=2)
    assert tree.parents_BK is not None
    for chosen, accepted, tokens in (
        ([7, 6], 1, [7, -1]),
        ([5, 9], 1, [5, 5]),
        ([9, 9], 0, [5, 5]),
        ([5, 6], 2, [5, 6]),
    ):
        choices = iter([*chosen, 3])
        found = _walked(tree, tree.parents_BK, lambda at_B, choices=choices: torch.tensor([next(choices)]))
        assert found.accepted_B.tolist() == [accepted]
        assert [token >= 0 for token in found.tokens_BJ[0].tolist()] == [token >= 0 for token in tokens]
        assert found.tokens_BJ[0, :accepted].tolist() == tokens[:accepted]
