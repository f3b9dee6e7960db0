import errno
import json
import math
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from moekit.lm import checkpoint_folders
from moekit.lm.checkpoint_checksums import changed_file, file_checksums, read_checksums, write_checksums
from moekit.lm.checkpoints import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    stored_shapes,
    training_tensors,
)

TENSORS = {
    "float": torch.randn(3, 5),
    "half": torch.randn(4).bfloat16(),
    "double": torch.randn(2, dtype=torch.float64),
    "count": torch.tensor(7),
    "bytes": torch.arange(6, dtype=torch.uint8),
    "mask": torch.tensor([True, False]),
    "strided": torch.randn(4, 6).T,
    "empty": torch.zeros(0, 3),
}
STATE = {"step": 12, "text": "ä", "nested": {"list": [1, 2.5, None, True]}}


def blank(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forge_checksums(folder):
    """Make the checksums those of the files as they are, as whoever wrote them on purpose would."""
    write_checksums(folder, file_checksums(folder))


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "checkpoints" / "step_00000012", TENSORS, STATE)


def test_everything_comes_back_bit_for_bit_into_the_same_tensors(saved):
    tensors = blank(TENSORS)
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    assert load_checkpoint(saved, tensors) == STATE
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].data_ptr() == places[name]


def test_a_part_can_be_loaded(saved):
    part = {"count": torch.tensor(0)}
    load_checkpoint(saved, part)
    assert part["count"] == 7


def test_state_is_readable_text_beside_the_tensors(saved):
    assert json.loads((saved / "state.json").read_text(encoding="utf-8")) == STATE
    assert read_state(saved) == STATE
    assert sorted(path.name for path in saved.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "checksums.json",
        "state.json",
    ]
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_state_that_json_cannot_hold_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "step_00000001", TENSORS, {"tensor": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_no_warning_leaves_and_no_filter_stays(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        folder = save_checkpoint(tmp_path / "step_00000001", TENSORS, STATE)
        load_checkpoint(folder, blank(TENSORS))
        assert warnings.filters == before
    assert caught == []


@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_dies_leaves_the_old_checkpoint(tmp_path, monkeypatch, existing):
    run = tmp_path / "run"
    old = save_checkpoint(checkpoint_folder(run, 5), TENSORS, STATE)
    place = old if existing else checkpoint_folder(run, 6)
    before = files(old)

    def die(tensors, *, checkpoint_id, **options):
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(place, blank(TENSORS), {"step": 6})
    assert files(old) == before
    assert latest_checkpoint(run) == old
    assert names_in(run) == [old.name], "nothing half is left"
    monkeypatch.undo()
    again = save_checkpoint(place, blank(TENSORS), {"step": 6})
    assert read_state(again) == {"step": 6}
    names = sorted(path.name for path in again.parent.iterdir())
    assert names == sorted({old.name, again.name})


@pytest.mark.parametrize("full", ["__0_0.distcp", "state.json", "checksums.json", "step_00000006"])
def test_a_full_disk_leaves_nothing_half_and_names_the_checkpoint(tmp_path, monkeypatch, full):
    old = save_checkpoint(checkpoint_folder(tmp_path, 5), TENSORS, STATE)
    replace = os.replace

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def replace_unless_full(source, target):
        return fail() if os.path.basename(target) == full else replace(source, target)

    monkeypatch.setattr(os, "replace", replace_unless_full)
    if full == "__0_0.distcp":
        monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*step_00000006: OSError: .*No space.*disk full\?"):
        save_checkpoint(checkpoint_folder(tmp_path, 6), TENSORS, STATE)
    assert names_in(tmp_path) == [old.name]
    assert load_checkpoint(old, blank(TENSORS)) == STATE


def test_an_old_checkpoint_is_replaced_as_a_whole(saved):
    (saved / "leftover").write_text("of the old one")
    save_checkpoint(saved, {"other": torch.ones(2)}, {"step": 13})
    assert not (saved / "leftover").exists()
    tensors = {"other": torch.zeros(2)}
    assert load_checkpoint(saved, tensors) == {"step": 13}
    assert tensors["other"].tolist() == [1, 1]
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_missing_or_unfinished_checkpoint_is_explained(saved, tmp_path):
    message = r"there is no checkpoint at .*expected a folder step_NNNNNNNN with state\.json.*it means the newest in it"
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(tmp_path / "absent", {})
    (saved / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_checkpoint(saved, {})


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [("float", (5, 3), r"shape \(3, 5\)"), ("count", (1,), r"shape \(\)"), ("absent", (2,), "no such tensor")],
)
def test_another_shape_or_a_missing_tensor_is_named(saved, name, shape, found):
    tensors = {"half": torch.zeros(4).bfloat16(), name: torch.zeros(shape)}
    written = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    with pytest.raises(ValueError, match=rf"expected {name} of shape \({written}\), found {found}.*model flags"):
        load_checkpoint(saved, tensors)
    assert not tensors["half"].any(), "nothing is loaded before all shapes are checked"


class _Attack:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("hide", [False, True])
def test_a_strangers_checkpoint_runs_no_code(saved, tmp_path, hide):
    marker = tmp_path / "marker"
    attack = pickle.dumps(_Attack(open, str(marker), "w"), protocol=4)
    if hide:  # behind a module whose classes an index does name: metadata.os.mkdir
        attack = pickle.dumps(_Attack(dcp.metadata.Metadata, str(marker)), protocol=4)
        name = b"os.mkdir"
        attack = attack.replace(b"\x8c\x08Metadata", b"\x8c" + bytes([len(name)]) + name)
    (saved / ".metadata").write_bytes(attack)
    forge_checksums(saved)
    with pytest.raises(ValueError, match=r"asks for .*, which no index of tensors has.*could run code"):
        load_checkpoint(saved, blank(TENSORS))
    assert not marker.exists()


_CHANGES = (  # what is there for the whole process, on which an index would set ``touched``
    b"\x8c\x07pathlib\x8c\x09PosixPath\x93",
    b"\x8c\x13torch.serialization\x8c\x0b_get_layout\x93",
    b"\x8c%torch.distributed.checkpoint.metadata\x8c\x14_MEM_FORMAT_ENCODING\x93K\x01\x85R",
)


@pytest.mark.parametrize("target", _CHANGES)
def test_a_strangers_checkpoint_changes_no_class_or_function(saved, target):
    (saved / ".metadata").write_bytes(b"\x80\x04" + target + b"N}\x8c\x07touchedK\x01s\x86b.")
    forge_checksums(saved)
    with pytest.raises(ValueError, match=r"sets attributes of <.*could change the program"):
        load_checkpoint(saved, blank(TENSORS))
    there = pathlib.PosixPath, torch.serialization._get_layout, dcp.metadata._MEM_FORMAT_ENCODING(1)
    assert not any(hasattr(each, "touched") for each in there)


def test_the_attack_of_the_test_above_works_on_a_plain_unpickler(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(_Attack(open, str(marker), "w"))).close()
    assert marker.exists()


def test_folders_sort_by_step(tmp_path):
    names = [checkpoint_folder(tmp_path, step).name for step in (7, 40, 100, 12_345_678)]
    assert names == sorted(names)
    assert checkpoint_folder(tmp_path, 7) == tmp_path / "checkpoints" / "step_00000007"


def test_the_latest_is_the_newest_whole_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    folders = [save_checkpoint(checkpoint_folder(tmp_path, step), {"w": torch.ones(1)}, {}) for step in (20, 100, 3)]
    assert latest_checkpoint(tmp_path) == folders[1]
    shutil.copytree(folders[0], folders[1].with_name("step_00000999_of_before"))  # put aside under another name
    broken = checkpoint_folder(tmp_path, 101)
    broken.mkdir()
    (broken / ".metadata").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"skipping .*step_00000101: it has no state\.json, .*not written to its end"):
        assert latest_checkpoint(tmp_path) == folders[1]


def refusal(folder, tensors):
    """Load a checkpoint whose state is STATE; return the message if it is refused."""
    try:
        assert load_checkpoint(folder, tensors) == STATE
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "checksums.json"])
def test_no_damage_is_read_as_something_else(saved, name):
    path, rng = saved / name, random.Random(name)
    whole = path.read_bytes()
    flips = [(rng.randrange(len(whole)), 1 << rng.randrange(8)) for _ in range(60)]
    cuts = [0, 1, len(whole) // 2, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(10))]
    damaged = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at, bit in flips]
    damaged += [whole[:cut] for cut in cuts]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        tensors = blank(TENSORS)
        message = refusal(saved, tensors)
        if message is None:
            assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
            continue
        refused += 1
        assert f"checkpoint {saved} is damaged: " in message
        assert not any(tensor.count_nonzero() for tensor in tensors.values()), "nothing of it was loaded"
    # One cut takes the line's end off the checksums, and a bit may turn a space there into a comma or a line's end.
    assert refused >= len(damaged) * (0.8 if name == "checksums.json" else 1)
    path.unlink()
    kind, message = {
        "state.json": (FileNotFoundError, "no checkpoint at"),
        "checksums.json": (
            ValueError,
            r"it has no checksums\.json: it is of a version of moekit before .*, or the file was lost\. Load it with",
        ),
    }.get(name, (ValueError, "is missing"))
    with pytest.raises(kind, match=message):
        load_checkpoint(saved, blank(TENSORS))


def test_damaged_tensors_are_refused_even_with_fitting_checksums(saved):
    path = saved / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    forge_checksums(saved)
    with pytest.raises(ValueError, match=r"is damaged: Unpick.*something else than tensors\. Resume from an older"):
        load_checkpoint(saved, blank(TENSORS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"\.metadata: EOFError"),
        (b"no pickle", r"\.metadata is no pickle"),
        (pickle.dumps([1]), r"\.metadata holds a list"),
        (pickle.dumps(Metadata([1])), r"\.metadata: state_dict_metadata is no mapping of names"),
        (pickle.dumps(Metadata({1: [1]})), r"\.metadata: state_dict_metadata is no mapping of names"),
        (pickle.dumps(Metadata({}, storage_data=[1])), r"\.metadata: storage_data is a list, no mapping"),
        (pickle.dumps(Metadata({}, storage_data={1: 2})), r"storage_data holds 2; expected a piece of a file"),
        (pickle.dumps(Metadata({}, storage_data={1: _StorageInfo("a/../../b", 0, 1)})), r"'a/\.\./\.\./b', .* not in"),
        (pickle.dumps(Metadata({}, storage_data={1: _StorageInfo("/dev/zero", 0, 1)})), "the file '/dev/zero', .* not"),
        (pickle.dumps(Metadata({"float": [1]})), "expected float .*found no such tensor"),
    ],
)
def test_an_index_that_is_none_is_refused_even_with_fitting_checksums(saved, content, message):
    (saved / ".metadata").write_bytes(content)
    forge_checksums(saved)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved, {"float": torch.zeros(3, 5)})
    if "expected float" not in message:
        with pytest.warns(UserWarning, match=message):
            assert latest_checkpoint(saved.parents[1]) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", r"state\.json is no JSON"), (b"[]", r"state\.json holds a list, no object"), (b"\xff", "is no JSON")],
)
def test_a_state_that_is_none_is_refused_even_with_fitting_checksums(saved, content, message):
    (saved / "state.json").write_bytes(content)
    forge_checksums(saved)
    with pytest.raises(ValueError, match=message):
        read_state(saved)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(saved, blank(TENSORS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"checksums\.json is no JSON"),
        ("[1]", "holds no checksums"),
        ('{"a": 1}', "holds no checksums"),
        ("{}", r"its checksums leave out \.metadata"),
    ],
)
def test_checksums_that_are_none_are_refused(saved, content, message):
    (saved / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{message}.*Resume from an older one"):
        load_checkpoint(saved, blank(TENSORS))


def test_checksums_are_those_of_the_files(saved):
    checksums = read_checksums(saved)
    assert sorted(checksums) == [".metadata", "__0_0.distcp", "state.json"]
    assert changed_file(saved, checksums) is None
    (saved / "state.json").write_text("123456789")
    assert changed_file(saved, checksums) == (
        f"its file state.json has the checksum cbf43926, but was written with {checksums['state.json']}"
    )


def test_parameters_that_the_model_has_no_place_for_are_named(tmp_path):
    tensors = {"model.a": torch.ones(1), "model.b": torch.ones(2), "optimizer.step.b": torch.ones(1)}
    folder = save_checkpoint(tmp_path / "step_00000001", tensors, {})
    part = {"model.a": torch.zeros(1)}
    with pytest.raises(
        ValueError, match=r"holds model\.b, which the model has no place for\. Start with the model flags"
    ):
        load_checkpoint(folder, part)
    named = save_checkpoint(tmp_path / "step_00000002", tensors, {"settings": {"recipe": "mixtral"}})
    with pytest.raises(
        ValueError, match=r"that the checkpoint was trained with, --recipe mixtral among them; they are"
    ):
        load_checkpoint(named, part)
    assert part["model.a"] == 0
    load_checkpoint(folder, part | {"model.b": torch.zeros(2)})  # the optimizer's state may stay
    assert part["model.a"] == 1


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_what_is_one_tensor_must_be_one_in_the_checkpoint(tmp_path, value):
    folder = save_checkpoint(tmp_path / "step_00000001", {"a": torch.tensor([value]), "b": torch.tensor([value])}, {})
    one = torch.zeros(1)
    load_checkpoint(folder, {"a": one, "b": one.detach()})
    assert one.item() == pytest.approx(value, nan_ok=True)
    folder = save_checkpoint(tmp_path / "step_00000002", {"a": torch.tensor([value]), "b": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"step_00000002: the model ties a and b, but in the checkpoint they differ"):
        load_checkpoint(folder, {"a": one, "b": one.detach()})


def test_shapes_are_listed_without_reading_tensors(saved):
    (saved / "__0_0.distcp").unlink()
    assert stored_shapes(saved) == {name: tensor.shape for name, tensor in TENSORS.items()}


@pytest.fixture
def three(tmp_path):
    """The checkpoints of steps 3, 20 and 100."""
    return [save_checkpoint(checkpoint_folder(tmp_path, step), {"w": torch.ones(1)}, {}) for step in (3, 20, 100)]


def names_in(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_old_checkpoints_are_pruned(three, tmp_path):
    put_aside = shutil.copytree(three[0], three[0].with_name("step_00000003_best"))
    prune_checkpoints(tmp_path, keep=3, step=100)
    assert all(folder.exists() for folder in three)
    prune_checkpoints(tmp_path, keep=2, step=100)
    assert names_in(tmp_path) == [put_aside.name, "step_00000020", "step_00000100"]
    prune_checkpoints(tmp_path, keep=1, step=100)
    assert names_in(tmp_path) == [put_aside.name, "step_00000100"]


def test_pruning_counts_whole_checkpoints_only_and_spares_later_ones(three, tmp_path):
    (three[2] / "state.json").unlink()
    prune_checkpoints(tmp_path, keep=1, step=100)
    assert names_in(tmp_path) == ["step_00000020", "step_00000100"], "the broken one does not count as kept"
    later = save_checkpoint(checkpoint_folder(tmp_path, 200), {"w": torch.ones(1)}, {})
    save_checkpoint(checkpoint_folder(tmp_path, 30), {"w": torch.ones(1)}, {})  # of a run that went back to step 20
    prune_checkpoints(tmp_path, keep=1, step=30)
    assert names_in(tmp_path) == ["step_00000030", "step_00000100", later.name]


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("state.json", b'{"step": 9}', r"its file state\.json has the checksum"),
        (".metadata", b"", r"its file \.metadata has the checksum"),
        ("__0_0.distcp", b"", r"its file __0_0\.distcp is missing or cut short"),
        ("checksums.json", b"", r"checksums\.json is no JSON"),
    ],
)
def test_a_damaged_checkpoint_is_not_the_latest(three, tmp_path, file, damage, message):
    (three[2] / file).write_bytes(damage)
    with pytest.warns(UserWarning, match=rf"skipping .*step_00000100: .*{message}"):
        assert latest_checkpoint(tmp_path) == three[1]


def test_a_checkpoint_from_before_checksums_is_not_called_damaged(three, tmp_path):
    (three[2] / "checksums.json").unlink()
    with pytest.warns(UserWarning, match=r"step_00000100: it has no checksums\.json: .* before .*the file was lost$"):
        assert latest_checkpoint(tmp_path) == three[1]


KILLED = """
import json, os, shutil, signal, sys
import torch
from moekit.lm.checkpoints import checkpoint_folder, prune_checkpoints, save_checkpoint


def save_killed_at(run, name, calls):
    module = {"replace": os, "rmtree": shutil}[name]
    function = getattr(module, name)

    def counted(*arguments, **options):
        nonlocal calls
        if os.path.exists(arguments[0]):
            calls -= 1
            if not calls:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(module, name, counted)
    save_checkpoint(checkpoint_folder(run, 7), {"w": torch.full((2,), 2.0)}, {"new": True})
    prune_checkpoints(run, keep=1, step=7)


save_checkpoint(checkpoint_folder(sys.argv[2], 1), {"w": torch.ones(2)}, {})  # so that the children import nothing
endings = []
for moment in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        save_killed_at(*moment)
        os._exit(0)
    endings.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(endings)
"""


def moments(replaces_one):
    """List the calls that a save and a pruning make: the process is killed before the n-th."""
    # Renames: state.json, checksums.json, (old away), new in place, (old removed), pruned one removed.
    renames, removals = (6, 2) if replaces_one else (4, 1)
    return [*(("replace", n + 1) for n in range(renames)), *(("rmtree", n + 1) for n in range(removals))]


def test_a_process_killed_between_writing_and_renaming_loses_nothing(tmp_path):
    runs = {tmp_path / f"{kind}-{name}{n}": (name, n) for kind in (True, False) for name, n in moments(kind)}
    for run in runs:
        save_checkpoint(checkpoint_folder(run, 5), {"w": torch.full((2,), 0.0)}, {"new": False})
        if run.name.startswith("True"):
            save_checkpoint(checkpoint_folder(run, 7), {"w": torch.full((2,), 1.0)}, {"new": False})
    arguments = json.dumps([(str(run), *moment) for run, moment in runs.items()])
    words = [sys.executable, "-c", KILLED, arguments, str(tmp_path / "first")]
    plain = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # a forked process cannot ask for devices
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=plain)
    assert json.loads(done.stdout) == [-9] * len(runs), done.stderr
    seen = set()
    for run in runs:
        latest = latest_checkpoint(run)  # no warning: what is half done has no name of its own
        assert latest is not None
        tensors = {"w": torch.zeros(2)}
        new = load_checkpoint(latest, tensors)["new"]
        older = 1.0 if run.name.startswith("True") else 0.0
        assert tensors["w"].tolist() == [2.0 if new else older] * 2
        seen.add((run.name.partition("-")[0], latest.name, new))
        again = save_checkpoint(checkpoint_folder(run, 7), {"w": torch.full((2,), 3.0)}, {})
        prune_checkpoints(run, keep=1, step=7)
        assert latest_checkpoint(run) == again
        assert names_in(run) == ["step_00000007"], "nothing is left over"
    assert seen == {
        ("True", "step_00000007", False),
        ("True", ".step_00000007.replaced", False),
        ("True", "step_00000007", True),
        ("False", "step_00000005", False),
        ("False", "step_00000007", True),
    }


def test_the_one_moved_away_is_forgotten_once_its_successor_is_there(three, tmp_path):
    checkpoint_folders.put_in_place(shutil.copytree(three[2], tmp_path / "new"), three[2])
    assert names_in(tmp_path) == ["step_00000003", "step_00000020", "step_00000100"]
    shutil.copytree(three[1], three[2].with_name(".step_00000100.replaced"))
    assert latest_checkpoint(tmp_path) == three[2]


@pytest.mark.parametrize("replaces_one", [True, False])
def test_the_new_one_is_on_the_disk_before_anything_older_is_removed(tmp_path, monkeypatch, replaces_one):
    save_checkpoint(checkpoint_folder(tmp_path, 5), TENSORS, STATE)
    if replaces_one:
        save_checkpoint(checkpoint_folder(tmp_path, 7), TENSORS, STATE)
    happened, replace, remove = [], os.replace, shutil.rmtree

    def note(kind, action):
        def done(first, *others, **options):
            happened.append((kind, os.path.basename(others[0] if kind == "moved" else first)))
            return action(first, *others, **options)

        return done

    def sync_folder(folder):
        happened.append(("synced", folder.name))

    monkeypatch.setattr(checkpoint_folders, "sync_folder", sync_folder)
    monkeypatch.setattr(checkpoint_folders.os, "replace", note("moved", replace))
    monkeypatch.setattr(checkpoint_folders.shutil, "rmtree", note("removed", remove))
    save_checkpoint(checkpoint_folder(tmp_path, 7), TENSORS, STATE)
    prune_checkpoints(tmp_path, keep=1, step=7)
    named = happened.index(("moved", "step_00000007"))
    assert happened[named - 1] == ("synced", ".step_00000007.unfinished"), "the names of its files"
    assert happened[named + 1] == ("synced", "checkpoints"), "its own name"
    gone = [place for place, event in enumerate(happened) if event[1].endswith(".removed")]
    assert min(gone) > named + 1


def make_training(seed, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, **options)


def train(model, optimizer, *, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 4, generator=generator)).square().sum().backward()
        optimizer.step()


def test_another_optimizer_is_refused_in_words():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="the optimizer is SGD; expected Adam or AdamW, whose state"):
        training_tensors(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}, {"amsgrad": True}], ids=str)
def test_training_goes_on_exactly_from_its_tensors(tmp_path, options):
    first, second = make_training(0, **options), make_training(1, **options)
    train(*first, steps=3)
    folder = save_checkpoint(tmp_path / "step_00000003", training_tensors(*first), {})
    load_checkpoint(folder, training_tensors(*second))
    for training in (first, second):
        train(*training, steps=2)
    expected, found = training_tensors(*first), training_tensors(*second)
    assert list(expected) == list(found)
    assert "model.1.running_mean" in expected
    assert expected["optimizer.step.0.weight"] == 5
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_state_made_in_advance_is_the_optimizers_own():
    plain, prepared = make_training(0), make_training(0)
    tensors = training_tensors(*prepared)
    assert sum(name.startswith("optimizer.") for name in tensors) == 3 * 6
    for training in (plain, prepared):
        train(*training, steps=2)
    for left, right in zip(plain[0].parameters(), prepared[0].parameters(), strict=True):
        assert torch.equal(left, right)
    assert tensors["optimizer.step.0.weight"] == 2, "the tensors are live"


def test_parameters_that_the_optimizer_does_not_hold_have_no_state():
    model, _ = make_training(0)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names = training_tensors(model, optimizer)
    assert "model.0.weight" in names
    held = {name.removeprefix("optimizer.step.") for name in names if name.startswith("optimizer.step.")}
    assert held == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert len(optimizer.state_dict()["state"]) == 4  # torch refuses to write down state of any others


@pytest.mark.parametrize("given", ["fused", "capturable", None])
def test_the_step_is_made_where_torch_makes_it(given):
    # A fused or capturable optimizer wants it beside the parameter, others on the CPU; meta stands in for a GPU.
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    if given is not None:
        optimizer.param_groups[0][given] = True
    tensors = training_tensors(model, optimizer)
    assert tensors["optimizer.step.weight"].device.type == ("meta" if given else "cpu")
    assert tensors["optimizer.exp_avg.weight"].device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_goes_on_exactly_on_a_gpu(tmp_path):
    first, second = make_training(0), make_training(1)
    trainings = []
    for model, _ in (first, second):
        model.cuda()
        trainings.append((model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)))

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(6, 4, device="cuda").cumsum(0)).square().sum().backward()
        optimizer.step()

    step(*trainings[0])
    folder = save_checkpoint(tmp_path / "step_00000001", training_tensors(*trainings[0]), {})
    load_checkpoint(folder, training_tensors(*trainings[1]))
    for training in trainings:
        step(*training)
    expected, found = (training_tensors(*training) for training in trainings)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
