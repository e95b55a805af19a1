"""The MLflow store: one run of it, and what all runs share. mlflow is imported inside functions only."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpdlm.config import Config, flat, without_credentials, words
from cpdlm.files import is_gone, locked, owner, write_json
from experiments.tracking.view import RESULTS, experiment_tags

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger

RUN_FILE, DATABASE, ARTIFACTS = "mlflow.json", "mlflow.db", "mlartifacts"
STORE_SECONDS = 300.0  # to wait for another process that makes the store
OWNER = "owner"  # the tag of the process that a run is of
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
        self._client, self._failures, self._lost = client, 0, 0

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step; anything that is not a number is left out."""
        self.curve([{"step": step, **values}])

    def curve(self, points: list[dict[str, float]]) -> None:
        """Log [{"step", name: value, ...}]."""

        def log() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            found = [
                Metric(key, rounded(value), now, int(point["step"]))
                for point in points
                for key, value in point.items()
                if key != "step" and isinstance(value, int | float)
            ]
            self._client.log_batch(self.run_id, metrics=found)

        self.attempt(log)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings; written once, since MLflow refuses to change one."""

        def log() -> None:
            from mlflow.entities import Param

            self._client.log_batch(self.run_id, params=[Param(key, str(value)[:500]) for key, value in values.items()])

        self.attempt(log)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; a later value replaces an earlier one."""

        def log() -> None:
            from mlflow.entities import RunTag

            self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:7900]) for key, value in values.items()])

        self.attempt(log)

    def figure(self, path: Path) -> None:
        """Copy a picture or a page into the run's artefacts."""
        self.attempt(lambda: self._client.log_artifact(self.run_id, str(path), "figures"))

    def text(self, content: str, name: str) -> None:
        """Store text as an artefact of that name."""
        self.attempt(lambda: self._client.log_text(self.run_id, content, name))

    def end(self, status: str = "FINISHED", when: int | None = None) -> None:
        """FINISHED, FAILED or KILLED. when: milliseconds since 1970 (default: now)."""
        self.attempt(lambda: self._client.set_terminated(self.run_id, status, when))

    @property
    def is_whole(self) -> bool:
        """Whether the store has taken everything."""
        return bool(self.run_id) and not self._lost

    def attempt(self, action: Callable[[], Any]) -> None:
        """Run it; a failure warns once, and after PATIENCE of them in a row no more is tried."""
        if not self.run_id or self._failures >= PATIENCE:
            return
        try:
            action()
            self._failures = 0
        except Exception as error:
            self._failures, self._lost = self._failures + 1, self._lost + 1
            failed = f"MLflow at {shown(self.uri)} did not take a write ({first_line(error)})"
            warn(f"{failed}; the run and its record go on without it")


def tracking_uri(config: Config) -> str:
    """The store of a run: tracking.uri, else MLFLOW_TRACKING_URI, else SQLite in the output folder."""
    return config.tracking.uri or default_uri(Path(config.output))


def default_uri(output: Path) -> str:
    """MLFLOW_TRACKING_URI, else SQLite in this folder."""
    return os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{(output / DATABASE).resolve()}"


def create_run(uri: str, experiment: str, name: str, tags: Mapping[str, str], started: int | None = None) -> Tracker:
    """A new run; off, with a warning, where the store cannot be used."""
    if uri in _unusable:
        return Tracker()
    try:
        client = client_of(uri)
        tags = {**tags, OWNER: owner()}
        run = client.create_run(_experiment(client, experiment), start_time=started, tags=tags, run_name=name)
    except Exception as error:
        _give_up(uri, error)
        return Tracker()
    return Tracker(client, run.info.run_id, uri)


def _remembered(folder: Path, uri: str) -> dict[str, str]:
    """What `remember` noted of this store; empty where that is nothing."""
    try:
        kept = json.loads((folder / RUN_FILE).read_text())
        return dict(kept) if kept["uri"] == shown(uri) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def has_record(folder: Path, uri: str, sha256: str) -> bool:
    """Whether the run that `folder` remembers in this store has that record."""
    return _remembered(folder, uri).get("record_sha256") == sha256


def continued(folder: Path, uri: str) -> Tracker:
    """The run that `folder` remembers in this store, set running again; off where there is none."""
    kept = _remembered(folder, uri)
    if not kept:
        return Tracker()
    try:
        client = client_of(uri)
        client.update_run(kept["run_id"], status="RUNNING")
        client.set_tag(kept["run_id"], OWNER, owner())
    except Exception:
        return Tracker()
    return Tracker(client, kept["run_id"], uri)


def remember(folder: Path, tracker: Tracker, record_sha256: str = "") -> None:
    """Note the run that is shown of `folder`, and the record that it has."""
    if not tracker.run_id:
        return
    kept = {"run_id": tracker.run_id, "uri": shown(tracker.uri)}
    try:
        write_json(folder / RUN_FILE, kept | ({"record_sha256": record_sha256} if record_sha256 else {}))
    except OSError as error:
        warn(f"{folder / RUN_FILE} was not written ({error}); a resumed run will show as a new one in MLflow")


def client_of(uri: str) -> Any:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    database = _database(uri)
    if database is None or uri in _made:
        return MlflowClient(tracking_uri=uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    # The client makes the tables; processes that do so at once break each other's.
    with locked(database.with_name(f"{database.name}.lock"), STORE_SECONDS):
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    _made.add(uri)
    return client


def _database(uri: str) -> Path | None:
    """The file of a SQLite store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


_made: set[str] = set()  # local stores that are there
_unusable: set[str] = set()  # stores that have failed; not asked again, since a dead server costs seconds each time


def end_killed(uri: str, experiment: str) -> None:
    """Runs of an experiment that are RUNNING, of processes of this machine that have ended, are KILLED."""
    if uri in _unusable:
        return
    try:
        client = client_of(uri)
        found = client.get_experiment_by_name(experiment)
        running = client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'") if found else []
        for run in running:
            if is_gone(run.data.tags.get(OWNER, "")):
                client.set_terminated(run.info.run_id, "KILLED")
    except Exception as error:
        _give_up(uri, error)


def _give_up(uri: str, error: Exception) -> None:
    _unusable.add(uri)
    warn(f"MLflow at {shown(uri)} cannot be used ({first_line(error)}); the run and its record go on without it")


def _experiment(client: Any, name: str) -> str:
    """Its id; a new one keeps its artefacts beside a SQLite store, and where MLflow says for another one."""
    found = client.get_experiment_by_name(name)
    if found is None:
        database = _database(client.tracking_uri)
        try:
            place = (database.parent / ARTIFACTS).resolve().as_uri() if database is not None else None
            return str(client.create_experiment(name, place, experiment_tags(name)))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process made it meanwhile
            if found is None:
                raise
    return str(found.experiment_id)


_DIALS = ("rank", "seed", "horizon", "size", "corpus", "link")


def short_name(name: str) -> str:
    """`code-small-common-r8-n4-token-s0` as `r8 n4 code s0 token small common`: what tells runs apart comes first."""
    found = re.fullmatch(r"(.+?)-(.+)-(r\d+)-(n\d+)-(.+)-(s\d+)", name)
    if found is None:
        return name
    corpus, where, rank, horizon, kind, seed = found.groups()
    kind = kind.removeprefix("none").strip("-")
    return " ".join([rank, horizon, corpus, seed, *([kind] if kind else []), *where.split("-")])


def tags_of(dials: Mapping[str, Any], variant: str, target: str, commit: str, command: str) -> dict[str, str]:
    tags = {key: str(dials[key]) for key in _DIALS}
    return tags | {
        "variant": variant,
        "target": target,
        "commit": commit,
        "command": command,
        "mlflow.note.content": f"`{command}`",
    }


def log_content(tracker: Tracker, content: dict[str, Any], path: Path) -> None:
    """The results of a record, rounded, as metrics; its counts as params; the record itself as record.json."""
    tracker.metrics({name: value for name, path in RESULTS.items() if (value := _result(content, path)) is not None})
    groups = {group: flat(content[group]) for group in ("parameters", "training")}
    counts = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    tracker.params({key: f"{value:.6g}" for key, value in counts.items() if isinstance(value, int | float)})
    tracker.text(path.read_text(encoding="utf-8"), "record.json")


def _result(content: Any, path: Sequence[str]) -> float | None:
    """The number that the keys lead to; None where it was not measured."""
    for key in path:
        content = content.get(key) if content else None
    return None if content is None else float(content)


def rounded(value: float) -> float:
    """To four digits, as a column shows it."""
    return float(f"{value:.4g}")


def curve_of(training: Mapping[str, Any]) -> list[dict[str, float]]:
    """The curve of a record's `training`, with the time of a step between two of its entries."""
    points = [dict(point) for point in training["curve"]]
    clock = training["clock"] or []
    for (one, other), (before, after) in zip(pairwise(points), pairwise(clock), strict=False):
        if other["step"] > one["step"]:
            other["train_time/step_ms"] = 1000 * (after - before) / (other["step"] - one["step"])
    return points


def experiments_with_cells(uri: str) -> list[tuple[str, str]]:
    """(name, id) of the experiments that have cells, the one with the newest cell first."""
    client = client_of(uri)
    names = {each.experiment_id: each.name for each in client.search_experiments()}
    newest = client.search_runs(list(names), "tags.rank LIKE '%'", order_by=["attributes.start_time DESC"])
    return [(names[each], each) for each in dict.fromkeys(run.info.experiment_id for run in newest)]


def is_installed() -> bool:
    if importlib.util.find_spec("mlflow") is None:
        warn("mlflow is not installed: the run is recorded without it (pip install mlflow, or tracking.mlflow=false)")
        return False
    return True


warned: set[str] = set()


def warn(message: str) -> None:
    """Once per process for each beginning of a message, so that a dead server does not fill the log."""
    start = message[:40]
    if start not in warned:
        warned.add(start)
        warnings.warn(message, stacklevel=3)


def first_line(error: BaseException) -> str:
    """The start of an error, without names, passwords and tokens of an address that it may quote."""
    return without_credentials(words.first_line(error))[:200]


def shown(uri: str) -> str:
    """The address without a user name and password."""
    return without_credentials(uri)
