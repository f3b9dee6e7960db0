import json
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from moekit.lm.checkpoints import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
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
    assert sorted(path.name for path in saved.iterdir()) == [".metadata", "__0_0.distcp", "state.json"]
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
    assert latest_checkpoint(run) == old  # and no warning: the unfinished one has no name of its own
    monkeypatch.undo()
    again = save_checkpoint(place, blank(TENSORS), {"step": 6})
    assert read_state(again) == {"step": 6}
    names = sorted(path.name for path in again.parent.iterdir())
    assert names == sorted({old.name, again.name})


def test_an_old_checkpoint_is_replaced_as_a_whole(saved):
    (saved / "leftover").write_text("of the old one")
    save_checkpoint(saved, {"other": torch.ones(2)}, {"step": 13})
    assert not (saved / "leftover").exists()
    tensors = {"other": torch.zeros(2)}
    assert load_checkpoint(saved, tensors) == {"step": 13}
    assert tensors["other"].tolist() == [1, 1]
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_missing_or_unfinished_checkpoint_is_explained(saved, tmp_path):
    message = r"there is no checkpoint at .*expected a folder step_NNNNNNNN with state\.json.*`latest` takes the newest"
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
    with pytest.raises(ValueError, match=r"asks for .*, which no index of tensors has.*could run code"):
        load_checkpoint(saved, blank(TENSORS))
    assert not marker.exists()


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
    broken = checkpoint_folder(tmp_path, 101)
    broken.mkdir()
    (broken / ".metadata").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"skipping .*step_00000101: it has no state\.json, .*not written to its end"):
        assert latest_checkpoint(tmp_path) == folders[1]


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


@pytest.mark.parametrize("fused", [True, False])
def test_training_goes_on_exactly_from_its_tensors(tmp_path, fused):
    first, second = make_training(0, fused=fused), make_training(1, fused=fused)
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


@pytest.mark.parametrize("fused", [True, False])
def test_the_step_is_made_where_torch_makes_it(fused):
    # A fused optimizer wants it beside the parameter, others on the CPU; the meta device stands in for a GPU.
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.defaults["fused"] = fused
    tensors = training_tensors(model, optimizer)
    assert tensors["optimizer.step.weight"].device.type == ("meta" if fused else "cpu")
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
