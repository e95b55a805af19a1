"""The report as one page that a person reads: claims and verdicts, figures with their captions, tables, every record.

One file that asks for nothing outside itself: pictures are embedded, style and script (page.css, page.js) are inlined, and
its content security policy lets nothing else load. The same records give the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from cpdlm.files import write_bytes
from experiments.claims import FAILS, HOLDS, Verdict
from experiments.families import Family
from experiments.records import Record, decoding_hardware, training_hardware
from experiments.report.figures import ADDING, Shown, command
from experiments.report.figures.style import COLUMN, DPI
from experiments.report.tables import TABLES, Made, braces, described, title_of

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_COLOURS = 128  # of an embedded picture: a third of the bytes, and no difference to be seen
_CLASSES = {HOLDS: "holds", FAILS: "fails"}


def write(
    path: Path,
    records: Sequence[Record],
    families: list[Family],
    verdicts: Sequence[Verdict],
    figures: Sequence[Shown],
    benchmarks: Sequence[Made],
    notes: Sequence[str],
) -> Path:
    """Write the page to `path`, which is returned. Raises WriteError."""
    sections = {
        "claims": ("Claims", _claims(verdicts)),
        "figures": ("Figures", _figures(figures)),
        "tables": ("Tables", _tables(families, benchmarks)),
        "records": ("Records", _records(records)),
        "notes": ("Notes", _notes(notes)),
    }
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in sections.items())
    body = "\n".join(
        f'<section id="{name}">\n<h2>{title}</h2>\n{content}\n</section>' for name, (title, content) in sections.items()
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
<h1>Rank-r joint heads: what the records say</h1>
<p class="lead">Claims of arXiv 2410.17765, tested by rules that were fixed before the runs (results/LOG.md dates each change). Everything here is a function of the
records under <code>results/</code>, drawn by <code>./dev report</code>; each record names its command, commit, seed and hardware.</p>
<p class="notes">{_text(described(records))}</p>
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
<script>
{_resource("page.js")}</script>
</body>
</html>
"""
    write_bytes(path, page.encode())
    return path


def _claims(verdicts: Sequence[Verdict]) -> str:
    parts = []
    for claim, group in itertools.groupby(verdicts, key=lambda verdict: verdict.claim):
        settings = "\n".join(map(_verdict, group))
        parts.append(
            f'<article class="claim" id="{html.escape(claim.id)}">\n<h3>{html.escape(claim.id)} · {_text(claim.question)}</h3>\n'
            f'<p class="facts">The paper: {_text(claim.expected)}.</p>\n{settings}\n'
            f"<details><summary>How it is judged</summary><p>{_text(claim.statistic)}. {_text(claim.rule)}.</p>"
            f"<p>Its records: <code>{html.escape(command(claim.id))}</code> ({_text(ADDING)}).</p></details>\n</article>"
        )
    lead = (
        '<p class="soft">Intervals are 95% unless marked, over test rows or prompts and over seeds. '
        '"Not measurable here" says why: no records, too few seeds, or an interval that decides nothing.</p>'
    )
    return "\n".join([_at_a_glance(verdicts), lead, *parts])


def _at_a_glance(verdicts: Sequence[Verdict]) -> str:
    """A line per claim: its question and the words of its verdicts."""
    lines = []
    for claim, group in itertools.groupby(verdicts, key=lambda verdict: verdict.claim):
        words = "".join(
            f'<span class="word {_CLASSES.get(verdict.word, "open")}" title="{_text(verdict.setting)}">{_text(verdict.word)}</span>'
            for verdict in group
        )
        lines.append(
            f'<li><a href="#{html.escape(claim.id)}">{html.escape(claim.id)}</a> <span>{_text(claim.question)}</span> '
            f"<span>{words}</span></li>"
        )
    return f'<ul class="glance">{"".join(lines)}</ul>'


def _verdict(verdict: Verdict) -> str:
    numbers = "".join(f"<li>{_text(number.text())}</li>" for number in verdict.numbers) or "<li>nothing measured</li>"
    reason = f'<div class="reason">{_text(verdict.reason)}</div>' if verdict.reason else ""
    beside = "".join(f"<li>{_text(number.text())}</li>" for number in verdict.beside)
    beside = (
        f"<details><summary>{len(verdict.beside)} numbers beside it</summary><ul>{beside}</ul></details>"
        if beside
        else ""
    )
    cited = braces(verdict.records)
    cited = (
        f"<details><summary>{len(verdict.records)} records</summary><code>{html.escape(cited)}</code></details>"
        if cited
        else ""
    )
    return (
        f'<div class="verdict"><div><span class="word {_CLASSES.get(verdict.word, "open")}">{_text(verdict.word)}</span>'
        f'<div class="setting">{_text(verdict.setting)}</div></div>\n<div><ul>{numbers}</ul>{reason}{beside}{cited}</div></div>'
    )


def _figures(figures: Sequence[Shown]) -> str:
    drawn = [_figure(each) for each in figures if each.picture is not None]
    missing = [
        f'<div class="missing" id="figure-{each.name}"><h3>{_text(each.title)}</h3>: not drawn, {_text(each.caption)}.</div>'
        for each in figures
        if each.picture is None
    ]
    return "\n".join([*drawn, *missing])


def _figure(shown: Shown) -> str:
    assert shown.picture is not None
    content, width, height = _embedded(shown.picture)
    kind = "wide" if width > 1.2 * COLUMN * DPI else "narrow"  # two columns of a paper, or one
    return (
        f'<figure class="{kind}" id="figure-{shown.name}">\n<h3>{_text(shown.title)}</h3>\n'
        f'<div class="picture"><img src="data:image/png;base64,{content}" width="{width}" height="{height}" '
        f'alt="{_text(shown.title)}"></div>\n<figcaption>{_text(shown.caption)}</figcaption>\n</figure>'
    )


def _embedded(path: Path) -> tuple[str, int, int]:
    """(base64 of the picture with fewer colours, width, height)."""
    from PIL import Image

    memory = io.BytesIO()
    with Image.open(path) as picture:
        width, height = picture.size
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
        white.quantize(_COLOURS, dither=Image.Dither.NONE).save(memory, "PNG", optimize=True)
    return base64.b64encode(memory.getvalue()).decode(), width, height


def _tables(families: list[Family], benchmarks: Sequence[Made]) -> str:
    entries = [(title_of(make), make(families)) for make in TABLES]
    entries += [(each.title, each.table) for each in benchmarks if not isinstance(each.table, str)]
    parts = [
        f'<details id="table-{table.name}"><summary>{_text(title)}</summary>\n<div class="scroll">{table.html()}</div></details>'
        for title, table in entries
        if table.rows
    ]
    lead = '<p class="soft">The same tables are Markdown, LaTeX and CSV under <code>tables/</code>.</p>'
    return "\n".join([lead, *parts])


_NUMBERS = (
    "rank",
    "n",
    "seed",
    "steps",
    "joint NLL",
    "first-token NLL",
    "bits per byte",
    "tokens per pass, greedy",
    "tokens per pass, sampling",
    "speed-up, greedy",
    "speed-up, sampling",
    "step (ms)",
    "memory (GiB)",
)


def _records(records: Sequence[Record]) -> str:
    """Every record, a row each; a script sorts and filters them."""
    rows = [_row(record) for record in records]
    head = "".join(
        f'<th scope="col"{" class=number" if name in _NUMBERS else ""}><button type="button">{name}</button></th>'
        for name in (rows[0] if rows else ())
    )
    body = "\n".join("<tr>" + "".join(_cell(name, value) for name, value in row.items()) + "</tr>" for row in rows)
    return (
        '<div class="filter"><label for="filter">Filter</label><input id="filter" type="search" '
        'placeholder="words that a row must have: code untied r8"><output id="count"></output></div>\n'
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _row(record: Record) -> dict[str, str]:
    config, likelihood, training = record.config, record["likelihood"], record["training"]
    modes = {mode: record.mode(mode) for mode in ("greedy", "sampling")}
    bits = likelihood["bits_per_byte"]
    row = {
        "record": record.path.removesuffix(".json"),
        "corpus": Path(str(config["corpus"])).name,
        "trunk": record.size,
        "target": record.target,
        "law": record.variant,
        "rank": str(record.rank),
        "n": str(record.horizon),
        "seed": str(record.seed),
        "balance": str(config.get("balance", "-")),
        "steps": str(training["steps"]),
        "joint NLL": f"{likelihood['joint_nll']['mean']:.3f}",
        "first-token NLL": f"{likelihood['first_token_nll']['mean']:.3f}",
        "bits per byte": "-" if bits is None else f"{bits:.3f}",
    }
    for mode, measured in modes.items():
        row[f"tokens per pass, {mode}"] = f"{measured['tokens_per_pass']['mean']:.2f}" if measured else "-"
    for mode, measured in modes.items():
        row[f"speed-up, {mode}"] = f"{measured['speedup']['median']:.2f}" if measured else "-"
    dirty = " + changes" if record["dirty"] else ""
    return row | {
        "step (ms)": f"{training['step_ms_median']:.1f}",
        "memory (GiB)": f"{training['peak_memory_bytes'] / 2**30:.2f}",
        "commit": f"{record['commit'][:10]}{dirty}",
        "trained on": training_hardware(record),
        "decoded on": decoding_hardware(record),
        "command": str(record["command"]),
    }


def _cell(name: str, value: str) -> str:
    if name == "command":
        return f'<td class="command"><code>{html.escape(value)}</code></td>'
    return f"<td class=number>{value}</td>" if name in _NUMBERS else f"<td>{html.escape(value)}</td>"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return "<p>None.</p>"
    return '<ul class="notes">' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>"


def _text(text: str) -> str:
    """Escaped, `code` in backticks, and the captions' mathematics ($x_{t+k}$) as subscripts."""
    escaped = html.escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\b([a-z])_\{([^}]+)\}", r"\1<sub>\2</sub>", escaped)


def _resource(name: str) -> str:
    return files("experiments.report").joinpath(name).read_text(encoding="utf-8")
