"""The report as one page: the answers, each claim beside the figure that decides it, and all else folded.

One file that asks for nothing outside itself: pictures are embedded, style and script (page.css, page.js) are inlined,
and its content security policy lets nothing else load. The same records give the same bytes.
"""

import base64
import html
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from cpdlm.files import write_bytes
from experiments.claims import Claim, Verdict, answers
from experiments.claims.verdict import CONTRADICTED, HOLDS, RULED
from experiments.records import MODES, Record, decoding_hardware, is_busy, training_hardware
from experiments.report.figures import Shown
from experiments.report.figures.style import COLUMN, DPI, worded
from experiments.report.table import Made, Table, braces, described

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_COLOURS = 48  # of an embedded picture: a quarter of the bytes, and no difference to be seen
_CLASSES = {HOLDS: "holds", CONTRADICTED: "fails"}
_TITLE = "Rank-r joint heads: what the records say"
_LEAD = (
    "Claims of arXiv 2410.17765, judged by the rule of each claim; a row says where that is younger than its records. "
    "Intervals are 95% unless marked, over test rows or prompts and over seeds. All of it is a function of the records "
    "under `results/`, drawn by `./dev report`. A click enlarges a figure."
)
_COLUMNS = 11  # that a table shows at once; the others are a tick away
_TELLING = re.compile(
    r"(setting|corpus|model|trunk|target|method|mode|law|variant|heads|rank|n|drafter|strategy|chosen)$"
    r"|joint NLL|tokens per (pass|forward)|speed-up|speed over|over rank 1"
)


def write(
    path: Path,
    records: Sequence[Record],
    verdicts: Sequence[Verdict],
    figures: Sequence[Shown],
    tables: Sequence[Made],
    notes: Sequence[str],
) -> Path:
    """Write the page to `path`, which is returned. Raises WriteError."""
    by_claim = [(claim, list(group)) for claim, group in itertools.groupby(verdicts, key=lambda verdict: verdict.claim)]
    deciding = {claim.figure for claim, _ in by_claim}
    further = [each for each in figures if each.name not in deciding]
    listed = [f"<li>{_text(note)}</li>" for note in (described(records), *notes)]
    folded = {
        "figures": ("Further figures", "\n".join(map(_figure, further))),
        "tables": ("Tables", _tables(tables)),
        "records": ("Records", _records(records)),
        "notes": ("Notes", f'<ul class="notes">{"".join(listed)}</ul>'),
    }
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in folded.items())
    body = "\n".join(
        f'<details class="section" id="{name}"><summary>{title}</summary>\n{content}\n</details>'
        for name, (title, content) in folded.items()
    )
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>cpdlm: what the records say</title>
<style>
{_resource("page.css")}</style>
</head>
<body>
<header>
<h1>{_TITLE}</h1>
<p class="soft">{_text(_LEAD)}</p>
</header>
<main>
{_answers(by_claim)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
{_claims(by_claim, {each.name: each for each in figures})}
{body}
</main>
<script>
{_resource("page.js")}</script>
</body>
</html>
"""
    write_bytes(path, page.encode())
    return path


# --- claims ----------------------------------------------------------------------------------------------------------


def _answers(by_claim: Sequence[tuple[Claim, list[Verdict]]]) -> str:
    """A row per claim: its question, the answer, and the number that gives it."""
    rows = []
    for claim, group in by_claim:
        (answer,) = answers(group)
        rows.append(
            f'<tr><th scope="row"><a href="#{_anchor(claim)}">{_text(claim.name)}</a></th>'
            f"<td>{_text(claim.question)}</td><td>{_word(_deciding(group), answer.answer)}</td>"
            f"<td>{_text(answer.number)}</td></tr>"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("claim", "question", "answer", "the number"))
    body = "\n".join(rows)
    return f'<table id="answers"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def _deciding(group: Sequence[Verdict]) -> Verdict:
    """The first that was run: a claim's rows come with the most evidence first."""
    return next((verdict for verdict in group if verdict.numbers), group[0])


def _claims(by_claim: Sequence[tuple[Claim, list[Verdict]]], figures: dict[str, Shown]) -> str:
    """A claim beside the figure that decides it; a figure of two claims stands at the first, and the other names it."""
    parts: list[str] = []
    placed: dict[str, Claim] = {}
    for claim, group in by_claim:
        first = _deciding(group)
        others = [verdict for verdict in group if verdict is not first]
        rest = _folded(f"{len(others)} other settings", "\n".join(map(_verdict, others))) if others else ""
        how = (
            f"<p>{_text(claim.statistic)}. {_text(claim.rule)}.</p>"
            f"<p>Records of its first setting: <code>{html.escape(first.command)}</code>.</p>"
        )
        shown = figures.get(claim.figure)
        if there := placed.get(claim.figure):
            picture = (
                f'<p class="soft">Its figure stands beside <a href="#{_anchor(there)}">{_text(there.name)}</a>.</p>'
            )
        else:
            picture = _figure(shown) if shown is not None else ""
            placed[claim.figure] = claim
        parts.append(
            f'<article class="claim" id="{_anchor(claim)}">\n<div>\n'
            f"<h2>{_text(claim.name)} · {_text(claim.question)}</h2>\n"
            f'<p class="soft">The paper: {_text(claim.expected)}.</p>\n{_verdict(first)}\n{rest}\n'
            f"{_folded('How it is judged', how)}\n</div>\n{picture}\n</article>"
        )
    return "\n".join(parts)


def _anchor(claim: Claim) -> str:
    return html.escape(claim.name.replace(" ", "-"))


def _word(verdict: Verdict, said: str = "") -> str:
    return f'<span class="word {_CLASSES.get(verdict.word, "open")}">{_text(said or verdict.phrase)}</span>'


def _verdict(verdict: Verdict) -> str:
    numbers = "".join(f"<li>{_text(number.text())}</li>" for number in verdict.numbers) or "<li>nothing measured</li>"
    reason = f'<p class="reason">{_text(verdict.reason)}</p>' if verdict.reason else ""
    beside = "".join(f"<li>{_text(number.text())}</li>" for number in verdict.beside)
    if verdict.is_ruled_after:
        reason += f'<p class="soft">Judged by a rule of {RULED[:10]}, younger than its records.</p>'
    if verdict.numbers:
        reason += f'<p class="soft">Could have seen {_text(verdict.visible)}.</p>'
    cited = f"<code>{html.escape(braces(verdict.records))}</code>"
    return (
        f'<div class="verdict"><p>{_word(verdict)} <span class="soft">{_text(worded(verdict.setting))}</span></p>\n'
        f"<ul>{numbers}</ul>{reason}"
        + (_folded(f"{len(verdict.beside)} numbers beside it", f"<ul>{beside}</ul>") if verdict.beside else "")
        + (_folded(f"{len(verdict.records)} records", cited) if verdict.records else "")
        + "</div>"
    )


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


# --- figures ---------------------------------------------------------------------------------------------------------


def _figure(shown: Shown) -> str:
    """A picture that a click enlarges, over its folded caption; or what is missing and how to make it."""
    if shown.picture is None:
        missing = f'<p class="missing"><b>{_text(shown.title)}</b>: not drawn, {_text(shown.caption)}.</p>'
        return f'<figure id="figure-{shown.name}">{missing}</figure>'
    content, width, height = _embedded(shown.picture)
    kind = "wide" if width > 1.2 * COLUMN * DPI else "narrow"  # two columns of a paper, or one
    image = f'<img src="data:image/png;base64,{content}" width="{width}" height="{height}" alt="{_text(shown.title)}">'
    return (
        f'<figure class="{kind}" id="figure-{shown.name}">\n'
        f'<label class="zoom"><input type="checkbox" aria-label="enlarge {_text(shown.title)}">'
        f"<span>{image}</span></label>\n"
        f"<figcaption>{_folded(shown.title, f'<p>{_text(shown.caption)}</p>')}</figcaption>\n</figure>"
    )


def _embedded(path: Path) -> tuple[str, int, int]:
    """(base64 of the picture with fewer colours, width, height)."""
    from PIL import Image

    memory = io.BytesIO()
    with Image.open(path) as picture:
        width, height = picture.size
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
        white.quantize(_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(memory, "PNG", optimize=True)
    return base64.b64encode(memory.getvalue()).decode(), width, height


# --- tables ----------------------------------------------------------------------------------------------------------


def _tables(tables: Sequence[Made]) -> str:
    lead = '<p class="soft">The same tables are Markdown, LaTeX and CSV under <code>tables/</code>.</p>'
    parts = [
        f'<details id="table-{each.name}"><summary>{_text(each.title)}</summary>\n{_table(each.table)}</details>'
        for each in tables
        if isinstance(each.table, Table) and each.table.rows
    ]
    return "\n".join([lead, *parts])


def _table(table: Table) -> str:
    shown = _shown(table)
    head = "".join(f'<th scope="col"{_more(name, shown)}>{_text(name)}</th>' for name in table.header)
    rows = [
        "".join(
            f"<td{_more(name, shown)}>{html.escape(worded(cell))}</td>"
            for name, cell in zip(table.header, row, strict=True)
        )
        for row in table.rows
    ]
    return f"{_whole(head, rows, len(table.header) - len(shown))}\n<p class=soft>{_text(table.caption)}</p>"


def _shown(table: Table) -> set[str]:
    """The columns that tell rows apart, then the telling ones, as many as fit; all where there are few."""
    if len(table.header) < _COLUMNS:
        return set(table.header)
    apart = next((n for n in range(1, _COLUMNS) if len({row[:n] for row in table.rows}) == len(table.rows)), 2)
    telling = [name for name in table.header[apart:] if _TELLING.search(name)] or table.header[apart:]
    return {*table.header[:apart], *telling[: _COLUMNS - apart]}


def _whole(head: str, rows: Iterable[str], hidden: int) -> str:
    """A table whose columns of class `more` are shown by a tick."""
    tick = f'<label class="columns"><input type="checkbox"> show {hidden} more columns</label>\n' if hidden else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="table">{tick}<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div></div>"
    )


def _more(name: str, shown: Iterable[str]) -> str:
    return "" if name in shown else " class=more"


# --- records ---------------------------------------------------------------------------------------------------------

_SHOWN = {"record", "corpus", "target", "heads", "rank", "n", "joint NLL"} | {
    f"{what}, {mode}" for what in ("tokens per forward", "speed-up") for mode in MODES
}
_TEXTS = ("record", "corpus", "trunk", "target", "heads", "balance", "commit", "trained on", "decoded on", "command")


def _records(records: Sequence[Record]) -> str:
    """Every record, a row each; a script sorts and filters them."""
    rows = [_row(record) for record in records]
    names = list(rows[0]) if rows else []
    head = "".join(
        f'<th scope="col" class="{_class(name)}"><button type="button">{name}</button></th>' for name in names
    )
    body = ["".join(_cell(name, value) for name, value in row.items()) for row in rows]
    return (
        '<div class="filter"><label for="filter">Filter</label><input id="filter" type="search" '
        'placeholder="words that a row must have: code untied r8"><output id="count"></output></div>\n'
        + _whole(head, body, len(set(names) - _SHOWN))
    )


def _row(record: Record) -> dict[str, str]:
    config, likelihood, training = record.config, record["likelihood"], record["training"]
    bits, modes = likelihood["bits_per_byte"], {mode: record.mode(mode) for mode in MODES}
    row = {
        "record": record.path.removesuffix(".json"),
        "corpus": Path(str(config["corpus"])).name,
        "trunk": record.size,
        "target": record.target,
        "heads": record.variant,
        "rank": str(record.rank),
        "n": str(record.horizon),
        "seed": str(record.seed),
        "balance": str(config["balance"]),
        "steps": str(training["steps"]),
        "joint NLL": f"{likelihood['joint_nll']['mean']:.3f}",
        "first-token NLL": f"{likelihood['first_token_nll']['mean']:.3f}",
        "bits per byte": "-" if bits is None else f"{bits:.3f}",
    }
    for mode, measured in modes.items():
        row[f"tokens per forward, {mode}"] = f"{measured['tokens_per_pass']['mean']:.2f}" if measured else "-"
    for mode, measured in modes.items():
        row[f"speed-up, {mode}"] = f"{measured['speedup']['median']:.2f}" if measured else "-"
    dirty = " + changes" if record["dirty"] else ""
    return row | {
        "step (ms)": f"{training['step_ms_median']:.1f}",
        "memory (GiB)": f"{training['peak_memory_bytes'] / 2**30:.2f}",
        "commit": f"{record['commit'][:10]}{dirty}",
        "trained on": training_hardware(record),
        "decoded on": "; ".join(filter(None, (decoding_hardware(record), is_busy(record)))),
        "command": str(record["command"]),
    }


def _class(name: str) -> str:
    return " ".join(["number"] * (name not in _TEXTS) + ["more"] * (name not in _SHOWN))


def _cell(name: str, value: str) -> str:
    shown = f"<code>{html.escape(value)}</code>" if name == "command" else html.escape(value)
    classes = _class(name)
    return f'<td class="{classes}">{shown}</td>' if classes else f"<td>{shown}</td>"


# --- parts -----------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """Escaped, `code` in backticks, and the captions' mathematics ($x_{t+k}$) as subscripts."""
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\b([a-z])_\{([^}]+)\}", r"\1<sub>\2</sub>", escaped)


def _resource(name: str) -> str:
    return files("experiments.report").joinpath(name).read_text(encoding="utf-8")
