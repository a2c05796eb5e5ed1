"""A kernel that is wrong is refused, one that is slower is left, and what was decided is kept; no right kernel is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import call_of, wanted_of
from faulty_target import FAULTS, Fault, FaultyKernel, FaultyTarget, Results
from problems import B0, B1, K, Problem, Q, bias_read_in_two_ways, hide, load, op, problem, rand
from specs import CASES, RANDOM_CASES
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

import fuse
from fuse import targets
from fuse.ir.expr import Expr, apply, const
from fuse.qualify import faster, judge, right
from fuse.qualify.problem import laid_out, small
from fuse.qualify.verdict import Verdict, case_of, read, write
from fuse.report.reasons import KernelRefused
from fuse.report.runs import Runs
from fuse.targets import reference, registry


def wrong(p: Problem, target: str, wanted: Sequence[bool]) -> list[str]:
    return [str(f) for f in right.findings(call_of(p, target), wanted) if f.wrong]


# ------------------------------------------------------------------------------------------------------------ right?


NAMES = [name for name, make in {**CASES, **RANDOM_CASES}.items() if 0 not in make("float32").sizes]


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES.__getitem__)
def test_what_is_right_is_not_refused(number: int) -> None:
    p = {**CASES, **RANDOM_CASES}[NAMES[number]](("float32", "bfloat16")[number % 2])
    assert not wrong(p, "reference", wanted_of(p))


@pytest.mark.compiler
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "grouped_query",
        "packed_qkv",
        "documents_in_any_order",
        "mapped_bool",
        "packed_sequences",
        "one_key",
        "head_dim_80",
        "retention",
        "linear_attention_causal",
        "dropout",
        "sinks",
        "t5_bias",
    ],
)
def test_no_right_kernel_is_refused(name: str) -> None:
    p = {**CASES, **RANDOM_CASES}[name]("float32")
    assert not wrong(p, "cpp", wanted_of(p)) and targets.kernel(p.spec, "cpp").runs.by == "kernel"


@pytest.mark.compiler
def test_places_that_are_computed_in_another_way_under_a_mask_are_the_same_places() -> None:
    """As DeBERTa's: drawn apart, the score that is seen would be another function than the score."""
    p = bias_read_in_two_ways()
    assert not wrong(p, "cpp", wanted_of(p))


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", ["query, key and value", "query and key", "query and value"])
def test_one_tensor_may_be_several_operands(
    shared: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores would be large twice over, its gradients sums of terms that cancel."""
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    x, y = (torch.randn(2, 40, 16).to(dtype).requires_grad_() for _ in range(2))

    def program(x: Tensor, y: Tensor) -> Tensor:
        key, value = (x if name in shared else y for name in ("key", "value"))
        return (x @ key.mT * 0.25).masked_fill(torch.ones(40, 40).triu(1) > 0, -torch.inf).softmax(-1) @ value

    torch.compile(program, backend="fuse", options={"inner": "aot_eager", "qualify": "once"})(x, y)
    (site,) = fuse.report().sites
    assert not isinstance(site.reason, KernelRefused), site.reason


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Fault], None]:
    """Registers a target "faulty"."""
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))

    def register(base: str, fault: Fault) -> None:
        targets.reset()
        registry.register(FaultyTarget(registry.named(base), fault))

    return register


def grouped(dtype: str = "float32", length: int = 200) -> Problem:
    """Causal, two groups of two heads, a bias for each head."""
    bias = rand(4, length, length, dtype=dtype)
    group = apply("floordiv", B1, const(2), dtype="int64")

    def score(s: Expr) -> Any:
        return hide(op("add", s, load(bias, 3, B1, Q, K)), op("le", K, Q), upper=op("add", Q, 1))

    return problem(
        dtype, bias, batch=(1, 4), q_len=length, kv_batch=(1, 2), kv_index=(B0, group), score=score, empty_row="zero"
    )


BASES = ["reference", pytest.param("cpp", marks=pytest.mark.compiler), pytest.param("triton", marks=pytest.mark.triton)]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("base", BASES)
def test_a_kernel_with_a_fault_is_refused(faulty: Callable[[str, Fault], None], base: str, fault: str) -> None:
    if base == "reference" and "log-sum-exp" in fault:
        pytest.skip("the reference computes it again")
    faulty(base, FAULTS[fault])
    p = grouped(length=200 if base != "triton" else 70)
    assert wrong(p, "faulty", wanted_of(p))
    if fault in list(FAULTS)[:9]:
        assert wrong(p, "faulty", [False] * 4), "without gradients, too"


@pytest.mark.parametrize("base", BASES[1:])
def test_the_same_kernel_without_a_fault_is_not(faulty: Callable[[str, Fault], None], base: str) -> None:
    faulty(base, Fault())
    p = grouped(length=200 if base != "triton" else 70)
    assert not wrong(p, "faulty", wanted_of(p))


# ---------------------------------------------------------------------------------------------------------- problems


def test_small_problems_lie_in_memory_as_the_operands_do() -> None:
    packed = torch.empty(2, 512, 3, 8, 64).permute(2, 0, 3, 1, 4)[1]
    made = laid_out(packed, (2, 2, 149, 64), torch.device("cpu"))
    assert made.stride() == (149 * 3 * 2 * 64, 64, 3 * 2 * 64, 1)
    shared = laid_out(torch.empty(1, 8, 512, 64).expand(4, 8, 512, 64), (2, 2, 149, 64), torch.device("cpu"))
    assert shared.stride(0) == 0


def test_small_problems_have_tails_and_keep_what_is_equal() -> None:
    p = small(call_of(grouped(), "cpp"), [False] * 4, 0)
    assert p.sizes[2] == p.sizes[3] == 149 and p.sizes[1] == 4
    longer = small(call_of(problem("float32", q_len=300, kv_len=512), "cpp"), [False] * 3, 0)
    assert longer.sizes[2] < longer.sizes[3]


# ----------------------------------------------------------------------------------------------------------- faster?


@dataclass(frozen=True)
class Slow:
    """Seconds that each call takes longer."""

    seconds: float

    def __call__(self, out: Tensor, lse: Tensor, operands: Sequence[Tensor]) -> Results:
        time.sleep(self.seconds)
        return out, lse


class Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(length: int = 64) -> list[Tensor]:
    return [rand(2, 3, length, 16, seed=i) for i in range(3)]


@pytest.fixture
def qualified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Decisions are made, and kept in this folder."""
    monkeypatch.setenv("FUSE_QUALIFY", "once")
    monkeypatch.setenv("FUSE_CACHE_DIR", str(tmp_path))
    yield tmp_path
    fuse.reset()


def compiled(target: str, **options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(Model(), backend="fuse", options={"target": target, "inner": "eager", **options})


def reason() -> str:
    return str(fuse.report().sites[-1].reason)


def test_a_slow_kernel_leaves_the_site_as_it_was(faulty: Callable[[str, Fault], None], qualified: Path) -> None:
    faulty("reference", Fault(results=Slow(0.01)))
    torch.testing.assert_close(compiled("faulty")(*inputs()), Model()(*inputs()))
    assert "left to scaled_dot_product_attention: " in reason() and " ms, fuse " in reason()


def test_a_wrong_kernel_leaves_the_site_as_it_was_with_one_warning(
    faulty: Callable[[str, Fault], None], qualified: Path
) -> None:
    faulty("reference", FAULTS["a tail that is dropped"])
    with pytest.warns(RuntimeWarning, match="Please send it") as heard:
        torch.testing.assert_close(compiled("faulty")(*inputs()), Model()(*inputs()))
    assert len(heard) == 1 and "its kernel was refused: error" in reason()


def test_a_kernel_that_raises_is_refused(faulty: Callable[[str, Fault], None], qualified: Path) -> None:
    def fails(out: Tensor, lse: Tensor, operands: Sequence[Tensor]) -> Results:
        raise RuntimeError("no such instruction")

    faulty("reference", Fault(results=fails))
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        torch.testing.assert_close(compiled("faulty")(*inputs()), Model()(*inputs()))


def test_gradients_decide_where_they_are_wanted(faulty: Callable[[str, Fault], None], qualified: Path) -> None:
    faulty("reference", FAULTS["a gradient that is added twice"])
    leaves = [x.requires_grad_() for x in inputs()]
    with pytest.warns(RuntimeWarning, match="the gradient of operand 2"):
        compiled("faulty")(*leaves).sum().backward()
    expected = torch.autograd.grad(Model()(*leaves).sum(), leaves)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


def test_what_surrounds_the_call_changes_no_decision(qualified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spied(*of: Any) -> Verdict:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return Verdict("kept")

    monkeypatch.setattr(judge, "_judged", spied)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        compiled("reference")(*inputs())
    assert seen == [(False, True)] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("written", ["flex_attention", "_varlen_attn"])
def test_operators_with_kernels_of_their_own_on_gpus_are_left_to_them_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    call = replace(call_of(grouped(), "triton"), device=torch.device("cuda", 0))
    monkeypatch.setattr(judge.warm, "expected", lambda op: call)
    monkeypatch.setattr(judge, "case_of", lambda *_: "case")
    monkeypatch.setattr(judge, "_known", lambda case: None)
    assert "kernels of its own on GPUs" in str(judge.Trial().leave(None, (), written))  # type: ignore[arg-type]
    assert judge.Trial(asked=True).leave(None, (), written) is None  # type: ignore[arg-type]


def test_leave_is_told_what_a_site_is_a_call_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setenv("FUSE_QUALIFY", "once")
    monkeypatch.setattr(judge.Trial, "leave", lambda self, op, wanted, written: told.append(written))
    x, lengths = rand(20, 2, 16), torch.tensor([0, 8, 20], dtype=torch.int32)
    head = rand(1, 2, 20, 16)
    for call in (
        lambda: varlen_attn(x, x, x, lengths, lengths, 12, 12),
        lambda: flex_attention(head, head, head),
        lambda: F.scaled_dot_product_attention(head, head, head),
        lambda: (head @ head.mT).softmax(-1) @ head,
    ):
        torch._dynamo.reset()
        torch.compile(call, backend="fuse", options={"inner": "eager"})()
    assert told == ["_varlen_attn", "flex_attention", faster.SDPA, ""]


def test_never_asks_nobody(faulty: Callable[[str, Fault], None], qualified: Path) -> None:
    faulty("reference", Fault(results=Slow(0.01)))
    compiled("faulty", qualify="never")(*inputs())
    assert fuse.report().sites[-1].fused and not list(qualified.rglob("verdict-*"))


def test_a_call_whose_scores_do_not_fit_has_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster, "_free", lambda device: 1000.0)
    assert faster.times(call_of(grouped(), "reference"), [False] * 4, called=True) is None


# -------------------------------------------------------------------------------------------------------- decisions


def test_what_was_decided_is_kept(
    faulty: Callable[[str, Fault], None], qualified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty("reference", Fault(results=Slow(0.01)))
    compiled("faulty")(*inputs())
    first = reason()
    fuse.reset()
    monkeypatch.setattr(judge, "_judged", lambda *_: pytest.fail("decided twice"))
    compiled("faulty")(*inputs())
    assert reason() == first


def test_always_decides_anew(faulty: Callable[[str, Fault], None], qualified: Path) -> None:
    faulty("reference", Fault(results=Slow(0.01)))
    compiled("faulty")(*inputs())
    first = reason()
    faulty("reference", Fault(results=Slow(0.02)))
    compiled("faulty", qualify="always")(*inputs())
    assert reason() != first


@pytest.mark.parametrize("by", ["edited kernel", "reference"])
def test_what_no_generated_kernel_showed_is_not_kept(
    faulty: Callable[[str, Fault], None], qualified: Path, monkeypatch: pytest.MonkeyPatch, by: Any
) -> None:
    """An edit goes away again, and a compiler may be installed."""
    monkeypatch.setattr(FaultyKernel, "runs", Runs(by, Path("mine.cpp") if by == "edited kernel" else None))
    faulty("reference", Fault(results=Slow(0.01)))
    compiled("faulty")(*inputs())
    assert fuse.report().sites[-1].recovered == (by == "edited kernel") and not list(qualified.rglob("verdict-*"))


def test_a_kernel_that_there_is_no_memory_to_check_is_not_used_and_nothing_is_kept(
    faulty: Callable[[str, Fault], None], qualified: Path
) -> None:
    def full(out: Tensor, lse: Tensor, operands: Sequence[Tensor]) -> Results:
        raise torch.OutOfMemoryError

    faulty("reference", Fault(results=full))
    torch.testing.assert_close(compiled("faulty")(*inputs()), Model()(*inputs()))
    assert "no memory to check it" in reason() and not list(qualified.rglob("verdict-*"))


def test_the_map_of_a_mask_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    p = CASES["mapped_bool"]("float32")
    assert not wrong(p, "reference", wanted_of(p))
    monkeypatch.setattr(right.targets, "map_kernel", lambda spec, target: lambda *given: 0 * reference.tile_map(spec, *given))
    assert any("the map of its mask" in said for said in wrong(p, "reference", wanted_of(p)))


def decided(folder: Path) -> Path:
    (found,) = folder.rglob("verdict-*.json")
    return found


@pytest.mark.parametrize("damage", ["", "{", "null", "cut", "edited", "folder"])
def test_a_decision_that_is_not_whole_is_made_again(qualified: Path, damage: str) -> None:
    case = case_of(call_of(grouped(), "reference"), [False] * 4, "")
    write(case, Verdict("slower", "x: 1 ms, fuse 2 ms"))
    path = decided(qualified)
    assert read(case) == Verdict("slower", "x: 1 ms, fuse 2 ms") and json.loads(path.read_text())["of"]["target"] == "reference"
    text = path.read_text()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text({"cut": text[:-20], "edited": text.replace("slower", "kept")}.get(damage, damage))
    assert read(case) is None
    write(case, Verdict("kept"))
    assert read(case) == Verdict("kept")


@pytest.mark.parametrize(
    ("found", "exact", "eager", "wrong"),
    [
        (True, True, True, False), (True, True, False, True), (True, False, True, False), (True, False, False, True),
        (False, True, True, True), (False, True, False, False), (False, False, True, False), (False, False, False, False),
    ],
)  # fmt: skip
def test_nan_is_asked_for_where_eager_and_float64_have_it_and_allowed_where_eager_has(
    found: bool, exact: bool, eager: bool, wrong: bool
) -> None:
    tensors = (torch.tensor(math.nan if nan else 1.0) for nan in (found, exact, eager))
    assert bool(right.misplaced_nan(*tensors)) == wrong


@pytest.mark.parametrize("wanted", [(True, False, True), (False, False, False)])
def test_sdpa_is_timed_as_inductor_calls_it(wanted: tuple[bool, ...]) -> None:
    """Kernels are called without autograd there, and so is what they are beside: it is half of a short call's time."""
    matrices = [torch.randn(1, 2, 9, 8) for _ in range(3)]
    direct, called = (faster.way(F.scaled_dot_product_attention, matrices, wanted, direct) for direct in (True, False))
    torch.testing.assert_close(direct(), called())
    with torch.profiler.profile() as run:
        direct()
    names = {event.name for event in run.events()}
    assert any("scaled_dot_product" in name for name in names) and not any("Backward" in name for name in names)


@pytest.mark.parametrize("moments", [{5: 0.5, 9: 0.3}, {4: 0.4, 6: 3.0, 7: 3.0}, dict.fromkeys(range(6, 10), 4.0)])
def test_a_moment_in_which_the_machine_is_faster_or_slower_decides_nothing(
    moments: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``moments``: what measurements, by number, take of their time."""
    taken = iter(range(100))
    monkeypatch.setattr(faster, "_on_cpu", lambda way, count: way() * moments.get(next(taken), 1.0))
    ours, other = faster.in_turn([lambda: 1.2, lambda: 1.0], torch.device("cpu"))
    assert ours == pytest.approx(1.2 * other) and next(taken) == 2 * (2 + faster._ROUNDS)


def test_one_way_takes_what_it_takes_in_the_middle_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([9.0, 9.0, 5.0, 1.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(faster, "_on_cpu", lambda way, count: next(times))
    assert faster.in_turn([lambda: None], torch.device("cpu")) == (3.0,)


def apart(x: Tensor) -> Tensor:
    """The same as a part of a larger tensor: twice as far from row to row."""
    return torch.empty(*x.shape[:-1], 2 * x.shape[-1], device="meta")[..., : x.shape[-1]]


def test_other_versions_sizes_layouts_compilers_and_gradients_are_other_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(grouped(), "reference")
    case = case_of(call, [False] * 4, "")
    others = [
        replace(case, versions="fuse 0"),
        case_of(call, [True] * 4, ""),
        case_of(call, [False] * 4, faster.SDPA),
        case_of(call_of(grouped(length=400), "reference"), [False] * 4, ""),
        case_of(replace(call, operands=(apart(call.operands[0]), *call.operands[1:])), [False] * 4, ""),
        case_of(replace(call, target="cpp"), [False] * 4, ""),
        case_of(call, [False] * 4, "", traced=False),
    ]
    monkeypatch.setenv("CXX", "c++ -g")
    others.append(case_of(replace(call, target="cpp"), [False] * 4, ""))
    assert len({c.key for c in (case, *others)}) == 9
    assert case_of(call_of(grouped(length=201), "reference"), [False] * 4, "").key == case.key


def test_two_processes_decide_at_once(qualified: Path) -> None:
    case = "t.case_of(t.call_of(t.grouped(), 'reference'), [False] * 4, '')"
    script = f"import sys, test_qualify as t; t.write({case}, t.Verdict(sys.argv[1]))"
    here = str(Path(__file__).parent)
    both = [subprocess.Popen([sys.executable, "-c", script, kind], cwd=here) for kind in ("kept", "slower")]
    assert [p.wait() for p in both] == [0, 0]
    assert read(case_of(call_of(grouped(), "reference"), [False] * 4, "")) in (Verdict("kept"), Verdict("slower"))


def test_processes_of_a_group_take_the_decision_of_the_first(qualified: Path) -> None:
    dist = torch.distributed
    case = case_of(call_of(grouped(), "reference"), [False] * 4, "")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        first, second = Verdict("slower", "x: 1 ms, fuse 2 ms"), Verdict("kept")
        assert judge._agreed(case, first) == first and judge._agreed(case, second) == first
    finally:
        dist.destroy_process_group()
