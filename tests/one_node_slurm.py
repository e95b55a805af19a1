"""A SLURM cluster of one node, for the tests of `launcher=slurm`.

It is started by hand from Debian's packages (slurm-wlm, munge) without systemd and needs root. What it writes lies in
one folder, which is gone afterwards.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=cred_expire=20,socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
JobRequeue=1
KillWait=5
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """Why no cluster can be started here."""


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment variables with which sbatch finds the cluster. Raises Unavailable with the reason."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        raise Unavailable(f"no {', '.join(missing)} (apt install slurm-wlm munge)")
    if os.geteuid():
        raise Unavailable("SLURM is started by root only")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders are closed to munged's user
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    cores = len(os.sched_getaffinity(0))
    conf.write_text(CONFIG.format(folder=folder, host=host, cores=cores, ports=_free_ports()))
    environment = {"SLURM_CONF": str(conf)}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_munged(folder))
        for program in ("slurmctld", "slurmd"):
            with open(folder / f"{program}.out", "wb") as log:
                command = [_path(program), "-D", "-f", str(conf)]
                daemons.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))
        _await_idle(folder, environment)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _munged(folder: Path) -> subprocess.Popen[bytes]:
    """Authentication, under its own user, with a key and a socket of its own."""
    try:
        user = pwd.getpwnam("munge")
    except KeyError:
        user = pwd.getpwuid(0)
    own = folder / "munge"
    own.mkdir(mode=0o700)
    (own / "key").write_bytes(os.urandom(128))
    (own / "key").chmod(0o400)
    for path in (own, own / "key"):
        os.chown(path, user.pw_uid, user.pw_gid)
    command = [
        _path("munged"),
        "--foreground",
        "--force",
        f"--key-file={own}/key",
        f"--socket={folder}/munge.socket",
        f"--pid-file={own}/pid",
        f"--log-file={own}/log",
        f"--seed-file={own}/seed",
    ]
    # Its socket must lie where it may write.
    os.chown(folder, user.pw_uid, user.pw_gid)
    daemon = subprocess.Popen(command, user=user.pw_uid, group=user.pw_gid, extra_groups=[])
    _await(lambda: (folder / "munge.socket").exists() and daemon.poll() is None, "munged did not start", 20)
    return daemon


def _await_idle(folder: Path, environment: dict[str, str]) -> None:
    def is_idle() -> bool:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, env=os.environ | environment, check=False
        )
        return asked.stdout.strip() == "idle"

    logs = ("slurmctld.out", "slurmctld.log", "slurmd.out", "slurmd.log")
    _await(is_idle, lambda: "\n".join(f"{n}: {_tail(folder / n)}" for n in logs), 60)


def _await(condition, message, seconds: float) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise Unavailable(message if isinstance(message, str) else message())
        time.sleep(0.2)


def _tail(path: Path) -> str:
    return " | ".join(path.read_text(errors="replace").splitlines()[-3:]) if path.is_file() else "-"


def _path(program: str) -> str:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") or program


def _free_ports() -> list[int]:
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
