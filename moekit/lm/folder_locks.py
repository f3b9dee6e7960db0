"""One launch at a time in a run folder: two that write the same checkpoints and metrics undo each other's work."""

import errno
import os
import platform
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moekit.lm.batch_streams import Batch
from moekit.lm.batches import BatchStream
from moekit.lm.orders import Address

PATIENCE = 5.0  # seconds; ranks whose torchrun was killed end within two
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class FolderLock:
    """The sole use of a folder, among processes that ask for it.

    It is the system's ``flock`` of the folder itself. So there is no file to be left behind, and the lock ends with
    the process, however that ends: processes forked from it, such as data workers, do not keep it. A network file
    system may know such locks on one machine alone (NFS does), and where there are none, nothing is locked.

    Args:
        folder: to lock. Nothing is done to it before ``take``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     lock = FolderLock(Path(parent) / "logs" / "a")
        ...     lock.take()
        ...     made = lock.folder.is_dir()
        ...     lock.let_go()
        ...     made, list(Path(parent).iterdir())
        (True, [])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._made: list[Path] = []
        self._close: weakref.finalize[[int], FolderLock] | None = None

    def take(self) -> None:
        """Make the folder if need be, and lock it; wait some seconds for a process that is about to end.

        Raises:
            BlockingIOError: if another process has it.
            OSError: if the folder cannot be made.
        """
        if self._close is not None or not _system_locks():
            return
        deadline = time.monotonic() + PATIENCE
        while not self._attempt(last=time.monotonic() >= deadline):
            time.sleep(0.1)

    def let_go(self) -> None:
        """Give the folder free, and remove what ``take`` made if it is empty still. Without a lock, do nothing."""
        if self._close is None:
            return
        with suppress(OSError):  # it holds something
            for folder in self._made:
                folder.rmdir()
        self._made = []
        self._close()
        self._close = None

    def _attempt(self, *, last: bool) -> bool:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
        except FileNotFoundError:  # a launch that failed removed what it had made
            if last:
                raise
            return False
        close = weakref.finalize(self, os.close, descriptor)
        holder = _locked_by(descriptor)
        if holder is None and _is_at(descriptor, self.folder):
            os.register_at_fork(after_in_child=close)  # else a child would keep the lock when this process is gone
            self._close, self._made = close, missing
            return True
        close()
        if holder is not None and last:
            raise BlockingIOError(
                f"{self.folder}: {holder} trains in this run folder; expected none, since two would undo each other's "
                "work. Wait until it has ended, end it, or choose another --name"
            )
        return False


class LockedStream:
    """A stream of batches for as long as a folder is locked: what closes it lets go of the folder.

    Args:
        stream: the `moekit.lm.batches.BatchStream`; all else is its own.
        lock: of the folder.
    """

    def __init__(self, stream: BatchStream, lock: FolderLock) -> None:
        self._stream, self._lock = stream, lock

    @property
    def passes(self) -> tuple[int, ...]:
        """How often each source was used up so far."""
        return self._stream.passes

    @property
    def skipped(self) -> Mapping[str, int]:
        """Sequences that this rank left out as bad, by reason."""
        return self._stream.skipped

    @property
    def addresses(self) -> Sequence[Address]:
        """Of the last global batch, in slot order."""
        return self._stream.addresses

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._stream)

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position that `state_dict` returned."""
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """End the workers, close the files, and let go of the folder."""
        try:
            self._stream.close()
        finally:
            self._lock.let_go()


def _system_locks() -> bool:
    try:
        import fcntl  # noqa: F401
    except ModuleNotFoundError:  # Windows; there it is the user who starts no second run
        return False
    return True


def _locked_by(descriptor: int) -> str | None:
    """Lock an open folder, and return None; or the process that has it. A file system without locks has none."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return None


def _holder(descriptor: int) -> str:
    """Say which process has the lock of an open folder, as far as Linux tells it."""
    found = os.fstat(descriptor)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            fields = line.split()  # "1: FLOCK ADVISORY WRITE <process> <device>:<inode> 0 EOF"
            if fields[1:2] == ["FLOCK"] and fields[5:6] == [place]:
                return f"process {fields[4]} of {platform.node()}"
    return "another process"


def _is_at(descriptor: int, folder: Path) -> bool:
    """Say whether an open folder has its name still: one that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False
