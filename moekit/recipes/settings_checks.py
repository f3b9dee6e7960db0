"""Which settings make no sense, alone or together, and how to mend them."""

import math
from pathlib import PurePath
from typing import TYPE_CHECKING

from moekit.lm.configs import OF_METHOD
from moekit.lm.trackers import parse_report_to
from moekit.recipes.derived import OF_EXCHANGE
from moekit.recipes.settings_legacy import check_refused
from moekit.recipes.wording import flag_of

if TYPE_CHECKING:
    from moekit.recipes.settings import (
        DataSettings,
        ModelSettings,
        OptimizerSettings,
        ParallelSettings,
        RunSettings,
        TrainSettings,
    )

SMALLEST_FP16 = 6e-8  # what is smaller rounds to zero

_MOST_LANES = 65_536


def check_settings(settings: "TrainSettings") -> None:
    """Refuse settings that make no sense.

    Args:
        settings: to check.

    Raises:
        ValueError: names the flag, what was given, what was expected, and how to mend it.

    Example:
        >>> from moekit.recipes.settings import OptimizerSettings, TrainSettings
        >>> TrainSettings(optimizer=OptimizerSettings(accum_freq=3, batch_size=4))
        Traceback (most recent call last):
        ValueError: --accum-freq is 3, which does not divide --batch-size 4; choose one that does
    """
    optimizer, data, run, model = settings.optimizer, settings.data, settings.run, settings.model
    _check_positive(
        steps=optimizer.steps,
        batch_size=optimizer.batch_size,
        global_batch_size=optimizer.global_batch_size,
        accum_freq=optimizer.accum_freq,
        lr=optimizer.lr,
        eps=optimizer.eps,
        train_num_samples=data.train_num_samples,
        epochs=data.epochs,
        data_lanes=data.data_lanes,
        val_num_samples=data.val_num_samples,
        log_every_n_steps=run.log_every_n_steps,
        val_every_n_steps=run.val_every_n_steps,
        save_frequency=run.save_frequency,
        save_every_n_steps=run.save_every_n_steps,
        keep_checkpoints=run.keep_checkpoints,
    )
    _check_not_negative(
        warmup=optimizer.warmup,
        lr_cooldown_end=optimizer.lr_cooldown_end,
        force_min_lr=optimizer.force_min_lr,
        wd=optimizer.wd,
        grad_clip_norm=optimizer.grad_clip_norm,
        z_loss_coefficient=optimizer.z_loss_coefficient,
        workers=data.workers,
        moe_freq=model.moe_freq,
        moe_loss_weight=model.moe_loss_weight,
    )
    _check_decay_rates(beta1=optimizer.beta1, beta2=optimizer.beta2)
    if model.moe_capacity_factor is not None and not 0 <= model.moe_capacity_factor < float("inf"):
        raise ValueError(
            f"--moe-capacity-factor is {model.moe_capacity_factor}; expected at least 0 (0 means dropless)"
            f"{_and_finite(model.moe_capacity_factor)}"
        )
    _check_texts(settings)
    _check_batch(optimizer)
    _check_length(optimizer, data)
    if not settings.evaluates_only:
        _check_eps(optimizer)
    _check_data(settings)
    check_refused(settings.legacy)
    _check_dense(model)
    _check_parallel(settings.parallel, optimizer)
    _check_exchange(settings)
    if run.world_size is not None and not run.describe:
        raise ValueError("--world-size plans for --describe; a launch has as many ranks as torchrun starts")
    _check_run(run)


def _check_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag_of(name)} is {value}; expected a positive number{_and_finite(value)}")


def _check_not_negative(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{flag_of(name)} is {value}; expected at least 0{_and_finite(value)}")


def _and_finite(value: float) -> str:
    """End what was expected of a number that is above all bounds, or none."""
    return "" if math.isfinite(value) else ", and finite"


def _check_texts(settings: "TrainSettings") -> None:
    """Refuse what no file can be called, and empty names of what must be there."""
    filled = ("preset", "recipe", "dataset_manifest", "val_data", "val_manifest", "resume")
    for group in (settings.model, settings.data, settings.run):
        for name, value in vars(group).items():
            for text in value if isinstance(value, tuple) else (value,):
                if not isinstance(text, str | PurePath):
                    continue
                flag = "--model" if name == "preset" else flag_of(name)
                if "\0" in str(text) or not _is_unicode(str(text)):
                    raise ValueError(f"{flag} is {str(text)!r}; expected UTF-8 text without a zero byte")
                if name in filled and not text:
                    raise ValueError(f"{flag} is empty; give a name or path, or leave the flag out")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_decay_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{flag_of(name)} is {rate}; expected at least 0 and less than 1")


def _check_batch(optimizer: "OptimizerSettings") -> None:
    if optimizer.batch_size is not None and optimizer.global_batch_size is not None:
        raise ValueError(
            f"--batch-size {optimizer.batch_size} is of one rank and --global-batch-size {optimizer.global_batch_size} "
            "of all; give one of the two"
        )
    if optimizer.batch_size is not None and optimizer.batch_size % optimizer.accum_freq:
        raise ValueError(
            f"--accum-freq is {optimizer.accum_freq}, which does not divide --batch-size {optimizer.batch_size}; "
            "choose one that does"
        )


def _check_eps(optimizer: "OptimizerSettings") -> None:
    if optimizer.precision == "fp16" and optimizer.eps < SMALLEST_FP16:
        raise ValueError(
            f"--eps {optimizer.eps:g} is zero in fp16, in which --precision fp16 keeps the optimizer's state; "
            "give --eps 1e-4 or so, or use --precision amp"
        )


def _check_length(optimizer: "OptimizerSettings", data: "DataSettings") -> None:
    if optimizer.steps is not None and data.train_num_samples is not None:
        raise ValueError(
            f"--steps {optimizer.steps} and --train-num-samples {data.train_num_samples} both say how long to train; "
            "give one of the two"
        )
    if optimizer.lr_cooldown_end is not None and optimizer.lr_scheduler == "const":
        raise ValueError(
            f"--lr-cooldown-end {optimizer.lr_cooldown_end:g} is where --lr-scheduler cosine ends, and "
            "--lr-scheduler const stays at --lr; leave out either"
        )
    if optimizer.force_min_lr and optimizer.lr_scheduler == "const":
        raise ValueError(
            f"--force-min-lr {optimizer.force_min_lr:g} is how far --lr-scheduler cosine may fall, and --lr-scheduler "
            "const stays at --lr; leave out either"
        )
    for name in ("lr_cooldown_end", "force_min_lr"):
        rate = getattr(optimizer, name)
        if rate is not None and rate > optimizer.lr:
            raise ValueError(
                f"{flag_of(name)} {rate:g} is above --lr {optimizer.lr:g}, so the rate would rise; give a smaller one"
            )
    if data.epochs is not None and data.train_num_samples is None:
        raise ValueError(
            f"--epochs {data.epochs} counts stretches of --train-num-samples tokens, which is not given; "
            "give it too, or --steps instead"
        )


def _check_data(settings: "TrainSettings") -> None:
    data, run = settings.data, settings.run
    if any(not 0 < weight < float("inf") for weight in data.train_data_mix_weights):
        raise ValueError(
            f"--train-data-mix-weights are {list(data.train_data_mix_weights)}; expected positive numbers. "
            "Leave out a source you do not want"
        )
    if data.data_lanes > _MOST_LANES:
        raise ValueError(f"--data-lanes is {data.data_lanes}; each is an open file, expected at most {_MOST_LANES}")
    if settings.evaluates_only and run.resume is None:
        raise ValueError(
            "there are validation data, no training data (--dataset-manifest), and no checkpoint to score; "
            "give --resume CHECKPOINT to evaluate one, or --dataset-manifest to train"
        )
    if data.val_data_key and not data.val_data:
        raise ValueError(
            f"--val-data-key {' '.join(data.val_data_key)} says how to read --val-data, which is not given"
        )
    keys, known = data.val_data_key, ("txt", "json", "json.gz")
    if any(key not in known for key in keys):
        raise ValueError(f"--val-data-key is {' '.join(keys)}; expected {', '.join(known)}")
    if len(keys) > 1 and len(keys) != len(data.val_data):
        raise ValueError(
            f"--val-data-key names {len(keys)} extensions for {len(data.val_data)} --val-data; expected one for all, "
            "or one each"
        )


def _check_parallel(parallel: "ParallelSettings", optimizer: "OptimizerSettings") -> None:
    for name in ("fsdp_amp", "fsdp_pure_bf16", "fsdp_hybrid", "fsdp_hybrid_o2"):
        if getattr(parallel, name) and not parallel.fsdp:
            raise ValueError(f"{flag_of(name)} says how --fsdp works, which is not given; add --fsdp or leave it out")
    if parallel.fsdp_hybrid and parallel.fsdp_hybrid_o2:
        raise ValueError("--fsdp-hybrid and --fsdp-hybrid-o2 exclude each other; give one of the two")
    if parallel.fsdp_amp and parallel.fsdp_pure_bf16:
        raise ValueError("--fsdp-amp reduces gradients in float32 and --fsdp-pure-bf16 in bf16; give one of the two")
    for name in ("fsdp", "moe_weight_parallelism", "moe_expert_model_parallelism"):
        if getattr(parallel, name) and optimizer.precision == "amp":
            raise ValueError(
                f"--precision amp scales gradients, which {flag_of(name)} does not support; use amp_bfloat16"
            )


def _check_exchange(settings: "TrainSettings") -> None:
    parallel = settings.parallel
    _check_positive(
        moe_expert_ranks=parallel.moe_expert_ranks,
        moe_hidden_ranks=parallel.moe_hidden_ranks,
        moe_exchange_capacity_factor=parallel.moe_exchange_capacity_factor,
        moe_exchange_chunks=parallel.moe_exchange_chunks,
        ranks_per_node=parallel.ranks_per_node,
        world_size=settings.run.world_size,
    )
    changed = [
        flag_of(name)
        for name in OF_EXCHANGE
        if getattr(parallel, name) != type(parallel).__dataclass_fields__[name].default
    ]
    if changed and not parallel.moe_expert_model_parallelism:
        raise ValueError(
            f"{changed[0]} says how experts are spread over ranks, which they are not; add "
            "--moe-expert-model-parallelism or leave it out"
        )
    if parallel.moe_exchange_capacity_factor != 2.0 and parallel.moe_exchange != "static":
        raise ValueError(
            f"--moe-exchange-capacity-factor limits --moe-exchange static, and the exchange is {parallel.moe_exchange}"
            "; leave it out"
        )
    if parallel.moe_exchange == "static" and parallel.moe_exchange_chunks > 1:
        raise ValueError("--moe-exchange static would limit each slice by itself; leave out --moe-exchange-chunks")
    if parallel.moe_exchange == "static" and parallel.moe_hierarchical_exchange:
        raise ValueError("--moe-exchange static sends to every rank at once; leave out --moe-hierarchical-exchange")
    compiled = settings.run.torchcompile and settings.run.grad_checkpointing
    if parallel.moe_exchange == "static" and compiled:
        raise ValueError(
            "--moe-exchange static leaves no break in what is compiled, and torch cannot compile --grad-checkpointing "
            "of spread experts then; leave out --torchcompile or --grad-checkpointing, or take another --moe-exchange"
        )


def _check_dense(model: "ModelSettings") -> None:
    given = [flag_of(name) for name in OF_METHOD if getattr(model, name) is not None]
    if model.moe_freq == 0 and given:
        raise ValueError(f"--moe-freq 0 makes a dense model, so {', '.join(given)} would say nothing; leave out either")


def _check_run(run: "RunSettings") -> None:
    parse_report_to(run.report_to)
    if run.resume == "latest" and run.name is None:
        raise ValueError("--resume latest needs the --name of the run to go on with")
    if run.name is not None and (not run.name or "/" in run.name or run.name.startswith(".") or len(run.name) > 200):
        raise ValueError(f"--name is {run.name!r}; expected a plain folder name, of at most 200 characters")
    if not -(2**63) <= run.seed < 2**63:
        raise ValueError(f"--seed is {run.seed}; expected an integer of 64 bits")
    if run.delete_previous_checkpoint and run.keep_checkpoints not in (None, 1):
        raise ValueError(
            f"--delete-previous-checkpoint keeps one checkpoint and --keep-checkpoints {run.keep_checkpoints} more; "
            "give one of the two"
        )
