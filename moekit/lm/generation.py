"""Sampling text from a language model, one token at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moekit.lm.model import LanguageModel


def next_token(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token id.

    Args:
        logits: (V,) float.
        temperature: divides the logits; 0 takes the largest logit.
        top_k: draw from the ``top_k`` largest logits only (more if the last of them is tied); None draws from all.
        generator: source of randomness on the device of ``logits``; None is torch's global one.

    Returns:
        (1,) int64.

    Example:
        >>> next_token(torch.tensor([0.0, 2.0, 1.0]), temperature=0)
        tensor([1])
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    # The largest logit becomes 0 first, so that a tiny temperature cannot overflow.
    probs = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    return torch.multinomial(probs, 1, generator=generator)


def generate(
    model: LanguageModel,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue a prompt.

    The model sees the last ``config.seq_len`` tokens each time and keeps no cache: every new token costs a forward over
    all of them. It runs in evaluation mode without gradients; every module's mode is as before afterwards. Routers have
    no mode: a recipe with a capacity limit or noise keeps it, so take one without (``trained_model`` does). Threads
    that share a model must take turns: the mode is the model's, not the thread's.

    Args:
        model: the language model.
        prompt: (L,) int64 or int32, at least one token.
        max_new_tokens: how many tokens to add.
        temperature: divides the logits; 0 is greedy.
        top_k: draw from the ``top_k`` most likely tokens only; None draws from all.
        generator: source of randomness on the model's device; None is torch's global one.

    Returns:
        (L + max_new_tokens,) in the prompt's dtype: the prompt and its continuation.

    Raises:
        ValueError: if the prompt is empty or not one sequence, or an option is out of range.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> model = LanguageModel(load_config("moekit_tiny"))
        >>> generate(model, torch.tensor([1, 2, 3]), max_new_tokens=2, temperature=0).shape
        torch.Size([5])
    """
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}, expected (L,) with at least one token")
    if max_new_tokens < 0 or temperature < 0:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens} and temperature {temperature}, expected neither to be negative "
            "(temperature 0 is greedy)"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1, or None to draw from all tokens")
    ids = prompt
    with evaluation_mode(model), torch.no_grad():
        for _ in range(max_new_tokens):
            logits = model(ids[None, -model.config.seq_len :], num_logits=1).logits[0, 0]
            token = next_token(logits, temperature=temperature, top_k=top_k, generator=generator)
            ids = torch.cat([ids, token.to(ids.dtype)])
    return ids


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate a model, and give every module its own mode back: a part of it may have been in that one already."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
