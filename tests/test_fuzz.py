"""Random programs are what they are in eager; see tests/fuzz.

make fuzz                 10,000 new ones, from a seed that it prints
make fuzz SEED=1234567    the same again
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz.known import KNOWN, Known
from fuzz.profiles import SHARES, Part, Share, least, parts
from fuzz.program import Program
from fuzz.run import Verdict, verdicts
from problems import own_products

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:fuse .* attention without its kernels"),
]
TIERS = {"triton": [pytest.mark.triton], "reference": []}  # by target; the others need a compiler


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """In eager as in the reference."""
    with own_products():
        yield


def tier(share: Share) -> list[pytest.MarkDecorator]:
    return [pytest.mark.compiler] if share.limits.inner == "inductor" else TIERS.get(share.target, [pytest.mark.compiler])


@pytest.mark.parametrize("part", [pytest.param(p, id=str(p), marks=tier(SHARES[p.share])) for p in parts()])
def test_random_programs_are_as_in_eager(part: Part) -> None:
    """And most of them are fused, and their masks recovered."""
    share = SHARES[part.share]
    prepared(share.target)
    found = part.verdicts()
    if any(v.wrong for v in found):
        smallest = part.smallest({v.program for v in found if not v.wrong})
        pytest.fail("\n\n".join(map(told, [*(v for v in found if v.wrong), *([smallest] if smallest else [])])), pytrace=False)
    fused = [v for v in found if v.fused]
    masked = [v for v in fused if "keep = " in v.program.text]
    assert len(fused) >= least(share.fused, len(found))
    assert sum(v.masked for v in masked) >= least(share.masked, len(masked))


@pytest.mark.parametrize(
    "known", [pytest.param(k, id=name, marks=TIERS.get(k.target, [pytest.mark.compiler])) for name, k in KNOWN.items()]
)
def test_a_program_that_was_wrong_once_is_as_in_eager(known: Known) -> None:
    prepared(known.target)
    (found,) = verdicts([known.program], known.target)
    assert not found.wrong
    assert found.fused == known.fused


def prepared(target: str) -> None:
    if target == "triton":
        pytest.importorskip("triton", reason="no Triton on this platform")
        import triton_interpreter  # noqa: F401  mends the interpreter


def told(verdict: Verdict) -> str:
    program: Program = verdict.program
    return f"# {verdict.wrong}\n{program.script(verdict.target)}"
