import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.experts.tile_files import FORMAT, layer_tiles, parse_tiles, read_tiles, shipped, table_text
from moekit.experts.tile_tables import FARTHEST, TileEntry, entry_of, from_table, merged
from moekit.experts.tiles import (
    NARROW_BYTES,
    LayerSize,
    LayerTiles,
    Tile,
    capability_of,
    check_tiles,
    is_narrow,
    ruled_tiles,
)

SIZE = LayerSize(torch.bfloat16, 131072, 64, 2048, 1024, gated=True, capability=9)


def marked(band: int, size: LayerSize = SIZE) -> TileEntry:
    """Make an entry that is told apart by the band of its tiles."""
    tiles = LayerTiles(*(tile._replace(band=band) for tile in ruled_tiles(size)))
    return entry_of(size, tiles, origin=f"mark {band}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [10, 4096])
def test_the_rule_gives_tiles_that_fit(dtype: torch.dtype, rows: int) -> None:
    tiles = ruled_tiles(SIZE._replace(dtype=dtype, assignments=64 * rows))
    assert check_tiles(tiles) is tiles
    assert (tiles.down.m == 128) == (rows == 4096 and dtype != torch.float32)
    assert (dtype == torch.float32) or 2 * tiles.up.n <= tiles.down.n


@pytest.mark.parametrize(("capability", "narrow"), [(8, False), (9, False), (8, True), (12, True)])
@pytest.mark.parametrize(("rows", "gated"), [(10, True), (4096, True), (4096, False)])
def test_float32_has_wide_tiles_where_units_of_matrices_multiply(rows, gated, capability, narrow) -> None:
    exact = SIZE._replace(dtype=torch.float32, assignments=64 * rows, gated=gated, capability=capability, narrow=narrow)
    units = exact._replace(precision="tf32")
    for size, m in ((exact, 64), (units, 64 if rows == 10 else 128)):
        tiles = check_tiles(ruled_tiles(size))
        assert tiles.down.m == m
        for name, tile in tiles._asdict().items():
            sums = tile.m * tile.n * (1 + (gated and name == "up"))
            assert sums <= 4096 * tile.warps, f"{name}: sums that no registers hold"


@pytest.mark.parametrize(("capability", "dtype", "rows"), [(9, torch.bfloat16, 4096), (9, torch.float16, 49)])
def test_the_rule_parts_the_warps_on_hopper_alone(capability: int, dtype: torch.dtype, rows: int) -> None:
    size = SIZE._replace(capability=capability, dtype=dtype, assignments=64 * rows)
    assert all(tile.specialized for tile in check_tiles(ruled_tiles(size)))
    for other in ({"capability": 8}, {"capability": 10}, {"dtype": torch.float32}, {"assignments": 64 * 48}):
        assert not any(tile.specialized for tile in ruled_tiles(size._replace(**other))), other


def test_float32_tiles_are_those_that_were_measured() -> None:
    """As docs/lab.md has them."""
    exact = SIZE._replace(dtype=torch.float32, capability=9)
    low, wide, alone = Tile(64, 64, 32, 4, 3), Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 8, 3)
    for gated in (True, False):
        assert ruled_tiles(exact._replace(gated=gated)) == LayerTiles(*[alone] * 4, *[wide] * 2)
    units = exact._replace(precision="tf32")
    assert ruled_tiles(units) == LayerTiles(wide, *[wide._replace(stages=4)] * 3, *[Tile(128, 256, 32, 8, 3)] * 2)
    assert ruled_tiles(units._replace(assignments=640))[:4] == (low,) * 4
    assert ruled_tiles(units._replace(capability=8)) == LayerTiles(*[wide] * 6)
    assert ruled_tiles(units._replace(capability=10)) == LayerTiles(*[wide] * 6)
    assert ruled_tiles(units._replace(capability=8, narrow=True, gated=False)).up == Tile(128, 64, 32, 8, 3)
    assert ruled_tiles(units._replace(capability=12, narrow=True))[4:] == (low, low)
    narrow = ruled_tiles(units._replace(capability=8, narrow=True))
    assert narrow == LayerTiles(Tile(128, 32, 32, 8, 3), *[Tile(128, 64, 32, 8, 3)] * 3, low, low)


def test_a_table_comes_back_from_its_text(tmp_path) -> None:
    overlapping = SIZE._replace(dtype=torch.float32, capability=8, gated=False)
    table = (marked(4), marked(8, overlapping), marked(2, SIZE._replace(dim=100)))
    assert table[0].tiles.down.overlap
    (tmp_path / "tiles.json").write_text(table_text(table))
    assert read_tiles(tmp_path / "tiles.json") == table
    assert json.loads(table_text(table))["entries"][0]["tiles"]["up"]["band"] == 4
    assert max(map(len, table_text(table).splitlines())) < 200  # to be read


def test_a_table_of_anything_but_entries_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from_table: the table holds 't'; expected entries, .* with read_tiles"):
        from_table("tiles.json")


def test_a_table_is_looked_through_once_for_each_size() -> None:
    asked = []
    tiles = from_table([], lambda size: (asked.append(size), ruled_tiles(size))[1])
    sizes = [SIZE, SIZE._replace(assignments=1), SIZE]
    assert [tiles(size) for size in sizes] == [ruled_tiles(size) for size in sizes]
    assert asked == sizes[:2]


def test_the_shipped_table_is_read_once_and_has_entries_that_fit() -> None:
    assert shipped() is shipped()
    for entry in shipped():
        check_tiles(entry.tiles)
        assert entry.origin


def test_what_is_shipped_is_the_default_and_the_rule_takes_the_rest(ship) -> None:
    ship(marked(3))
    assert layer_tiles(SIZE) == marked(3).tiles
    elsewhere = SIZE._replace(capability=0)
    assert layer_tiles(elsewhere) == ruled_tiles(elsewhere)


def test_the_nearest_entry_is_taken() -> None:
    wide, high, few = SIZE._replace(dim=4096), SIZE._replace(hidden=4096), SIZE._replace(assignments=4096)
    tiles = from_table([marked(2, wide), marked(4, high), marked(8, few), marked(16)])
    assert [tiles(size).up.band for size in (wide, high, few, SIZE)] == [2, 4, 8, 16]
    assert tiles(SIZE._replace(dim=3000)).up.band == 2
    assert tiles(SIZE._replace(dim=2800)).up.band == 16
    assert tiles(SIZE._replace(hidden=2100)).up.band == 4
    assert tiles(SIZE._replace(assignments=64 * 255)).up.band == 8  # octaves: 7 is 1 from 6, and 4 from 11
    assert tiles(SIZE._replace(experts=128, assignments=262144)).up.band == 16  # E alone changes nothing


def test_of_equally_near_entries_the_first_is_taken() -> None:
    near = [marked(2, SIZE._replace(dim=1024)), marked(4, SIZE._replace(dim=4096))]
    assert from_table(near)(SIZE).up.band == 2
    assert from_table(near[::-1])(SIZE).up.band == 4


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32},
        {"gated": False},
        {"capability": 8},
        {"capability": 0},
        {"dim": 2048 * 5},
        {"dim": 4096, "hidden": 512, "assignments": 64 * 1024},
    ],
    ids=str,
)
def test_what_is_unlike_or_far_is_left_to_the_rule(other: dict[str, Any]) -> None:
    size = SIZE._replace(**other)
    assert from_table([marked(4)])(size) == ruled_tiles(size)
    assert from_table([marked(4)], otherwise=lambda size: marked(1).tiles)(size).up.band == 1


def test_an_entry_serves_up_to_its_limit() -> None:
    assert FARTHEST == 2
    tiles = from_table([marked(4)])
    assert tiles(SIZE._replace(dim=4096, hidden=512)).up.band == 4
    assert tiles(SIZE._replace(assignments=64 * 512)).up.band == 4
    assert tiles(SIZE._replace(assignments=64 * 511)) == ruled_tiles(SIZE)
    assert tiles(SIZE._replace(dtype=torch.float16)).up.band == 4  # the same number of bytes


def test_an_entry_serves_products_of_its_precision() -> None:
    exact = SIZE._replace(dtype=torch.float32)
    fast = exact._replace(precision="tf32")
    tiles = from_table([marked(4, fast)])
    assert tiles(fast).up.band == 4
    assert tiles(exact) == ruled_tiles(exact)
    assert [entry.precision for entry in merged([marked(4, fast)], [marked(8, exact)])] == ["ieee", "tf32"]
    half = SIZE._replace(precision="tf32")  # which 16-bit numbers do not look at
    assert from_table([marked(4)])(half).up.band == from_table([marked(4, half)])(SIZE).up.band == 4


@pytest.mark.parametrize("assignments", [0, 1])
def test_a_layer_of_no_or_one_row_has_tiles(assignments: int) -> None:
    size = SIZE._replace(assignments=assignments)
    assert from_table([marked(4)])(size) == ruled_tiles(size)
    assert from_table([marked(4, size)])(size).up.band == 4


def test_merging_replaces_the_same_layer_and_sorts() -> None:
    small = SIZE._replace(dim=512)
    table = merged([marked(1), marked(2, small)], [marked(4), marked(8, SIZE._replace(capability=8))])
    assert [(entry.capability, entry.dim, entry.origin) for entry in table] == [
        (8, 2048, "mark 8"),
        (9, 512, "mark 2"),
        (9, 2048, "mark 4"),
    ]


def test_only_cuda_has_a_capability(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert [capability_of(torch.device(name)) for name in ("cpu", "meta", "cuda:1")] == [0, 0, 9]


def test_an_amd_card_is_not_taken_for_hopper(monkeypatch) -> None:
    pytest.importorskip("triton")
    from moekit._operators_triton import has_tma

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))  # as ROCm counts an MI300
    card = torch.device("cuda:0")
    assert (capability_of(card), has_tma(card)) == (9, True)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert (capability_of(card), has_tma(card)) == (0, False)


@pytest.mark.parametrize(
    ("capability", "narrow"),
    [((8, 0), False), ((8, 6), True), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((12, 0), True)],
)
def test_cards_of_little_shared_memory_are_known(monkeypatch, capability: tuple[int, int], narrow: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert is_narrow(torch.device("cuda")) is narrow
    assert not is_narrow(torch.device("cpu"))


CARDS = [(86, "bf16"), (90, "tf32"), (80, "bf16"), (100, "bf16"), (120, "tf32")]  # 120 has the tiles of 86 in bf16
QUICK = 2  # the first of them, of little and of much shared memory; the others are for --full


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory, full: bool) -> list[list[dict[str, int]]]:
    """Compile the kernels for the cards in one process; return what they take of shared memory."""
    pytest.importorskip("triton")
    program = [sys.executable, "-W", "ignore", Path(__file__).parent.parent / "plain_launches.py"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    words = [str(word) for card in CARDS[: None if full else QUICK] for word in card]
    done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CARDS)), ids=map(str, CARDS))
def test_the_rule_fits_the_shared_memory_of_cards(number: int, taken: list[list[dict[str, int]]], full: bool) -> None:
    if number >= QUICK and not full:
        pytest.skip("is for --full")
    bound = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}.get(CARDS[number][0], NARROW_BYTES)
    for found in taken[number]:
        assert tuple(found) == LayerTiles._fields
        assert {name: size for name, size in found.items() if size > bound} == {}


def test_an_entry_that_cannot_fit_is_not_taken_on_a_card_of_little_shared_memory() -> None:
    tiles, narrow = from_table([marked(4)]), SIZE._replace(narrow=True)
    assert tiles(SIZE).up.band == 4
    assert tiles(narrow) == ruled_tiles(narrow) != ruled_tiles(SIZE)
    assert check_tiles(ruled_tiles(narrow)).up.m == 128
    assert from_table([marked(4, narrow)])(narrow).up.band == 4


@pytest.mark.parametrize("dynamic", [False, True])
def test_choosing_compiles_to_one_graph(ship, dynamic: bool) -> None:
    ship(marked(2, SIZE._replace(assignments=1024)))

    def run(x, tiles):
        size = SIZE._replace(assignments=x.numel(), capability=9 + capability_of(x.device))
        return x * check_tiles(tiles(size)).up.band

    mine = from_table([marked(4), marked(8, SIZE._replace(assignments=64 * 64))])
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=dynamic)
    for rows in (64 * 20, 64 * 21, 64 * 700):
        for tiles in (mine, layer_tiles):
            assert torch.equal(compiled(torch.ones(rows), tiles), run(torch.ones(rows), tiles))


def broken(change: Callable[[dict[str, Any]], Any]) -> str:
    """Return the text of a table whose second entry is changed."""
    content = json.loads(table_text([marked(4), marked(8)]))
    change(content["entries"][1])
    return json.dumps(content)


MEND = r"Correct it, or remove it and let moekit tune --write make it again\."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda e: e.update(colour="red"),
            r"t\.json, entry 2: unknown field 'colour'; expected the fields cap",
        ),
        (lambda e: e.pop("dim"), r"t\.json, entry 2: no field 'dim'; expected the fields capability, "),
        (lambda e: e.update(dim="wide"), r't\.json, entry 2, dim: "wide"; expected a whole number, at least 1\.'),
        (lambda e: e.update(experts=0), r"t\.json, entry 2, experts: 0; expected a whole number, at least 1\."),
        (lambda e: e.update(experts=True), r"t\.json, entry 2, experts: true; expected a whole number, at least 1\."),
        (lambda e: e.update(gated=1), r"t\.json, entry 2, gated: 1; expected true or false\."),
        (lambda e: e.update(precision="fp8"), r't\.json, entry 2, precision: "fp8"; expected "ieee" or "tf32"\.'),
        (lambda e: e.update(origin=None), r"t\.json, entry 2, origin: null; expected a text\."),
        (lambda e: e["tiles"].pop("up"), r"t\.json, entry 2, tiles: no field 'up'; expected the fields up, down, "),
        (lambda e: e.update(tiles=[]), r"t\.json, entry 2, tiles: \[\]; expected an object of the fields up, down, "),
        (
            lambda e: e["tiles"]["down"].update(n=96),
            r"t\.json, entry 2, tiles\.down\.n: 96; expected a power of two, at least 16\.",
        ),
        (
            lambda e: e["tiles"]["down"].update(k=8),
            r"t\.json, entry 2, tiles\.down\.k: 8; expected a power of two, at least 16\.",
        ),
        (
            lambda e: e["tiles"]["down"].update(warps=3),
            r"t\.json, entry 2, tiles\.down\.warps: 3; expected a power of two, at least 1\.",
        ),
        (
            lambda e: e["tiles"]["grad_up"].update(stages=0),
            r"t\.json, entry 2, tiles\.grad_up\.stages: 0; expected a whole number, at least 1\.",
        ),
        (
            lambda e: e["tiles"]["up"].update(overlap="no"),
            r't\.json, entry 2, tiles\.up\.overlap: "no"; expected true or false\.',
        ),
        (
            lambda e: e["tiles"]["grad_up"].update(specialized=1),
            r"t\.json, entry 2, tiles\.grad_up\.specialized: 1; expected true or false\.",
        ),
        (lambda e: e["tiles"]["up"].pop("m"), r"t\.json, entry 2, tiles\.up: no field 'm'; expected the fields m, n, "),
    ],
)
def test_a_wrong_entry_is_named(change, words: str) -> None:
    with pytest.raises(ValueError, match=words + ".*" + MEND):
        parse_tiles(broken(change), name="t.json")


def test_tiles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"t\.json, entry 2: .*m = \[64, 128\].*Take the same m in the first four"):
        parse_tiles(broken(lambda e: e["tiles"]["up"].update(m=64)), name="t.json")
    with pytest.raises(ValueError, match=r"t\.json, entry 2: .*k = \[32, 64\].*the same k in the last two"):
        parse_tiles(broken(lambda e: e["tiles"]["grad_down"].update(k=32)), name="t.json")
    tiles = ruled_tiles(SIZE._replace(capability=9))
    low, shallow = ([tile._replace(**change) for tile in tiles] for change in ({"m": 64}, {"k": 32}))
    with pytest.raises(ValueError, match=r"m = 64, specialized; expected m = 128, or no such tile"):
        check_tiles(LayerTiles(*low))
    with pytest.raises(ValueError, match=r"k = 32, specialized; expected k = 64, or no such tile"):
        check_tiles(LayerTiles(*shallow))


PRODUCTS = ", ".join(LayerTiles._fields)


@pytest.mark.parametrize(
    ("product", "field", "value", "expected"),
    [
        ("up", "m", 24, "a power of two, at least 16"),
        ("down", "n", 8, "a power of two, at least 16"),
        ("grad_up", "k", 24, "a power of two, at least 16"),
        ("grad_hidden", "k", 64.0, "a power of two, at least 16"),
        ("grad_rows", "warps", 0, "a power of two, at least 1"),
        ("grad_rows", "warps", 3, "a power of two, at least 1"),
        ("grad_down", "stages", 0, "a whole number, at least 1"),
        ("grad_down", "stages", True, "a whole number, at least 1"),
        ("up", "band", 0, "a whole number, at least 1"),
        ("up", "band", -1, "a whole number, at least 1"),
        ("down", "band", 2.5, "a whole number, at least 1"),
        ("down", "overlap", 1, "true or false"),
        ("grad_up", "specialized", None, "true or false"),
    ],
)
def test_tiles_that_no_kernel_takes_are_named(product: str, field: str, value: Any, expected: str) -> None:
    tiles = ruled_tiles(SIZE)
    wrong = tiles._replace(**{product: getattr(tiles, product)._replace(**{field: value})})
    words = rf"^the tiles of a layer: {product}\.{field} = {value}; expected {expected}\. Correct what chooses them\.$"
    with pytest.raises(ValueError, match=words):
        check_tiles(wrong)


def test_bands_and_stages_are_any_whole_numbers() -> None:
    tiles = LayerTiles(*(tile._replace(band=3, stages=5, warps=1) for tile in ruled_tiles(SIZE)))
    assert check_tiles(tiles) is tiles


@pytest.mark.parametrize("wrong", [Tile(64, 64, 64, 4, 3), tuple(ruled_tiles(SIZE)), None, {"up": 1}])
def test_what_are_no_tiles_of_a_layer_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=rf"^the tiles of a layer: .*; expected LayerTiles, .* {PRODUCTS}\."):
        check_tiles(wrong)


def test_what_is_no_tile_of_a_product_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the tiles of a layer: grad_rows = \(64, 64\); expected a Tile\.$"):
        check_tiles(ruled_tiles(SIZE)._replace(grad_rows=(64, 64)))  # type: ignore[arg-type]


def test_a_choice_by_a_table_is_pickled_with_it() -> None:
    tiles = from_table([marked(4)])
    again = pickle.loads(pickle.dumps(tiles))
    for size in (SIZE, SIZE._replace(dim=64)):
        assert again(size) == tiles(size)
    assert again(SIZE).up.band == 4
    assert copy.deepcopy(tiles)(SIZE).up.band == 4


def test_a_choice_hashes_no_table_in_a_call() -> None:
    class Counted(TileEntry):
        def __hash__(self) -> int:
            raise AssertionError("a table was hashed")

    tiles = from_table([Counted(*marked(4))])
    assert tiles(SIZE) is tiles(SIZE) is not None
    assert tiles(SIZE).up.band == 4


def test_tables_do_not_answer_for_each_other() -> None:
    one, other = from_table([marked(4)]), from_table([marked(8)])
    assert [each(SIZE).up.band for each in (one, other, one)] == [4, 8, 4]


def test_what_is_no_table_is_refused(tmp_path) -> None:
    for text, words in {
        "{": r"t\.json: no JSON: .*line 1 column 2.*",
        "[" * 100_000: r"t\.json: no JSON: maximum recursion depth exceeded",
        "1" * 5000: r"t\.json: no JSON: Exceeds the limit",
        "[]": r"t\.json: \[\]; expected an object of the fields format, entries\.",
        '{"format": "moekit tiles 0", "entries": []}': rf't\.json, format: "moekit tiles 0"; expected "{FORMAT}"\.',
        f'{{"format": "{FORMAT}", "entries": 3}}': r"t\.json, entries: 3; expected a list\.",
        f'{{"format": "{FORMAT}", "entries": [3]}}': r"t\.json, entry 1: 3; expected an object of the fields capab",
    }.items():
        with pytest.raises(ValueError, match=words + ".*" + MEND):
            parse_tiles(text, name="t.json")
    with pytest.raises(
        ValueError, match=r'2"; .* older version, .* do not say a precision\. Remove it and let moekit tun'
    ):
        parse_tiles('{"format": "moekit tiles 2", "entries": []}', name="t.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_tiles(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.json: no UTF-8 text: .* in position 0: .*" + MEND):
        read_tiles(tmp_path / "binary.json")


def test_tiles_of_one_height_each() -> None:
    tile = Tile(m=16, n=16, k=16, warps=4, stages=2)
    with pytest.raises(ValueError, match=r"m = \[16, 32\] of those over grouped rows, k = \[16\]"):
        check_tiles(LayerTiles(tile._replace(m=32), *[tile] * 5))


@pytest.mark.parametrize("product", LayerTiles._fields)
def test_one_specialized_tile_is_enough_to_ask_for_its_size(product: str) -> None:
    plain = LayerTiles(*(tile._replace(m=64, k=32, specialized=False) for tile in ruled_tiles(SIZE)))
    assert check_tiles(plain) is plain
    one = plain._replace(**{product: getattr(plain, product)._replace(specialized=True)})
    with pytest.raises(ValueError, match=r"(m = 64|k = 32), specialized; expected"):
        check_tiles(one)


def test_a_layer_without_experts_has_tiles_too() -> None:
    none = SIZE._replace(assignments=0, experts=0)
    table = [entry_of(none, ruled_tiles(SIZE), origin="none")]
    assert table[0].rows_per_expert == 1
    assert from_table(table)(none) == ruled_tiles(SIZE)


@pytest.mark.parametrize("assignments", [0, 1, 63])
def test_an_entry_of_less_than_a_row_per_expert_is_written_and_read(assignments: int) -> None:
    entry = entry_of(SIZE._replace(assignments=assignments), ruled_tiles(SIZE), origin="few")
    assert entry.rows_per_expert == 1
    assert parse_tiles(table_text([entry]), name="t.json") == (entry,)


def test_products_of_two_matrices_do_not_overlap() -> None:
    plain = SIZE._replace(capability=8)
    tiles = ruled_tiles(plain)
    assert [tile.overlap for tile in tiles] == [False, True, True, False, False, False]
    assert (tiles.grad_rows.stages, tiles.down.stages) == (3, 4)
    assert ruled_tiles(plain._replace(gated=False)).grad_rows == tiles.down


def test_an_entry_fits_a_card_of_little_shared_memory_by_the_loads_in_flight() -> None:
    narrow, tile = SIZE._replace(narrow=True), Tile(m=128, n=128, k=64, warps=8, stages=4)  # 3 x 32 KiB
    halved, whole = LayerTiles(tile._replace(n=64), *[tile] * 5), LayerTiles(*[tile] * 6)
    for gated, tiles, taken in ((True, halved, True), (True, whole, False), (False, whole, True)):
        size = narrow._replace(gated=gated)
        found = from_table([entry_of(size, tiles, origin="")])(size)
        assert found == (tiles if taken else ruled_tiles(size))
