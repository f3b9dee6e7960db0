"""What a run says and writes while it trains: metrics, progress, and which sequences it read."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from rich.console import Console

from moekit.lm.consoles import print_lines
from moekit.lm.displays import Display, StepReport, show_training
from moekit.lm.json_lines import JsonLines
from moekit.lm.orders import Address
from moekit.lm.permutations import BLOCK, block_permutation
from moekit.lm.trackers import Trackers, open_trackers, parse_report_to
from moekit.recipes.evaluate import Evaluation
from moekit.recipes.language_models import first_moe_layer, flops_per_token, moe_layers
from moekit.recipes.routing_sums import layer_loads
from moekit.recipes.runs import Run
from moekit.recipes.saving import Progress
from moekit.recipes.stored_settings import flat_settings
from moekit.recipes.updates import StepResult

_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, by NVIDIA's data sheets


class Speed(NamedTuple):
    """How fast a run trains.

    Attributes:
        steps: optimizer steps per second.
        tokens: targets per second, over all ranks; holes of bad data and padding are none.
    """

    steps: float
    tokens: float


class Clock:
    """Seconds that went into training steps; reports, validations and checkpoints are not counted.

    Args:
        seconds: of the run so far.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._resumed = time.monotonic()
        self._lap_steps, self._lap_tokens, self._lap_start = 0, 0, seconds

    @contextmanager
    def paused(self, *, steps: int, tokens: int) -> Iterator[None]:
        """Count the steps since the last pause and their tokens, and stop the clock meanwhile."""
        self.seconds += time.monotonic() - self._resumed
        self._lap_steps += steps
        self._lap_tokens += tokens
        yield
        self._resumed = time.monotonic()

    def lap(self) -> Speed:
        """Return the speed since the last lap."""
        seconds = max(self.seconds - self._lap_start, 1e-9)
        speed = Speed(self._lap_steps / seconds, self._lap_tokens / seconds)
        self._lap_steps, self._lap_tokens, self._lap_start = 0, 0, self.seconds
        return speed


class Recorder:
    """Writes a run's metrics and shows its progress; on ranks other than 0 it does nothing.

    Args:
        run: the run.
        trackers: to write to; None on other ranks.
        display: to show progress on; None on other ranks.
        data_log: for the sequences of each step, or None.
    """

    def __init__(
        self, run: Run, trackers: Trackers | None, display: Display | None, data_log: JsonLines | None
    ) -> None:
        self._run, self._trackers, self._display, self._data_log = run, trackers, display, data_log
        self._block = lru_cache(maxsize=1024)(partial(block_permutation, seed=run.settings.run.seed))

    def step(
        self,
        result: StepResult,
        progress: Progress,
        *,
        speed: Speed,
        data_time: float,
        validation: Mapping[str, Evaluation] | None = None,
    ) -> None:
        """Report a step.

        Args:
            result: of the step.
            progress: after it.
            speed: since the last report.
            data_time: seconds that this step waited for data.
            validation: name of a validation set to the scores of its front.
        """
        if self._trackers is None or self._display is None:
            return
        metrics = step_metrics(self._run, result, progress, speed=speed, data_time=data_time)
        loads = layer_loads(self._run.model, result.loss.routing)
        coefficients = _coefficients_of_states(self._run)
        metrics["layers"] = [{**load._asdict(), **own} for load, own in zip(loads, coefficients, strict=True)]
        if validation:
            metrics["validation"] = {name: scores.loss for name, scores in validation.items()}
            metrics["validation_tokens"] = {name: scores.tokens for name, scores in validation.items()}
        self._trackers.log(metrics)
        report = StepReport(
            progress.step,
            self._run.budget.steps,
            metrics["loss"],
            metrics.get("loss/load_balance"),
            result.rate,
            metrics["tokens_per_second"],
            loads,
            metrics.get("mfu"),
        )
        self._display.update(report)

    def data(self, step: int) -> None:
        """Write down which sequences a step read, in the order of the global batch.

        Each is the name of its source, the pass over it, the shard as the manifest names it, and the member's place in
        the tar, from 0, among the members with the extension of ``--data-key``; without that, among all but folders.

        Args:
            step: optimizer steps done.
        """
        if self._data_log is not None:
            sequences = [self._name(address) for address in self._run.stream.addresses]
            self._data_log.log({"step": step, "sequences": sequences})

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._display is not None:
            self._display.say(text)

    def _name(self, address: Address) -> list[Any]:
        source = self._run.corpus.sources[address.source]
        shard = source.shards[address.shard]
        block, offset = divmod(address.position, BLOCK)
        size = min(BLOCK, shard.num_sequences - block * BLOCK)
        member = block * BLOCK + self._block(block, size, address=address._replace(position=0))[offset]
        return [source.name, address.data_pass, shard.full_name, member]


@contextmanager
def recording(run: Run, console: Console, progress: Progress) -> Iterator[Recorder]:
    """Open everything that a run writes to while it trains.

    Args:
        run: the run.
        console: where to show progress.
        progress: where the run starts; what an earlier launch wrote of later steps is taken out.

    Yields:
        Recorder.
    """
    if run.world.rank:
        yield Recorder(run, None, None, None)
        return
    given, first = run.settings.run, progress.step + 1
    with ExitStack() as stack:
        trackers = stack.enter_context(
            open_trackers(
                parse_report_to(given.report_to),
                run.folder,
                from_step=first,
                name=given.name or run.folder.name,
                project=given.wandb_project_name,
                config=flat_settings(run.settings),
            )
        )
        for place in trackers.places[1:]:  # the first is the run's own metrics.jsonl
            print_lines(console, f"tracked in {place}")
        display = stack.enter_context(show_training(console, run.budget.steps, done=progress.step))
        data_log = JsonLines(run.folder / "data.jsonl", from_step=first) if given.log_data else None
        yield Recorder(run, trackers, display, data_log)


def step_metrics(run: Run, result: StepResult, progress: Progress, *, speed: Speed, data_time: float) -> dict[str, Any]:
    """Gather the numbers of a step under the names that trackers show, which are OpenLM's where it has them.

    ``samples_per_second`` and ``samples_per_second_per_gpu`` count tokens, as in OpenLM. ``load_balancing_loss`` has
    its coefficient in it, ``loss/load_balance`` has not: that is 1 at perfect balance, or K for a loss that counts per
    token (``results.json`` names the form). Recipes without a loss of that name have neither. ``epoch`` counts the
    epochs that have ended. Of the epoch that the step belongs to, ``seen_steps_epoch`` of ``expected_steps_epoch`` are
    done: all of them at its end. ``tokens`` is nominal, what the steps so far have room for, by which budget and
    schedule go; ``step_tokens`` counts the targets of the step, and rates count targets too: holes of bad data and
    padding are none.

    Args:
        run: the run.
        result: of the step.
        progress: after it.
        speed: since the last report.
        data_time: seconds that this step waited for data.

    Returns:
        Name to number.
    """
    loss, budget, ranks = result.loss, run.budget, run.world.size
    tensors = [loss.cross_entropy, loss.z, loss.logit_mean, *loss.balancing.values()]
    cross_entropy, z, logit_mean, *terms = torch.stack(tensors).tolist()  # one wait for the device
    balancing = dict(zip(loss.balancing, terms, strict=True))
    metrics: dict[str, Any] = {
        "step": progress.step,
        **_epoch_metrics(run, progress.step),
        "tokens": progress.step * budget.tokens_per_step,
        "step_tokens": result.targets,
        "loss": cross_entropy,
        **{f"loss/{name}": term for name, term in balancing.items()},
        **_openlm_balance(run, balancing),
        "lr": result.rate,
        "grad_norm": result.gradient_norm,
        "tokens_per_second": round(speed.tokens, 1),
        "samples_per_second": round(speed.tokens, 1),
        "samples_per_second_per_gpu": round(speed.tokens / ranks, 1),
        "tflops_per_second": round(flops_per_token(run.model) * speed.tokens / 1e12, 4),
        "data_time": data_time,
        "batch_time": 1 / speed.steps if speed.steps else 0.0,
        **result.seconds,
        "skipped_steps": progress.skipped_steps,
        "skipped_data": dict(progress.skipped_data),
    }
    mfu = utilization(run, speed.tokens)
    if mfu is not None:
        metrics["mfu"] = mfu
    if run.settings.optimizer.z_loss_coefficient:
        metrics["z_loss"] = z
    if run.settings.run.log_logit_mean:
        metrics["logit_mean"] = logit_mean
    if run.scaler.is_enabled():
        metrics["loss_scale"] = run.scaler.get_scale()
    return metrics


def utilization(run: Run, tokens_per_second: float) -> float | None:
    """Compute model FLOPs utilization (MFU): ``flops_per_token`` for each, of what the devices could do.

    Args:
        run: the run.
        tokens_per_second: targets, over all ranks.

    Returns:
        A share of the peak of all ranks' devices, at most so much where ``flops_per_token`` is a bound; None where the
        peak of the device is not known.

    References:
        Chowdhery et al., PaLM, 2022, appendix B, https://arxiv.org/abs/2204.02311
    """
    peak = next((rate for name, rate in _PEAK.items() if name in device_name(run.world.device)), None)
    return None if peak is None else flops_per_token(run.model) * tokens_per_second / (peak * run.world.size)


def _epoch_metrics(run: Run, step: int) -> dict[str, int]:
    before = run.budget.epochs_ended(step - 1)
    first, last = run.budget.epoch_end(before), run.budget.epoch_end(before + 1)
    seen = {"expected_steps_epoch": last - first, "seen_steps_epoch": step - first}
    passes = {f"dataset_pass_{source}": count for source, count in enumerate(run.stream.passes)}
    return {"epoch": run.budget.epochs_ended(step), **seen, **passes}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _openlm_balance(run: Run, balancing: Mapping[str, float]) -> dict[str, float]:
    layer = first_moe_layer(run.model)
    if layer is None or "load_balance" not in balancing:
        return {}
    return {"load_balancing_loss": layer.recipe.coefficients.get("load_balance", 0.0) * balancing["load_balance"]}


def _coefficients_of_states(run: Run) -> list[dict[str, float]]:
    """Return of each MoE layer the state that is a loss's coefficient, by its name, as it is for the next step."""
    states = [(layer.recipe.state, layer.state) for _, layer in moe_layers(run.model)]
    return [
        {kind.name: float(state)} if kind is not None and kind.scales and state is not None else {}
        for kind, state in states
    ]
