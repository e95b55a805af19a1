"""What a verdict rests on: the seeds that were measured, the setting with most of them, timings side by side."""

from made_records import made

from experiments.claims.verdict import NOT_RUN
from tests.test_claims import COMMON, judged


def test_seeds_that_were_not_decoded_do_not_count() -> None:
    contents = [made(rank, seed, **COMMON) for rank in (1, 8) for seed in range(3)]
    for content in contents:
        if content["seed"] > 0 and content["config"]["rank"] == 8:
            content["decoding"] = None
    (verdict,) = judged("C3", *contents)
    assert verdict.seeds == 1 and verdict.setting.endswith("1 seed")


def test_a_rank_with_fewer_seeds_does_not_change_which_setting_decides() -> None:
    short = [made(rank, seed) for rank in (1, 8) for seed in range(3)]
    long = [made(rank, seed, slope=0.3, optim__steps=5000) for rank in (1, 8) for seed in range(3)]
    first, also = (judged("C1", *short, *long, *more)[0] for more in ([], [made(2, 0, slope=0.3, optim__steps=5000)]))
    assert first.numbers[0].interval.mean == also.numbers[0].interval.mean < -0.5


def test_c4_at_equal_cost_needs_timings_side_by_side() -> None:
    contents = [made(rank, seed, **COMMON) for rank in (1, 8) for seed in range(3)]
    longer = [made(1, seed, **COMMON | {"optim__steps": 800}) for seed in range(3)]
    for content in (*contents, *longer):
        content["training"]["step_ms_median"] = 100.0 * 400 / content["training"]["steps"]
    rows = judged("C4", *contents, *longer)
    assert len(rows[1].numbers) == 1 and rows[1].word != NOT_RUN
    for content in longer:
        content["decoding"]["group"] = ["later"]
    assert judged("C4", *contents, *longer)[1].reason == "the two were not timed side by side"
