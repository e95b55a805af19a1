"""Verdicts on records whose truth is known: every word is planted once per claim that has it."""

import copy
from typing import Any

import pytest
from made_records import ORIGIN, made, suite

from experiments import claims
from experiments.claims.verdict import CONTRADICTED, HOLDS, NO_DIFFERENCE, NOT_RUN, UNDERPOWERED
from experiments.families import families_of
from experiments.records import Record

COMMON = {"model__trunk": "runs/code-small-own-r1-n1-none-s0", "size": "small", "claim": "C3"}


def verdicts(*contents: dict[str, Any]) -> list[claims.Verdict]:
    return claims.judge(families_of(Record(f"{each['claim']}/{each['name']}.json", each) for each in contents)[0])


def judged(claim: str, *contents: dict[str, Any]) -> list[claims.Verdict]:
    found = [verdict for verdict in verdicts(*contents) if claim in (verdict.claim.id, verdict.claim.name)]
    return [verdict for verdict in found if verdict.setting != "one GPU"]


def sweep(claim: str, seeds: int = 3, ranks: tuple[int, ...] = (1, 2, 4, 8), **truth: Any) -> claims.Verdict:
    common = COMMON if claim in ("C3", "C4") else {}
    (verdict,) = judged(claim, *(made(rank, seed, **common | truth) for rank in ranks for seed in range(seeds)))
    return verdict


def test_claims_are_in_order_and_their_rules_name_their_margins() -> None:
    names = [f"C{number}" for number in range(1, 9)]
    assert [claim.name for claim in claims.CLAIMS] == [*names[:5], "C6 heads", "C6 rank", *names[6:]]
    for claim in claims.CLAIMS:
        assert claim.question.endswith("?") and "holds:" in claim.rule and "contradicted:" in claim.rule
        margin = f"{1 + claim.margin:g}" if claim.id == "C8" else f"±{claim.margin:g}"
        assert margin in claim.rule or f"±{claim.margin:.0%}" in claim.rule


@pytest.mark.parametrize(
    ("claim", "truth", "word", "said"),
    [
        ("C1", {"slope": 0.05}, HOLDS, "holds"),
        ("C1", {"slope": -0.05}, CONTRADICTED, "goes the other way"),
        ("C1", {"slope": 0.0, "noise": 0.0001}, NO_DIFFERENCE, "no difference within ±0.02 nats"),
        ("C1", {"slope": 0.002, "noise": 0.0001}, NO_DIFFERENCE, "within"),  # surely down, by next to nothing
        ("C1", {"slope": 0.0, "noise": 0.05}, UNDERPOWERED, "(could have seen"),
        ("C2", {"first": 0.0}, HOLDS, ""),
        ("C2", {"first": 0.05}, CONTRADICTED, "rank 2, 4, 8 differs from rank 1 by more than 0.02 nats"),
        ("C2", {"first": 0.0, "noise": 0.05}, UNDERPOWERED, "nats or more"),
        ("C3", {"pace": 0.08}, HOLDS, ""),
        ("C3", {"pace": -0.08}, CONTRADICTED, "goes the other way"),
        ("C4", {"speed": 1.0}, HOLDS, ""),
        ("C4", {"speed": 0.5}, CONTRADICTED, "every rank above 1 is slower than autoregressive decoding or rank 1"),
        ("C4", {"speed": 0.95}, UNDERPOWERED, "x or more"),
    ],
)
def test_the_word_follows_the_truth(claim: str, truth: dict[str, Any], word: str, said: str) -> None:
    verdict = sweep(claim, **truth)
    assert verdict.word == word and said in verdict.verdict and verdict.verdict.startswith(word)
    assert verdict.numbers and len(verdict.records) == 12
    assert all(number.interval.low <= number.interval.mean <= number.interval.high for number in verdict.numbers)


def test_one_seed_decides_over_rows_or_prompts_alone_and_says_so() -> None:
    for claim in ("C1", "C2", "C3", "C4"):
        verdict = sweep(claim, seeds=1)
        assert verdict.setting.endswith(", 1 seed") and verdict.numbers


def test_no_shared_seed_and_no_rank_8_are_not_run() -> None:
    verdict = judged("C1", made(1, 0), made(8, 1))[0]
    assert (verdict.word, verdict.reason) == (NOT_RUN, "0 shared seeds, the rule needs 1")
    verdict = sweep("C1", ranks=(1, 4))
    assert (verdict.word, verdict.reason) == (NOT_RUN, "no cell of rank 8 (there is 1, 4)")
    assert [number.name for number in verdict.numbers] == ["rank 1:", "rank 4:"]
    assert sweep("C4", ranks=(2, 4)).reason == "no cell of rank 1 and 8 (there is 2, 4)"


def test_without_records_every_claim_is_still_there() -> None:
    found = claims.judge([])
    assert list(dict.fromkeys(verdict.claim for verdict in found)) == list(claims.CLAIMS)
    assert {verdict.word for verdict in found} == {NOT_RUN}
    gpu = [verdict for verdict in found if verdict.setting == "one GPU"]
    assert [verdict.claim.id for verdict in gpu] == ["C1", "C2", "C3", "C4", "C8"]
    assert all(f"claim={v.claim.id} profile=gpu" in v.reason for v in gpu)
    assert [(each.answer, each.number) for each in claims.answers(found)] == [(NOT_RUN, "-")] * 9


def test_a_rise_between_ranks_contradicts_c1_even_if_rank_8_is_lowest() -> None:
    slopes = {1: 0.0, 2: -0.1, 8: 0.1}
    (verdict,) = judged("C1", *(made(rank, seed, slope=slopes[rank]) for rank in slopes for seed in range(3)))
    assert (verdict.word, verdict.reason) == (CONTRADICTED, "the step from rank 1 to rank 2 goes the other way")


def test_only_untied_cells_count_and_targets_stay_apart() -> None:
    """Token-conditioned cells are much better here; they must not move a verdict."""
    ours = [made(rank, seed, **COMMON, pace=0.0) for rank in (1, 8) for seed in range(3)]
    anchored = [made(8, seed, **COMMON | {"claim": "beyond"}, link="first", pace=0.5) for seed in range(3)]
    with_them, without = judged("C3", *ours, *anchored), judged("C3", *ours)
    assert with_them[0].numbers == without[0].numbers
    assert not any("beyond" in path for path in with_them[0].records)
    assert judged("C1", *ours)[0].reason.startswith("no records")


def test_each_setting_has_its_own_row_and_what_decides_nothing_is_beside() -> None:
    found = judged("C3", *suite())
    assert [verdict.setting.split(",")[0] for verdict in found] == ["code", "text"]
    assert any(number.name.startswith("target trained with the heads (tiny), rank 8") for number in found[0].beside)
    assert any(number.name.startswith("greedy, rank 8") for number in found[0].beside)


def test_c4_without_side_by_side_timings_is_not_run() -> None:
    contents = [made(rank, seed, **COMMON) for rank in (1, 8) for seed in range(2)]
    for content in contents:
        content["decoding"]["modes"]["sampling"]["speedup_over_rank1"] = None
    (verdict,) = judged("C4", *contents)
    assert (verdict.word, verdict.reason) == (NOT_RUN, "no rank above 1 was measured side by side with rank 1")


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
    assert (verdict.word, verdict.reason) == (NOT_RUN, "0 shared seeds, the rule needs 1")


def test_c2_needs_every_rank_beside_rank_1() -> None:
    places = ((1, 0), (2, 1), (8, 0))
    (verdict,) = judged("C2", *(made(rank, seed, first=0.0) for rank, seed in places))
    assert (verdict.word, verdict.reason) == (NOT_RUN, "rank 2 shares no seed with rank 1")
    assert [number.name for number in verdict.numbers] == ["rank 8 - rank 1 (90.0%):"]
    # What contradicts at rank 8 does not need rank 2.
    (verdict,) = judged("C2", *(made(rank, seed, first=0.05) for rank, seed in places))
    assert verdict.word == CONTRADICTED and verdict.reason.startswith("rank 8 differs")


@pytest.mark.parametrize("claim", ["C1", "C3"])
def test_a_step_that_shares_no_seed_decides_nothing(claim: str) -> None:
    common = COMMON if claim == "C3" else {}
    contents = [made(rank, seed, **common) for rank, seed in ((1, 0), (2, 1), (8, 0))]
    verdict = judged(claim, *contents)[0]
    assert (verdict.word, verdict.reason) == (NOT_RUN, "rank 2 shares no seed with rank 1")
    # What another step decides does not wait for it.
    contents += [made(4, 0, **common | {"slope": 0.3, "pace": 0.3})]
    assert judged(claim, *contents)[0].reason == "the step from rank 4 to rank 8 goes the other way"


# --- equal training time ----------------------------------------------------------------------------------------------


def timed(longer: float, **truth: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ranks 1 and 8 at 500 steps; rank 1 again, with `longer` times the training time of rank 8."""
    short = [made(rank, seed, slope=0.1) for rank in (1, 8) for seed in range(3)]
    long = [made(1, seed, **truth, optim__steps=1000, name=f"long-s{seed}") for seed in range(3)]
    for content in short:
        content["training"]["step_ms_median"] = 100.0 if content["config"]["rank"] == 1 else 200.0
    for content in long:
        content["training"]["step_ms_median"] = 100.0 * longer
    return short, long


def equal_time(longer: float, **truth: Any) -> list[claims.Verdict]:
    short, long = timed(longer, **truth)
    return judged("C1", *short, *long)


def test_equal_wall_clock_has_a_row_of_its_own() -> None:
    equal_steps, equal_clock = equal_time(1.0)
    assert equal_steps.word == equal_clock.word == HOLDS
    assert equal_steps.claim is equal_clock.claim and "at equal training time" in equal_clock.expected
    assert equal_clock.setting.endswith("equal training time, 3 seeds")
    assert equal_clock.numbers[0].name == "rank 8 - rank 1, equal training time (1.00 of it):"
    assert [number.name for number in equal_clock.beside] == ["first token alone:"]
    assert len(equal_clock.records) == 6 and equal_clock.records[0] == "C1/long-s0.json"
    # Rank 1 gains more from the time than rank 8 from its rank; the README's row says so.
    other = equal_time(1.0, first=0.0, slope=0.0, gain=2.0)
    assert other[1].word == CONTRADICTED
    assert "yes (other settings: 1 no)" in claims.answers(other)[0].answer


def test_a_cell_of_another_wall_clock_or_machine_is_not_taken_for_equal() -> None:
    for longer in (0.95, 2.0):
        verdict = equal_time(longer)[1]
        assert verdict.word == NOT_RUN and not verdict.numbers
        assert verdict.reason == f"rank 1 was trained for {longer:.2f} times rank 8's time; 1 to 1.33 counts as equal"
    origin = copy.deepcopy(ORIGIN)
    origin["hardware"]["processor"] = "Another CPU"
    verdict = equal_time(1.0, origin=origin)[1]
    assert verdict.word == NOT_RUN and "trained on different kinds of hardware" in verdict.reason


def test_equal_wall_clock_is_that_of_the_shared_seeds() -> None:
    """Seed 2 of rank 8, which was slow and on another machine, has no partner."""
    short, long = timed(1.0)
    short[-1]["training"]["step_ms_median"] = 400.0
    equal_clock = judged("C1", *short, *long[:2])[1]
    assert equal_clock.numbers[0].name == "rank 8 - rank 1, equal training time (1.00 of it):"
    assert len(equal_clock.records) == 4
    short[-1]["hardware"] = short[-1]["hardware"] | {"processor": "Another CPU"}
    assert judged("C1", *short, *long[:2])[1].numbers == equal_clock.numbers


# --- balance, sizes and lengths, overhead ----------------------------------------------------------------------------


def balanced(gains: dict[str, float], seeds: int = 3, spread: float = 0.001) -> claims.Verdict:
    """gains: nats that a balance takes off; spread: by which two seeds differ in it."""
    contents = [made(8, seed, **COMMON, balance="none") for seed in range(seeds)]
    for balance, gain in gains.items():
        contents += [made(8, seed, **COMMON, balance=balance, gain=gain + spread * (seed - 1)) for seed in range(seeds)]
    (verdict,) = judged("C5", *contents)
    return verdict


@pytest.mark.parametrize(
    ("gains", "spread", "word"),
    [
        ({"switch": 0.05, "kl": -0.05}, 0.001, HOLDS),
        ({"switch": -0.05, "kl": 0.0}, 0.001, CONTRADICTED),
        ({"switch": -0.05, "kl": 0.005}, 0.0001, CONTRADICTED),  # kl surely helps, by next to nothing
        ({"switch": 0.005, "kl": 0.0}, 0.0001, NO_DIFFERENCE),
        ({"switch": 0.0, "kl": 0.0}, 0.05, UNDERPOWERED),
    ],
)
def test_c5_asks_whether_some_balance_lowers_the_joint_loss(gains: dict[str, float], spread: float, word: str) -> None:
    verdict = balanced(gains, spread=spread)
    assert verdict.word == word
    assert [number.name for number in verdict.numbers] == ["kl 0.01 - none (97.5%):", "switch 0.01 - none (97.5%):"]
    assert any("effective components" in number.text() for number in verdict.beside)
    assert "rank 8, 3 seeds" in verdict.setting and len(verdict.records) == 9


def test_c5_with_too_few_seeds_decides_nothing() -> None:
    verdict = balanced({"switch": 0.5}, seeds=2)
    assert (verdict.word, verdict.reason) == (UNDERPOWERED, "2 shared seeds, the rule needs 3")


def everywhere(paces: dict[tuple[str, int], float], seeds: int = 3, **more: Any) -> claims.Verdict:
    dials = {"claim": "C7", "optim__warmup": 5} | more
    contents = [
        made(rank, seed, size=size, optim__steps=steps, model__trunk=f"runs/{size}-s0", pace=pace, **dials)
        for (size, steps), pace in paces.items()
        for seed in range(seeds)
        for rank in (1, 4)
    ]
    (verdict,) = judged("C7", *contents)
    return verdict


SIZES = [("micro", 400), ("tiny", 400), ("small", 400), ("base", 400), ("small", 100), ("small", 1600)]
STAR = dict.fromkeys(SIZES, 0.08)


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({}, HOLDS, ""),
        ({("base", 400): -0.08}, CONTRADICTED, "no gain for code base 400 steps"),
        ({("base", 400): 0.008}, UNDERPOWERED, "1 of 6 intervals include 0"),
    ],
)
def test_c7_must_hold_at_every_size_and_length(changes: dict[tuple[str, int], float], word: str, reason: str) -> None:
    verdict = everywhere(STAR | changes)
    assert verdict.word == word and reason in verdict.reason
    assert len(verdict.numbers) == 6 and len(verdict.records) == 36
    assert verdict.setting == "n=4, frozen targets, 6 settings, 3 seeds"


def test_c7_says_which_sizes_and_lengths_are_missing() -> None:
    few = everywhere({key: pace for key, pace in STAR.items() if key[0] != "micro"})
    assert (few.word, few.reason) == (NOT_RUN, "3 trunk sizes and 3 training lengths, the rule needs 4 and 3")
    assert everywhere(STAR, seeds=2).reason == "2 shared seeds, the rule needs 3"


def overhead(step: float, speed: float, seeds: int = 3) -> claims.Verdict:
    """Rank 8's step takes `step` times rank 1's; speed: factor on its speed-up, at equal tokens per forward."""
    contents = []
    for seed in range(seeds):
        contents += [made(1, seed, claim="C8", horizon=1, balance="none")]
        contents += [made(1, seed, claim="C8", pace=0.0), made(8, seed, claim="C8", pace=0.0, speed=speed)]
        for content, factor in zip(contents[-3:], (0.5, 1.0, step), strict=True):
            content["training"]["step_ms_median"] = 100.0 * factor * (1 + 0.01 * seed)
        for content, over in zip(contents[-2:], (1.4, 1.4 * speed), strict=True):
            sampling = content["decoding"]["modes"]["sampling"]
            sampling["speedup_over_trunk"] = {"median": over, "low": 0.9 * over, "high": 1.1 * over}
    (verdict,) = judged("C8", *contents)
    return verdict


@pytest.mark.parametrize(
    ("step", "speed", "seeds", "word", "reason"),
    [
        (1.1, 0.9, 3, HOLDS, ""),
        (1.5, 0.9, 3, CONTRADICTED, "training takes more than 1.25 times as long"),
        (1.1, 0.7, 3, CONTRADICTED, "sampling takes more than 1.25 times as long"),
        (1.5, 0.7, 3, CONTRADICTED, "training and sampling take more than 1.25"),
        (1.1, 0.9, 2, UNDERPOWERED, "2 shared seeds"),
    ],
)
def test_c8_reads_steps_and_forwards(step: float, speed: float, seeds: int, word: str, reason: str) -> None:
    verdict = overhead(step, speed, seeds)
    assert verdict.word == word and reason in verdict.reason
    assert verdict.numbers[0].interval.mean == pytest.approx(step)
    assert verdict.numbers[1].interval.mean == pytest.approx(1 / speed, rel=0.05)
    assert len(verdict.numbers) == 2 and ", 2 cores, " in verdict.setting


def test_timing_cells_say_nothing_about_likelihoods() -> None:
    contents = [made(rank, seed, claim="C8") for rank in (1, 8) for seed in range(3)]
    for claim in ("C1", "C2"):
        assert judged(claim, *contents)[0].word == NOT_RUN
    assert judged("C8", *contents[3:])[0].reason.startswith("no cell of rank 8 beside rank 1 and a next-token model")


# --- heads on a pretrained model -------------------------------------------------------------------------------------

PRETRAINED = {"model__trunk": "smollm2", "model__family": "pretrained", "data__tokenizer": "model", "claim": "C6"}
TIED = PRETRAINED | {"model__tie_first": True}


def pretrained(
    speeds: dict[int, float], over_rank1: float = 1.0, width: float = 0.01, **more: Any
) -> list[dict[str, Any]]:
    """speeds: of each rank over autoregressive decoding; width: of the intervals, as a share."""
    contents = [made(rank, seed, **TIED | more) for rank in speeds for seed in range(2)]
    for content in contents:
        rank, sampling = content["config"]["rank"], content["decoding"]["modes"]["sampling"]
        for key, value in (("speedup", speeds[rank]), ("speedup_over_rank1", over_rank1)):
            if key == "speedup" or rank > 1:
                sampling[key] = {"median": value, "low": value * (1 - width), "high": value * (1 + width)}
    return contents


@pytest.mark.parametrize(
    ("speeds", "over_rank1", "width", "heads", "rank"),
    [
        ({1: 1.2, 4: 1.2}, 1.0, 0.02, HOLDS, UNDERPOWERED),  # rank 1 alone makes it faster
        ({1: 1.2, 4: 1.5}, 1.25, 0.02, HOLDS, HOLDS),
        ({1: 1.2, 4: 1.0}, 0.8, 0.02, HOLDS, CONTRADICTED),
        ({1: 0.6, 4: 0.7}, 1.1, 0.02, CONTRADICTED, HOLDS),
        ({1: 1.0, 4: 1.0}, 1.0, 0.1, UNDERPOWERED, UNDERPOWERED),
    ],
)
def test_c6_asks_two_questions(
    speeds: dict[int, float], over_rank1: float, width: float, heads: str, rank: str
) -> None:
    contents = pretrained(speeds, over_rank1, width)
    (first,), (second,) = judged("C6 heads", *contents), judged("C6 rank", *contents)
    assert (first.word, second.word) == (heads, rank)
    assert "over autoregressive decoding (97.5%)" in first.numbers[0].name
    assert second.numbers[0].name == "rank 4 over rank 1 (95.0%):"
    assert ", tied, 2 seeds" in first.setting and first.setting == second.setting


def test_c6_is_contradicted_only_where_every_rank_was_decoded() -> None:
    contents = pretrained({1: 0.6, 4: 0.7})
    for content in contents[2:]:
        content["decoding"] = None
    (verdict,) = judged("C6 heads", *contents)
    assert (verdict.word, "but rank 4 was not decoded" in verdict.reason) == (NOT_RUN, True)
    assert judged("C6 rank", *contents)[0].word == NOT_RUN


def test_c6_judges_each_kind_of_draft_by_itself_and_is_no_matter_of_c3_and_c4() -> None:
    tied = [made(rank, 0, **TIED) for rank in (1, 4)]
    conditioned = [made(rank, 0, **TIED, link="first") for rank in (1, 4)]
    found = judged("C6 heads", *tied, *conditioned)
    assert [", token-conditioned, " in verdict.setting for verdict in found] == [False, True]
    untied = [made(rank, 0, **PRETRAINED) for rank in (1, 2, 4, 8)]
    for claim in ("C3", "C4"):
        assert judged(claim, *untied)[0].reason.startswith("no records")


def test_c6_the_longest_training_answers_and_the_screen_does_not_count() -> None:
    longer = made(1, 0, **TIED, optim__steps=9000, name="one-long")
    longer["training"]["tokens"] *= 20
    screen = made(4, 0, **TIED | {"claim": "C6-screen"}, optim__steps=400)
    found = judged("C6 heads", *(made(rank, 0, **TIED) for rank in (1, 4)), longer, screen)
    assert found[0].records == ["C6/one-long.json"] and len(found) == 2
    assert len(judged("C6 rank", longer)) == 1 and judged("C6 rank", longer)[0].word == NOT_RUN
    assert judged("C6 heads", screen)[0].reason == "no records of heads on a pretrained model"
