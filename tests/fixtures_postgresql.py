"""A PostgreSQL server of a test."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import free_ports


@contextmanager
def postgresql_server(password: str | None = None) -> Iterator[int]:
    """Start a server with the superuser `postgres`; yield its port on 127.0.0.1.

    Without a password, it lets anybody in. Skips the test where PostgreSQL is not installed.
    """
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, binaries)]))
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    as_user = {"user": "nobody", "cwd": "/"} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # each pytest closes its own to others
        if as_user:
            shutil.chown(folder, "nobody")
        place, commands = Path(folder), Path(initdb).resolve().parent
        login = ["--auth=trust"]
        if password is not None:
            (place / "password").write_text(password)
            login = ["--auth=scram-sha-256", f"--pwfile={place / 'password'}"]
        init = [initdb, "-D", place / "db", "-U", "postgres", "--no-sync", *login]
        made = subprocess.run(init, capture_output=True, **as_user)
        if made.returncode:
            pytest.skip(f"PostgreSQL cannot create a database here: {made.stderr.decode()[-200:]}")
        (port,) = free_ports(1)
        options = f"-p {port} -k '' -c listen_addresses=127.0.0.1 -c fsync=off"
        server = [commands / "pg_ctl", "-D", place / "db", "-w", "-l", place / "log", "-o", options]
        subprocess.run([*server, "start"], check=True, stdout=subprocess.DEVNULL, **as_user)
        try:
            yield port
        finally:
            subprocess.run([*server, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, **as_user)
