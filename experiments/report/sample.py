"""The picture of a generation, in which accepted drafts have a colour: an SVG of the record `sample.json`."""

from html import escape
from pathlib import Path

from cpdlm.files import write_bytes
from experiments.report.benchmarks import Benchmark, made_of, read_benchmark

NAME = "sample"
WIDTH, LINE, LETTER, MARGIN = 760, 19, 8.0, 14
COLOURS = {"prompt": "#8b949e", "target": "#e6edf3", "draft": "#56d364"}


def draw(results: Path, folder: Path) -> list[Path]:
    """The file; none without a record that can be shown."""
    record = read_benchmark(results, NAME)
    picture = record if isinstance(record, str) else made_of(NAME, svg, record)
    path = folder / f"{NAME}.svg"
    if not picture.startswith("<svg"):
        path.unlink(missing_ok=True)
        return []
    write_bytes(path, picture.encode())
    return [path]


def svg(record: Benchmark) -> str:
    """A line of text for each of the generation's, in which each piece stands where its letters end up."""
    pieces = [(record["prompt"], "prompt")]
    pieces += [(piece, "draft" if drafted else "target") for piece, drafted in record["pieces"]]
    spans, row, column = [], 0, 0
    for text, kind in pieces:
        for index, part in enumerate(text.split("\n")):
            row, column = (row + 1, 0) if index else (row, column)
            if part.strip():
                place = f'x="{MARGIN + column * LETTER:g}" y="{MARGIN + (row + 1) * LINE:g}"'
                spans.append(f'<text {place} fill="{COLOURS[kind]}" xml:space="preserve">{escape(part)}</text>')
            column += len(part)
    rows, tokens = row + 3, len(record["pieces"])
    said = (
        f"{tokens} tokens in {record['forwards']} target forwards: {tokens / record['forwards']:.2f} per forward. "
        "Green: drafted and accepted."
    )
    height = 2 * MARGIN + rows * LINE
    last = f'<text x="{MARGIN}" y="{MARGIN + rows * LINE}" fill="{COLOURS["prompt"]}">{said}</text>'
    frame = f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#0d1117"/>'
    font = f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{LETTER / 0.6:.2f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {font}>'
    return "\n".join([head, frame, *spans, last, "</svg>", ""])
