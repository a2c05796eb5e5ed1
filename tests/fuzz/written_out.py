"""Attention that is written out: a product, what is done to scores, masks, a normalisation, weights, a product."""

from __future__ import annotations

import re

from hypothesis import strategies as st

from fuzz import masks
from fuzz.draft import Draft
from fuzz.program import listed


def scores(d: Draft) -> None:
    """``s``, of (…, n, m)."""
    z, scale = d.sizes, d.one(round(d.sizes.qk**-0.5, 4), 0.25, 1.0)
    at = d.one("score", "query", "both", "quotient")
    if at == "query":
        d.write(d.one(f"q = q * {scale}", f"q = q / {round(1 / scale, 4)}"))
    if at == "both":
        d.write(f"q, k = q * {round(scale**0.5, 4)}, k * {round(scale**0.5, 4)}")
    spelt = ["q @ k.mT", "torch.matmul(q, k.transpose(-1, -2))", "(k @ q.mT).mT", 'torch.einsum("...qd,...kd->...qk", q, k)',
             "(q[..., :, None, :] * k[..., None, :, :]).sum(-1)"]  # fmt: skip
    if z.lead == z.kv_lead and len(z.lead) > 1:
        many = listed(z.lead)
        spelt += [f"torch.bmm(q.flatten(0, {len(z.lead) - 1}), k.flatten(0, {len(z.lead) - 1}).mT).view({many}, n, m)"]
    if z.lead == z.kv_lead and len(z.lead) == 1:
        spelt += ["torch.bmm(q, k.mT)", f"torch.baddbmm(q.new_empty({z.lead[0]}, n, m), q, k.mT, beta=0, alpha=0.5)"]
    d.write(f"s = {d.one(*spelt)}")
    if at in ("score", "quotient"):
        d.write(f"s = s * {scale}" if at == "score" else f"s = s / {round(1 / scale, 4)}")


def broadcast(d: Draft) -> str:
    """A new input of a shape that broadcasts to the scores'."""
    z = d.sizes
    dims: list[str] = [str(x) if d.often(50) else "1" for x in (*z.lead, "n", "m")]
    while d.often(50) and len(dims) > 1 and dims[0] == "1":
        dims.pop(0)
    return d.given(f"randn({listed(dims)})")


def step(d: Draft) -> str:
    """One operation on the score."""
    z = d.sizes
    heads = z.lead[-1] if z.lead else 0
    turn = ".movedim(-1, 0)" if heads else ""
    kind = d.one("bias", "bias", "bias", "table", "distance", "plain", "plain", "plain", "inplace", "gate", "bucket")
    if kind == "bias":
        x = broadcast(d)
        spelt = ("s + {}", "{} + s", "s - {}", "torch.add(s, {}, alpha=0.5)", "torch.maximum(s, {})")
        return f"s = {d.one(*spelt).format(x)}"
    if kind == "gate":
        return f"s = s * {broadcast(d)}"
    if kind == "table":
        table = d.given(f"randn(n + m - 1{f', {heads}' if heads else ''})")
        return f"s = s + {table}[j - i + n - 1]{turn}"
    if kind == "bucket":
        table = d.given(f"randn(9{f', {heads}' if heads else ''})")
        return f"s = s + {table}[(j - i).clamp(-4, 4) + 4]{turn}"
    if kind == "distance":
        slopes = d.given(f"randn({heads})") + "[:, None, None]" if heads and d.often(60) else "0.125"
        return d.one(f"s = s - (i - j).abs() * {slopes}", f"s = s + {slopes} * (j - i)")
    if kind == "inplace":
        return d.one("s *= 0.5", f"s += {broadcast(d)}", "s.mul_(0.5)", "s[..., 0] = 0.5", "s = s.clamp_(-3, 3)")
    return d.one(
        "s = torch.tanh(s / 5) * 5", "s = s.clamp(-2, 2)", "s = F.leaky_relu(s, 0.1)", "s = s.abs()", "s = -s", "s = s / 0.7",
        "s = torch.where(j % 2 == 0, s, s * 0.5)", "s = s.contiguous()", "s = s.clone()", "s = s.to(torch.float32)",
        "s = s.mT.contiguous().mT", "s = s.sigmoid()", "s = torch.where(i == j, 1.5, s)", "s = s.flatten().view_as(s)",
        "s = F.softplus(s)", "s = s.relu() - 0.5 * s", "s = s + 100",
    )  # fmt: skip


def form(d: Draft) -> str:
    """The expression of a mask that broadcasts to the scores."""
    text = d.draw(masks.forms(batches=len(d.sizes.lead) == 2, stored=True))
    for name in masks.read(text):
        d.given(masks.DATA[name].replace("B", str(d.sizes.lead[0] if d.sizes.lead else 1)), name)
    return text


def mask(d: Draft) -> None:
    d.write(f"keep = {form(d)}")
    spelt = d.draw(st.sampled_from(masks.SPELLINGS)).format(keep="keep")
    if d.dtype == "float16":  # eager refuses to fill with what it cannot hold
        spelt = re.sub(r"(masked_fill\(.*), -1e\d\)$", r"\1, -3e4)", spelt)
    d.write(f"s = {spelt}")


# -------------------------------------------------------------------------------------------------------- normalisation

SOFTMAX = (
    "p = s.softmax(-1)",
    "p = F.softmax(s, dim=-1)",
    "p = F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype)",
    "p = s.mT.softmax(-2).mT",
    "e = s.exp(); p = e / e.sum(-1, keepdim=True)",
    "e = torch.exp(s - s.amax(-1, keepdim=True)); p = e / e.sum(-1, keepdim=True)",
    "e = (s - s.max(-1, keepdim=True).values.detach()).exp(); p = e / e.sum(-1, True)",
    "e = s.exp(); p = e * (1 / e.sum(-1).unsqueeze(-1))",
    "p = F.log_softmax(s, -1).exp()",
    "p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))",
    "p = F.softmin(-s, -1)",
    "e = s.exp(); p = e / (1 + e.sum(-1, keepdim=True))",
    "e = s.exp(); p = e / (e.sum(-1, keepdim=True) + 1e-3)",
    "c = s.amax(-1, keepdim=True).clamp(min=0); e = (s - c).exp(); p = e / (e.sum(-1, keepdim=True) + (-c).exp())",
    "p = (s - s.amax().detach()).softmax(-1)",
    "p = F.pad(s, (0, 1)).softmax(-1)[..., :-1]",
    "s = s - s.amax(-1, keepdim=True); s.exp_(); s /= s.sum(-1, keepdim=True); p = s",
    "p = (s - s.mean(-1, keepdim=True)).softmax(-1)",
    "p = s.softmax(-2)",
    "e = s.exp(); p = e / e[..., : m - 1].sum(-1, keepdim=True)",
    "p = s.softmax(-1).clamp(max=0.5)",
)
NEAR_MISSES = 4  # of these, the last
PRODUCTS = (
    "p @ v", "torch.matmul(p, v)", "(v.mT @ p.mT).mT", 'torch.einsum("...qk,...ke->...qe", p, v)',
    "(p[..., None] * v[..., None, :, :]).sum(-2)",
)  # fmt: skip


def normalised(d: Draft) -> None:
    """``out``, of (…, n, features of values)."""
    z = d.sizes
    way = d.one(*("softmax",) * 8, "deferred", "sink", "sink", "sets", "terms", "near miss")
    product = d.one(*PRODUCTS)
    if way == "sets":
        return sets_of_keys(d)
    if way == "deferred":
        d.write(d.one("p = s.exp()", "p = (s - s.amax(-1, keepdim=True)).exp()"))
        weighed(d)
        d.write(f"out = {product} / p.sum(-1, keepdim=True)")
        return
    if way == "sink" and z.lead:
        sink = d.given(f"randn({z.lead[-1]})")
        d.write(f"sink = {sink}[:, None, None].expand({listed(z.lead)}, n, 1)")
        d.write("p = torch.cat([s, sink], -1).softmax(-1)[..., :-1]")
    else:
        spelt = SOFTMAX[-NEAR_MISSES:] if way == "near miss" else SOFTMAX[:-NEAR_MISSES]
        for line in d.one(*spelt).split("; "):
            d.write(line)
    if way == "terms":
        for line in d.one(*TERMS[: len(TERMS) if z.lead == z.kv_lead else 1]).split("; "):
            d.write(line)
    weighed(d)
    d.write(f"out = {product}")


TERMS = (
    "p = p + 0.1",
    "p = p - 0.3 * (q @ k.mT * 0.2).softmax(-1)", "p += (q.flip(-1) @ k.mT).masked_fill(j > i, -1e4).softmax(-1)",
    "p = p * 0.7 + (q @ k.mT * 0.2).softmax(-1) * 0.3; p = p / p.sum(-1, keepdim=True)",
)  # fmt: skip


def sets_of_keys(d: Draft) -> None:
    """A second set of keys and values under the same softmax."""
    z, n = d.sizes, d.one(5, 1, 16)
    lead = z.lead if d.often(70) else ()
    k, v = (d.given(f"randn({listed((*lead, n, features))})") for features in (z.qk, z.v))
    d.write(f"p = torch.cat([s, (q @ {k}.mT * 0.2).to(s.dtype)], -1).softmax(-1).to(v.dtype)")
    parts = ("p[..., :m] @ v", f"p[..., m:] @ {v}")
    d.write(f"out = {' + '.join(parts if d.often(50) else parts[::-1])}")


POSITIVE = ("p = s.sigmoid()", "p = F.relu(s).square() + 0.1", "p = F.softplus(s)", "p = F.elu(s) + 1")
FUNCTIONS = (*POSITIVE, "p = torch.tanh(s)", "p = F.relu(s)", "p = F.relu(s).square() / m", "p = (s / 4).exp()", "p = s * 0.9")
HIDDEN = ("p = p.masked_fill(~keep, 0)", "p = p * keep", "p = torch.where(keep, p, 0.0)", "p = keep.to(p.dtype) * p")


def unnormalised(d: Draft) -> None:
    """``out`` without a softmax: of functions of scores, as they are or divided by their sum."""
    way = d.one("", "", "deferred", "divided", "by number")
    d.write(d.one(*(POSITIVE if way in ("deferred", "divided") else FUNCTIONS)))
    if d.often(60):
        d.write(f"keep = {form(d)}")
        d.write(d.one(*HIDDEN))
    if way == "divided":
        d.write("p = p / p.sum(-1, keepdim=True)")
    product = d.one(*PRODUCTS)
    d.write("p = p.to(v.dtype)")
    ends = {"deferred": " / p.sum(-1, keepdim=True)", "by number": d.one(" / m", " * 0.3")}
    d.write(f"out = {product}{ends.get(way, '')}")


WEIGHTS = (
    "p = p * 0.5", "p = F.dropout(p, 0.3, training=False)", "p = p.clone()", "p *= 2", "p = p.masked_fill(i == j, 0.0)",
    "p = p * torch.where(j > 2, 1.0, 0.5).to(p.dtype)",
)  # fmt: skip


def weighed(d: Draft) -> None:
    """What follows the softmax."""
    if d.often(30):
        d.write(f"p = p * {broadcast(d)}" if d.often(50) else d.one(*WEIGHTS))
    promoted = ("s.to(torch.float32)", "* 0.125", "0.125 *")
    if d.dtype != "float32" and any(text in line for line in d.lines for text in promoted):
        d.write("p = p.to(v.dtype)")
