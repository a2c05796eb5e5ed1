"""Triton kernels of gradients: loaded as those of forward are, and launched over groups of batch indices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fuse.ir import expr
from fuse.ir.gradient import gradient
from fuse.ir.grid import Grid
from fuse.ir.spec import AttentionSpec
from fuse.kernel.backward import recomputed_above, recomputed_below
from fuse.kernel.destinations import Destination, destinations
from fuse.kernel.groups import BatchGroups, groups_of
from fuse.kernel.names import kernel_name
from fuse.kernel.source import ENTRY
from fuse.targets import reference
from fuse.targets.fallback_warnings import OVERLAPPING, left_to_reference
from fuse.targets.gradient_buffers import GradientBuffers
from fuse.targets.triton.arguments import Arguments, strided
from fuse.targets.triton.copies import Copies
from fuse.targets.triton.launch_tiles import TritonTiles
from fuse.targets.triton.module import Module, current_architecture, made, precision
from fuse.targets.triton.plan import described
from fuse.targets.triton.plan_backward import Launch, TritonBackwardPlan, candidates_backward
from fuse.targets.triton.plan_choice import PlanChoice
from fuse.targets.triton.render_backward import COPIED, destination_kind, render_backward, written_by

_PLANNED = ("keys", "queries")  # of the kernels: the others have one plan each
_MOST = 64  # tables of groups that are kept, by batch sizes: while a CUDA graph is captured, none can be copied to the device


class TritonBackward:
    """The loaded kernels of the gradients of ``wanted`` operands; ``module``: another than would be rendered.

    Raises Unsupported.
    """

    def __init__(self, spec: AttentionSpec, wanted: Sequence[bool], module: Module | None = None) -> None:
        self._spec, self._wanted = spec, tuple(wanted)
        self._destinations = destinations(spec, wanted)
        self._shared = any(destination_kind(s) == "shared" for s in self._destinations)
        self._arguments, self._gradients = Arguments(spec), GradientBuffers(spec, self._destinations)
        self._real: torch.dtype = getattr(torch, spec.lse_dtype)
        self._groups: dict[tuple[object, ...], list[BatchGroups]] = {}
        self.plans = PlanChoice(lambda arch: candidates_backward(spec, arch, self._shared))
        self._tiles = {owner: TritonTiles(spec, owner) for owner in ("k", "q")}
        rendered = described(spec, current_architecture())
        self._copies = Copies(spec, COPIED, rendered)
        module = module or made(kernel_name(spec, "backward"), render_backward(spec, wanted, rendered))
        self.source, self.runs = module.source, module.runs
        names = ["rows", "keys", "queries", *(["distances"] if written_by("k - q", self._destinations) else [])]
        self.functions = {name: module.function(f"{ENTRY}_{name}", name in _PLANNED) for name in names}

    def __call__(
        self, grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor, lse: Tensor,
        grad_lse: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients of the wanted operands, with the layout that ``torch.empty_like`` gives these.

        Where entries share elements of a tensor in another way than by distance, their order in its sums is not determined; if
        torch is told to be deterministic, the reference computes them.
        """
        left = None
        if self._shared and torch.are_deterministic_algorithms_enabled():
            left = "calls under torch.use_deterministic_algorithms"
        elif not self._gradients.are_apart(sizes):
            left = OVERLAPPING
        if left is not None:
            self.runs = left_to_reference(self.runs, "backward", left)
            return reference.attention_backward(self._spec, grad_out, operands, sizes, self._wanted, "eager", grad_lse)
        found: list[Tensor] = []

        def launch(plan: TritonBackwardPlan) -> None:
            found[:] = self._with(plan, grad_out, operands, sizes, out, lse, grad_lse)

        self.plans.launch(self.source, grad_out.device, sizes[: self._spec.batch + 2], launch)
        return found

    def tune(self) -> None:
        """As that of forward."""
        self.plans.tune = True

    def _with(
        self, plan: TritonBackwardPlan, grad_out: Tensor, operands: Sequence[Tensor], sizes: Sequence[int], out: Tensor,
        lse: Tensor, grad_lse: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        gradients = self._gradients.made(operands, sizes)
        *batch, q_len, kv_len = sizes[: self._spec.batch + 2]
        if math.prod((*batch, q_len, kv_len)):
            known = self._arguments.of(operands, sizes) | strided("grad_out", grad_out) | {"lse": lse}
            known |= self._rows(plan.rows, known | strided("out", out), sizes, lse, grad_lse)
            sums = {"row": (*batch, q_len, 1), "key": (*batch, 1, kv_len), "entry": (*batch, 1, q_len + kv_len - 1)}
            partial = {s.name: lse.new_empty(sums[kind]) for s in self._destinations if (kind := destination_kind(s)) in sums}
            self._launch("k", plan, -(-kv_len // plan.keys.block_k), known, operands, sizes, gradients | partial)
            self._launch("q", plan, -(-q_len // plan.queries.block_q), known, operands, sizes, gradients | partial)
            if distances := {f"grad_{s.name}": partial[s.name] for s in written_by("k - q", self._destinations)}:
                tiles = -(-(q_len + kv_len - 1) // plan.distances.block_k)
                grid = (math.prod(batch) * tiles,)
                self.functions["distances"][grid](known | distances, **_options(plan.distances))
            self._scatter(operands, sizes, known, partial, gradients)
        return self._gradients.totals(operands, self._wanted, gradients)

    def _rows(
        self, plan: Launch, given: dict[str, Any], sizes: Sequence[int], lse: Tensor, grad_lse: Tensor | None
    ) -> dict[str, Tensor]:
        """Computes what is known of each row."""
        batch_indices = math.prod(sizes[: self._spec.batch])
        known = {"lse2": torch.empty_like(lse), "delta": torch.empty_like(lse)}
        if recomputed_below(self._spec) is not None:
            known |= {"exact_m": torch.empty_like(lse), "exact_log_l": torch.empty_like(lse)}
            known["has_exact"] = torch.zeros(batch_indices, dtype=torch.int32, device=lse.device)
        blocks = -(-sizes[self._spec.batch] // plan.block_q)
        of_lse = {"grad_lse": lse if grad_lse is None else grad_lse.to(lse.dtype)}
        self.functions["rows"][(batch_indices * blocks,)](
            given | known | of_lse, HAS_GRAD_LSE=grad_lse is not None, **_options(plan)
        )
        return known

    def _launch(
        self, owner: str, plans: TritonBackwardPlan, blocks: int, known: dict[str, Any], operands: Sequence[Tensor],
        sizes: Sequence[int], gradients: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """The kernel of keys ("k") or queries ("q"), as often as it takes."""
        found = written_by(owner, self._destinations)
        if not found:
            return
        name, plan = ("keys", plans.keys) if owner == "k" else ("queries", plans.queries)
        rows, described = self._copies.of(operands, sizes, plan, plans.described) if owner == "q" else ({}, False)
        lists, listed = self._tiles[owner].of(known, sizes, plan, known["lse"])
        given = known | rows | lists
        for to in found:
            given |= strided(f"grad_{to.name}", gradients[to.name])
        for groups in self._grouped(owner, found, sizes, known["lse"].device):
            flags = {f"HAS_{s.name}": s.name in groups.written for s in found}
            flags |= {"ALONE": groups.count == len(groups.batch_indices), "LISTED": listed, "DESCRIBED": described}
            self.functions[name][(groups.count * blocks,)](
                given | {"members": groups.batch_indices, "starts": groups.starts}, **flags, **_options(plan)
            )

    def _grouped(
        self, owner: str, found: Sequence[Destination], sizes: Sequence[int], device: torch.device
    ) -> list[BatchGroups]:
        by_name = dict(zip(self._spec.symbols, sizes, strict=True))
        read = {f"B{i}" for i in range(self._spec.batch)}.union(expr.symbols(*(c for s in found for c in s.load.coords)))
        key = (owner, device, *(by_name[name] for name in sorted(read)))
        if key not in self._groups:
            if len(self._groups) >= _MOST:
                self._groups.clear()
            self._groups[key] = groups_of(self._spec, found, by_name, device)
        return self._groups[key]

    def _scatter(
        self, operands: Sequence[Tensor], sizes: Sequence[int], known: Mapping[str, Any], partial: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Adds sums of rows, keys or distances where the operands' elements are, and what logits without a value contribute."""
        lse, delta = known["lse"], known["delta"]
        *batch, q_len, kv_len = sizes[: self._spec.batch + 2]
        terms = gradient(self._spec, self._wanted).terms
        for to, term in zip((s for s in self._destinations if s.kind != "matrix"), terms, strict=True):
            if destination_kind(to) in ("dense", "shared"):
                continue
            extents = {f"b{i}": (0, n) for i, n in enumerate(batch)}
            ends = {"key": ((0, 1), (0, kv_len)), "entry": ((0, 1), (1 - q_len, kv_len))}
            extents["q"], extents["k"] = ends.get(to.kind, ((0, q_len), (0, 1)))
            grid = Grid.over(extents, dict(zip(self._spec.symbols, sizes, strict=True)), operands)
            if to.kind == "logit":
                logit = grid.evaluate(self._spec.extra_logits[int(term.root.rpartition(".")[2])]).to(self._real)
                power = logit - lse[..., None]
                if (below := recomputed_below(self._spec)) is not None:
                    m, log_l = known["exact_m"][..., None], known["exact_log_l"][..., None]
                    exact = (lse <= below) | ((lse >= recomputed_above(self._spec.lse_dtype)) & (lse < math.inf))
                    power = torch.where(exact[..., None], logit - m - log_l, power)
                grad = -power.exp() * delta[..., None] * grid.evaluate(term.factor)
            else:
                grad = partial[to.name]
            grid.scatter(grad, to.load, gradients[to.name])


def _options(launch: Launch) -> dict[str, Any]:
    return {
        "PRECISION": precision(), "BM": launch.block_q, "BN": launch.block_k,
        "num_warps": launch.warps, "num_stages": launch.stages,
    }  # fmt: skip
