"""Committed records, shown in an MLflow store."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpdlm.config import flat
from cpdlm.progress import Bar
from experiments.tracking import store
from experiments.tracking.store import Tracker

if TYPE_CHECKING:
    from experiments.claims import Verdict
    from experiments.records import Record


def import_records(results: Path, uri: str, figures: Path | None = None) -> int:
    """Show committed records in a store. Returns how many were new.

    An experiment per claim has a parent run per results folder, and that a child per record. A
    record that is there already (by its sha256) is skipped, so a second import adds nothing. Where there is a new one,
    every parent's note is renewed: the command, and each verdict that rests on the folder; the page and the pictures of
    `figures` are attached. A claim that is answered from other claims' cells alone has a parent without children, which
    says whose. Raises RuntimeError without mlflow or with a store that fails, RecordError where `results` is no folder.
    """
    if not store.is_installed():
        raise RuntimeError("mlflow is not installed; pip install mlflow")
    from experiments.claims import judge
    from experiments.families import families_of
    from experiments.records import load_all

    records, damaged = load_all(results)
    for line in damaged:
        store.warn(line)
    verdicts = judge(families_of(records)[0])
    try:
        known = _imported(store.client_of(uri))
    except Exception as error:
        raise RuntimeError(f"the MLflow store {store.shown(uri)} cannot be used: {store.first_line(error)}") from error
    folders: dict[str, list[Record]] = {}
    digests = {}
    for record in records:
        folders.setdefault(Path(record.path).parent.as_posix(), []).append(record)
        digests[record.path] = hashlib.sha256((results / record.path).read_bytes()).hexdigest()
    if all(digest in known for digest in digests.values()):
        return 0
    pictures = [*figures.glob("report.html"), *sorted(figures.glob("*.png"))] if figures is not None else []
    claims = {verdict.claim.id for verdict in verdicts if verdict.records}
    borrowed = claims - {_claim_of(folder) for folder in folders}
    count, bar = 0, Bar(total=len(set(digests.values()) - set(known)), desc="importing records", unit="record")
    for folder in (*folders, *sorted(borrowed)):
        mine = folders.get(folder, [])
        name = f"cpdlm {_claim_of(folder)}"
        note = _note(folder, sorted({str(record["profile"]) for record in mine}), verdicts)
        tags = {"import": folder, "kind": "sweep", "claim": _claim_of(folder), "mlflow.note.content": note}
        parent = _parent(uri, name, f"records: {folder}" if mine else f"verdicts: {folder}", tags, known)
        for picture in pictures:
            parent.figure(picture)
        parent.end()
        for record in mine:
            if (digest := digests[record.path]) not in known:
                count += _show(record, results / record.path, digest, uri, name, parent.run_id)
                bar.update()
    bar.close()
    return count


def _claim_of(folder: str) -> str:
    """The claim that a folder of results is about, else its own name: C6 for C6-long, beyond for beyond."""
    name = Path(folder).name or "single"
    found = re.match(r"C\d+(?=$|-)", name)
    return found[0] if found else name


def _imported(client: Any) -> dict[str, str]:
    """Run ids by record_sha256 and by import, over the experiments of all claims."""
    known: dict[str, str] = {}
    ids = [found.experiment_id for found in client.search_experiments() if found.name.startswith("cpdlm ")]
    token: str | None = None
    while ids:
        page = client.search_runs(ids, max_results=1000, page_token=token)
        for run in page:
            known |= {
                run.data.tags[key]: run.info.run_id for key in ("record_sha256", "import") if key in run.data.tags
            }
        token = page.token
        if not token:
            break
    return known


def _parent(uri: str, experiment: str, name: str, tags: dict[str, str], known: Mapping[str, str]) -> Tracker:
    """The parent run of an import: the one that is there, its note renewed, or a new one."""
    if tags["import"] not in known:
        return store.create_run(uri, experiment, name, tags)
    tracker = Tracker(store.client_of(uri), known[tags["import"]], uri)
    tracker.tags(tags)
    return tracker


def _note(folder: str, profiles: list[str], verdicts: list[Verdict]) -> str:
    """Markdown: what makes the records of a folder, and the verdicts that rest on them.

    Of a claim without a folder: its own verdicts, and the folders whose cells answer it.
    """
    from experiments.report.figures import command

    about = [verdict for verdict in verdicts if verdict.claim.id == _claim_of(folder)]
    resting = [verdict for verdict in verdicts if folder in _folders([verdict])]
    if profiles:
        made = next((verdict.claim.id for verdict in (*about, *resting)), "all")
        lines = [f"Records of `results/{folder}` ({', '.join(profiles)}). Each run names its own command."]
    else:
        resting = about
        made, lenders = folder, ", ".join(f"`{lender}`" for lender in sorted(_folders(about)))
        lines = [f"{folder} is answered from the cells of {lenders}."]
    lines[0] += f" `{command(made)}` makes what is missing."
    for claim in dict.fromkeys(verdict.claim for verdict in resting):
        lines += ["", f"**{claim.name}: {claim.question}**", ""]
        lines += [
            f"- {verdict.setting}: **{verdict.verdict}**. {verdict.measured()}"
            for verdict in resting
            if verdict.claim == claim
        ]
    return "\n".join(lines)


def _folders(verdicts: list[Verdict]) -> set[str]:
    return {Path(path).parent.as_posix() for verdict in verdicts for path in verdict.records}


def _show(record: Record, path: Path, digest: str, uri: str, experiment: str, parent: str) -> bool:
    """A finished run for one record; False where the store did not take it."""
    content = record.content
    tags = store.tags_of(content["config"], record.variant, record.target, content["commit"], content["command"])
    started = int(datetime.datetime.fromisoformat(content["started"]).timestamp() * 1000)
    tags |= {"name": content["name"], "record_sha256": digest, "mlflow.parentRunId": parent}
    tracker = store.create_run(uri, experiment, store.short_name(content["name"]), tags, started)
    tracker.params(flat(content["config"]))
    tracker.curve(store.curve_of(content["training"]))
    store.log_content(tracker, content, path)
    tracker.end(when=started + int(1000 * sum(content["seconds"].values())))
    return bool(tracker.run_id)
