from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moekit.lm.configs import load_config
from moekit.lm.ngrams import bigram_loss, unigram_loss
from moekit.lm.shards import load_sequences, write_shards
from moekit.lm.tokenizers import ByteTokenizer
from moekit.recipes import mixtral, openlm, report
from moekit.recipes.evaluate import Evaluation
from moekit.recipes.language_models import language_model
from moekit.recipes.report import Baselines
from moekit.recipes.setup import Domain

SCORES = {
    "prose": Evaluation(2.0, 100, 1.25, {0: [0.5, 0.25, 0.25, 0.0], 2: [0.25] * 4}, 0.125),
    "code": Evaluation(1.0, 100, None, {0: [0.25] * 4, 2: [0.0, 0.0, 0.0, 1.0]}, 0.0),
}
SIMPLE = {"prose": Baselines(4.0, 3.0), "code": Baselines(5.0, None)}


def rendered(table):
    console = Console(file=StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def cells(text, first):
    [line] = [line for line in text.splitlines() if line.startswith(f"│ {first} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def small_model(**options):
    return language_model(
        load_config("moekit_tiny", vocab_size=257, moe_freq=2, moe_num_experts=4, **options), mixtral()
    )


def test_baselines_score_the_validation_data(shards):
    domain = Domain("prose", shards.train[0], shards.validation[0])
    unigram, bigram = report.baselines(domain, vocab_size=512)
    train, held_out = load_sequences(shards.train[0]), load_sequences(shards.validation[0])
    assert unigram == unigram_loss(train, held_out, vocab_size=512)
    assert bigram == bigram_loss(train, held_out, vocab_size=512)
    assert 0.69 < bigram < 0.75 < 2.5 < unigram < 3.0  # ln 2 and ln 16 are the truth


def test_a_large_vocabulary_or_a_single_sequence_has_no_bigram(shards, tmp_path):
    domain = Domain("prose", shards.train[0], shards.validation[0])
    assert report.baselines(domain, vocab_size=50_432).bigram is None
    single = write_shards(tmp_path, load_sequences(shards.train[0])[:1])
    assert report.baselines(domain._replace(train=single), vocab_size=512).bigram is None


def test_baselines_need_validation_data(shards):
    with pytest.raises(ValueError, match="domain prose has no validation data; give them with --val-manifest"):
        report.baselines(Domain("prose", shards.train[0], None), vocab_size=512)


def test_the_score_table_sets_losses_beside_baselines():
    text = rendered(report.score_table(SCORES, SIMPLE))
    assert cells(text, "prose") == ["prose", "2.000", "7.39", "1.250", "3.000", "4.000", "1.000"]
    assert cells(text, "code") == ["code", "1.000", "2.72", "-", "-", "5.000", "-"]


def test_the_load_table_has_a_row_for_every_domain_and_block():
    text = rendered(report.load_table(SCORES))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["prose", "0", "█▄▄", "0.00", "2.00", "12.5%"],
        ["prose", "2", "▄▄▄▄", "1.00", "1.00", ""],
        ["code", "0", "▄▄▄▄", "1.00", "1.00", "0.0%"],
        ["code", "2", "█", "0.00", "4.00", ""],
    ]


def test_describe_lays_out_parameters_and_bytes():
    with torch.device("meta"):
        config = load_config("open_lm_41m", model_norm="gain_only_layer_norm", moe_freq=2, moe_num_experts=8)
        model = language_model(config, openlm())
    text = rendered(report.describe(model, upstream_bias=True))
    assert cells(text, "all") == ["all", "68,882,976", "44,995,104", f"{4 * 68_882_976:,}"]
    words = " ".join(text.split())
    assert "OpenLM's own count is 68,884,704: 1,728 more, a bias of 288 in each of 6 MoE blocks" in words
    assert "OpenLM" not in rendered(report.describe(model))


def test_a_sample_continues_its_prompt_and_repeats_by_seed():
    model, tokenizer = small_model(), ByteTokenizer()
    text = report.sample(model, tokenizer, "Hello", tokens=12)
    assert text.startswith("Hello")
    assert len(text) > 5
    state = torch.get_rng_state()
    assert text == report.sample(model, tokenizer, "Hello", tokens=12)
    assert torch.equal(state, torch.get_rng_state())
    assert text != report.sample(model, tokenizer, "Hello", tokens=12, seed=1)


def test_samples_are_printed_as_they_are():
    console = Console(file=StringIO(), width=200)
    report.print_samples(console, small_model(), ByteTokenizer(), ["[bold]x[/bold]", "def f("])
    text = console.file.getvalue()
    assert "[bold]x[/bold]" in text
    assert "def f(" in text
    assert "sample 1" in text
    assert "sample 2" in text


@pytest.mark.parametrize("validated", [True, False])
def test_draw_takes_its_curves_from_the_metrics(monkeypatch, tmp_path, validated):
    drawn = {}
    monkeypatch.setattr(report, "plot_run", lambda path, **options: drawn.update(options) or Path(path))
    metrics = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}]
    if validated:
        metrics[1]["validation"] = {"prose": 2.5, "code": 1.5}
    scores = {**SCORES, "dense": Evaluation(1.0, 1, None, {}, 0.0)} if not validated else SCORES
    assert report.draw(tmp_path / "run.png", metrics, scores, SIMPLE) == tmp_path / "run.png"
    assert drawn["train"] == ([10, 20], [3.0, 2.0])
    assert drawn["validation"] == ({"prose": ([20], [2.5]), "code": ([20], [1.5])} if validated else {})
    assert drawn["baselines"] == {"prose": 3.0}
    assert list(drawn["loads"]) == ["prose", "code"]
