"""Tables of the benchmarks, from the committed records: what they say is what the record says."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.bench import overhead
from experiments.report import benchmarks, decoding, render, scaling, speed
from experiments.report.benchmarks import made_of, read_benchmark, upgrade
from experiments.report.sample import COLOURS, LETTER, svg
from experiments.report.table import write_made

RESULTS = Path(__file__).parents[1] / "results"
NAMES = [path.stem for path in sorted((RESULTS / "benchmarks").glob("*.json"))]


def content(name: str) -> Any:
    return json.loads((RESULTS / "benchmarks" / f"{name}.json").read_text())


def tables(root: Path) -> list[Any]:
    return benchmarks.tables(root, decoding.TABLES | scaling.TABLES) + speed.tables(root)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    _, notes = write_made(tables(RESULTS), folder)
    assert notes == [note for note in notes if "bench/loss.py" in note], "growth on a GPU was not measured"
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{name}.csv").open()))


def test_committed_benchmarks_are_read_whole_and_every_table_is_well_formed(written: Path) -> None:
    assert all(isinstance(read_benchmark(RESULTS, name), dict) for name in NAMES)
    for path in written.glob("*.md"):
        lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
        assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1, path.name
    assert made_of("x", lambda: {}["groups"]) == (
        "benchmarks/x.json has content that cannot be shown (KeyError: 'groups'); make it again"
    )


def test_a_speed_is_that_of_its_cell_and_machine(written: Path) -> None:
    record = content("decode_speed")
    group = next(each for each in record["groups"] if each["batch"] == 1)
    cell = group["cells"][-1]
    shown = [row for row in rows(written, "speed") if row["machine"] == rows(written, "speed")[0]["machine"]]
    named = {"dtype": group["dtype"], "mode": group["mode"], "batch": "1", "rank": str(cell["rank"])}
    named |= {"n": str(cell["horizon"]), "tokens per forward": f"{cell['tokens_per_pass']:.2f}"}
    found = [row for row in shown if named.items() <= row.items()]
    assert any(row["share of limit"].startswith(f"{cell['share_of_limit']['median']:.3f} [") for row in found)
    generate = next(row for row in shown if row["rank"] == "generate" and row["mode"] == group["mode"])
    assert float(generate["speed-up"]) == pytest.approx(1 / group["plain_over_generate"]["median"], abs=0.006)
    held = sum(each["holds"] for each in record["targets"])
    assert f"{held} of {len(record['targets'])} targets hold" in (written / "speed.md").read_text()


@pytest.mark.parametrize("odd", [{"groups": 3}, {"benchmark": "another"}])
def test_an_odd_record_of_speed_is_named_and_the_others_are_drawn(odd: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name, more in (("decode_speed", {}), ("decode_speed_odd", odd)):
        (tmp_path / "benchmarks" / f"{name}.json").write_text(json.dumps(content(name[:12]) | more))
    made, *_ = speed.tables(tmp_path)
    assert made.table.rows == speed.speed_table(read_benchmark(tmp_path, "decode_speed")).rows
    assert "Left out: benchmarks/decode_speed_odd.json " in made.table.caption


def test_differences_of_acceptance_are_paired_over_prompts(written: Path) -> None:
    """Of a made record without them: rank 8 gains a tenth on every prompt, its tree a tenth more."""
    record = content("decode_acceptance")
    rates = {(1, "chain"): 1.0, (1, "tree"): 1.05, (8, "chain"): 1.1, (8, "tree"): 1.21, (8, "window"): 0.9}
    of_one = {"mode": "greedy", "corpus": "code", "law": "untied", "seeds": [0, 1]}
    record["strategies"] = [
        of_one
        | {"rank": rank, "strategy": drafter, "tokens_per_pass": {"mean": 2.0 * rate, "low": 1.0, "high": 4.0}}
        | {"per_prompt": {"tokens": [128] * 5, "passes": [each / rate for each in (40, 50, 60, 80, 90)]}}
        for (rank, drafter), rate in rates.items()
    ]
    record = upgrade(record)
    shown = {(row[3], row[5]): row[6:] for row in decoding.acceptance_table(record).rows}
    assert shown["1", "chain"] == ("2.000 [1.333, 3.001]", "-", "-")
    assert shown["8", "tree"][1].startswith("+0.220 [")
    assert shown["8", "tree"][2].startswith("+0.320 ["), "against the tree of rank 1"
    assert shown["8", "window"][2].startswith("-0.200 ["), "against the chain of rank 1, which is its window"
    _, low, high = (float(word.strip("[],")) for word in shown["8", "chain"][2].split())
    assert 0 < low < 0.2 < high < 0.36, "the prompts' own spread, 1.4 to 3.2 tokens per forward, cancels"


DAMAGES: list[Callable[[Any], Any]] = [
    lambda record: [],
    lambda record: {key: [{}] if isinstance(value, list) else value for key, value in record.items()},
    lambda record: {"benchmark": record["benchmark"]},
    lambda record: {"benchmark": "another"},
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_odd_benchmark_takes_its_own_table_out(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name in NAMES:
        (tmp_path / "benchmarks" / f"{name}.json").write_text(json.dumps(damage(content(name))))
    reasons = [each.table for each in tables(tmp_path) if isinstance(each.table, str)]
    assert reasons and all("benchmarks/" in reason for reason in reasons)


def test_without_records_tables_of_old_go_and_notes_name_the_command(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "decode_baselines.json").write_text("{")
    (tmp_path / "figures" / "tables").mkdir(parents=True)
    stale = [tmp_path / "figures" / name for name in ("tables/loss_large.md", "tables/speed.md")]
    for path in stale:
        path.write_bytes(b"stale")
    report = render(tmp_path, tmp_path / "figures")
    assert not [path for path in stale if path.exists()]
    said = "\n".join(report.notes)
    for word in ("table decoding left out: ", "python experiments/bench/loss.py --large"):
        assert word in said, word


def test_the_fit_finds_what_the_times_were_made_from() -> None:
    base = {"positions": 64, "horizon": 4, "rank": 8, "vocab": 1024, "width": 32}

    def cells(pending: float) -> list[dict[str, Any]]:
        sizes = [base] + [base | {name: base[name] // share} for name in base for share in (2, 4)]
        logits = [size["positions"] * size["horizon"] * size["rank"] * size["vocab"] for size in sizes]
        times = [6 * n * size["width"] / 1e9 + n / 1e7 + pending for n, size in zip(logits, sizes, strict=True)]
        return [size | {"seconds": time, "peak_bytes": 2**20} for size, time in zip(sizes, times, strict=True)]

    found = scaling.fit(cells(0.5))
    assert found.coefficients == pytest.approx((1e-9, 1e-7, 0.5)) and found.error < 1e-6
    without = scaling.fit(cells(-0.001))
    assert without.coefficients[2] == 0 and 0 < without.error < 0.1, "no negative time"


@pytest.mark.parametrize(
    ("rates", "cheap", "decided"),
    [
        ([1.96, 1.98], [1.4, 1.6], True),
        ([1.94, 1.98], [1.4, 1.6], False),  # a seed keeps less
        ([1.96, 1.98], [1.4, 1.96], False),  # a seed of a cheaper one keeps enough
        ([1.97], [1.5], False),  # one seed says nothing of others
    ],
)
def test_the_recipe_of_fewest_flops_that_keeps_the_gain_is_chosen(
    rates: list[float], cheap: list[float], decided: bool
) -> None:
    cells = [
        {"recipe": recipe, "flops": {"trunk": cost}, "by_seed": [{"tokens_per_pass": rate} for rate in given]}
        for recipe, cost, given in (("whole", 9.0, [2.0] * len(rates)), ("1/4", 3.0, rates), ("tied", 1.0, cheap))
    ]
    found = overhead.choose(cells)
    assert (found["chosen"], found["decided"]) == ("1/4", decided)


def test_the_sample_colours_what_was_drafted_and_escapes_the_text() -> None:
    record = {"prompt": "a:\n", "pieces": [["  x<", True], ["y\n", False], ["z", True]], "forwards": 2}
    drawn = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" fill="(#\w+)"[^>]*>([^<]*)</text>', svg(record))
    grey, white, green = (COLOURS[kind] for kind in ("prompt", "target", "draft"))
    assert [(fill, text) for *_, fill, text in drawn[:4]] == [
        (grey, "a:"),
        (green, "  x&lt;"),
        (white, "y"),
        (green, "z"),
    ]
    assert float(drawn[2][0]) - float(drawn[1][0]) == 4 * LETTER and drawn[1][1] == drawn[2][1] != drawn[3][1]
    assert "3 tokens in 2 target forwards: 1.50 per forward" in drawn[4][3]
