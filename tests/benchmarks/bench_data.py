"""How many tokens per second does the loader give, beside parsing the members alone, and beside what training takes?

"Training" is an optimizer step of the default model and batch on this machine. S3 is a server of moto's in this
process, so its rows also pay for serving. The rows are those of a whole optimizer step of one rank: order, reading,
parsing, checking, and with workers the way between processes.
"""

import json
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import pytest
import torch
from s3_server import s3_server

from moekit.lm.batches import Batching, Reading, RowFormat, open_stream
from moekit.lm.configs import load_config
from moekit.lm.orders import Order
from moekit.lm.shards import Shard, shard_bytes
from moekit.recipes import openlm
from moekit.recipes.automatic import automatic
from moekit.recipes.language_models import language_model
from moekit.recipes.steps import take_gradient

VOCAB_SIZE = 50_432
BATCH_SIZE = 64


class Data(NamedTuple):
    """Shards of random tokens, ``shards`` of ``sequences`` of ``length`` tokens; a measured call reads ``batches``."""

    length: int
    shards: int
    sequences: int
    batches: int

    def contents(self) -> list[bytes]:
        ids = torch.randint(VOCAB_SIZE, (self.shards, self.sequences, self.length)).tolist()
        return [shard_bytes(rows, first=0) for rows in ids]


DATA = {
    "sequences of 129 tokens": Data(129, shards=16, sequences=512, batches=32),
    "sequences of 2049 tokens": Data(2049, shards=16, sequences=64, batches=8),
}
TINY = Data(9, shards=2, sequences=64, batches=2)


class Row(NamedTuple):
    group: str
    name: str
    tokens_per_second: float
    fraction: float | None
    times_training: float | None


class Table:
    """Shows what was measured at the end of the session, as a plugin of pytest."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for group in dict.fromkeys(row.group for row in self.rows):
            terminalreporter.write_line(f"\n**{group}**\n\n| | tokens/s | of parsing | times training |")
            terminalreporter.write_line("| --- | --: | --: | --: |")
            for row in self.rows:
                if row.group == group:
                    fraction = "-" if row.fraction is None else f"{row.fraction:.2f}"
                    times = "-" if row.times_training is None else f"{row.times_training:,.0f}"
                    terminalreporter.write_line(f"| {row.name} | {row.tokens_per_second:,.0f} | {fraction} | {times} |")


@pytest.fixture(scope="session")
def table(pytestconfig) -> Table:
    table = Table()
    pytestconfig.pluginmanager.register(table)
    return table


@pytest.fixture
def measure(benchmark, table) -> Callable[..., None]:
    def run(body: Callable[[], object], *, group: str, name: str, tokens: int) -> None:
        benchmark.group = f"loading, {group}"
        benchmark(body)
        if benchmark.disabled:
            return
        speed = tokens / benchmark.stats.stats.median
        speeds = {row.name: row.tokens_per_second for row in table.rows if row.group == group} | {name: speed}
        fraction = speed / speeds["parsing"] if "parsing" in speeds else None
        times = speed / speeds["training"] if "training" in speeds else None
        table.rows.append(Row(group, name, speed, fraction, times))
        benchmark.extra_info.update(
            {"tokens/s": round(speed), "fraction of parsing": fraction, "times training": times}
        )

    return run


@pytest.fixture(params=DATA)
def data(request, benchmark) -> Data:
    return TINY if benchmark.disabled else DATA[request.param]


@pytest.fixture
def group(request) -> str:
    return request.node.callspec.params["data"]


@pytest.mark.benchmark(max_time=1.0)
def test_training(benchmark, measure, data, group):
    preset = "moekit_tiny" if benchmark.disabled else "moekit_cpu"
    model = language_model(load_config(preset, moe_freq=2, moe_num_experts=8), automatic(openlm()))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(model.config.vocab_size, (16, model.config.seq_len + 1))

    def body() -> None:
        optimizer.zero_grad()
        take_gradient(model, [ids], masked=False, statistics=False)
        optimizer.step()

    measure(body, group=group, name="training", tokens=16 * model.config.seq_len)


@pytest.mark.benchmark(max_time=0.5)
def test_parsing(measure, data, group):
    texts = [json.dumps(row).encode() for row in torch.randint(VOCAB_SIZE, (BATCH_SIZE, data.length)).tolist()]
    tokens = BATCH_SIZE * (data.length - 1)

    def body() -> torch.Tensor:
        return torch.stack([torch.frombuffer(array("q", json.loads(text)), dtype=torch.int64) for text in texts])

    measure(body, group=group, name="parsing", tokens=tokens)


@pytest.mark.benchmark(max_time=0.5)
def test_order(measure, data, group):
    order = Order([[data.sequences] * data.shards] * 2, [0.725, 0.275], seed=0)
    tokens = BATCH_SIZE * (data.length - 1)
    measure(lambda: order.step(BATCH_SIZE), group=group, name="order", tokens=tokens)


@pytest.mark.benchmark(max_time=2.0)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_loading(request, measure, data, group, place, workers):
    parent = request.getfixturevalue(place)(data)
    shards = [Shard(f"{parent}/{number:08d}.tar", data.sequences) for number in range(data.shards)]
    reading = Reading([shards], Batching(BATCH_SIZE, RowFormat(data.length - 1, VOCAB_SIZE)), seed=0)
    with closing(open_stream(reading, workers=workers)) as stream:
        next(stream)  # starts the workers

        def body() -> None:
            for _ in range(data.batches):
                next(stream)

        name = f"{place}, {workers} workers"
        measure(body, group=group, name=name, tokens=data.batches * BATCH_SIZE * (data.length - 1))


@pytest.fixture
def local(tmp_path) -> Callable[[Data], str]:
    def write(data: Data) -> str:
        for number, content in enumerate(data.contents()):
            (tmp_path / f"{number:08d}.tar").write_bytes(content)
        return str(tmp_path)

    return write


@pytest.fixture
def s3() -> Iterator[Callable[[Data], str]]:
    with s3_server() as client:

        def write(data: Data) -> str:
            client.create_bucket(Bucket="bench")
            for number, content in enumerate(data.contents()):
                client.put_object(Bucket="bench", Key=f"{number:08d}.tar", Body=content)
            return "s3://bench"

        yield write
