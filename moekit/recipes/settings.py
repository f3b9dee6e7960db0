"""The settings of a training run: typed, flat on the command line, written beside the run."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class ModelSettings:
    """The language model."""

    preset: str = "moekit_cpu"
    """Model shape: the name of a preset, or a path ending in .json."""
    model_norm: str = "gain_only_layer_norm"
    """Norm for presets that name none."""
    moe_freq: int = 2
    """Every so many blocks is MoE, from block 0; 0 makes a dense model."""
    moe_num_experts: int = 8
    """Experts per MoE layer."""
    moe_top_k: int | None = None
    """Experts per token; by default 2, where the recipe leaves it open."""
    moe_capacity_factor: float | None = None
    """Rows per expert relative to a balanced load; 0 drops nothing; by default the recipe's own."""
    moe_loss_weight: float | None = None
    """Coefficient of the load-balancing loss, averaged over MoE layers; by default the recipe's own."""
    recipe: str = "openlm"
    """MoE method: a name, or path/to/file.py:name."""


@dataclass(frozen=True)
class DataSettings:
    """The data."""

    dataset_manifest: tuple[Path, ...] = ()
    """Manifests of training shards, one per source; by default the two embedded domains."""
    val_manifest: tuple[Path, ...] = ()
    """Manifests of validation shards, with --dataset-manifest."""
    train_data_mix_weights: tuple[float, ...] = ()
    """Share of each source; by default 0.725 0.275 for the embedded domains, else even."""
    tokenizer: str = ""
    """Of the embedded domains: bpe-V or byte; by default a BPE with the preset's vocabulary."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    steps: int = 800
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per step."""
    lr: float = 5e-3
    """Peak learning rate."""
    warmup: int | None = None
    """Steps of linear warm-up; by default a tenth of all steps."""
    lr_cooldown_end: float = 1e-4
    """Learning rate at the end of the cosine."""
    wd: float = 0.1
    """Decoupled weight decay, on every parameter as in OpenLM."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.95
    """AdamW's second decay rate."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    precision: Literal["auto", "fp32", "amp_bfloat16"] = "auto"
    """auto takes bf16 autocast where the hardware multiplies it faster (CUDA, or a CPU with AMX), else fp32."""

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, the default filled in."""
        return self.steps // 10 if self.warmup is None else self.warmup


@dataclass(frozen=True)
class RunSettings:
    """The run."""

    name: str | None = None
    """Name of the run; its folder is LOGS/NAME. By default made of preset, recipe and the time."""
    logs: Path = Path("logs")
    """Folder of all runs."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    resume: str | None = None
    """A checkpoint folder, or `latest` for this run's newest."""
    log_every_n_steps: int = 10
    """Steps between reports."""
    val_every_n_steps: int = 200
    """Steps between short validations; the whole of the validation data is scored at the end."""
    describe: bool = False
    """Print the model, its parameters and bytes, and exit."""


@dataclass(frozen=True)
class TrainSettings:
    """Train and evaluate a Mixture-of-Experts language model.

    With no flags: a small model on two embedded domains, about four minutes on two cores.
    """

    model: tyro.conf.OmitArgPrefixes[ModelSettings] = field(default_factory=ModelSettings)
    data: tyro.conf.OmitArgPrefixes[DataSettings] = field(default_factory=DataSettings)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerSettings] = field(default_factory=OptimizerSettings)
    run: tyro.conf.OmitArgPrefixes[RunSettings] = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        optimizer, data, run = self.optimizer, self.data, self.run
        positive = {"steps": optimizer.steps, "batch-size": optimizer.batch_size, "lr": optimizer.lr}
        positive |= {"log-every-n-steps": run.log_every_n_steps, "val-every-n-steps": run.val_every_n_steps}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"--{name} is {value}; expected a positive number")
        if optimizer.warmup is not None and not 0 <= optimizer.warmup < optimizer.steps:
            raise ValueError(
                f"--warmup is {optimizer.warmup}; expected at least 0 and less than --steps = {optimizer.steps}, so "
                f"that the cosine has steps left"
            )
        if self.model.moe_capacity_factor is not None and self.model.moe_capacity_factor < 0:
            raise ValueError(
                f"--moe-capacity-factor is {self.model.moe_capacity_factor}; expected at least 0 (0 means dropless)"
            )
        if run.resume == "latest" and run.name is None:
            raise ValueError("--resume latest needs the --name of the run to go on with")
        if data.val_manifest and not data.dataset_manifest:
            raise ValueError("--val-manifest goes with --dataset-manifest: the embedded domains have their own")
        if run.name is not None and (not run.name or "/" in run.name or run.name.startswith(".")):
            raise ValueError(f"--name is {run.name!r}; expected a plain folder name")


def parse_settings(arguments: list[str] | None = None, *, prog: str | None = None) -> TrainSettings:
    """Read the settings from a command line.

    Args:
        arguments: the words; None takes ``sys.argv``.
        prog: name of the program in the help text.

    Returns:
        TrainSettings.

    Raises:
        SystemExit: if a flag is unknown or has a bad value; the message is printed, with a hint.

    Example:
        >>> parse_settings(["--moe-num-experts", "4", "--steps", "60"]).optimizer.steps
        60
    """
    return tyro.cli(TrainSettings, args=arguments, prog=prog)


def flat_settings(settings: TrainSettings) -> dict[str, Any]:
    """List all settings by flag name, sorted, in plain values that JSON and text can hold.

    Args:
        settings: to list.

    Returns:
        Name to value.

    Example:
        >>> flat_settings(TrainSettings())["moe_num_experts"]
        8
    """
    groups = (getattr(settings, group.name) for group in dataclasses.fields(settings))
    values = {name: value for group in groups for name, value in vars(group).items()}
    return {name: _plain(values[name]) for name in sorted(values)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
