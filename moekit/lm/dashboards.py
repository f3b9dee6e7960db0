"""Dashboards that a run's numbers can go to: Weights & Biases and TensorBoard, which take flat scalars."""

import secrets
import warnings
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from moekit.lm.files import write_whole

_UPLOAD_SECONDS = 300.0  # to wait for at the end of a run; the numbers are on disk in any case


def flatten(metrics: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    """Name every number of nested metrics by its place.

    ``step`` is left out, for it is what the others are drawn over; text and None are left out, for a curve cannot show
    them.

    Args:
        metrics: names to numbers, text, None, or to mappings and lists of such. A list entry with a ``layer`` is named
            by it, any other by its index. Under ``validation``, a number alone is a loss.
        prefix: that names start with, those of ``validation`` apart, which start with ``valid``.

    Returns:
        Name to number.

    Raises:
        TypeError: if a value is none of these, for example a tensor.
        ValueError: if two numbers would get one name.

    Example:
        >>> layers = [{"layer": 3, "load": [0.75, 0.25], "dead_experts": 0}]
        >>> for name, value in flatten({"step": 9, "loss": 2, "layers": layers}, prefix="train").items():
        ...     print(name, value)
        train/loss 2.0
        train/layer_3/load/0 0.75
        train/layer_3/load/1 0.25
        train/layer_3/dead_experts 0.0
        >>> flatten({"validation": {"speeches": 3.5}}, prefix="train")
        {'valid/speeches/loss': 3.5}
    """
    flat: dict[str, float] = {}
    for name, value in _numbers(metrics, prefix):
        if name in flat:
            raise ValueError(f"two metrics are named {name!r}; rename one of them")
        flat[name] = value
    return flat


class WeightsAndBiases:
    """Sends each step's metrics to Weights & Biases, in one call.

    A run folder is one run there: its id is kept in ``wandb_id.txt``, and a resumed run goes on under it. Their own
    count of steps only grows, and what is logged for a smaller one is dropped, as a run resumed from an earlier
    checkpoint would meet; so the step is a metric like the others, and the one that all are drawn over. What was logged
    past that checkpoint stays, and is drawn a second time.

    Without a network, set ``WANDB_MODE=offline``: what a launch logs is kept under the run folder, and ``wandb sync``
    uploads it later. The package writes it in parts, so what a killed launch logged may not be there, other than in
    ``metrics.jsonl``. Online, starting needs the network (the package gives up after about three minutes); a network
    lost later does not hold up training, and the end of a run waits five minutes for it.

    Args:
        folder: of the run; it is created.
        name: of the run.
        project: it belongs to.
        config: settings of the run.

    Raises:
        ConnectionError: if the run cannot start.
        ModuleNotFoundError: if wandb is not installed.
        ValueError: if the wandb that is installed is too old.
    """

    def __init__(self, folder: Path, *, name: str, project: str, config: Mapping[str, Any]) -> None:
        wandb = _wandb()
        settings = _settings(wandb)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(folder),
                id=_run_id(folder / "wandb_id.txt"),
                resume="allow",
                config=dict(config),
                reinit="create_new",  # another run of this process is nobody's business here
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise ConnectionError(
                f"wandb cannot start: {error}\nLook at the network, `wandb login` and the project {project!r}; "
                f"or set WANDB_MODE=offline to record the run on disk and upload it later by `wandb sync`"
            ) from error
        self._run.define_metric("*", step_metric="step")
        self.place = str(self._run.settings.sync_dir if self._run.offline else self._run.url)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send one step's metrics.

        Args:
            metrics: as ``flatten`` takes them, with ``step``.
        """
        self._run.log({"step": metrics["step"], **flatten(metrics, prefix="train")})

    def close(self, *, failed: bool = False) -> None:
        """End the run, uploading what is left; warn if that takes too long.

        Args:
            failed: marks the run as failed.
        """
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            warnings.warn(
                f"wandb did not upload all of the run within {_UPLOAD_SECONDS:.0f} s; it is on disk, and "
                f"`wandb sync {self._run.settings.sync_dir}` uploads the rest",
                RuntimeWarning,
                stacklevel=2,
            )


class TensorBoard:
    """Writes each step's metrics to event files for TensorBoard.

    Args:
        folder: of the event files; it is created.
        from_step: points of this step or a later one in the files that are there already are hidden, so that a resumed
            run has each step once.

    Raises:
        ModuleNotFoundError: if tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, from_step: int | None = None) -> None:
        self.place = str(folder)
        self._writer = _summary_writer()(str(folder), purge_step=from_step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Write one step's metrics; they are on disk when this returns.

        Args:
            metrics: as ``flatten`` takes them, with ``step``.
        """
        for name, value in flatten(metrics, prefix="train").items():
            self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        """Close the file; an event file knows no success or failure."""
        self._writer.close()


def _numbers(metrics: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        if key == "validation":
            for name, scores in value.items():
                yield from _leaves(scores if isinstance(scores, Mapping) else {"loss": scores}, f"valid/{name}")
        elif key == "layers":
            yield from _leaves(value, prefix)
        elif key != "step":
            yield from _leaves(value, f"{prefix}/{key}")


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if isinstance(item, Mapping) and "layer" in item:
                rest = {key: part for key, part in item.items() if key != "layer"}
                yield from _leaves(rest, f"{name}/layer_{item['layer']}")
            else:
                yield from _leaves(item, f"{name}/{index}")
    elif isinstance(value, Real):
        yield name, float(value)
    elif value is not None and not isinstance(value, str):
        raise TypeError(
            f"metric {name!r} is a {type(value).__name__}; expected a number, text, None, or mappings and lists of "
            f"such. A tensor with one element becomes a number by .item()"
        )


def _run_id(path: Path) -> str:
    if not path.exists():
        write_whole(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing("wandb")) from error
    return wandb


def _settings(wandb: Any) -> Any:
    try:
        return wandb.Settings(
            silent=True,
            console="off",  # their copy of the terminal's output does not go with a live display
            finish_timeout=_UPLOAD_SECONDS,
            finish_timeout_raises=True,
        )
    except ValueError as error:
        raise ValueError(
            f"--report-to wandb needs a newer wandb than {wandb.__version__}, which does not know a run's settings: "
            f"pip install --upgrade 'moekit[trackers]'\n{error}"
        ) from error


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing("tensorboard")) from error
    return SummaryWriter


def _missing(package: str) -> str:
    return (
        f"--report-to {package} needs the package {package}, which is not installed: pip install 'moekit[trackers]'; "
        f"metrics.jsonl is written without it"
    )
