"""fuse::attention: what torch asks of an op."""

from __future__ import annotations

import pytest
import torch
from specs import CASES, Problem
from torch._dynamo.testing import CompileCounterWithBackend

import fuse.op  # noqa: F401  (defines the op)
from fuse import reference

CHECKED = ("plain", "causal", "heads_last_output", "packed_qkv", "grouped_query", "window", "no_batch", "empty_batch")


def attention(made: Problem, operands: list[torch.Tensor] | None = None) -> torch.Tensor:
    text = made.spec.to_json()
    out: torch.Tensor = torch.ops.fuse.attention(operands or made.operands, made.sizes, text, "reference")
    return out


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name: str) -> None:
    made = CASES[name]("float32")
    arguments = (made.operands, made.sizes, made.spec.to_json(), "reference")
    torch.library.opcheck(torch.ops.fuse.attention.default, arguments)


@pytest.mark.parametrize("name", CASES)
def test_the_op_runs_every_case(name: str) -> None:
    made = CASES[name]("float32")
    made.check(attention(made))


@pytest.mark.parametrize("name", CASES)
def test_the_fake_has_the_layout_of_the_result(name: str) -> None:
    made = CASES[name]("bfloat16")
    real, fake = attention(made), attention(made, [t.to("meta") for t in made.operands])
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_one_graph_serves_every_length(inner: str) -> None:
    made = CASES["causal"]("float32")
    text = made.spec.to_json()

    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sizes = [*q.shape[:3], k.shape[2]]
        out: torch.Tensor = torch.ops.fuse.attention([q * 2, k, v], sizes, text, "reference")
        return out + 1

    counter = CompileCounterWithBackend(inner)
    compiled = torch.compile(program, backend=counter, dynamic=True, fullgraph=True)
    for length in (37, 20, 11):
        q, k, v = (t[:, :, :length].clone() for t in made.operands)
        torch.testing.assert_close(compiled(q, k, v), program(q, k, v), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_gradient_is_refused_rather_than_lost(backend: str) -> None:
    made = CASES["plain"]("float32")
    made.operands[0].requires_grad_()

    def program(*operands: torch.Tensor) -> torch.Tensor:
        return attention(made, list(operands))

    with pytest.raises(Exception, match="has no gradient"):
        torch.compile(program, backend=backend)(*made.operands)
    with torch.no_grad():
        made.check(program(*made.operands))


def test_inference_mode_and_autocast_leave_the_operands_as_they_are() -> None:
    made = CASES["plain"]("float32")
    expected = reference.attention(made.spec, made.operands, made.sizes, "eager")
    with torch.inference_mode(), torch.autocast("cpu"):
        assert torch.equal(attention(made), expected)


def test_an_unreadable_spec_is_an_error() -> None:
    with pytest.raises(ValueError):
        torch.ops.fuse.attention([torch.ones(2, 2)], [2, 2], "{", "reference")
