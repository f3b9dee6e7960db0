import pytest
import torch

from moekit.lm.configs import load_config
from moekit.lm.generation import generate, next_token
from moekit.lm.model import LanguageModel


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(load_config("moekit_tiny", vocab_size=31, seq_len=8))


PROMPT = torch.tensor([3, 1, 4])


def sample(model: LanguageModel, seed: int, **options) -> torch.Tensor:
    return generate(model, PROMPT, max_new_tokens=20, generator=torch.Generator().manual_seed(seed), **options)


def test_same_generator_same_text(model):
    first = sample(model, 0)
    assert torch.equal(first, sample(model, 0))
    assert not torch.equal(first, sample(model, 1))
    assert torch.equal(first[:3], PROMPT)
    assert first.shape == (23,)
    assert first.dtype == torch.int64


def test_greedy_takes_the_largest_logit_of_the_cropped_context(model):
    ids = generate(model, PROMPT, max_new_tokens=12, temperature=0)
    for end in range(3, 15):
        with torch.no_grad():
            logits = model(ids[None, max(0, end - 8) : end]).logits[0, -1]
        assert ids[end] == logits.argmax()


def test_one_candidate_and_a_tiny_temperature_are_greedy(model):
    greedy = generate(model, PROMPT, max_new_tokens=20, temperature=0)
    assert torch.equal(sample(model, 0, top_k=1), greedy)
    assert torch.equal(sample(model, 0, temperature=1e-30), greedy)


def test_top_k_draws_only_from_the_largest_and_by_their_odds():
    logits = torch.tensor([1.0, 5.0, 4.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([next_token(logits, top_k=2, generator=generator) for _ in range(2000)])
    counts = draws.bincount(minlength=4)
    assert counts[0] == counts[3] == 0
    assert counts[1].item() / 2000 == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.04)


def test_top_k_larger_than_the_vocabulary_is_all():
    assert next_token(torch.zeros(3), top_k=100).item() in range(3)


def test_modes_and_gradients_are_as_before(model):
    model.train()
    model.layers[0].eval()
    generate(model, PROMPT, max_new_tokens=1)
    assert model.training
    assert model.layers[1].training
    assert not model.layers[0].training
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error(model):
    with pytest.raises(IndexError):
        generate(model, torch.tensor([99]), max_new_tokens=1)
    assert model.training
    assert torch.is_grad_enabled()


def test_nothing_to_add_returns_the_prompt(model):
    assert torch.equal(generate(model, PROMPT, max_new_tokens=0), PROMPT)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), {}, r"prompt has shape \(0,\), expected \(L,\) with at least one token"),
        (torch.zeros(1, 2, dtype=torch.int64), {}, r"prompt has shape \(1, 2\)"),
        (PROMPT, {"temperature": -1.0}, "temperature -1.0, expected neither to be negative"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (PROMPT, {"top_k": 0}, "top_k is 0, expected at least 1"),
    ],
)
def test_bad_option_is_explained(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, **{"max_new_tokens": 1, **options})
