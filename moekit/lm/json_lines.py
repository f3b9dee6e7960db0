"""The metrics file of a run: a JSON object a line."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moekit.lm.files import write_whole


class JsonLines:
    """Appends each step's metrics to a file, a JSON object a line.

    A line is one write, so an interrupted run leaves whole lines. JSON has no NaN and no infinity, and many readers
    refuse a file with one: such a number is written as null, and its place is named under ``nonfinite``.

    Args:
        path: of the file; its folder is created. A last line that was cut off is taken out.
        from_step: lines of this step or a later one are taken out first, so that a resumed run has each step once.

    Raises:
        ValueError: if a line of the file is not a JSON object

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     JsonLines(Path(folder) / "metrics.jsonl").log({"step": 1, "loss": 2.5, "grad_norm": float("inf")})
        ...     print((Path(folder) / "metrics.jsonl").read_text(), end="")
        {"step": 1, "loss": 2.5, "grad_norm": null, "nonfinite": ["grad_norm"]}

    References:
        T. Bray (ed.), The JavaScript Object Notation (JSON) Data Interchange Format, 2017,
        https://www.rfc-editor.org/rfc/rfc8259, section 6, which permits neither.
    """

    def __init__(self, path: str | os.PathLike[str], *, from_step: int | None = None) -> None:
        self.path = Path(path)
        self.place = str(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._keep(lambda line: from_step is None or _step(line, self.path) < from_step, mends=True)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            metrics: what JSON can hold.

        Raises:
            TypeError: if JSON cannot hold a value; nothing is written.
            ValueError: if a metric is called ``nonfinite``; nothing is written.
        """
        check_metrics(metrics)
        nonfinite: list[str] = []
        line = _without_nonfinite(dict(metrics), (), nonfinite)
        text = json.dumps(line | ({"nonfinite": nonfinite} if nonfinite else {}))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def take_out(self, gone: Callable[[Mapping[str, Any]], bool]) -> int:
        """Take lines out. A line that another process appends at this very moment may be lost.

        Args:
            gone: says of a line's metrics whether it goes.

        Returns:
            How many went; if none did, the file was not touched.

        Raises:
            ValueError: if a line of the file is not a JSON object.
        """
        return self._keep(lambda line: not gone(line.metrics), mends=False)

    def _keep(self, stays: Callable[["_Line"], bool], *, mends: bool) -> int:
        """Keep some lines; without any that goes, the file is written only if it is to be mended, and has to be."""
        text = self.path.read_bytes()
        lines = list(_whole_lines(text, self.path))
        kept = [line for line in lines if stays(line)]
        new = b"".join(line.text + b"\n" for line in kept)
        if len(kept) < len(lines) or (mends and new != text):
            write_whole(self.path, new)
        return len(lines) - len(kept)

    def close(self, *, failed: bool = False) -> None:
        """Do nothing: each line is on disk when ``log`` returns."""


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check the names of metrics before they are logged.

    Args:
        metrics: of a line.

    Raises:
        ValueError: if one is called ``nonfinite``.

    Example:
        >>> check_metrics({"loss": 2.5})
    """
    if "nonfinite" in metrics:
        raise ValueError("a metric is called 'nonfinite', which names the metrics that are NaN or infinite; rename it")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a metrics file back.

    Args:
        path: of the file.

    Returns:
        One dict per whole line, in order; a last line that was cut off is left out.

    Raises:
        ValueError: if a whole line is not a JSON object; the message has its number.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    return [line.metrics for line in _whole_lines(path.read_bytes(), path)]


class _Line(NamedTuple):
    number: int
    text: bytes
    metrics: dict[str, Any]


def _whole_lines(text: bytes, path: Path) -> Iterator[_Line]:
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        if not line:
            continue
        try:
            metrics = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            metrics = None
        if not isinstance(metrics, dict):
            raise ValueError(
                f"{path}, line {number} is {line[:60]!r}; expected a JSON object. A crash of the machine can leave "
                f"such a line: delete it and start again"
            )
        yield _Line(number, line, metrics)


def _step(line: _Line, path: Path) -> float:
    step = line.metrics.get("step")
    if isinstance(step, bool) or not isinstance(step, int | float):
        raise ValueError(f"{path}, line {line.number} is {line.text[:60]!r}, without a step; delete it and start again")
    return step


def _without_nonfinite(value: Any, place: tuple[str, ...], found: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item, (*place, str(key)), found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item, (*place, str(i)), found) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found.append("/".join(place))
        return None
    return value
