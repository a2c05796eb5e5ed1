"""Random numbers without a state: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

The number at (plane, row, column) is a function of these and of the seed, so that backward draws what forward drew, tile
by tile and in any order. One call of Philox gives four words; they are the columns c, c + 16, c + 32 and c + 48 of a group
of 64, so that vectors of 16 columns and vectors of rows both use all four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.ir.expr import Apply, Expr, walk

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio, sqrt(3) - 1
COLUMNS = 64  # that share calls
LANES = 16  # columns between two words of a call
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def uniform(seed: Tensor, plane: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24, for int64 tensors that are broadcast together.

    key      the low and the high half of ``seed``
    counter  (column // 64 * 16 + column % 16, row, plane, 0), each modulo 2^32
    word     column // 16 % 4, of which the upper 24 bits count
    """
    group = torch.div(column, COLUMNS, rounding_mode="floor") * LANES + column % LANES
    key = (seed & _WORD, (seed >> 32) & _WORD)
    words = philox((group & _WORD, row & _WORD, plane & _WORD, torch.zeros_like(group)), key)
    which = torch.div(column, LANES, rounding_mode="floor") % len(words)
    word = sum((torch.where(which == i, w, 0) for i, w in enumerate(words)), torch.zeros_like(group))
    return (word >> 8).to(torch.float32) * 2.0**-24


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words of 32 bits, each in an int64, for a counter of four words and a key of two."""
    for _ in range(ROUNDS):
        counter = _round(counter, key)
        key = ((key[0] + KEY_STEPS[0]) & _WORD, (key[1] + KEY_STEPS[1]) & _WORD)
    return counter


def _round(c: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The products wrap around in int64, which keeps all their 64 bits."""
    first, second = c[0] * MULTIPLIERS[0], c[2] * MULTIPLIERS[1]
    return (_high(second) ^ c[1] ^ key[0], second & _WORD, _high(first) ^ c[3] ^ key[1], first & _WORD)


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD


def drawn_in(*roots: Expr) -> bool:
    """Whether expressions read random numbers."""
    return any(isinstance(n, Apply) and n.op == "uniform" for n in walk(*roots))
