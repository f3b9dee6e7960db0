import pytest
import torch

from moekit.lm.initialization import output_std, truncated_normal_


def test_truncated_normal_is_cut_at_three_sigma_and_follows_the_generator():
    a, b = torch.empty(2, 20_000)
    truncated_normal_(a, std=0.5, generator=torch.Generator().manual_seed(3))
    truncated_normal_(b, std=0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(a, b)
    assert 1.4 < a.abs().max() <= 1.5
    assert a.std().item() == pytest.approx(0.9866 * 0.5, rel=0.02)


def test_output_std_shrinks_with_the_root_of_depth():
    assert output_std(100, layer_index=7) == pytest.approx(0.1 / 4)
