"""What a user can get wrong: one class each, the message says what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

GET_COMPILER = (
    "Install g++ or clang++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; "
    "conda: conda install cxx-compiler), or set CXX to a C++17 compiler."
)


class FuseError(Exception):
    """Base of every mistake that fuse reports to its user."""

    message = ""

    def __init__(self, **facts: object) -> None:
        super().__init__(self.message.format(**facts))

    def __reduce__(self) -> tuple[Any, ...]:
        """From one process to another it goes as its text."""
        return _said, (type(self), str(self))


def _said(kind: type[FuseError], text: str) -> FuseError:
    error = kind.__new__(kind)
    error.args = (text,)
    return error


class UnknownOption(FuseError):
    message = "there is no option {name!r}.{hint} fuse has {allowed}; any option of torch._inductor.config is passed on to it."


class InvalidOption(FuseError):
    message = "option {name!r} cannot be {value!r}; allowed: {allowed}.{hint}"


class InductorOnly(FuseError):
    message = (
        "{what} belongs to Inductor, but the inner compiler is {inner!r}: "
        'drop it, or use options={{"inner": "inductor"}} (the default).'
    )


class NotTunable(FuseError):
    message = (
        "option {what!r} is for kernels that have something to choose from, but the target is {target!r}: "
        "drop it, or use a target that has: {tunable}."
    )


class NoTorch(FuseError):
    message = "fuse cannot be loaded: {error}. It needs {needs}; installed: {found}."


class NoDevice(FuseError):
    message = "{what} needs a GPU that torch can use, and there is none."


class UnknownVariable(FuseError):
    message = "fuse reads no environment variable {name!r}.{hint} It reads {allowed}; correct or unset it."


class InvalidVariable(FuseError):
    message = "environment variable {name}={value!r} is not valid; allowed: {allowed}.{hint}"


class NoHome(FuseError):
    message = "{value} cannot be found, since the user has no home directory: set {name} to a folder, or HOME."


class VerificationFailed(FuseError):
    message = (
        "FUSE_VERIFY: output {index} of a fused graph differs from eager: relative error {error:.3g}, allowed {allowed:.3g}. "
        "Its sites: {sites}. FUSE_DISABLE=1 runs the model without fuse; please report this."
    )


class NotFused(FuseError):
    message = "option 'require' asks for kernels, and {count} of {total} attention sites of this graph have none:\n{sites}"


class NoRanks(FuseError):
    message = (
        "option 'context_parallel' is for several processes, but torch.distributed has no group: call "
        "torch.distributed.init_process_group, or init_device_mesh, first, or drop the option."
    )


class NotAcrossRanks(FuseError):
    message = (
        "option 'context_parallel' makes the attention of a shard that of the whole sequence, which cannot be done with "
        "{count} of {total} sites of this graph; as they are, they would attend to this rank's shard alone:\n{sites}"
    )


class DisabledAcrossRanks(FuseError):
    message = (
        "with fuse disabled every rank would attend to its shard of the sequence alone: drop the option 'context_parallel' and "
        "give each rank the whole sequence, or do not disable fuse."
    )


class NotAShard(FuseError):
    message = "{what}. {remedy}"


class NotBatched(FuseError):
    message = (
        "attention over several ranks cannot be batched by torch.vmap: call the model without it, or drop the option "
        "'context_parallel'."
    )


class NotAGraph(FuseError):
    message = (
        "fuse.transform takes an exported program or a traced module, not a {got}. Give it torch.export.export(model, inputs) "
        'or torch.fx.symbolic_trace(model), or leave all of that to torch.compile(model, backend="fuse").'
    )


class NoExample(FuseError):
    message = "a traced module is read for example inputs, {names}: {problem}. Call fuse.transform(module, *inputs)."


class OtherInputs(FuseError):
    message = (
        "this module was made by fuse.transform for inputs with {assumed}, and got {got}. Transform the traced module again, "
        "with inputs like these."
    )


class TangentOfGradient(FuseError):
    message = (
        "the gradient of a fused attention was differentiated in forward mode, for which fuse has no formula. Differentiate "
        'twice in reverse mode, or compile with options={{"disable": True}}.'
    )


class NotPackaged(FuseError):
    message = (
        "fuse.save_library writes C++ kernels of results alone, and this program has {found}. Give it the program that "
        "fuse.transform returns, on CPUs, without gradients and without a mask that is stored for each query and key."
    )


class UnknownModel(FuseError):
    message = "{name!r} names no model: {problem}. Give module:callable, file.py:callable, or a transformers model type.{hint}"


class UnusableModel(FuseError):
    message = "{name} returned {got}; it should return (model, args), (model, kwargs) or (model, args, kwargs)."


class BuilderTakes(FuseError):
    message = "{name} {problem}. {remedy}."


class BuilderFailed(FuseError):
    message = "{name} failed: {error}"


class CallFailed(FuseError):
    message = "the call of the model failed: {error}{hint}"


class NotCallable(FuseError):
    message = "fuse.explain takes a model or a function, and the arguments of its call, not {got}.{hint}"


class UnknownWord(FuseError):
    message = "python -m fuse {command}has no {what} {name!r}.{hint} python -m fuse {command}--help lists them."


class CannotWrite(FuseError):
    message = "{file} cannot be written: {why}. {remedy}."


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A sentence that begins with a blank, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
