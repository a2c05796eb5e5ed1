"""What is known about entries that carry no weight: the predicate is separated from the score, and bounded in closed form."""

from __future__ import annotations

from dataclasses import replace

from fuse.ir.spec import Mask
from fuse.passes.bounds import bounds, pushed
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.predicate import separate
from fuse.passes.read.elements import op_name
from fuse.passes.read.trace import Value


def recover_mask(lifted: Lifted, _: SiteContext) -> Lifted:
    """With what can be proved about entries that are masked."""
    spec = lifted.spec
    split = separate(spec.score, spec.batch, spec.softmax)
    if split is None:
        return lifted
    predicate = pushed(split.predicate)
    found = bounds(spec, predicate, {i for i, leaf in enumerate(lifted.leaves) if _rises(leaf)})
    mask = Mask(predicate, split.visible, found.lower, found.upper, found.residual, split.fill)
    return replace(lifted, spec=replace(spec, mask=mask))


def _rises(leaf: Value) -> bool:
    """Running maxima never decrease, whatever the data: a table made of them says so to who reads it."""
    return op_name(leaf) == "cummax" and leaf.output == 0 and len(leaf.shape) == 1
