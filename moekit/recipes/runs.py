"""A run: its folder, its parts, and how it is saved and restored."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from moekit.lm.batches import BatchStream, mixed_batches, validation_batches
from moekit.lm.checkpoints import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    training_tensors,
)
from moekit.lm.model import LanguageModel
from moekit.recipes.language_models import language_model
from moekit.recipes.settings import TrainSettings, flat_settings
from moekit.recipes.setup import Corpus, make_config, make_corpus, make_recipe


class Run(NamedTuple):
    """Everything that a training loop works on.

    Attributes:
        settings: of the run.
        folder: LOGS/NAME.
        corpus: the data.
        model: being trained.
        optimizer: over all its parameters.
        stream: of training batches.
        validation: domain to its held-out batches, for every domain that has any.
        token_bytes: (V,) bytes of each token id, or None without a tokenizer.
        device: of the model.
    """

    settings: TrainSettings
    folder: Path
    corpus: Corpus
    model: LanguageModel
    optimizer: torch.optim.AdamW
    stream: BatchStream
    validation: Mapping[str, Sequence[Tensor]]
    token_bytes: Tensor | None
    device: torch.device

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step predicts."""
        return self.settings.optimizer.batch_size * self.model.config.seq_len


def set_up(settings: TrainSettings, console: Console) -> Run:
    """Make model, optimizer and data stream.

    Args:
        settings: of the run.
        console: where to say what takes time.

    Returns:
        Run, before its first step.

    Raises:
        FileExistsError: if the run folder holds a run and the settings do not resume it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = _run_folder(settings)
    config, recipe = make_config(settings.model), make_recipe(settings.model)
    corpus = make_corpus(settings.data, config, say=lambda text: console.print(text, highlight=False))
    optimizer = settings.optimizer
    torch.manual_seed(settings.run.seed)
    model = language_model(config, recipe).to(device)
    return Run(
        settings=settings,
        folder=folder,
        corpus=corpus,
        model=model,
        optimizer=torch.optim.AdamW(
            model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.wd,
            fused=True,
        ),
        stream=mixed_batches(
            [domain.train for domain in corpus.domains],
            corpus.weights,
            batch_size=optimizer.batch_size,
            seed=settings.run.seed,
            vocab_size=config.vocab_size,
        ),
        validation={
            domain.name: validation_batches(
                domain.validation, batch_size=optimizer.batch_size, vocab_size=config.vocab_size
            )
            for domain in corpus.domains
            if domain.validation is not None
        },
        token_bytes=corpus.token_bytes(),
        device=device,
    )


def save(run: Run, step: int, *, seconds: float) -> Path:
    """Write a checkpoint of the run.

    Args:
        run: the run.
        step: optimizer steps done.
        seconds: of training so far.

    Returns:
        Its folder.
    """
    tensors = _tensors(run)
    state = {"step": step, "seconds": seconds, "stream": run.stream.state_dict()}
    return save_checkpoint(
        checkpoint_folder(run.folder, step), tensors, state | {"settings": flat_settings(run.settings)}
    )


def restore(run: Run, console: Console) -> tuple[int, float]:
    """Load the checkpoint that the settings name, if any.

    Args:
        run: changed in place.
        console: where to say so.

    Returns:
        Optimizer steps done, and seconds of training so far.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it does not fit the run.
    """
    resume = run.settings.run.resume
    if resume is None:
        return 0, 0.0
    folder = latest_checkpoint(run.folder) if resume == "latest" else Path(resume)
    if folder is None:
        raise FileNotFoundError(f"--resume latest: {run.folder} has no checkpoint yet; start it without --resume")
    tensors = _tensors(run)
    state = load_checkpoint(folder, tensors)
    if state["step"] > run.settings.optimizer.steps:
        raise ValueError(
            f"checkpoint {folder} is of step {state['step']}, but --steps is {run.settings.optimizer.steps}; expected "
            f"at least as many. --steps counts from the beginning of the run, not from the checkpoint."
        )
    run.stream.load_state_dict(state["stream"])
    torch.set_rng_state(tensors["rng"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    console.print(f"resumed {folder}: step {state['step']}", highlight=False)
    return state["step"], state["seconds"]


def write_params(run: Run) -> Path:
    """Write the settings of a run, sorted, one ``name: value`` a line.

    Args:
        run: the run.

    Returns:
        The path of ``params.txt``.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    path, unfinished = run.folder / "params.txt", run.folder / ".params.unfinished"
    lines = (f"{name}: {value}\n" for name, value in flat_settings(run.settings).items())
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _tensors(run: Run) -> dict[str, Tensor]:
    tensors = {**training_tensors(run.model, run.optimizer), "rng": torch.get_rng_state()}
    if run.device.type == "cuda":
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    return tensors


def _run_folder(settings: TrainSettings) -> Path:
    run, recipe = settings.run, settings.model.recipe.rpartition(":")[2]
    preset = Path(settings.model.preset).stem
    folder = run.logs / (run.name or f"{preset}-{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    if run.resume is None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds a run already; go on with it by --resume latest, or choose another --name or --logs"
        )
    return folder
