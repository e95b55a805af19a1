"""Verdicts on records whose truth is known, and the intervals they rest on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from made_records import ORIGIN, made, suite

from experiments import claims, stats
from experiments.families import families_of
from experiments.records import Record, validate
from experiments.report.tables import claims_table
from experiments.stats import Sample, contrast, estimate

COMMON = {"model__trunk": "runs/code-small-own-r1-n1-none-s0", "size": "small", "claim": "C3"}


def judged(claim: str, *contents: dict[str, Any]) -> list[claims.Verdict]:
    records = [Record(f"{content['claim']}/{content['name']}.json", content) for content in contents]
    families, _ = families_of(records)
    found = [verdict for verdict in claims.judge(families) if verdict.claim.id == claim]
    return [verdict for verdict in found if verdict.setting != "one GPU"]


def sweep(claim: str, seeds: int = 3, ranks: tuple[int, ...] = (1, 2, 4, 8), **distributions: Any) -> claims.Verdict:
    common = COMMON if claim in ("C3", "C4") else {}
    (verdict,) = judged(claim, *(made(rank, seed, **common | distributions) for rank in ranks for seed in range(seeds)))
    return verdict


def test_claims_are_complete_and_in_order() -> None:
    assert [claim.id for claim in claims.CLAIMS] == [f"C{number}" for number in range(1, 9)]
    for claim in claims.CLAIMS:
        assert claim.question.endswith("?")
        assert "holds:" in claim.rule
        assert "fails:" in claim.rule or "fails:" in claim.rule.replace("; ", "")
        margin = 1 + claim.margin if claim.unit == "x" else claim.margin
        assert f"{margin:g}" in claim.rule or not claim.margin


@pytest.mark.parametrize(
    ("claim", "distributions", "word", "reason"),
    [
        ("C1", {"slope": 0.05}, "holds", ""),
        ("C1", {"slope": -0.05}, "fails", "goes the other way"),
        ("C1", {"slope": 0.0, "noise": 0.0001}, "fails", "no difference larger than 0.01"),
        ("C1", {"slope": 0.0, "noise": 0.05}, "not measurable here", "undecided"),
        (
            "C1",
            {"slope": 0.002, "noise": 0.0001},
            "fails",
            "no difference larger than 0.01",
        ),  # surely down, by next to nothing
        ("C2", {"first": 0.0}, "holds", ""),
        ("C2", {"first": 0.05}, "fails", "rank 2, 4, 8 differs from rank 1 by more than 0.02 nats"),
        ("C2", {"first": 0.0, "noise": 0.05}, "not measurable here", "undecided"),
        ("C3", {"pace": 0.08}, "holds", ""),
        ("C3", {"pace": -0.08}, "fails", "goes the other way"),
        ("C4", {"speed": 1.0}, "holds", ""),
        ("C4", {"speed": 0.5}, "fails", "every rank above 1 is slower than plain decoding or rank 1"),
        ("C4", {"speed": 0.95}, "not measurable here", "undecided"),
    ],
)
def test_the_word_follows_the_truth(claim: str, distributions: dict[str, Any], word: str, reason: str) -> None:
    verdict = sweep(claim, **distributions)
    assert verdict.word == word
    assert reason in verdict.reason
    assert verdict.numbers
    assert all(number.interval.low <= number.interval.mean <= number.interval.high for number in verdict.numbers)
    assert len(verdict.records) == 12
    assert verdict.verdict.startswith(word)


def test_one_seed_decides_over_rows_or_prompts_alone_and_says_so() -> None:
    for claim in ("C1", "C2", "C3", "C4"):
        verdict = sweep(claim, seeds=1)
        assert verdict.setting.endswith(", 1 seed")
        assert verdict.numbers


def test_no_shared_seed_decides_nothing() -> None:
    verdict = judged("C1", made(1, 0), made(8, 1))[0]
    assert (verdict.word, verdict.reason) == ("not measurable here", "0 shared seeds, the rule needs 1")


def test_without_rank_8_there_is_no_verdict() -> None:
    verdict = sweep("C1", ranks=(1, 4))
    assert (verdict.word, verdict.reason) == ("not measured here", "no cell of rank 8 (there is 1, 4)")
    assert [number.name for number in verdict.numbers] == ["rank 1:", "rank 4:"]
    assert sweep("C4", ranks=(2, 4)).reason == "no cell of rank 1 and 8 (there is 2, 4)"


def test_without_records_every_claim_is_still_in_the_table() -> None:
    found = claims.judge([])
    assert [verdict.claim.id for verdict in found] == [
        "C1",
        "C1",
        "C2",
        "C2",
        "C3",
        "C3",
        "C4",
        "C4",
        "C5",
        "C6",
        "C7",
        "C8",
        "C8",
    ]
    assert {verdict.word for verdict in found} == {"not measured here"}
    gpu = [verdict for verdict in found if verdict.setting == "one GPU"]
    assert [verdict.claim.id for verdict in gpu] == ["C1", "C2", "C3", "C4", "C8"]
    assert all(f"claim={v.claim.id} profile=gpu" in v.reason for v in gpu)


def test_a_record_of_a_gpu_takes_the_place_of_the_line_that_asks_for_one() -> None:
    origin = copy.deepcopy(ORIGIN)
    origin["hardware"]["accelerator"] = "A GPU"
    contents = [made(rank, 0, **COMMON, origin=origin) for rank in (1, 8)]
    families, _ = families_of(Record(content["name"], content) for content in contents)
    found = [verdict for verdict in claims.judge(families) if verdict.setting == "one GPU"]
    assert [verdict.claim.id for verdict in found] == ["C1", "C2", "C8"]  # of another target, and timing cells


def test_a_rise_between_ranks_fails_c1_even_if_rank_8_is_lowest() -> None:
    """Rank 2 surely above rank 1: not monotone."""
    contents = [
        made(rank, seed, slope=0.1 if rank == 8 else -0.1 if rank == 2 else 0.0)
        for rank in (1, 2, 8)
        for seed in range(3)
    ]
    (verdict,) = judged("C1", *contents)
    assert (verdict.word, verdict.reason) == ("fails", "the step from rank 1 to rank 2 goes the other way")


def test_only_untied_cells_count_and_targets_stay_apart() -> None:
    """Anchored cells are much better here; they must not move a verdict."""
    plain = [made(rank, seed, **COMMON, pace=0.0) for rank in (1, 8) for seed in range(3)]
    anchored = [made(8, seed, **COMMON | {"claim": "beyond"}, anchor="token", pace=0.5) for seed in range(3)]
    with_them, without = judged("C3", *plain, *anchored), judged("C3", *plain)
    assert with_them[0].numbers == without[0].numbers
    assert not any("beyond" in path for path in with_them[0].records)
    assert judged("C1", *plain)[0].reason.startswith("no records")


def test_each_setting_has_its_own_row_and_own_target_is_beside() -> None:
    found = judged("C3", *suite())
    assert [verdict.setting for verdict in found] == [
        "code, small, n=4, common target, 3 seeds",
        "text, small, n=4, common target, 3 seeds",
    ]
    assert any(number.name.startswith("own target (tiny), rank 8") for number in found[0].beside)
    assert any(number.name.startswith("greedy, rank 8") for number in found[0].beside)


def test_c4_without_side_by_side_timings_is_not_measurable() -> None:
    contents = [made(rank, seed, **COMMON) for rank in (1, 8) for seed in range(2)]
    for content in contents:
        content["decoding"]["modes"]["sampling"]["speedup_over_rank1"] = None
    (verdict,) = judged("C4", *contents)
    assert (verdict.word, verdict.reason) == (
        "not measurable here",
        "no rank above 1 was measured side by side with rank 1",
    )


def test_cells_on_two_sets_of_weights_of_a_trunk_are_not_paired() -> None:
    """Seed 2 of rank 8 stands on another target, where it accepts far more."""
    contents = [made(r, s, **COMMON, pace=1.0 if (r, s) == (8, 2) else 0.0) for r in (1, 8) for s in range(3)]
    for content in contents:
        content["data"]["trunk_sha256"] = ("b" if (content["config"]["rank"], content["seed"]) == (8, 2) else "a") * 64
    (verdict,) = judged("C3", *contents)
    assert verdict.seeds == 2 and abs(verdict.numbers[0].interval.mean) < 0.1
    for content in contents:
        content["data"]["trunk_sha256"] = "ab"[content["config"]["rank"] > 1] * 64
    (verdict,) = judged("C3", *contents)
    assert (verdict.word, verdict.reason) == ("not measurable here", "0 shared seeds, the rule needs 1")


# --- equal wall-clock, balance, sizes and lengths, overhead ----------------------------------------------------------


def test_c2_needs_every_rank_beside_rank_1() -> None:
    contents = [made(rank, seed, first=0.0) for rank, seed in ((1, 0), (2, 1), (8, 0))]
    (verdict,) = judged("C2", *contents)
    assert (verdict.word, verdict.reason) == ("not measurable here", "rank 2 shares no seed with rank 1")
    assert [number.name for number in verdict.numbers] == ["rank 8 - rank 1 (95.0%):"]
    # What fails at rank 8 does not need rank 2.
    contents = [made(rank, seed, first=0.05) for rank, seed in ((1, 0), (2, 1), (8, 0))]
    (verdict,) = judged("C2", *contents)
    assert verdict.word == "fails" and verdict.reason.startswith("rank 8 differs")


@pytest.mark.parametrize("claim", ["C1", "C3"])
def test_a_step_that_shares_no_seed_decides_nothing(claim: str) -> None:
    common = COMMON if claim == "C3" else {}
    contents = [made(rank, seed, **common) for rank, seed in ((1, 0), (2, 1), (8, 0))]
    verdict = judged(claim, *contents)[0]
    assert (verdict.word, verdict.reason) == ("not measurable here", "rank 2 shares no seed with rank 1")
    # What another step decides does not wait for it.
    contents += [made(4, 0, **common | {"slope": 0.3, "pace": 0.3})]
    assert judged(claim, *contents)[0].reason == "the step from rank 4 to rank 8 goes the other way"


def equal_time(longer: float, **distributions: Any) -> list[claims.Verdict]:
    """Ranks 1 and 8 at 500 steps; rank 1 again, with `longer` times the training time of rank 8, its loss by `laws`."""
    short = [made(rank, seed, slope=0.1) for rank in (1, 8) for seed in range(3)]
    long = [made(1, seed, **distributions, optim__steps=1000, name=f"long-s{seed}") for seed in range(3)]
    for content in short:
        content["training"]["step_ms_median"] = 100.0 if content["config"]["rank"] == 1 else 200.0
    for content in long:
        content["training"]["step_ms_median"] = 100.0 * longer
    return judged("C1", *short, *long)


def test_equal_wall_clock_has_a_row_of_its_own() -> None:
    equal_steps, equal_clock = equal_time(1.0)
    assert equal_steps.word == equal_clock.word == "holds"
    assert equal_clock.setting.endswith("equal wall-clock, 3 seeds")
    assert equal_clock.numbers[0].name == "rank 8 - rank 1 trained for 1.00 times its time:"
    assert [number.name for number in equal_clock.beside] == ["first token alone:"]
    assert len(equal_clock.records) == 6 and equal_clock.records[0] == "C1/long-s0.json"
    # Rank 1 gains more from the time than rank 8 from its rank.
    assert equal_time(1.0, first=0.0, slope=0.0, gain=2.0)[1].word == "fails"


def test_a_cell_of_another_wall_clock_is_not_taken_for_equal() -> None:
    for longer in (0.95, 2.0):
        verdict = equal_time(longer)[1]
        assert (verdict.word, verdict.numbers) == ("not measurable here", [])
        assert (
            verdict.reason
            == f"rank 1 was trained for {longer:.2f} times rank 8's time; between 1 and 1.33 counts as equal"
        )


def test_equal_wall_clock_is_that_of_the_shared_seeds() -> None:
    """Seed 2 of rank 8, which was slow, has no partner."""
    short = [made(rank, seed, slope=0.1) for rank in (1, 8) for seed in range(3)]
    long = [made(1, seed, optim__steps=1000, name=f"long-s{seed}") for seed in range(2)]
    for content in (*short, *long):
        content["training"]["step_ms_median"] = {(8, 2): 400.0, (8, 0): 200.0, (8, 1): 200.0}.get(
            (content["config"]["rank"], content["seed"]), 100.0
        )
    equal_clock = judged("C1", *short, *long)[1]
    assert equal_clock.numbers[0].name == "rank 8 - rank 1 trained for 1.00 times its time:"
    assert len(equal_clock.records) == 4
    short[-1]["hardware"] = short[-1]["hardware"] | {"processor": "Another CPU"}
    assert judged("C1", *short, *long)[1].numbers == equal_clock.numbers


def test_times_of_different_machines_are_not_taken_for_equal() -> None:
    origin = copy.deepcopy(ORIGIN)
    origin["hardware"]["processor"] = "Another CPU"
    verdict = equal_time(1.0, origin=origin)[1]
    assert (verdict.word, verdict.numbers) == ("not measurable here", [])
    assert "trained on different kinds of hardware" in verdict.reason


def test_a_row_of_equal_wall_clock_belongs_to_its_claim() -> None:
    rows = equal_time(1.0)
    assert rows[0].claim is rows[1].claim and "at equal wall-clock" in rows[1].expected
    table = claims_table(rows)
    assert table.caption.count("C1:") == 1
    assert [row[2] for row in table.rows] == [rows[0].claim.expected, rows[1].expected]


def balanced(gains: dict[str, float], seeds: int = 3, spread: float = 0.001) -> claims.Verdict:
    """gains: nats that a balance takes off; spread: by which two seeds differ in it."""
    contents = [made(8, seed, **COMMON, balance="none") for seed in range(seeds)]
    for balance, gain in gains.items():
        contents += [made(8, seed, **COMMON, balance=balance, gain=gain + spread * (seed - 1)) for seed in range(seeds)]
    (verdict,) = judged("C5", *contents)
    return verdict


@pytest.mark.parametrize(
    ("gains", "spread", "word", "reason"),
    [
        ({"switch": 0.05, "kl": -0.05}, 0.001, "holds", ""),
        ({"switch": -0.05, "kl": 0.0}, 0.001, "fails", "no balance lowers it"),
        ({"switch": -0.05, "kl": 0.005}, 0.0001, "fails", "no balance lowers it"),  # surely, by next to nothing
        ({"switch": 0.0, "kl": 0.0}, 0.05, "not measurable here", "undecided"),
    ],
)
def test_c5_asks_whether_some_balance_lowers_the_joint_loss(
    gains: dict[str, float], spread: float, word: str, reason: str
) -> None:
    verdict = balanced(gains, spread=spread)
    assert verdict.word == word and reason in verdict.reason
    assert [number.name for number in verdict.numbers] == ["kl 0.01 - none (97.5%):", "switch 0.01 - none (97.5%):"]
    assert any("effective components" in number.text() for number in verdict.beside)
    assert "rank 8, 3 seeds" in verdict.setting and len(verdict.records) == 9


def test_c5_with_too_few_seeds_decides_nothing() -> None:
    verdict = balanced({"switch": 0.5}, seeds=2)
    assert (verdict.word, verdict.reason) == ("not measurable here", "2 shared seeds, the rule needs 3")


def everywhere(paces: dict[tuple[str, int], float], seeds: int = 3) -> claims.Verdict:
    contents = [
        made(
            rank,
            seed,
            claim="C7",
            size=size,
            optim__steps=steps,
            optim__warmup=5,
            model__trunk=f"runs/{size}-s0",
            pace=pace,
        )
        for (size, steps), pace in paces.items()
        for seed in range(seeds)
        for rank in (1, 4)
    ]
    (verdict,) = judged("C7", *contents)
    return verdict


STAR = {
    ("micro", 400): 0.08,
    ("tiny", 400): 0.08,
    ("small", 400): 0.08,
    ("base", 400): 0.08,
    ("small", 100): 0.08,
    ("small", 1600): 0.08,
}


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({}, "holds", ""),
        ({("base", 400): -0.08}, "fails", "no gain for code base 400 steps"),
        ({("base", 400): 0.01}, "not measurable here", "undecided"),
    ],
)
def test_c7_must_hold_at_every_size_and_length(changes: dict[tuple[str, int], float], word: str, reason: str) -> None:
    verdict = everywhere(STAR | changes)
    assert verdict.word == word and reason in verdict.reason
    assert len(verdict.numbers) == 6 and len(verdict.records) == 36
    assert verdict.setting == "n=4, common targets, 6 settings, 3 seeds"


def test_c7_counts_in_bytes_beside_tokens() -> None:
    beside = [number.text() for number in everywhere(STAR).beside]
    for size, steps in STAR:
        of = [text for text in beside if text.startswith(f"code {size} {steps} steps, rank ")]
        assert [" ".join(text.split("] ")[1].split()) for text in of] == [
            "nats",
            "bits per byte of the joint",
            "bytes per pass",
            "x",
            "bytes per pass",
            "x",
        ]


def test_c7_says_which_sizes_and_lengths_are_missing() -> None:
    few = everywhere({key: pace for key, pace in STAR.items() if key[0] != "micro"})
    assert (few.word, few.reason) == (
        "not measured here",
        "3 trunk sizes and 3 training lengths, the rule needs 4 and 3",
    )
    assert everywhere(STAR, seeds=2).reason == "2 shared seeds, the rule needs 3"


def overhead(step: float, speed: float, seeds: int = 3) -> claims.Verdict:
    """Rank 8's step takes `step` times the next-token model's; speed: factor on the speed-up."""
    contents = []
    for seed in range(seeds):
        contents += [made(1, seed, claim="C8", horizon=1, balance="none"), made(8, seed, claim="C8", speed=speed)]
        for content, factor in zip(contents[-2:], (1.0, step), strict=True):
            content["training"]["step_ms_median"] = 100.0 * factor * (1 + 0.01 * seed)
    (verdict,) = judged("C8", *contents)
    return verdict


@pytest.mark.parametrize(
    ("step", "speed", "seeds", "word", "reason"),
    [
        (1.1, 1.3, 3, "holds", ""),
        (1.5, 1.3, 3, "fails", "training takes more than 1.25 times as long"),
        (1.1, 0.7, 3, "fails", "sampling takes more than 1.25 times as long"),
        (1.5, 0.7, 3, "fails", "training and sampling take more than 1.25"),
        (1.1, 1.3, 2, "not measurable here", "2 shared seeds"),
    ],
)
def test_c8_reads_steps_and_passes(step: float, speed: float, seeds: int, word: str, reason: str) -> None:
    verdict = overhead(step, speed, seeds)
    assert verdict.word == word and reason in verdict.reason
    assert verdict.numbers[0].interval.mean == pytest.approx(step)
    assert len(verdict.numbers) == 2 and ", 2 cores, " in verdict.setting


def test_timing_cells_say_nothing_about_likelihoods() -> None:
    contents = [made(rank, seed, claim="C8") for rank in (1, 8) for seed in range(3)]
    for claim in ("C1", "C2"):
        assert judged(claim, *contents)[0].word == "not measured here"
    assert judged("C8", *contents)[0].reason.startswith("no cell of rank 8 beside a next-token model")


# --- heads on a pretrained model -------------------------------------------------------------------------------------

PRETRAINED = {
    "model__trunk": "smollm2",
    "model__family": "pretrained",
    "data__tokenizer": "model",
    "model__tie_first": True,
    "claim": "C6",
}


@pytest.mark.parametrize(
    ("speed", "word", "reason"),
    [
        (1.0, "holds", ""),
        (0.4, "fails", "every rank is slower than plain decoding"),
        (0.57, "not measurable here", "undecided"),
    ],
)
def test_c6_asks_whether_some_rank_beats_plain_decoding(speed: float, word: str, reason: str) -> None:
    contents = [made(rank, seed, **PRETRAINED, speed=speed, pace=0.0) for rank in (1, 4) for seed in range(2)]
    if word == "not measurable here":
        for content in contents:
            content["decoding"]["modes"]["sampling"]["speedup"] = {"median": 1.0, "low": 0.9, "high": 1.1}
    (verdict,) = judged("C6", *contents)
    assert verdict.word == word and reason in verdict.reason
    assert [number.name for number in verdict.numbers][1].startswith("rank 4 over rank 1")
    assert verdict.setting.startswith("code, smollm2, n=4, common target") and ", tied, 2 seeds" in verdict.setting


def test_c6_fails_only_where_every_rank_was_decoded() -> None:
    contents = [made(rank, 0, **PRETRAINED, speed=0.4) for rank in (1, 4)]
    assert judged("C6", *contents)[0].word == "fails"
    contents[1]["decoding"] = None
    verdict = judged("C6", *contents)[0]
    assert verdict.word == "not measurable here"
    assert verdict.reason.startswith("every other rank is slower than plain decoding, but rank 4 was not decoded")


def test_c6_judges_each_law_by_itself_and_is_no_matter_of_c3_and_c4() -> None:
    tied = [made(rank, 0, **PRETRAINED) for rank in (1, 4)]
    anchored = [made(rank, 0, **PRETRAINED, anchor="token") for rank in (1, 4)]
    found = judged("C6", *tied, *anchored)
    assert [", anchored, " in verdict.setting for verdict in found] == [False, True]
    untied = [made(rank, 0, **PRETRAINED | {"model__tie_first": False}) for rank in (1, 2, 4, 8)]
    for claim in ("C3", "C4"):
        assert judged(claim, *untied)[0].reason.startswith("no records")


def test_c6_says_why_from_kept_drafts_and_components_in_use() -> None:
    contents = [made(rank, 0, **PRETRAINED) for rank in (1, 2, 8)]
    for content in contents:
        rank = content["config"]["rank"]
        content["likelihood"]["kept_by_depth"] = [
            {"depth": depth, "mean": 0.6 / depth + rank / 100, "sem": 0.01} for depth in (2, 3, 4)
        ]
    (verdict,) = judged("C6", *contents)
    assert verdict.verdict == (
        "holds: a pass over 4 tokens takes 1.18 times as long as one over 1; rank 1 keeps 0.31, 0.21, 0.16 of its drafts at depths "
        "2, 3, 4; rank 8 keeps 0.38, 0.28, 0.23 of its drafts at depths 2, 3, 4"
    )
    contents[2]["likelihood"]["weights"] |= {"effective": 1.18, "dead": 7}
    (verdict,) = judged("C6", *contents)
    assert verdict.word == "holds" and verdict.reason.endswith("; components collapsed (1.2 of 8 in use)")
    beside = [number.text() for number in verdict.beside]
    assert "rank 8: 1.18 [1.18, 1.18] effective components" in beside
    assert sum(text.endswith("kept") for text in beside) == 9 and any(
        text.startswith("rank 2, depth 3: 0.22") for text in beside
    )


def test_c6_counts_a_longer_cell_of_one_rank_and_not_the_screen() -> None:
    longer = made(1, 0, **PRETRAINED, optim__steps=9000, name="one-long")
    (verdict,) = judged("C6", longer)
    assert verdict.word == "holds" and verdict.records == ["C6/one-long.json"] and "9000" not in verdict.reason
    screen = made(4, 0, **PRETRAINED | {"claim": "C6-screen"}, optim__steps=400)
    found = judged("C6", *(made(rank, 0, **PRETRAINED) for rank in (1, 4)), longer, screen)
    assert [len(verdict.records) for verdict in found] == [2, 1] and "optim.steps=9000" in found[1].setting
    assert judged("C6", screen)[0].reason == "no records of heads on a pretrained model"


# --- intervals -------------------------------------------------------------------------------------------------------


def test_seeds_alone_give_the_t_interval() -> None:
    """Four exact values 1..4: mean 2.5, standard error 0.6455, t(3) = 3.182. Monte Carlo error is about 5%."""
    found = estimate([Sample(mean=value) for value in (1.0, 2.0, 3.0, 4.0)])
    assert (found.mean, found.seeds) == (2.5, 4)
    assert found.high - found.mean == pytest.approx(3.182 * 0.6455, rel=0.12)
    assert found.mean - found.low == pytest.approx(3.182 * 0.6455, rel=0.12)


def test_rows_alone_give_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = estimate([Sample.ratio(values.tolist(), [1.0] * 400)])
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_pairing_removes_the_rows_that_both_share() -> None:
    rows = np.random.default_rng(2).normal(5, 3, 100)
    pair = Sample.ratio((rows + 0.1).tolist(), [1.0] * 100), Sample.ratio(rows.tolist(), [1.0] * 100)
    found = contrast([pair])
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_between_seed_variation_widens_the_interval() -> None:
    rows = np.random.default_rng(3).normal(5, 0.1, 100)
    same = [Sample.ratio(rows.tolist(), [1.0] * 100)] * 3
    moved = [Sample.ratio((rows + shift).tolist(), [1.0] * 100) for shift in (-0.5, 0.0, 0.5)]
    assert estimate(moved).high - estimate(moved).low > 10 * (estimate(same).high - estimate(same).low)


def test_coverage_with_three_seeds() -> None:
    """95% intervals over 3 seeds and 40 rows cover the truth. 200 trials; below 0.90 has probability under 0.002."""
    generator, inside = np.random.default_rng(4), 0
    for _ in range(200):
        rows = generator.normal(0, 0.3, 40)
        samples = [Sample.ratio((rows + generator.normal(0, 0.2)).tolist(), [1.0] * 40) for _ in range(3)]
        found = estimate(samples)
        inside += found.low < 0 < found.high
    assert inside >= 180, inside


def test_intervals_are_the_same_every_time() -> None:
    cells = {seed: Record("x", made(2, seed)) for seed in range(3)}
    assert stats.over_seeds(cells, "joint_nll") == stats.over_seeds(cells, "joint_nll")


def test_the_means_of_the_record_are_used_where_rows_are_missing() -> None:
    content = made(2)
    del content["likelihood"]["per_row"]
    found = stats.over_seeds({0: Record("x", validate(content))}, "joint_nll")
    assert found is not None
    assert found.mean == content["likelihood"]["joint_nll"]["mean"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.05, rel=0.08)
