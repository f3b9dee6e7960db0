import json
import math
import re
import shlex

import pytest
import torch
from small_runs import differing, losses, markov_sequences, numbers, tensors_of

from moekit.lm.checkpoints import checkpoint_folder, latest_checkpoint, read_state
from moekit.lm.shards import write_shards
from moekit.lm.trackers import read_metrics
from moekit.recipes import loop, train
from moekit.recipes.train import main

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def spoil(monkeypatch):
    """Make the gradient or the loss of one step not finite, once; all later uses find the step as it is."""

    def spoil(step, what, value=math.nan):
        take = loop.train_step

        def spoiled(run, batch, **options):
            if options["step"] != step - 1 or what not in pending:
                return take(run, batch, **options)
            pending.remove(what)
            hook = hooks[what](run.model, value)
            result = take(run, batch, **options)
            hook.remove()
            return result

        pending = [what]
        monkeypatch.setattr(loop, "train_step", spoiled)

    hooks = {
        "gradient": lambda model, value: model.norm.weight.register_hook(lambda gradient: gradient * value),
        "loss": lambda model, value: model.output.register_forward_hook(lambda *arguments: arguments[2] * value),
    }
    return spoil


@pytest.mark.parametrize(("what", "value"), [("gradient", math.nan), ("gradient", math.inf), ("loss", math.inf)])
def test_a_step_that_is_not_finite_stops_the_run_with_the_state_before_it(program, spoil, tmp_path, what, value):
    flags = ["--recipe", "gshard", "--log-every-n-steps", "3"]  # step 5 is not reported
    spoil(5, what, value)
    with pytest.raises(SystemExit) as stopped:
        program(*flags, name="a")
    folder = tmp_path / "logs" / "a"
    message = str(stopped.value)
    assert message.startswith("train_moe.py: the loss or its gradient is not finite at step 5. Nothing was updated")
    assert "step_00000004 has the state before" in message
    assert "Lower --lr, lengthen --warmup" in message
    assert latest_checkpoint(folder) == checkpoint_folder(folder, 4)
    assert [line["step"] for line in numbers(folder)] == [3]

    # Weights, moments, position and random numbers are those of a run that never saw step 5.
    unbroken = program(*flags, "--save-every-n-steps", "4", name="b")
    assert differing(*(tensors_of(checkpoint_folder(run, 4)) for run in (folder, unbroken))) == []
    states = [read_state(checkpoint_folder(run, 4)) for run in (folder, unbroken)]
    assert states[0]["stream"] == states[1]["stream"]
    assert states[0]["skipped_steps"] == 0

    words = shlex.split(message.splitlines()[-1])
    assert words[-4:] == ["--resume", "latest", "--on-nonfinite", "skip"]
    main(words[2:])  # what it told the user to do; this time the step is finite
    assert differing(*(tensors_of(checkpoint_folder(run, 8)) for run in (folder, unbroken))) == []
    assert numbers(folder) == numbers(unbroken)


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.parametrize("recipe", ["openlm", "deepseek_moe"])
def test_a_step_that_is_not_finite_can_be_left_out(program, spoil, capsys, what, recipe):
    flags = ["--on-nonfinite", "skip", "--save-every-n-steps", "1", "--recipe", recipe]
    spoil(3, what)
    folder = program(*flags)
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "the loss or its gradient is not finite at step 3: left out (--on-nonfinite skip)" in said
    before, after = (tensors_of(checkpoint_folder(folder, step)) for step in (2, 3))
    assert all(name.startswith("rng") for name in differing(before, after)), "the step changed nothing else"
    assert differing(after, tensors_of(checkpoint_folder(folder, 4))) != []
    assert [line["skipped_steps"] for line in numbers(folder)] == [0, 0, 1, 1, 1, 1, 1, 1]
    results = json.loads((folder / "results.json").read_text())
    assert (results["tokens"], results["trained_tokens"]) == (8 * 256, 7 * 256)
    assert f"{8 * 256:,} tokens by its steps, {7 * 256:,} of them trained on" in said
    assert [read_state(checkpoint_folder(folder, step))["skipped_steps"] for step in (2, 3, 8)] == [0, 1, 1]
    assert all(math.isfinite(loss) for loss in losses(numbers(folder)) if loss is not None)


def test_the_step_after_one_that_was_left_out_has_the_next_data(program, spoil, tmp_path):
    spoil(3, "gradient")
    skipping = program("--on-nonfinite", "skip", "--log-data")
    straight = program("--log-data", name="b")
    assert (skipping / "data.jsonl").read_bytes() == (straight / "data.jsonl").read_bytes()
    # A loss that is read before the update is the same in step 3, and another from step 4 on.
    pairs = list(zip(losses(numbers(skipping)), losses(numbers(straight)), strict=True))
    assert [left == right for left, right in pairs[:4]] == [True, True, True, False]


def test_counts_of_left_out_steps_go_on_over_a_resume(program, spoil, interrupt_after):
    spoil(3, "gradient")
    interrupt_after(5)
    folder = program("--on-nonfinite", "skip")
    program("--on-nonfinite", "skip", "--resume", "latest")
    assert [line["skipped_steps"] for line in numbers(folder)] == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_a_step_without_a_token_to_train_on_is_left_out(quick, tmp_path, capsys, precision):
    """All its data are padding, or one token each that nothing follows; decay and momentum would move parameters."""
    rows = markov_sequences(6, first=0, seed=1)
    rows[2:4, 1:] = -1
    manifest = write_shards(tmp_path / "train", rows, sequences_per_shard=6)
    held_out = write_shards(tmp_path / "val", rows[:1])
    flags = ["--dataset-manifest", str(manifest), "--val-manifest", str(held_out), "--steps", "6", "--batch-size", "1"]
    flags += ["--data-lanes", "1", "--recipe", "deepseek_moe", "--wd", "0.5", "--log-every-n-steps", "1"]
    flags += ["--save-every-n-steps", "1", "--model", "moekit_tiny", "--precision", precision, "--workers", "0"]
    main([*flags, "--logs", str(tmp_path / "logs"), "--name", "a"])
    folder = tmp_path / "logs" / "a"
    lines = read_metrics(folder / "metrics.jsonl")
    empty = [line["step"] for line in lines if not line["step_tokens"]]
    assert len(empty) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for step in empty:
        assert f"step {step} has no token to train on, all of its data are bad or padding: left out" in said
        if step > 1:
            before, after = (tensors_of(checkpoint_folder(folder, each)) for each in (step - 1, step))
            assert all(name.startswith("rng") for name in differing(before, after)), "the step changed nothing else"
            assert len({str(read_state(checkpoint_folder(folder, each))["scaler"]) for each in (step - 1, step)}) == 1
    assert max(empty) > 1
    assert [line["loss"] is None for line in lines] == [line["step"] in empty for line in lines]
    assert [line["skipped_steps"] for line in lines] == [sum(step <= line["step"] for step in empty) for line in lines]
    assert json.loads((folder / "results.json").read_text())["trained_tokens"] == 4 * 64


def test_the_last_step_is_recorded_where_its_validation_fails(program, monkeypatch, tmp_path):
    def failing(*arguments, **options):
        raise FloatingPointError("the validation loss is nan")

    monkeypatch.setattr(loop, "score_sets", failing)
    with pytest.raises(SystemExit, match="the validation loss is nan"):
        program("--steps", "3")
    assert [line["step"] for line in numbers(tmp_path / "logs" / "a")] == [1, 2, 3]


def test_infinite_weights_stop_the_run_at_the_first_step(program, tmp_path, monkeypatch):
    make = train.set_up

    def spoiled(*arguments, **options):
        run = make(*arguments, **options)
        with torch.no_grad():
            run.model.output.weight[0, 0] = math.inf
        return run

    monkeypatch.setattr(train, "set_up", spoiled)
    with pytest.raises(SystemExit, match=r"not finite at step 1\. .*step_00000000 has the state before"):
        program()
    assert read_state(checkpoint_folder(tmp_path / "logs" / "a", 0))["step"] == 0


REMEMBERING = """
import torch
from moekit.recipes import mixtral
from moekit.routing import observe_load, top_k
from moekit.types import RouterState

def route(logits, *, memory, bias=None):
    return top_k(logits, k=2, bias=memory.nan_to_num()[0])

def recipe(update, first=0.0):
    init = lambda experts, *, device=None: torch.full((2, experts), first, device=device)
    state = RouterState("memory", init, observe_load, update)
    return mixtral()._replace(route=route, needs=("memory",), state=state)

lost = lambda: recipe(lambda state, sums: state * float("nan"))
later = lambda: recipe(lambda state, sums: torch.where(state < 2, state + 1, float("nan")))
grown = lambda: recipe(lambda state, sums: state + float("inf"))
masked = lambda: recipe(lambda state, sums: state * float("nan"), first=float("-inf"))
unset = lambda: recipe(lambda state, sums: state, first=float("nan"))
"""


@pytest.mark.parametrize(
    ("recipe", "step", "flags"),
    [
        ("lost", 1, ()),
        ("lost", 1, ("--steps", "1")),
        ("lost", 1, ("--save-every-n-steps", "1", "--on-nonfinite", "skip")),
        ("later", 3, ("--save-every-n-steps", "2")),
        ("grown", 1, ()),
        ("masked", 1, ()),
    ],
)
def test_a_state_that_becomes_nan_or_infinite_stops_the_run_and_is_not_saved(program, tmp_path, recipe, step, flags):
    (tmp_path / "mine.py").write_text(REMEMBERING)
    word = "infinity" if recipe == "grown" else "NaN"
    message = (
        rf"the state 'memory' of block 0 holds {word} after step {step}: its update made it so\. No checkpoint has it"
    )
    with pytest.raises(SystemExit, match=message):
        program("--recipe", f"{tmp_path}/mine.py:{recipe}", *flags)
    folder = tmp_path / "logs" / "a"
    assert latest_checkpoint(folder) == (checkpoint_folder(folder, 2) if recipe == "later" else None)


def test_a_state_that_begins_as_nan_may_stay_so(program, tmp_path):
    (tmp_path / "mine.py").write_text(REMEMBERING)
    folder = program("--recipe", f"{tmp_path}/mine.py:unset", "--steps", "2")
    assert latest_checkpoint(folder) == checkpoint_folder(folder, 2)


@pytest.mark.parametrize("recipe", ["openlm", "deepseek_moe"])
def test_accumulation_changes_the_losses_by_rounding_alone(program, recipe):
    flags = ["--recipe", recipe, "--moe-capacity-factor", "0"] if recipe == "openlm" else ["--recipe", recipe]
    whole = numbers(program(*flags, name="a"))
    for parts in (2, 4):
        found = numbers(program(*flags, "--accum-freq", str(parts), name=f"b{parts}"))
        for left, right in zip(whole, found, strict=True):
            for name in ("loss", "grad_norm", *(name for name in left if name.startswith("loss/"))):
                assert left[name] == pytest.approx(right[name], rel=2e-4), (parts, name)


def test_the_balancing_of_micro_batches_is_another_loss(program):
    flags = ["--accum-freq", "4", "--moe-loss-weight", "0.5", "--moe-capacity-factor", "0"]
    step = numbers(program(*flags, name="a"))
    micro = numbers(program(*flags, "--moe-loss-scope", "micro-batch", name="b"))
    assert micro[0]["loss"] == pytest.approx(step[0]["loss"], rel=1e-6)
    assert micro[0]["loss/load_balance"] > step[0]["loss/load_balance"] + 1e-3


def test_gradient_checkpointing_changes_no_loss(program, capsys):
    flags = ["--recipe", "gshard"]  # its draws must be the same in the second forward
    plain = numbers(program(*flags, name="a"))
    assert numbers(program(*flags, "--grad-checkpointing", name="b")) == plain
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert said.count("with --recipe gshard a token's output depends on later tokens") == 2, "every run says so"


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(program, monkeypatch):
    def compile_quickly(function):  # writing and building C++ would take minutes; test_compile.py does so for a layer
        names.append(function.__name__)
        return compile_function(function, backend="aot_eager")

    names, compile_function = [], torch.compile
    monkeypatch.setattr(torch, "compile", compile_quickly)
    flags = ["--steps", "3", "--moe-freq", "1", "--val-num-samples", "256"]  # a part of a batch compiles again
    plain, compiled = program(*flags, name="a"), program(*flags, "--torchcompile", name="b")
    assert losses(numbers(compiled)) == pytest.approx(losses(numbers(plain)), rel=1e-4)
    assert names == ["_call_impl", "run_forward"]  # the model, for scores, and with its loss, for steps
    names = [set(tensors_of(checkpoint_folder(run, 3))) for run in (plain, compiled)]
    assert names[0] == names[1], "a checkpoint does not show that the model was compiled"


def test_the_z_loss_is_reported_and_changes_the_gradient(program):
    plain, with_z = (
        numbers(program("--z-loss-coefficient", z, "--log-logit-mean", "--steps", "2", name=f"z{z}"))
        for z in ("0", "0.1")
    )
    assert "z_loss" not in plain[0]
    assert with_z[0]["z_loss"] == pytest.approx(math.log(512) ** 2, rel=0.2)
    assert with_z[0]["loss"] == plain[0]["loss"]
    assert with_z[0]["grad_norm"] != plain[0]["grad_norm"]
    assert abs(plain[0]["logit_mean"]) < 1.0


def test_an_fp16_run_scales_its_loss(program):
    folder = program("--precision", "amp", "--steps", "3", "--save-every-n-steps", "1")
    scales = [line["loss_scale"] for line in numbers(folder)]
    assert all(scale >= 1.0 for scale in scales)
    assert read_state(checkpoint_folder(folder, 2))["scaler"]["scale"] == scales[1]
    full = numbers(program("--steps", "3", name="b"))
    assert numbers(folder)[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-2)


@pytest.mark.parametrize("precision", ["amp_bfloat16", "bf16"])
def test_a_bf16_run_learns(program, precision):
    folder = program("--precision", precision, "--steps", "12")
    found = losses(numbers(folder))
    assert found[-1] < found[0] - 0.5
    dtype = tensors_of(checkpoint_folder(folder, 12))["model.output.weight"].dtype
    assert dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
