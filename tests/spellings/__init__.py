"""Small PyTorch programs that contain an attention, or something that only looks like one, in every spelling we know.

Each is a plain function of tensors, registered with what fuse must make of it. ``check`` compiles it and compares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fuse

Make = Callable[[], tuple[Any, ...]]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Spelling:
    """``program(*inputs())`` and what is expected: sites fused, and the reason of those that are reported and left alone.

    reason  the name of its class; "" where no site is left alone, or none of them is an attention
    grad    it is run as in training: gradients are compared, too
    random  results are not compared: no two runs draw the same numbers
    """

    program: Callable[..., Any]
    inputs: Make
    fused: int
    reason: str
    grad: bool
    random: bool


SPELLINGS: dict[str, Spelling] = {}


def qkv(
    shape: tuple[int, ...] = (2, 3, 9, 16), kv: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Query of ``shape``; key and value with ``kv`` positions instead of shape[-2]."""
    other = shape if kv is None else (*shape[:-2], kv, shape[-1])
    return rand(*shape, dtype=dtype), rand(*other, dtype=dtype, seed=1), rand(*other, dtype=dtype, seed=2)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spelling(
    fused: int = 1,
    *,
    shape: tuple[int, ...] = (2, 3, 9, 16),
    kv: int | None = None,
    dtype: torch.dtype = torch.float32,
    extra: Make = tuple,
    inputs: Make | None = None,
    reason: str = "",
    grad: bool = False,
    random: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a program of q, k, v and ``extra``, or of ``inputs`` where they are given; modules may be inputs."""

    def register(program: Callable[..., Any]) -> Callable[..., Any]:
        make = inputs or (lambda: (*qkv(shape, kv, dtype), *extra()))
        topic = program.__module__.rpartition(".")[2]
        name = f"{topic}.{program.__name__}"
        assert name not in SPELLINGS, name
        SPELLINGS[name] = Spelling(program, make, fused, reason, grad, random)
        return program

    return register


def named(program: Callable[..., Any], name: str) -> Callable[..., Any]:
    """For families of programs made in a loop."""
    program.__name__ = name
    return program


# --------------------------------------------------------------------------------------------------------- the harness


def check(
    name: str, inner: str = "eager", dynamic: bool | None = None, training: bool = False, target: str = "reference"
) -> None:
    """Fails unless the compiled program fuses what it should and gives eager's results, side effects included.

    target    what runs a fused site: the reference gives what its spec says, which a kernel may rely on to say more
    training  every float tensor among the inputs wants a gradient
    """
    case = SPELLINGS[name]
    case = replace(case, grad=case.grad or training)
    inputs = trained(case.inputs()) if training else case.inputs()
    try:
        wide, eager = run(case, case.program, widened(inputs)), run(case, case.program, copied(inputs))
    except RuntimeError:
        if training:  # eager cannot differentiate what was written in place
            return check(name, inner, dynamic, target=target)
        raise
    torch._dynamo.reset()
    fuse.reset()
    options: dict[str, str | int | bool | Callable[..., Any]] = {"inner": inner, "target": target}
    compiled = torch.compile(case.program, backend="fuse", dynamic=dynamic, options=options)
    got = run(case, compiled, copied(inputs))
    sites = fuse.report().sites
    found = [f"{s.where} " + ("fused" if s.recovered else f"{s.reason and s.reason.name}: {s.reason}") for s in sites]
    tolerance = max((TOLERANCE[x.dtype] for x in eager if isinstance(x, Tensor) and x.is_floating_point()), default=0.0)
    for result, expected, exact in zip(got, eager, wide, strict=True):
        if not case.random:
            compare(result, expected, exact, tolerance)
    assert sum(s.recovered for s in sites) == case.fused, f"expected {case.fused} fused; sites: {found}"
    assert target == "reference" or not any(s.by_reference for s in sites), found
    assert {s.reason.name for s in sites if s.reason} == ({case.reason} if case.reason else set()), found


def run(case: Spelling, program: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Any]:
    """Results, the inputs as the program left them, and the gradients of inputs and parameters."""
    torch.manual_seed(0)
    given = tree_map_only(Tensor, torch.clone, inputs) if case.grad else inputs  # what wants a gradient may be written to
    with torch.set_grad_enabled(case.grad):
        results = program(*given)
    return [x for x in tree_leaves((results, given, gradients(results, inputs))) if not isinstance(x, nn.Module)]


def gradients(results: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Of all finite results together, for every input and parameter that wants one."""
    outputs = [x for x in tree_leaves(results) if isinstance(x, Tensor) and x.requires_grad and x.grad_fn is not None]
    if not outputs:
        return []
    torch.stack([x[x.isfinite()].double().sin().sum() for x in outputs]).sum().backward()
    leaves = [t for x in tree_leaves(inputs) for t in (x.parameters() if isinstance(x, nn.Module) else [x])]
    return [t.grad for t in leaves if isinstance(t, Tensor) and t.grad is not None]


def trained(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    wanted: tuple[Any, ...] = tree_map_only(Tensor, lambda t: t.requires_grad_(t.is_floating_point()), inputs)
    return wanted


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return copy.deepcopy(inputs)


def widened(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs in float64."""
    tensors = tree_map_only(Tensor, _widened, copy.deepcopy(inputs))
    result: tuple[Any, ...] = tree_map_only(nn.Module, lambda m: m.double(), tensors)
    return result


def _widened(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def compare(result: Any, eager: Any, exact: Any, tolerance: float) -> None:
    """``result`` is what eager gives, and no farther from ``exact`` than eager is, up to the last few bits."""
    if not isinstance(eager, Tensor) or not eager.is_floating_point():
        assert torch.equal(result, eager) if isinstance(eager, Tensor) else result == eager
        return
    assert (result.shape, result.dtype) == (eager.shape, eager.dtype)
    if result.numel() == 0:
        return
    dtype, result, eager, exact = eager.dtype, result.double(), eager.double(), exact.double()
    spared = eager.isnan() & exact.isfinite() & ~result.isnan()  # eager overflowed, where a kernel need not
    eager = torch.where(spared, exact, eager)
    assert torch.equal(result.isnan(), eager.isnan()), "NaN where eager has none, or none where eager has NaN"
    result, eager, exact = result.nan_to_num(), eager.nan_to_num(), exact.nan_to_num()
    size = 1 + eager.abs().amax()
    assert (result - eager).abs().amax() <= tolerance * size, f"differs from eager by {(result - eager).abs().amax():.3g}"
    allowed = 3 * (eager - exact).abs().amax() + 8 * torch.finfo(dtype).eps * size
    assert (result - exact).abs().amax() <= allowed, f"error {(result - exact).abs().amax():.3g}, allowed {allowed:.3g}"
