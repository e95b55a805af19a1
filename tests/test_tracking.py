"""MLflow shows a run, and can neither change nor lose one."""

import base64
import json
import os
import socket
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from made_records import made

from cpdlm.config import Config, parse, resolve
from cpdlm.files import owner
from experiments import tracking
from experiments.records import write
from experiments.tracking import __main__ as command
from experiments.tracking import importing, view
from experiments.tracking import store as store_module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "warned", set())
    monkeypatch.setattr(store_module, "_unusable", set())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def quick(output: Path, **overrides: Any) -> Config:
    return resolve({"output": str(output)} | {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One sweep with one cell, interrupted and resumed, its record, and an import: making the database is slow."""
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        sweep = tracking.start_sweep("cpu", output, "./reproduce.sh")
        config = quick(output, rank=2, tracking__parent=sweep.run_id)
        folder = output / config.run_name
        with (
            pytest.raises(KeyboardInterrupt),
            tracking.cell_run(config, "python experiments/run.py rank=2", folder) as first,
        ):
            assert first.logger is not None
            first.logger.log_metrics({"train/nll": 2.0}, step=10)
            raise KeyboardInterrupt
        client = MlflowClient(tracking.default_uri(output))
        killed = client.get_run(first.run_id).info.status
        with tracking.cell_run(config, "python experiments/run.py rank=2", folder) as second:
            assert second.logger is not None
            second.logger.log_metrics({"train/nll": 1.0}, step=20)
            second.logger.finalize("success")
            running = client.get_run(first.run_id).info.status
        record = write(made(2), output / "results" / "C1")
        (output / "figure.png").write_bytes(b"png")
        tracking.log_record(config, record)
        tracking.log_record(config, record)
        # Its training was never in the store: killed with -9, or the store did not answer then.
        lost = quick(output, rank=4, tracking__parent=sweep.run_id)
        (output / lost.run_name).mkdir()
        made_up = write(made(4), output / "other")
        tracking.log_record(lost, made_up)
        # A process that is gone, as kill -9 leaves its run; and one of another machine.
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        owners = {"gone": f"{owner().partition('-')[0]}-{gone.pid}", "away": "0123abcd-1"}
        uri, left = tracking.default_uri(output), {}
        for name, left_by in owners.items():
            left[name] = store_module.create_run(uri, "cpdlm", name, {}).run_id
            client.set_tag(left[name], store_module.OWNER, left_by)
        write(made(8, seed=1), output / "results" / "C1")
        (output / "results" / "torn.json").write_text("{")
        with pytest.warns(UserWarning, match="torn.json"):
            imported = [
                importing.import_records(output / "results", tracking.default_uri(output), output) for _ in range(2)
            ]
    return {
        "client": client,
        "sweep": sweep.run_id,
        "first": first.run_id,
        "second": second.run_id,
        "killed": killed,
        "running": running,
        "output": output,
        "imported": imported,
        "lost": store_module.continued(output / lost.run_name, tracking.default_uri(output)).run_id,
        "left": left,
        "again": tracking.start_sweep("cpu", output, "./reproduce.sh").run_id,
    }


def test_the_cell_is_a_named_child_with_tags_params_and_note(store: dict[str, Any]) -> None:
    run = store["client"].get_run(store["first"])
    assert run.info.run_name == "r2 n4 code s0 tiny own"
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == store["sweep"]
    assert (tags["rank"], tags["variant"], tags["target"], tags["seed"]) == ("2", "untied", "own", "0")
    assert tags["command"] == "python experiments/run.py rank=2" and tags["commit"]
    assert run.data.params["optim.lr"] == str(parse([]).optim.lr)
    assert len(run.data.params) > 50
    assert store["client"].get_run(store["sweep"]).info.run_name == "cpu sweep"


def test_a_resumed_cell_and_sweep_continue_their_runs(store: dict[str, Any]) -> None:
    assert store["second"] == store["first"]
    assert store["again"] == store["sweep"]
    assert (store["killed"], store["running"]) == ("KILLED", "RUNNING")
    assert store["client"].get_run(store["first"]).info.status == "FINISHED"
    history = store["client"].get_metric_history(store["first"], "train/nll")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.0)]


def test_a_run_that_the_store_never_got_is_made_up_for(store: dict[str, Any]) -> None:
    run = store["client"].get_run(store["lost"])
    assert (run.info.run_name, run.data.tags["mlflow.parentRunId"]) == ("r4 n4 code s0 tiny own", store["sweep"])
    assert run.data.metrics["sampled_speedup"] > 0 and run.data.params["rank"] == "4"
    assert [point.step for point in store["client"].get_metric_history(store["lost"], "train/nll")] == [100, 200, 400]


def test_a_run_of_a_killed_process_does_not_run_for_ever(store: dict[str, Any]) -> None:
    status = {name: store["client"].get_run(run_id).info.status for name, run_id in store["left"].items()}
    assert status == {"gone": "KILLED", "away": "RUNNING"}


def test_records_are_imported_once(store: dict[str, Any]) -> None:
    assert store["imported"] == [2, 0]
    client = store["client"]
    experiment = client.get_experiment_by_name("cpdlm C1")
    runs = client.search_runs([experiment.experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert len(runs) == len(by_name) == 3
    parent, child = by_name["records: C1"], by_name["r8 n4 code s1 tiny own"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["commit"] == "0123456789abcdef" and child.data.tags["rank"] == "8"
    assert (child.info.start_time, child.info.end_time - child.info.start_time) == (1767225600000, 86_000)
    assert [point.step for point in client.get_metric_history(child.info.run_id, "train/nll")] == [100, 200, 400]
    assert child.data.metrics["joint_nll"] > 0 and child.data.params["training.steps"] == "500"
    assert len([name for name in child.data.metrics if "/" not in name]) == len(view.RESULTS)
    assert store_module.experiments_with_cells(client.tracking_uri)[0][0] == "cpdlm"
    assert "experiments/sweep.py claim=C1" in parent.data.tags["mlflow.note.content"]
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id, "figures")} == {"figures/figure.png"}
    saved = json.loads(experiment.tags[f"mlflow.sharedViewState.{view.VIEW}"])
    state = json.loads(zlib.decompress(base64.b64decode(saved["state"].removeprefix("deflate;"))))
    shown = {column.split("`")[1] for column in state["selectedColumns"]}
    assert shown <= set(child.data.tags) | set(child.data.metrics)
    assert {chart["yaxis"]["key"] for chart in state["compareRunCharts"]} <= set(child.data.metrics)


class Broken:
    """A store that stopped answering."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def fail(*arguments: Any, **named: Any) -> None:
            self.calls += 1
            raise OSError("database is locked\nwith a long story")

        return fail


def test_a_store_that_dies_in_mid_run_warns_once_and_is_left_alone() -> None:
    pytest.importorskip("mlflow")
    client = Broken()
    tracker = tracking.Tracker(client, "run", "sqlite:///x")
    with pytest.warns(UserWarning, match="database is locked") as caught:
        for step in range(10):
            tracker.metrics({"loss": 1.0}, step)
        tracker.figure(Path("nowhere"))
        tracker.tags({"a": 1})
        tracker.end()
    assert len(caught) == 1
    assert "the run and its record go on without it" in str(caught[0].message)
    assert client.calls == store_module.PATIENCE


def test_a_store_that_cannot_be_opened_leaves_tracking_off(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = quick(tmp_path, tracking__uri="nonsense://user:secret@nowhere")
    with pytest.warns(UserWarning, match="cannot be used") as caught:
        with tracking.cell_run(config, "x", tmp_path / "cell") as tracker:
            tracker.metrics({"loss": 1.0})
    assert (tracker.run_id, tracker.logger) == ("", None)
    assert "secret" not in str(caught[0].message)


def test_without_mlflow_there_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.importlib.util, "find_spec", lambda name: None)
    config = quick(tmp_path)
    with pytest.warns(UserWarning, match="mlflow is not installed") as caught:
        for _ in range(2):
            with tracking.cell_run(config, "x", tmp_path / "cell") as tracker:
                tracker.metrics({"loss": 1.0})
                tracker.figure(Path("nowhere"))
        assert tracking.start_sweep("cpu", tmp_path, "x").run_id == ""
        tracking.log_record(config, tmp_path / "none.json")
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="mlflow is not installed"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importing.import_records(tmp_path, "sqlite:///x")


@pytest.mark.parametrize("how", ["setting", "helper"])
def test_off_by_setting_and_in_helper_processes(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "helper":
        monkeypatch.setenv("LOCAL_RANK", "1")
    config = quick(tmp_path, tracking__mlflow=how != "setting")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tracking.cell_run(config, "x", tmp_path / "cell") as tracker:
            assert tracker.logger is None
    assert list(tmp_path.iterdir()) == []


def test_the_store_is_chosen_in_the_written_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.tracking_uri(quick(tmp_path)) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking.tracking_uri(quick(tmp_path)) == "http://127.0.0.1:1"
    assert tracking.tracking_uri(quick(tmp_path, tracking__uri="sqlite:///mine")) == "sqlite:///mine"


FIRST = """
import sys
from pathlib import Path
from experiments.tracking import store
output = Path(sys.argv[1])
print(store.create_run(store.default_uri(output), 'cpdlm', sys.argv[2], {}).run_id)
"""


@pytest.mark.slow  # 20 s: the database is made
def test_first_runs_that_start_together_all_reach_the_store(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    words = [[sys.executable, "-c", FIRST, str(tmp_path / "new"), f"run {number}"] for number in range(4)]
    runs = [subprocess.Popen(each, cwd=ROOT, stdout=subprocess.PIPE, text=True) for each in words]
    assert all(len(run.communicate()[0].strip()) == 32 for run in runs)


def test_a_dashboard_listens_on_this_machine_only_and_says_so_where_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.server_argv(tmp_path, "sqlite:///x")
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert command.server_environment()["MLFLOW_DISABLE_TELEMETRY"] == "true"
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert command.main([str(tmp_path), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"error: port {port} of 127.0.0.1 cannot be used" in said and "Address already in use" in said


def test_the_dashboard_opens_on_the_newest_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the newest store: a sweep that trained nothing has touched its own."""
    monkeypatch.chdir(tmp_path)
    assert command._newest_store() == Path("runs")
    cell, idle = Path("runs/mine/r8"), Path("runs/claims/.sweep-C3")
    for number, folder in enumerate((cell, idle)):
        folder.mkdir(parents=True)
        for path in (folder / "mlflow.json", folder.parent / "mlflow.db"):
            path.write_text("{}")
            os.utime(path, (1 + number, 1 + number))
    assert command._newest_store() == Path("runs/mine")


def test_the_names_of_runs_begin_with_what_tells_them_apart() -> None:
    short = store_module.short_name
    assert short("code-small-common-r8-n4-none-s0") == "r8 n4 code s0 small common"
    assert short("code-smollm2-common-r2-n4-token-eq14-s1") == "r2 n4 code s1 token-eq14 smollm2 common"
    assert short("code-small-common-r1-n4-none-time8-s2") == "r1 n4 code s2 time8 small common"
    assert short("mine") == "mine"


def test_a_users_password_is_not_kept(tmp_path: Path) -> None:
    store_module.remember(tmp_path, tracking.Tracker(None, "run", "postgresql://me:secret@host/db"))
    assert json.loads((tmp_path / store_module.RUN_FILE).read_text())["uri"] == "postgresql://host/db"
    error = OSError("no store at 'databricks://me:secret@host?token=secret' and postgresql://me:secret@host/db")
    assert "secret" not in store_module.first_line(error)
