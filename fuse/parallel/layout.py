"""Which positions of a sequence lie on which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Extent = tuple[int, int]  # positions from the first on up to, but without, the second


@dataclass(frozen=True)
class Layout:
    """A sequence over ``ranks``, each of which holds as many positions.

    balanced  each rank holds two segments, one from the head and one from the tail of the sequence, so that under a causal mask
              all have as much to do: of 2 * ranks chunks rank r has those numbered r and 2 * ranks - 1 - r (the layout of
              torch.distributed.tensor.experimental.context_parallel). Else one: the positions in their order
    """

    ranks: int
    balanced: bool = False

    @property
    def divisor(self) -> int:
        """What the length of a sequence is a multiple of."""
        return self.ranks * (1 + self.balanced)

    def segments(self, rank: int, length: int) -> tuple[Extent, ...]:
        """What ``rank`` holds of a sequence of ``length``, in the order in which it does."""
        step = length // self.divisor
        chunks = (rank, 2 * self.ranks - 1 - rank) if self.balanced else (rank,)
        return tuple((c * step, (c + 1) * step) for c in chunks)


def joined(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    """The positions of all ``extents`` as few of them, in order."""
    found: list[Extent] = []
    for start, stop in sorted(e for e in extents if e[0] < e[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)


def common(a: Extent, b: Extent) -> Extent:
    """The positions that are in both; empty ones begin where they stop, or later."""
    return max(a[0], b[0]), min(a[1], b[1])


@dataclass(frozen=True)
class Piece:
    """Positions ``start`` … ``stop`` of a sequence, which lie from row ``row`` on in the tensors of the rank that has them."""

    start: int
    stop: int
    row: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.stop - self.start)


def pieces(held: Sequence[Extent], wanted: Sequence[Extent]) -> tuple[Piece, ...]:
    """What of ``held``, segments that lie behind one another, is among the positions that are ``wanted``; in that order."""
    found: list[Piece] = []
    row = 0
    for segment in held:
        for extent in wanted:
            start, stop = common(segment, extent)
            if start < stop:
                found.append(Piece(start, stop, row + start - segment[0]))
        row += segment[1] - segment[0]
    return tuple(found)
