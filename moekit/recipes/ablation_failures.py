"""What becomes of a run that raises an error, or that another process does: it is told at the end, and others go on."""

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from moekit.lm.files import write_whole
from moekit.recipes.ablation_recipes import other_recipe
from moekit.recipes.ablation_runs import Job, do, line_of
from moekit.recipes.names import users_fault

ERROR_FILE = "error.txt"


class Failure(NamedTuple):
    """A run that raised an error. The error itself is not kept: its traceback holds the model.

    Attributes:
        label: of the run's rows.
        seed: of the run.
        kind: class of the error.
        told: what went wrong, in words.
        report: the file with the traceback, or None.
    """

    label: str
    seed: int
    kind: str
    told: str
    report: Path | None = None

    @property
    def line(self) -> dict[str, Any]:
        """What the table needs, in the manner of ``line_of``."""
        return {"router": self.label, "seed": self.seed, "failed": self.told, "error": self.kind}


class Held(NamedTuple):
    """A run that another process does: it has not failed, and its folder is not ours.

    Attributes:
        job: the run.
        told: which folder it is, and who has it, in words.
    """

    job: Job
    told: str


def failure_of(job: Job, error: BaseException) -> Failure:
    """Note an error, and write its traceback into the run's folder.

    Args:
        job: the run.
        error: that ended it.

    Returns:
        Failure.
    """
    kind, report = type(error).__name__, None
    fault = users_fault(job.settings.model.recipe, error) if isinstance(error, Exception) else None
    with suppress(OSError):  # the disk may be what failed
        job.folder.mkdir(parents=True, exist_ok=True)
        report = write_whole(job.folder / ERROR_FILE, "".join(traceback.format_exception(error)))
    return Failure(job.label, job.seed, kind, fault or f"{kind}: {error}", report)


def attempt(job: Job, *, keep_checkpoints: bool) -> dict[str, Any] | Failure | Held | None:
    """Do a run unless it is done, or another process does it.

    Args:
        job: the run.
        keep_checkpoints: leave the checkpoint of a run that is done.

    Returns:
        Its line of ``results.jsonl``; or what went wrong; or who does it; or None if somebody asked to stop.
    """
    try:
        # again, since other processes that share the folder have gone on
        if (other := other_recipe(job.folder, job.settings.model.recipe)) is not None:
            return Failure(job.label, job.seed, "ValueError", other)
        if not job.results.exists() and not do(job, keep_checkpoints=keep_checkpoints):
            return None
        line = line_of(job)
    except BlockingIOError as error:
        return Held(job, str(error).partition(";")[0])  # what follows is about flags of the training program
    except (Exception, SystemExit) as error:  # a recipe's code may raise anything, and sys.exit would end all
        return failure_of(job, error)
    (job.folder / ERROR_FILE).unlink(missing_ok=True)
    return line


def other_sets(runs: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[Failure]:
    """Find the runs that were not scored on the validation sets of most: all share their data, so a file was edited.

    Args:
        runs: each with its line of ``results.jsonl``.

    Returns:
        What is wrong with them.
    """
    named = [(job, tuple(sorted(line["validation"]))) for job, line in runs if "failed" not in line]
    counts = Counter(names for _, names in named)
    usual = max(counts, key=counts.__getitem__, default=())
    return [
        failure_of(
            job,
            ValueError(
                f"{job.results} has scores of {', '.join(names)}; expected {', '.join(usual)}, as most runs of the "
                f"table have. Delete it, and the run is done again"
            ),
        )
        for job, names in named
        if names != usual
    ]


def told_failures(failures: Sequence[Failure], *, runs: int) -> str:
    """Name the runs that failed, those with one cause together.

    Args:
        failures: at least one.
        runs: of the ablation.

    Returns:
        Lines of text.

    Example:
        >>> print(told_failures([Failure("a", seed, "ValueError", "ValueError: no") for seed in (0, 1)], runs=4))
        2 of 4 runs failed; the same command tries them again
          a, seed 0; a, seed 1: ValueError: no
    """
    causes: dict[str, list[Failure]] = {}
    for failure in failures:
        causes.setdefault(failure.told, []).append(failure)
    lines = [f"{len(failures)} of {runs} runs failed; the same command tries them again"]
    for told, own in causes.items():
        lines.append(f"  {'; '.join(f'{each.label}, seed {each.seed}' for each in own)}: {told}")
        lines += [f"  traceback: {own[0].report}"] if own[0].report else []
    return "\n".join(lines)


def told_held(held: Sequence[Held], *, runs: int) -> str:
    """Name the runs that other processes do.

    Args:
        held: at least one.
        runs: of the ablation.

    Returns:
        Lines of text.
    """
    counted = f"{len(held)} of {runs} runs {'is' if len(held) == 1 else 'are'}"
    lines = [f"{counted} left to another process; give the same command again when it has ended"]
    return "\n".join([*lines, *(f"  {each.job.label}, seed {each.job.seed}: {each.told}" for each in held)])
