"""How many programs are drawn, and for whom: few that are always the same (``ci``), or many from a seed (``deep``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture import engine

from fuzz.draw import Limits, programs
from fuzz.program import Program
from fuzz.run import Verdict, verdicts

# Programs are collected first and run together: when one is drawn nobody knows yet whether another fails.
_DRAWN = settings(database=None, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
settings.register_profile("ci", _DRAWN, derandomize=True)
settings.register_profile("deep", _DRAWN)
PROFILE = os.environ.get("FUSE_FUZZ", "ci")
SEED = int(os.environ.get("FUSE_FUZZ_SEED", "0"))
_SHRINKING_SECONDS = 90


@dataclass(frozen=True)
class Share:
    """Of the programs: for which target, how many of 300, and within which limits; how many of them are drawn together.

    fused   at least this part of them is, or the fuzzer shows nothing
    masked  and a mask is recovered in this part of those that are fused and have one
    narrow  in ``ci`` C++ kernels have blocks of one vector only, which is quicker to build; see ``together.narrow``
    """

    target: str
    count: int
    limits: Limits
    together: int
    fused: float = 0.6
    masked: float = 0.6
    narrow: bool = True


def least(part: float, count: int) -> float:
    """So many of ``count`` are that ``part`` of them; in ``deep``, whose programs are new each time, but for chance (3 σ)."""
    return part * count - (3 * (part * (1 - part) * count) ** 0.5 if PROFILE == "deep" else 0)


# Scores of few positions and many features are left alone where there is no softmax.
FEW = Limits(length=70, least=33, features=6, sources=("unnormalised",))
SHARES = {
    "reference": Share("reference", 204, Limits(length=33, features=64), 72),
    "cpp": Share("cpp", 24, Limits(), 24),
    "cpp, all blocks": Share("cpp", 12, Limits(), 12, fused=0.5, masked=0.0, narrow=False),
    "triton": Share("triton", 54, Limits(length=40, features=64), 27),
    "unnormalised": Share("reference", 24, FEW, 24, fused=0.6, masked=0.5),
    "unnormalised, triton": Share("triton", 12, FEW, 12, fused=0.6, masked=0.5),
    "unnormalised, cpp": Share("cpp", 12, FEW, 12, fused=0.6, masked=0.5),
    "inductor": Share("reference", 6, Limits(length=33, features=64, inner="inductor"), 6, fused=0.5, masked=0.0),
}
PROGRAMS = {"ci": 300, "deep": int(os.environ.get("FUSE_FUZZ_PROGRAMS", "10000"))}[PROFILE]


@dataclass(frozen=True)
class Part:
    """Programs of one share that are drawn, and run, together."""

    share: str
    number: int

    def __str__(self) -> str:
        return f"{self.share}-{self.number}"

    def verdicts(self) -> list[Verdict]:
        """In ``deep`` C++ kernels are as a user gets them."""
        share = SHARES[self.share]
        return verdicts(self.programs(), share.target, narrowed=share.narrow and PROFILE == "ci")

    def programs(self) -> list[Program]:
        found: list[Program] = []
        self._each(found.append, settings.get_profile(PROFILE))
        return found if PROFILE == "deep" else found[self.number * self._together :]

    def smallest(self, good: set[Program]) -> Verdict | None:
        """The first that is wrong and not ``good``, made smaller as long as it is wrong."""
        wrong: list[Verdict] = []

        def take(program: Program) -> None:
            if program not in good and (found := verdicts([program], SHARES[self.share].target)[0]).wrong:
                wrong.append(found)
                raise AssertionError

        engine.MAX_SHRINKING_SECONDS = _SHRINKING_SECONDS
        with suppress(Exception):  # what it raises, Hypothesis raises again
            self._each(take, settings(settings.get_profile(PROFILE), phases=(Phase.generate, Phase.shrink)))
        return wrong[-1] if wrong else None

    @property
    def _together(self) -> int:
        return SHARES[self.share].together

    def _each(self, take: Callable[[Program], None], chosen: settings) -> None:
        """``ci`` draws the programs of all parts in one sequence; in ``deep`` each part has a seed of its own."""
        count = self._together if PROFILE == "deep" else self._together * (self.number + 1)
        limits = SHARES[self.share].limits
        if PROFILE == "deep" and "plain" in limits.sources:  # what 300 programs have no room for
            limits = replace(limits, sources=limits.sources + ("written",) * 3)

        @settings(chosen, max_examples=count)
        @given(programs(limits))
        def one(program: Program) -> None:
            take(program)

        (one if PROFILE == "ci" else seed(self.number)(one))()


def parts() -> list[Part]:
    first = SEED if PROFILE == "deep" else 0
    return [
        Part(name, first + number)
        for name, share in SHARES.items()
        for number in range(-(-PROGRAMS * share.count // 300 // share.together))
    ]


# Hypothesis varies what it has drawn to come nearer to a target, of which there is none here: it would draw the same again.
engine.ConjectureRunner.generate_mutations_from = lambda *of: None  # type: ignore[method-assign]
