import errno
import json
import os
import random
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moekit.lm.tensor_files import _whole, own_storage, read_safetensors, read_torch, write_safetensors, write_torch

TENSORS = {
    "float": torch.arange(15.0).reshape(3, 5),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "strided": torch.arange(24.0).reshape(4, 6).T,
    "part": torch.arange(1000.0)[10:12],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "empty": torch.zeros(0, 3),
    "empty too": torch.zeros(0, 3),
}


def test_safetensors_come_back_bit_for_bit_with_metadata(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS, metadata={"config": "{}"})
    found = read_safetensors(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"config": "{}", "format": "pt"}
    assert path.stat().st_size < 2000
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    w = torch.randn(4, 3)
    tensors = {"embed": w, "other": w.clone(), "head": w.detach(), "turned": w.T}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["embed", "other", "turned"]
        assert json.loads(file.metadata()["aliases"]) == {"head": "embed"}
    found = read_safetensors(path)
    assert found["head"] is found["embed"]
    assert torch.equal(found["turned"], w.T)


def test_files_of_other_programs_are_read(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    assert torch.equal(read_safetensors(tmp_path / "a.safetensors")["w"], torch.ones(3))


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", {"w": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_safetensors(path, {"w": torch.zeros(3)}, metadata={"step": 3})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


every_writer = pytest.mark.parametrize("write", [write_torch, write_safetensors])


@every_writer
def test_the_content_is_on_the_disk_before_the_file_has_its_name(write, tmp_path, monkeypatch):
    synced, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    def move(source, target):
        assert synced == [(os.stat(source).st_ino, os.stat(source).st_size)]
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    assert write(tmp_path / "a", {"w": torch.ones(1000)}).stat().st_size > 4000


@every_writer
def test_content_that_does_not_reach_the_disk_replaces_nothing(write, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(path, {"w": torch.ones(3)})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("aliases", ['{"head": "nowhere"}', "[1]", "{"])
def test_aliases_that_make_no_sense_are_refused(aliases, tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors", metadata={"aliases": aliases})
    with pytest.raises(ValueError, match=r"a\.safetensors is no readable \.safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")


def test_damaged_safetensors_end_in_a_value_error_and_in_nothing_else(tmp_path):
    whole = write_safetensors(tmp_path / "whole.safetensors", {f"w{i}": torch.randn(5) for i in range(4)}).read_bytes()
    draw, refused = random.Random(0), 0
    for i in range(100):
        content = bytearray(whole[: draw.randrange(len(whole))] if i % 2 else whole)
        for _ in range(0 if i % 2 else 5):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "damaged").write_bytes(content)
        try:
            read_safetensors(tmp_path / "damaged")
        except ValueError as error:
            assert "or was cut short" in str(error)  # noqa: PT017 - a flip in a number is not seen
            refused += 1
    assert refused >= 50  # every file that was cut short, at least


def test_an_empty_file_of_tensors_a_folder_and_no_file_are_refused(tmp_path):
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"is a folder; expected a \.safetensors file"):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.safetensors; expected a \.safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("call", [read_safetensors, lambda path: write_safetensors(path, {})])
def test_without_the_package_the_extra_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'moekit\[export\]'"):
        call(tmp_path / "a.safetensors")


def test_torch_files_are_mapped_and_not_read(tmp_path):
    path = write_torch(tmp_path / "a.pt", {"w": torch.zeros(1000)})
    tensor = read_torch(path)["w"]
    content = bytearray(path.read_bytes())
    start = content.index(bytes(4000))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(torch.ones(1000).numpy().tobytes())
    assert tensor.sum() == 1000


def test_own_storage_copies_parts_alone():
    whole = torch.arange(6.0, requires_grad=True)
    assert own_storage(whole).data_ptr() == whole.data_ptr()
    assert not own_storage(whole).requires_grad
    part = own_storage(whole[2:4])
    assert part.tolist() == [2, 3]
    assert part.untyped_storage().nbytes() == 8


@pytest.mark.parametrize("asked", [KeyboardInterrupt(), SystemExit(143)])
def test_who_asks_to_stop_is_not_told_that_torch_cannot_end_its_file(asked, tmp_path):
    def save():
        try:
            raise asked
        finally:
            raise RuntimeError("unexpected pos 10240 vs 10192")  # as torch's writer does on its way out

    with pytest.raises(type(asked)) as ended, _whole(tmp_path / "a.pt"):
        save()
    assert ended.value is asked
    assert not list(tmp_path.iterdir())
