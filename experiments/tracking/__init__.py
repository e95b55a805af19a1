"""MLflow, kept at arm's length: it shows a run, and can neither change nor lose one.

The record is the result; MLflow is a view of it. Where mlflow is not installed, or its store stops answering, one
warning is given and the run goes on. The store is always passed explicitly (tracking.uri, else MLFLOW_TRACKING_URI,
else SQLite in the output folder).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpdlm.config import Config, as_yaml, flatten, to_dict
from cpdlm.processes import is_first_process
from experiments.tracking import store
from experiments.tracking.store import Tracker, default_uri, tracking_uri

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger


@contextlib.contextmanager
def cell_run(config: Config, command: str, folder: Path) -> Iterator[Tracker]:
    """The MLflow run of one cell, with params, tags, config.yaml and system metrics; continued when the cell resumes.

    Yields a Tracker (off where tracking.mlflow=false, mlflow is missing, or in a helper process of a distributed run);
    marks the run FAILED on an exception and KILLED on Ctrl-C.
    """
    if not config.tracking.mlflow or not is_first_process() or not store.is_installed():
        yield Tracker()
        return
    store.end_killed(tracking_uri(config), config.tracking.experiment)
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


def log_record(config: Config, path: Path) -> None:
    """Add the finished record (final metrics and the file) to the cell's run, where that lacks it.

    A run that the store never got, since it did not answer then, is made up for.
    """
    if not config.tracking.mlflow or not store.is_installed():
        return
    folder, uri = Path(config.output) / config.run_name, tracking_uri(config)
    text = path.read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    if store.has_record(folder, uri, digest):
        return
    content, tracker = json.loads(text), store.continued(folder, uri)
    if not tracker.run_id and folder.is_dir():
        tracker = _open(config, content["command"], folder)
        tracker.curve(store.curve_of(content["training"]))
    store.log_content(tracker, content, path)
    tracker.end()
    if tracker.is_whole:
        store.remember(folder, tracker, digest)


def start_sweep(name: str, output: Path, command: str, experiment: str = "cpdlm") -> Tracker:
    """The parent run of a sweep (pass its run_id on as tracking.parent); continued when the sweep resumes.

    Also makes the store, so that cells that start together do not race to.
    """
    if not store.is_installed():
        return Tracker()
    uri = default_uri(output)
    store.end_killed(uri, experiment)
    folder = output / f".sweep-{name}"
    tracker = store.continued(folder, uri)
    if not tracker.run_id:
        tags = {"mlflow.note.content": f"`{command}`", "command": command, "kind": "sweep"}
        tracker = store.create_run(uri, experiment, f"{name} sweep", tags)
        store.remember(folder, tracker)
    return tracker


def _open(config: Config, command: str, folder: Path) -> Tracker:
    """The cell's run: the one it left behind, or a new one."""
    tracker = store.continued(folder, tracking_uri(config))
    if not tracker.run_id:
        from experiments.provenance import git_state
        from experiments.records import variant_of

        commit, dirty = git_state()
        settings = to_dict(config)
        tags = store.tags_of(settings, variant_of(settings), config.target, commit + "-dirty" * dirty, command)
        if config.tracking.parent:
            tags["mlflow.parentRunId"] = config.tracking.parent
        tags["name"], shown = config.run_name, store.short_name(config.run_name)
        tracker = store.create_run(tracking_uri(config), config.tracking.experiment, shown, tags)
        store.remember(folder, tracker)
        tracker.params(flatten(config))
        tracker.text(as_yaml(config), "config.yaml")
    return tracker


def _lightning_logger(tracker: Tracker, experiment: str) -> MLFlowLogger:
    """Lightning's own logger on our run; its failures go through the tracker, and `cell_run` alone ends the run."""
    from lightning.pytorch.loggers import MLFlowLogger

    class Guarded(MLFlowLogger):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            shown = {name: store.rounded(value) for name, value in metrics.items()}
            tracker.attempt(lambda: super(Guarded, self).log_metrics(shown, step))

        def log_hyperparams(self, params: Any) -> None:
            """Ours are logged already."""

        def finalize(self, status: str = "success") -> None:
            """The run goes on to evaluation."""

    return Guarded(experiment_name=experiment, tracking_uri=tracker.uri, run_id=tracker.run_id)


def _system_metrics(tracker: Tracker) -> Any:
    """A running monitor of processor, memory and GPU; None where there is none."""
    if not tracker.run_id:
        return None
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(tracker.run_id, resume_logging=True, tracking_uri=tracker.uri)
        monitor.start()
    except Exception as error:
        store.warn(f"no system metrics in MLflow: {store.first_line(error)}")
        return None
    return monitor
