"""Flags of OpenLM that mean nothing any more: accepted, so that old commands run, and answered in one line each."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import tyro

from moekit.recipes.wording import flag_of

_NO_EFFECT, _REFUSED = "No effect: ", "Not supported: "


def _because(why: str) -> Any:
    return tyro.conf.arg(help=_NO_EFFECT + why)


def _refused(why: str) -> Any:
    return tyro.conf.arg(help=_REFUSED + why)


@dataclass(frozen=True)
class LegacySettings:
    """Flags of OpenLM without effect here; each says why, once."""

    no_skip_tokens: Annotated[bool, _because("every sequence of a shard is used, always.")] = False
    accurate_total_tokens: Annotated[bool, _because("a run always has the steps that its tokens come to.")] = False
    disable_buffer: Annotated[bool, _because("there are no shuffle buffers, the order is drawn.")] = False
    global_val_batch_size: Annotated[int | None, _because("scores depend on no batch size.")] = None
    val_frequency: Annotated[int | None, _because("see --val-every-n-steps.")] = None
    val_seq_ci: Annotated[bool, _because("bounds over sequences are always computed.")] = False
    val_tok_ci: Annotated[bool, _because("bounds are over sequences, whose tokens depend on each other.")] = False
    val_iter_ci: Annotated[int | None, _because("bounds always come from 2000 resamples.")] = None
    ignore_parse_errors: Annotated[bool, _because("see --on-bad-data skip.")] = False
    data_tolerate_error_p: Annotated[float | None, _because("see --on-bad-data.")] = None
    data_tolerate_num_ckpts: Annotated[int | None, _because("see --on-bad-data.")] = None
    optimizer: Annotated[str, _because("it is always AdamW, as in OpenLM.")] = ""
    attn_name: Annotated[str, _because("it is always torch's scaled dot-product attention.")] = ""
    fsdp_cpu_offload: Annotated[bool, _because("parameters stay on the device.")] = False
    fsdp_use_orig_params: Annotated[bool, _because("FSDP2 always keeps the parameters.")] = False
    fsdp_backward_prefetch: Annotated[bool, _because("FSDP2 always prefetches.")] = False
    fsdp_limit_all_gathers: Annotated[bool, _because("FSDP2 bounds its memory by itself.")] = False
    fsdp_checkpoint: Annotated[bool, _because("OpenLM never read it; see --grad-checkpointing.")] = False
    use_bn_sync: Annotated[bool, _because("there is no batch norm.")] = False
    use_bnb_linear: Annotated[str, _because("OpenLM never read it.")] = ""
    torchscript: Annotated[bool, _because("see --torchcompile.")] = False
    trace: Annotated[bool, _because("see --torchcompile.")] = False
    force_distributed: Annotated[bool, _because("the launcher decides, torchrun starts the ranks.")] = False
    preset_world_size: Annotated[int | None, _because("the launcher decides.")] = None
    dist_backend: Annotated[str, _because("it is NCCL between GPUs and gloo between CPUs.")] = ""
    dist_url: Annotated[str, _because("it is the launcher's.")] = ""
    no_set_device_rank: Annotated[bool, _because("each rank has the GPU of its local rank.")] = False
    ddp_static_graph: Annotated[bool, _because("there is no DDP wrapper.")] = False
    experimental_meta_device: Annotated[bool, _because("weights are the same for any number of ranks.")] = False
    copy_codebase: Annotated[bool, _because("config.json and the package's version describe a run.")] = False
    log_local: Annotated[bool, _because("rank 0 reports for all ranks.")] = False
    save_most_recent: Annotated[bool, _because("`--resume latest` finds the newest.")] = False
    epochs_cooldown: Annotated[int | None, _because("OpenLM never used it.")] = None
    lr_cooldown_power: Annotated[float | None, _because("OpenLM never used it.")] = None
    distill_model: Annotated[str, _because("OpenLM never used it.")] = ""
    distill_pretrained: Annotated[str, _because("OpenLM never used it.")] = ""
    train_data: Annotated[tuple[str, ...], _refused("give manifests: --dataset-manifest.")] = ()
    dataset_resampled: Annotated[bool, _refused("nothing repeats in a pass; see --multiple-data-passes.")] = False
    dataset_type: Annotated[str, _refused("without --dataset-manifest the embedded data are used.")] = ""
    target_mask_left: Annotated[int | None, _refused("targets are masked by id -1 in the shards.")] = None
    target_mask_individual: Annotated[int | None, _refused("targets are masked by id -1 in the shards.")] = None
    averagers: Annotated[str, _refused("weights are not averaged.")] = ""
    remote_sync: Annotated[str, _refused("checkpoints are local; copy the run folder.")] = ""


def without_effect(settings: LegacySettings) -> list[str]:
    """Say of each flag that was given why it has no effect.

    Args:
        settings: of the run.

    Returns:
        One line per flag.

    Example:
        >>> without_effect(LegacySettings(no_skip_tokens=True))
        ['--no-skip-tokens has no effect: every sequence of a shard is used, always.']
    """
    return [f"{flag} has no effect: {why}" for flag, why in _given(settings, _NO_EFFECT).items()]


def check_refused(settings: LegacySettings) -> None:
    """Refuse flags of OpenLM that would change what is trained and that there is nothing for.

    Args:
        settings: of the run.

    Raises:
        ValueError: names the flag and what to do instead.

    Example:
        >>> check_refused(LegacySettings(remote_sync="s3://a"))
        Traceback (most recent call last):
        ValueError: --remote-sync is not supported: checkpoints are local; copy the run folder.
    """
    for flag, why in _given(settings, _REFUSED).items():
        raise ValueError(f"{flag} is not supported: {why}")


def _given(settings: LegacySettings, kind: str) -> dict[str, str]:
    """Return flag to reason, of the flags of a kind that were given."""
    hints = get_type_hints(LegacySettings, include_extras=True)
    given = [each.name for each in fields(settings) if getattr(settings, each.name) != each.default]
    helps = {name: hints[name].__metadata__[0].help for name in given}
    return {flag_of(name): text.removeprefix(kind) for name, text in helps.items() if text.startswith(kind)}
