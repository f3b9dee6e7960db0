"""Byte streams for `moekit.lm.urls`: a local file, a file behind a URL, the output of a command."""

import importlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

_BUFFER = 2**20
_BLOCK = 8 * 2**20  # one ranged request; a reader holds about one block, so workers x sources x 8 MiB in all
_SIGPIPE = (141, -13)  # as a shell reports it, and as the operating system does


class ByteStream(Protocol):
    """Bytes from front to end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end; all that is left for -1."""
        ...


def local_file(path: str) -> IO[bytes]:
    """Open a local file."""
    try:
        return open(path, "rb", buffering=_BUFFER)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file at {path}. Check the path") from error
    except OSError as error:
        raise type(error)(f"cannot open {path} ({error.strerror}). Check the path and its permissions") from error


@contextmanager
def remote_file(url: str) -> Iterator[ByteStream]:
    """Open a file behind a URL. Errors are `OSError` with the URL in them."""
    with _explaining(url):
        file = _opened(url)
    try:
        yield _RemoteFile(url, file)
    finally:
        file.close()


@contextmanager
def command_output(command: str) -> Iterator[ByteStream]:
    """Run a command in a shell and read what it prints. A failure is an `OSError`."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "bufsize": _BUFFER}
    with subprocess.Popen(command, shell=True, **pipes) as process:
        stream = _CommandOutput(command, process)
        yield stream
        stream.close()


class _RemoteFile:
    def __init__(self, url: str, file: Any) -> None:
        self._url = url
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        with _explaining(self._url):
            return self._file.read(size)


def _opened(url: str, **settings: Any) -> Any:
    # The library makes its connections anew in a process that was forked, as long as the URL is looked up there.
    url_to_fs = importlib.import_module("fsspec.core").url_to_fs
    try:
        filesystem, path = url_to_fs(url, **settings)
        # Blocks are fetched in order, each once; the library's own default would hold 50 MB for each file.
        file = filesystem.open(path, "rb", block_size=_BLOCK, cache_type="readahead")
    except Exception as error:
        # Public data are read without credentials, as by `aws s3 cp --no-sign-request`.
        if type(error).__name__ == "NoCredentialsError" and not settings:
            return _opened(url, anon=True)
        raise
    if getattr(file, "details", {}).get("type") == "directory":  # which s3fs opens as an empty file
        raise IsADirectoryError("it is a folder")
    return file


@contextmanager
def _explaining(url: str) -> Iterator[None]:
    """Turn what the libraries raise, which are many unrelated types, into `OSError`."""
    try:
        yield
    except ImportError as error:
        raise ModuleNotFoundError(f"{url} needs fsspec, and s3fs for S3 ({error}). pip install 'moekit[s3]'") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is nothing at {url}: no such object, or no such bucket ({error})") from error
    except Exception as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(
            f"cannot read {url} ({type(error).__name__}: {error}). On S3, check the credentials (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), and AWS_ENDPOINT_URL if the store is not Amazon's"
        ) from error


class _CommandOutput:
    def __init__(self, command: str, process: "subprocess.Popen[bytes]") -> None:
        self._command = command
        self._process = process
        assert process.stdout is not None
        self._stdout = process.stdout

    def read(self, size: int = -1, /) -> bytes:
        content = self._stdout.read(size)
        if size < 0 or len(content) < size:  # the end: what was read is worth nothing if the command failed
            self._check(tolerated=())
        return content

    def close(self) -> None:
        at_end = not self._stdout.read(1)
        self._stdout.close()
        self._check(tolerated=() if at_end else _SIGPIPE)

    def _check(self, *, tolerated: tuple[int, ...]) -> None:
        status = self._process.wait()
        if status != 0 and status not in tolerated:
            raise OSError(f"the command {self._command!r} failed with exit status {status}; run it by hand to see why")
