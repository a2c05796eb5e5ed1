"""A target in one file: every spec as a module of plain PyTorch, by what fuse.kernel has decided. It is not fast."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from fuse.ir.expr import Apply, Const, Expr, Index, Load, Prob, Symbol
from fuse.ir.spec import AttentionSpec
from fuse.kernel.destinations import Unsupported
from fuse.kernel.forward import forward_program
from fuse.kernel.source import header_lines
from fuse.report.runs import Runs
from fuse.targets.cache import write_once

# Tensors have the dimensions of the batch, then those of queries, keys and features. What lies outside is never chosen.
TEMPLATE = """{header}
import torch
from math import inf, nan
from fuse.ir.operators import OPERATORS as ops
def load(tensor, *at):
    return tensor[tuple(i.clamp(0, n - 1) for i, n in zip(at, tensor.shape))]
def run(operands, {symbols}):
    {indices}
    {symbols} = map(torch.tensor, ({symbols}))
    raw = ({query} * {key}).sum(-1, keepdim=True)
    def softmax(score):
        score = torch.where((score > {threshold}).any(-2, keepdim=True), score, {score})
        logits = torch.cat((score, *(x.expand(*score.shape[:-2], 1, 1) for x in ({extra}))), -2)
        empty = (score == -inf).all(-2, keepdim=True) & {zero}
        prob = logits.softmax(-2)[..., : score.shape[-2], :].masked_fill(empty, 0)
        return prob, logits.logsumexp(-2, keepdim=True).masked_fill(empty, inf)
    score = torch.where({seen}, {visible} * {factor}, {hidden})
    if {softmax}:
        prob, lse = softmax(score)
    else:
        lse = score.sum(-2, keepdim=True) if {by_sum} else torch.ones_like(score.sum(-2, keepdim=True))
        prob = score / lse
    return ({weight} * {value}).sum(-2), lse[..., 0, 0]
"""


def text(n: Expr) -> str:
    if isinstance(n, Const):
        return f"torch.tensor({n.value}, dtype=torch.{n.dtype})"
    if isinstance(n, (Index, Symbol)):
        return n.axis if isinstance(n, Index) else n.name
    if isinstance(n, Load):
        return f"load({', '.join([f'operands[{n.operand}]', *map(text, n.coords)])})"
    if isinstance(n, Apply) and n.op != "cast":
        return f"ops['{n.op}'].function({', '.join(map(text, n.operands))})"
    return f"{text(n.args[0]) if n.args else 'prob' if isinstance(n, Prob) else 'raw'}.to(torch.{n.dtype})"


def render(spec: AttentionSpec) -> str:
    program = forward_program(spec)
    sizes = {f"b{i}": f"B{i}" for i in range(spec.batch)} | {"q": "q_len", "k": "kv_len", "d": spec.qk_dim, "e": spec.v_dim}
    seen = [f"(k {'>=' if b.name == 'lower' else '<'} {text(b.node)})" for b in program.bounds]
    return TEMPLATE.format(
        **{name: text(root) for name, root in spec.roots().items() if "." not in name}, visible=text(program.visible),
        indices="; ".join(f"{x} = torch.arange({sizes[x]}).view(-1, *{spec.batch + 2 - i} * [1])" for i, x in enumerate(sizes)),
        seen=" & ".join([*seen, "torch.tensor(True)" if program.residual is None else text(program.residual)]),
        threshold="-inf" if program.threshold is None else program.threshold, factor=program.factor,
        extra="".join(f"{text(x)}, " for x in spec.extra_logits), zero=spec.empty_row == "zero",
        softmax=spec.softmax, by_sum=spec.normalisation == "sum", hidden="-inf" if spec.softmax else 0.0,
        symbols=", ".join(spec.symbols), header="\n".join(f"# {line}" for line in header_lines(spec)),
    )  # fmt: skip


@dataclass(frozen=True)
class ToyKernel:
    spec: AttentionSpec
    source: Path
    runs: Runs

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return self.forward(operands, sizes)[0]

    def forward(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        out = torch.empty_strided(self.spec.out_shape(sizes), self.spec.out_strides(sizes))
        result, lse = runpy.run_path(str(self.source))["run"](operands, *sizes)
        return out.copy_(result), torch.empty(self.spec.lse_shape(sizes)).copy_(lse)


class ToyTarget:
    name, devices, suffix = "toy", frozenset({"cpu"}), ".py"
    generated, tunable, late = True, False, False

    def by_itself(self, device: torch.device) -> bool:
        return False

    def toolchain(self) -> str:
        return ""

    def lse_dtype(self, spec: AttentionSpec) -> str:
        return spec.lse_dtype

    def forward(self, spec: AttentionSpec) -> ToyKernel:
        source = write_once(self.name, "attention", self.suffix, render(spec))
        return ToyKernel(spec, source, Runs("kernel", source))

    def backward(self, of: object) -> NoReturn:
        raise Unsupported("the toy computes results only")

    tile_map = backward

    def tile_size(self, spec: AttentionSpec) -> None: ...
