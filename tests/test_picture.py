"""The page draws the mask that the kernel has: its tiles are those that Python finds."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import mask_specs  # noqa: F401  (it registers its problems)
import pytest
import torch
from problems import B0, B1, CASES, KV_LEN, Q_LEN, K, Problem, Q, both, cast, hide, load, op, problem
from torch import Tensor

from fuse.ir.expr import Expr, apply, symbol, walk
from fuse.ir.grid import Grid
from fuse.report.picture import EVALUATED, EXAMPLES, Picture, draw

MASK_JS = Path(__file__).parents[1] / "templates/report/mask.js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="runs the page's script by node, which is not installed")
TILE = (16, 24)
# Evaluates masks on data that are given, or on examples.
RUN = """
const Mask = require(process.argv[1]);
const asked = JSON.parse(require("fs").readFileSync(0, "utf8"));
const read = tensors => (operand, at) => {
    const {shape, values} = tensors[operand];
    return values[at.reduce((place, x, i) => place * shape[i] + Math.min(Math.max(x, 0), shape[i] - 1), 0)];
};
const answers = asked.map(({picture, batch, tensors}) => {
    const load = tensors ? read(tensors) : Mask.examples(picture.examples, picture.sizes);
    const call = {sizes: picture.sizes, batch, load}, seen = Mask.evaluator(picture.predicate, call), entries = [];
    for (let q = 0; q < call.sizes.q_len; q++) for (let k = 0; k < call.sizes.kv_len; k++) entries.push(seen(q, k));
    return {tiles: Array.from(Mask.classes(picture.predicate, call, ...picture.tile).of), entries};
});
console.log(JSON.stringify({answers, operators: Mask.operators}));
"""


def asked(drawn: Picture, batch: dict[str, int], tensors: list[Tensor] | None = None) -> dict[str, Any]:
    data = {
        "predicate": drawn.predicate, "sizes": dict(drawn.sizes), "tile": drawn.tile,
        "examples": [vars(e) for e in drawn.examples],
    }  # fmt: skip
    given = None if tensors is None else [{"shape": t.shape, "values": t.flatten().tolist()} for t in tensors]
    return {"picture": data, "batch": batch, "tensors": given}


def answered(questions: list[dict[str, Any]]) -> dict[str, Any]:
    assert NODE is not None
    done = subprocess.run(
        [NODE, "-e", RUN, str(MASK_JS)], input=json.dumps(questions), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def tiles(seen: Tensor, rows: int, keys: int) -> list[int]:
    """0 empty, 1 partial, 2 full, row by row."""
    found = [tile for row in seen.split(rows) for tile in row.split(keys, dim=1)]
    return [2 if tile.all() else 1 if tile.any() else 0 for tile in found]


def visible(made: Problem, batch: dict[str, int]) -> Tensor:
    sizes = dict(zip(made.spec.symbols, made.sizes, strict=True))
    extents = {axis: (i, i + 1) for axis, i in batch.items()} | {"q": (0, sizes["q_len"]), "k": (0, sizes["kv_len"])}
    assert made.spec.mask is not None
    seen = Grid.over(extents, sizes, made.operands).evaluate(made.spec.mask.predicate)
    return seen.expand([b - a for a, b in extents.values()])[(0,) * len(batch)]


def check(answer: dict[str, list[int]], made: Problem, batch: dict[str, int]) -> None:
    seen = visible(made, batch)
    assert answer["entries"] == seen.int().flatten().tolist(), made.spec.mask
    assert answer["tiles"] == tiles(seen, *TILE), made.spec.mask


NAMES = {i: f"tensor{i}" for i in range(9)}
# What the page never gets: tensors of real numbers that decide are not drawn, and neither is what has no entries.
DRAWN = (
    "causal", "causal_long", "causal_offset", "causal_more_queries_than_keys", "window", "prefix", "dilated", "padding",
    "left_padding_and_causal", "documents", "packed_sequences", "packed_sequences_without_every_seventh_key", "dense_bool",
    "documents_in_any_order", "block_diagonal_or_first_keys", "listed_blocks", "mapped_bool", "masked_rows_infinite_fill",
)  # fmt: skip


def drawn(made: Problem) -> Picture:
    found = draw(made.spec, made.sizes, NAMES, TILE)
    assert isinstance(found, Picture), found
    return found


@needs_node
def test_tiles_are_those_that_python_finds() -> None:
    problems = [(CASES[name]("float32"), {"b0": b0, "b1": 0}) for name in DRAWN for b0 in (0, 1)]
    problems = [(made, batch) for made, batch in problems if batch["b0"] < made.sizes[0]]
    found = answered([asked(drawn(made), batch, made.operands[3:] and [*made.operands]) for made, batch in problems])
    for answer, (made, batch) in zip(found["answers"], problems, strict=True):
        check(answer, made, batch)
    assert {tile for answer in found["answers"] for tile in answer["tiles"]} == {0, 1, 2}


def truth(name: str, of: Expr) -> Expr:
    return apply(name, of, dtype="bool")


def arithmetic() -> list[Expr]:
    """Predicates that use every operator, on negative numbers too."""
    distance = op("sub", Q, K)
    half = op("mul", cast(distance, "float32"), 0.3)
    return [
        op("eq", op("mod", distance, 5), 2), op("lt", op("floordiv", distance, 7), -1), op("gt", op("abs", distance), 9),
        op("eq", op("sign", distance), 1), op("le", op("minimum", Q, K), op("maximum", op("neg", distance), 3)),
        op("ge", op("floor", half), -2.0), op("lt", op("ceil", half), op("trunc", op("add", half, 0.5))),
        op("xor", op("ne", op("mod", K, 3), 0), op("lt", Q, 30)), op("not", op("le", K, Q)),
        op("eq", cast(op("mul", distance, 5), "int8"), -56), op("le", op("div", half, 2.0), 1.0),
        op("or", truth("isnan", op("div", half, half)), truth("isinf", op("div", 1.0, half))),
        cast(op("mod", op("add", Q, K), 4), "bool"),
        op("gt", op("where", op("lt", K, 20), Q, op("sub", KV_LEN, Q_LEN)), 5),
        both(op("le", K, Q), op("lt", distance, symbol("window"))),
        op("gt", op("mul", cast(distance, "float32"), 0.1), op("div", cast(distance, "float32"), 10.0)),
    ]  # fmt: skip


@needs_node
def test_every_operator_is_evaluated_as_in_python() -> None:
    problems = [
        problem("float32", q_len=50, kv_len=70, symbols={"window": 20}, score=lambda s, p=p: hide(s, p)) for p in arithmetic()
    ]
    found = answered([asked(drawn(made), {}) for made in problems])
    for answer, made in zip(found["answers"], problems, strict=True):
        check(answer, made, {"b0": 0, "b1": 0})
    used = {getattr(n, "op", "") for p in arithmetic() for n in walk(p)}
    assert set(found["operators"]) == EVALUATED and not EVALUATED - used


@pytest.mark.parametrize(
    ("case", "roles"),
    [
        ("causal", []), ("prefix", ["length"]), ("padding", ["padding"]), ("documents", ["documents"]),
        ("packed_sequences", ["first", "end"]), ("dense_bool", ["entries"]), ("listed_blocks", ["listed"]),
        ("left_padding_and_causal", ["padding"]),
    ],
)  # fmt: skip
def test_an_example_stands_for_what_a_mask_reads(case: str, roles: list[str]) -> None:
    found = drawn(CASES[case]("float32")).examples
    assert [e.role for e in found] == roles and set(roles) <= set(EXAMPLES)
    assert [e.name for e in found] == [f"tensor{3 + i}" for i in range(len(roles))]


@needs_node
def test_examples_have_tiles_of_every_class() -> None:
    """So that the picture shows what the mask is good for."""
    cases = ("prefix", "padding", "documents", "packed_sequences", "dense_bool", "listed_blocks", "documents_in_any_order")
    found = [drawn(CASES[case]("float32")) for case in cases]
    long = [replace(p, sizes={**p.sizes, "q_len": 600, "kv_len": 600}) for p in found]
    for case, answer in zip(cases, answered([asked(p, {}) for p in long])["answers"], strict=True):
        assert {0, 2} <= set(answer["tiles"]), case


def test_what_cannot_be_drawn_says_why() -> None:
    ids = torch.zeros(2, 37, dtype=torch.int64)
    odd = op("eq", op("mod", load(ids, 3, B0, K), 2), 0)
    made = problem("float32", ids, score=lambda s: hide(s, odd))
    assert draw(made.spec, made.sizes, NAMES, TILE) == "no picture: there is no example of tensor3"
    bias = torch.zeros(2, 3, 37, 37)
    loaded = load(bias, 3, B0, B1, Q, K)
    for predicate, why in ((op("lt", loaded, 0.5), "no example of tensor3"), (op("gt", op("exp", loaded), 0.5), "exp")):
        made = problem("float32", bias, score=lambda s, p=predicate: hide(s, p))
        assert why in str(draw(made.spec, made.sizes, NAMES, TILE))
    made = problem("float32")
    assert draw(made.spec, made.sizes, NAMES, TILE) == ""
