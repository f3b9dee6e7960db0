import importlib.metadata
import subprocess
import sys
import threading
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from moekit.experts import init_gated
from moekit.experts.tile_files import layer_tiles, read_tiles
from moekit.experts.tile_tables import TileEntry, entry_of, from_table
from moekit.experts.tiles import LayerSize, LayerTiles, Tile, check_tiles, ruled_tiles
from moekit.recipes import backends
from moekit.recipes.backends import Choice
from moekit.recipes.bench.shapes import GPU_SHAPES
from moekit.recipes.cli import main
from moekit.recipes.tuning import files as tuning_files
from moekit.recipes.tuning import program as tune_program
from moekit.recipes.tuning import tune as module
from moekit.recipes.tuning.candidates import (
    BANDS,
    ROW_PRODUCTS,
    WEIGHT_PRODUCTS,
    candidates_of,
    fitting,
    shortlist,
    with_bands,
    with_rule,
)
from moekit.recipes.tuning.compiling import Job, _in_pool, compiling
from moekit.recipes.tuning.files import write_tiles
from moekit.recipes.tuning.products import differs, miniature, products_flops
from moekit.recipes.tuning.report import Comparison, Tuned, lines_of, size_words, tile_words
from moekit.recipes.tuning.times import cuda_seconds
from moekit.recipes.tuning.tune import layer_size, tune
from moekit.routing import top_k

SIZE = LayerSize(torch.bfloat16, 64, 4, 32, 48, gated=True, capability=9)
TILE = Tile(m=64, n=64, k=64, warps=4, stages=3)


def fake_tuned(size: LayerSize = SIZE, *, seconds: float = 1e-3) -> Tuned:
    tiles = ruled_tiles(size)
    rows = [Comparison(name, tile, 2e-3, tile, seconds, 10**9) for name, tile in tiles._asdict().items()]
    return Tuned(size, entry_of(size, tiles, origin="nowhere"), tuple(rows), ("up 1x1x1: OutOfResources: memory",))


# What is tried


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_candidates_are_few_and_can_fit_each_other(dtype, gated) -> None:
    size = SIZE._replace(dtype=dtype, gated=gated)
    tried = with_rule(candidates_of(size), size)
    for name, tiles in tried.items():
        assert tiles[0] == getattr(ruled_tiles(size), name)
        assert len(set(tiles)) == len(tiles) <= 24, name
    for products, letter in ((ROW_PRODUCTS, "m"), (WEIGHT_PRODUCTS, "k")):
        numbers = [{getattr(tile, letter) for tile in tried[name]} for name in products]
        assert len(set.intersection(*numbers)) >= 2, letter


def test_a_product_that_cannot_overlap_is_not_tried_twice() -> None:
    tried = candidates_of(SIZE)
    assert {name for name, tiles in tried.items() if any(tile.overlap for tile in tiles)} == {
        "down",
        "grad_hidden",
        "grad_up",
        "grad_down",
    }
    assert any(tile.overlap for tile in candidates_of(SIZE._replace(gated=False))["grad_rows"])


def test_products_are_sorted_by_what_their_tiles_share() -> None:
    assert (*ROW_PRODUCTS, *WEIGHT_PRODUCTS) == LayerTiles._fields


def test_a_specialized_tile_is_told_from_a_plain_one() -> None:
    ruled = ruled_tiles(layer_size(GPU_SHAPES["olmoe-1b-7b"], torch.bfloat16)._replace(capability=9)).down
    assert tile_words(ruled) == "specialized, band 32"
    plain = with_bands([ruled._replace(specialized=False)])
    assert len({tile_words(tile) for tile in (ruled, *plain)}) == 1 + len(plain)


def test_tf32_has_candidates_that_exact_products_have_not() -> None:
    size = SIZE._replace(dtype=torch.float32, capability=9)
    exact, units = candidates_of(size), candidates_of(size._replace(precision="tf32"))
    assert [{len(tiles) for tiles in each.values()} for each in (exact, units)] == [{10}, {15}]
    assert all(rule in units[name] for name, rule in ruled_tiles(size._replace(precision="tf32"))._asdict().items())


def test_candidates_of_other_products_are_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates of the products \['down', 'sideways'\]; expected up, down, "):
        with_rule({"down": [TILE], "sideways": [TILE]}, SIZE)


# What is chosen


def test_the_shortlist_has_the_best_of_each_shared_number_and_the_second_best() -> None:
    times = {TILE: 3.0, TILE._replace(n=32): 1.0, TILE._replace(n=128): 2.0, TILE._replace(m=128): 9.0}
    assert [(tile.m, tile.n) for tile in shortlist("down", times)] == [(64, 32), (64, 128), (128, 64)]
    times = {TILE: 3.0, TILE._replace(m=32): 1.0, TILE._replace(m=16): 2.0, TILE._replace(k=32): 9.0}
    assert [(tile.m, tile.k) for tile in shortlist("grad_up", times)] == [(32, 64), (16, 64), (64, 32)]


def test_every_band_is_tried_once() -> None:
    assert sorted(tile.band for tile in with_bands([TILE, TILE._replace(band=4)])) == list(BANDS)
    assert {tile._replace(band=0) for tile in with_bands([TILE])} == {TILE._replace(band=0)}


def test_the_shared_m_is_that_of_the_least_sum() -> None:
    low, high = TILE, TILE._replace(m=128)
    times = {name: {low: 2.0, high: 1.0} for name in LayerTiles._fields}
    assert {tile.m for tile in fitting(times)[:4]} == {128}
    times["grad_rows"] = {low: 1.0, high: 9.0}  # 7 seconds against 12, though three of four prefer the other
    chosen = fitting(times)
    assert {tile.m for tile in chosen[:4]} == {64}
    assert {tile.m for tile in chosen[4:]} == {128}  # which need not share it


def test_the_shared_k_is_that_of_the_least_sum() -> None:
    shallow, deep = TILE._replace(k=32), TILE
    times = {name: {TILE: 1.0} for name in ROW_PRODUCTS}
    times |= {"grad_up": {shallow: 1.0, deep: 2.0, deep._replace(n=128): 1.5}, "grad_down": {shallow: 3.0, deep: 2.0}}
    chosen = fitting(times)
    assert chosen.grad_up == deep._replace(n=128)
    assert chosen.grad_down == deep
    times["grad_up"][shallow] = 0.4
    assert fitting(times).grad_down == shallow


def test_a_number_that_one_product_lacks_is_not_chosen() -> None:
    times = {name: {TILE: 5.0, TILE._replace(m=128): 1.0} for name in LayerTiles._fields}
    times["up"] = {TILE: 5.0}
    assert check_tiles(fitting(times)).down.m == 64
    times["up"] = {TILE._replace(m=32): 5.0}
    with pytest.raises(ValueError, match=r"no m is shared by tiles of up, down, .*'up': \[32\].*candidates of one m"):
        fitting(times)


# What stands in for a layer


def test_a_miniature_is_compiled_as_its_layer() -> None:
    for size in (layer_size(shape, torch.bfloat16) for shape in GPU_SHAPES.values()):
        small = miniature(size._replace(dim=size.dim + 8, capability=9))
        assert small.experts * small.dim * small.hidden < 2**21
        assert small.dim % 256 == 8
        assert small.hidden % 256 == size.hidden % 256
        assert (small.experts % 16 == 0) == (size.experts % 16 == 0)
        assert (small.gated, small.capability) == (True, 9)
    assert miniature(SIZE) == SIZE
    assert miniature(SIZE._replace(experts=1)).experts == 1
    assert miniature(SIZE._replace(experts=60)).experts == 17


def test_operations_are_counted() -> None:
    flops = products_flops(SIZE)
    assert sum(flops.values()) == 3 * 6 * 64 * 32 * 48  # forward and backward of three matrices
    assert sum(products_flops(SIZE._replace(gated=False)).values()) == 3 * 4 * 64 * 32 * 48


def test_outputs_may_differ_by_rounding_alone() -> None:
    expected = torch.randn(40, 8).bfloat16()
    near = (expected.float() * (1 + 2**-8)).bfloat16()
    assert differs(near, expected, product="down", total=40) == ""
    far = expected.clone()
    far[30, 2] += 1
    assert differs(far, expected, product="down", total=30) == ""  # a row of nobody's
    assert differs(far, expected, product="down", total=31).startswith("its output is wrong: off by 1, where entries")
    assert differs(far, expected, product="grad_up", total=30).startswith("its output is wrong: off by 1")
    assert "off by nan" in differs(expected * torch.nan, expected, product="down", total=40)


# Measuring


def test_runs_are_measured_in_turn_and_the_median_counts(monkeypatch) -> None:
    clock, order = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def run(name: str, times: list[float]):
        def go() -> None:
            order.append(name)
            clock[0] += times[order.count(name) - 1]

        return go

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    other = TILE._replace(n=128)
    runs = {TILE: run("a", [9, 1, 3, 9, 2, 2, 9, 50, 50]), other: run("b", [9, 4, 4] * 3)}
    assert cuda_seconds(runs, 3) == {TILE: pytest.approx(2e-3), other: pytest.approx(4e-3)}  # the first is not counted
    assert "".join(order) == "aaabbb" + "bbbaaa" + "aaabbb"


def test_compiling_here_reports_what_fails(monkeypatch) -> None:
    class OutOfResources(Exception):
        pass

    def fail(*_, **__):
        raise OutOfResources("out of resource: shared memory, Required: 300000\nmore")

    monkeypatch.setattr("moekit.recipes.tuning.compiling.draw_operands", fail)
    job = Job(SIZE, "down", TILE, "cpu")
    with compiling(0) as compile_jobs:
        found = compile_jobs([job, job])
    assert found == {job: "OutOfResources: out of resource: shared memory, Required: 300000"}


def test_a_rule_that_does_not_run_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr("moekit.recipes.tuning.compiling.try_job", lambda job: "PTXASError: registers")
    with pytest.raises(RuntimeError, match=r"the rule's tile of up, 64x128x64 warps 4 .*, does not run: PTXASE"):
        tune([SIZE], device="cpu", timer=lambda runs, rounds: {}, workers=0, tell=lambda line: None)


def test_a_device_that_is_not_there_is_refused(monkeypatch) -> None:
    with pytest.raises(SystemExit, match=r"tune: --device cuda:x; expected cuda, or one of several as cuda:1"):
        main(["tune", "--device", "cuda:x"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match=r"tune: --device cuda:9, and torch finds 1 CUDA device, cuda:0; take one"):
        main(["tune", "--device", "cuda:9"])
    with pytest.raises(ValueError, match=r"tune: device = cuda:9, and torch finds 1 CUDA device, cuda:0; take one"):
        tune([SIZE], device=torch.device("cuda", 9))


def test_tuning_needs_a_cuda_device_and_rounds() -> None:
    with pytest.raises(ValueError, match=r"tune measures kernels on a CUDA device; the device is cpu\. Take a table"):
        tune([SIZE], device="cpu")
    with pytest.raises(ValueError, match="rounds = 0; expected at least 1"):
        tune([SIZE], device="cpu", rounds=0, timer=lambda runs, rounds: {})


# Files


def test_writing_merges_with_what_is_there(tmp_path) -> None:
    path, other = tmp_path / "tiles.json", SIZE._replace(dim=128)
    assert len(write_tiles(path, [entry_of(SIZE, ruled_tiles(SIZE), origin="old")])) == 1
    write_tiles(path, [entry_of(other, ruled_tiles(other), origin="other")])
    found = write_tiles(path, [entry_of(SIZE, ruled_tiles(SIZE), origin="new")])
    assert [entry.origin for entry in found] == ["new", "other"]
    assert read_tiles(path) == found
    assert [each.name for each in tmp_path.iterdir()] == ["tiles.json"]


def test_what_two_write_at_once_is_all_kept(tmp_path, monkeypatch) -> None:
    path, write_whole = tmp_path / "tiles.json", tuning_files.write_whole
    entries = [fake_tuned(SIZE._replace(dim=dim)).entry for dim in (64, 128)]
    second = threading.Thread(target=write_tiles, args=(path, entries[1:]))

    def after_the_second_has_begun(*arguments):
        monkeypatch.setattr(tuning_files, "write_whole", write_whole)
        second.start()
        second.join(0.3)  # time enough to write, if it may
        write_whole(*arguments)

    monkeypatch.setattr(tuning_files, "write_whole", after_the_second_has_begun)
    write_tiles(path, entries[:1])
    second.join()
    assert set(read_tiles(path)) == set(entries)
    assert [each.name for each in tmp_path.iterdir()] == ["tiles.json"]


def test_the_folder_of_the_file_is_not_made(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent; make it first"):
        write_tiles(tmp_path / "absent" / "tiles.json", [])
    assert not list(tmp_path.iterdir())


def test_an_entry_is_told_by_all_but_its_origin_and_tiles() -> None:
    entry = fake_tuned().entry
    named = dict(zip([name for name in TileEntry._fields if name not in ("origin", "tiles")], entry.key, strict=True))
    assert entry == TileEntry(**named, origin=entry.origin, tiles=entry.tiles)
    assert entry.key == entry._replace(origin="elsewhere", tiles=LayerTiles(*[TILE] * 6)).key


def test_a_file_that_is_no_table_is_left_as_it_is(tmp_path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"tiles\.json: unknown field 'mine'"):
        write_tiles(path, [fake_tuned().entry])
    assert path.read_text() == '{"mine": 1}'


def test_no_file_is_written_that_could_not_be_read(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"entry 1, capability: 0; expected a whole number, at least 1"):
        write_tiles(tmp_path / "tiles.json", [fake_tuned(SIZE._replace(capability=0)).entry])
    assert not list(tmp_path.iterdir())


# Using what was found


def test_auto_and_its_choice_hand_the_tiles_on(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    tiles = from_table([fake_tuned().entry])
    assert backends.choose_backend("cuda", torch.bfloat16, tiles=tiles).layer.keywords["tiles"] is tiles
    assert backends.choose_backend("cuda", torch.bfloat16).layer.keywords["tiles"] is layer_tiles
    asked = []

    def choose(device, dtype, **options):
        asked.append(options["tiles"])
        return Choice("fake", lambda x, routing, params: x, "")

    monkeypatch.setattr(backends, "_choose", choose)
    x, params = torch.ones(2, 4), init_gated(3, 4, 8)
    for layer in (backends.auto(tiles=tiles), backends.auto()):
        layer(x, top_k(torch.zeros(2, 3), k=1), params)
    assert asked == [tiles, layer_tiles]


# The program


@pytest.fixture
def measured(monkeypatch) -> list[tuple]:
    """Let tuning find the rule's tiles, and record what it was asked."""
    asked: list[tuple] = []

    def found(sizes, **options):
        asked.append((sizes, options))
        options["tell"]("compiling 3 candidates")
        tuned = [fake_tuned(size._replace(capability=9)) for size in sizes]
        for each in tuned:
            options["done"](each)
        return tuned

    monkeypatch.setattr(tune_program, "tune", found)
    return asked


def test_the_program_measures_the_shapes_and_writes_the_file(tmp_path, capsys, measured) -> None:
    path = tmp_path / "tiles.json"
    write_tiles(path, [entry_of(SIZE, ruled_tiles(SIZE), origin="mine")])
    words = ["--shape", "olmoe-1b-7b", "64,16,24,8,2", "--dtype", "float16", "--rounds", "5", "--write", str(path)]
    main(["tune", *words])
    sizes, options = measured[0]
    assert [size[:5] for size in sizes] == [
        (torch.float16, 131072, 64, 2048, 1024),
        (torch.float16, 128, 8, 16, 24),
    ]
    assert (str(options["device"]), options["rounds"], options["workers"]) == ("cuda", 5, None)
    assert {entry.origin for entry in read_tiles(path)} == {"mine", "nowhere"}
    out = capsys.readouterr().out
    assert out.count("N 131,072, D 2,048, F 1,024, E 64, gated, float16") == 1
    assert out.count("compiling 3 candidates") == 1
    assert out.count("  skipped: up 1x1x1: OutOfResources: memory") == 2  # once for each size
    assert out.count("grad_hidden") == 2
    assert "2.00" in out
    assert f"{path}: 3 entries. Use them: fused_layer(tiles=from_table(read_tiles(PATH)))" in out.replace("\n", "")


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "interrupted"), (torch.OutOfMemoryError("no memory"), "no memory")],
    ids=lambda each: type(each).__name__,
)
def test_what_was_measured_is_printed_and_in_the_file_when_the_next_size_fails(
    tmp_path, capsys, monkeypatch, error, said
) -> None:
    path, seen = tmp_path / "tiles.json", []

    def found(sizes, *, done, **_):
        done(fake_tuned(sizes[0]._replace(capability=9)))
        seen.append((capsys.readouterr().out, len(read_tiles(path))))
        raise error

    monkeypatch.setattr(tune_program, "tune", found)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--write", str(path)])
    [(out, entries)] = seen
    assert "N 131,072, D 2,048, F 1,024, E 64, gated, bfloat16" in out
    assert "  skipped: up 1x1x1: OutOfResources: memory" in out
    assert entries == 1
    ended = capsys.readouterr()
    assert f"{path}: 1 entries. Use them" in ended.out.replace("\n", "")
    assert said in ended.err + str(stopped.value)


def test_a_program_that_measured_nothing_writes_nothing(tmp_path, capsys, monkeypatch) -> None:
    def found(*_, **__):
        raise RuntimeError("the rule's tile does not run")

    monkeypatch.setattr(tune_program, "tune", found)
    with pytest.raises(SystemExit, match="does not run"):
        main(["tune", "--write", str(tmp_path / "tiles.json")])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


def test_the_program_says_that_tiles_of_tf32_want_a_layer_of_tf32(tmp_path, capsys, measured) -> None:
    words = ["--shape", "64,16,24,8,2", "--precision", "tf32", "--write", str(tmp_path / "tiles.json")]
    for dtype, said in {
        "float32": 'fused_layer(precision="tf32", tiles=from_',
        "bfloat16": "fused_layer(tiles=",
    }.items():
        tune_program.main([*words, "--dtype", dtype])
        assert said in capsys.readouterr().out.replace("\n", "")
    exact = SIZE._replace(dtype=torch.float32)
    assert size_words(exact) != size_words(exact._replace(precision="tf32"))


@pytest.mark.parametrize("words", [["64,16,24,8,2", "64,32,24,8,2"], ["64,16,24,8,2", "--shape", "64,32,24,8,2"]])
def test_several_shapes_follow_one_flag_or_several(measured, words) -> None:
    main(["tune", "--shape", *words])
    assert [size.dim for size in measured[0][0]] == [16, 32]


def test_the_program_has_four_shapes_of_its_own_and_mlp_experts(measured) -> None:
    main(["tune", "--mlp"])
    assert [size.dim for size in measured[0][0]] == [shape.dim for shape in GPU_SHAPES.values()]
    assert not any(size.gated for size in measured[0][0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_program_without_a_device_says_so() -> None:
    with pytest.raises(SystemExit, match=r"moekit tune: tune measures kernels on a CUDA device; this machine has none"):
        main(["tune"])


def test_the_program_refuses_what_it_could_not_write_before_it_measures(tmp_path, measured) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for words, message in (
        (["--shape", "olmo"], r"moekit tune: shape 'olmo' is neither T,D,F,E,K"),
        (
            ["--write", str(tmp_path / "none" / "t.json")],
            r"none; make it first",
        ),
        (["--write", str(tmp_path / "bad.json")], r"bad\.json: no field 'format', no field 'entries'"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["tune", *words])
    assert not measured


def test_the_program_without_its_packages_says_which(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "moekit.recipes.tuning.program", None)
    with pytest.raises(SystemExit, match=r"moekit tune: .*it needs rich and tyro\. `moekit"):
        main(["tune"])


def test_tuning_needs_no_package_of_the_program() -> None:
    code = "import sys; sys.modules['tyro'] = sys.modules['rich'] = None; from moekit.recipes.tuning.tune import tune"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_origin_names_device_and_versions() -> None:
    version = importlib.metadata.version("triton")
    assert module._origin(torch.device("cpu")) == f"cpu, torch {torch.__version__}, triton {version}"


def test_the_program_hands_every_flag_on(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(tune_program, "tune", lambda sizes, **options: (asked.append(options), [fake_tuned()])[1])
    words = "tune --shape 64,16,24,8,2 --device cuda:1 --workers 3 --rounds 5 --precision tf32"
    main(words.split())
    given = {"device": torch.device("cuda:1"), "workers": 3, "rounds": 5, "precision": "tf32"}
    assert asked[0].items() >= given.items()


def test_sizes_are_tuned_as_those_of_the_device(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(module, "capability_of", lambda device: 8)
    monkeypatch.setattr(module, "is_narrow", lambda device: True)
    monkeypatch.setattr(module, "_origin", lambda device: f"measured on {device}")
    monkeypatch.setattr("moekit.recipes.tuning.compiling.try_job", lambda job: "")
    monkeypatch.setattr(module, "_tune_size", lambda size, *_, **__: (asked.append(size), fake_tuned(size))[1])
    here = {"device": "cpu", "precision": "tf32", "timer": lambda runs, rounds: {}, "workers": 0}
    [tuned] = tune([SIZE], **here, tell=lambda line: None)
    assert asked == [SIZE._replace(capability=8, narrow=True, precision="tf32")]
    assert tuned.entry.origin == "measured on cpu"


def test_a_size_is_told_of_once_and_before_the_next_is_measured(monkeypatch) -> None:
    monkeypatch.setattr("moekit.recipes.tuning.compiling.try_job", lambda job: "")
    log: list[object] = []
    monkeypatch.setattr(module, "_tune_size", lambda size, *_, **__: (log.append(size.dim), fake_tuned(size))[1])
    sizes = [SIZE, SIZE._replace(dim=64)]
    here = {"device": "cpu", "timer": lambda runs, rounds: {}, "workers": 0}
    found = tune(sizes, **here, tell=lambda line: None, done=log.append)
    assert log == [32, found[0], 64, found[1]]
    log.clear()
    tune(sizes, **here, tell=log.append)
    first, second = ("\n".join(lines_of(tuned)) for tuned in found)
    assert log == [log[0], 32, first, 64, second]


def test_a_process_that_dies_is_told_of_with_what_to_do() -> None:
    class Dead:
        def map(self, *_):
            raise BrokenProcessPool("gone")

    with pytest.raises(
        RuntimeError, match=r"a process that compiles kernels died.*__main__.*tune\(workers=2\), or 0 for none"
    ):
        _in_pool(Dead(), [])


def test_an_output_of_float32_that_is_off_by_a_thousandth_is_wrong() -> None:
    expected = torch.ones(4, 8)
    assert differs(expected * (1 + 5e-5), expected, product="down", total=4) == ""
    assert differs(expected * 1.001, expected, product="down", total=4).startswith("its output is wrong")
