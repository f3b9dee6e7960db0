"""A run's folder and parts, as its settings ask for them."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from rich.console import Console
from small_runs import SEQ_LEN, words

from moekit.lm import folder_locks
from moekit.lm.batches import Batching, Reading, RowFormat
from moekit.lm.folder_locks import FolderLock
from moekit.parallel import World, one_process
from moekit.recipes import runs
from moekit.recipes.configuration import parse_settings
from moekit.recipes.language_models import moe_layers
from moekit.recipes.runs import claimed, resolved, run_folder, set_up
from moekit.recipes.train import train

pytestmark = pytest.mark.usefixtures("quick")
SILENT = Console(quiet=True)
ON_CPU = World(0, 1, torch.device("cpu"))  # beside a GPU too


@pytest.fixture
def settings_of(shards, tmp_path):
    """Read the settings of a small run."""
    return lambda *flags: parse_settings(words(shards, tmp_path / "logs", *flags))


@pytest.fixture
def opened(monkeypatch):
    """What streams were opened with; none is."""
    seen = []
    monkeypatch.setattr(runs, "open_stream", lambda *given, **named: seen.append((given, named)))
    return seen


def test_the_stream_is_opened_as_the_settings_say(settings_of, opened):
    flags = "--seed 7 --data-lanes 3 --workers 2 --on-bad-data skip --data-key json --allow-pipe-commands"
    run = set_up(settings_of(*flags.split()), ON_CPU, SILENT)
    [((reading,), named)] = opened
    batching = Batching(4, RowFormat(SEQ_LEN, 512), on_bad="skip", data_key="json", allow_commands=True)
    sources = [each.shards for each in run.corpus.sources]
    assert reading == Reading(sources, batching, seed=7, weights=(0.75, 0.25), lanes=3, max_passes=None)
    assert run.corpus.weights == (0.75, 0.25)
    assert named == {"workers": 2}
    set_up(settings_of("--steps", "1", "--no-multiple-data-passes"), ON_CPU, SILENT)
    ((reading,), named) = opened[-1]
    assert (reading.max_passes, named) == (1, {"workers": 0})
    assert reading.batching == Batching(4, RowFormat(SEQ_LEN, 512), on_bad="raise", allow_commands=False)


def test_data_that_do_not_last_are_refused_before_a_model_is_made(settings_of, monkeypatch):
    monkeypatch.setattr(runs, "make_model", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match="--multiple-data-passes"):
        set_up(settings_of("--steps", "400", "--no-multiple-data-passes"), one_process(), SILENT)


def test_what_was_left_to_defaults_is_filled_in(settings_of, opened):
    settings = settings_of("--steps", "40", "--precision", "auto")
    run = set_up(settings, ON_CPU, SILENT)
    found = resolved(run)
    assert (found.optimizer.steps, found.optimizer.batch_size, found.optimizer.global_batch_size) == (40, None, 4)
    assert (found.optimizer.warmup, found.optimizer.lr_cooldown_end) == (4, 1e-2 / 50)
    assert found.optimizer.precision in ("fp32", "amp_bfloat16")
    assert found.data.workers == 0
    [recipe, *_] = [layer.recipe for _, layer in moe_layers(run.model)]
    assert (found.model.moe_top_k, found.model.moe_loss_weight) == (2, recipe.coefficients["load_balance"])
    assert resolved(run._replace(settings=found)) == found
    gpu = run._replace(world=run.world._replace(device=torch.device("cuda")))
    assert resolved(gpu).data.workers == 1
    constant = run._replace(settings=settings_of("--steps", "40", "--lr-scheduler", "const"))
    assert resolved(constant).optimizer.lr_cooldown_end is None
    tokens = set_up(settings_of("--train-num-samples", str(8 * SEQ_LEN)), one_process(), SILENT)
    assert tokens.budget.steps == 2
    assert resolved(tokens).optimizer.steps is None  # the tokens say it


def test_a_run_that_another_launch_made_meanwhile_is_refused_and_its_folder_let_go(settings_of, monkeypatch):
    """It ended between the look at the folder and the lock."""
    take = FolderLock.take

    def late(lock):
        take(lock)
        (lock.folder / "config.json").write_text("{}")

    settings = settings_of()
    with monkeypatch.context() as patched:
        patched.setattr(FolderLock, "take", late)
        with pytest.raises(FileExistsError, match="holds a run already"), claimed(settings, one_process()):
            pytest.fail("two runs in one folder")
    with FolderLock(settings.run.logs / "a", flag="--name"):
        pass


def test_a_folder_is_kept_until_the_run_is_scored_and_its_sums_are_as_deterministic_as_asked(settings_of):
    """A later launch would write its results, and this one older ones over them."""
    seen = []

    def finishing(run, console, **given):
        seen.append((torch.are_deterministic_algorithms_enabled(), run.settings.run.deterministic))
        with pytest.raises(BlockingIOError), claimed(settings_of("--resume", "latest"), one_process()):
            pytest.fail("two launches in one folder")

    for flags in (("--deterministic",), ("--resume", "latest")):
        train(settings_of("--steps", "1", *flags), SILENT, world=one_process(), finishing=finishing)
        assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [(True, True), (False, False)]
    with claimed(settings_of("--resume", "latest"), one_process()):
        pass


def test_a_folder_with_a_run_is_for_those_that_go_on_with_it(settings_of, tmp_path, monkeypatch):
    own = tmp_path / "logs" / "a"
    (own / "checkpoints" / "step_00000001").mkdir(parents=True)
    other = tmp_path / "logs" / "b" / "checkpoints" / "step_00000001"
    other.mkdir(parents=True)
    (tmp_path / "link").symlink_to(own)
    monkeypatch.chdir(tmp_path)
    for resume in ("latest", str(own), "logs/a/checkpoints/step_00000001", "link/checkpoints", "logs/b/../a"):
        assert run_folder(settings_of("--resume", resume)) == own
    for refused in ((), ("--resume", str(other)), ("--resume", "logs"), ("--resume", "logs/a/../b")):
        with pytest.raises(FileExistsError, match="holds a run already"):
            run_folder(settings_of(*refused))
    scores = settings_of("--resume", str(other))
    scores = replace(scores, data=replace(scores.data, dataset_manifest=()))
    assert run_folder(scores) == own  # nothing is trained there
    (tmp_path / "logs" / "c").mkdir()
    assert run_folder(settings_of("--name", "c")).name == "c"  # an empty one is no run


@pytest.mark.parametrize("of_a_run", ["metrics.jsonl", "checkpoints/step_00000001"])
def test_weights_in_the_folder_of_a_run_start_another_one(settings_of, tmp_path, of_a_run):
    """Its steps and scores would mix with those of the run that is there."""
    weights = tmp_path / "logs" / "a" / "checkpoints" / "epoch_1.pt"
    weights.parent.mkdir(parents=True)
    assert run_folder(settings_of("--resume", str(weights))).name == "a"  # no file: our checkpoint by OpenLM's name
    weights.touch()
    assert run_folder(settings_of("--resume", str(weights))).name == "a"  # another program's run, or none
    (tmp_path / "logs" / "a" / of_a_run).mkdir()
    with pytest.raises(FileExistsError, match="holds a run already; go on with it by --resume latest"):
        run_folder(settings_of("--resume", str(weights)))


def test_a_run_without_a_name_has_those_of_model_and_recipe(settings_of, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: f"<{form}>")
    settings = settings_of("--recipe", "some/where.py:mine")
    settings = replace(settings, run=replace(settings.run, name=None))
    settings = replace(settings, model=replace(settings.model, preset="some/shape.json"))
    assert run_folder(settings) == tmp_path / "logs" / "shape-mine-<%Y%m%d-%H%M%S>"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; expected a folder"):
        run_folder(replace(settings, run=replace(settings.run, logs=tmp_path / "file")))


def unnamed(settings, **run):
    return replace(settings, run=replace(settings.run, name=None, **run))


def test_runs_without_a_name_that_start_in_one_second_have_folders_of_their_own(settings_of, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "now")
    monkeypatch.setattr(runs.time, "sleep", lambda _: pytest.fail("it waited"))
    settings, scores = unnamed(settings_of()), unnamed(settings_of("--resume", "x"))
    scores = replace(scores, data=replace(scores.data, dataset_manifest=()))
    assert scores.evaluates_only
    with claimed(settings, one_process()) as first, claimed(settings, one_process()) as second:
        (second / "config.json").write_text("{}")
        with claimed(settings, one_process()) as third:
            names = [each.name for each in (first, second, third)]
            assert names == [f"{first.name}{end}" for end in ("", "-2", "-3")]
            (first / "config.json").write_text("{}")
    assert run_folder(settings) == run_folder(scores) == third
    third.touch()
    with claimed(settings, one_process()) as folder:
        assert folder.name == f"{first.name}-4"


def test_a_run_without_a_name_gives_way_to_one_that_was_done_meanwhile(settings_of, monkeypatch):
    """It began and ended between the look at the folder and the lock."""
    take = FolderLock.take

    def late(lock):
        monkeypatch.setattr(FolderLock, "take", take)
        take(lock)
        (lock.folder / "config.json").write_text("{}")

    monkeypatch.setattr(runs.time, "strftime", lambda form: "now")
    monkeypatch.setattr(FolderLock, "take", late)
    with claimed(unnamed(settings_of()), one_process()) as folder:
        assert folder.name.endswith("-now-2")
    with FolderLock(folder.with_name(folder.name.removesuffix("-2")), flag="--name"):
        pass


def test_a_place_where_no_run_can_have_a_folder_is_not_tried_for_ever(settings_of, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_locks, "PATIENCE", 0)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    settings = unnamed(settings_of(), logs=tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"nowhere\S+ cannot be made or cleared"), claimed(settings, one_process()):
        pytest.fail("there is no such place")


@pytest.mark.distributed
def test_all_ranks_of_a_run_without_a_name_have_one_folder(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # there may be one card for both
    first, other = run_ranks("launches:claim_unnamed", 2, words(shards, tmp_path / "logs"), limit=30)
    assert first == other
    assert [name.rpartition("now")[2] for name in first] == ["0", "0-2"]
