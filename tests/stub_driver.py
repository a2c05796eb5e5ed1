"""A Triton driver for a GPU that is not there: kernels are compiled for it, and launched into nothing.

with_driver("sm_90")
kernel(operands, sizes)          # operands on the CPU; results are whatever memory held
launched()                       # the files of every kernel that was launched since
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fuse.targets.triton.plan import ARCHITECTURES, architecture

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_loaded: list[dict[str, Path]] = []
_names = list(ARCHITECTURES)


class StubDriver(DriverBase):
    """Every architecture is a device of its own, since Triton keeps what it compiled by device."""

    def __init__(self, name: str) -> None:
        self.arch = architecture(name)
        self.launcher_cls = lambda source, metadata: self.launch
        self.utils = self
        self.launches = 0
        self.programs: list[int] = []  # of each launch

    def launch(self, programs: int, *_: Any) -> None:
        self.launches += 1
        self.programs.append(programs)

    def get_current_target(self) -> GPUTarget:
        name = self.arch.name
        return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return _names.index(self.arch.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.arch.shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, self.spills(binary), 1024  # module, function, registers, spills, threads of a program at most

    def spills(self, binary: bytes) -> int:
        """Words of a thread in memory, as NVIDIA's driver counts them."""
        if self.arch.units == "mfma":
            return 0
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = subprocess.run([_TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return int(re.search(r"STACK:(\d+)", usage)[1]) // 4

    def unload_module(self, module: int) -> None:
        """From Triton 3.9 on, when a kernel is freed."""

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> str:
        return "cpu"

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    @classmethod
    def is_active(cls) -> bool:
        return False


def with_driver(name: str) -> StubDriver:
    """Makes ``name`` the current device."""
    made = StubDriver(name)
    driver.set_active(made)
    triton.knobs.runtime.kernel_load_end_hook = _remember
    return made


def _remember(module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
    _loaded.append({Path(path).suffix[1:]: Path(path) for path in files.values()})


def launched() -> list[dict[str, Path]]:
    """Files of the kernels that were loaded since the last call, by their kind: "cubin", "ptx", "amdgcn", "json"…"""
    found = list(_loaded)
    _loaded.clear()
    return found
