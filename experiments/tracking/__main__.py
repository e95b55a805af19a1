"""The MLflow dashboard, and committed records in it.

python -m experiments.tracking import --results results --uri sqlite:///runs/mlflow.db
python -m experiments.tracking ui runs                                                  (./dev ui)
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from experiments.tracking.importing import import_records
from experiments.tracking.store import ARTIFACTS, DATABASE, ENVIRONMENT, default_uri, shown


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
        if taken := _why_taken(options.port):
            print(f"error: port {options.port} of 127.0.0.1 {taken}; give another one: --port NUMBER", file=sys.stderr)
            return 2
        output = options.output or _newest_store()
        output.mkdir(parents=True, exist_ok=True)
        options.uri, options.prefix, options.figures = where or default_uri(output), "cpdlm", Path("paper_figures")
    if options.results is not None:
        code = _import(options)
        if code:
            return code
    if options.command == "ui":
        url = f"http://127.0.0.1:{options.port}"
        print(f"MLflow over {shown(options.uri)}: {url} after some 20 s; Ctrl-C stops it", flush=True)
        os.execvpe(sys.executable, server_argv(output, where, options.port), server_environment())
    return 0


def _why_taken(port: int) -> str:
    """Why the dashboard cannot listen there; "" where it can. The server itself says so after a minute of tries."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            return f"cannot be used ({error})"
    return ""


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
    print(f"{count} records imported into {shown(where)}")
    return 0


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
