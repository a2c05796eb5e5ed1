"""A program as text: a function of tensors, what draws these, and how it is compiled."""

from __future__ import annotations

import hashlib
import linecache
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reported_programs import attention
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

WRITTEN_OUT = """from types import FunctionType

from reported_programs import attention  # in tests/; eager has no FlexAttention that trains on CPUs

plain = FunctionType(program.__code__, globals() | {"flex_attention": attention})"""
# Global tensors, which fuse may know as formulas; the last is none.
STORED = """LOWER = torch.ones(64, 64).tril()
UPPER = torch.full((64, 64), -math.inf).triu(2)
NEAR = torch.ones(64, 64, dtype=torch.bool).tril(3).triu(-2)
PLACES = torch.arange(64)
HOLES = (torch.arange(4096) % 7).view(64, 64)"""
SCRIPT = """import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils._pytree import tree_leaves

dtype = torch.{dtype}
{stored}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def randint(low, high, *shape):
    return torch.randint(low, high, shape)


def coin(*shape):
    return torch.rand(shape) < 0.6


def mha(embed, heads, **options):
    return nn.MultiheadAttention(embed, heads, **options).to(dtype)


{function}


def run(f, wide, n, m):
    torch.manual_seed(0)
    inputs = [{inputs}]
    inputs = [x.double() if wide and (isinstance(x, nn.Module) or x.is_floating_point()) else x for x in inputs]
    leaves = [t for x in inputs for t in (x.parameters() if isinstance(x, nn.Module) else [x]) if t.is_floating_point()]
    given = [x.requires_grad_({training} and x.is_floating_point()).clone() if torch.is_tensor(x) else x for x in inputs]
    with torch.set_grad_enabled({training}):
        results = [x for x in tree_leaves(f(*given)) if torch.is_tensor(x)]
    graded = [x for x in results if x.requires_grad]
    torch.manual_seed(1)
    seeds = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in graded]
    grads = torch.autograd.grad(graded, leaves, seeds, allow_unused=True, materialize_grads=True) if graded else []
    return [x.detach().double() for x in (*results, *(x for x in given if torch.is_tensor(x)), *grads)]


options = {{"inner": "{inner}", "target": "{target}"}}
compiled = torch.compile(program, backend="fuse", dynamic={dynamic}, options=options)
{plain}
for n, m in {lengths}:
    exact, eager, found = run(plain, True, n, m), run(plain, False, n, m), run(compiled, False, n, m)
    for e, s, x in zip(exact, eager, found):
        print(tuple(e.shape), "error", (x - e).abs().max().item(), "eager's", (s - e).abs().max().item())
"""


@dataclass(frozen=True)
class Program:
    """
    inputs    name and expression of each, in terms of the lengths ``n`` and ``m``; see ``Drawing``
    body      lines of the function of them, which end in a return
    lengths   of queries and keys in each call; sizes are symbols if there are several
    dtype     that of floating-point inputs
    training  gradients are taken
    """

    inputs: tuple[tuple[str, str], ...]
    body: tuple[str, ...]
    lengths: tuple[tuple[int, int], ...] = ((9, 9),)
    dtype: str = "float32"
    training: bool = False
    inner: str = "eager"

    @property
    def dynamic(self) -> bool:
        return len(self.lengths) > 1

    @property
    def text(self) -> str:
        head = f"def program({', '.join(name for name, _ in self.inputs)}):"
        return "\n".join([head, *(f"    {line}" for line in self.body)])

    def function(self, wide: bool = False, plain: bool = False) -> Callable[..., Any]:
        """``wide``: all that is float32 or narrower in the text is float64; ``plain``: FlexAttention is written out."""
        text = _widened(self.text) if wide else self.text
        file = f"<fuzz {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        names = {"math": math, "torch": torch, "F": F, "nn": nn, "create_block_mask": create_block_mask}
        exec(STORED, names)
        names["flex_attention"] = attention if plain else flex_attention
        exec(compile(text, file, "exec"), names)
        found: Callable[..., Any] = names["program"]
        return found

    def drawn(self, lengths: tuple[int, int], wide: bool = False) -> list[Any]:
        """The inputs; in float64 if ``wide``, with the values that they have else."""
        drawing = Drawing(getattr(torch, self.dtype), wide)
        names = {"torch": torch, "math": math, "n": lengths[0], "m": lengths[1], **drawing.functions()}
        return [eval(expression, names) for _, expression in self.inputs]

    def script(self, target: str) -> str:
        """A program of its own, which prints errors of eager and of what is compiled against float64."""
        return SCRIPT.format(
            stored=STORED, function=self.text, inputs=", ".join(x for _, x in self.inputs), dtype=self.dtype,
            training=self.training, inner=self.inner, target=target, dynamic=self.dynamic, lengths=list(self.lengths),
            plain=WRITTEN_OUT if "flex" in self.text else "plain = program",
        )  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """What expressions of inputs are made of; each program draws the same numbers again."""

    dtype: torch.dtype
    wide: bool

    def functions(self) -> dict[str, Callable[..., Any]]:
        torch.manual_seed(0)
        return {"randn": self.randn, "randint": self.randint, "coin": self.coin, "mha": self.mha}

    def randn(self, *shape: int) -> Tensor:
        return self._as_run(torch.randn(shape, dtype=torch.float64).to(self.dtype))

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape)

    def coin(self, *shape: int) -> Tensor:
        return torch.rand(shape) < 0.6

    def mha(self, embed: int, heads: int, **options: Any) -> nn.Module:
        found: nn.Module = self._as_run(nn.MultiheadAttention(embed, heads, **options).to(self.dtype))
        return found

    def _as_run(self, x: Any) -> Any:
        return x.double() if self.wide else x


def _widened(text: str) -> str:
    """Autocast stays: it has no effect on float64."""
    return re.sub(r"(?<!\"cpu\", dtype=)torch\.(float32|bfloat16|float16)\b", "torch.float64", text)


def listed(shape: Sequence[int | str]) -> str:
    """As arguments of a call."""
    return ", ".join(map(str, shape))
