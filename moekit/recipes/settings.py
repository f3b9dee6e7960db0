"""The settings of a run: typed dataclasses, flat on the command line. Flags have OpenLM's names where it has them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moekit.recipes.settings_checks import check_settings
from moekit.recipes.settings_legacy import LegacySettings


@dataclass(frozen=True)
class ModelSettings:
    """The language model."""

    preset: Annotated[str, tyro.conf.arg(name="model", aliases=["--preset"])] = "moekit_cpu"
    """Model shape: the name of a preset, or a path ending in .json, whose keys win over flags."""
    model_norm: str = "gain_only_layer_norm"
    """Norm for models that name none."""
    qk_norm: bool = False
    """Normalize queries and keys, for models that do not say."""
    positional_embedding_type: str = "rotary"
    """Position embedding for models that name none: rotary, head_rotary, llama_rotary or none."""
    ffn_type: str = "swiglu"
    """Dense feed-forward for models that name none: swiglu, geglu or gelu."""
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
    moe_loss_scope: Literal["step", "micro-batch"] = "step"
    """Whose load must be balanced: a whole step's, over micro-batches and ranks (then --accum-freq above 1 costs one
    more forward where a loss uses it, and changes no gradient), or each micro-batch's of each rank, as in OpenLM."""
    recipe: str = "openlm"
    """MoE method: a name, or path/to/file.py:name."""


@dataclass(frozen=True)
class DataSettings:
    """The data."""

    dataset_manifest: tuple[str, ...] = ()
    """Manifests of training shards, one per source, as paths or s3:// URLs; by default the two embedded domains."""
    train_data_mix_weights: tuple[float, ...] = ()
    """Share of each source; by default 0.725 0.275 for the embedded domains, else even."""
    train_num_samples: int | None = None
    """Training tokens per epoch (OpenLM's name for it), with --epochs; an alternative to --steps."""
    epochs: int | None = None
    """How many times --train-num-samples; an epoch is the stretch between two checkpoints, no pass over the data."""
    data_key: Literal["txt", "json", "json.gz"] | None = None
    """Extension of the members that hold tokens; by default whichever of the three the shards have."""
    multiple_data_passes: bool = False
    """Begin again when a source is used up; the embedded domains always do."""
    workers: int | None = None
    """Processes that read data, per rank; 0 reads in the training process. By default 1 beside a GPU, else 0."""
    data_lanes: int = 8
    """Shards of each source that are read side by side. A multiple of the ranks lets each rank read its own alone."""
    on_bad_data: Literal["raise", "skip"] = "raise"
    """Broken shards, ids outside the vocabulary, short sequences: stop with a message, or leave out and count."""
    allow_pipe_commands: bool = False
    """Let `pipe:COMMAND` URLs run their command in a shell; `pipe:aws s3 cp URL -` needs none and is always read."""
    val_data: tuple[str, ...] = ()
    """Tars of validation sequences, or URLs of them. Alone, with --resume, they are scored and nothing is trained."""
    val_data_key: tuple[str, ...] = ()
    """Extension of their members, one for all or one each; by default whichever they have."""
    val_manifest: tuple[str, ...] = ()
    """Manifests of validation shards: one per source with --dataset-manifest, any number without."""
    val_num_samples: int | None = None
    """Tokens to score of each validation set; by default all."""
    tokenizer: str = ""
    """Of the embedded domains: bpe-V or byte, by default a BPE with the model's vocabulary. Of other data: the path of
    a tokenizer.json, by default the one beside the manifest."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, its schedule, and the numbers of a step."""

    steps: int | None = None
    """Optimizer steps; by default 800, or what --train-num-samples and --epochs come to."""
    batch_size: int | None = None
    """Sequences per rank and optimizer step; by default 16."""
    global_batch_size: int | None = None
    """Sequences per optimizer step over all ranks; an alternative to --batch-size."""
    accum_freq: int = 1
    """Micro-batches that a rank cuts its share of a step into. It changes memory, not the gradient, unless a capacity
    limit drops or a router looks at the whole batch: both see a micro-batch."""
    lr: float = 5e-3
    """Peak learning rate."""
    warmup: int | None = None
    """Steps of linear warm-up; by default a tenth of all steps."""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """The rate after the warm-up."""
    lr_cooldown_end: float | None = None
    """Learning rate at the end of the cosine; by default a fiftieth of the peak."""
    force_min_lr: float = 0.0
    """Lower limit of the rate after the warm-up."""
    wd: float = 0.1
    """Decoupled weight decay."""
    wd_on: Literal["all", "matrices"] = "all"
    """What decays: every parameter as in OpenLM, or all but norm gains, biases and the embedding."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.95
    """AdamW's second decay rate."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    z_loss_coefficient: float = 0.0
    """Weight of the mean squared log-sum-exp of the output logits."""
    precision: Literal["auto", "fp32", "amp", "amp_bfloat16", "amp_bf16", "bf16", "fp16"] = "auto"
    """auto takes bf16 autocast where the hardware multiplies it faster (CUDA, or a CPU with AMX), else fp32. amp is
    fp16 autocast with a gradient scaler. bf16 and fp16 hold the parameters themselves in that dtype."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: save and stop all ranks, or leave the step out and count it."""


@dataclass(frozen=True)
class ParallelSettings:
    """How several ranks share the work. Every mix gives the same loss curve, up to rounding, what a capacity limit
    drops, which counts within the ranks that exchange tokens, and what a router does that looks at a whole batch, a
    rank's own: docs/balancing.md."""

    fsdp: bool = False
    """Shard parameters, gradients and optimizer state over all ranks (FSDP2)."""
    fsdp_amp: bool = False
    """With --fsdp: compute in bf16 and reduce gradients in float32; parameters stay float32."""
    fsdp_pure_bf16: bool = False
    """With --fsdp: compute and reduce gradients in bf16."""
    fsdp_hybrid: bool = False
    """With --fsdp: shard within each node and replicate over nodes, so that parameters travel inside a node alone."""
    fsdp_hybrid_o2: bool = False
    """The same, and keep gathered parameters until the backward (ZeRO-2): faster, for more memory."""
    moe_expert_model_parallelism: bool = False
    """Spread the experts over the ranks, and send tokens to them. With more ranks than experts, the hidden dimension of
    each expert is split over several ranks."""
    moe_weight_parallelism: bool = False
    """Shard the experts over the ranks that hold the same ones (ZeRO), also without --fsdp."""
    moe_expert_ranks: int | None = None
    """With --moe-expert-model-parallelism: over how many ranks to spread the experts; the others hold replicas. By
    default the largest number that divides ranks and experts."""
    moe_hidden_ranks: int | None = None
    """With --moe-expert-model-parallelism: over how many ranks to split the hidden dimension of each expert. By default
    all ranks that are left when every rank has at most one expert, else 1."""
    moe_exchange: Literal["all_to_all", "all_gather", "static"] = "all_to_all"
    """How tokens reach their experts: each to the ranks that it needs; all to all ranks; or a fixed number to every
    rank, so that nothing is read from the device."""
    moe_exchange_capacity_factor: float = 2.0
    """With --moe-exchange static: rows from each rank to each rank relative to a balanced load; the number of ranks
    drops nothing."""
    moe_exchange_chunks: int = 1
    """Slices of a rank's tokens whose exchange overlaps another slice's compute (on GPUs)."""
    moe_hierarchical_exchange: bool = False
    """Send a token once to each node, and from there to the ranks of the node, where experts span several nodes."""
    ranks_per_node: int | None = None
    """Ranks of a node; by default those that torchrun started here (8 for --describe)."""


@dataclass(frozen=True)
class RunSettings:
    """The run."""

    name: str | None = None
    """Name of the run; its folder is LOGS/NAME. By default made of model, recipe and time, and numbered if taken."""
    logs: Path = Path("logs")
    """Folder of all runs."""
    config: Path | None = None
    """A JSON or YAML file of settings, for example a run's config.json; flags win over it."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    resume: str | None = None
    """A checkpoint (folder of a run, OpenLM's .pt, or .safetensors), or `latest` for this run's newest, if any."""
    log_every_n_steps: int = 10
    """Steps between reports."""
    val_every_n_steps: int = 200
    """Steps between short validations; the whole of the validation data is scored at the end."""
    save_frequency: int = 1
    """Epochs between checkpoints; the last is always kept."""
    save_every_n_steps: int | None = None
    """Steps between checkpoints, beside those of --save-frequency."""
    keep_checkpoints: int | None = None
    """How many of the newest checkpoints to keep; by default all."""
    delete_previous_checkpoint: bool = False
    """The same as --keep-checkpoints 1."""
    report_to: str = ""
    """Trackers beside metrics.jsonl: wandb, tensorboard, or both with a comma."""
    wandb_project_name: str = "open-lm"
    """Project in wandb."""
    grad_checkpointing: bool = False
    """Compute activations again in the backward, to save memory. The routing decision is kept."""
    moe_keep: Literal["preactivation", "inputs", "everything"] = "preactivation"
    """What the experts' kernels keep for the backward on CUDA: `preactivation`; `inputs`: nothing but the layer's own
    inputs, to compute those again; `everything`: the rows of tokens too. Other backends keep what they do."""
    moe_tiles: Path | None = None
    """A file of `moekit tune --write`, by which the experts' kernels are cut into tiles on CUDA; by default what comes
    with the package."""
    torchcompile: bool = False
    """Compile the model, and in training its cross-entropy with it."""
    deterministic: bool = False
    """On CUDA, take kernels that give the same bits every time, so that a resumed run equals an unbroken one there too.
    On a CPU it is always so."""
    log_logit_mean: bool = False
    """Report the mean of the output logits."""
    log_data: bool = False
    """Write data.jsonl: which sequences each step read."""
    describe: bool = False
    """Print the model, its parameters and bytes, and exit."""
    world_size: int | None = None
    """With --describe: plan for so many ranks, and print which rank would hold what."""


@dataclass(frozen=True)
class TrainSettings:
    """Train and evaluate a Mixture-of-Experts language model.

    With no flags: a small model on two embedded domains, three to four minutes on two cores. With --val-data (or
    --val-manifest) and --resume, and no --dataset-manifest: only evaluate.
    """

    model: tyro.conf.OmitArgPrefixes[ModelSettings] = field(default_factory=ModelSettings)
    data: tyro.conf.OmitArgPrefixes[DataSettings] = field(default_factory=DataSettings)
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerSettings] = field(default_factory=OptimizerSettings)
    parallel: tyro.conf.OmitArgPrefixes[ParallelSettings] = field(default_factory=ParallelSettings)
    run: tyro.conf.OmitArgPrefixes[RunSettings] = field(default_factory=RunSettings)
    legacy: tyro.conf.OmitArgPrefixes[LegacySettings] = field(default_factory=LegacySettings)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def evaluates_only(self) -> bool:
        """Whether there is nothing to train: validation data are named and no training data."""
        return bool(self.data.val_data or self.data.val_manifest) and not self.data.dataset_manifest
