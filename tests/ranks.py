"""A function on several ranks, processes of their own on this machine that gloo connects."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessContext, start_processes

from fuse.targets.cpp import compiler

LIMIT = 240  # seconds, after which no rank is waited for: far more than any test takes
# Ranks are forks of a process that has imported these, and done nothing: else imports would be most of what a test takes.
IMPORTED = "torch._dynamo torch._inductor.compile_fx torch.distributed.fsdp torch.distributed.tensor fuse transformers"
multiprocessing.set_forkserver_preload(IMPORTED.split())


@dataclass(frozen=True)
class Around:
    """The environment of the test that asks, and how it has kernels built: what its ranks are forks of is older."""

    environ: dict[str, str]
    flags: tuple[Any, Any]


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, limit: float = LIMIT) -> list[Any]:
    """What ``function(*args)`` returned on each rank, in order; it stands at the top of a module, and pickle takes it all.

    The ranks are the default group of torch.distributed. What one of them raises ends the others, and is raised here as torch
    does; one that has not ended after ``limit`` seconds is killed with the others, and TimeoutError raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        around = Around(dict(os.environ), (compiler.FLAGS, compiler.ISA_FLAGS))
        given = ranks, folder, limit, around, partial(function, *args)
        processes = start_processes(_run, given, ranks, join=False, start_method="forkserver")
        _wait(processes, limit)
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(ranks)]


def _wait(processes: ProcessContext, limit: float) -> None:
    end = time.monotonic() + limit
    try:
        while not processes.join(max(0, end - time.monotonic()), grace_period=5):
            if time.monotonic() >= end:
                raise TimeoutError(f"ranks had not ended after {limit:g} s")
    finally:
        for process in processes.processes:
            process.kill()


def _run(rank: int, ranks: int, folder: str, limit: float, around: Around, call: Callable[[], Any]) -> None:
    os.environ.clear()
    os.environ.update(around.environ)
    torch.set_num_threads(1)
    compiler.FLAGS, compiler.ISA_FLAGS = around.flags
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=limit))
    _result(folder, rank).write_bytes(pickle.dumps(call()))
    gc.collect()  # what still refers to the group, such as DDP, can wait for gloo's thread for ever if it is freed after it
    dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder, f"rank{rank}")
