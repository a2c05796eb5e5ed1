"""Random attention masks: compositions of the forms that models use, each written in a random spelling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BATCH, HEADS, WIDTH = 2, 2, 4
Given = dict[str, Tensor]
Form = Callable[[Tensor, Tensor, Given], Tensor]
Spelling = Callable[[Tensor, Tensor], Tensor]
MIN = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16)}


@dataclass(frozen=True)
class Case:
    """Attention of ``q_len`` queries to ``kv_len`` keys under one or two masks, with data drawn from ``seed``."""

    forms: tuple[Form, ...]
    spellings: tuple[Spelling, ...]
    how: str
    q_len: int
    kv_len: int
    seed: int

    def given(self) -> Given:
        """q, k, v in float64, and what masks read per position; under "mask" the visible entries as the user's own tensor."""
        g = torch.Generator().manual_seed(self.seed)
        shapes = {"q": self.q_len, "k": self.kv_len, "v": self.kv_len}
        given = {n: torch.randn(BATCH, HEADS, size, WIDTH, generator=g, dtype=torch.float64) for n, size in shapes.items()}
        n = max(self.q_len, self.kv_len)
        given["lengths"] = torch.randint(0, self.kv_len + 1, (BATCH, 1, 1, 1), generator=g)
        given["unsorted"] = torch.randint(0, 3, (BATCH, n), generator=g)
        given["documents"] = given["unsorted"].sort(-1).values
        given["places"] = torch.randint(0, n + 1, (BATCH, n), generator=g)
        given["bool"] = torch.rand(BATCH, 1, self.q_len, self.kv_len, generator=g) < 0.6
        given["square"] = torch.rand(self.q_len, self.kv_len, generator=g) < 0.6
        given["tokens"] = (torch.rand(BATCH, n, generator=g) < 0.7).long()
        given["mask"] = self.keep(given).expand(BATCH, 1, self.q_len, self.kv_len).contiguous()
        given["float"] = torch.where(given["mask"], 0.25, MIN[torch.float32] if self.seed % 2 else -math.inf).double()
        return given

    def keep(self, given: Given) -> Tensor:
        q, k = torch.arange(self.q_len)[:, None], torch.arange(self.kv_len)
        keep = self.forms[0](q, k, given)
        for form in self.forms[1:]:
            keep = keep & form(q, k, given)
        return keep

    def attend(self, given: Given) -> Tensor:
        q, k, v = given["q"], given["k"], given["v"]
        if self.how == "sdpa":
            return scaled_dot_product_attention(q, k, v, attn_mask=self.keep(given).expand(BATCH, 1, self.q_len, self.kv_len))
        score = q @ k.mT / 2
        if self.how in ("float", "mask"):  # the mask comes as a tensor
            score = score + given["float"] if self.how == "float" else score.masked_fill(~given["mask"], -math.inf)
            return score.softmax(-1) @ v
        rows, keys = torch.arange(self.q_len)[:, None], torch.arange(self.kv_len)
        for form, spell in zip(self.forms, self.spellings, strict=True):
            score = spell(score, form(rows, keys, given))
        return score.softmax(-1) @ v


def forms(of_data: bool = True) -> st.SearchStrategy[Form]:
    """``of_data``: also what is read from tensors."""
    n, size = st.integers(-3, 6), st.integers(1, 5)
    given: dict[str, Form] = {
        "padded right": lambda q, k, g: k < g["lengths"],
        "padded left": lambda q, k, g: k >= g["lengths"],
        "prefix of each": lambda q, k, g: (k < g["lengths"]) | (k <= q),
        "tokens": lambda q, k, g: g["tokens"][:, None, None, : k.shape[-1]] != 0,
        "documents": lambda q, k, g: same(g["documents"], q, k),
        "unsorted documents": lambda q, k, g: same(g["unsorted"], q, k),
        "packed": lambda q, k, g: same(g["documents"], q, k) & (k <= q),
        "position ids": lambda q, k, g: g["places"][:, None, : len(q), None] >= g["places"][:, None, None, : k.shape[-1]],
        "opaque": lambda q, k, g: g["bool"],
        "opaque for all": lambda q, k, g: g["square"],
    }
    leaves = [
        st.builds(lambda c: lambda q, k, g: k <= q + c, n),
        st.builds(lambda c: lambda q, k, g: ~(k - q > c), n),
        st.builds(lambda c: lambda q, k, g: (k <= q) & (q - k < c), size),
        st.builds(lambda c: lambda q, k, g: (k - q).abs() <= c, size),
        st.builds(lambda c: lambda q, k, g: (k <= q) | (k < c), size),
        st.builds(lambda c: lambda q, k, g: q // c == k // c, size),
        st.builds(lambda c: lambda q, k, g: q // c >= k // c, size),
        st.builds(lambda c: lambda q, k, g: ((q - k) % c == 0) & (k <= q), size),
        st.builds(lambda c: lambda q, k, g: torch.ones(len(q), k.shape[-1], dtype=torch.bool).tril(c), n),
        *([st.sampled_from(list(given.values()))] if of_data else []),
    ]

    def combined(inner: st.SearchStrategy[Form]) -> st.SearchStrategy[Form]:
        return st.one_of(
            st.builds(lambda a, b: lambda q, k, g: a(q, k, g) & b(q, k, g), inner, inner),
            st.builds(lambda a, b: lambda q, k, g: a(q, k, g) | b(q, k, g), inner, inner),
            st.builds(lambda a: lambda q, k, g: ~a(q, k, g), inner),
        )

    return st.recursive(st.one_of(*leaves), combined, max_leaves=3)


def same(ids: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ids[:, None, : len(q), None] == ids[:, None, None, : k.shape[-1]]


def _added(s: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that was made in another dtype, and added."""
    return s + torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, MIN[dtype]).to(s.dtype)


SPELLINGS: dict[str, Spelling] = {
    "where": lambda s, keep: torch.where(keep, s, -math.inf),
    "where turned": lambda s, keep: torch.where(~keep, MIN[torch.float32], s),
    "filled": lambda s, keep: s.masked_fill(keep == 0, -1e9),
    "filled by tensor": lambda s, keep: s.masked_fill(keep.logical_not(), torch.tensor(-math.inf)),
    "filled by integers": lambda s, keep: s.masked_fill(1 - keep.int() > 0, -1e6),
    "filled by bytes": lambda s, keep: s.masked_fill(keep.byte() == 0, -1e4),
    "thrice negated": lambda s, keep: s.masked_fill(~~~keep, -math.inf),
    "added float32": lambda s, keep: _added(s, keep, torch.float32),
    "added bfloat16": lambda s, keep: _added(s, keep, torch.bfloat16),
    "added infinity": lambda s, keep: s + torch.where(keep, 0.0, -math.inf),
    "subtracted": lambda s, keep: s - torch.where(keep, 0.0, math.inf),
    "inverse product": lambda s, keep: s + (1.0 - keep.to(s.dtype)) * MIN[torch.float32],
    "first GPT": lambda s, keep: s * keep.to(s.dtype) - 1e4 * (1 - keep.to(s.dtype)),
    "product": lambda s, keep: s * keep + -1e9 * (1 - keep.to(s.dtype)),
    "logarithm": lambda s, keep: s + keep.float().log(),
    "minimum": lambda s, keep: torch.minimum(s, torch.where(keep, math.inf, MIN[torch.float32]).to(s.dtype)),
    "clamped": lambda s, keep: (s + torch.where(keep, 0.0, -math.inf)).clamp(min=MIN[torch.float32]),
    "before the scale": lambda s, keep: _added(s * 8, keep, torch.float32) / 8,
    "additive compared": lambda s, keep: s.masked_fill(torch.where(keep, 0.0, -1e9) < -1, -math.inf),
    "negative": lambda s, keep: -torch.where(keep, -s, math.inf),
}


def cases() -> st.SearchStrategy[Case]:
    masks = st.lists(st.tuples(forms(), st.sampled_from(list(SPELLINGS.values()))), min_size=1, max_size=2)
    how = st.sampled_from(["spelt"] * 7 + ["sdpa", "float", "mask"])
    return st.builds(
        lambda m, how, q_len, kv_len, seed: Case(*(tuple(x) for x in zip(*m, strict=True)), how, q_len, kv_len, seed),
        masks, how, st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6),
    )  # fmt: skip
