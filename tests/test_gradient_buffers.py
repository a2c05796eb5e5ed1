"""Which gradients a kernel writes whole, so that nobody has to fill them with zeros before."""

from __future__ import annotations

import pytest
import torch
from calls import wanted_of
from problems import K, Problem, Q, load
from specs import CASES

from fuse.ir.interval import in_call
from fuse.kernel.destinations import Unsupported, destinations
from fuse.targets.evaluate import Call
from fuse.targets.gradient_buffers import GradientBuffers, _shape_written


def whole(p: Problem) -> dict[str, tuple[int, ...]]:
    return GradientBuffers(p.spec, destinations(p.spec, wanted_of(p))).whole(p.sizes)


def read(p: Problem) -> dict[str, torch.Tensor]:
    """For each of query, key and value where it alone reads its operand, how often each element is read."""
    found = {}
    for name in ("query", "key", "value"):
        load = getattr(p.spec, name)
        if [p.spec.query.operand, p.spec.key.operand, p.spec.value.operand].count(load.operand) == 1:
            found[name] = p.operands[load.operand]
    return found


@pytest.mark.parametrize(
    "name", ["plain", "grouped_query", "multi_query", "heads_last_inputs", "key_stored_transposed", "no_batch"]
)
def test_all_of_each_operand_is_written(name: str) -> None:
    p = CASES[name]("float32")
    assert whole(p) == {name: tuple(x.shape) for name, x in read(p).items()} and len(read(p)) == 3


def test_a_diagonal_is_not_all_of_a_matrix() -> None:
    x, leaves = torch.empty(5, 5), in_call({"q_len": 5, "kv_len": 5})
    assert _shape_written(load(x, 0, Q, K), leaves) == (5, 5) and _shape_written(load(x, 0, Q, Q), leaves) is None


@pytest.mark.parametrize("name", ["packed_qkv", "no_keys", "no_queries", "empty_batch"])
def test_nothing_is_known_to_be_written_whole(name: str) -> None:
    """Three gradients in one tensor; or no kernel runs."""
    assert not whole(CASES[name]("float32"))


@pytest.mark.parametrize("name", CASES)
def test_each_element_is_read_of_what_is_said_to_be_written_whole(name: str) -> None:
    """A gradient is written where its operand is read."""
    p = CASES[name]("float32")
    try:
        claimed = whole(p)
    except Unsupported as why:
        pytest.skip(str(why))
    numbered = [torch.arange(x.numel(), dtype=torch.float64).view(x.shape) for x in p.operands]
    for to, shape in claimed.items():
        number = getattr(p.spec, to).operand
        operands = [n if i == number else x for i, (n, x) in enumerate(zip(numbered, p.operands, strict=True))]
        call = Call(p.spec, operands, p.sizes, exact=True)
        read = call.query((0, call.q_len)) if to == "query" else call.key() if to == "key" else call.value()
        assert shape != tuple(p.operands[number].shape) or read.unique().numel() == numbered[number].numel()


def test_a_larger_operand_is_filled() -> None:
    p = CASES["plain"]("float32")
    buffers = GradientBuffers(p.spec, destinations(p.spec, wanted_of(p)))
    larger = [torch.empty([n + 1 for n in x.shape]) for x in p.operands]
    assert not any(made.any() for made in buffers.made(larger, p.sizes, buffers.whole(p.sizes)).values())
