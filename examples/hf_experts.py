"""Train a tiny random Hugging Face MoE model on moekit's experts, and look at its routing; needs no network.

    python examples/hf_experts.py --steps 60
    python examples/hf_experts.py --implementation eager    # transformers' own experts: the same to rounding

Its text is the source of moekit, as bytes. With a real model, ``from_pretrained(..., experts_implementation="moekit")``
takes the place of ``tiny_model``, and all else stays.
"""

from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moekit
from moekit.integrations.transformers import RoutingRecorder, register, track_routing

BATCH, LENGTH = 8, 64


def tiny_model(implementation: str) -> PreTrainedModel:
    """Build a byte-level Qwen3-MoE of two layers with eight experts, two per token."""
    config: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "output_router_logits": True,  # adds the balancing loss
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": LENGTH,
        "experts_implementation": implementation,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))


def source_bytes() -> Tensor:
    """Read the source of moekit as one sequence of bytes, (bytes,) int64."""
    files = sorted(Path(moekit.__file__).parent.rglob("*.py"))
    return torch.tensor(list(b"".join(file.read_bytes() for file in files)))


def batch(text: Tensor) -> Tensor:
    """Draw windows of the text, (BATCH, LENGTH) int64."""
    starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
    return text[starts + torch.arange(LENGTH)]


def report(recorder: RoutingRecorder) -> str:
    """Describe the routing of each layer: a line of shares, and what one looks at."""
    lines = []
    for layer, stats in recorder.stats().items():
        load = " ".join(f"{100 * share:4.1f}" for share in stats.load.tolist())
        lines.append(
            f"{layer}: load in % {load} | max violation {stats.max_violation:.2f} | dead {stats.dead_experts:d} | "
            f"entropy of weights {stats.entropy:.2f} nats"
        )
    return "\n".join(lines)


def changed(recorder: RoutingRecorder) -> list[float]:
    """Return for each layer the share of tokens whose set of experts differs between first and last recorded step."""
    experts = recorder.traces()["expert_indices"].sort(dim=-1).values  # (steps, layers, T, K)
    return (experts[0] != experts[-1]).any(-1).float().mean(-1).tolist()


def main(steps: int = 60, implementation: str = "moekit", seed: int = 0) -> float:
    """Train, print the loss and the routing, and return the last loss.

    Args:
        steps: optimizer steps.
        implementation: transformers' name of what runs the experts.
        seed: of weights and batches.
    """
    register()
    torch.default_generator.manual_seed(seed)
    model, text = tiny_model(implementation), source_bytes()
    probe = batch(text)  # the same tokens before and after
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with track_routing(model) as probes, torch.no_grad():
        model(input_ids=probe)
    print(f"before training\n{report(probes)}")
    for step in range(1, steps + 1):
        ids = batch(text)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step}: loss {loss:.3f}")
    with track_routing(model) as after, torch.no_grad():
        model(input_ids=probe)
    print(f"after training\n{report(after)}")
    probes.steps += after.steps
    for layer, share in zip(probes.layers, changed(probes), strict=True):
        print(f"{layer}: {100 * share:.0f} % of the tokens changed their experts")
    return loss.item()


if __name__ == "__main__":
    tyro.cli(main)
