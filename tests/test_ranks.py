"""The harness of tests on several ranks: what each returns comes back, and nothing waits for ever."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.multiprocessing import ProcessRaisedException


def summed(x: int) -> tuple[int, float]:
    total = torch.tensor(float(x + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), float(total)


def one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.barrier()


def one_sleeps() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_what_each_rank_returns_comes_back_in_order() -> None:
    assert run_ranks(summed, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_a_rank_that_raises_ends_the_others() -> None:
    before = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="of rank 1|closed by peer"):
        run_ranks(one_fails, 2)
    assert time.monotonic() - before < 40


def test_a_rank_that_does_not_end_is_killed() -> None:
    before = time.monotonic()
    with pytest.raises(TimeoutError, match="4 s"):
        run_ranks(one_sleeps, 2, limit=4)
    assert time.monotonic() - before < 40
