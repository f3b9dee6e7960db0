"""Run a function on several ranks, each a process of its own, forked from a server that imports torch once."""

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["pytest", "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
PRELOADED += ["torch.distributed.tensor", "moekit", "moekit.recipes.train"]


def run_ranks(function: str, num_ranks: int, *arguments: Any, limit: float = 60.0, device: str = "cpu") -> list[Any]:
    """Call ``module:function``(world, *arguments) on every rank, and return what they return, in rank order.

    Args:
        function: importable where the tests' folder is on the path; gets a ``World``.
        num_ranks: processes.
        arguments: handed on; they must pickle.
        limit: seconds after which all ranks are killed.
        device: cpu, over gloo; or cuda, a GPU for each rank, over NCCL.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if they take too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        processes = [
            context.Process(
                target=_rank, args=(function, rank, num_ranks, folder, writer, arguments, device), daemon=True
            )
            for rank, (_, writer) in enumerate(pipes)
        ]
        for process, (_, writer) in zip(processes, pipes, strict=True):
            process.start()
            writer.close()
        try:
            return _collect([reader for reader, _ in pipes], limit)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(readers: list[Any], limit: float) -> list[Any]:
    deadline, left, results = time.monotonic() + limit, dict(enumerate(readers)), {}
    while left:
        ready = wait(list(left.values()), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(left)} of {len(readers)} did not end within {limit} s"
        for rank in [rank for rank, reader in left.items() if reader in ready]:
            try:
                fine, result = left.pop(rank).recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert fine, f"rank {rank}:\n{result}"
            results[rank] = result
    return [results[rank] for rank in range(len(readers))]


def _rank(
    function: str, rank: int, size: int, folder: str, writer: Any, arguments: tuple[Any, ...], device: str
) -> None:
    from moekit.parallel import World

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # programs would each take the GPU of its rank
    os.environ.update(MASTER_ADDR="127.0.0.1", COLUMNS="160", MOEKIT_CACHE=f"{folder}/cache")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = dist.FileStore(f"{folder}/store", size)
    own = torch.device("cpu") if device == "cpu" else torch.device(device, rank)
    if device == "cuda":
        torch.cuda.set_device(own)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        module, name = function.split(":")
        result = getattr(importlib.import_module(module), name)(World(rank, size, own, size), *arguments)
        dist.barrier()
        writer.send((True, result))
    except BaseException:
        writer.send((False, traceback.format_exc()))
    finally:
        writer.close()
