"""What is known about entries that carry no weight: the predicate is separated from the score, and bounded in closed form."""

from __future__ import annotations

from dataclasses import replace

from fuse.ir.spec import Mask
from fuse.passes.bounds import bounds, pushed
from fuse.passes.lift import Lifted, SiteContext
from fuse.passes.predicate import separate


def recover_mask(lifted: Lifted, _: SiteContext) -> Lifted:
    """With what can be proved about entries that are masked."""
    spec = lifted.spec
    split = separate(spec.score, spec.batch)
    if split is None:
        return lifted
    predicate = pushed(split.predicate)
    found = bounds(spec, predicate)
    mask = Mask(predicate, split.visible, found.lower, found.upper, found.residual, split.fill)
    return replace(lifted, spec=replace(spec, mask=mask))
