"""OpenLM's decoder, with any feed-forward in any block: dense, MoE, or one of your own."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.checks import check_token_mask
from moekit.lm.attention import Attention
from moekit.lm.configs import ModelConfig
from moekit.lm.feed_forward import FeedForward, GatedFeedForward, make_feed_forward
from moekit.lm.initialization import truncated_normal_
from moekit.lm.norms import adds_in_16_bits, make_norm
from moekit.lm.rotary import make_rotary
from moekit.types import LayerOutput


class ModelOutput(NamedTuple):
    """What the language model returns. Letters beside the axis legend: B batch, L sequence length, V vocabulary.

    Attributes:
        logits: (B, L, V) float32 (float64 from a float64 model); of fewer positions if so asked.
        layers: one per block, in order: what its feed-forward returned, with ``y`` replaced by the residual stream
            (B, L, D) after the block, which costs no memory in training.
    """

    logits: Tensor
    layers: tuple[LayerOutput, ...]


class Block(nn.Module):
    """One pre-norm block: ``h = x + attention(norm(x))``, then ``h + feed_forward(norm(h))``.

    Args:
        config: the shape of the model.
        feed_forward: a module ``(x (B, L, D), *, token_ids, token_mask) -> LayerOutput``.

    Attributes:
        recompute_attention: compute the attention's activations again in the backward instead of keeping them.
        recompute_feed_forward: the same for the feed-forward. For an MoE it would decide the routing again: wrap its
            expert layer instead, see ``moekit.recipes.language_models.recompute_activations``.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> block = Block(load_config("moekit_tiny"), GatedFeedForward(64, activation=nn.functional.silu))
        >>> block(torch.randn(2, 5, 64)).y.shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, config: ModelConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        norm = make_norm(config.model_norm)
        rotate = make_rotary(config.positional_embedding_type)
        self.attention = Attention(config.hidden_dim, config.n_heads, qk_norm=config.qk_norm, norm=norm, rotate=rotate)
        self.feed_forward = feed_forward
        self.attention_norm = norm(config.hidden_dim)
        self.ffn_norm = norm(config.hidden_dim)
        self.recompute_attention = self.recompute_feed_forward = False

    def forward(self, x: Tensor, *, token_ids: Tensor | None = None, token_mask: Tensor | None = None) -> LayerOutput:
        """Apply attention and feed-forward.

        Args:
            x: (B, L, D), the residual stream.
            token_ids: (B, L) int64, handed to the feed-forward.
            token_mask: (B, L) bool, handed to the feed-forward.

        Returns:
            What the feed-forward returned, with ``y`` (B, L, D) the new residual stream.
        """
        h = x + _maybe_recompute(self._attend, self.recompute_attention)(x)
        feed_forward = _maybe_recompute(self._feed_forward, self.recompute_feed_forward)
        output = feed_forward(h, token_ids=token_ids, token_mask=token_mask)
        # Spelled out: torch 2.11 cannot compile a model that returns what ``_replace`` made.
        return LayerOutput(h + output.y, output.routing, output.losses, output.logits)

    def _attend(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(self.attention_norm(x))
        return y

    def _feed_forward(self, h: Tensor, **options: Tensor | None) -> LayerOutput:
        output: LayerOutput = self.feed_forward(self.ffn_norm(h), **options)
        return output


class Embedding(nn.Embedding):
    """An embedding whose gradient is exact on the CPU too, also in 16 bits.

    There torch adds up the gradients of an id's tokens in the dtype of the weight, so that a frequent id loses most of
    a sum; those of ``index_select`` it adds in float32.

    Args:
        num_embeddings: V.
        embedding_dim: D.

    Example:
        >>> Embedding(3, 4)(torch.tensor([[0, 2]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)  # without the options, which index_select does not know

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids (...) int64 or int32 in [0, V): (..., D)."""
        if not adds_in_16_bits(self.weight):
            return super().forward(ids)
        rows = self.weight.index_select(0, ids.flatten().long())  # int32 would be added in 16 bits
        return rows.view(*ids.shape, self.embedding_dim)


class LanguageModel(nn.Module):
    """A causal language model: embedding, pre-norm blocks, norm, and an output head without bias.

    Parameter names are OpenLM's, so its checkpoints load after the wrapper's prefix is cut off. The weights are drawn
    by :func:`init_weights` at construction.

    Args:
        config: the shape of the model.
        make_ffn: ``make_ffn(i)`` returns the feed-forward of layer i, for dense layers too. None: dense everywhere.

    Raises:
        ValueError: if the configuration asks for MoE layers and ``make_ffn`` is None.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> model = LanguageModel(load_config("moekit_tiny"))
        >>> model(torch.randint(512, (2, 8))).logits.shape
        torch.Size([2, 8, 512])

    References:
        OpenLM, open_lm/model.py, https://github.com/mlfoundations/open_lm, 2023.
    """

    _is_tied = False  # whether embedding and head were one parameter before others were put in their places

    def __init__(self, config: ModelConfig, *, make_ffn: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        if make_ffn is None:
            make_ffn = _dense(config)
        norm = make_norm(config.model_norm)
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.hidden_dim)
        self.post_embed_norm = norm(config.hidden_dim) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, make_ffn(i)) for i in range(config.n_layers))
        self.norm = norm(config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, config.vocab_size, bias=False)
        if config.weight_tying:
            self.tok_embeddings.weight = self.output.weight
        self.register_load_state_dict_post_hook(_tie_again)  # ``assign=True`` puts two parameters in
        init_weights(self)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        _note_tie(self)
        super()._load_from_state_dict(*args, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> "LanguageModel":
        """Keep tied weights one parameter, of which ``to_empty`` makes two."""
        _note_tie(self)
        super()._apply(fn, recurse)
        _tie_again(self)
        return self

    def forward(self, ids: Tensor, *, token_mask: Tensor | None = None, num_logits: int | None = None) -> ModelOutput:
        """Predict the next token at every position, or at the last ones.

        Attention is causal and does not read ``token_mask``: padding at the end cannot reach the tokens before it, but
        padding at the start would. L may exceed ``config.seq_len``; quality past the trained length is not promised.

        Args:
            ids: (B, L) int64 or int32 in [0, V).
            token_mask: (B, L) bool, True for real tokens; MoE layers leave the others out of losses and loads.
            num_logits: at how many of the last positions, 0 to L; None is all. With a large vocabulary the head is much
                of a small model's work.

        Returns:
            Logits and what each layer returned.

        Raises:
            TypeError: if ``ids`` are not int64 or int32, or ``token_mask`` is not bool.
            ValueError: if ``ids`` is not (B, L), ``token_mask`` has another shape, or ``num_logits`` is out of range.
        """
        _check_inputs(ids, token_mask, num_logits)
        x = self.post_embed_norm(self.tok_embeddings(ids))
        outputs = []
        for block in self.layers:
            outputs.append(block(x, token_ids=ids, token_mask=token_mask))
            x = outputs[-1].y
        if num_logits is not None:
            x = x[:, x.shape[1] - num_logits :]
        logits = self.output(self.norm(x))
        return ModelOutput(logits.to(torch.promote_types(logits.dtype, torch.float32)), tuple(outputs))


def _note_tie(model: LanguageModel) -> None:
    head, embedding = (module._parameters.get("weight") for module in (model.output, model.tok_embeddings))
    model._is_tied = head is not None and head is embedding


def _tie_again(model: LanguageModel, loaded: Any = None) -> None:
    """Make embedding and head one parameter again: the head's, unless ``loaded`` (torch's) says that it was missing."""
    if not model._is_tied:
        return
    missing = [] if loaded is None else loaded.missing_keys
    absent = [any(key.endswith(f"{name}.weight") for key in missing) for name in ("output", "tok_embeddings")]
    if absent == [True, False]:
        model.output.weight = model.tok_embeddings.weight
    else:
        model.tok_embeddings.weight = model.output.weight


def init_weights(model: LanguageModel, *, generator: torch.Generator | None = None) -> None:
    """Draw all weights of a language model anew, in place, except MoE feed-forwards, which draw their own.

    Normal distributions cut at three sigma; sigma is ``1 / sqrt(D)`` for embedding, head and input projections, and
    ``1 / sqrt(2 (i + 1) D)`` (inner width F in place of D in the feed-forward) for the output projections of layer i.
    Norm gains are 1 and biases 0. A feed-forward counts as dense if it is one of :mod:`moekit.lm.feed_forward`.

    Args:
        model: the model to change.
        generator: source of randomness on the model's device; None is torch's global one.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> model = LanguageModel(load_config("moekit_tiny"))
        >>> init_weights(model, generator=torch.Generator().manual_seed(0))
        >>> bool(model.output.weight.abs().max() <= 3 / 8)  # D = 64
        True
    """
    std = 1.0 / math.sqrt(model.config.hidden_dim)
    norms = [model.post_embed_norm, model.norm]
    for i, block in enumerate(model.layers):
        assert isinstance(block, Block)
        block.attention.reset_parameters(layer_index=i, generator=generator)
        if isinstance(block.feed_forward, GatedFeedForward | FeedForward):
            block.feed_forward.reset_parameters(layer_index=i, generator=generator)
        norms += [block.attention_norm, block.ffn_norm, block.attention.q_norm, block.attention.k_norm]
    truncated_normal_(model.tok_embeddings.weight, std=std, generator=generator)
    truncated_normal_(model.output.weight, std=std, generator=generator)
    for norm in norms:
        if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
            norm.reset_parameters()


def count_parameters(model: nn.Module) -> int:
    """Count the elements of all parameters, shared ones once.

    Args:
        model: any module, on any device (the meta device included).

    Returns:
        The number of parameters.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def _maybe_recompute(function: Callable[..., Any], recompute: bool) -> Callable[..., Any]:
    if not recompute:
        return function
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random


def _dense(config: ModelConfig) -> Callable[[int], nn.Module]:
    moe_layers = [i for i in range(config.n_layers) if config.is_moe_layer(i)]
    if moe_layers:
        raise ValueError(
            f"moe_freq is {config.moe_freq}, so layers {moe_layers} are MoE, but without make_ffn LanguageModel builds "
            "dense layers alone; use moekit.recipes.language_model, pass make_ffn, or set moe_freq to 0"
        )
    make = make_feed_forward(config.ffn_type)
    return lambda _: make(config.hidden_dim)


def _check_inputs(ids: Tensor, token_mask: Tensor | None, num_logits: int | None) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids are {ids.dtype}, expected int64 or int32 token ids; convert with ids.long()")
    if ids.dim() != 2:
        raise ValueError(f"ids have shape {tuple(ids.shape)}, expected (B, L); one sequence needs ids[None]")
    if token_mask is not None:
        check_token_mask(token_mask, ids.shape, "as ids")
    if num_logits is not None and not 0 <= num_logits <= ids.shape[1]:
        raise ValueError(
            f"num_logits is {num_logits}, expected 0 to {ids.shape[1]}, the length of the sequences, or None"
        )
