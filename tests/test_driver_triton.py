"""What the CUDA driver is given for a launch, by a driver that writes it down."""

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from moekit._driver_triton import Again, Blocks, Driver, Pointer, _Config, cuda_driver, prepare

SIGNATURE = {
    "x": "*fp32", "again": "*fp32", "out": "tensordesc<fp32[2, 4]>", "one": "constexpr", "n": "i32", "far": "i64",
    "factor": "fp32", "on": "u1", "BLOCK": "constexpr",
}  # fmt: skip
VALUES = (Pointer(), Again(), Blocks((5, 4), (12, 1), (2, 4)), 1, 5, -(2**40), 0.5, True, 64)
SIZES = [8, 8, 128, 4, 4, 8, 8, 4, 8, 4, 1, 8, 8]  # x, again; out with its shape and strides; numbers; two scratch
DESCRIBED = {"swizzle": 3, "elem_size": 4, "elem_type": 9, "block_size": [2, 4], "fp4_padded": False}
STREAM = 2**40 + 7


class Recorder:
    """A driver that launches nothing; a descriptor of its is the tensor's address, and nothing else."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.launched, self.described, self.moved = sizes, [], [], []
        self.answer, self.answer_to_moves, self.answer_to_descriptors = 0, 0, 0

    def driver(self) -> Driver:
        return Driver(self.launch, self.parameter, self.describe, self.move)

    def launch(self, config: int, function: int, parameters: int, extra: None) -> int:
        given = _Config.from_address(config)
        places = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        contents = [ctypes.string_at(place, size) for place, size in zip(places, self.sizes, strict=True)]
        assert all(place % 128 == 0 for place, size in zip(places, self.sizes, strict=True) if size == 128)
        shape = (*given.grid,), (*given.block,), given.shared, given.stream, given.attributes, given.num_attributes
        self.launched.append((shape, function, contents, extra))
        return self.answer

    def parameter(self, function: int, index: int, offset: int, size: int) -> int:
        if index >= len(self.sizes):
            return 1
        ctypes.c_size_t.from_address(size).value = self.sizes[index]
        return 0

    def describe(self, place: int, kind: int, rank: int, address: int, *rest: Any) -> int:
        self.described.append((kind, rank, *[[*each] if isinstance(each, ctypes.Array) else each for each in rest]))
        self.write(place, address)
        return self.answer_to_descriptors

    def move(self, place: int, address: int) -> int:
        self.moved.append(address)
        self.write(place, address)
        return self.answer_to_moves

    def write(self, place: int, address: int) -> None:
        ctypes.memmove(place, struct.pack("<Q", address).ljust(128, b"\0"), 128)


def compiled(signature: dict[str, str] | None = None, described: Any = (DESCRIBED,), **metadata: Any) -> Any:
    usual = {"num_warps": 8, "num_ctas": 1, "shared": 4096, "global_scratch_size": 0, "launch_pdl": False}
    usual["target"] = SimpleNamespace(arch=90)
    return SimpleNamespace(
        src=SimpleNamespace(signature=SIGNATURE if signature is None else signature),
        metadata=SimpleNamespace(**{**usual, "tensordesc_meta": described, **metadata}),
        function=77,
    )


def test_parameters_are_as_triton_orders_them_and_addresses_those_of_the_call() -> None:
    recorder = Recorder(SIZES)
    prepared = prepare(compiled(), (7, 2, 1), VALUES, [64, 128], recorder.driver())
    assert prepared is not None
    # Type 8 is the driver's name of Triton's 9; axes and steps begin with the innermost, whose step is no argument.
    assert recorder.described == [(8, 2, [4, 5], [48, 0], [4, 2], [1, 1], 0, 3, 2, 0)]
    for x, out in ((64, 128), (2**45, 128), (64, 2**46), (64, 2**46)):
        assert prepared([x, out], STREAM)
        shape, function, contents, extra = recorder.launched.pop()
        assert shape == ((7, 2, 1), (256, 1, 1), 4096, STREAM, None, 0)
        assert (function, extra) == (77, None)
        place, again, descriptor, *rest = contents
        assert struct.unpack("<3Q", place + again + descriptor[:8]) == (x, x, out)
        numbers = struct.unpack("<iiqqiqfBQQ", b"".join(rest))
        assert numbers == (5, 4, 12, 1, 5, -(2**40), 0.5, 1, 0, 0)
    assert recorder.moved == [2**46], "a descriptor is written when its tensor lies elsewhere, and only then"


@pytest.mark.parametrize(
    "sizes", [SIZES[:-1], [*SIZES, 8], [*SIZES[:-3], 4, 8, 8], []], ids=["fewer", "more", "other", "none"]
)
def test_a_kernel_with_other_parameters_is_left_to_triton(sizes: list[int]) -> None:
    assert prepare(compiled(), (1, 1, 1), VALUES, [64, 128], Recorder(sizes).driver()) is None


@pytest.mark.parametrize(
    "given",
    [
        compiled(num_ctas=2),
        compiled(global_scratch_size=128),
        compiled(profile_scratch_size=8),
        compiled(launch_cooperative_grid=True),
        compiled(launch_pdl=True),
        compiled(described=None),
        compiled(described=({**DESCRIBED, "fp4_padded": True},)),
        compiled(described=({**DESCRIBED, "is_im2col": True},)),
        compiled({**SIGNATURE, "n": "u32"}),
        compiled(target=SimpleNamespace(arch=100)),
    ],
    ids=[
        "cluster",
        "scratch",
        "profile",
        "cooperative",
        "pdl",
        "undescribed",
        "fp4",
        "im2col",
        "unknown type",
        "Blackwell",
    ],
)
def test_a_kernel_of_another_kind_is_left_to_triton(given: Any) -> None:
    assert prepare(given, (1, 1, 1), VALUES, [64, 128], Recorder(SIZES).driver()) is None


def test_a_descriptor_that_the_driver_refuses_leaves_the_kernel_to_triton() -> None:
    recorder = Recorder(SIZES)
    recorder.answer_to_descriptors = 1
    assert prepare(compiled(), (1, 1, 1), VALUES, [64, 128], recorder.driver()) is None


def test_without_a_driver_kernels_are_left_to_triton() -> None:
    assert prepare(compiled(), (1, 1, 1), VALUES, [64, 128], None) is None


def test_it_says_when_nothing_was_launched() -> None:
    recorder = Recorder(SIZES)
    prepared = prepare(compiled(), (1, 1, 1), VALUES, [64, 128], recorder.driver())
    assert prepared is not None
    recorder.answer = 201  # no context in this thread
    assert not prepared([64, 128], STREAM)
    recorder.answer, recorder.answer_to_moves = 0, 1
    recorder.launched.clear()
    assert not prepared([64, 256], STREAM)
    assert not recorder.launched, "launched with a descriptor of another tensor"
    recorder.answer_to_moves = 0
    with prepared._lock:  # as another thread does while it launches
        assert not prepared([64, 128], STREAM)
    assert not recorder.launched
    assert prepared([64, 256], STREAM)
    assert recorder.moved == [256, 256], "a descriptor that was not written was taken for written"


def test_a_descriptor_whose_writing_was_interrupted_is_written_again() -> None:
    recorder = Recorder(SIZES)
    prepared = prepare(compiled(), (1, 1, 1), VALUES, [64, 128], recorder.driver())
    assert prepared is not None
    write = recorder.write

    def interrupted(place: int, address: int) -> None:
        write(place, address)
        recorder.write = write  # type: ignore[method-assign]
        raise KeyboardInterrupt

    recorder.write = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        prepared([64, 256], STREAM)
    assert prepared([64, 128], STREAM)
    assert struct.unpack("<Q", recorder.launched.pop()[2][2][:8]) == (128,)


def test_pointers_alone_are_prepared_on_any_card() -> None:
    recorder = Recorder([8, 4, 8, 8])
    given = compiled({"x": "*fp32", "n": "i32"}, None, target=SimpleNamespace(arch=100))
    prepared = prepare(given, (1, 1, 1), (Pointer(), 5), [64], recorder.driver())
    assert prepared is not None
    assert prepared([192], STREAM)
    assert recorder.launched[0][2][0] == struct.pack("<Q", 192)


@pytest.mark.gpu
@pytest.mark.skipif(cuda_driver() is None, reason="needs a CUDA driver")
class TestOnCuda:
    def test_descriptors_are_those_of_triton(self) -> None:
        import torch
        from triton.backends.nvidia import driver as triton_driver
        from triton.tools.tensor_descriptor import TensorDescriptor

        from moekit._driver_triton import _descriptor

        driver = cuda_driver()
        assert driver is not None
        x, elsewhere = torch.zeros(2, 40, 48, device="cuda", dtype=torch.bfloat16)
        described = {"swizzle": 2, "elem_size": 2, "elem_type": 10, "block_size": [16, 32], "fp4_padded": False}
        blocks = Blocks((40, 48), (48, 1), (16, 32))
        more = [None] * (triton_driver.make_tensordesc_arg.__code__.co_argcount - 2)
        fields = [*map(list, blocks[:3])]
        expected = [
            triton_driver.make_tensordesc_arg(TensorDescriptor(each, *fields), described, *more)[0]
            for each in (x, elsewhere)
        ]
        at, size = 128, 128  # of the descriptor, in Triton's object and in bytes
        of_x, of_elsewhere = (ctypes.string_at(id(each) + at, size) for each in expected)
        assert _descriptor(driver, blocks, described, x.data_ptr()) == of_x
        memory = (ctypes.c_uint64 * 32)()
        place = -(-ctypes.addressof(memory) // 128) * 128
        ctypes.memmove(place, of_x, size)
        assert driver.move(place, elsewhere.data_ptr()) == 0
        assert ctypes.string_at(place, size) == of_elsewhere
