"""Launches that are decided once: whatever tensors a later call gets, it reads and writes those."""

import os
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted import DEVICE, run_interpreted, runs_kernels, starts_interpreter
from torch import Tensor

LENGTH = 100
has_descriptors = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="needs a card with tensor descriptors"
)


@starts_interpreter
def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


def decided(factor: float = 2.0, *, length: int = LENGTH, shifted: bool = False):
    """Decide a launch of ``scale``, of (x, out) or (x, shift, out)."""
    import launched_kernels

    from moekit._operators_triton import POINTER, Launch

    arguments = (POINTER, POINTER if shifted else None, POINTER, length, factor)
    return Launch(launched_kernels.scale, (-(-length // 64),), arguments, BLOCK=64)


def decided_in_blocks(rows: int, columns: int):
    import launched_kernels

    from moekit._operators_triton import Blocks, Launch

    blocks = Blocks((rows, columns), (columns, 1), (16, 16))
    return Launch(launched_kernels.scale_blocks, (-(-rows // 16), -(-columns // 16)), (blocks, blocks, 3.0), M=16, N=16)


def assert_prepared_on_hopper(launch: Any) -> None:
    """Later calls must not go through Triton where the driver knows the kernel, though what they write is the same."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9:
        assert launch._prepared
        assert None not in launch._prepared.values()


def drawn(length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, device=DEVICE).to(dtype)


@runs_kernels
def test_each_call_writes_its_own_tensors() -> None:
    launch, outs = decided(), []
    for _ in range(3):
        x, out = drawn(), torch.zeros(LENGTH, device=DEVICE)
        launch(x, out)
        assert torch.equal(out, 2 * x)
        outs.append((out, 2 * x))
    assert all(torch.equal(out, expected) for out, expected in outs), "a later call wrote to earlier tensors"


@runs_kernels
def test_numbers_are_those_it_was_decided_with() -> None:
    twice, less = decided(2.0), decided(-0.5, length=70)
    for _ in range(2):
        x, out = drawn(), torch.zeros(LENGTH, device=DEVICE)
        twice(x, out)
        less(x, out)
        assert torch.equal(out[:70], -0.5 * x[:70])
        assert torch.equal(out[70:], 2 * x[70:])


@runs_kernels
def test_dtypes_may_differ_from_call_to_call() -> None:
    launch = decided()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.float32, torch.float64):
        for of_out in (dtype, torch.float64):
            x, out = drawn(dtype=dtype), torch.zeros(LENGTH, device=DEVICE, dtype=of_out)
            launch(x, out)
            assert torch.equal(out, (2 * x).to(of_out))


@runs_kernels
@pytest.mark.parametrize("odd_first", [False, True])
def test_tensors_may_begin_anywhere(odd_first: bool) -> None:
    launch = decided()
    for odd in (odd_first, not odd_first, odd_first, not odd_first):
        for of_x, of_out in ((odd, odd), (odd, 0), (0, odd)):
            x, out = drawn(LENGTH + 1), torch.zeros(LENGTH + 1, device=DEVICE)
            launch(x[int(of_x) :], out[int(of_out) :])
            assert torch.equal(out[int(of_out) :][:LENGTH], 2 * x[int(of_x) :][:LENGTH])
            assert out[0 if of_out else -1] == 0


@runs_kernels
def test_none_takes_no_tensor() -> None:
    without, shifted = decided(), decided(shifted=True)
    for _ in range(2):
        x, shift, out = drawn(), drawn(), torch.zeros(2, LENGTH, device=DEVICE)
        without(x, out[0])
        shifted(x, shift, out[1])
        assert torch.equal(out, torch.stack([2 * x, 2 * (x + shift)]))


@runs_kernels
@has_descriptors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tensors_may_be_given_as_blocks(dtype: torch.dtype) -> None:
    rows, columns = 37, 48  # the last blocks reach past the rows
    launch = decided_in_blocks(rows, columns)
    for _ in range(3):
        x, out = drawn(rows * columns, dtype), torch.zeros(rows + 1, columns, device=DEVICE, dtype=dtype)
        launch(x.view(rows, columns), out[:rows])
        assert torch.equal(out[:rows], 3 * x.view(rows, columns))
        assert not out[rows].any()
    assert_prepared_on_hopper(launch)


@runs_kernels
@has_descriptors
def test_a_tensor_may_be_given_as_blocks_and_again_as_a_pointer() -> None:
    import launched_kernels

    from moekit._operators_triton import AGAIN, Blocks, Launch

    blocks = Blocks((32, 48), (48, 1), (16, 16))
    launch = Launch(launched_kernels.scale_in_place, (2, 3), (blocks, AGAIN, 48, 3.0), M=16, N=16)
    for _ in range(3):
        x = drawn(32 * 48).view(32, 48)
        expected = 3 * x
        launch(x)
        assert torch.equal(x, expected)
    assert_prepared_on_hopper(launch)


@runs_kernels
@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("number", [1, 3, 4])
def test_a_wrong_number_of_tensors_is_refused_before_anything_runs(number: int, calls_before: int) -> None:
    launch, x, out = decided(), drawn(), torch.zeros(LENGTH, device=DEVICE)
    for _ in range(calls_before):
        launch(x, torch.empty_like(x))
    with pytest.raises(ValueError, match=f"{number} tensors; expected 2"):
        launch(*[out, out, x, x][:number])
    assert not out.any()


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs kernels on the CPU")
def test_tensors_on_the_cpu_are_refused_with_what_to_use() -> None:
    launch, x = decided(), torch.zeros(LENGTH)
    with pytest.raises(ValueError, match=r"given tensors on cpu; expected a CUDA device. Use `auto` or `fused_cpu`"):
        launch(x, torch.zeros(LENGTH))


class Recorded:
    """A kernel that runs nothing, and takes down what it was launched with the ordinary way."""

    arg_names = ("x", "shift", "out", "length", "factor", "BLOCK")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *values, **constants: self.launched.append((grid, values, constants))


@runs_kernels
@pytest.mark.parametrize("gluon", [False, True])
def test_prepared_code_gets_the_places_of_tensors(monkeypatch: pytest.MonkeyPatch, gluon: bool) -> None:
    """The way that only calls on CUDA take, with nothing compiled."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    from moekit import _operators_triton
    from moekit._operators_triton import AGAIN, POINTER, Blocks, Launch

    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2) if gluon else None

    streams = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(_operators_triton, "driver", SimpleNamespace(active=streams))
    blocks, kernel, seen, launched = Blocks((5, 4), (4, 1), (2, 4), layout), Recorded(), [], True
    launch = Launch(kernel, (7,), (POINTER, AGAIN, blocks, 5, 0.5), num_warps=2, BLOCK=64)

    def prepared(*given: Any) -> bool:
        seen.append(given)
        return launched

    x, out = torch.zeros(8), torch.zeros(5, 4)
    launch(x, out)
    [(grid, values, constants)] = kernel.launched
    assert (grid, constants) == ((7, 1, 1), {"num_warps": 2, "BLOCK": 64})
    assert values[0] is values[1] is x
    assert values[3:] == (5, 0.5)
    checked = values[2]  # a descriptor that Triton itself has checked
    assert (checked.base is out, checked.shape, checked.strides, checked.block_shape) == (True, [5, 4], [4, 1], [2, 4])
    del x, out, values, checked
    kernel.launched.clear()
    launch._prepared[-1, torch.float32, torch.float32] = prepared  # type: ignore[assignment]
    for launched in (True, False, True):
        x, out = torch.zeros(8), torch.zeros(5, 4)
        launch(x, out)
        assert seen.pop() == ([x.data_ptr(), out.data_ptr()], "stream of -1")
        assert len(kernel.launched) == (not launched), "what was not launched is to be launched by Triton, once"
        kernel.launched.clear()
        held = weakref.ref(out)
        del out
        assert held() is None, "the launch keeps a tensor of its last call"
    out = torch.zeros(5, 4)
    launch(x[1:], out)
    assert not seen
    assert kernel.launched[0][1][0].data_ptr() == x.data_ptr() + 4


@runs_kernels
@pytest.mark.parametrize("hook", [None, print])
def test_a_hook_may_be_nothing_or_a_function(hook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from moekit._operators_triton import _is_watched

    assert not _is_watched()
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", hook)
    assert _is_watched() is (hook is not None)
    monkeypatch.undo()
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert _is_watched()


@runs_kernels
def test_tensors_on_several_devices_are_launched_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from moekit import _operators_triton
    from moekit._operators_triton import POINTER, Launch

    streams = SimpleNamespace(get_current_stream=lambda device: 0)
    monkeypatch.setattr(_operators_triton, "driver", SimpleNamespace(active=streams))
    kernel, x = Recorded(), torch.zeros(4)
    launch = Launch(kernel, (1,), (POINTER, None, POINTER, 4, 0.5), BLOCK=64)
    launch._prepared[-1, torch.float32, torch.float32] = lambda *given: True  # type: ignore[assignment]
    launch(x, SimpleNamespace(dtype=torch.float32, data_ptr=lambda: 64, get_device=lambda: 1))
    assert len(kernel.launched) == 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
class TestOnCuda:
    def test_only_the_first_two_calls_of_their_kind_ask_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launch, x, out = decided(), drawn(LENGTH + 4), torch.zeros(LENGTH + 4, device=DEVICE)
        launch(x, out)
        assert not launch._prepared, "parameters are written down for a call that may never come again"
        launch(x, out)
        monkeypatch.setattr(launch, "kernel", None)
        launch(x[4:], out[4:])
        assert torch.equal(out[4:], 2 * x[4:])
        with pytest.raises(TypeError):
            launch(x.double(), out)
        with pytest.raises(TypeError):
            launch(x[1:], out)

    def test_who_watches_launches_is_told_of_each(self) -> None:
        from triton import knobs

        launch, x, told = decided(), drawn(), []
        hook = lambda metadata: told.append(metadata.get()["name"])  # noqa: E731
        out = torch.zeros(LENGTH, device=DEVICE)
        launch(x, out)
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            launch(x, out)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        launch(x, out)
        assert told == ["scale"]

    def test_it_runs_on_the_current_stream(self) -> None:
        launch, x, side = decided(), drawn(), torch.cuda.Stream()
        out = torch.zeros(2, LENGTH, device=DEVICE)
        for _ in range(2):
            launch(x, torch.empty_like(x))
        torch.cuda.synchronize()
        torch.cuda._sleep(500_000_000)  # what runs on the usual stream now runs long after
        with torch.cuda.stream(side):
            launch(x, out[0])
            found = out.clone()
            side.synchronize()
            assert torch.equal(found[0], 2 * x)
        torch.cuda.synchronize()

    def test_it_is_captured_in_a_graph(self) -> None:
        launch, x, out = decided(), drawn(), torch.zeros(LENGTH, device=DEVICE)
        for _ in range(2):
            launch(x, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(x, out)
        for _ in range(2):
            x.copy_(drawn())
            out.zero_()
            graph.replay()
            assert torch.equal(out, 2 * x)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_it_runs_where_its_tensors_are(self) -> None:
        launch = decided()
        for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
            x, out = drawn().to(device), torch.zeros(LENGTH, device=device)
            launch(x, out)
            assert torch.equal(out, 2 * x)
            assert torch.cuda.current_device() == 0
