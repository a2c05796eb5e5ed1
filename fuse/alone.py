"""python -m fuse.alone FILE: a kernel by itself, at the sizes and strides of the sites that it was made for, compared with the
reference in float64 and timed beside SDPA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fuse.ir.gradient import gradient
from fuse.ir.spec import AttentionSpec
from fuse.ir.tile_map import TileMap
from fuse.kernel.destinations import Unsupported
from fuse.kernel.example import Example, ExampleTensor, example
from fuse.kernel.source import Header, header_of
from fuse.ops.warm import ExpectedCall
from fuse.qualify import faster, right
from fuse.qualify.problem import Problem, as_called, small
from fuse.qualify.torchs_own import Rival, rival
from fuse.targets import dump_index, reference, registry
from fuse.targets.cache import BuildFailed
from fuse.targets.dump_index import Call, Layout
from fuse.targets.protocols import Backward, FromFile, Kernel, MapKernel
from fuse.targets.standin import ReferenceKernel
from fuse.targets.target import Target

_ABOUT = """Runs kernels by themselves. For each: what it computes; the largest error against float64 and where, beside that of
plain PyTorch; and its time beside scaled_dot_product_attention where that computes the same. Sizes and strides are those of the
sites that sites.json beside it names, or its own where it names none; numbers are drawn. Exit status 1 where an error is larger
than a new kernel's may be, 2 where a file cannot be run."""
_SEED = 0
_HIDDEN = 0.25  # of the entries of a mask


class _CannotRun(Exception):
    """The message says why, and what to do."""


def run(file: str) -> None:
    """What ``python FILE`` does, of a kernel that is a Python file."""
    sys.exit(main([file, *sys.argv[1:]]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuse.alone", description=_ABOUT)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a kernel: from FUSE_DUMP's folder, or the cache")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of a CPU (%(default)s)")
    parser.add_argument("--example", action="store_true", help="at sizes of its own, whatever the sites are")
    parser.add_argument("--no-times", action="store_true", help="compare only")
    args = parser.parse_args(arguments)
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: give 1 or more")
    torch.set_num_threads(args.threads)
    status = 0
    for number, path in enumerate(args.files):
        print("\n" * (number > 0), end="")
        try:
            wrong = _report(path, args.example, not args.no_times)
        except (_CannotRun, BuildFailed, Unsupported) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        status = max(status, int(wrong))
    return status


def _report(path: Path, own_sizes: bool, timed: bool) -> bool:
    """Prints what there is to say of a file; whether an error is too large."""
    loaded = _loaded(path)
    print(path.name)
    for line in loaded.header.formula:
        print(f"  {line}")
    known = () if own_sizes else tuple(c for c in dump_index.calls(path.parent) if c.is_of(loaded.header))
    wrong = False
    for call, sites in _alike(known or (loaded.example(),)):
        print(f"\n  {sites}")
        wrong |= loaded.compare(call)
        if timed:
            loaded.time(call)
    return wrong


def _alike(calls: Sequence[Call]) -> Iterator[tuple[Call, str]]:
    """Calls of the same sizes and strides once, with the sites that they are of."""
    found: dict[Call, list[Call]] = {}
    for call in calls:
        found.setdefault(replace(call, where="", module="", names=()), []).append(call)
    for alike in found.values():
        yield alike[0], dump_index.places(alike) or "sizes of its own"


# --------------------------------------------------------------------------------------------------------------- kernels


def _loaded(path: Path) -> _Attention | _Map:
    """The kernel of a file. Raises _CannotRun, BuildFailed, Unsupported."""
    try:
        header = header_of(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise _CannotRun(f"it cannot be read: {error}") from error
    target = next((t for t in map(registry.named, registry.names()) if t.generated and t.suffix == path.suffix), None)
    if target is None or not isinstance(target, FromFile):
        raise _CannotRun("it is no kernel of fuse: those end with .cpp or .py")
    if not header.spec:
        raise _CannotRun("its comment at the top has no line with the spec, which says what it computes: leave that in place")
    device = _device(target)
    if header.of_map:
        of = TileMap.from_json(header.spec)
        return _Map(header, target, device, of, target.tile_map_of(of, path))
    spec = AttentionSpec.from_json(header.spec)
    stand_in = ReferenceKernel(spec, target.lse_dtype(spec))
    if header.wanted:
        return _Attention(header, target, device, spec, stand_in, target.backward_of(gradient(spec, header.wanted), path))
    return _Attention(header, target, device, spec, target.forward_of(spec, path))


def _device(target: Target) -> torch.device:
    types = target.devices or {"cpu"}
    if "cuda" in types and torch.cuda.is_available():
        return torch.device("cuda")
    if "cpu" not in types:
        raise _CannotRun("it needs a GPU; TRITON_INTERPRET=1 interprets it on the CPU, slowly and at small sizes")
    return torch.device("cpu")


@dataclass(frozen=True)
class _Base:
    header: Header
    target: Target
    device: torch.device

    @property
    def interpreted(self) -> bool:
        return self.device.type == "cpu" and "cuda" in (self.target.devices or ())

    def of_example(self, made: Example) -> Call:
        """A call of sizes that nobody asked for."""
        operands = tuple(map(_layout, made.operands))
        return Call(self.header.spec, self.header.wanted, self.device.type, made.sizes, operands)


@dataclass(frozen=True)
class _Attention(_Base):
    """A kernel of results or, with ``backward``, of gradients, for which ``kernel`` is the reference."""

    spec: AttentionSpec
    kernel: Kernel
    backward: Backward | None = None

    def example(self) -> Call:
        return self.of_example(example(self.spec))

    def compare(self, call: Call) -> bool:
        wanted, p = self.header.wanted, self._problem(call, compared=True)
        print(f"  {_sizes(self.spec, p.sizes)}{'' if p.sizes == call.sizes else ', for want of memory or of a GPU'}")
        _print_operands(call, p.operands)
        found = list(right.findings_of(p, self.kernel, self.backward, wanted or (False,) * len(p.operands)))
        for finding in found[1:] if wanted else found:
            print(f"    {finding}{f', more than {finding.allowed:.1e}: WRONG' if finding.wrong else ''}")
        return any(finding.wrong for finding in found)

    def time(self, call: Call) -> None:
        p = self._problem(call, compared=False)
        other = rival(p, self.header.wanted or (False,) * len(p.operands)) if faster.fits(self._expected(call)) else None
        ways = [self._way(p), *([self._rivals_way(other)] if other is not None else [])]
        _print_times(ways, self.device, faster.SDPA if self.spec.softmax else faster.PRODUCTS)

    def _way(self, p: Problem) -> faster.Call:
        if self.backward is None:
            return torch.no_grad()(lambda: self.kernel(p.operands, p.sizes))
        out, lse = self.kernel.forward(p.operands, p.sizes)
        backward, grad = self.backward, torch.ones_like(out)
        return torch.no_grad()(lambda: backward(grad, p.operands, p.sizes, out, lse))

    def _rivals_way(self, rival: Rival) -> faster.Call:
        """Of gradients: the backward pass alone, as here."""
        if self.backward is None:
            return torch.no_grad()(lambda: rival.attend(*rival.matrices))
        leaves = [t.detach().requires_grad_(w) for t, w in zip(rival.matrices, rival.wanted, strict=True)]
        out = rival.attend(*leaves)
        grad, wanting = torch.ones_like(out), [t for t in leaves if t.requires_grad]
        return lambda: torch.autograd.grad(out, wanting, grad, retain_graph=True)

    def _problem(self, call: Call, compared: bool) -> Problem:
        """Numbers for a call; for a smaller one of its kind where its scores would take too much memory, or time."""
        expected, wanted = self._expected(call), self.header.wanted or (False,) * len(call.operands)
        if self.interpreted or (compared and not faster.fits(expected)):
            return small(expected, wanted, _SEED)
        return as_called(expected, wanted)

    def _expected(self, call: Call) -> ExpectedCall:
        operands = tuple(_like(o) for o in call.operands)
        return ExpectedCall(self.header.spec, self.target.name, operands, call.sizes, self.device)


@dataclass(frozen=True)
class _Map(_Base):
    """A kernel of a mask's tiles."""

    spec: TileMap
    kernel: MapKernel

    def example(self) -> Call:
        return self.of_example(example(self.spec))

    def compare(self, call: Call) -> bool:
        operands = self._operands(call)
        print(f"  {_sizes(self.spec, call.sizes)}")
        _print_operands(call, operands)
        found, exact = self.kernel(operands, call.sizes), reference.tile_map(self.spec, operands, call.sizes)
        wrong = int((found != exact).sum())
        print(f"    {wrong} of {exact.numel()} cells are not as the reference has them{': WRONG' * (wrong > 0)}")
        return wrong > 0

    def time(self, call: Call) -> None:
        operands = self._operands(call)
        _print_times([lambda: self.kernel(operands, call.sizes)], self.device)

    def _operands(self, call: Call) -> list[Tensor]:
        return [_drawn(o, self.device) for o in call.operands]


# --------------------------------------------------------------------------------------------------------------- tensors


def _layout(t: ExampleTensor) -> Layout:
    """Dense, in its order."""
    strides, step = [0] * len(t.shape), 1
    for dim in reversed(t.order):
        strides[dim], step = step, step * t.shape[dim]
    return Layout(t.dtype, t.shape, tuple(strides))


def _like(o: Layout) -> Tensor:
    return torch.empty_strided(o.shape, o.strides, dtype=getattr(torch, o.dtype), device="meta")


def _drawn(o: Layout, device: torch.device) -> Tensor:
    """What a mask may be made of: some of its entries hide something, be they false, low, or zero."""
    like = _like(o)
    size = 1 + sum((n - 1) * s for n, s in zip(o.shape, o.strides, strict=True)) if like.numel() else 0
    generator = torch.Generator(device).manual_seed(_SEED)
    shown = torch.rand(size, generator=generator, device=device) > _HIDDEN
    numbers = torch.where(shown, 0.0, float("-inf")) if like.is_floating_point() else shown
    return numbers.to(like.dtype).as_strided(o.shape, o.strides)


# ----------------------------------------------------------------------------------------------------------------- words


def _sizes(spec: AttentionSpec | TileMap, sizes: Sequence[int]) -> str:
    return ", ".join(f"{name} = {n}" for name, n in zip(spec.symbols, sizes, strict=True))


def _print_operands(call: Call, operands: Sequence[Tensor]) -> None:
    for i, t in enumerate(operands):
        name = f"  {call.names[i]}" if i < len(call.names) and call.names[i] else ""
        print(f"    operand{i}{name}  {str(t.dtype).removeprefix('torch.')} {list(t.shape)}, strides {list(t.stride())}")


def _print_times(ways: Sequence[Callable[[], object]], device: torch.device, rival: str = "") -> None:
    times = [faster.milliseconds(t) for t in faster.in_turn(ways, device)]
    beside = f", {rival} {times[1]}" if len(times) > 1 else ""
    threads = f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}" if device.type == "cpu" else ""
    print(f"    time {times[0]}{beside}{threads}")


if __name__ == "__main__":
    sys.exit(main())
