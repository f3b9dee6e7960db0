"""How long a run is: tokens and epochs become optimizer steps."""

from typing import NamedTuple

from moekit.recipes.settings import OptimizerSettings, TrainSettings

DEFAULT_STEPS, DEFAULT_BATCH = 800, 16


class Budget(NamedTuple):
    """The length of a run.

    Attributes:
        steps: optimizer steps in all.
        batch_size: sequences per step, over all ranks.
        epochs: stretches between checkpoints; 1 where only steps were asked for.
        epoch_sequences: sequences per epoch.
        seq_len: inputs per sequence.
    """

    steps: int
    batch_size: int
    epochs: int
    epoch_sequences: int
    seq_len: int

    @property
    def sequences(self) -> int:
        """Sequences that the run reads."""
        return self.steps * self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step predicts, where every sequence is whole."""
        return self.batch_size * self.seq_len

    def epoch_end(self, epoch: int) -> int:
        """Return the steps that are done when an epoch, counted from 1, has ended.

        Example:
            >>> [Budget(7, 4, 3, 10, 1).epoch_end(epoch) for epoch in (1, 2, 3)]
            [2, 5, 7]
        """
        return epoch * self.epoch_sequences // self.batch_size

    def epochs_ended(self, step: int) -> int:
        """Return how many epochs have ended when so many steps are done.

        Example:
            >>> [Budget(7, 4, 3, 10, 1).epochs_ended(step) for step in (1, 2, 4, 5, 7)]
            [0, 1, 1, 2, 3]
        """
        return min(((step + 1) * self.batch_size - 1) // self.epoch_sequences, self.epochs)

    def epochs_ending(self, step: int) -> list[int]:
        """Name the epochs that end with a step: several where an epoch is shorter than a step.

        Args:
            step: that was done last, counted from 1; the first also ends epochs of less than a batch.

        Returns:
            Epochs, counted from 1; nothing for step 0.

        Example:
            >>> [Budget(7, 4, 3, 10, 1).epochs_ending(step) for step in (1, 2)]
            [[], [1]]
            >>> [Budget(3, 8, 8, 3, 1).epochs_ending(step) for step in (0, 1, 2, 3)]
            [[], [1, 2, 3, 4, 5], [6, 7], [8]]
        """
        if step < 1:
            return []
        before = self.epochs_ended(step - 1) if step > 1 else 0
        return list(range(before + 1, self.epochs_ended(step) + 1))


def make_budget(settings: TrainSettings, *, seq_len: int, world_size: int) -> Budget:
    """Compute the length of a run.

    As in OpenLM, ``--train-num-samples`` counts tokens per epoch and is rounded down to whole sequences, and the steps
    are those sequences times the epochs over the batch, rounded down. Every step has a whole batch.

    Args:
        settings: of the run.
        seq_len: of the model.
        world_size: number of ranks.

    Returns:
        Budget.

    Raises:
        ValueError: if the batch does not divide over ranks and micro-batches, or the tokens come to no step.

    Example:
        >>> from moekit.recipes.settings import DataSettings, OptimizerSettings
        >>> data = DataSettings(train_num_samples=1_000_000_000, epochs=4)
        >>> settings = TrainSettings(data=data, optimizer=OptimizerSettings(batch_size=8, accum_freq=4))
        >>> make_budget(settings, seq_len=2048, world_size=8)[:4]
        (30517, 64, 4, 488281)
    """
    batch_size = _batch_size(settings, world_size)
    if settings.data.train_num_samples is None:
        steps = settings.optimizer.steps or DEFAULT_STEPS
        return Budget(steps, batch_size, 1, steps * batch_size, seq_len)
    sequences, epochs = settings.data.train_num_samples // seq_len, settings.data.epochs or 1
    steps = sequences * epochs // batch_size
    if steps < 1:
        raise ValueError(
            f"--train-num-samples {settings.data.train_num_samples} tokens are {sequences} sequences of {seq_len}; "
            f"times --epochs {epochs}, that is less than one batch of {batch_size}. Train on more, or take a "
            "smaller batch"
        )
    return Budget(steps, batch_size, epochs, sequences, seq_len)


def warmup_steps(optimizer: OptimizerSettings, steps: int) -> int:
    """Return the steps of warm-up, the default filled in: a tenth of all steps.

    Args:
        optimizer: settings.
        steps: in all.

    Returns:
        Steps.

    Example:
        >>> warmup_steps(OptimizerSettings(), 800)
        80
    """
    return steps // 10 if optimizer.warmup is None else optimizer.warmup


def final_rate(optimizer: OptimizerSettings) -> float:
    """Return the learning rate at the end of the cosine, the default filled in: a fiftieth of the peak.

    Args:
        optimizer: settings.

    Returns:
        The rate.

    Example:
        >>> final_rate(OptimizerSettings(lr=5e-3))
        0.0001
    """
    return optimizer.lr / 50 if optimizer.lr_cooldown_end is None else optimizer.lr_cooldown_end


def _batch_size(settings: TrainSettings, world_size: int) -> int:
    optimizer = settings.optimizer
    if optimizer.global_batch_size is None:
        per_rank = DEFAULT_BATCH if optimizer.batch_size is None else optimizer.batch_size
    elif optimizer.global_batch_size % world_size:
        raise ValueError(
            f"--global-batch-size {optimizer.global_batch_size} does not divide over {world_size} ranks; "
            f"choose a multiple of {world_size}"
        )
    else:
        per_rank = optimizer.global_batch_size // world_size
    if per_rank % optimizer.accum_freq:
        raise ValueError(
            f"--accum-freq {optimizer.accum_freq} does not divide a rank's {per_rank} sequences per step; "
            "choose one that does"
        )
    return per_rank * world_size
