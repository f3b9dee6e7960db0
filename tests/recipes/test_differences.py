"""Warnings of weights that are about to compute something else than what they were trained to."""

import dataclasses
import json

import pytest

from moekit.recipes.differences import model_warnings
from moekit.recipes.settings import ModelSettings, TrainSettings
from moekit.recipes.setup import make_config, with_model_keys
from moekit.recipes.stored_settings import flat_settings

SAME = "these weights were trained with"


def stored(**model):
    return {"settings": json.loads(json.dumps(flat_settings(TrainSettings(model=ModelSettings(**model)))))}


def warned(given, before, *, training=True):
    return model_warnings(ModelSettings(**given), stored(**before), training=training)


@pytest.mark.parametrize(
    ("given", "before"),
    [
        ({}, {}),
        ({"moe_top_k": 2}, {}),  # said, and left to the recipe
        ({"moe_capacity_factor": 1.25, "moe_loss_weight": 0.1}, {}),
        ({"moe_freq": 0, "recipe": "mixtral"}, {"moe_freq": 0}),  # a dense model has no method
    ],
)
def test_what_is_the_same_says_nothing(given, before):
    assert warned(given, before) == warned(before, given) == []


@pytest.mark.parametrize(
    ("given", "before", "words"),
    [
        ({"moe_top_k": 1}, {}, "--moe-top-k 2, and this launch has --moe-top-k 1"),
        ({"ffn_type": "geglu"}, {}, "--ffn-type swiglu, and this launch has --ffn-type geglu"),
        ({"moe_loss_scope": "micro-batch"}, {}, "--moe-loss-scope step, and this launch has --moe-loss-scope micro-"),
        (
            {"recipe": "switch"}, {"recipe": "mixtral"},
            "--moe-capacity-factor none, --moe-loss-weight 0.02, --moe-top-k 2, --recipe mixtral, and this launch has "
            "--moe-capacity-factor 1.25, --moe-loss-weight 0.01, --moe-top-k none, --recipe switch",
        ),
    ],
)  # fmt: skip
def test_what_differs_is_named_with_both_values(given, before, words):
    [line] = warned(given, before)
    assert line.startswith(f"warning: {SAME} {words}")


def test_what_is_for_training_alone_does_not_count_in_a_score():
    given = {"moe_capacity_factor": 4.0, "moe_loss_weight": 0.5, "moe_loss_scope": "micro-batch"}
    assert warned(given, {}, training=False) == []
    assert warned({**given, "moe_top_k": 1}, {}, training=False) == [
        f"warning: {SAME} --moe-top-k 2, and this launch has --moe-top-k 1"
    ]


def test_the_shape_counts_and_not_the_name_of_its_file(tmp_path):
    shape = {"hidden_dim": 16, "n_layers": 2, "n_heads": 2, "seq_len": 8, "vocab_size": 24, "post_embed_norm": True}
    files = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]
    for path, theta in zip(files, (10, 10, 20), strict=True):
        path.write_text(json.dumps({**shape, "weight_tying": False, "n_heads": 2 if theta == 10 else 4}))
    same, other = ({"preset": str(files[i])} for i in (1, 2))
    assert warned({"preset": str(files[0])}, same) == []
    [line] = warned({"preset": str(files[0])}, other)
    assert line == f"warning: {SAME} n_heads 4 (of --model), and this launch has n_heads 2 (of --model)"
    files[2].unlink()
    [line] = warned({"preset": str(files[0])}, other)
    assert line.startswith("warning: whether these weights are of this model is not known: ")
    assert "c.json" in line


def test_a_file_that_was_edited_or_moved_after_training_does_not_speak_for_it(tmp_path):
    path = tmp_path / "a.json"
    shape = {"hidden_dim": 16, "n_layers": 2, "seq_len": 8, "vocab_size": 24, "post_embed_norm": True}
    path.write_text(json.dumps({**shape, "weight_tying": False, "n_heads": 2, "moe_top_k": 2}))
    given = ModelSettings(preset=str(path))
    state = {**stored(**vars(with_model_keys(given))), "config": dataclasses.asdict(make_config(given))}
    assert model_warnings(given, state, training=True) == []
    path.write_text(json.dumps({**shape, "weight_tying": False, "n_heads": 4, "moe_top_k": 1}))
    [line] = model_warnings(given, state, training=False)
    now = "--moe-top-k 1, n_heads 4 (of --model)"
    assert line == f"warning: {SAME} --moe-top-k 2, n_heads 2 (of --model), and this launch has {now}"
    path.rename(tmp_path / "b.json")
    [line] = model_warnings(ModelSettings(preset=str(tmp_path / "b.json")), state, training=False)
    assert "n_heads 2 (of --model)" in line


def test_a_shape_that_is_none_is_told():
    for config in ({"n_heads": 2}, {"hidden_dims": 2}, 3):
        [line] = model_warnings(ModelSettings(), {**stored(), "config": config}, training=True)
        assert "is not known: the checkpoint's config, the shape of its model, makes none: " in line


def test_the_code_of_another_recipe_is_not_run(tmp_path):
    code = tmp_path / "theirs.py"
    code.write_text("raise SystemExit('run')")
    [line] = warned({"recipe": "mixtral"}, {"recipe": f"{code}:theirs"})
    assert line == f"warning: {SAME} --recipe {code}:theirs, and this launch has --recipe mixtral"


OWN = """
from moekit.recipes import mixtral


def own(k=3):
    return mixtral(k=k)
"""


@pytest.fixture
def own(tmp_path):
    """The path of a file with a recipe."""
    path = tmp_path / "recipe.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize(
    ("before", "given", "words"),
    [
        (None, None, "{}--recipe"),
        (None, 2, "{}--recipe"),  # what the program asks of a function with a k that nobody gave
        (2, None, "{}--recipe"),
        (None, 4, "--moe-top-k {}, --recipe"),
        (4, None, "--moe-top-k {}, --recipe"),
    ],
)
def test_a_recipe_file_that_has_moved_fills_in_what_was_left_to_it(own, before, given, words):
    was = "/no/such/folder/recipe.py:own"
    [line] = warned({"recipe": f"{own}:own", "moe_top_k": given}, {"recipe": was, "moe_top_k": before})
    named = [words.format("" if words.startswith("{") else k or 2) for k in (before, given)]
    assert line == f"warning: {SAME} {named[0]} {was}, and this launch has {named[1]} {own}:own"


def test_a_recipe_file_by_two_paths_is_one(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    assert warned({"recipe": "recipe.py:own"}, {"recipe": f"{own}:own"}) == []
    [line] = warned({"recipe": "recipe.py:own", "moe_top_k": 1}, {"recipe": f"{own}:own"})
    assert line == f"warning: {SAME} --moe-top-k 2, and this launch has --moe-top-k 1"


@pytest.mark.parametrize("training", [False, True])
def test_of_openlms_weights_the_recipe_is_known(training):
    [line] = model_warnings(ModelSettings(recipe="switch"), {"recipe": "openlm", "step": 3}, training=training)
    assert line == f"warning: {SAME} --recipe openlm, and this launch has --recipe switch"
    for same in (ModelSettings(moe_top_k=1), ModelSettings(recipe="switch", moe_freq=0)):
        assert model_warnings(same, {"recipe": "openlm"}, training=training) == []


@pytest.mark.parametrize("state", [{}, {"settings": None}, {"step": 3}])
def test_weights_of_another_program_say_nothing(state):
    assert model_warnings(ModelSettings(), state, training=True) == []
