"""Claims and cells as Markdown, LaTeX, CSV and plain text. The same records always give the same bytes."""

from __future__ import annotations

import csv
import io
import itertools
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpdlm.config import LossConfig
from cpdlm.files import write_bytes
from experiments.claims import Verdict, seeds_text
from experiments.families import Cells, Family, trunk_records
from experiments.records import LAWS, MODES, Record, counted, decoding_hardware, training_hardware
from experiments.stats import Interval, difference, over_seeds, shared_seeds

Pattern = tuple[tuple[str, ...], ...]  # of each part of a path, the values that it takes

_NARROW = 6  # columns of a table that LaTeX need not shrink

INTERVALS = (
    "Intervals are 95% unless marked, over test rows or prompts and over seeds (one seed: rows or prompts only)."
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; caption states what was measured and on what."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [" | ".join(self.header), " | ".join("---" for _ in self.header)]
        lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in self.rows]
        return "\n".join(f"| {line} |" for line in lines) + f"\n\n{self.caption}\n"

    def latex(self) -> str:
        """A booktabs table, shrunk to the page where it is wide (graphicx); long text wraps in the claims table."""
        columns = (
            "p{0.06\\linewidth}" + "p{0.17\\linewidth}" * (len(self.header) - 1)
            if self.name == "claims"
            else "l" * len(self.header)
        )
        fit = len(self.header) > _NARROW and self.name != "claims"
        body = [" & ".join(map(_escaped, row)) + r" \\" for row in self.rows]
        head = " & ".join(map(_escaped, self.header)) + r" \\"
        return "\n".join(
            [
                r"\begin{table}[t]",
                r"\centering\footnotesize",
                rf"\caption{{{_escaped(self.caption)}}}",
                rf"\label{{tab:{self.name}}}",
                *[r"\resizebox{\linewidth}{!}{"] * fit,
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                head,
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}" + "}" * fit,
                r"\end{table}",
                "",
            ]
        )

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()


@dataclass(frozen=True)
class Made:
    """A table, or why there is none."""

    name: str
    title: str
    table: Table | str


def of_cells(families: list[Family]) -> list[Made]:
    """Every table of the cells; one may be without rows."""
    return [Made(table.name, title_of(make), table) for make in TABLES for table in [make(families)]]


def write_made(made: Sequence[Made], folder: Path) -> tuple[list[Path], list[str]]:
    """Every table as .md, .tex and .csv: (files, a line per table that is not there).

    What is not there, or has no rows, is removed from `folder`.
    """
    files: list[Path] = []
    notes: list[str] = []
    for each in made:
        if isinstance(each.table, str):
            notes.append(f"table {each.name} left out: {each.table}")
        if isinstance(each.table, str) or not each.table.rows:
            _remove(folder, each.name)
        else:
            files += write_table(each.table, folder)
    return files, notes


def title_of(make: Callable[..., Table]) -> str:
    """The first line of what a table's maker says that it is."""
    return (make.__doc__ or make.__name__).splitlines()[0].rstrip(".")


def write_table(table: Table, folder: Path, notes: Sequence[str] = ()) -> list[Path]:
    """NAME.md (followed by the notes), NAME.tex and NAME.csv."""
    files = []
    for suffix, text in (
        ("md", table.markdown() + _notes_markdown(notes)),
        ("tex", table.latex()),
        ("csv", table.csv()),
    ):
        files.append(folder / f"{table.name}.{suffix}")
        write_bytes(files[-1], text.encode())
    return files


def _remove(folder: Path, name: str) -> None:
    """What `write_table` wrote: a table whose record is gone must not stay."""
    for suffix in ("md", "tex", "csv"):
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def claims_table(verdicts: list[Verdict]) -> Table:
    """Every verdict: what decided, what stands beside it, and the records."""
    rows: list[tuple[str, ...]] = []
    for v in verdicts:
        beside = f". Beside: {'; '.join(number.text() for number in v.beside)}" if v.beside else ""
        rows.append(
            (
                v.claim.name,
                v.setting,
                v.expected or v.claim.expected,
                v.measured() + beside,
                v.verdict,
                braces(v.records) or "none",
            )
        )
    caption = (
        f"{INTERVALS} Verdicts are about the paper's distribution (untied, anchor=none); C6 has a row for each kind of "
        "draft. Underpowered names the largest half-width among the intervals that decide nothing, for ratios as a factor. "
        "Rules (results/LOG.md dates each change): "
        + " ".join(f"{c.name}: {c.question} {c.statistic}; {c.rule}." for c in dict.fromkeys(v.claim for v in verdicts))
    )
    return Table("claims", caption, ("claim", "setting", "expected", "measured", "verdict", "record"), rows)


_COLUMNS = (
    "setting",
    "law",
    "rank",
    "seeds",
    "trained parameters",
    "joint NLL (nats)",
    "first-token NLL (nats)",
    "bits per byte",
    "tokens per pass, greedy",
    "tokens per pass, sampling",
    "speed-up, greedy",
    "speed-up, sampling",
    "over rank 1, sampling",
    "conversion / limit",
    "MFLOPs per draft",
)


def cells_table(families: list[Family]) -> Table:
    """The paper's law: untied cells."""
    rows = [_row(f, "untied", rank, None) for f in families for rank in f.ranks()]
    return Table("cells", _caption("Untied cells (the paper's law).", families, ("untied",)), _COLUMNS, rows)


def paired_table(families: list[Family]) -> Table:
    """Every rank against rank 1 of its law, paired: mean, interval and spread."""
    quantities = (
        ("joint_nll", "sampling", "joint NLL (nats)"),
        ("first_token_nll", "sampling", "first-token NLL (nats)"),
        *(("tokens_per_pass", mode, f"tokens per pass, {mode}") for mode in MODES),
    )
    rows, shown = [], [family for family in families if not family.is_timing]
    for family, distribution in itertools.product(shown, LAWS):
        one = family.cells.get((distribution, 1), {})
        for rank in (rank for rank in family.ranks(distribution) if rank > 1):
            cells = family.cells[distribution, rank]
            gaps = [difference(cells, one, quantity, mode) for quantity, mode, _ in quantities]
            speeds = [over_seeds(cells, "speedup_over_rank1", mode) for mode in MODES]
            if any(gap is not None for gap in gaps):
                values = [*(_spread(gap, 3, sign=True) for gap in gaps), *(_spread(speed, 2) for speed in speeds)]
                rows.append((family.label, distribution, str(rank), str(len(shared_seeds(cells, one))), *values))
    header = (
        "setting",
        "law",
        "rank",
        "seeds",
        *(f"{name}, minus rank 1" for *_, name in quantities),
        *(f"speed over rank 1, {mode}" for mode in MODES),
    )
    caption = (
        "Every rank against rank 1 of the same law, target and seed, on the same test rows or prompts: mean over seeds, 95% interval "
        "(bootstrap over rows or prompts, expanded where they are few, and t over seeds), ± standard deviation over seeds where there are several. Speed: medians of "
        "interleaved repeats in one process, with their own intervals, over all seeds. "
        + described(
            [r for f in shown for distribution in LAWS if (distribution, 1) in f.cells for r in f.records(distribution)]
        )
    )
    return Table("paired", caption, header, rows)


def beyond_table(families: list[Family]) -> Table:
    """Tied and anchored cells beside the untied ones of the same rank, and rank-1 controls of equal size or cost."""
    rows = []
    for family in families:
        kinds = family.variants()
        if family.is_pretrained or kinds in ([], ["untied"]):
            continue
        ranks = {rank for kind in kinds if kind != "untied" for rank in family.ranks(kind)} | {1, *family.ranks()[-1:]}
        for variant, rank in itertools.product(kinds, sorted(ranks)):
            if (variant, rank) in family.cells:
                rows.append(_row(family, variant, rank, _added(family, variant, rank)))
    header = (*_COLUMNS[:5], "added parameters", *_COLUMNS[5:])
    caption = "Beyond the paper: tied and anchored cells, with the untied cells of the same rank, and rank-1 controls: blind (the "
    caption += "anchor's map fed h in place of the token's embedding: the parameters and FLOPs of anchored rank 1) and mlp (wider "
    caption += "perceptron maps: the parameters of the highest rank). "
    caption += "Added parameters: over the untied cell of the same rank."
    return Table("beyond", _caption(caption, families, None), header, rows)


def retrofit_table(families: list[Family]) -> Table:
    """Heads on a pretrained model, by objective, law and rank: what is kept at each depth, and what that buys."""
    shown = [family for family in families if family.is_pretrained]
    rows: list[tuple[str, ...]] = []
    for family in shown:
        for variant, rank in itertools.product(family.variants(), family.all_ranks()):
            cells = family.cells.get((variant, rank))
            if not cells:
                continue
            record = next(iter(cells.values()))
            trained = sum(r["seconds"]["train"] for r in cells.values()) / len(cells)
            rows.append(
                (
                    f"{family.settings['corpus']}, {family.size}, n={family.horizon}",
                    _aim(family),
                    variant,
                    str(rank),
                    str(len(cells)),
                    f"{record['training']['steps']:,}",
                    f"{_positions(record):,}",
                    f"{record['parameters']['trained']:,}",
                    f"{record.trained_bytes() / 2**20:.1f}",
                    f"{trained / 60:.1f}",
                    f"{record['training']['peak_memory_bytes'] / 2**30:.1f}",
                    _components(cells),
                    _by_depth(cells, "kept"),
                    *(_by_depth(cells, "accepted", mode) for mode in MODES),
                    *(_shown(over_seeds(cells, "tokens_per_pass", mode), 2) for mode in MODES),
                    *(_shown(over_seeds(cells, "speedup", mode), 2) for mode in MODES),
                    *(_shown(over_seeds(cells, "speedup_over_rank1", mode), 2) for mode in MODES),
                )
            )
    header = (
        "setting",
        "trained for",
        "law",
        "rank",
        "seeds",
        "steps",
        "positions",
        "trained parameters",
        "heads (MiB)",
        "training (min)",
        "memory (GiB)",
        "components in use",
        "kept by depth",
        *(f"accepted by depth, {mode}" for mode in MODES),
        *(f"tokens per pass, {mode}" for mode in MODES),
        *(f"speed-up, {mode}" for mode in MODES),
        *(f"over rank 1, {mode}" for mode in MODES),
    )
    caption = "Heads on a pretrained, frozen model, which is the target. Kept by depth: mean over test text of sum min(p, q), the chance "
    caption += "that a sampled draft of x_{t+k} is kept if all before it are the text's own; 1 minus it is the total variation of target and draft law "
    caption += "(depth 1 is the target itself where it is tied). Accepted by depth: drafts kept in decoding, of those that were reached. "
    caption += "Components in use: effective number on test text (exp of the entropy of the mean weights); dead: below a tenth of an equal "
    caption += (
        "share. Positions: those that trained the window, of all steps. Heads: bytes of all that is trained, as stored. "
        + _listed_tokens([r for f in shown for r in f.records()])
    )
    return Table("retrofit", _caption(caption, shown, None), header, rows)


def _positions(record: Record) -> int:
    return round(record["training"]["tokens"] * record.config["loss"].get("joint_fraction", LossConfig.joint_fraction))


def _aim(family: Family) -> str:
    """The objective, with its constants and the text where those are not the preset's."""
    settings = family.settings
    words = [str(settings["loss.objective"])]
    if words[0].startswith("eq14") and settings["loss.alpha"] != LossConfig.alpha:
        words.append(f"alpha {settings['loss.alpha']:g}")
    if settings["loss.gamma"] != LossConfig.gamma:
        words.append(f"gamma {settings['loss.gamma']:g}")
    if settings["data.text"] != "corpus":
        words.append(f"the model's own text ({settings['data.text']})")
    return ", ".join(words)


def _by_depth(cells: Cells, quantity: str, mode: str = "sampling") -> str:
    depths = range(1, next(iter(cells.values())).horizon + 1)
    found = {depth: over_seeds(cells, f"{quantity}:{depth}", mode) for depth in depths}
    return ", ".join(f"{depth}: {value.mean:.3f}" for depth, value in found.items() if value is not None) or "-"


def _components(cells: Cells) -> str:
    """Means over seeds."""
    weights = [record["likelihood"]["weights"] for record in cells.values()]
    rank = len(weights[0]["mean"])
    if rank == 1:
        return "-"
    effective, dead = (statistics.fmean(each[key] for each in weights) for key in ("effective", "dead"))
    return f"{effective:.2f} of {rank}, {dead:g} dead"


def _listed_tokens(records: list[Record]) -> str:
    """Which law the kept shares and likelihoods of cells with a shortlist are of."""
    listed = [record for record in records if record.config.get("loss", {}).get("draft_vocabulary", 0)]
    new = [record["likelihood"]["shortlist"] for record in listed if record["likelihood"]["shortlist"]]
    text = ""
    if new:
        covered = min(each["windows"] for each in new)
        text = (
            f"With a shortlist ({_listed({each['tokens'] for each in new})} tokens) kept shares are those of the drafts made from it, with what "
            "the target has elsewhere counted as lost; the joint NLL is that of the same law, over the windows that the list covers "
            f"({covered:.1%} of them at least)."
        )
    if len(new) < len(listed):
        text += (
            f"{' ' * bool(new)}{counted(len(listed) - len(new), 'record')} of an older version: kept shares and joint NLL of the law over the whole "
            "vocabulary, where training and drafts had a shortlist."
        )
    return text


def equal_training_table(families: list[Family]) -> Table:
    """From-scratch cells beside a pure next-token model of the same trunk, steps, rows and seed: speed at equal quality."""
    rows: list[tuple[str, ...]] = []
    for family in families:
        if family.target != "own" or not family.reference:
            continue
        plain = {record.seed: record for record in family.reference}
        for variant, rank in itertools.product(family.variants(), family.ranks()):
            cells = family.cells.get((variant, rank))
            if cells:
                rows.append(
                    (
                        family.label,
                        variant,
                        str(rank),
                        str(len(set(cells) & set(plain))),
                        _shown(over_seeds(cells, "first_token_nll")),
                        _shown(over_seeds(plain, "first_token_nll")),
                        _signed(difference(cells, plain, "first_token_nll")),
                        _shown(over_seeds(cells, "bits_per_byte"), bare=True),
                        _shown(over_seeds(plain, "bits_per_byte"), bare=True),
                        *(_shown(over_seeds(cells, "speedup_over_trunk", mode), 2) for mode in MODES),
                        *(_shown(over_seeds(cells, "speedup", mode), 2) for mode in MODES),
                    )
                )
    header = (
        "setting",
        "law",
        "rank",
        "pairs of seeds",
        "first-token NLL (nats)",
        "next-token model's NLL (nats)",
        "difference",
        "bits per byte",
        "next-token model's bits per byte",
        "speed-up over it, greedy",
        "speed-up over it, sampling",
        "over own plain, greedy",
        "over own plain, sampling",
    )
    caption = (
        "From-scratch cells beside a pure next-token model of equal training: the same trunk, steps, rows, data order and seed. "
        "First-token NLL: of the cells over positions with all n successors, of the next-token model over those with one. Speed-up over "
        "it: the cell's speculative decoding over the next-token model's plain decoding, which has no heads to evaluate, so that quality "
        "and speed can be weighed together. On a common target the frozen trunk is the next-token model: quality is equal by "
        "construction, and the speed-up is that over plain decoding."
    )
    return Table("references", caption, header, rows)


def baselines_table(families: list[Family]) -> Table:
    """How strong the baseline is: our plain decoding against Hugging Face's generate on the same weights."""
    rows: list[tuple[str, ...]] = []
    for family in families:
        found = [
            cells
            for (variant, _), cells in sorted(family.cells.items())
            if over_seeds(cells, "plain_over_generate") is not None
        ]
        if found:
            cells = max(found, key=len)
            rates = [
                f"{sum(m['tokens_per_second'][key] for m in modes) / len(modes):,.0f}"
                for mode in MODES
                for key in ("plain", "generate")
                if (modes := [m for r in cells.values() if (m := r.mode(mode)) and m["plain_over_generate"]])
            ]
            ratios = [_shown(over_seeds(cells, "plain_over_generate", mode), 2) for mode in MODES]
            rows.append((family.label, str(len(cells)), *rates, *ratios))
    header = (
        "setting",
        "seeds",
        "plain, greedy (tokens/s)",
        "generate, greedy (tokens/s)",
        "plain, sampling (tokens/s)",
        "generate, sampling (tokens/s)",
        "plain / generate, greedy",
        "plain / generate, sampling",
    )
    caption = (
        "The baseline: plain decoding with our loop, and Hugging Face generate on the same weights (shared, not copied), both with a "
        "cache, side by side. Own untied targets (eq. 11) have no counterpart in generate."
    )
    return Table("baselines", caption, header, rows)


def trunks_table(families: list[Family]) -> Table:
    """Pure next-token trunks: the common targets, and the references of equal training."""
    rows: list[tuple[str, ...]] = []
    for record in trunk_records(families):
        config, likelihood = record.config, record["likelihood"]
        first, bits = likelihood["first_token_nll"], likelihood["bits_per_byte"]
        rows.append(
            (
                str(record["name"]),
                str(config["corpus"]),
                str(config["size"]),
                f"{record['parameters']['total']:,}",
                str(config["optim"]["steps"]),
                f"{first['mean']:.4f} (sem {first['sem']:.4f})",
                _dash(bits, 4),
                record.path,
            )
        )
    header = ("trunk", "corpus", "size", "parameters", "steps", "first-token NLL (nats)", "bits per byte", "record")
    caption = "Next-token models: common targets of the heads, and references trained for as many steps as the from-scratch cells."
    return Table("trunks", caption, header, rows)


def cost_table(families: list[Family]) -> Table:
    """What training each cell cost, against what the machine can do."""
    rows: list[tuple[str, ...]] = []
    for family in families:
        for variant, rank in itertools.product(family.variants(), family.all_ranks()):
            cells = family.cells.get((variant, rank))
            if not cells:
                continue
            training = [record["training"] for record in cells.values()]
            counted = [each for each in training if each.get("flops_per_token") and each.get("matmul_flops_per_second")]
            values = (
                _average([each["step_ms_median"] for each in training], 1),
                _average([each["tokens_per_second"] for each in training], 0),
                _average([each["peak_memory_bytes"] / 2**30 for each in training], 2),
                _average([each["flops_per_token"] / 1e6 for each in counted], 1),
                _average([each["flops_per_token"] * each["tokens_per_second"] / 1e9 for each in counted], 1),
                _average([each["matmul_flops_per_second"] / 1e9 for each in counted], 1),
                _average([100 * each["matmul_fraction"] for each in counted], 1),
            )
            rows.append((family.label, variant, str(rank), str(len(cells)), *values))
    header = (
        "setting",
        "law",
        "rank",
        "seeds",
        "step (ms)",
        "tokens/s",
        "peak memory (GiB)",
        "MFLOPs per token",
        "GFLOP/s done",
        "GFLOP/s of a matrix product",
        "achieved (%)",
    )
    caption = (
        "Training cost, means over seeds (± their standard deviation). Step: median; memory: of the process (of the GPU, where there "
        "is one). FLOPs: matrix products and attention, forward and backward, counted on the first step, 2 per multiply-add; achieved: those done per second "
        "over the rate of a large square matrix product on the same device, threads and precision. -: the record is older than the count. "
        f"{described([record for family in families for record in family.records()], decoded=False)}"
    )
    return Table("cost", caption, header, rows)


# In the order of the report, after the claims.
TABLES = (
    cells_table,
    paired_table,
    beyond_table,
    retrofit_table,
    equal_training_table,
    baselines_table,
    cost_table,
    trunks_table,
)


def claims_text(verdicts: list[Verdict], notes: Sequence[str] = (), width: int = 118) -> str:
    """The claims table for a terminal."""
    widths = (8, 30, 0, 32)
    widths = (*widths[:2], width - sum(widths) - 3 * 2, widths[3])
    header = ("claim", "setting", "measured", "verdict")
    lines = [
        "  ".join(h.ljust(w) for h, w in zip(header, widths, strict=True)).rstrip(),
        "  ".join("-" * w for w in widths),
    ]
    for v in verdicts:
        cells = (v.claim.name, v.setting, "\n".join(n.text() for n in v.numbers) or "nothing", v.verdict)
        wrapped = [
            [part for line in cell.splitlines() for part in textwrap.wrap(line, w) or [""]]
            for cell, w in zip(cells, widths, strict=True)
        ]
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            lines.append("  ".join(part.ljust(w) for part, w in zip(parts, widths, strict=True)).rstrip())
    lines += [part for note in notes for part in textwrap.wrap(f"note: {note}", width, subsequent_indent="      ")]
    return "\n".join(lines)


def described(records: Sequence[Record], decoded: bool = True) -> str:
    """Sizes, seeds, steps, sequence length and hardware of some records, in one paragraph. decoded: what they wrote counts, too."""
    if not records:
        return "No records."
    sizes = sorted({f"{r.size} ({r['parameters']['trunk'] / 1e6:.1f}M trunk parameters)" for r in records})
    steps = _listed({r["training"]["steps"] for r in records})
    lengths = _listed({r.config["data"]["context"] for r in records})
    text = f"{counted(len(records), 'record')}; {', '.join(sizes)}; {seeds_text(list(records))}; {steps} steps; "
    text += f"rows of {lengths} tokens"
    trained = "; ".join(sorted({training_hardware(r) for r in records}))
    wrote = [(r, mode) for r in records for name in MODES if decoded and (mode := r.mode(name))]
    if not wrote:
        return f"{text}; trained on {trained}."
    prompts, spans = (_listed({mode[key] for _, mode in wrote}) for key in ("prompts", "new_tokens"))
    given = _listed({r.config["decode"]["prompt_tokens"] for r, _ in wrote})
    timed = "; ".join(sorted({decoding_hardware(r) for r, _ in wrote}))
    where = f"trained and decoded on {trained}" if trained == timed else f"trained on {trained}; decoded on {timed}"
    return f"{text}; {prompts} prompts of {given} tokens, {spans} new tokens each, batch 1; {where}."


def braces(names: Sequence[str]) -> str:
    """Paths in shell notation, a/x{1,2}-s{0,1}.json: as few patterns as merging one varying part after the other leaves."""
    end = ("",)  # so that no name is the beginning of another
    patterns: set[Pattern] = {(*((part,) for part in re.findall(r"\d+|[/-]|[^\d/-]+", name)), end) for name in names}
    for index in reversed(range(max(map(len, patterns), default=0))):
        alike: dict[tuple[Pattern, Pattern], set[str]] = {}
        for pattern in patterns:
            alike.setdefault((pattern[:index], pattern[index + 1 :]), set()).update(*pattern[index : index + 1])
        patterns = {
            before + ((tuple(sorted(parts, key=lambda part: (len(part), part))),) if parts else ()) + after
            for (before, after), parts in alike.items()
        }
    shown = ("".join(c[0] if len(c) == 1 else "{" + ",".join(c) + "}" for c in pattern) for pattern in patterns)
    return ", ".join(sorted(shown))


def _row(family: Family, variant: str, rank: int, added: str | None) -> tuple[str, ...]:
    cells = family.cells[variant, rank]
    record = next(iter(cells.values()))
    values = (
        _shown(over_seeds(cells, "joint_nll")),
        _shown(over_seeds(cells, "first_token_nll")),
        _shown(over_seeds(cells, "bits_per_byte"), bare=True),
        *(_shown(over_seeds(cells, "tokens_per_pass", mode)) for mode in MODES),
        *(_shown(over_seeds(cells, "speedup", mode), 2) for mode in MODES),
        _shown(over_seeds(cells, "speedup_over_rank1"), 2),
        _conversion(cells),
        _megaflops(record),
    )
    start = (family.label, variant, str(rank), str(len(cells)), f"{record['parameters']['trained']:,}")
    return (*start, *((added,) if added is not None else ()), *values)


def _added(family: Family, variant: str, rank: int) -> str:
    untied = family.cells.get(("untied", rank))
    if variant == "untied" or not untied:
        return "-"
    total = next(iter(family.cells[variant, rank].values()))["parameters"]["total"]
    return f"{total - next(iter(untied.values()))['parameters']['total']:+,}"


def _megaflops(record: Record) -> str:
    flops = record.draft_flops()
    return "-" if flops is None else f"{flops / 1e6:.2f}"


def _conversion(cells: Cells) -> str:
    modes = [mode for record in cells.values() if (mode := record.mode("sampling"))]
    if not modes:
        return "-"
    mean, limit = (sum(mode[key] for mode in modes) / len(modes) for key in ("conversion", "conversion_limit"))
    return f"{mean:.2f} / {limit:.2f}"


def _caption(start: str, families: list[Family], variants: Sequence[str] | None) -> str:
    kinds: Sequence[str | None] = [None] if variants is None else variants
    records = [record for family in families for variant in kinds for record in family.records(variant)]
    return (
        f"{start} Means over seeds with 95% intervals over test rows or prompts and seeds (one seed: rows or prompts only). "
        "Joint NLL: over all n tokens, positions with all n. Tokens per pass: plain decoding is 1.00. Speed-up: over plain "
        "decoding with the same weights and loop; conversion is speed-up / tokens per pass, its limit t(1)/t(n). "
        f"{described(records)}"
    )


def _shown(interval: Interval | None, digits: int = 3, bare: bool = False) -> str:
    if interval is None:
        return "-"
    return f"{interval.mean:.{digits}f}" if bare else interval.text(digits)


def _spread(interval: Interval | None, digits: int, sign: bool = False) -> str:
    if interval is None:
        return "-"
    return interval.text(digits, sign) + (f" ± {interval.spread:.{digits}f}" if interval.seeds > 1 else "")


def _signed(interval: Interval | None) -> str:
    return "-" if interval is None else interval.text(3, sign=True)


def _dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _average(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation where there are several values."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}"


def _listed(values: set[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


def _notes_markdown(notes: Sequence[str]) -> str:
    return "".join(f"\n- Note: {note}" for note in notes) + "\n" * bool(notes)


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"} | {
    c: "\\" + c for c in "&%$#_{}"
}


def _escaped(text: str) -> str:
    return re.sub("|".join(map(re.escape, sorted(_TEX, key=len, reverse=True))), lambda match: _TEX[match[0]], text)
