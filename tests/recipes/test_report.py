import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_runs import markov_sequences
from stored_rows import stored_rows

from moekit.lm.configs import load_config
from moekit.lm.displays import LayerLoad
from moekit.lm.ngrams import bigram_loss, unigram_loss
from moekit.lm.shards import ShardError, read_manifest, write_shards
from moekit.lm.tokenizers import ByteTokenizer
from moekit.recipes import mixtral, openlm, report
from moekit.recipes.evaluate import Evaluation
from moekit.recipes.language_models import language_model
from moekit.recipes.report import Baselines
from moekit.recipes.settings import DataSettings
from moekit.recipes.sources import Corpus, Source, ValidationSet


def load(layer, shares, *, drop_rate=0.0, entropy=1.0):
    return LayerLoad(layer, shares, max(shares) * len(shares) - 1, drop_rate, entropy, shares.count(0.0), 200, 100)


def scores(loss, bits=None, layers=(), skipped=None):
    return Evaluation(loss, loss - 0.25, loss + 0.5, 1234, 100, bits, layers, skipped or {})


SCORES = {
    "prose": scores(2.0, 1.25, [load(0, [0.5, 0.25, 0.25, 0.0], drop_rate=0.125), load(2, [0.25] * 4, entropy=0.5)]),
    "code": scores(1.0, None, [load(0, [0.25] * 4), load(2, [0.0, 0.0, 0.0, 1.0])]),
}
TINY, DATA = load_config("moekit_tiny"), DataSettings()
SIMPLE = {"prose": Baselines(4.0, 3.0), "code": Baselines(5.0, None)}


def sources_of(shards):
    """Return the first source and what was held out from it."""
    source = Source("prose", str(shards.train[0]), read_manifest(shards.train[0]))
    held_out = ValidationSet("prose", read_manifest(shards.validation[0]), None, None, str(shards.validation[0]))
    return source, held_out


def rows_of(manifest):
    return torch.tensor(stored_rows(manifest))


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
    unigram, bigram = report.baselines(*sources_of(shards), TINY, DATA)
    train, held_out = rows_of(shards.train[0]), rows_of(shards.validation[0])
    assert unigram == unigram_loss(train, held_out, vocab_size=512)
    assert bigram == bigram_loss(train, held_out, vocab_size=512)
    assert 0.69 < bigram < 0.75 < 2.5 < unigram < 3.0  # ln 2 and ln 16 are the truth


def test_a_large_vocabulary_or_a_single_sequence_has_no_bigram(shards, tmp_path):
    source, held_out = sources_of(shards)
    assert report.baselines(source, held_out, load_config("moekit_tiny", vocab_size=50_432), DATA).bigram is None
    single = source._replace(shards=read_manifest(write_shards(tmp_path, rows_of(shards.train[0])[:1])))
    assert report.baselines(single, held_out, TINY, DATA).bigram is None


def test_baselines_score_what_the_model_is_scored_on(shards):
    source, held_out = sources_of(shards)
    train, scored = rows_of(shards.train[0])[:, :33], rows_of(shards.validation[0])[:2, :33]
    half = load_config("moekit_tiny", seq_len=32)  # of the front of each, the first 33 to 64 tokens are scored
    found = report.baselines(source, held_out, half, DataSettings(val_num_samples=33))
    assert found == (unigram_loss(train, scored, vocab_size=512), bigram_loss(train, scored, vocab_size=512))
    other_members = DataSettings(data_key="txt")
    with pytest.raises(ValueError, match=r"ends in \.txt; found json"):
        report.baselines(source, held_out, half, other_members)


def test_baselines_count_padding_and_ends_of_documents_as_training_does(shards, tmp_path):
    source, held_out = sources_of(shards)
    written, read = (markov_sequences(9, first=0, seed=1) for _ in range(2))
    written[4, 40:], read[4, 40:] = -1, -1
    written[7, 5], read[7, 5] = -2, 510
    marked = source._replace(shards=read_manifest(write_shards(tmp_path, written)))
    scored = rows_of(shards.validation[0])
    expected = (unigram_loss(read, scored, vocab_size=512), bigram_loss(read, scored, vocab_size=512))
    assert report.baselines(marked, held_out, TINY, DATA) == expected


def test_bad_training_data_are_named_or_left_out_as_in_training(shards, tmp_path):
    source, held_out = sources_of(shards)
    rows, scored = markov_sequences(9, first=0, seed=1).tolist(), rows_of(shards.validation[0])
    good = torch.tensor([*rows[:4], *rows[5:]])
    rows[4] = rows[4][:10]
    bad = source._replace(shards=read_manifest(write_shards(tmp_path, rows)))
    with pytest.raises(ShardError, match=r"member 00000004\.json of shard .* has 10 tokens; .*--on-bad-data skip"):
        report.baselines(bad, held_out, TINY, DATA)
    expected = (unigram_loss(good, scored, vocab_size=512), bigram_loss(good, scored, vocab_size=512))
    skipping = DataSettings(on_bad_data="skip")
    assert report.baselines(bad, held_out, TINY, skipping) == expected
    Path(bad.shards[0].path).unlink()
    with pytest.raises(ValueError, match="train has the shape"):
        report.baselines(bad, held_out, TINY, skipping)


def test_baselines_are_of_sets_that_were_held_out_from_a_source(shards):
    source, held_out = sources_of(shards)
    other = held_out._replace(name="other")
    corpus = Corpus((source, source._replace(name="code")), (1, 1), (held_out, other), None, None)
    found = report.simple_scores(corpus, ["prose", "other"], TINY, DATA)
    assert found == {"prose": report.baselines(source, held_out, TINY, DATA)}
    assert report.simple_scores(corpus, ["other"], TINY, DATA) == {}


@pytest.mark.parametrize("manifest", ["s3://bucket/prose/manifest.jsonl", "pipe:aws s3 cp s3://b/p/m.jsonl -"])
def test_data_elsewhere_have_no_baseline(shards, manifest):
    source, held_out = sources_of(shards)
    corpus = Corpus((source._replace(manifest=manifest),), (1,), (held_out,), None, None)
    assert report.simple_scores(corpus, ["prose"], TINY, DATA) == {}


def test_data_too_large_for_memory_have_no_baseline(shards, monkeypatch):
    source, held_out = sources_of(shards)
    corpus, tokens = Corpus((source,), (1,), (held_out,), None, None), 64 * source.num_sequences
    for most, expected in ((tokens, ["prose"]), (tokens - 1, [])):
        monkeypatch.setattr(report, "MOST_BASELINE_TOKENS", most)
        assert list(report.simple_scores(corpus, ["prose"], TINY, DATA)) == expected


def test_the_score_table_sets_losses_beside_baselines():
    text = rendered(report._score_table(SCORES, SIMPLE))
    assert cells(text, "prose") == ["prose", "2.000", "1.750 2.500", "7.39", "1.250", "3.000", "4.000", "1.000"]
    assert cells(text, "code") == ["code", "1.000", "0.750 1.500", "2.72", "-", "-", "5.000", "-"]
    assert "intervals by bootstrap over stretches of sequences: 1,234 of prose, 1,234 of code" in " ".join(text.split())


def test_a_set_without_baselines_has_dashes_or_no_columns():
    text = rendered(report._score_table(SCORES, {"prose": SIMPLE["prose"]}))
    assert cells(text, "code")[-3:] == ["-", "-", "-"]
    text = rendered(report._score_table(SCORES, {}))
    assert cells(text, "code") == ["code", "1.000", "0.750 1.500", "2.72", "-"]
    assert "bigram" not in text


def test_the_load_table_has_a_row_for_every_domain_and_block():
    text = rendered(report._load_table(SCORES))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["prose", "0", "█▄▄", "0.00", "2.00", "1.00", "12.5%"],
        ["prose", "2", "▄▄▄▄", "1.00", "1.00", "0.50", "0.0%"],
        ["code", "0", "▄▄▄▄", "1.00", "1.00", "1.00", "0.0%"],
        ["code", "2", "█", "0.00", "4.00", "1.00", "0.0%"],
    ]


def test_results_are_written_as_json(tmp_path):
    skipping = SCORES["prose"]._replace(skipped={"short sequence": 2})
    report.write_results(tmp_path / "r.json", {"steps": 7}, {**SCORES, "prose": skipping}, {"prose": SIMPLE["prose"]})
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["steps"] == 7
    prose, code = written["validation"]["prose"], written["validation"]["code"]
    layers = [each._asdict() for each in SCORES["prose"].layers]
    assert prose == {
        "loss": 2.0,
        "perplexity": pytest.approx(7.389, abs=1e-3),
        "loss_low": 1.75,
        "loss_high": 2.5,
        "bits_per_byte": 1.25,
        "sequences": 1234,
        "tokens": 100,
        "skipped_data": {"short sequence": 2},
        "layers": layers,
        "unigram": 4.0,
        "bigram": 3.0,
    }
    assert code["skipped_data"] == {}
    assert code["bits_per_byte"] is None
    assert "unigram" not in code


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


def test_a_diverged_run_has_a_table_and_results_that_every_reader_of_json_takes(tmp_path):
    diverged = {"prose": scores(777.0, 1000.0)}
    assert cells(rendered(report._score_table(diverged, {})), "prose")[1:4] == ["777.000", "776.750 777.500", "inf"]
    report.write_results(tmp_path / "r.json", {}, diverged, {})
    written = json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(f"it has {name}"))
    assert written["validation"]["prose"]["perplexity"] is None
    assert written["validation"]["prose"]["loss"] == 777.0


@pytest.mark.parametrize("validated", [True, False])
def test_draw_takes_its_curves_from_the_metrics(monkeypatch, tmp_path, validated):
    drawn = {}
    monkeypatch.setattr(report, "plot_run", lambda path, **options: drawn.update(options) or Path(path))
    metrics = [{"step": 10, "loss": 3.0}, {"step": 15, "loss": None}, {"step": 20, "loss": 2.0}]  # one was left out
    if validated:
        metrics[2]["validation"] = {"prose": 2.5, "code": 1.5}
    found = SCORES if validated else {**SCORES, "dense": scores(1.0)}
    assert report.draw(tmp_path / "run.png", metrics, found, SIMPLE) == tmp_path / "run.png"
    assert drawn["train"] == ([10, 20], [3.0, 2.0])
    assert drawn["validation"] == ({"prose": ([20], [2.5]), "code": ([20], [1.5])} if validated else {})
    assert drawn["whole"] == {domain: each.loss for domain, each in found.items()}
    assert drawn["baselines"] == {"prose": 3.0}
    assert drawn["loads"]["prose"] == {0: [0.5, 0.25, 0.25, 0.0], 2: [0.25] * 4}
    assert list(drawn["loads"]) == ["prose", "code"]


def test_draw_takes_lines_of_launches_that_scored_other_sets_and_lines_without_a_loss(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(report, "plot_run", lambda path, **options: drawn.update(options))
    metrics = [{"step": 10, "loss": 3.0, "validation": {"prose": 2.5}}, {"step": 15, "note": "from elsewhere"}]
    report.draw(tmp_path / "run.png", [*metrics, {"step": 20, "loss": 2.0, "validation": {"code": 1.5}}], SCORES, {})
    assert drawn["train"] == ([10, 20], [3.0, 2.0])
    assert drawn["validation"] == {"prose": ([10], [2.5]), "code": ([20], [1.5])}
