"""Random masks as text: compositions of the forms that models use, each written in a random spelling.

A form is an expression of the positions ``i`` of queries (n, 1) and ``j`` of keys (m,), and of what masks read.
"""

from __future__ import annotations

import re

from hypothesis import strategies as st

# What is read for each of ``B`` batches, and what is read for all: name → what draws it.
OF_BATCHES = {
    "lengths": "randint(0, m + 1, B, 1, 1, 1)",
    "unsorted": "randint(0, 3, B, max(n, m))",
    "documents": "randint(0, 3, B, max(n, m)).sort(-1).values",
    "places": "randint(0, max(n, m) + 1, B, max(n, m))",
    "visible": "coin(B, 1, n, m)",
    "tokens": "coin(B, max(n, m)).long()",
}
OF_ALL = {"square": "coin(n, m)", "length": "randint(0, m + 1, 1)"}
DATA = OF_BATCHES | OF_ALL
_SAME = "{0}[:, None, :n, None] == {0}[:, None, None, :m]"
_READ_OF_BATCHES = (
    "j < lengths",
    "j >= lengths",
    "(j < lengths) | (j <= i)",
    "tokens[:, None, None, :m] != 0",
    _SAME.format("documents"),
    _SAME.format("unsorted"),
    f"({_SAME.format('documents')}) & (j <= i)",
    "places[:, None, :n, None] >= places[:, None, None, :m]",
    "visible",
)
_READ_OF_ALL = ("j < length", "square")
# Of what stands above every program: see fuzz.program.STORED.
_STORED = (
    "LOWER[:n, :m] != 0",
    "UPPER[:n, :m] == 0",
    "NEAR[:n, :m]",
    "HOLES[:n, :m] > 0",
    "PLACES[:n, None] - PLACES[:m] < 3",
)
SPELLINGS = (
    "torch.where({keep}, s, -math.inf)",
    "torch.where(~{keep}, torch.finfo(s.dtype).min, s)",
    "s.masked_fill({keep} == 0, -1e9)",
    "s.masked_fill({keep}.logical_not(), torch.tensor(-math.inf))",
    "s.masked_fill(1 - {keep}.int() > 0, -1e6)",
    "s.masked_fill({keep}.byte() == 0, -3e4)",
    "s.masked_fill(~~~{keep}, -math.inf)",
    "s + torch.zeros({keep}.shape, dtype=s.dtype).masked_fill(~{keep}, torch.finfo(s.dtype).min)",
    "s + torch.zeros({keep}.shape, dtype=torch.bfloat16).masked_fill(~{keep}, torch.finfo(torch.bfloat16).min).to(s.dtype)",
    "s + torch.where({keep}, 0.0, -math.inf).to(s.dtype)",
    "s - torch.where({keep}, 0.0, math.inf).to(s.dtype)",
    "s + (1.0 - {keep}.to(s.dtype)) * torch.finfo(s.dtype).min",
    "s * {keep}.to(s.dtype) - 1e4 * (1 - {keep}.to(s.dtype))",
    "s * {keep} + -1e9 * (1 - {keep}.to(s.dtype))",
    "s + {keep}.to(s.dtype).log()",
    "torch.minimum(s, torch.where({keep}, math.inf, -3e38).to(s.dtype))",
    "(s + torch.where({keep}, 0.0, -math.inf).to(s.dtype)).clamp(min=torch.finfo(s.dtype).min)",
    "(s * 8 + torch.zeros({keep}.shape, dtype=s.dtype).masked_fill(~{keep}, torch.finfo(s.dtype).min)) / 8",
    "s.masked_fill(torch.where({keep}, 0.0, -1e9) < -1, -math.inf)",
    "-torch.where({keep}, -s, math.inf)",
    "s.masked_fill_(~{keep}, -math.inf)",
)


def forms(batches: bool = True, data: bool = True, stored: bool = False) -> st.SearchStrategy[str]:
    """``data``: also what is read from tensors; ``batches``: also from those that have rows for batches; ``stored``: also from
    those that stand above programs.
    """
    n, size = st.integers(-3, 6), st.integers(1, 5)
    of_tensors = (*(_READ_OF_ALL if data else ()), *(_READ_OF_BATCHES if data and batches else ()))
    leaves = [
        n.map("j <= i + {}".format),
        n.map("~(j - i > {})".format),
        size.map("(j <= i) & (i - j < {})".format),
        size.map("(j - i).abs() <= {}".format),
        size.map("(j <= i) | (j < {})".format),
        size.map("i // {0} == j // {0}".format),
        size.map("i // {0} >= j // {0}".format),
        size.map("((i - j) % {} == 0) & (j <= i)".format),
        n.map("torch.ones(n, m, dtype=torch.bool).tril({})".format),
        *([st.sampled_from(_STORED)] if stored else []),
        *([st.sampled_from(of_tensors)] if of_tensors else []),
    ]

    def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds("({}) & ({})".format, inner, inner),
            st.builds("({}) | ({})".format, inner, inner),
            inner.map("~({})".format),
        )

    return st.recursive(st.one_of(*leaves), combined, max_leaves=3)


def read(form: str) -> list[str]:
    """The names of DATA in it."""
    return [name for name in DATA if re.search(rf"\b{name}\b", form)]
