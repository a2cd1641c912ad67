"""The folder of a local chain: whose it is, what stays in it over starts, and what it tells of what runs."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError
from sqlalchemy import make_url

from waterfall.cli.output import first_problem
from waterfall.errors import SettingsError
from waterfall.types import Frozen

DEV_FOLDER = Path(".waterfall")


class Dev(Frozen):
    """What runs, as `dev.json` tells it."""

    gateway_url: str
    rpc_url: str
    chain_id: int
    vault: str
    token: str
    platform: str
    admin_key: str
    account: str
    account_key: str
    model: str | None
    """A model that can be called."""


class Kept(Frozen):
    """What every start in a folder goes on with."""

    admin_key: str
    account_key: str
    database: str
    """URL of the ledger of the folder's chain: the settings may have named one elsewhere."""


class Folder:
    """The folder of one local chain: all files in it are ours, its folders are not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = f"sqlite:///{path / 'waterfall.db'}"
        """URL of the ledger, unless the settings name another."""
        self._lock = path / "lock"
        self._owner = path / "owner.pid"
        self._dev = path / "dev.json"
        self._kept = path / "keys.json"

    @contextlib.contextmanager
    def owned(self, *, fresh: bool = False) -> Iterator[None]:
        """Have the folder for this process alone; `fresh` forgets what earlier ones left in it.

        Raises:
            SettingsError: another process has it, or it cannot be written.
        """
        lock = FileLock(self._lock, blocking=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise SettingsError(
                reason=f"process {self._owner_id()} is using {self.path}: stop it first, or work in another folder"
            ) from None
        except OSError as error:
            raise SettingsError(reason=f"{self.path} cannot be written: {error.strerror}") from None
        try:
            if fresh:
                self.clear()
            self._owner.write_text(str(os.getpid()))
            yield
        finally:
            self._owner.unlink(missing_ok=True)
            lock.release()

    def clear(self) -> None:
        """Delete everything of an owned folder's chain, its ledger too wherever that is."""
        files = [path for path in self.path.iterdir() if path.is_file() and path != self._lock]
        kept = self.kept()
        if kept is not None:
            ledger = make_url(kept.database).database
            files += [Path(f"{ledger}{suffix}") for suffix in ("", "-wal", "-shm", ".lock")]
        for file in files:
            file.unlink(missing_ok=True)

    def kept(self) -> Kept | None:
        """What earlier starts kept, if there were any."""
        try:
            return Kept.model_validate_json(self._kept.read_bytes())
        except (OSError, ValidationError):
            return None

    def keep(self, kept: Kept) -> None:
        """Keep for later starts."""
        _write(self._kept, kept)

    @contextlib.contextmanager
    def told(self, dev: Dev) -> Iterator[None]:
        """Tell the commands in this folder what runs, while it does."""
        _write(self._dev, dev)
        try:
            yield
        finally:
            self.untell()

    def untell(self) -> None:
        """Take back what one that was killed has left."""
        self._dev.unlink(missing_ok=True)

    def _owner_id(self) -> str:
        with contextlib.suppress(FileNotFoundError):  # it has only just begun, or ended
            return self._owner.read_text()
        return "?"

    @property
    def is_told(self) -> bool:
        """Whether something is told to run."""
        return self._dev.exists()

    def read(self) -> Dev:
        """What the running `waterfall dev` tells of itself.

        Raises:
            SettingsError: there is none, or it is damaged.
        """
        try:
            return Dev.model_validate_json(self._dev.read_bytes())
        except FileNotFoundError:
            raise SettingsError(
                reason="Which gateway? Start `waterfall dev` in this folder, or give --url and --key "
                "(WATERFALL_URL, WATERFALL_ADMIN_KEY)."
            ) from None
        except OSError as error:
            raise SettingsError(reason=f"{self._dev}: {error.strerror}") from None
        except ValidationError as error:
            raise SettingsError(reason=f"{self._dev} is damaged: {first_problem(error)}") from None


def _write(file: Path, content: BaseModel) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(content.model_dump_json(indent=2) + "\n")
    partial.replace(file)
