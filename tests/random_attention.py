"""Random attention as models write it: projections that are packed or not, heads beside features, groups that share keys, sizes
of one, feature counts from 1 to 130, biases and gates of any shape that broadcasts, sinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

Shape = tuple[int, ...]
DTYPES = (torch.float32,) * 3 + (torch.bfloat16, torch.float16, torch.float64)
MASKS = ("", "", "causal", "one ahead", "window", "padding", "a batch sees nothing", "odd rows see nothing")


@dataclass(frozen=True)
class Layout:
    """How a tensor of heads lies in memory: its shape from (batch, heads, length, features), and the view that gives these."""

    shape: Callable[[int, int, int, int], Shape]
    view: Callable[[Tensor, int, int], Tensor]


LAYOUTS = {
    "heads first": Layout(lambda b, h, s, d: (b, h, s, d), lambda x, b, h: x),
    "heads beside features": Layout(
        lambda b, h, s, d: (b, s, h * d), lambda x, b, h: x.view(b, x.shape[1], h, -1).transpose(1, 2)
    ),
    "length first": Layout(
        lambda b, h, s, d: (s, b, h * d),
        lambda x, b, h: x.view(x.shape[0], b * h, -1).transpose(0, 1).view(b, h, x.shape[0], -1),
    ),
    "heads behind length": Layout(lambda b, h, s, d: (b, s, h, d), lambda x, b, h: x.transpose(1, 2)),
    "heads beside batch": Layout(lambda b, h, s, d: (b * h, s, d), lambda x, b, h: x.view(b, h, *x.shape[1:])),
    "features first": Layout(lambda b, h, s, d: (b, h, d, s), lambda x, b, h: x.mT),
    "heads last": Layout(lambda b, h, s, d: (b, s, d, h), lambda x, b, h: x.permute(0, 3, 1, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """One program, and the shapes of what it takes.

    groups    heads of keys and values
    packed    how query, key and value share one tensor; "": they do not
    layouts   those of query, key and value, where they are tensors of their own
    sharing   how groups become heads
    product   how products are spelt
    scaled    what is scaled
    bias      shape of what is added to the score; empty: nothing
    sink      logit without a value; None: there is none
    gate      shape of what multiplies the probabilities; empty: nothing
    infinite  what is masked is minus infinity where a row may see nothing, too, if it has a sink
    joined    the result's heads are brought beside its features
    """

    batch: int = 2
    heads: int = 2
    groups: int = 2
    q_len: int = 33
    kv_len: int = 33
    qk_dim: int = 24
    v_dim: int = 24
    packed: str = ""
    layouts: tuple[str, str, str] = ("heads beside features",) * 3
    sharing: str = "expanded"
    product: str = "matmul"
    scaled: str = "score"
    bias: Shape = ()
    mask: str = ""
    sink: float | None = None
    gate: Shape = ()
    infinite: bool = True
    joined: bool = True
    dtype: torch.dtype = torch.float32

    # -------------------------------------------------------------------------------------------------------- tensors

    def inputs(self) -> list[Tensor]:
        """Query, key and value, or the tensor that packs them; bias, gate and sink where there are any; all in float64."""
        found = [*self._matrices(), *([self.bias] if self.bias else []), *([self.gate] if self.gate else [])]
        tensors = [_random(i, shape) for i, shape in enumerate(found)]
        return tensors if self.sink is None else [*tensors, self.sink + _random(len(found), (self.heads,))]

    def _matrices(self) -> list[Shape]:
        if self.packed == "side by side":
            return [(self.batch, self.q_len, self.heads * self.qk_dim + self.groups * (self.qk_dim + self.v_dim))]
        if self.packed == "by head":
            return [(self.batch, self.q_len, self.heads, 2 * self.qk_dim + self.v_dim)]
        if self.packed == "stacked":
            return [(self.batch, self.q_len, 3, self.heads, self.qk_dim)]
        sizes = ((self.heads, self.q_len, self.qk_dim), (self.groups, self.kv_len, self.qk_dim))
        shapes = (*sizes, (self.groups, self.kv_len, self.v_dim))
        return [LAYOUTS[name].shape(self.batch, *size) for name, size in zip(self.layouts, shapes, strict=True)]

    def unpack(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Query, key and value, each (batch, heads or groups, length, features); and the rest."""
        first, rest = tensors[0], list(tensors[1:])
        if self.packed == "side by side":
            widths = [self.heads * self.qk_dim, self.groups * self.qk_dim, self.groups * self.v_dim]
            parts = first.split(widths, -1)
            counts = (self.heads, self.groups, self.groups)
            q, k, v = (x.view(self.batch, self.q_len, n, -1).transpose(1, 2) for x, n in zip(parts, counts, strict=True))
            return q, k, v, rest
        if self.packed == "by head":
            q, k, v = first.transpose(1, 2).split([self.qk_dim, self.qk_dim, self.v_dim], -1)
            return q, k, v, rest
        if self.packed == "stacked":
            q, k, v = first.permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v, rest
        counts = (self.heads, self.groups, self.groups)
        views = (LAYOUTS[name].view for name in self.layouts)
        q, k, v = (view(x, self.batch, n) for view, x, n in zip(views, tensors, counts, strict=False))
        return q, k, v, rest[2:]

    # -------------------------------------------------------------------------------------------------------- program

    def __call__(self, *tensors: Tensor) -> Tensor:
        q, k, v, rest = self.unpack(tensors)
        score = self.scores(q, k)
        if self.bias:
            score = score + rest.pop(0)
        score = self.masked(score)
        gate = rest.pop(0) if self.gate else None
        if self.sink is None:
            weight = score.softmax(-1)
        else:
            sink = rest[0].view(1, -1, 1, 1).expand(self.batch, -1, self.q_len, 1)
            weight = torch.cat([score, sink], -1).softmax(-1)[..., :-1]
        out = self.product_of(weight if gate is None else weight * gate, self.shared(v))
        return out.transpose(1, 2).reshape(self.batch, self.q_len, -1) if self.joined else out

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.qk_dim**-0.5
        if self.scaled == "query":
            q = q * scale
        if self.scaled == "both":
            q, k = q * math.sqrt(scale), k * math.sqrt(scale)
        score = self.product_of(q, self.shared(k).mT)
        return score * scale if self.scaled == "score" else score

    def shared(self, x: Tensor) -> Tensor:
        """Keys or values for every head."""
        times = self.heads // self.groups
        if times == 1 or self.sharing == "in the product":
            return x
        if self.sharing == "repeated":
            return x.repeat_interleave(times, 1)
        return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)

    def product_of(self, a: Tensor, b: Tensor) -> Tensor:
        """Of (batch, heads, …) with (batch, heads or groups, …)."""
        if b.shape[1] != self.heads:
            return (a.unflatten(1, (self.groups, -1)) @ b[:, :, None]).flatten(1, 2)
        if self.product == "bmm":
            return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(self.batch, self.heads, a.shape[2], b.shape[3])
        return torch.einsum("bhij,bhjk->bhik", a, b) if self.product == "einsum" else a @ b

    def masked(self, score: Tensor) -> Tensor:
        q, k = torch.arange(self.q_len)[:, None], torch.arange(self.kv_len)
        lowest = torch.finfo(score.dtype).min
        fill = -math.inf if self.sink is not None and self.infinite else lowest
        if self.mask == "causal":
            return score.masked_fill(k > q + max(0, self.kv_len - self.q_len), -math.inf)
        if self.mask == "one ahead":
            return score.masked_fill(k > q + 1, lowest)
        if self.mask == "window":
            return torch.where((k <= q) & (k > q - 5), score, fill)
        if self.mask in ("padding", "a batch sees nothing"):
            least = int(self.mask == "padding" or self.batch == 1)
            lengths = least + torch.arange(self.batch) * (self.kv_len - least) // max(1, self.batch - 1)
            return score.masked_fill(k >= lengths[:, None, None, None], fill)
        if self.mask == "odd rows see nothing":
            return torch.where((q % 2 == 0) & (k <= q + self.kv_len // 2), score, fill)
        return score


def _random(seed: int, shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ strategies


def attentions() -> st.SearchStrategy[Attention]:
    few, many = st.sampled_from((1, 1, 2)), st.sampled_from((1, 2, 3))
    lengths = st.one_of(st.sampled_from((1, 2, 16, 17, 33, 64)), st.integers(1, 70))
    features = st.one_of(st.sampled_from((1, 8, 16, 24, 32, 40, 64, 80, 96, 128)), st.integers(1, 130))

    @st.composite
    def drawn(draw: st.DrawFn) -> Attention:
        batch, groups, times, qk_dim = draw(few), draw(few), draw(many), draw(features)
        packed = draw(st.sampled_from(("", "", "", "side by side", "by head", "stacked")))
        times = times if packed in ("", "side by side") else 1
        q_len = draw(lengths)
        kv_len = q_len if packed or draw(st.booleans()) else draw(lengths)
        v_dim = qk_dim if packed == "stacked" or draw(st.booleans()) else draw(features)
        heads = groups * times
        entry = st.tuples(*(st.sampled_from((1, n)) for n in (batch, heads, q_len, kv_len)))
        shapes = st.one_of(st.just(()), entry, entry.map(_short))
        return Attention(
            batch, heads, groups, q_len, kv_len, qk_dim, v_dim, packed,
            (draw(st.sampled_from(list(LAYOUTS))), draw(st.sampled_from(list(LAYOUTS))), draw(st.sampled_from(list(LAYOUTS)))),
            draw(st.sampled_from(("expanded", "repeated", "in the product"))),
            draw(st.sampled_from(("matmul", "bmm", "einsum"))), draw(st.sampled_from(("score", "query", "both"))),
            draw(shapes), draw(st.sampled_from(MASKS)), draw(st.sampled_from((None, None, None, 0.0, -100.0, -2000.0))),
            draw(shapes), draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(DTYPES)),
        )  # fmt: skip

    return drawn()


def _short(shape: Shape) -> Shape:
    """Without leading dimensions of one, as users write it."""
    return shape if shape[0] > 1 or len(shape) == 1 else _short(shape[1:])
