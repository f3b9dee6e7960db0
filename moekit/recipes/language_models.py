"""Language models whose feed-forwards run a recipe, and what they cost."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from moekit.lm.configs import ModelConfig
from moekit.lm.feed_forward import make_feed_forward
from moekit.lm.model import Block, LanguageModel, count_parameters
from moekit.parallel import Part
from moekit.recipes.choices import chooses_how_many, experts_per_token
from moekit.recipes.expert_layers import recompute
from moekit.recipes.layers import Recipe
from moekit.recipes.modules import MoE


def language_model(
    config: ModelConfig,
    recipe: Recipe,
    *,
    expert_hidden: int | None = None,
    part: Part = Part(),  # noqa: B008, an immutable tuple
) -> LanguageModel:
    """Build OpenLM's decoder with MoE layers where the configuration wants them.

    Args:
        config: the shape; ``moe_freq`` and ``moe_num_experts`` say which layers are MoE, and how wide.
        recipe: what an MoE layer does; nothing runs it where the configuration is dense, with ``moe_freq`` 0.
        expert_hidden: F of each expert; None takes what the recipe takes.
        part: the part of every layer's experts that this rank owns.

    Returns:
        The model, with fresh weights.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), mixtral())
        >>> [index for index, _ in moe_layers(model)]
        [0]
    """
    dense = make_feed_forward(config.ffn_type)

    def make_ffn(layer_index: int) -> nn.Module:
        if config.is_moe_layer(layer_index):
            assert config.moe_num_experts is not None  # the configuration has checked it
            return MoE(config.hidden_dim, config.moe_num_experts, recipe, hidden=expert_hidden, part=part)
        return dense(config.hidden_dim)

    return LanguageModel(config, make_ffn=make_ffn)


def moe_layers(model: LanguageModel) -> Iterator[tuple[int, MoE]]:
    """Iterate over the index and the module of each MoE layer."""
    for index, block in enumerate(model.layers):
        if isinstance(block.feed_forward, MoE):
            yield index, block.feed_forward


def first_moe_layer(model: LanguageModel) -> MoE | None:
    """Return the first MoE layer, whose recipe is that of all of them; None of a dense model."""
    return next((layer for _, layer in moe_layers(model)), None)


def recompute_activations(model: LanguageModel) -> None:
    """Let every block compute its activations again in the backward; routers keep their decision.

    A dense block keeps its input and what attention added to it. An MoE block also keeps the tokens that its router
    read, with logits and routing.

    Args:
        model: changed in place.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> recompute_activations(language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), mixtral()))
    """
    for block in model.layers:
        assert isinstance(block, Block)
        block.recompute_attention = True
        if isinstance(block.feed_forward, MoE):
            recipe = block.feed_forward.recipe
            block.feed_forward.recipe = recipe._replace(layer=recompute(recipe.layer))
        else:
            block.recompute_feed_forward = True


class ParameterCount(NamedTuple):
    """What a part of a model holds.

    Attributes:
        part: its name.
        total: parameters.
        active: parameters that one token uses: at most, where a router chooses how many experts it gets, or some of
            them are simple ones, or where blocks share a layer.
    """

    part: str
    total: int
    active: int


def has_bound(model: LanguageModel) -> bool:
    """Say whether the active parameters of ``parameter_table`` are a bound, as a router chooses how many a token uses.

    Or as blocks share a layer, in which they may choose the same experts.

    Args:
        model: on any device, the meta device included.

    Returns:
        Whether it does, in any layer.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import dynamic_k
        >>> config = load_config("moekit_tiny", moe_freq=1, moe_num_experts=4)
        >>> has_bound(language_model(config, dynamic_k()))
        True
    """
    layers = [layer for _, layer in moe_layers(model)]
    return len(set(layers)) < len(layers) or any(chooses_how_many(each.recipe, each.num_experts) for each in layers)


def active_words(model: LanguageModel, active: int) -> str:
    """Say how many parameters a token uses.

    Args:
        model: on any device, the meta device included.
        active: of all of it, from ``parameter_table``.

    Returns:
        As "1,234", or "at most 1,234" where the table has a bound.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> active_words(language_model(load_config("moekit_tiny"), mixtral()), 197_184)
        '197,184'
    """
    return f"{'at most ' if has_bound(model) else ''}{active:,}"


def parameter_table(model: LanguageModel) -> list[ParameterCount]:
    """Count parameters by part; the last row is their sum.

    Args:
        model: on any device, the meta device included.

    Returns:
        Rows. A token uses k of E experts in each MoE layer, and one row of the embedding is counted as all of it. What
        several blocks share is counted once; of shared experts each block uses k others, at most.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> model = language_model(load_config("moekit_tiny", moe_freq=2, moe_num_experts=4), mixtral())
        >>> parameter_table(model)[-1].total == count_parameters(model)
        True
    """
    experts = active = others = dense = 0
    blocks = [block for block in model.layers if isinstance(block, Block)]
    attention = sum(count_parameters(each) for each in {block.attention for block in blocks})
    for layer, uses in Counter(block.feed_forward for block in blocks).items():
        if isinstance(layer, MoE):
            size = count_parameters(layer.experts)
            share = experts_per_token(layer.recipe, layer.num_experts, sequence_length=model.config.seq_len)
            experts += size
            active += round(size * min(uses * share / layer.num_experts, 1.0))
            others += count_parameters(layer) - size
        else:
            dense += count_parameters(layer)
    head = 0 if model.config.weight_tying else count_parameters(model.output)
    rows = [
        ParameterCount("embedding", count_parameters(model.tok_embeddings), count_parameters(model.tok_embeddings)),
        ParameterCount("attention", attention, attention),
        ParameterCount("dense feed-forward", dense, dense),
        ParameterCount("experts", experts, active),
        ParameterCount("routers and shared experts", others, others),
        ParameterCount("output head", head, head),
    ]
    norms = count_parameters(model) - sum(row.total for row in rows)
    rows.append(ParameterCount("norms", norms, norms))
    return [*rows, ParameterCount("all", sum(row.total for row in rows), sum(row.active for row in rows))]


def flops_per_token(model: LanguageModel) -> int:
    """Count the FLOPs of a training step per token, as MFU does: of the model, whatever is computed twice.

    Six for each active parameter, two forward and four backward, and 12 L T D for the products of attention, of L
    blocks with T tokens of D features, as if every token saw the whole sequence. The embedding is looked up, so it
    counts only where it is the output head, too; what several blocks share counts once; and assignments that a
    capacity drops count as computed.

    Args:
        model: on any device, the meta device included.

    Returns:
        The count; an upper bound where ``has_bound``.

    Example:
        >>> from moekit.lm.configs import load_config
        >>> from moekit.recipes import mixtral
        >>> model = language_model(load_config("moekit_tiny"), mixtral())  # dense: two blocks, 64 tokens, 64 features
        >>> parameter_table(model)[-1].active, model.tok_embeddings.weight.numel(), flops_per_token(model)
        (197184, 32768, 1084800)
        >>> 6 * (197_184 - 32_768) + 12 * 2 * 64 * 64
        1084800

    References:
        Chowdhery et al., PaLM, 2022, appendix B, https://arxiv.org/abs/2204.02311
    """
    config = model.config
    products = parameter_table(model)[-1].active
    if not config.weight_tying:
        products -= count_parameters(model.tok_embeddings)
    return 6 * products + 12 * config.n_layers * config.seq_len * config.hidden_dim
