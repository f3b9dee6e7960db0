"""Where data lie: a local path, an object store behind a URL, or the output of a command.

OpenLM names data the way WebDataset does, so ``pipe:aws s3 cp s3://bucket/shard.tar -`` is understood. It is read as
the URL in it, without a shell; any other command runs only where the caller allows commands.

References:
    WebDataset, https://github.com/webdataset/webdataset, ``webdataset/gopen.py`` (``gopen_pipe``).
    open_lm, https://github.com/mlfoundations/open_lm, ``open_lm/file_utils.py``.
"""

import itertools
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from moekit.lm._streams import ByteStream, command_output, local_file, remote_file

_PIPE = "pipe:"
_MOST_NAMES = 1_000_000
# What changes neither the bytes nor the place they come from.
_HARMLESS = {"--no-progress", "--quiet", "--only-show-errors", "--no-sign-request"}


def resolve_url(text: str, *, allow_commands: bool = False) -> str:
    """Turn ``pipe:aws s3 cp URL -`` into URL, and leave paths and URLs as they are.

    Args:
        text: a local path, ``scheme://...``, or ``pipe:COMMAND``.
        allow_commands: return any other command as it is, for `open_url` to run.

    Returns:
        A path, a URL, or, if allowed, ``pipe:COMMAND``.

    Raises:
        ValueError: if the command is another one and ``allow_commands`` is not set.

    Example:
        >>> resolve_url("pipe:aws s3 cp --no-progress s3://bucket/a.tar -")
        's3://bucket/a.tar'
        >>> resolve_url("data/manifest.jsonl")
        'data/manifest.jsonl'
    """
    if not text.startswith(_PIPE):
        return text
    url = _copied_to_stdout(text.removeprefix(_PIPE))
    if url is not None:
        return url
    if allow_commands:
        return text
    raise ValueError(
        f"{text!r} would run a command; without a shell only 'pipe:aws s3 cp s3://BUCKET/KEY -' is understood. "
        "Give the s3:// URL, or --allow-pipe-commands if you trust the command"
    )


@contextmanager
def open_url(url: str, *, allow_commands: bool = False) -> Iterator[ByteStream]:
    """Open a path, a URL or a command's output for one pass from front to end.

    Nothing is shared with other processes, so a worker that was forked may open URLs whether or not its parent did.
    S3 finds its settings as the AWS tools do: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``~/.aws`` and so on.

    Args:
        url: as in `resolve_url`.
        allow_commands: run ``pipe:COMMAND`` in a shell.

    Yields:
        A `ByteStream`. Errors while reading are the same as those while opening.

    Raises:
        FileNotFoundError: if there is no such file, object or bucket.
        OSError: if it cannot be read: no permission, no credentials, no connection, or a command that fails. A
            command that is cut off because the caller stops early does not fail.
        ValueError: if ``url`` is a command that is not allowed.
        ModuleNotFoundError: if a URL is given and fsspec, or its part for this scheme, is not installed.

    Example:
        >>> with open_url("pipe:printf hello", allow_commands=True) as stream:
        ...     stream.read()
        b'hello'
    """
    url = resolve_url(url, allow_commands=allow_commands)
    if url.startswith(_PIPE):
        with command_output(url.removeprefix(_PIPE)) as stream:
            yield stream
    elif is_remote(url):
        with remote_file(url) as stream:
            yield stream
    else:
        with local_file(url) as stream:
            yield stream


def read_text_url(url: str, *, allow_commands: bool = False) -> str:
    """Return a whole text.

    Args:
        url: as in `resolve_url`.
        allow_commands: run ``pipe:COMMAND`` in a shell.

    Returns:
        The text, decoded as UTF-8.

    Raises:
        OSError: as `open_url`.
        ValueError: if it is no UTF-8, or a command that is not allowed.
    """
    with open_url(url, allow_commands=allow_commands) as stream:
        content = stream.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is no UTF-8 text ({error}); expected a text file") from error


def is_remote(url: str) -> bool:
    """Return whether a text is ``scheme://...``, and so neither a local path nor a command.

    Example:
        >>> is_remote("s3://bucket/key"), is_remote("/data/key"), is_remote("pipe:cat s3://bucket/key")
        (True, False, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) is not None


def parent_url(url: str) -> str:
    """Return the folder that a path or URL lies in.

    Raises:
        ValueError: if it is a command, whose output lies nowhere.

    Example:
        >>> parent_url("s3://bucket/data/manifest.jsonl"), parent_url("data/manifest.jsonl"), parent_url("m.jsonl")
        ('s3://bucket/data', 'data', '')
    """
    url = resolve_url(url, allow_commands=True)
    if url.startswith(_PIPE):
        raise ValueError(f"{url!r} is a command, which has no folder. Give a path or a URL")
    return url.rpartition("/")[0] if is_remote(url) else os.path.dirname(url)


def join_url(parent: str, name: str) -> str:
    """Return the path or URL of a name in a folder.

    Example:
        >>> join_url("s3://bucket/data/", "a.tar"), join_url("data", "a.tar"), join_url("", "a.tar")
        ('s3://bucket/data/a.tar', 'data/a.tar', 'a.tar')
    """
    return f"{parent.rstrip('/')}/{name}" if is_remote(parent) else os.path.join(parent, name)


def expand_braces(text: str) -> list[str]:
    """Expand ``{000..012}`` and ``{a,b}``, each group with each.

    Args:
        text: a path, URL or command. A range is padded with zeros if one of its ends is.

    Returns:
        The texts, the last group running fastest; ``[text]`` if there is no brace.

    Raises:
        ValueError: if braces are nested or not closed, hold neither a list nor an ascending range of integers, or
            stand for more than a million texts.

    References:
        The syntax is that of Bash and of the package ``braceexpand``, which WebDataset uses.

    Example:
        >>> expand_braces("shard_{08..10}.{json,txt}")[:3]
        ['shard_08.json', 'shard_08.txt', 'shard_09.json']
    """
    pieces = re.split(r"\{([^{}]*)\}", text)  # text, group, text, group, ..., text
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise ValueError(f"the braces of {text!r} are nested or not closed; expected such as shard_{{000..012}}.tar")
    groups = [_alternatives(text, piece) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
    total = 1
    for group in groups:
        total *= len(group)
    if total > _MOST_NAMES:
        raise ValueError(f"{text!r} stands for {total:,} names; expected at most {_MOST_NAMES:,}")
    return ["".join(parts) for parts in itertools.product(*groups)]


def _alternatives(text: str, group: str) -> list[str]:
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", group)
    if ends is None and "," in group:
        return group.split(",")
    if ends is None or int(ends[1]) > int(ends[2]):
        raise ValueError(f"{{{group}}} of {text!r} is neither a list {{a,b}} nor an ascending range {{000..012}}")
    first, last = ends[1], ends[2]
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    if int(last) - int(first) >= _MOST_NAMES:
        raise ValueError(f"{{{group}}} of {text!r} stands for more than {_MOST_NAMES:,} names")
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _copied_to_stdout(command: str) -> str | None:
    try:
        words = [word for word in shlex.split(command) if word not in _HARMLESS]
    except ValueError:  # a quote that is not closed
        return None
    match words:
        # A shell would replace $NAME and `command`: those are not the text of a URL.
        case ["aws", "s3", "cp", url, "-"] if url.startswith("s3://") and not set("$`") & set(url):
            return url
    return None
