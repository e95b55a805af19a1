"""The MLflow dashboard, with committed records in it where they are asked for: ./dev ui [OUTPUT] [--results DIR]."""

import os
import socket
import sys
from pathlib import Path

from cpdlm.terminal import Parser
from experiments.records import RecordError
from experiments.tracking.importing import import_records
from experiments.tracking.store import (
    ARTIFACTS,
    DATABASE,
    ENVIRONMENT,
    RUN_FILE,
    default_uri,
    experiments_with_cells,
    first_line,
    shown,
)
from experiments.tracking.view import address


def main(arguments: list[str]) -> int:
    parser = Parser(prog="./dev ui", description="Show runs and records in MLflow on 127.0.0.1.")
    newest = "folder with the store (default: that of the newest cell under runs/)"
    parser.add_argument("output", type=Path, nargs="?", help=newest)
    parser.add_argument("--results", type=Path, help="import the records of this folder first")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args(arguments)
    if taken := _why_taken(options.port):
        print(f"error: port {options.port} of 127.0.0.1 {taken}; give another one: --port NUMBER", file=sys.stderr)
        return 2
    output = options.output or _newest_store()
    output.mkdir(parents=True, exist_ok=True)
    uri = default_uri(output)
    if options.results is not None:
        try:
            count = import_records(options.results, uri, figures=Path("paper_figures"))
        except (RuntimeError, RecordError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{count} records imported into {shown(uri)}")
    server = f"http://127.0.0.1:{options.port}"
    print(f"MLflow over {shown(uri)}: {server} after some 20 s; Ctrl-C stops it", flush=True)
    try:
        for name, experiment in experiments_with_cells(uri):
            print(f"cells of {name}: {address(server, experiment)}", flush=True)
    except Exception as error:
        print(f"error: the store {shown(uri)} cannot be read: {first_line(error)}", file=sys.stderr)
        return 2
    os.execvpe(sys.executable, server_argv(output, uri, options.port), server_environment())
    return 0


def _why_taken(port: int) -> str:
    """Why the dashboard cannot listen there; "" where it can. The server itself says so after a minute of tries."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            return f"cannot be used ({getattr(error, 'strerror', None) or error})"
    return ""


def _newest_store() -> Path:
    """The folder under runs/ with the newest cell: a sweep that trained nothing has a newer store, and hides none."""
    runs = Path("runs")
    stores = [*runs.glob(DATABASE), *runs.glob(f"*/{DATABASE}")]

    def newest_cell(store: Path) -> tuple[float, float]:
        cells = (path for path in store.parent.glob(f"*/{RUN_FILE}") if not path.parent.name.startswith("."))
        return max((path.stat().st_mtime for path in cells), default=0.0), store.stat().st_mtime

    return max(stores, key=newest_cell).parent if stores else runs


def server_argv(output: Path, uri: str, port: int = 5000) -> list[str]:
    """The command of the dashboard over this store, with the artefacts of `output`; see server_environment."""
    store = ["--backend-store-uri", uri, "--artifacts-destination", str((output / ARTIFACTS).resolve())]
    server = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *store, *server]


def server_environment() -> dict[str, str]:
    """The environment to start it in: telemetry and background jobs off, the scripts of this Python found."""
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    off = {key: ENVIRONMENT[key] for key in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    off["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # its idle workers keep a core busy
    return os.environ | off | {"PATH": scripts}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
