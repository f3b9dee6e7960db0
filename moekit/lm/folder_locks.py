"""One process at a time in a folder: two that write the same files undo each other's work."""

import os
import platform
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Self

PATIENCE = 5.0  # seconds; ranks whose torchrun was killed end within two


class FolderLock:
    """The sole use of a folder, among processes that ask for it.

    It is the system's ``flock`` of the folder itself. So there is no file to be left behind, and the lock ends with
    the process, however that ends: processes forked from it, such as data workers, do not keep it. A network file
    system may know such locks on one machine alone (NFS does), and where there are none, nothing is locked.

    As a context, it is taken for its body.

    Args:
        folder: to lock. Nothing is done to it before ``take``.
        flag: that names the folder, for the message.
        is_left: whether an empty folder that was there before stays; one for locks alone does not, whoever made it.
        waits: whether ``take`` waits some seconds for a process that is about to end.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with FolderLock(Path(parent) / "logs" / "a", flag="--name") as lock:
        ...         made = lock.folder.is_dir()
        ...     made, list(Path(parent).iterdir())
        (True, [])
    """

    def __init__(self, folder: str | os.PathLike[str], *, flag: str, is_left: bool = True, waits: bool = True) -> None:
        self.folder, self._flag, self._is_left, self._waits = Path(folder), flag, is_left, waits
        self._made: list[Path] = []
        self._close: weakref.finalize[[int], FolderLock] | None = None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    def take(self) -> None:
        """Make the folder if need be, and lock it.

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
            for folder in self._made or ([] if self._is_left else [self.folder]):
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
        except FileExistsError:  # it was removed while this one asked
            if last or self.folder.exists():
                raise
            return False
        close = weakref.finalize(self, os.close, descriptor)
        holder = _locked_by(descriptor)
        if holder is None and _is_at(descriptor, self.folder):
            os.register_at_fork(after_in_child=close)  # else a child would keep the lock when this process is gone
            self._close, self._made = close, missing
            return True
        close()
        if holder is not None and (last or not self._waits):
            raise BlockingIOError(
                f"{self.folder}: {holder} works in this folder; expected none, since two would undo each other's "
                f"work. Wait until it has ended, end it, or choose another {self._flag}"
            )
        return False


def _system_locks() -> bool:
    try:
        import fcntl  # noqa: F401
    except ModuleNotFoundError:  # Windows; there it is the user who starts no second process
        return False
    return True


def _locked_by(descriptor: int) -> str | None:
    """Lock an open folder, and return None; or the process that has it. A file system without locks has none."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    except OSError:  # which one says so is the file system's own affair
        return None
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
