"""What was decided of a call, and where that is kept: measured once for a kernel, a device, versions and sizes."""

from __future__ import annotations

import contextlib
import hashlib
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

import torch

from fuse.ops.warm import ExpectedCall
from fuse.qualify.problem import strides_as
from fuse.settings import settings
from fuse.targets import records, registry
from fuse.targets.sealed import sealed

FORMAT = 3
_FEW = 16  # of each dimension of a tensor whose strides stand for a layout, whatever the sizes
Kind = Literal["kept", "refused", "edit refused", "slower"]


@dataclass(frozen=True)
class Verdict:
    """``kind``: the kernels run, were wrong, as rendered or as somebody edited them, or are slower than what torch has; ``why``
    has figures."""

    kind: Kind
    why: str = ""


class Subject:
    """What a verdict is about: a frozen dataclass. ``folder``: of the cache, where verdicts on it lie."""

    @property
    def folder(self) -> str:
        raise NotImplementedError

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:20]

    @property
    def path(self) -> Path:
        return settings().cache_dir / self.folder / f"verdict-{self.key}.json"


@dataclass(frozen=True)
class Case(Subject):
    """Calls of one kernel. Sizes count by their magnitude: half a power of two.

    written  the operator that the site is a call of; "" where it is written out
    traced   as in fuse.qualify.faster
    weights  as of an ExpectedCall
    """

    spec: str
    target: str
    device: str
    versions: str
    wanted: tuple[bool, ...]
    written: str
    traced: bool
    sizes: tuple[int, ...]
    weights: tuple[tuple[str, int], ...]
    layout: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.target


@dataclass(frozen=True)
class Step(Subject):
    """A call of a whole graph on a CPU: its code, its inputs in words, and what may change how long it takes."""

    code: str
    inputs: tuple[str, ...]
    device: str
    versions: str

    @property
    def folder(self) -> str:
        return "cpp"


def step_of(code: str, inputs: Sequence[torch.Tensor], compiler: str) -> Step:
    """``compiler``: what else the compiled graph depends on."""
    trained = torch.is_grad_enabled()
    words = tuple(f"{t.dtype} {tuple(t.shape)} {t.stride()} {trained and t.requires_grad}" for t in inputs)
    return Step(code, words, device_name(torch.device("cpu")), f"{_versions()}, {compiler}")


def case_of(call: ExpectedCall, wanted: Sequence[bool], written: str, traced: bool = True) -> Case:
    layout = tuple(f"{t.dtype} {strides_as(t, [_FEW] * t.dim())}" for t in call.operands)
    sizes = tuple(map(_magnitude, call.sizes))
    built = hashlib.sha256(registry.named(call.target).toolchain().encode()).hexdigest()[:12]
    versions = f"{_versions()}, toolchain {built}"
    device, weights = device_name(call.device), call.weights
    return Case(call.spec, call.target, device, versions, tuple(wanted), written, traced, sizes, weights, layout)


def _magnitude(n: int) -> int:
    """Twice the logarithm to base 2, rounded; small sizes are themselves, below zero."""
    return -n if n <= 8 else round(2 * math.log2(n))


def device_name(device: torch.device) -> str:
    """Which kind of device: another of the same kind decides the same."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.multi_processor_count} multiprocessors"
    return f"{_processor()}, {torch.get_num_threads()} threads"


@cache
def _processor() -> str:
    """Its generation, where the system tells."""
    told = ("vendor_id", "cpu family", "model", "CPU part")
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        found = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in told]
        return f"{' '.join(found)} {torch.backends.cpu.get_cpu_capability()}"
    return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


@cache
def _versions() -> str:
    """Of whatever may change a kernel or what it is compared with; fuse counts by its own files."""
    digest = hashlib.sha256()
    for package in ("fuse", "fuse.passes", "fuse.templates"):  # which an editable installation has in several places
        for file in sorted(Path(str(resources.files(package))).rglob("*")):
            if file.suffix in (".py", ".h", ".cpp", ".jinja"):
                digest.update(file.read_bytes())
    return f"fuse {digest.hexdigest()[:12]}, torch {torch.__version__}, triton {_triton()}"


def _triton() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


# ------------------------------------------------------------------------------------------------------------- on disk


def read(case: Subject) -> Verdict | None:
    """None where there is none, or what is there is not whole or of another case: it is decided anew."""
    try:
        found = records.read(case.path) or {}
        verdict = Verdict(**found["verdict"])
        return verdict if sealed(found) == sealed(_body(case, verdict)) else None
    except (TypeError, KeyError):
        return None


def write(case: Subject, verdict: Verdict) -> None:
    """A folder that cannot be written to costs the next run a measurement."""
    with contextlib.suppress(OSError):
        records.write(case.path, _body(case, verdict))


def _body(case: Subject, verdict: Verdict) -> dict[str, Any]:
    return {"format": FORMAT, "verdict": asdict(verdict), "of": asdict(case)}  # type: ignore[call-overload]
