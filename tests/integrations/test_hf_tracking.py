"""Routing recorded from a transformers model: the numbers, the padding, the steps, and that nothing stays behind."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
import transformers
from hf_families import families, tiny_model
from torch import Tensor, nn

from moekit.integrations.transformers import RoutingRecorder, track_routing
from moekit.routing import softmax_of_top_k

E, K, VOCABULARY = 4, 2, 48
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


@pytest.fixture
def model() -> transformers.MixtralForCausalLM:
    built = tiny_model(next(family for family in families() if family.name == "mixtral"))
    built.set_experts_implementation("eager")
    return built


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def routings_by_hand(model: nn.Module, ids: Tensor, **inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Compute each layer's experts and weights from the router logits that the model returns."""
    logits = model(input_ids=ids, output_router_logits=True, **inputs).router_logits
    return [softmax_of_top_k(layer.detach(), k=K)[1:3] for layer in logits]


def called(recorder: RoutingRecorder) -> list[list[tuple[str, int]]]:
    """List the layer and the tokens of each call of each step."""
    return [[(call.layer, call.routing.num_tokens) for call in step] for step in recorder.steps]


def both_layers(num_tokens: int) -> list[tuple[str, int]]:
    return [(layer, num_tokens) for layer in LAYERS]


def in_another_thread(work: Callable[[], None]) -> None:
    """Run it to its end; an error of it is one of the test."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


def once_behind_the_first_layer(model: nn.Module, work: Callable[[], None]) -> None:
    """Do something in the middle of the model's next call, and in no call after it."""
    layer: nn.Module = model.model.layers[0]

    def hook(*_: object) -> None:
        handle.remove()
        work()

    handle = layer.register_forward_hook(hook)


def test_traces_hold_what_the_router_decided(model) -> None:
    steps = [tokens(2, 5), tokens(2, 5), tokens(2, 5)]
    expected = [routings_by_hand(model, ids) for ids in steps]
    with track_routing(model) as recorder:
        for ids in steps:
            model(input_ids=ids)
    traces = recorder.traces()
    assert recorder.layers == LAYERS
    assert traces.batch_size == (3, 2)
    assert traces["expert_indices"].shape == (3, 2, 10, K)
    assert traces["expert_indices"].dtype == torch.int64
    for step, layers in enumerate(expected):
        for layer, (indices, weights) in enumerate(layers):
            assert torch.equal(traces["expert_indices"][step, layer], indices)
            torch.testing.assert_close(traces["weights"][step, layer], weights)
    assert not traces["weights"].requires_grad


def test_statistics_are_those_of_all_steps_together(model) -> None:
    steps = [tokens(2, 5), tokens(1, 3)]
    expected = [routings_by_hand(model, ids) for ids in steps]
    with track_routing(model) as recorder:
        for ids in steps:
            model(input_ids=ids)
    stats = recorder.stats()
    assert tuple(stats) == LAYERS
    for layer, name in enumerate(LAYERS):
        indices = torch.cat([routings[layer][0] for routings in expected])
        weights = torch.cat([routings[layer][1] for routings in expected])
        counts = [(indices == e).sum().item() for e in range(E)]
        assert stats[name].tokens_per_expert.tolist() == counts
        assert stats[name].max_violation.item() == pytest.approx(max(counts) / (13 * K / E) - 1)
        entropies = [-sum(w * math.log(w) for w in row) for row in weights.tolist()]
        assert stats[name].entropy.item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
        assert stats[name].drop_rate.item() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_tokens_are_left_out(model, side: str) -> None:
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, slice(0, 4) if side == "left" else slice(2, 6)] = 0
    with track_routing(model) as recorder:
        model(input_ids=ids, attention_mask=mask)
    with track_routing(model, mask_padding=False) as everything:
        model(ids, mask)
    real = mask.flatten().bool()
    traced, all_traced = recorder.traces()[0, 0], everything.traces()[0, 0]
    assert (traced["expert_indices"][~real] == -1).all()
    assert (traced["weights"][~real] == 0).all()
    assert (all_traced["expert_indices"] >= 0).all()
    assert torch.equal(traced["expert_indices"][real], all_traced["expert_indices"][real])
    counts = all_traced["expert_indices"][real].flatten().bincount(minlength=E)
    stats = recorder.stats()[LAYERS[0]]
    assert torch.equal(stats.tokens_per_expert, counts)
    shares = all_traced["weights"][real]
    assert stats.entropy.item() == pytest.approx(torch.special.entr(shares).sum(-1).mean().item(), rel=1e-5)


def test_a_mask_as_second_positional_argument_counts_too(model) -> None:
    mask = torch.tensor([[1, 1, 0]])
    with track_routing(model) as recorder:
        model(tokens(1, 3), mask)
    assert (recorder.steps[0][0].routing.expert_indices[:, 0] < 0).tolist() == [False, False, True]


def test_a_wrapper_that_hands_its_keywords_on_is_tracked_too(model) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **kwargs: Tensor):
            return self.inner(**kwargs)

    wrapper = Wrapper()
    with track_routing(wrapper) as recorder:
        model(input_ids=tokens(1, 3))  # no call of the wrapper, so no step
        wrapper(input_ids=tokens(1, 3), attention_mask=torch.tensor([[0, 1, 1]]))
    assert recorder.layers == tuple(f"inner.{layer}" for layer in LAYERS)
    assert (recorder.steps[0][0].routing.expert_indices[:, 0] < 0).tolist() == [True, False, False]


def test_generation_is_a_step_per_call_and_shorter_steps_are_filled_up(model) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # behind the cache, the mask is longer than the input
    with track_routing(model) as recorder:
        model.generate(
            tokens(2, 4), attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=True, eos_token_id=None
        )
    indices = recorder.traces()["expert_indices"]
    assert indices.shape == (3, 2, 8, K)
    real = (indices >= 0).all(-1)[:, 0]  # (steps, T)
    assert real.tolist() == [[True] * 4 + [False] * 2 + [True] * 2, *([[True] * 2 + [False] * 6] * 2)]


def test_layers_run_again_in_the_backward_pass_are_counted_once(model) -> None:
    model.activation_checkpointing_enable()
    model.train()
    ids = tokens(2, 5)
    with track_routing(model) as recorder:
        model(input_ids=ids, labels=ids).loss.backward()
    assert [call.layer for call in recorder.steps[0]] == list(LAYERS)
    assert len(recorder.steps) == 1


def test_nothing_stays_in_the_model(model) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with track_routing(model) as recorder:
        assert hooks() == before + 2 + len(LAYERS)
        model(input_ids=tokens(1, 3))
    assert hooks() == before
    with pytest.raises(ZeroDivisionError), track_routing(model):
        raise ZeroDivisionError
    assert hooks() == before
    model(input_ids=tokens(1, 3))
    assert isinstance(recorder, RoutingRecorder)
    assert len(recorder.steps) == 1
    recorder.clear()
    assert recorder.stats() == {}
    assert recorder.layers == ()


def test_a_call_that_failed_is_no_step(model) -> None:
    with track_routing(model) as recorder:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 2), VOCABULARY))
        model.model.layers[0].mlp.experts(torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert recorder.steps == []


def test_threads_that_track_one_model_record_their_own_calls(model) -> None:
    recorders: list[RoutingRecorder] = []

    def other() -> None:
        with track_routing(model) as recorder:
            recorders.append(recorder)
            for _ in range(2):
                model(input_ids=tokens(1, 5))

    once_behind_the_first_layer(model, lambda: in_another_thread(other))
    with track_routing(model) as recorder:
        model(input_ids=tokens(1, 3))
    assert called(recorder) == [both_layers(3)]
    assert called(recorders[0]) == [both_layers(5)] * 2


def test_a_context_that_saw_only_other_threads_says_so(model) -> None:
    with pytest.warns(UserWarning, match=r"nothing was recorded.*called 2 times in other threads"):  # noqa: SIM117
        with track_routing(model):
            in_another_thread(lambda: [model(input_ids=tokens(1, 3)) for _ in range(2)])


def test_a_context_in_which_no_experts_module_ran_says_so(model, monkeypatch) -> None:
    """As of a compiled model, whose graph calls none; without waiting for a compiler."""
    monkeypatch.setattr(model, "forward", lambda input_ids: input_ids)
    with pytest.warns(UserWarning, match=r"called 1 times, and none of its experts modules"):  # noqa: SIM117
        with track_routing(model) as recorder:
            model(input_ids=tokens(1, 3))
    with pytest.raises(ValueError, match=r"traces: nothing was recorded"):
        recorder.traces()
    assert recorder.stats() == {}


def test_what_was_recorded_and_cleared_was_recorded(model) -> None:
    with track_routing(model) as recorder:
        model(input_ids=tokens(1, 3))
        in_another_thread(lambda: model(input_ids=tokens(1, 3)))
        recorder.clear()


def test_a_call_of_another_thread_is_neither_recorded_nor_refused(model) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    odd_mask = torch.zeros(1, 1, 7, 7)  # of which track_routing could not tell what is padding

    def other() -> None:
        model(input_ids=tokens(1, 7))
        model(input_ids=tokens(1, 7), attention_mask=odd_mask)

    once_behind_the_first_layer(model, lambda: in_another_thread(other))
    with track_routing(model) as recorder:
        model(input_ids=tokens(2, 4), attention_mask=mask)
    assert called(recorder) == [both_layers(8)]
    assert [stats.tokens_per_expert.sum() for stats in recorder.stats().values()] == [7 * K] * 2


def test_hooks_that_are_half_removed_do_not_fail_in_another_thread(model) -> None:
    """Between the two steps of a removal, torch hands no keywords to a hook."""
    with track_routing(model) as recorder:
        model(input_ids=tokens(1, 2))
        for module in model.modules():
            module._forward_pre_hooks_with_kwargs.clear()
        in_another_thread(lambda: model(input_ids=tokens(1, 3)))
    assert called(recorder) == [both_layers(2)]


def test_layers_that_a_backward_pass_runs_again_in_its_own_thread_are_not_counted(model) -> None:
    """Autograd goes back through CUDA tensors in threads of its own, here in the middle of the next call."""
    model.activation_checkpointing_enable()
    model.train()
    ids = tokens(2, 5)
    with track_routing(model) as recorder:
        loss = model(input_ids=ids, labels=ids).loss
        once_behind_the_first_layer(model, lambda: in_another_thread(loss.backward))
        model(input_ids=ids)
    assert model.model.layers[0].mlp.experts.down_proj.grad is not None
    assert called(recorder) == [both_layers(10)] * 2


def test_a_call_within_a_call_is_a_step_of_its_own(model) -> None:
    once_behind_the_first_layer(model, lambda: model(tokens(1, 2), torch.tensor([[0, 1]])))
    with track_routing(model) as recorder:
        model(tokens(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]]))
    assert called(recorder) == [both_layers(2), both_layers(6)]  # in the order in which they returned
    assert [[(call.routing.expert_indices[:, 0] >= 0).sum() for call in step] for step in recorder.steps] == [
        [1, 1],
        [4, 4],
    ]


@pytest.mark.parametrize("early", [False, True], ids=["in the model", "in a hook before the recorder's"])
def test_a_call_within_a_call_that_failed_leaves_the_outer_one_as_it_is(model, early: bool) -> None:
    def refuse(_: nn.Module, args: tuple[Tensor]) -> None:
        if early and (args[0] == VOCABULARY).any():
            raise IndexError

    def fail() -> None:
        with pytest.raises(IndexError):
            model(torch.full((1, 2), VOCABULARY))

    model.register_forward_pre_hook(refuse)
    once_behind_the_first_layer(model, fail)
    with track_routing(model) as recorder:
        model(tokens(1, 6))
    assert called(recorder) == [both_layers(6)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_call_that_was_interrupted_is_no_step(model, error: type[BaseException]) -> None:
    """Torch calls no hook after a KeyboardInterrupt."""

    def interrupt() -> None:
        raise error

    once_behind_the_first_layer(model, interrupt)
    with track_routing(model) as recorder:
        with pytest.raises(error):
            model(input_ids=tokens(1, 3))
        model.model.layers[0].mlp.experts(torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        model(input_ids=tokens(1, 4))
    assert called(recorder) == [both_layers(4)]


def test_recording_changes_neither_output_nor_gradients(model) -> None:
    ids = tokens(2, 5)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = gradients()
    with track_routing(model):
        actual = gradients()
    assert len(actual) > 10
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_layers_with_other_numbers_of_choices_and_empty_masks_have_statistics(model) -> None:
    with track_routing(model) as recorder:
        model(input_ids=tokens(1, 3), attention_mask=torch.zeros(1, 3, dtype=torch.int64))
    stats = recorder.stats()[LAYERS[0]]
    assert stats.tokens_per_expert.tolist() == [0] * E
    assert stats.entropy.item() == stats.max_violation.item() == 0


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no experts modules"), track_routing(nn.Linear(2, 2)):
        pass


def test_a_mask_that_does_not_say_what_is_padding_is_an_error(model) -> None:
    """As generate makes it of two axes for a static cache: padding would be counted."""
    ids, mask = tokens(2, 4), torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 1, "cache_implementation": "static", "use_cache": True}
    with track_routing(model), pytest.raises(ValueError, match=r"attention_mask of .*; expected \(batch, tokens\)"):
        model.generate(ids, **options)
    with track_routing(model), pytest.raises(ValueError, match=r"of shape \(2, 1, 4, 4\), which does not say what is"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 4, 4))
    with track_routing(model, mask_padding=False) as recorder:
        model.generate(ids, **options)
    assert recorder.stats()[recorder.layers[0]].tokens_per_expert.sum() == 8 * K


def test_experts_that_see_other_tokens_than_the_mask_are_an_error(model) -> None:
    block = model.model.layers[1].mlp
    whole = block.forward
    block.forward = lambda x: whole(torch.cat([x, x], dim=1))[:, : x.shape[1]]
    ids = tokens(2, 3)
    with track_routing(model), pytest.raises(ValueError, match=r"layers.1.*see 12 tokens.*marks 6.*mask_padding=False"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with track_routing(model, mask_padding=False) as recorder:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert recorder.traces()["expert_indices"].shape == (1, 2, 12, K)
    assert (recorder.traces()["expert_indices"][0, 0, 6:] == -1).all()


def test_traces_of_nothing_or_of_other_layers_are_an_error(model) -> None:
    recorder = RoutingRecorder()
    with pytest.raises(ValueError, match=r"nothing was recorded.*in the thread that opened it"):
        recorder.traces()
    with track_routing(model) as recorder:
        model(input_ids=tokens(1, 3))
        model(input_ids=tokens(1, 3))
    recorder.steps[0].pop()
    with pytest.raises(ValueError, match="step 0 called the layers"):
        recorder.traces()
