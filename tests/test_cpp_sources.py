"""C++ sources read from the top: an outline first, and no line beyond the width of a screen."""

from __future__ import annotations

import re

import pytest
from specs import CASES

from fuse.targets.cpp.outline import WIDTH
from fuse.targets.cpp.plan import plan
from fuse.targets.cpp.render import render

NAMES = ("plain", "causal", "window", "padding", "dense_bool", "decomposed_positions", "masked_rows_lowest_fill", "sinks")


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"])
@pytest.mark.parametrize("name", NAMES)
class TestSources:
    def source(self, name: str, isa: str) -> str:
        spec = CASES[name]("bfloat16" if isa == "avx512_bf16" else "float32").spec
        return render(spec, plan(spec, isa))

    def test_lines_of_code_fit_the_width(self, name: str, isa: str) -> None:
        lines = self.source(name, isa).split("\n")
        assert not [x for x in lines if len(x) > WIDTH and not x.startswith("//")]

    def test_the_outline_names_what_follows_it(self, name: str, isa: str) -> None:
        text = self.source(name, isa)
        outline, body = text.split("#define FUSE_WIDTH", 1)
        listed = re.findall(r"^//   (\w+) ", outline.split("contents, in order")[1], re.M)
        assert {"BatchIndex", "weigh", "fuse_attention"} <= set(listed)
        assert not [x for x in listed if not re.search(rf"\b{x}\b", body)]
        assert listed == sorted(listed, key=lambda x: re.search(rf"^[^/].*\b{x}\b *[({{_]", body, re.M).start())  # type: ignore[union-attr]

    def test_the_top_says_what_each_operand_is_and_where_the_result_goes(self, name: str, isa: str) -> None:
        top = self.source(name, isa).partition("#define FUSE_WIDTH")[0]
        for part, axes in (("query", "q, d"), ("key", "k, d"), ("value", "k, e")):
            assert re.search(rf"^// operand \d \w+, \d dimensions: .*{part} at \[b0, b1, {axes}\]", top, re.M)
        assert "\n// sizes     B0, B1, q_len, kv_len" in top
        assert re.search(r"\n// result    \w+ at \[b0, b1, q, e\], in memory by b0, b1, q, e\n", top)
