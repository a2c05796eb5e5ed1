"""Attention of DTensors: it is read as that of the tensors whose parts they are, which is what every operation on them means.

The rule of fuse's ops (fuse.ops.sharding) then says which parts a rank computes. What that rule does not cover is declined.
"""

from __future__ import annotations

from fuse.ir.philox import drawn_in
from fuse.passes.lift import Lifted, SiteContext
from fuse.report.reasons import Declined, Distributed


def check_distributed(lifted: Lifted, context: SiteContext) -> None:
    """Raises Declined where the site of DTensors cannot be computed in parts."""
    if not context.distributed:
        return
    if drawn_in(*lifted.spec.roots().values()):
        raise Declined(Distributed("dropout draws for each rank in torch's own way"))
    if context.plan is not None:
        raise Declined(Distributed("the sequence lies on several ranks, too"))
