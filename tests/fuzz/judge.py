"""What a program must give: eager's values, gradients, errors, aliases and writes, no farther from float64 than eager is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fuzz.program import Program

Function = Callable[..., Any]
_OF_SCORES = ("exp", "exp_", "softmax", "log_softmax", "softmin", "logsumexp")
_HIDES = 1e3  # the least of the numbers that masks fill in
_ASTRAY = 16.0  # times eager's error, where that is so large that it is one draw of many


@dataclass(frozen=True)
class Outcome:
    """Of one call.

    named    the results, the inputs as they were left, and the gradients of all that wants one, or None
    facts    what must be eager's exactly: dtypes, whether gradients flow, who shares memory with whom, who was written to
    error    that was raised, if any; ``backward``: by autograd
    score    the largest number of which an exponential or a softmax was taken, but for what hides an entry
    """

    named: dict[str, Tensor | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    backward: bool = False
    score: float = 0.0


class _Scores(TorchFunctionMode):
    """Keeps the largest score of the calls within it."""

    largest = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _OF_SCORES and args and isinstance(args[0], Tensor):
            self.largest = max(self.largest, _largest(args[0].detach(), _HIDES))
        return func(*args, **(kwargs or {}))


def called(function: Function, program: Program, lengths: tuple[int, int], wide: bool = False) -> Outcome:
    inputs = program.drawn(lengths, wide)
    tensors = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    modules = {f"parameter {n}": t for x in inputs if isinstance(x, nn.Module) for n, t in x.named_parameters()}
    leaves = {n: x.requires_grad_(program.training) for n, x in (tensors | modules).items() if x.is_floating_point()}
    given = [x.clone() if isinstance(x, Tensor) else x for x in inputs]  # leaves must not be written to
    before, scores = _versions(given), _Scores()
    try:
        with torch.set_grad_enabled(program.training), scores if wide else nullcontext():
            found = [x for x in tree_leaves(function(*given)) if isinstance(x, Tensor)]
    except Exception as error:
        return Outcome(error=error)
    results = {f"result {i}": x for i, x in enumerate(found)}
    left = {f"{n} afterwards": given[int(n.split()[1])] for n in tensors}
    facts = _facts(results, left)
    facts["written"] = [
        n for n, x, old in zip(range(len(given)), given, before, strict=True) if getattr(x, "_version", 0) > old
    ]
    try:
        gradients = _gradients(found, list(leaves.values())) if program.training else []
    except Exception as error:
        return Outcome(error=error, backward=True)
    named = {f"the gradient of {n}": g for n, g in zip(leaves, gradients, strict=False)}
    return Outcome({n: x.detach() for n, x in (results | left).items()} | named, facts, score=scores.largest)


def _versions(inputs: Sequence[Any]) -> list[int]:
    return [x._version if isinstance(x, Tensor) else 0 for x in inputs]


def _facts(results: dict[str, Tensor], left: dict[str, Tensor]) -> dict[str, Any]:
    names, tensors = zip(*(results | left).items(), strict=True)
    memory = [x.untyped_storage().data_ptr() if x.numel() else -i for i, x in enumerate(tensors)]
    return {
        "shapes": [tuple(x.shape) for x in results.values()],
        "dtypes": [x.dtype for x in results.values()],
        "gradients flow": [x.requires_grad for x in results.values()],
        "memory is shared": [(a, b) for i, a in enumerate(names) for j, b in enumerate(names[:i]) if memory[i] == memory[j]],
    }


def _gradients(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    wanted = [x for x in results if x.requires_grad]
    generator = torch.Generator().manual_seed(9)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in wanted]
    return torch.autograd.grad(wanted, leaves, seeds, allow_unused=True) if wanted and leaves else [None] * len(leaves)


# ------------------------------------------------------------------------------------------------------------- judgement


def judge(program: Program, exact: Outcome, eager: Outcome, found: Outcome) -> str:
    """What is wrong with ``found``; "" where nothing is."""
    if eager.error is not None:
        return _judged_error(eager, found)
    if exact.error is not None:
        return ""  # says nothing of other dtypes
    if found.error is not None:
        own = isinstance(found.error, NotImplementedError) or "FlexAttentionAutogradOp" in str(found.error)
        refused = own and "flex" in program.text  # by PyTorch's own operator, where it is not fused
        return "" if refused else f"raises {type(found.error).__name__}: {found.error}"
    for name, fact in eager.facts.items():
        # Of an operator with several results torch keeps one of two equal calls, fx_graph_cse, and so two results are one
        if found.facts[name] != fact and (name, program.inner) != ("memory is shared", "inductor"):
            return f"{name}: {found.facts[name]}, eager's {fact}"
    bars = _Bars(program, exact, eager)
    for name in eager.named:
        if wrong := bars.wrong(name, exact.named[name], eager.named[name], found.named[name]):
            return f"{name}: {wrong}"
    return ""


def _judged_error(eager: Outcome, found: Outcome) -> str:
    """The same kind is raised. What autograd refuses since it was written to, a compiled program may have kept."""
    if eager.backward or isinstance(found.error, (type(eager.error), TorchDynamoException)):
        return ""
    raised = f"raises {type(found.error).__name__}: {found.error}" if found.error else "raises nothing"
    return f"{raised}, eager {type(eager.error).__name__}: {eager.error}"


class _Bars:
    """How far from float64 a tensor may be."""

    def __init__(self, program: Program, exact: Outcome, eager: Outcome) -> None:
        rounded = [program.dtype, *(["float32"] if "torch.float32" in program.text else [])]
        rounded += ["bfloat16"] if "autocast" in program.text else []
        self._eps = max(1e-13, *(torch.finfo(getattr(torch, x)).eps for x in rounded))  # float64 is what is exact here
        # A row that is NaN gives NaN to all gradients, of which eager's masked_fill keeps some: docs/numerics.md
        named = (*exact.named.items(), *eager.named.items())  # what is low in float64 may be infinite in float16
        self._nan_rows = any(x is not None and bool(x.isnan().any()) for n, x in named if "result" in n)
        # A kernel subtracts the largest score of a row, though the program does not
        self._finite = "= s.exp()" in program.text
        # Beside finfo.min, of float64 too, eager's log-sum-exp loses the number of keys: docs/numerics.md
        self._lost = "logsumexp" in program.text and "finfo" in program.text
        # A score of 100 is rounded by as much as 50 eps, and so is the logarithm of its weight
        self._score = exact.score
        self._factors = {f"the gradient of input {n}" for n in re.findall(r"s = s \* x(\d+)", program.text)}
        gradients = [x for n, x in exact.named.items() if "gradient" in n and x is not None]
        self._gradients = max([1.0, *(_largest(x) for x in gradients)])
        self._entries = max([1, *(x.numel() for x in exact.named.values() if x is not None)])

    def wrong(self, name: str, exact: Tensor | None, eager: Tensor | None, found: Tensor | None) -> str:
        if eager is None or found is None or exact is None:
            other = found if eager is None else eager
            return "" if other is None or not other.any() else "is none, or should be"
        if not eager.is_floating_point():
            return "" if torch.equal(eager, found) else "is not eager's"
        if (found.shape, found.dtype) != (eager.shape, eager.dtype):
            return f"{found.dtype} {tuple(found.shape)}, eager's {eager.dtype} {tuple(eager.shape)}"
        e, s, x = exact.double(), eager.double(), found.double()
        of_gradient = "gradient" in name
        scale = self._gradients if of_gradient else max(1.0, _largest(e))
        if _distance(s, e) > self._eps**0.5 * scale:  # eager has lost half of its digits, a kernel may have lost others
            beyond = x.isnan() | e.isnan() & ~s.isnan()  # the mean of a row may be infinite with float64's own lowest number
            return "" if (beyond | ((x - e).abs() <= _ASTRAY * _distance(s, e)) | (x == e)).all() else "far from float64"
        if (x.isnan() & ~s.isnan()).any() and not (of_gradient and self._nan_rows):
            return f"NaN where eager has none, in {int((x.isnan() & ~s.isnan()).sum())} of {x.numel()}"
        if (s.isnan() & e.isnan() & ~x.isnan()).any() and not (self._finite or of_gradient and self._nan_rows):
            return "no NaN where eager has NaN"
        if of_gradient and self._lost:
            return ""
        # Gradients take the mean of a row from the result, sum(grad * out), whose rounding adds up over a table's rows
        terms = max(64.0, math.sqrt(self._entries / max(1, x.numel()))) if of_gradient else 32.0
        # … each times the score, where that is what the gradient's tensor is a factor of
        terms = self._score + terms * (max(1.0, self._score) if name in self._factors else 1.0)
        error, allowed = _distance(x, e), 2 * _distance(s, e) + terms * self._eps * scale
        return "" if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def _largest(x: Tensor, below: float = 1e6) -> float:
    finite = x.double()[x.isfinite()].abs()
    return float(finite[finite < below].max()) if (finite < below).any() else 0.0


def _distance(x: Tensor, e: Tensor) -> float:
    """The largest difference; infinities that are equal have none, and NaN is spoken of elsewhere."""
    if not x.numel():
        return 0.0
    return float(torch.where((x == e) | x.isnan() | e.isnan(), 0.0, (x - e).abs()).max())
