"""Trackers: where the numbers of a training run go."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from moekit.lm.dashboards import TensorBoard, WeightsAndBiases
from moekit.lm.json_lines import JsonLines, read_metrics
from moekit.lookup import look_up

__all__ = ["JsonLines", "Tracker", "Trackers", "open_trackers", "parse_report_to", "read_metrics"]


class Tracker(Protocol):
    """Receives the metrics of a run, one call per logged step.

    Attributes:
        place: where the numbers are found, to show to whoever started the run.
    """

    place: str

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Record one step's metrics; ``step`` is among them."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Write out what is left; ``failed`` says that the run ended by an exception."""
        ...


class Trackers:
    """Hands each step's metrics to a file and to dashboards; as a context manager it closes them, however the run ends.

    A run can do without a dashboard. One that fails gets nothing more: a warning says so, and is kept in the file,
    under ``warnings`` in the line of that step. An error of the file is the caller's.

    Args:
        file: that has every step.
        dashboards: name to tracker.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Trackers(JsonLines(Path(folder) / "metrics.jsonl")) as trackers:
        ...         trackers.log({"step": 1, "loss": 2.5})
        ...     read_metrics(Path(folder) / "metrics.jsonl")
        [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, file: Tracker, dashboards: Mapping[str, Tracker] | None = None) -> None:
        self._file, self._dashboards = file, dict(dashboards or {})
        self._failed: set[str] = set()
        self._closed = False

    @property
    def places(self) -> tuple[str, ...]:
        """Where the numbers are found: the file, then each dashboard; nowhere more once they are closed."""
        open_ = () if self._closed else (self._file, *self._dashboards.values())
        return tuple(tracker.place for tracker in open_)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Record one step's metrics in every dashboard that has not failed, and then in the file.

        Args:
            metrics: names to numbers, or to mappings and lists of such.

        Raises:
            OSError: if the file cannot be written.
            ValueError: if ``step`` is missing.

        Warns:
            RuntimeWarning: if a dashboard fails.
        """
        if "step" not in metrics:
            raise ValueError(
                f"metrics have no step, only {', '.join(metrics) or 'nothing'}; add the step they belong to"
            )
        told = []
        for name in [each for each in self._dashboards if each not in self._failed]:
            try:
                self._dashboards[name].log(metrics)
            except Exception as error:
                told.append(self._give_up(name, error, step=metrics["step"]))
        self._file.log({**metrics, "warnings": told} if told else metrics)

    def close(self, *, failed: bool = False) -> None:
        """Close every tracker, also if closing one of them fails; once is enough.

        Args:
            failed: whether the run ended by an exception.

        Warns:
            RuntimeWarning: if a dashboard that worked until now cannot be closed.
        """
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:
            stack.callback(self._file.close, failed=failed)
            for name in self._dashboards:
                stack.callback(self._close_dashboard, name, failed=failed)

    def _give_up(self, name: str, error: Exception, *, step: int) -> str:
        self._failed.add(name)
        text = (
            f"{name}, which writes to {self._dashboards[name].place}, failed at step {step}: {_words(error)}. The run "
            f"goes on without it; {self._file.place} has every step. To have later steps in {name} too, mend the "
            "cause, stop the run and go on with it by --resume latest"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return text

    def _close_dashboard(self, name: str, *, failed: bool) -> None:
        dashboard = self._dashboards[name]
        try:
            dashboard.close(failed=failed)
        except Exception as error:
            if name not in self._failed:  # else that was told
                text = (
                    f"{name}, which writes to {dashboard.place}, failed when it was closed: {_words(error)}. Its last "
                    f"steps may be missing there; {self._file.place} has every step"
                )
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(failed=kind is not None)


def parse_report_to(text: str) -> tuple[str, ...]:
    """Read a list of trackers as OpenLM's ``--report-to`` gives it.

    Args:
        text: names with commas between them, out of wandb, tensorboard and all; empty or ``none`` for JSON lines alone.

    Returns:
        The names, each once.

    Raises:
        ValueError: if a name is not known.

    Example:
        >>> parse_report_to("wandb, tensorboard")
        ('wandb', 'tensorboard')
        >>> parse_report_to("none")
        ()
    """
    if text.strip() in {"", "none"}:
        return ()
    return _tracker_names([name.strip() for name in text.split(",")])


def open_trackers(
    report_to: Sequence[str],
    folder: Path,
    *,
    from_step: int | None,
    name: str,
    project: str,
    config: Mapping[str, Any],
) -> Trackers:
    """Open the trackers of a run: ``metrics.jsonl`` always, and those asked for.

    Of several processes, one alone opens trackers.

    Args:
        report_to: names out of wandb, tensorboard and all.
        folder: of the run; it is created.
        from_step: first step that will be logged; what a restarted run logged from there on before is taken out of
            ``metrics.jsonl`` and hidden by TensorBoard. None keeps everything.
        name: of the run, in Weights & Biases.
        project: that the run belongs to, in Weights & Biases.
        config: settings of the run, plain values, shown by Weights & Biases.

    Returns:
        Trackers, to be used in a ``with`` statement.

    Raises:
        ConnectionError: if Weights & Biases cannot start.
        ModuleNotFoundError: if a tracker's package is not installed.
        ValueError: if a name is not known, a tracker's package is too old, or ``metrics.jsonl`` holds a line that is
            not a JSON object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open_trackers((), Path(folder), from_step=1, name="run", project="moe", config={}) as trackers:
        ...         [Path(place).name for place in trackers.places]
        ['metrics.jsonl']
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: WeightsAndBiases(folder, name=name, project=project, config=config),
        "tensorboard": lambda: TensorBoard(folder / "tensorboard", from_step=from_step),
    }
    names = _tracker_names(report_to)
    folder.mkdir(parents=True, exist_ok=True)
    dashboards: dict[str, Tracker] = {}
    with ExitStack() as opened:
        for each in names:
            dashboards[each] = openers[each]()
            opened.callback(dashboards[each].close, failed=True)
        # last, for it takes lines out of the file, and nothing may fail behind that
        file = JsonLines(folder / "metrics.jsonl", from_step=from_step)
        opened.pop_all()
    return Trackers(file, dashboards)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _tracker_names(names: Sequence[str]) -> tuple[str, ...]:
    meanings = {"wandb": ("wandb",), "tensorboard": ("tensorboard",), "all": ("wandb", "tensorboard")}
    meant = (name for given in names for name in look_up(meanings, given, what="tracker"))
    return tuple(dict.fromkeys(meant))
