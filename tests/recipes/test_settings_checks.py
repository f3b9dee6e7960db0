import math
import re

import pytest

from moekit.recipes.settings import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    TrainSettings,
)

GROUPS = {
    "model": ModelSettings,
    "data": DataSettings,
    "optimizer": OptimizerSettings,
    "parallel": ParallelSettings,
    "run": RunSettings,
}
POSITIVE = {
    "optimizer": ("steps", "batch_size", "global_batch_size", "accum_freq", "lr", "eps"),
    "data": ("train_num_samples", "epochs", "data_lanes", "val_num_samples"),
    "run": ("log_every_n_steps", "val_every_n_steps", "save_frequency", "save_every_n_steps", "keep_checkpoints"),
}
NOT_NEGATIVE = {
    "optimizer": ("warmup", "lr_cooldown_end", "force_min_lr", "wd", "grad_clip_norm", "z_loss_coefficient"),
    "data": ("workers",),
    "model": ("moe_freq", "moe_loss_weight"),
}


def pairs(names):
    return [(group, name) for group, members in names.items() for name in members]


def settings_of(**flags):
    """Put flat settings into their groups."""
    groups = {}
    for group, kind in GROUPS.items():
        groups[group] = kind(**{name: flags.pop(name) for name in list(flags) if name in vars(kind())})
    assert not flags
    return TrainSettings(**groups)


def refuses(message, **flags):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings_of(**flags)


def finite(value):
    return "" if math.isfinite(value) else ", and finite"


@pytest.mark.parametrize("value", [0, -2, math.inf, math.nan])
@pytest.mark.parametrize(("group", "name"), pairs(POSITIVE))
def test_numbers_that_must_be_positive(group, name, value):
    refuses(f"--{name.replace('_', '-')} is {value}; expected a positive number{finite(value)}", **{name: value})


@pytest.mark.parametrize("value", [-1, math.inf, math.nan])
@pytest.mark.parametrize(("group", "name"), pairs(NOT_NEGATIVE))
def test_numbers_that_must_not_be_negative(group, name, value):
    refuses(f"--{name.replace('_', '-')} is {value}; expected at least 0{finite(value)}", **{name: value})
    settings_of(**{name: 0})


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_capacity_is_not_negative(value):
    expected = f"expected at least 0 (0 means dropless){finite(value)}"
    refuses(f"--moe-capacity-factor is {value}; {expected}", moe_capacity_factor=value)
    settings_of(moe_capacity_factor=0.0)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_decay_rates_are_below_one(name, value):
    refuses(f"--{name} is {value}; expected at least 0 and less than 1", **{name: value})
    settings_of(**{name: 0.0})


def test_the_batch_is_of_one_rank_or_of_all():
    message = "--batch-size 4 is of one rank and --global-batch-size 8 of all; give one of the two"
    refuses(message, batch_size=4, global_batch_size=8)


def test_micro_batches_divide_the_batch():
    refuses("--accum-freq is 3, which does not divide --batch-size 8; choose one", batch_size=8, accum_freq=3)
    settings_of(batch_size=9, accum_freq=3)


def test_a_run_has_one_length():
    message = "--steps 5 and --train-num-samples 900 both say how long to train; give one of the two"
    refuses(message, steps=5, train_num_samples=900)


def test_epochs_need_their_tokens():
    refuses(
        "--epochs 4 counts stretches of --train-num-samples tokens, which is not given; give it too, or --steps",
        epochs=4,
    )
    settings_of(epochs=4, train_num_samples=900)


@pytest.mark.parametrize("weights", [(0.5, 0.0), (-1.0,), (math.nan, 1.0), (math.inf,)])
def test_weights_are_positive(weights):
    message = f"--train-data-mix-weights are {list(weights)}; expected positive numbers. Leave out a source"
    refuses(message, train_data_mix_weights=weights)


@pytest.mark.parametrize("name", ["val_data", "val_manifest"])
def test_scoring_needs_a_checkpoint(name):
    message = (
        "there are validation data, no training data (--dataset-manifest), and no checkpoint to score; "
        "give --resume CHECKPOINT to evaluate one, or --dataset-manifest to train"
    )
    refuses(message, **{name: ("v",)})
    settings_of(**{name: ("v",)}, resume="epoch_1.pt")
    settings_of(**{name: ("v",)}, dataset_manifest=("m",))


def test_validation_keys_are_known_and_as_many_as_the_data():
    given = {"val_data": ("a", "b", "c"), "resume": "x"}
    refuses("--val-data-key is txt csv json; expected txt, json, json.gz", val_data_key=("txt", "csv", "json"), **given)
    message = "--val-data-key names 2 extensions for 3 --val-data; expected one for all, or one each"
    refuses(message, val_data_key=("txt", "json"), **given)
    settings_of(val_data_key=("txt",), **given)
    settings_of(val_data_key=("txt", "json", "json.gz"), **given)


@pytest.mark.parametrize("name", ["fsdp_amp", "fsdp_pure_bf16", "fsdp_hybrid", "fsdp_hybrid_o2"])
def test_ways_of_sharding_need_sharding(name):
    flag = "--" + name.replace("_", "-")
    refuses(f"{flag} says how --fsdp works, which is not given; add --fsdp or leave it out", **{name: True})
    settings_of(**{name: True}, fsdp=True)


def test_two_kinds_of_hybrid_sharding_exclude_each_other():
    message = "--fsdp-hybrid and --fsdp-hybrid-o2 exclude each other; give one of the two"
    refuses(message, fsdp=True, fsdp_hybrid=True, fsdp_hybrid_o2=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_expert_ranks", 2),
        ("moe_hidden_ranks", 2),
        ("moe_exchange", "all_gather"),
        ("moe_exchange_chunks", 2),
        ("moe_hierarchical_exchange", True),
    ],
)
def test_ways_of_exchange_need_an_exchange(name, value):
    flag = "--" + name.replace("_", "-")
    message = f"{flag} says how experts are spread over ranks, which they are not; add --moe-expert-model-parallelism"
    refuses(message, **{name: value})
    settings_of(**{name: value}, moe_expert_model_parallelism=True)


def test_exchanges_that_contradict_themselves():
    spread = {"moe_expert_model_parallelism": True}
    refuses("limits --moe-exchange static, and the exchange is all_to_all", moe_exchange_capacity_factor=1.5, **spread)
    settings_of(moe_exchange_capacity_factor=1.5, moe_exchange="static", **spread)
    message = "--moe-exchange static sends to every rank at once; leave out --moe-hierarchical-exchange"
    refuses(message, moe_exchange="static", moe_hierarchical_exchange=True, **spread)
    message = "--moe-exchange static would limit each slice by itself; leave out --moe-exchange-chunks"
    refuses(message, moe_exchange="static", moe_exchange_chunks=2, **spread)
    message = "leave out --torchcompile or --grad-checkpointing, or take another --moe-exchange"
    refuses(message, moe_exchange="static", torchcompile=True, grad_checkpointing=True, **spread)
    settings_of(moe_exchange="all_gather", torchcompile=True, grad_checkpointing=True, **spread)
    refuses("--moe-exchange-chunks is 0; expected a positive number", moe_exchange_chunks=0, **spread)


def test_a_launch_has_the_ranks_that_are_started():
    refuses("--world-size plans for --describe; a launch has as many ranks as torchrun starts", world_size=8)
    settings_of(world_size=8, describe=True)


def test_gradients_are_reduced_in_one_dtype():
    message = "--fsdp-amp reduces gradients in float32 and --fsdp-pure-bf16 in bf16; give one of the two"
    refuses(message, fsdp=True, fsdp_amp=True, fsdp_pure_bf16=True)


def test_sharding_has_no_gradient_scaler():
    message = "--precision amp scales gradients, which --fsdp does not support; use amp_bfloat16"
    refuses(message, fsdp=True, precision="amp")
    settings_of(fsdp=True, precision="amp_bfloat16")


def test_trackers_are_known():
    refuses("wandv", report_to="wandv")
    settings_of(report_to="wandb,tensorboard")


def test_the_latest_checkpoint_is_of_a_named_run():
    refuses("--resume latest needs the --name of the run to go on with", resume="latest")
    settings_of(resume="latest", name="a")


@pytest.mark.parametrize("name", ["a/b", "", "..", ".hidden"])
def test_a_name_is_a_plain_folder_name(name):
    refuses(f"--name is {name!r}; expected a plain folder name", name=name)


def test_one_checkpoint_is_kept_or_several():
    message = "--delete-previous-checkpoint keeps one checkpoint and --keep-checkpoints 3 more; give one of the two"
    refuses(message, delete_previous_checkpoint=True, keep_checkpoints=3)
    settings_of(delete_previous_checkpoint=True, keep_checkpoints=1)


@pytest.mark.parametrize("flag", ["--lr-cooldown-end", "--force-min-lr"])
def test_the_rate_may_end_where_it_is_and_not_above(flag):
    name = flag.removeprefix("--").replace("-", "_")
    settings_of(lr=1e-3, **{name: 1e-3})
    refuses(f"{flag} 0.002 is above --lr 0.001, so the rate would rise; give a smaller one", lr=1e-3, **{name: 2e-3})


@pytest.mark.parametrize(
    ("name", "said"), [("lr_cooldown_end", "is where {} ends"), ("force_min_lr", "is how far {} may fall")]
)
def test_a_constant_rate_has_no_end_of_a_cosine(name, said):
    flag, said = f"--{name.replace('_', '-')}", said.format("--lr-scheduler cosine")
    message = f"{flag} 0.0001 {said}, and --lr-scheduler const stays at --lr; leave out either"
    refuses(message, lr_scheduler="const", **{name: 1e-4})
    settings_of(lr_scheduler="const")


def test_an_eps_that_is_zero_in_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"--eps 1e-08 is zero in fp16, .* give --eps 1e-4 or so"):
        TrainSettings(optimizer=OptimizerSettings(precision="fp16"))
    TrainSettings(optimizer=OptimizerSettings(precision="fp16", eps=1e-7))


def test_what_only_scores_has_no_optimizer_whose_eps_could_be_zero():
    TrainSettings(
        data=DataSettings(val_data=("held_out.txt",)),
        optimizer=OptimizerSettings(precision="fp16"),
        run=RunSettings(resume="logs/a/checkpoints/step_00000002"),
    )
