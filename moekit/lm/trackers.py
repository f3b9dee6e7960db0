"""Trackers: where the numbers of a training run go."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Receives the metrics of a run, one call per logged step."""

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Record one step's metrics; ``step`` is among them."""
        ...


class JsonLines:
    """Appends each step's metrics to a file, a JSON object a line.

    A line is one write, so an interrupted run leaves whole lines.

    Args:
        path: of the file; its folder is created.
        from_step: lines of this step or a later one are taken out first, so that a resumed run has each step once.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     JsonLines(Path(folder) / "metrics.jsonl").log({"step": 1, "loss": 2.5})
        ...     print((Path(folder) / "metrics.jsonl").read_text(), end="")
        {"step": 1, "loss": 2.5}
    """

    def __init__(self, path: str | os.PathLike[str], *, from_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if from_step is not None and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] < from_step]
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(unfinished, self.path)
        self.path.touch()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(metrics)) + "\n")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a metrics file back.

    Args:
        path: of the file.

    Returns:
        One dict per whole line, in order; a last line that was cut off is left out.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
