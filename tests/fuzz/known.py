"""Programs that were wrong once, or raised, under a name that says why; all are as in eager now."""

from __future__ import annotations

from dataclasses import dataclass

from fuzz.program import Program


@dataclass(frozen=True)
class Known:
    program: Program
    target: str = "reference"
    fused: bool = True


def heads(
    *lines: str, q: str = "randn(2, 33, 2, 24)", k: str = "randn(2, 33, 2, 24)", v: str = "randn(2, 33, 2, 24)", **more: str
) -> Program:
    """Trained attention of heads beside features; ``lines`` make ``out`` of ``q``, ``k``, ``v`` and of what ``more`` draws."""
    given = {"x0": q, "x1": k, "x2": v, **more}
    body = ("q, k, v = (x.transpose(1, 2) for x in (x0, x1, x2))", *lines, "return out.transpose(1, 2).flatten(2)")
    return Program(tuple(given.items()), body, training=True)


ATTEND = "out = (q @ k.mT * 0.2).softmax(-1) @ v"
_ONE_ELEMENT = "randn(2, 1, 4, 1)"
KNOWN = {
    "features that are no power of two": Known(
        heads(ATTEND, q="randn(2, 33, 4, 24)", k="randn(2, 33, 4, 24)", v="randn(2, 33, 4, 24)"), "triton"
    ),
    "packed side by side": Known(
        Program(
            (("x", "randn(2, 33, 170)"),),
            (
                "q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in x.split([80, 80, 10], -1))",
                ATTEND,
                "return out.transpose(1, 2).flatten(2)",
            ),
            training=True,
        ),
        "triton",
    ),
    "one key": Known(heads(ATTEND, k="randn(2, 1, 2, 24)", v="randn(2, 1, 2, 24)"), "triton"),
    "one query and one key": Known(
        heads(ATTEND, q="randn(2, 1, 2, 24)", k="randn(2, 1, 2, 24)", v="randn(2, 1, 2, 24)"), "triton"
    ),
    "keys written through a view": Known(
        Program(
            (("x0", "randn(9, 33)"), ("x1", "randn(33, 12)"), ("x2", "randn(9, 8)")),
            ("k = x1[..., 3:].mT", "k.copy_(k.flip(-1))", "return F.scaled_dot_product_attention(x0, k, x2)"),
            training=True,
        )
    ),
    "queries in bfloat16 and keys in float32": Known(  # which FlexAttention multiplies in float32
        Program(
            (("x0", "randn(1, 1, n, 16)"), ("x1", "randn(1, 1, m * 16)"), ("x2", "randn(1, 1, m, 16)")),
            ("return flex_attention(x0, x1.unflatten(2, (-1, 16)), x2)",),
            lengths=((9, 9), (2, 2)),
            dtype="bfloat16",
        )
    ),
    "keys written to under another name": Known(
        Program(
            (("x0", "randn(2, n, 16)"), ("x1", "randn(2, m, 16)"), ("x2", "randn(2, m, 8)")),
            (
                "t = torch.empty_like(x1)",
                "t[..., ::2], t[..., 1::2] = x1[..., ::2] * 0.8, x1[..., 1::2] + 0.1",
                "s = x0 @ t.type_as(x1).mT * 0.25",
                "t.type_as(x1).mul_(0.5)",
                "return s.softmax(-1) @ x2, torch.atleast_2d(t).add_(1)",
            ),
        )
    ),
    "one of two factors in float64": Known(
        Program(
            (
                ("x0", "randn(2, 2, n, 16)"), ("x1", "randn(2, 2, m, 16)"), ("x2", "randn(2, 2, m, 16)"),
                ("x3", "randn(5, 16)"), ("x4", "randn(5, 16)"),
            ),
            (
                "m = x1.shape[-2]",
                "p = torch.cat([x0 @ x1.mT * 0.25, x0 @ x3.mT * 0.2], -1).softmax(-1)",
                "return p[..., m:] @ x4 + p[..., :m] @ x2",
            ),
            dtype="float64",
            training=True,
        ),
        "triton",
    ),
    "one of everything": Known(heads(ATTEND, q=_ONE_ELEMENT, k=_ONE_ELEMENT, v=_ONE_ELEMENT), "triton"),
    "a gate of rows of a batch": Known(
        heads("out = ((q @ k.mT * 0.2).softmax(-1) * x3) @ v", x3="randn(2, 1, 33, 1)"), "triton"
    ),
    "a bias for all of a batch": Known(
        heads(
            "out = (q @ k.mT * 0.2 + x3).softmax(-1) @ v",
            q="randn(2, 100, 1, 24)", k="randn(2, 100, 1, 24)", v="randn(2, 100, 1, 24)", x3="randn(1, 100, 100)",
        ),
        "triton",
    ),
    "a sink of -100 in rows that see nothing": Known(
        heads(
            "i, j = torch.arange(33)[:, None], torch.arange(33)",
            "s = torch.where((i % 2 == 0) & (j <= i + 16), q @ k.mT * 0.2, -math.inf)",
            "sink = (x3 - 100).view(1, 2, 1, 1).expand(2, -1, 33, 1)",
            "out = torch.cat([s, sink], -1).softmax(-1)[..., :-1] @ v",
            x3="randn(2)",
        ),
        "triton",
    ),
    "a part of a split that is written to": Known(
        Program(
            (("x", "randn(2, 9, 48)"),),
            ("q, k, v = x.split([16, 16, 16], -1)", "q.mul_(0.5)", "return F.scaled_dot_product_attention(q, k, v)"),
        ),
    ),
    "batches that follow each other, of half a size each": Known(
        Program(
            (("q", "randn(2, 1, n, 16)"), ("k", "randn(2 * m, 1, 16)"), ("v", "randn(2, 1, m, 8)")),
            (
                "k = k.unflatten(0, (2, -1)).permute(0, 2, 1, 3)",
                "return F.scaled_dot_product_attention(q, k, v)",
            ),
            lengths=((30, 33), (20, 25)),
            training=True,
        ),
        "triton",
    ),
    "values that are written between two attentions": Known(
        Program(
            (("q", "randn(2, 5, 8)"), ("k", "randn(2, 9, 8)"), ("v", "randn(2, 9, 8)")),
            ("out = (q @ k.mT * 0.2).softmax(-1) @ v", "v.mul_(0.5)", "return (out @ k.mT).softmax(-1) @ v"),
        )
    ),
    "hidden scores that are NaN, as zero times infinity": Known(
        heads(
            "keep = torch.arange(33) <= torch.arange(33)[:, None]",
            "s = torch.where(keep, q @ k.mT * 0.2, -math.inf) + x3",
            "out = (s * keep.float() - 1e4 * (1 - keep.float())).softmax(-1) @ v",
            x3="randn(33, 33)",
        ),
    ),
    "log-sum-exp of rows whose scores are the lowest number": Known(
        heads(
            "hidden = torch.arange(33) > torch.arange(33)[:, None] - 2",
            "s = (q @ k.mT * 0.2).masked_fill(hidden, torch.finfo(torch.float32).min)",
            "out = torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v",
        ),
        fused=False,
    ),
    "log-sum-exp under a mask that is not separated from the score": Known(
        heads(
            "keep = (torch.arange(33) <= torch.arange(33)[:, None] - 2).float()",
            "s = F.softplus(q @ k.mT * 0.2) + (1 - keep) * torch.finfo(torch.float32).min",
            "out = torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v",
        ),
        fused=False,
    ),
    "a product of two dtypes, which eager refuses": Known(
        Program(
            (("q", "randn(9, 8)"), ("k", "randn(9, 8)"), ("v", "randn(9, 8)")),
            ("return ((q @ k.mT).float().softmax(-1)) @ v",),
            dtype="float16",
        ),
        fused=False,
    ),
}  # fmt: skip
