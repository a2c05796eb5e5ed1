"""Masks and scores as a reader of the model would write them."""

from __future__ import annotations

import pytest
import torch
from programs import attend, heads, pass_over
from torch import Tensor, nn

from fuse.ir.expr import Apply, Expr, Load, Score, apply, const, index, symbol
from fuse.report.wording import mask_text, score_text

Q, K, B = index("q"), index("k"), index("b0")
NAMES = {0: "document", 1: "attention_mask", 2: "allowed"}


def op(name: str, a: Expr, b: Expr | int, dtype: str = "int64") -> Expr:
    return Apply(dtype, name, (a, const(b) if isinstance(b, int) else b))


def is_(name: str, a: Expr, b: Expr | int) -> Expr:
    return op(name, a, b, "bool")


def both(a: Expr, b: Expr) -> Expr:
    return is_("and", a, b)


def either(a: Expr, b: Expr) -> Expr:
    return is_("or", a, b)


def no(a: Expr) -> Expr:
    return Apply("bool", "not", (a,))


CAUSAL = is_("le", op("sub", K, Q), 0)
DOCUMENTS = is_("eq", op("sub", Load("int64", 0, (B, Q)), Load("int64", 0, (B, K))), 0)
ALLOWED = Load("bool", 2, (const(0), const(0), Q, K))


@pytest.mark.parametrize(
    ("predicate", "text"),
    [
        (CAUSAL, "k <= q"),
        (no(is_("gt", K, Q)), "k <= q"),
        (is_("lt", K, op("add", Q, 1)), "k <= q"),
        (is_("ge", Q, K), "k <= q"),
        (is_("lt", op("sub", K, Q), 0), "k < q"),
        (is_("lt", op("sub", Q, K), 4096), "q - k < 4096"),
        (is_("gt", K, op("sub", Q, 4096)), "q - k < 4096"),
        (is_("le", K, op("add", Q, 3)), "k - q <= 3"),
        (is_("le", K, op("add", Q, op("sub", symbol("kv_len"), symbol("q_len")))), "k <= q + kv_len - q_len"),
        (is_("ge", op("sub", K, 5), 0), "k >= 5"),
        (is_("lt", const(7), op("neg", K, K).operands[0]), "k > 7"),
        (is_("eq", op("floordiv", Q, 64), op("floordiv", K, 64)), "q // 64 == k // 64"),
        (DOCUMENTS, "document[q] == document[k]"),
        (both(both(CAUSAL, DOCUMENTS), CAUSAL), "k <= q and document[q] == document[k]"),
        (both(CAUSAL, either(is_("lt", K, 4), DOCUMENTS)), "k <= q and (k < 4 or document[q] == document[k])"),
        (no(either(no(CAUSAL), no(DOCUMENTS))), "k <= q and document[q] == document[k]"),
        (either(both(CAUSAL, DOCUMENTS), is_("lt", K, 4)), "k <= q and document[q] == document[k] or k < 4"),
        (is_("ne", apply("cast", Load("int32", 1, (B, K)), dtype="int64"), 0), "attention_mask[k] != 0"),
        (ALLOWED, "allowed[q, k]"),
        (no(ALLOWED), "not allowed[q, k]"),
        (both(Load("bool", 2, (B, K)), Load("bool", 2, (const(0), K))), "allowed[b0, k] and allowed[0, k]"),
    ],
)
def test_a_mask_reads_as_people_write_it(predicate: Expr, text: str) -> None:
    assert mask_text(predicate, NAMES) == text


def real(name: str, a: Expr, b: Expr) -> Expr:
    return Apply("float32", name, (a, b))


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (real("mul", Score("float32"), const(0.25, "float32")), "score * 0.25"),
        (real("sub", Score("float32"), real("sub", const(1.0, "float32"), const(2.0, "float32"))), "score - (1 - 2)"),
        (real("mul", real("add", Score("float32"), Score("float32")), const(2.0, "float32")), "(score + score) * 2"),
        (apply("tanh", real("div", Score("float32"), const(50.0, "float32")), dtype="float32"), "tanh(score / 50)"),
        (real("add", Score("float32"), const(0.0, "float32")), "score"),
        (Apply("float32", "cast", (op("sub", K, Q),)), "k - q"),
    ],
)
def test_a_score_has_the_parentheses_that_it_needs(score: Expr, text: str) -> None:
    assert score_text(score, {}) == text


def test_tables_are_named_by_what_they_were_made_of() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relative_attention_bias = nn.Embedding(64, 3)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            positions = torch.arange(9)
            return attend(q, k, v, self.relative_attention_bias(positions - positions[:, None] + 8).permute(2, 0, 1))

    (site,) = pass_over(Biased(), *heads()).sites
    assert site.formula == "score / 4 + relative_attention_bias.weight[b1, k + q_len - 1 - q]"
