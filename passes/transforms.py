"""Sites inside of torch.func: read for one example of a vmap, at whatever level; the op's rules do the rest when it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from fuse.ir.batched import batched, batched_sizes
from fuse.ir.spec import AttentionSpec
from fuse.passes.lift import Lifted
from fuse.passes.read.graph import State, Transform, below_transforms, counts_examples, tensor_of
from fuse.passes.read.trace import Seed
from fuse.report.reasons import Declined, RandomNumbers, StateChanges, Transformed

_KNOWN = ("vmap", "grad")


def check_transforms(lifted: Lifted, inputs: Iterable[Node], anchor: State, root: State) -> None:
    """Raises Declined where the op would not be what the site is; ``inputs`` are those of the slice that it was read from."""
    if anchor.transforms != root.transforms:
        raise Declined(StateChanges("the border of a functorch transform"))
    names = [t.name for t in root.transforms]
    if unknown := [n for n in names if n not in _KNOWN]:
        raise Declined(Transformed(f"by torch.func.{unknown[-1]}"))
    tensors = [t for n in inputs if (t := tensor_of(n)) is not None]
    if names.count("grad") + any(below_transforms(t).requires_grad for t in tensors) > 1:
        raise Declined(Transformed("twice"))
    if "vmap" in names and any(isinstance(leaf, Seed) for leaf in lifted.leaves):
        raise Declined(RandomNumbers("each example of a vmap has its own, or all the same"))


def for_all_examples(
    spec: AttentionSpec, sizes: Sequence[int], leaves: Sequence[Node], transforms: Sequence[Transform]
) -> tuple[AttentionSpec, tuple[int, ...]]:
    """The spec and the sizes that kernels get when the op with ``leaves`` runs: those of all examples."""
    for transform in reversed([t for t in transforms if t.name == "vmap"]):
        examples = tuple(counts_examples(leaf, transform, transforms) for leaf in leaves)
        if any(examples):
            sizes = batched_sizes(sizes, spec.batch, transform.examples)
            spec = batched(spec, examples)
    return spec, tuple(sizes)
