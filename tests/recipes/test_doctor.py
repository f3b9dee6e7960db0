import re
import sys
import types
from functools import partial

import pytest
import torch

from moekit.experts import batched, grouped, layer_tiles, loop
from moekit.recipes import doctor
from moekit.recipes.backends import Choice, auto
from moekit.recipes.doctor import (
    PACKAGES,
    Package,
    _describe_choice,
    _describe_devices,
    _describe_package,
    _try_backend,
    _try_layer,
    diagnose,
)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_is_named_with_its_version(package):
    assert _describe_package(package).split()[0] == package.name
    assert "not usable" not in _describe_package(package)


def test_a_missing_package_is_reported_with_what_is_lost_and_how_to_mend_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = _describe_package(Package("matplotlib", "the picture", "'moekit[plots]'"))
    assert "not usable: import of matplotlib halted" in line
    assert line.endswith("Without it: the picture. Mend: pip install 'moekit[plots]'")


@pytest.mark.parametrize(
    ("raised", "told"), [("raise RuntimeError", ""), ("import sys; sys.exit", "its import ends the program: ")]
)
def test_a_broken_package_is_reported_and_does_not_stop_the_doctor(monkeypatch, tmp_path, raised, told):
    (tmp_path / "broken_package.py").write_text(f"{raised}('wrong CUDA version.\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert f"broken_package not usable: {told}wrong CUDA version. Without" in _describe_package(
        Package("broken_package", "all", "it")
    )


def test_a_package_that_warns_is_usable(monkeypatch, tmp_path):
    (tmp_path / "einops_like.py").write_text("import warnings\nwarnings.warn('old')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    assert _describe_package(Package("einops_like", "", "")) == "einops_like 1.0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matmul", [loop, batched, grouped])
def test_every_backend_works_on_the_cpu(matmul, dtype):
    assert _try_backend(matmul, device="cpu", dtype=dtype) is None


def test_a_backend_that_raises_or_errs_is_found_out():
    def raises(rows, groups, w):
        raise NotImplementedError("no kernel for this device\nstack")

    assert _try_backend(raises, device="cpu", dtype=torch.float32) == "does not work: no kernel for this device"
    wrong = _try_backend(lambda rows, groups, w: rows @ w[0], device="cpu", dtype=torch.float32)
    assert wrong == "does not work: wrong result"


def test_no_cuda_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert list(_describe_devices())[1] == "cuda: none (this torch is built without CUDA)"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert list(_describe_devices())[1] == "cuda: none (torch finds no driver or device)"


def test_cuda_devices_are_listed(monkeypatch):
    properties = types.SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert list(_describe_devices())[1] == "cuda:0: H100, 80 GiB, compute capability 9.0"
    for driver, major, expected in (
        (None, 9, "Triton, for the CUDA driver is older than 12.4"),
        ("driver", 9, "the CUDA driver"),
        ("driver", 8, "the CUDA driver"),
        ("driver", 10, "the CUDA driver, or Triton if they take descriptors"),
    ):
        monkeypatch.setattr("moekit._operators_triton.cuda_driver", lambda driver=driver: driver)
        properties.major = major
        assert list(_describe_devices())[2] == f"  moekit's kernels are launched by {expected}"
    monkeypatch.setattr(doctor, "HAS_TRITON", False)  # as in a torch for AMD cards
    assert len(list(_describe_devices())) == 2


def test_the_diagnosis_names_every_package_and_backend():
    text = "\n".join(diagnose())
    assert all(f"\n  {package.name} " in text for package in PACKAGES)
    for name in ("loop", "batched", "grouped"):
        assert f"\n  cpu float32      {name:<8} works" in text
    assert re.findall(r"\n  cpu (\w+) +fused_cpu: the CPU: .* alone\. Tried: works", text) == ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_auto_takes_on_the_cpu_works(dtype):
    assert _try_layer(auto(), device="cpu", dtype=dtype) is None


def test_layers_that_raise_or_err_are_found_out():
    def spoiled(x, routing, params, *, name):
        y = auto()(x, routing, params)
        if name == "y":
            return y.detach() * 1.05 + y - y.detach()
        if name == "nan":
            return y * torch.nan
        leaf = {"x": x, "weights": routing.weights, **params._asdict()}[name]
        return y + (leaf - leaf.detach()).sum()  # the same numbers, with another gradient

    for name in ("x", "weights", "gate", "up", "down"):
        said = _try_layer(partial(spoiled, name=name), device="cpu", dtype=torch.float32)
        assert said == f"does not work: wrong gradients of {name}"
    assert _try_layer(partial(spoiled, name="y"), device="cpu", dtype=torch.bfloat16) == "does not work: wrong y"
    assert _try_layer(partial(spoiled, name="nan"), device="cpu", dtype=torch.float32).startswith(
        "does not work: wrong y, "
    )

    def raises(x, routing, params):
        raise RuntimeError("PTX was compiled for another card.\nstack")

    assert _try_layer(raises, device="cpu", dtype=torch.float32) == "does not work: PTX was compiled for another card"


def test_a_choice_that_does_not_work_is_said_with_its_name(monkeypatch):
    def raises(x, routing, params):
        raise RuntimeError("no kernel image.\nstack")

    choice = Choice("fused_layer", raises, "cuda in bfloat16")
    monkeypatch.setattr(doctor, "choose_backend", lambda device, dtype: choice)
    said = "fused_layer: cuda in bfloat16. Tried: does not work: no kernel image"
    assert _describe_choice("cpu", torch.float32) == said
    devices = 1 + torch.cuda.device_count()
    assert sum(line.endswith(said) for line in diagnose()) == 2 * devices  # in float32 and in bfloat16


def test_a_device_that_is_listed_and_cannot_be_used_is_no_traceback(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA unknown error.\nstack")

    monkeypatch.setattr("moekit.experts.tiles.torch.cuda.get_device_capability", lost)
    assert _describe_choice("cuda:7", torch.bfloat16).startswith(
        "does not work: device = cuda:7, which torch cannot use"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_that_is_tried_takes_the_kernels_of_training(dtype):
    tiles = layer_tiles(doctor._TRIED._replace(dtype=dtype, capability=9))
    assert all(tile.specialized for tile in tiles)
    assert min(doctor._TRIED.dim, doctor._TRIED.hidden) >= 256
    seen = []

    def spy(x, routing, params):
        seen.append((x.dtype, routing.weights.numel(), routing.num_experts, x.shape[1], params.down.shape[1]))
        return auto()(x, routing, params)

    assert _try_layer(spy, device="cpu", dtype=dtype) is None
    assert seen == [(dtype, *doctor._TRIED[1:5])]


def test_every_cuda_device_is_diagnosed(monkeypatch):
    pytest.importorskip("triton")
    tried = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(doctor, "_describe_devices", lambda: ["none"])
    monkeypatch.setattr(doctor, "_try_backend", lambda matmul, *, device, dtype: tried.append((device, dtype)))
    layers = []
    monkeypatch.setattr(doctor, "_try_layer", lambda layer, *, device, dtype: layers.append((device, dtype)))
    text = "\n".join(diagnose())
    for index in range(2):
        for dtype in ("float32", "bfloat16"):
            assert f"\n  cuda:{index} {dtype}".ljust(19) + " triton   works" in text
            assert f"\n  cuda:{index} {dtype}".ljust(19) + " fused_layer: cuda in" in text
    assert "\n  cpu bfloat16     fused_cpu: the CPU" in text
    assert [device for device, _ in tried] == ["cpu"] * 6 + ["cuda:0"] * 8 + ["cuda:1"] * 8
    assert layers == [
        (each, dtype) for each in ("cpu", "cuda:0", "cuda:1") for dtype in (torch.float32, torch.bfloat16)
    ]
    assert text.count(". Tried: works") == 6


@pytest.mark.parametrize(("amx", "said"), [(True, "training takes bf16"), (False, "training takes float32")])
def test_what_training_takes_on_this_cpu_is_said(monkeypatch, amx, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512": not amx, "amx_bf16": amx})
    assert next(_describe_devices()).endswith(said)
