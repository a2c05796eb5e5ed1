"""What a report is about, and where it was made: for whoever is sent it."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from fuse.torch_private import original, pytree

_MANY = 12  # tensors of a call that are told one by one


@dataclass(frozen=True)
class Subject:
    """``model``: its class or function, with its parameters; ``inputs``: the tensors of the call, a line each."""

    model: str = ""
    inputs: tuple[str, ...] = ()

    @staticmethod
    def of(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Subject:
        inner = original(model)
        name = str(getattr(inner, "__qualname__", type(inner).__name__))
        if isinstance(inner, torch.nn.Module) and (count := sum(p.numel() for p in inner.parameters() if not is_lazy(p))):
            name += f", {_magnitude(count)} parameters"
        leaves = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]
        told = [f"{_place(path)} {_tensor(x)}".strip() for path, x in leaves if isinstance(x, torch.Tensor)]
        more = [f"and {len(told) - _MANY} other tensors"] * (len(told) > _MANY)
        return Subject(name, (*told[:_MANY], *more))


def _magnitude(count: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _place(path: Sequence[Any]) -> str:
    """Of a tensor in (args, kwargs): the name of its argument, or where it stands."""
    by_name = path[0].idx == 1
    inside = "".join(map(str, path[2:] if by_name else path[1:]))
    return f"{path[1].key}{inside}" if by_name else f"args{inside}"


def _tensor(x: torch.Tensor) -> str:
    device = "" if x.device.type in ("cpu", "meta") else f" on {x.device}"
    return f"{str(x.dtype).removeprefix('torch.')} [{', '.join(map(str, x.shape))}]{device}"


def surroundings() -> Iterator[tuple[str, str]]:
    """Date, command, machine and versions of this process."""
    yield "made", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    if command := _command():
        yield "by", command
    yield "on", machine()
    found = [f"{name} {_version(name)}" for name in ("torch-fuse", "torch", "triton") if _version(name)]
    yield "with", ", ".join([*found, f"Python {platform.python_version()}"])


def _command() -> str:
    """As it was typed; "" in a notebook, and where there is none."""
    program, *words = sys.orig_argv or [""]
    if "ipykernel_launcher" in words or not words:
        return ""
    return shlex.join([Path(program).name, *words])


def machine() -> str:
    cpu = f"{_processor()}, {os.cpu_count()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return ", ".join([cpu, *dict.fromkeys(torch.cuda.get_device_name(i) for i in gpus)])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
