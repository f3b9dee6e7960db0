"""AdamW over a model's parameters, the clipping of their gradients, and the learning rate of a step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moekit.parallel import World, local, mesh_names, one_process, squared_norm
from moekit.recipes.settings import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Make AdamW.

    OpenLM decays every parameter: norm gains, embeddings, head, routers and experts. The usual exclusion
    (``--wd-on matrices``) spares vectors (norm gains, biases, those of MoE++'s constant experts), the
    experts' stacked ones too, and the embedding.

    Args:
        model: whose parameters it updates, sharded or whole.
        settings: of the optimizer.

    Returns:
        AdamW; parameters that do not decay, and those spread over other ranks, have groups of their own.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.lm.model import LanguageModel
        >>> model = LanguageModel(load_config("moekit_tiny"))
        >>> groups = make_optimizer(model, OptimizerSettings(wd_on="matrices")).param_groups
        >>> [group["weight_decay"] for group in groups], len(groups[1]["params"])
        ([0.1, 0.0], 10)

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2017, https://arxiv.org/abs/1711.05101
    """
    groups: dict[tuple[bool, tuple[str, ...]], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        decays = settings.wd_on == "all" or not _is_spared(name, parameter)
        groups.setdefault((not decays, mesh_names(parameter)), []).append(parameter)  # one kind a kernel
    return _AdamW(
        [{"params": groups[key], "weight_decay": 0.0 if key[0] else settings.wd} for key in sorted(groups)],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


class _AdamW(torch.optim.AdamW):
    """AdamW that updates what this rank holds: of sharded tensors, torch prepares each one anew in every step."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill the lists of tensors that a step works on."""
        has_complex = super()._init_group(group, *lists)
        for each in lists:
            each[:] = map(local, each)
        return has_complex


def gradient_norm(model: nn.Module, world: World | None = None) -> Tensor:
    """Compute the norm of all gradients together, over every rank's part.

    Args:
        model: whose parameters have gradients, whole ones the same on every rank that holds them.
        world: all ranks; None is one process.

    Returns:
        Scalar float64 where the gradients are, the same on every rank; 0 on the ranks' device without any.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[-3.0]])
        >>> gradient_norm(layer)
        tensor(3., dtype=torch.float64)
    """
    return squared_norm(model.parameters(), world or one_process()).sqrt()


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float, limit: float) -> None:
    """Scale all gradients so that their global norm is at most a limit, as ``torch.nn.utils.clip_grad_norm_``.

    Args:
        model: whose parameters have gradients.
        norm: of all of them, see ``gradient_norm``. One that is not a number scales nothing.
        limit: largest norm; 0 does not clip.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[3.0]])
        >>> clip_gradients(layer, gradient_norm(layer).item(), 1.0)
        >>> round(layer.weight.grad.item(), 3)
        1.0
    """
    if limit and norm > limit:
        mine = [local(p.grad) for p in model.parameters() if p.grad is not None]
        if mine:
            torch._foreach_mul_(mine, limit / (norm + 1e-6))


def _is_spared(name: str, parameter: Tensor) -> bool:
    stacked = name.endswith(("bias", ".simple.vectors"))  # vectors, one an expert
    return parameter.ndim < 2 or stacked or name.startswith("tok_embeddings")


def learning_rate(
    step: int, *, steps: int, peak: float, warmup: int, end: float, cosine: bool = True, least: float = 0.0
) -> float:
    """Compute the learning rate: linear warm-up, then a cosine from ``peak`` to ``end``, or ``peak`` throughout.

    Args:
        step: optimizer steps done before this one.
        steps: steps in all.
        peak: the largest rate.
        warmup: steps of warm-up.
        end: the rate that the cosine reaches after the last step.
        cosine: False stays at the peak.
        least: lower limit after the warm-up.

    Returns:
        The rate of this step: peak (step + 1) / warmup, then end + (peak - end) (1 + cos(pi e / E)) / 2 with
        e = step - warmup and E = steps - warmup, as OpenLM.

    Example:
        >>> [learning_rate(step, steps=4, peak=1.0, warmup=2, end=0.0) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if not cosine:
        return max(peak, least)
    return max(end + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (peak - end), least)
