"""Every router in one layer, the same dropless SwiGLU experts behind each, so that rows of a table differ in routing.

A router keeps what its paper gives it: gate, losses and their coefficients, state, and whether it evaluates otherwise
than it trains. It loses what is no routing: the paper's experts, shared experts, capacity limit, and the factor on the
weights, which belongs to another depth. Each is a composition, without arithmetic of its own. The training program
knows them as ``--recipe router:NAME``.
"""

from collections.abc import Callable
from functools import partial

from moekit import routing
from moekit.dispatch import dropless
from moekit.experts import grouped, init_gated, swiglu
from moekit.recipes import published, published_routers
from moekit.recipes.expert_layers import expert_layer
from moekit.recipes.families import phi_moe
from moekit.recipes.layers import Recipe
from moekit.recipes.sigmoid_families import deepseek_v3
from moekit.types import GroupedMatmul, Routing

PREFIX = "router:"


def with_experts(recipe: Recipe, *, matmul: GroupedMatmul = grouped) -> Recipe:
    """Give a recipe the experts of this module: dropless SwiGLU, none shared. Its routing stays.

    Args:
        recipe: any method.
        matmul: the backend; it must take unequal groups.

    Returns:
        Recipe. Its ``causal`` is the recipe's own, which may have been about a capacity limit that is gone.

    Example:
        >>> recipe = with_experts(published.deepseek_moe())
        >>> recipe.shared, recipe.layer.keywords["experts"].func.__name__
        (None, 'swiglu')
    """
    dispatcher = dropless()
    layer = expert_layer(dispatcher=dispatcher, experts=partial(swiglu, matmul=matmul))
    return recipe._replace(layer=layer, init=init_gated, plan=dispatcher.plan, shared=None)


def _balanced(route: Callable[..., Routing]) -> Recipe:
    """Compose a router with Switch's balancing loss, which most papers have."""
    return published.compose(
        route,
        dropless(),
        partial(swiglu, matmul=grouped),
        losses={"load_balance": routing.load_balance_loss},
        coefficients={"load_balance": 0.01},
    )


def top_k(*, k: int = 2) -> Recipe:
    """Softmax over all experts, then the k best; weights as they are (OLMoE, 2409.02060). Causal."""
    return _balanced(partial(routing.top_k, k=k))


def top_k_normalized(*, k: int = 2) -> Recipe:
    """Softmax over all experts, then the k best; weights over their sum (GShard, 2006.16668; Qwen3). Causal."""
    return _balanced(partial(routing.top_k, k=k, normalize=True))


def softmax_of_top_k(*, k: int = 2) -> Recipe:
    """The k largest logits, then the softmax over those alone (Mixtral, 2401.04088). Causal."""
    return _balanced(partial(routing.softmax_of_top_k, k=k))


def switch(*, training: bool = True) -> Recipe:
    """One expert, weighted by its probability; tokens are jittered before the gate in training (2101.03961). Causal."""
    recipe = _balanced(partial(routing.top_k, k=1))
    return recipe._replace(gate=routing.input_jitter(routing.linear_gate) if training else routing.linear_gate)


def noisy_top_k(*, k: int = 2, training: bool = True) -> Recipe:
    """Learned noise on the logits, then as ``softmax_of_top_k``; importance and load losses (1701.06538). Causal."""
    return with_experts(published_routers.sparsely_gated(k=k, training=training))


def random_second(*, training: bool = True) -> Recipe:
    """GShard's two experts, of which the second is taken by chance in training (2006.16668). Causal when dropless."""
    return with_experts(published.gshard(capacity_factor=0.0, training=training))


def expert_choice(*, k: float = 2) -> Recipe:
    """Every expert takes its best tokens of the batch, k per token in the mean (2202.09368). Not causal."""
    return with_experts(published_routers.expert_choice(k=k))


def expert_choice_per_sequence(*, k: float = 2) -> Recipe:
    """Every expert takes its best tokens of each sequence (2202.09368, with smaller pools). Not causal."""
    return with_experts(published_routers.expert_choice(k=k, per_sequence=True))


def sinkhorn(*, k: int = 2, training: bool = True) -> Recipe:
    """The k best by scores balanced over the batch in training (S-BASE, 2202.01169). Not causal in training."""
    return with_experts(published_routers.base_sinkhorn(k=k, training=training))


def quantile(*, k: int = 2) -> Recipe:
    """The k best of shifted logits; each step sets the shifts to quantiles of an even load (Megatron-LM). Causal."""
    return with_experts(published_routers.quantile_moe(k=k))


def hash_choice(*, k: int = 2, vocab_size: int = 50_432, seed: int = 0) -> Recipe:
    """K experts for each vocabulary id, drawn once; weights are shares of the softmax (2106.04426). Causal."""
    return with_experts(published_routers.hash_layer(k=k, vocab_size=vocab_size, seed=seed))


def sigmoid_bias(*, k: int = 2, bias_rate: float = 0.001) -> Recipe:
    """Sigmoid scores, and a selection bias that follows the load (2408.15664; DeepSeek-V3, 2412.19437). Causal."""
    return with_experts(published.deepseek_moe(k=k, num_shared=0, scale=1.0, bias_rate=bias_rate))


def sqrt_softplus_bias(*, k: int = 2, bias_rate: float = 0.001) -> Recipe:
    """As ``sigmoid_bias``, with scores sqrt(softplus(z)) (DeepSeek-V4's released model). Causal."""
    return sigmoid_bias(k=k, bias_rate=bias_rate)._replace(
        route=partial(routing.top_k, k=k, score=routing.sqrt_softplus, normalize=True),
        losses={"load_balance": partial(routing.load_balance_loss, score=routing.sqrt_softplus)},
    )


def group_limited(*, k: int = 2, num_groups: int = 4, groups_kept: int = 2, bias_rate: float = 0.001) -> Recipe:
    """As ``sigmoid_bias``, from a token's best groups of experts alone (DeepSeek-V3, 2412.19437). Causal."""
    recipe = partial(deepseek_v3, num_groups=num_groups, groups_kept=groups_kept, num_shared=0, scale=1.0)
    return with_experts(recipe(k=k, bias_rate=bias_rate))


def relu(*, k: int = 2) -> Recipe:
    """Every expert with a positive logit; an L1 loss steers their mean number to k (ReMoE, 2412.14711). Causal."""
    return with_experts(published_routers.remoe(k=k))


def soft_slots(*, slots: int = 32) -> Recipe:
    """Mixtures of a sequence's tokens; 32 slots are k = 2 at 8 experts and length 128 (2308.00951). Not causal."""
    return with_experts(published_routers.soft_moe(slots=slots))


def token_rounding(*, k: int = 2, tile: int = 64, training: bool = True) -> Recipe:
    """Top-k whose loads are multiples of a tile in training (SonicMoE, 2512.14080). Not causal in training."""
    return with_experts(published_routers.sonic_token_rounding(k=k, tile=tile, training=training))


def cosine(*, k: int = 2) -> Recipe:
    """Top-k of cosines to the experts' directions in a small space (X-MoE, 2204.09179). Causal."""
    return with_experts(published_routers.xmoe(k=k))


def sparse_mixer(*, k: int = 2, training: bool = True) -> Recipe:
    """Experts drawn one by one in training, with an estimate of what the draw costs (GRIN, 2409.12136). Causal."""
    return with_experts(phi_moe(k=k, training=training))


def simple_experts(*, k: int = 2) -> Recipe:
    """Top-k over networks and a null, a copy and two constant experts (MoE++, 2410.07348). Causal."""
    return with_experts(published_routers.moe_plus_plus(k=k))


def top_p(*, p: float = 0.4, max_k: int | None = None) -> Recipe:
    """A token's best experts until their probabilities add up to p (2403.07652). Causal."""
    return with_experts(published_routers.dynamic_k(p=p, max_k=max_k))


def threshold(*, level: float = 0.5, max_k: int | None = 4) -> Recipe:
    """Every expert whose sigmoid is above a level, at least one and at most ``max_k`` (DynMoE, 2405.14297). Causal.

    The paper learns the level and has a loss of its own, on the gate's directions; here the level is a constant, and
    the loss balances the load.
    """
    recipe = _balanced(partial(routing.threshold, threshold=level, max_k=max_k))
    return recipe._replace(losses={"load_balance": partial(routing.load_balance_loss, score=routing.sigmoid)})


def topology(*, k: int = 2, num_nodes: int = 2, share: float = 0.14, training: bool = True) -> Recipe:
    """At most a share of a node's tokens leaves it in training (FasterMoE, PPoPP 2022). Not causal in training.

    The batch is cut into even parts, each of which is routed as the tokens of a node of its own. Evaluation has no
    limit, so that a score does not depend on who shares a batch.
    """
    if not training:
        return _balanced(partial(routing.softmax_of_top_k, k=k))
    limited = _balanced(partial(routing.over_nodes, k=k, num_nodes=num_nodes, share=share))
    return limited._replace(needs=("token_mask",), causal=False)


def random_choice(*, k: int = 2) -> Recipe:
    """A control: k experts by chance at every call, weighted as in ``top_k``; no loss. Causal."""
    return _control(partial(routing.random_choice, k=k))


def round_robin(*, k: int = 2) -> Recipe:
    """A control: experts in turn by position, so that loads are even, weighted as in ``top_k``; no loss. Causal."""
    return _control(partial(routing.round_robin, k=k))


def _control(route: Callable[..., Routing]) -> Recipe:
    return published.compose(route, dropless(), partial(swiglu, matmul=grouped))


ROUTERS: dict[str, Callable[..., Recipe]] = {
    make.__name__: make
    for make in (
        top_k,
        top_k_normalized,
        softmax_of_top_k,
        switch,
        noisy_top_k,
        random_second,
        expert_choice,
        expert_choice_per_sequence,
        sinkhorn,
        quantile,
        hash_choice,
        sigmoid_bias,
        sqrt_softplus_bias,
        group_limited,
        relu,
        soft_slots,
        token_rounding,
        cosine,
        sparse_mixer,
        simple_experts,
        top_p,
        threshold,
        topology,
        random_choice,
        round_robin,
    )
}
