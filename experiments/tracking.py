"""MLflow, kept at arm's length: it shows a run, and can neither change nor lose one.

The record is the result; MLflow is a view of it. Where mlflow is not installed, or its store stops answering, one warning
is given and the run goes on. The store is always passed explicitly (tracking.uri, else MLFLOW_TRACKING_URI, else SQLite in
the output folder). mlflow is imported inside functions only.

    python -m experiments.tracking import --results results --uri sqlite:///runs/mlflow.db
    python -m experiments.tracking ui runs
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpdlm.config import Config, as_yaml, flat, flatten, to_dict
from cpdlm.files import write_json
from cpdlm.processes import is_first_process

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger

    from experiments.claims import Verdict
    from experiments.records import Record

RUN_FILE, DATABASE, ARTIFACTS = "mlflow.json", "mlflow.db", "mlartifacts"
VIEW = "cells"  # the saved view of an experiment: #/experiments/ID/runs?viewStateShareKey=cells
PATIENCE = 3  # failures in a row after which a run stops trying
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # A server that is gone must cost seconds: the defaults retry for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}


class Tracker:
    """One MLflow run, or nothing: every method does nothing where tracking is off, and never raises.

    run_id: "" when off. logger: for Lightning's Trainer, None when off.
    """

    def __init__(self, client: Any = None, run_id: str = "", uri: str = "") -> None:
        self.run_id, self.uri = run_id, uri
        self.logger: MLFlowLogger | None = None
        self._client, self._failures = client, 0

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step; anything that is not a number is left out."""
        self.curve([{"step": step, **values}])

    def curve(self, points: list[dict[str, float]]) -> None:
        """Log [{"step", name: value, ...}], many at a time."""

        def log() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            found = [
                Metric(_name(key), float(value), now, int(point["step"]))
                for point in points
                for key, value in point.items()
                if key != "step" and isinstance(value, int | float)
            ]
            for start in range(0, len(found), 500):
                self._client.log_batch(self.run_id, metrics=found[start : start + 500])

        self.attempt(log)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings; written once, since MLflow refuses to change one."""

        def log() -> None:
            from mlflow.entities import Param

            found = [Param(key, str(value)[:500]) for key, value in values.items()]
            for start in range(0, len(found), 100):
                self._client.log_batch(self.run_id, params=found[start : start + 100])

        self.attempt(log)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier one."""

        def log() -> None:
            from mlflow.entities import RunTag

            self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:7900]) for key, value in values.items()])

        self.attempt(log)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copy a file into the run's artefacts."""
        self.attempt(lambda: self._client.log_artifact(self.run_id, str(path), folder or None))

    def text(self, content: str, name: str) -> None:
        """Store text as an artefact of that name."""
        self.attempt(lambda: self._client.log_text(self.run_id, content, name))

    def end(self, status: str = "FINISHED", when: int | None = None) -> None:
        """FINISHED, FAILED or KILLED. when: milliseconds since 1970 (default: now)."""
        self.attempt(lambda: self._client.set_terminated(self.run_id, status, when))

    def attempt(self, action: Callable[[], Any]) -> None:
        """Run it; a failure warns once, and after PATIENCE of them in a row no more is tried."""
        if not self.run_id or self._failures >= PATIENCE:
            return
        try:
            action()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            _warn(
                f"MLflow at {_shown(self.uri)} did not take a write ({_first_line(error)}); the run and its record go on without it"
            )


def tracking_uri(config: Config) -> str:
    """The store of a run: tracking.uri, else MLFLOW_TRACKING_URI, else SQLite in the output folder."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(Path(config.output))


def default_uri(output: Path) -> str:
    return f"sqlite:///{(output / DATABASE).resolve()}"


@contextlib.contextmanager
def cell_run(config: Config, command: str, folder: Path) -> Iterator[Tracker]:
    """The MLflow run of one cell, with params, tags, config.yaml and system metrics; continued when the cell resumes.

    Yields a Tracker (off where tracking.mlflow=false, mlflow is missing, or in a helper process of a distributed run);
    marks the run FAILED on an exception and KILLED on Ctrl-C.
    """
    if not config.tracking.mlflow or not is_first_process() or not _installed():
        yield Tracker()
        return
    tracker = _open(config, command, folder)
    if tracker.run_id:
        tracker.logger = _lightning_logger(tracker, config.tracking.experiment)
    monitor = _system_metrics(tracker)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Interrupted" else "FAILED"
        raise
    finally:
        if monitor is not None:
            tracker.attempt(monitor.finish)
        tracker.end(status)


def log_record(config: Config, path: Path, figures: list[Path] | None = None) -> None:
    """Add the finished record (final metrics and the file) and figures to the cell's run, once it is written."""
    if not config.tracking.mlflow or not _installed():
        return
    tracker = _continued(Path(config.output) / config.run_name, tracking_uri(config))
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        _warn(f"{path} was not logged to MLflow: {error}")
        return
    _log_content(tracker, content, path)
    for figure in figures or []:
        tracker.artifact(figure, "figures")
    tracker.end()


def start_sweep(name: str, output: Path, command: str, uri: str = "", experiment: str = "cpdlm") -> Tracker:
    """The parent run of a sweep (pass its run_id on as tracking.parent); continued when the sweep resumes.

    Also makes the store, so that cells that start together do not race to.
    """
    if not _installed():
        return Tracker()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(output)
    folder = output / f".sweep-{name}"
    tracker = _continued(folder, uri)
    if not tracker.run_id:
        tracker = _create(
            uri,
            experiment,
            f"{name} sweep",
            {"mlflow.note.content": f"`{command}`", "command": command, "kind": "sweep"},
            output,
        )
        _remember(folder, tracker)
    return tracker


def claim_experiment(claim: str, prefix: str = "cpdlm") -> str:
    """The MLflow experiment of a claim's runs: the sweep's parent run and its cells."""
    return f"{prefix} {claim}"


def import_records(
    results: Path, uri: str, prefix: str = "cpdlm", artifacts: Path | None = None, figures: Path | None = None
) -> int:
    """Show committed records in a store: an experiment per claim (`claim_experiment`), in it a parent run per results folder
    and a child per record. Returns how many were new.

    A record that is there already (by its sha256) is skipped, so that a second import adds nothing. Where there is a new one, every
    parent's note is renewed: the command, and each verdict that rests on the folder; the page and the pictures of `figures` are
    attached. A claim that is answered from other claims' cells alone has a parent without children, which says whose. artifacts: folder of the copies
    (default: beside a SQLite store). Raises RuntimeError without mlflow or with a store that fails, RecordError where
    `results` is no folder.
    """
    if not _installed():
        raise RuntimeError("mlflow is not installed; pip install mlflow")
    from experiments.claims import judge
    from experiments.families import families_of
    from experiments.records import load_all

    records, damaged = load_all(results)
    for line in damaged:
        _warn(line)
    verdicts = judge(families_of(records)[0])
    if artifacts is None and uri.startswith("sqlite:///"):
        artifacts = Path(uri.removeprefix("sqlite:///")).parent
    try:
        if artifacts is not None:
            artifacts.mkdir(parents=True, exist_ok=True)
        known = _imported(_client(uri), prefix)
    except Exception as error:
        raise RuntimeError(f"the MLflow store {_shown(uri)} cannot be used: {_first_line(error)}") from error
    folders: dict[str, list[Record]] = {}
    digests = {}
    for record in records:
        folders.setdefault(Path(record.path).parent.as_posix(), []).append(record)
        digests[record.path] = hashlib.sha256((results / record.path).read_bytes()).hexdigest()
    if all(digest in known for digest in digests.values()):
        return 0
    claims = {verdict.claim.id for verdict in verdicts if verdict.records}
    borrowed = claims - {_claim_of(folder) for folder in folders}
    count = 0
    for folder in (*folders, *sorted(borrowed)):
        mine = folders.get(folder, [])
        name = claim_experiment(_claim_of(folder), prefix)
        note = _note(folder, sorted({str(record["profile"]) for record in mine}), verdicts)
        tags = {"import": folder, "kind": "sweep", "claim": _claim_of(folder), "mlflow.note.content": note}
        parent = _parent(uri, name, f"records: {folder}" if mine else f"verdicts: {folder}", tags, artifacts, known)
        for path in _pictures(figures):
            parent.artifact(path, "figures")
        parent.end()
        for record in mine:
            if (digest := digests[record.path]) not in known:
                count += _show(record, results / record.path, digest, uri, name, parent.run_id, artifacts)
    return count


def _claim_of(folder: str) -> str:
    """The claim that a folder of results is about, else its own name: C6 for C6-long, beyond for beyond."""
    name = Path(folder).name or "single"
    found = re.match(r"C\d+(?=$|-)", name)
    return found[0] if found else name


def _imported(client: Any, prefix: str) -> dict[str, str]:
    """Run ids by record_sha256 and by import, over all experiments of the prefix."""
    known: dict[str, str] = {}
    ids = [found.experiment_id for found in client.search_experiments() if found.name.startswith(f"{prefix} ")]
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


def _parent(
    uri: str, experiment: str, name: str, tags: dict[str, str], artifacts: Path | None, known: Mapping[str, str]
) -> Tracker:
    """The parent run of an import: the one that is there, its note renewed, or a new one."""
    if tags["import"] not in known:
        return _create(uri, experiment, name, tags, artifacts)
    tracker = Tracker(_client(uri), known[tags["import"]], uri)
    tracker.tags(tags)
    return tracker


def _note(folder: str, profiles: list[str], verdicts: list[Verdict]) -> str:
    """Markdown: what makes the records of a folder, and the verdicts that rest on them; of a claim without a folder, its own."""
    from experiments.report.figures import command

    about = [verdict for verdict in verdicts if verdict.claim.id == _claim_of(folder)]
    resting = [
        verdict for verdict in verdicts if any(Path(path).parent.as_posix() == folder for path in verdict.records)
    ]
    if profiles:
        made = next((verdict.claim.id for verdict in (*about, *resting)), "all")
        lines = [
            f"Records of `results/{folder}` ({', '.join(profiles)}). `{command(made)}` makes what is missing; each run names its own command."
        ]
    else:
        resting = about
        lenders = sorted({Path(path).parent.as_posix() for verdict in about for path in verdict.records})
        lines = [
            f"{folder} is answered from the cells of {', '.join(f'`{lender}`' for lender in lenders)}. `{command(folder)}` makes what is missing."
        ]
    for claim in dict.fromkeys(verdict.claim for verdict in resting):
        lines += ["", f"**{claim.name}: {claim.question}**", ""]
        lines += [
            f"- {verdict.setting}: **{verdict.verdict}**. {verdict.measured()}"
            for verdict in resting
            if verdict.claim == claim
        ]
    return "\n".join(lines)


def _pictures(figures: Path | None) -> list[Path]:
    if figures is None:
        return []
    return [path for path in (figures / "report.html", *sorted(figures.glob("*.png"))) if path.is_file()]


def _show(
    record: Record, path: Path, digest: str, uri: str, experiment: str, parent: str, artifacts: Path | None
) -> bool:
    """A finished run for one record; False where the store did not take it."""
    content = record.content
    tags = _tags(content["config"], record.variant, record.target, content["commit"], content["command"])
    started = int(datetime.datetime.fromisoformat(content["started"]).timestamp() * 1000)
    tags |= {"record_sha256": digest, "mlflow.parentRunId": parent}
    tracker = _create(uri, experiment, content["name"], tags, artifacts, started)
    tracker.params(flat(content["config"]))
    tracker.curve(content["training"]["curve"])
    _log_content(tracker, content, path)
    tracker.end(when=started + int(1000 * sum(content["seconds"].values())))
    return bool(tracker.run_id)


def server_argv(output: Path, uri: str = "", port: int = 5000) -> list[str]:
    """The command of the dashboard on 127.0.0.1, for the store of `output` (or any other); see server_environment."""
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri or default_uri(output),
        "--artifacts-destination",
        str((output / ARTIFACTS).resolve()),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]


def server_environment() -> dict[str, str]:
    """The environment to start it in: telemetry off."""
    return {**os.environ, **{key: ENVIRONMENT[key] for key in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")}}


# --- parts -----------------------------------------------------------------------------------------------------------


def _open(config: Config, command: str, folder: Path) -> Tracker:
    """The cell's run: the one it left behind, or a new one."""
    tracker = _continued(folder, tracking_uri(config))
    if not tracker.run_id:
        from experiments.provenance import git_state
        from experiments.records import variant_of

        commit, dirty = git_state()
        settings = to_dict(config)
        tags = _tags(settings, variant_of(settings), config.target, commit + "-dirty" * dirty, command)
        if config.tracking.parent:
            tags["mlflow.parentRunId"] = config.tracking.parent
        tracker = _create(tracking_uri(config), config.tracking.experiment, config.run_name, tags, Path(config.output))
        _remember(folder, tracker)
        tracker.params(flatten(config))
        tracker.text(as_yaml(config), "config.yaml")
    return tracker


_DIALS = ("rank", "horizon", "size", "corpus", "seed", "anchor")


def _tags(dials: Mapping[str, Any], distribution: str, target: str, commit: str, command: str) -> dict[str, str]:
    tags = {key: str(dials[key]) for key in _DIALS}
    return tags | {
        "law": distribution,
        "target": target,
        "commit": commit,
        "command": command,
        "mlflow.note.content": f"`{command}`",
    }


def _create(
    uri: str, experiment: str, name: str, tags: Mapping[str, str], output: Path | None, started: int | None = None
) -> Tracker:
    """A new run; off, with a warning, where the store cannot be used."""
    try:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        client = _client(uri)
        run = client.create_run(
            _experiment(client, experiment, output), start_time=started, tags=dict(tags), run_name=name
        )
    except Exception as error:
        _warn(f"MLflow at {_shown(uri)} cannot be used ({_first_line(error)}); the run and its record go on without it")
        return Tracker()
    return Tracker(client, run.info.run_id, uri)


def _continued(folder: Path, uri: str) -> Tracker:
    """The run that `folder` remembers in this store, set running again; off where there is none."""
    try:
        kept = json.loads((folder / RUN_FILE).read_text())
        if kept["uri"] != _shown(uri):
            return Tracker()
        client = _client(uri)
        client.update_run(kept["run_id"], status="RUNNING")
    except Exception:
        return Tracker()
    return Tracker(client, kept["run_id"], uri)


def _remember(folder: Path, tracker: Tracker) -> None:
    if not tracker.run_id:
        return
    try:
        write_json(folder / RUN_FILE, {"run_id": tracker.run_id, "uri": _shown(tracker.uri)})
    except OSError as error:
        _warn(f"{folder / RUN_FILE} was not written ({error}); a resumed run will show as a new one in MLflow")


def _client(uri: str) -> Any:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _experiment(client: Any, name: str, output: Path | None) -> str:
    """Its id; a new one keeps its artefacts beside a local store, and where the server says for a remote one."""
    found = client.get_experiment_by_name(name)
    if found is None:
        local = output is not None and not client.tracking_uri.startswith(("http", "databricks"))
        try:
            index = (output / ARTIFACTS).resolve().as_uri() if output and local else None
            return str(client.create_experiment(name, index, _experiment_tags(name)))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process made it meanwhile
            if found is None:
                raise
    return str(found.experiment_id)


def _experiment_tags(experiment: str) -> dict[str, str]:
    """Of a new experiment: that it trains models (MLflow 3 opens on pages about prompts otherwise), the view of its cells, and for
    a claim its question and the rule of its verdict."""
    from experiments.claims import CLAIMS

    tags = {"mlflow.experimentKind": "custom_model_development", f"mlflow.sharedViewState.{VIEW}": _view()}
    claim = next((claim for claim in CLAIMS if experiment.endswith(f" {claim.id}")), None)
    if claim is not None:
        tags["mlflow.note.content"] = f"{claim.question} {claim.statistic}; {claim.rule}"
    return tags


_COLUMNS = ("corpus", "size", "law", "rank", "horizon", "seed")
_MEASURES = (
    "likelihood/joint_nll.mean",
    "likelihood/first_token_nll.mean",
    "greedy/tokens_per_pass.mean",
    "sampling/tokens_per_pass.mean",
    "greedy/speedup.median",
    "sampling/speedup.median",
)


def _view() -> str:
    """The saved view of an experiment's cells, as MLflow 3.17's own Views menu writes one: a table with the dials and the
    results, and a chart of each result against the rank. Other versions leave out what they do not know."""
    charts = [
        {
            "uuid": f"chart-{index}",
            "type": "SCATTER",
            "deleted": False,
            "isGenerated": False,
            "runsCountToCompare": 100,
            "metricSectionId": "claims",
            "xaxis": {"key": "rank", "type": "PARAM"},
            "yaxis": {"key": key, "type": "METRIC"},
        }
        for index, key in enumerate(_MEASURES)
    ]
    state = {
        "searchFilter": "tags.rank LIKE '%'",
        "orderByKey": "tags.`rank`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*(f"tags.`{key}`" for key in _COLUMNS), *(f"metrics.`{key}`" for key in _MEASURES)],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOWALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "compareRunCharts": charts,
        "compareRunSections": [
            {"uuid": "claims", "name": "Results against the rank", "display": True, "isReordered": True}
        ],
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def _lightning_logger(tracker: Tracker, experiment: str) -> MLFlowLogger:
    """Lightning's own logger on our run; its failures go through the tracker, and `cell_run` alone ends the run."""
    from lightning.pytorch.loggers import MLFlowLogger

    class Guarded(MLFlowLogger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            tracker.attempt(lambda: super(Guarded, self).log_metrics(metrics, step))

        def log_hyperparams(self, params: Any) -> None:
            """Ours are logged already."""

        def finalize(self, status: str = "success") -> None:
            """The run goes on to evaluation."""

    return Guarded(experiment_name=experiment, tracking_uri=tracker.uri, run_id=tracker.run_id)


def _system_metrics(tracker: Tracker) -> Any:
    """A running monitor of processor, memory and GPU; None where psutil is missing."""
    if not tracker.run_id or importlib.util.find_spec("psutil") is None:
        return None
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(tracker.run_id, resume_logging=True, tracking_uri=tracker.uri)
        monitor.start()
    except Exception as error:
        _warn(f"no system metrics in MLflow: {_first_line(error)}")
        return None
    return monitor


def _log_content(tracker: Tracker, content: dict[str, Any], path: Path) -> None:
    """Final metrics of a record, and the record itself as record.json."""
    kept: dict[str, float] = {}
    for group in ("parameters", "seconds", "likelihood", "training"):
        kept |= {
            f"{group}/{key}": value for key, value in flat(content[group]).items() if isinstance(value, int | float)
        }
    for mode, measured in (content["decoding"] or {"modes": {}})["modes"].items():
        kept |= {f"{mode}/{key}": value for key, value in flat(measured).items() if isinstance(value, int | float)}
    tracker.metrics(kept)
    tracker.text(path.read_text(encoding="utf-8"), "record.json")


def _name(key: str) -> str:
    """A metric name that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)


def _installed() -> bool:
    if importlib.util.find_spec("mlflow") is None:
        _warn("mlflow is not installed: the run is recorded without it (pip install mlflow, or tracking.mlflow=false)")
        return False
    return True


_warned: set[str] = set()


def _warn(message: str) -> None:
    """Once per process for each beginning of a message, so that a dead server does not fill the log."""
    start = message[:40]
    if start not in _warned:
        _warned.add(start)
        warnings.warn(message, stacklevel=3)


def _first_line(error: BaseException) -> str:
    """The start of an error, without a user name and password that it may quote."""
    return re.sub(r"//[^/@\s]+@", "//", (str(error).splitlines() or [""])[0])[:200] or type(error).__name__


def _shown(uri: str) -> str:
    """The address without a user name and password."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.tracking", description="Show records in MLflow.")
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="import records into a store")
    bring.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default: results)")
    bring.add_argument("--uri", default="", help="MLflow store (default: sqlite in runs)")
    bring.add_argument("--prefix", default="cpdlm", help="the experiments are PREFIX CLAIM (default: cpdlm)")
    bring.add_argument(
        "--figures",
        type=Path,
        default=Path("paper_figures"),
        help="page and pictures to attach (default: paper_figures)",
    )
    show = commands.add_parser("ui", help="start the dashboard on 127.0.0.1")
    show.add_argument("output", type=Path, nargs="?", help="folder with the store (default: the newest under runs/)")
    show.add_argument("--results", type=Path, help="import the records of this folder first")
    show.add_argument("--port", type=int, default=5000)
    options = parser.parse_args(arguments)
    where = os.environ.get("MLFLOW_TRACKING_URI", "")
    if options.command == "ui":
        output = options.output or _newest_store()
        output.mkdir(parents=True, exist_ok=True)
        options.uri, options.prefix, options.figures = where or default_uri(output), "cpdlm", Path("paper_figures")
    if options.results is not None:
        code = _import(options)
        if code:
            return code
    if options.command == "ui":
        url = f"http://127.0.0.1:{options.port}"
        print(f"MLflow over {_shown(options.uri)}: {url} after some 20 s; Ctrl-C stops it", flush=True)
        os.execvpe(sys.executable, server_argv(output, where, options.port), server_environment())
    return 0


def _newest_store() -> Path:
    found = [*Path("runs").glob(DATABASE), *Path("runs").glob(f"*/{DATABASE}")]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else Path("runs")


def _import(options: argparse.Namespace) -> int:
    from experiments.records import RecordError

    try:
        where = options.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(Path("runs"))
        count = import_records(options.results, where, options.prefix, figures=options.figures)
    except (RuntimeError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} records imported into {_shown(where)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
