import json
import math
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from moekit.lm.dashboards import TensorBoard, WeightsAndBiases, flatten
from moekit.lm.displays import LayerLoad

LOADS = [
    LayerLoad(0, [0.75, 0.25], 0.5, 0.125, 0.5, 0, 8, 4),
    LayerLoad(3, [1.0, 0.0], 0.0, 0.0, math.nan, 0, 6, 3, simple_experts=1),
]
METRICS = {
    "step": 20,
    "tokens": 4096,
    "loss": 2.5,
    "loss/load_balance": 1.25,
    "layers": [load._asdict() for load in LOADS],
    "validation": {"speeches": 3.0, "code": {"loss": 2.0, "perplexity": 7.5, "bits_per_byte": None}},
    "note": "text",
}
FLAT = {
    "train/tokens": 4096.0,
    "train/loss": 2.5,
    "train/loss/load_balance": 1.25,
    "train/layer_0/load/0": 0.75,
    "train/layer_0/load/1": 0.25,
    "train/layer_0/max_violation": 0.5,
    "train/layer_0/drop_rate": 0.125,
    "train/layer_0/entropy": 0.5,
    "train/layer_0/dead_experts": 0.0,
    "train/layer_0/assignments": 8.0,
    "train/layer_0/tokens": 4.0,
    "train/layer_0/simple_experts": 0.0,
    "train/layer_3/load/0": 1.0,
    "train/layer_3/load/1": 0.0,
    "train/layer_3/max_violation": 0.0,
    "train/layer_3/drop_rate": 0.0,
    "train/layer_3/entropy": math.nan,
    "train/layer_3/dead_experts": 0.0,
    "train/layer_3/assignments": 6.0,
    "train/layer_3/tokens": 3.0,
    "train/layer_3/simple_experts": 1.0,
    "valid/speeches/loss": 3.0,
    "valid/code/loss": 2.0,
    "valid/code/perplexity": 7.5,
}


def test_nested_metrics_become_flat_names():
    flat = flatten(METRICS, prefix="train")
    assert flat == pytest.approx(FLAT, nan_ok=True)
    assert list(flat) == list(FLAT)
    assert {type(value) for value in flat.values()} == {float}


def test_lists_without_a_layer_are_named_by_index():
    metrics = {"source": [{"seen": 5}, {"seen": 7}], "deep": {"a": [[1.0]]}}
    assert flatten(metrics, prefix="p") == {"p/source/0/seen": 5.0, "p/source/1/seen": 7.0, "p/deep/a/0/0": 1.0}


def test_two_metrics_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="two metrics are named 'train/loss/total'; rename one"):
        flatten({"loss/total": 1.0, "loss": {"total": 2.0}}, prefix="train")


def test_a_tensor_is_an_error_that_says_how_to_mend_it():
    with pytest.raises(TypeError, match=r"'train/lr/0' is a Tensor; expected a number.*\.item\(\)"):
        flatten({"step": 1, "lr": [torch.tensor(0.5)]}, prefix="train")


def points(folder):
    """Return tag -> [(step, value)] as TensorBoard itself reads the folder."""
    reader = EventAccumulator(str(folder)).Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_s_own_reader_finds_every_number(tmp_path):
    tracker = TensorBoard(tmp_path / "tensorboard")
    tracker.log(METRICS)
    written = points(tmp_path / "tensorboard")  # before it is closed: a run that is killed loses nothing
    tracker.close()
    assert tracker.place == str(tmp_path / "tensorboard")
    assert {tag: [step for step, _ in values] for tag, values in written.items()} == {tag: [20] for tag in FLAT}
    assert {tag: values[0][1] for tag, values in written.items()} == pytest.approx(FLAT, nan_ok=True)


def test_tensorboard_waits_until_each_step_is_on_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: flushed.append(self.log_dir))
    tracker = TensorBoard(tmp_path)
    tracker.log({"step": 1, "loss": 2.0, "lr": 0.5})
    assert flushed == [str(tmp_path)]
    tracker.close()


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    for from_step, losses in ((1, {10: 1.0, 20: 2.0, 30: 3.0}), (11, {20: 2.5})):
        tracker = TensorBoard(tmp_path, from_step=from_step)
        for step, loss in losses.items():
            tracker.log({"step": step, "loss": loss})
        tracker.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert points(tmp_path) == {"train/loss": [(10, 1.0), (20, 2.5)]}


@pytest.fixture
def wandb():
    """The package, whose background process ends with the test."""
    import wandb

    yield wandb
    wandb.teardown()


def records(path):
    """Read the records of an offline run: LevelDB's log format, in blocks of 32 KiB, after 7 bytes of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of the block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_a_run_is_recorded_offline_and_a_resumed_one_has_its_id(tmp_path, wandb, capfd):
    folder = tmp_path / "run"
    trackers = []
    for steps, failed in (((10, 20), True), ((10,), False)):  # the second goes on from before the first one's end
        tracker = WeightsAndBiases(folder, name="tiny", project="moekit", config={"seed": 3, "lr": 0.5})
        for step in steps:
            tracker.log({**METRICS, "step": step})
        tracker.close(failed=failed)
        trackers.append(tracker)
    wandb.teardown()  # its process may still be writing when a run has ended
    runs = [list(records(next(Path(tracker.place).glob("*.wandb")))) for tracker in trackers]
    assert capfd.readouterr() == ("", "")

    ids = {record.run.run_id for run in runs for record in run if record.HasField("run")}
    assert ids == {(folder / "wandb_id.txt").read_text().strip()}
    for run, steps, code in zip(runs, ((10, 20), (10,)), (1, 0), strict=True):
        history = [
            {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for record in run
            if record.HasField("history")
        ]
        logged = [{name: line[name] for name in line if not name.startswith("_")} for line in history]
        assert [line.pop("step") for line in logged] == list(steps)  # one line a step
        for line in logged:
            assert {name: float(value) for name, value in line.items()} == pytest.approx(FLAT, nan_ok=True)
        assert [record.exit.exit_code for record in run if record.HasField("exit")] == [code]
        axes = {record.metric.glob_name: record.metric.step_metric for record in run if record.HasField("metric")}
        assert axes["*"] == "step"
        (begun,) = [record.run for record in run if record.HasField("run")][:1]
        assert (begun.project, begun.display_name) == ("moekit", "tiny")
        config = {item.key: json.loads(item.value_json) for item in begun.config.update}
        assert (config["seed"], config["lr"]) == (3, 0.5)


class Failure(Exception):
    """Stands for wandb.errors.Error."""


def stand_in(**functions):
    """Make a module in wandb's place, for what needs a network to go wrong."""
    package = types.ModuleType("wandb")
    package.errors, package.Settings = types.SimpleNamespace(Error=Failure), dict
    vars(package).update(functions)
    return package


def test_a_run_that_cannot_start_names_the_way_without_a_network(tmp_path, monkeypatch):
    def init(**_):
        raise Failure("connection refused")

    monkeypatch.setitem(sys.modules, "wandb", stand_in(init=init))
    with pytest.raises(ConnectionError, match=r"(?s)connection refused.*'my project'.*WANDB_MODE=offline.*wandb sync"):
        WeightsAndBiases(tmp_path, name="run", project="my project", config={})


def test_a_wandb_that_does_not_know_the_settings_is_too_old(tmp_path, monkeypatch):
    def settings(**_):
        raise ValueError("finish_timeout: extra inputs are not permitted")  # pydantic's, of wandb 0.30

    monkeypatch.setitem(sys.modules, "wandb", stand_in(Settings=settings, __version__="0.30.0"))
    words = r"(?s)newer wandb than 0\.30\.0.*pip install --upgrade 'moekit\[trackers\]'.*finish_timeout"
    with pytest.raises(ValueError, match=words):
        WeightsAndBiases(tmp_path, name="run", project="moekit", config={})


def test_an_upload_that_takes_too_long_is_a_warning(tmp_path, monkeypatch):
    asked = {}

    class Run:
        offline, url, settings = False, "https://example.org/run", types.SimpleNamespace(sync_dir="run-1")

        def define_metric(self, *_, **__):
            pass

        def finish(self, **_):
            raise TimeoutError

    def init(**options):
        asked.update(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", stand_in(init=init))
    tracker = WeightsAndBiases(tmp_path, name="run", project="moekit", config={})
    assert tracker.place == "https://example.org/run"
    with pytest.warns(RuntimeWarning, match="not upload all of the run within 300 s.*`wandb sync run-1`"):
        tracker.close()
    assert asked["settings"]["finish_timeout"] > 0
    assert asked["settings"]["finish_timeout_raises"]
    assert (asked["resume"], asked["reinit"]) == ("allow", "create_new")
