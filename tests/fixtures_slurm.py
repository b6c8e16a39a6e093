"""A Slurm cluster of two nodes on this machine, for the tests of jobs."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from waiting import free_ports, wait_until

from pipeline.system.signals import die_with_parent

DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=30
MpiDefault=none
MailProg=/bin/true
FirstJobId={first}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP
PartitionName=one Nodes=n1 MaxTime=60 State=UP
"""  # cred_expire is also the time after which a requeued job starts


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of the nodes n1 and n2, with two cores each, which the variable SLURM_CONF names; its folder."""
    if missing := [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name, path=SBIN) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    (munge := folder / "munge").mkdir()
    (folder / "state").mkdir()
    (munge / "key").write_bytes(secrets.token_bytes(128))
    (munge / "key").chmod(0o400)
    values = {"host": socket.gethostname(), "user": getpass.getuser(), "munge": munge, "folder": folder}
    conf = CONF.format(**values, ports=free_ports(3), first=1 + secrets.randbelow(9_000))
    (folder / "slurm.conf").write_text(conf)
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PATH", SBIN)

        def start(*command: str) -> None:
            log = stack.enter_context((folder / f"{command[0]}.out").open("a"))
            process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent, process_group=0)
            stack.callback(process.wait, 60)
            stack.callback(process.send_signal, signal.SIGTERM)

        # --force: pytest's folder is closed to other users, which munged would rather not have
        start("munged", "--foreground", "--force", "--num-threads=2",
              *(f"--{option}={munge / name}" for option, name in files.items()))  # fmt: skip
        assert wait_until((munge / "socket").exists, 20), (folder / "munged.out").read_text()
        start("slurmctld", "-D")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        assert wait_until(lambda: ask("sinfo", "--noheader", "--format=%D %t", "--partition=main") == "2 idle", 60), (
            "".join(path.read_text() for path in folder.glob("*.out"))
        )
        stack.callback(_end_all_jobs)
        yield folder
    for process in psutil.process_iter(["name", "open_files"]):  # it tries for long to reach a controller that is gone
        if process.info["name"] == "slurmstepd" and str(folder) in str(process.info["open_files"]):
            process.kill()


def ask(*command: str) -> str:
    """What a program of Slurm says, without the end of the last line; empty if it fails."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def _end_all_jobs() -> None:
    ask("scancel", f"--user={getpass.getuser()}")
    assert wait_until(lambda: not ask("squeue", "--noheader"), 60), ask("squeue")
