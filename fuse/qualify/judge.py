"""A kernel earns its place: it is checked before it is trusted, and timed before it is preferred."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.fx import Node

from fuse import targets
from fuse.memoize import at_forget
from fuse.ops import warm
from fuse.ops.attention import parsed
from fuse.ops.warm import ExpectedCall
from fuse.passes.read.varlen import VARLEN, VARLEN_OUT
from fuse.qualify import faster, right, verdict
from fuse.qualify.problem import map_used
from fuse.qualify.verdict import Case, Kind, Verdict, case_of
from fuse.report.reasons import EditRefused, KernelRefused, Reason, Slower
from fuse.report.runs import Runs
from fuse.report.site import Site
from fuse.targets import registry
from fuse.torch_private import default_store

log = logging.getLogger(__name__)
# Operators that SDPA does not stand for: nothing is timed beside them.
_WITH_KERNELS = ("flex_attention", VARLEN, VARLEN_OUT)
_KEPT, _UNCHECKED = Verdict("kept"), Verdict("refused", "there was no memory to check it")
_REASONS: dict[Kind, Callable[[str], Reason | None]] = {
    "kept": lambda why: None, "refused": KernelRefused, "edit refused": EditRefused, "slower": Slower,
}  # fmt: skip
_decided: dict[Case, Verdict] = {}
at_forget(_decided.clear)


@dataclass(frozen=True)
class Question:
    """One call, which of its operands want a gradient, and the operator that the site is a call of, or "".

    traced  as in fuse.qualify.faster
    """

    call: ExpectedCall
    wanted: tuple[bool, ...]
    written: str
    traced: bool


@dataclass
class Trial:
    """The calls of one graph: what was decided of them before it was read, and what is still to be decided.

    anew    nothing that was decided before counts, as it may have been of other kernels: where FUSE_DUMP has edited ones, say
    asked   whoever chose the target wants it wherever it is right
    traced  Inductor will write the calls
    """

    anew: bool = False
    asked: bool = False
    traced: bool = True
    _open: dict[Case, Question] = field(default_factory=dict)
    _own: dict[Case, Verdict] = field(default_factory=dict)
    _cases: dict[tuple[object, ...], Case] = field(default_factory=dict)

    def leave(self, op: Node, wanted: tuple[bool, ...], written: str) -> Reason | None:
        """As fuse.passes.policy.Leave."""
        call = warm.expected(op)
        if call is None or math.prod(call.sizes) == 0:
            return None
        if call.device.type == "cuda" and written in _WITH_KERNELS and not self.asked:
            return Slower(f"{written}, which has kernels of its own on GPUs")
        question = Question(call, wanted, written, self.traced)
        case = case_of(call, wanted, written, self.traced)
        self._cases[parsed(call.spec), call.target, call.sizes, wanted] = case
        found = self._own.get(case) if self.anew else _known(case)
        if found is None:
            self._open[case] = question
        return None if found is None else _REASONS[found.kind](found.why)

    def decide(self) -> bool:
        """Decides all that is open, waiting for its kernels; whether anything has to be left."""
        found = {case: _judge(case, question) for case, question in self._open.items()}
        self._open.clear()
        self._own |= found
        return any(v.kind != "kept" for v in found.values())

    def measured(self, site: Site) -> str:
        """What a site that is fused took beside what torch has; "" where nothing was timed."""
        case = self._cases.get((site.spec, site.target, site.sizes, site.wanted))
        return "" if case is None else self._own.get(case, _decided.get(case, _KEPT)).why


def _known(case: Case) -> Verdict | None:
    """What was decided in this process, another of its group, or an earlier run."""
    if case not in _decided and (found := verdict.read(case)) is not None:
        _decided[case] = _agreed(case, found)
    return _decided.get(case)


def _judge(case: Case, question: Question) -> Verdict:
    """Decides, and keeps what was decided."""
    call, wanted, device = question.call, question.wanted, question.call.device
    with _on(device), torch.autocast(device.type, enabled=False), torch.enable_grad():  # whatever surrounds the user's call
        found = _decided[case] = _agreed(case, _judged(question))
    if found.kind == "edit refused":
        _warn(f"fuse does not use {found.why}. {EditRefused.unblock[0].upper()}{EditRefused.unblock[1:]}")
    if found == _UNCHECKED or any(part.by != "kernel" for part in _running(call, wanted)):
        return found  # it says nothing of the kernel that another run will have
    verdict.write(case, found)
    if found.kind == "refused":
        source = targets.kernel(parsed(case.spec), case.target).source
        _warn(f"fuse does not use the kernel {source}: {found.why}. Please send it, with {case.path}.")
    return found


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def _judged(question: Question) -> Verdict:
    call, wanted = question.call, question.wanted
    if not registry.named(call.target).generated:
        return _KEPT
    try:
        wrong = next((f for f in right.findings(call, wanted) if f.wrong), None)
    except torch.OutOfMemoryError:
        return _UNCHECKED
    except Exception as error:
        return _refused(call, wanted, f"{type(error).__name__}: {error}")
    if wrong is not None:
        return _refused(call, wanted, str(wrong))
    # Who edits a kernel wants it to run, be it slow.
    return _KEPT if question.written in _WITH_KERNELS or edited_kernels(call, wanted) else _timed(question)


def _refused(call: ExpectedCall, wanted: tuple[bool, ...], why: str) -> Verdict:
    edited = " and ".join(f"the edited kernel {file}" for file in edited_kernels(call, wanted))
    return Verdict("edit refused", f"{edited}: {why}") if edited else Verdict("refused", why)


def _running(call: ExpectedCall, wanted: tuple[bool, ...]) -> Iterable[Runs]:
    """What computes it, when that is built."""
    spec = parsed(call.spec)
    targets.kernel(spec, call.target)
    if (use := map_used(spec)) is not None:
        targets.map_kernel(use.tile_map, call.target)
    if any(wanted):
        targets.backward_kernel(spec, call.target, wanted)
    matrices = [parsed(text) for text, _ in call.weights]
    for matrix in matrices:
        targets.weights_kernel(matrix, call.target)
    return targets.running(spec, call.target, wanted, matrices).values()


def edited_kernels(call: ExpectedCall, wanted: tuple[bool, ...]) -> tuple[Path, ...]:
    """The files of those that somebody edited (FUSE_DUMP), when all are built."""
    return tuple(part.file for part in _running(call, wanted) if part.by == "edited kernel" and part.file is not None)


def _timed(question: Question) -> Verdict:
    try:
        times = faster.times(question.call, question.wanted, question.written == faster.SDPA, question.traced)
    except Exception:  # what torch cannot do here is no rival
        log.debug("nothing could be timed beside a kernel", exc_info=True)
        return _KEPT
    if times is None:
        return _KEPT
    return Verdict("slower" if times.lost else "kept", str(times))


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _agreed(case: Case, found: Verdict) -> Verdict:
    """What the first process of a group decided: all of them run the same kernels."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return found
    try:
        store = default_store()
        return Verdict(**json.loads(store.compare_set(f"fuse-verdict-{case.key}", "", json.dumps(asdict(found)))))
    except Exception:  # a store of another kind, or one whose process has ended
        log.warning("processes of a group could not agree on kernels: each decides for itself", exc_info=True)
        return found
