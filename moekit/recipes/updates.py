"""One optimizer step of a run, on all ranks together."""

import math
import time
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.lm.batches import Batch
from moekit.parallel import all_sum, sum_gradients
from moekit.recipes.budgets import final_rate, warmup_steps
from moekit.recipes.optimizers import clip_gradients, gradient_norm, learning_rate
from moekit.recipes.precisions import autocast
from moekit.recipes.router_states import check_states, nonfinite_in_states, update_router_states
from moekit.recipes.runs import Run
from moekit.recipes.steps import (
    LossRules,
    StepLoss,
    Tokens,
    take_gradient,
)


class StepResult(NamedTuple):
    """What an optimizer step did.

    Attributes:
        loss: over the global batch.
        gradient_norm: before clipping.
        rate: learning rate.
        finite: whether loss and gradient were finite, as far as that is not the gradient scaler's business.
        taken: whether anything was updated.
        seconds: name of a part of the step to its seconds on this rank's clock: ``forward_time``, ``backward_time``,
            ``sync_time`` (gradients over ranks, and clipping), ``optim_step_time``. With a GPU ``sync_time`` has the
            wait for it, and the others are what the host takes to queue.
        targets: tokens that the global batch predicts; holes of bad data and padding are none.
    """

    loss: StepLoss
    gradient_norm: float
    rate: float
    finite: bool
    taken: bool
    seconds: dict[str, float]
    targets: int


def agree(run: Run, batch: Batch | None, *, stop: bool) -> tuple[Tokens, bool]:
    """Add up over ranks how many tokens a global batch has, and hear whether any rank has to stop.

    Args:
        run: the run.
        batch: this rank's; None if it got none, and then it has to stop.
        stop: whether this rank has to stop.

    Returns:
        Tokens of the global batch, and whether to stop; the same on every rank.
    """
    own = Tokens(0, 0) if batch is None else Tokens(batch.num_inputs, batch.num_targets)
    total = all_sum(run.world, torch.tensor([*own, int(stop)])).tolist()
    return Tokens(*total[:2]), bool(total[2])


def train_step(run: Run, batch: Batch, *, step: int, tokens: Tokens, statistics: bool) -> StepResult:
    """Take one optimizer step; a step whose loss or gradient is not finite changes nothing, nor one without a target.

    The means over targets of a step without any are NaN, whose data are bad or padding on every rank.

    With a gradient scaler, a gradient that is not finite under a finite loss is the scaler's business: it leaves the
    step out and takes a smaller scale.

    Args:
        run: changed in place.
        batch: this rank's.
        step: optimizer steps done before.
        tokens: of the global batch.
        statistics: compute all routing statistics.

    Returns:
        StepResult.

    Raises:
        FloatingPointError: if a router's state has become NaN by the steps before.
    """
    started = time.perf_counter()
    given = run.settings.optimizer
    rate = _step_rate(run, step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    ids = batch.ids.to(run.world.device, non_blocking=True)
    micro_batches = ids.chunk(given.accum_freq)
    loss = take_gradient(
        run.model,
        micro_batches,
        tokens=tokens,
        rules=_loss_rules(run),
        world=run.world,
        masked=batch.has_padding,
        statistics=statistics,
    )
    computed = time.perf_counter()
    sum_gradients(run.model.parameters(), run.grid)
    run.scaler.unscale_(run.optimizer)
    total, norm = _read(run, loss, gradient_norm(run.model, run.world), step=step)
    clip_gradients(run.model, norm, given.grad_clip_norm)
    synced = time.perf_counter()
    finite = math.isfinite(total) and (math.isfinite(norm) or run.scaler.is_enabled())
    wanted = finite and bool(tokens.targets)  # decay and momentum would move parameters without data
    scale = run.scaler.get_scale()
    if wanted:
        run.scaler.step(run.optimizer)
    run.scaler.update(None if tokens.targets else scale)  # a step without targets counts towards no larger scale
    taken = wanted and run.scaler.get_scale() >= scale  # a scaler that left the step out lowers its scale
    if taken:
        update_router_states(run.model, loss.observed)
    seconds = {
        "forward_time": computed - started - loss.backward_time,
        "backward_time": loss.backward_time,
        "sync_time": synced - computed,
        "optim_step_time": time.perf_counter() - synced,
    }
    return StepResult(_of_targets(loss, tokens), norm, rate, finite, taken, seconds, int(tokens.targets))


def _of_targets(loss: StepLoss, tokens: Tokens) -> StepLoss:
    if tokens.targets:
        return loss
    nan = torch.full_like(loss.cross_entropy, math.nan)
    return loss._replace(cross_entropy=nan, z=nan, logit_mean=nan)


def _read(run: Run, loss: StepLoss, norm: Tensor, *, step: int) -> tuple[float, float]:
    """Read loss and norm in one wait for the device, and hear in it whether routers still remember numbers."""
    lost = nonfinite_in_states(run.model)
    numbers = [loss.total, norm] if lost is None else [loss.total, norm, lost]
    total, length, *found = torch.stack([each.double() for each in numbers]).tolist()
    if any(found):
        check_states(run.model, step=step)
    return total, length


def _step_rate(run: Run, step: int) -> float:
    """Return the learning rate of a step."""
    given, steps = run.settings.optimizer, run.budget.steps
    return learning_rate(
        step,
        steps=steps,
        peak=given.lr,
        warmup=warmup_steps(given, steps),
        end=final_rate(given),
        cosine=given.lr_scheduler == "cosine",
        least=given.force_min_lr,
    )


def _loss_rules(run: Run) -> LossRules:
    """Return what the loss of a run is made of."""
    given = run.settings.optimizer
    return LossRules(
        z_coefficient=given.z_loss_coefficient,
        whole_step=run.settings.model.moe_loss_scope == "step",
        precision=partial(autocast, given.precision, run.world.device),
        scale=run.scaler.scale,
        logit_mean=run.settings.run.log_logit_mean,
        forward=run.forward,
    )
