"""Queries, keys and values as views of what is given: packed or not, in any order of dimensions, heads that share keys."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from fuzz.draft import Draft, Sizes
from fuzz.program import listed


def laid(d: Draft, lead: Sequence[int], *last: str | int) -> str:
    """A view of a new input: its dimensions are stored in another order, two of them as one, or every second element."""
    dims = [*map(str, lead), *map(str, last)]
    rank = len(dims)
    plain = list(range(rank))
    swapped = [*plain[:-3], rank - 2, rank - 3, rank - 1] if rank > 2 else plain
    order = d.one(plain, swapped, swapped, [*plain[:-2], rank - 1, rank - 2], d.draw(st.permutations(plain)))
    stored = [dims[i] for i in order]
    view = "" if order == plain else f".permute({listed([order.index(i) for i in range(rank)])})"
    at = d.one(None, None, *range(rank - 1))
    if at is not None:
        parts = ["-1" if x in ("n", "m") else x for x in stored[at : at + 2]]
        view = f".unflatten({at}, ({', '.join(parts)})){view}"
        stored[at : at + 2] = [" * ".join(x for x in stored[at : at + 2] if x != "1") or "1"]
    if d.often(10):
        size, cut = d.one(("{} + 3", "[..., 3:]"), ("2 * ({})", "[..., ::2]"), ("{} + 1", "[..., :-1]"))
        stored[-1], view = size.format(stored[-1]), cut + view
    return d.given(f"randn({listed(stored)})") + view


def operands(d: Draft) -> None:
    """``q``, ``k`` and ``v``."""
    z = d.sizes
    way = d.one("apart", "apart", "apart", "shared", "features", "stacked") if z.square and z.lead == z.kv_lead else "apart"
    if way == "features":
        d.write(f"q, k, v = {laid(d, z.lead, 'n', 2 * z.qk + z.v)}.split([{z.qk}, {z.qk}, {z.v}], -1)")
    elif way == "stacked" and z.qk == z.v:
        d.write(f"q, k, v = {laid(d, (3, *z.lead), 'n', z.qk)}.unbind(0)")
    else:
        d.write(f"q = {laid(d, z.lead, 'n', z.qk)}")
        d.write("k = q" if way == "shared" else f"k = {laid(d, z.kv_lead, 'm', z.qk)}")
        d.write("v = k" if z.qk == z.v and d.often(10) else f"v = {laid(d, z.kv_lead, 'm', z.v)}")
    d.write("n, m = q.shape[-2], k.shape[-2]")


def positions(d: Draft) -> None:
    d.write("i, j = torch.arange(n)[:, None], torch.arange(m)")


def shared(d: Draft) -> None:
    """Keys and values for every head, or queries for the product with each group."""
    z = d.sizes
    if len(z.kv_lead) < 2 or len(z.lead) != 2 or z.kv_lead[1] == z.lead[1]:
        return
    times, groups = z.lead[1] // z.kv_lead[1], z.kv_lead[1]
    way = d.one("expanded", "repeated", "queries", *(["broadcast"] if groups == 1 else []))
    if way == "queries":
        d.write(f"q, k, v = q.unflatten(1, ({groups}, {times})), k[:, :, None], v[:, :, None]")
        d.sizes = Sizes((z.lead[0], groups, times), (z.lead[0], groups, 1), z.qk, z.v, z.square)
    elif way != "broadcast":
        view = f"repeat_interleave({times}, 1)" if way == "repeated" else ""
        for x in "kv":
            d.write(f"{x} = {x}.{view or f'unsqueeze(2).expand(-1, -1, {times}, -1, -1).flatten(1, 2)'}")
        d.sizes = Sizes(z.lead, z.lead, z.qk, z.v, z.square)


def shared_for_all(d: Draft) -> None:
    """Keys and values with the dimensions of queries."""
    lead = listed(d.sizes.lead)
    if len(d.sizes.kv_lead) == 2 == len(d.sizes.lead) and d.sizes.kv_lead[1] > 1:
        times = d.sizes.lead[1] // d.sizes.kv_lead[1]
        d.write(f"k, v = k.repeat_interleave({times}, 1), v.repeat_interleave({times}, 1)")
    else:
        d.write(f"k, v = k.expand({lead}, m, -1), v.expand({lead}, m, -1)")
    d.sizes = Sizes(d.sizes.lead, d.sizes.lead, d.sizes.qk, d.sizes.v, d.sizes.square)
