"""What a user can choose for one torch.compile call.

An option that is not given comes from the variable of its name (FUSE_TARGET for ``target``), then from its default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fuse.errors import (
    DisabledAcrossRanks,
    InductorOnly,
    InvalidOption,
    InvalidVariable,
    NotTunable,
    UnknownOption,
    UnknownVariable,
    did_you_mean,
)
from fuse.settings import Settings
from fuse.targets import registry
from fuse.torch_private import inductor_config

if TYPE_CHECKING:
    from fuse.parallel.option import ContextParallel

INNER = ("inductor", "aot_eager", "eager")
QUALIFY = ("once", "never", "always")
ACROSS = "context_parallel"
SWITCH = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False, "": False}


@dataclass(frozen=True)
class Options:
    """
    target    where kernels run: "auto" takes what the tensors' device and this machine offer
    inner     the compiler of everything that is not attention
    disable   find and rewrite nothing
    verify    run every graph a second time as eager does and compare; slow, for finding out who is wrong
    qualify   check every kernel on this machine, time it beside what torch has, and leave what is wrong or slower as it was:
              "once" for each kernel, device, versions and sizes, and keep what was decided; "always" anew; or "never"
    require   raise NotFused where attention is left as it was or computed by plain PyTorch; graphs without any are compiled.
              ``disable`` wins over it
    tune      measure which tile sizes are the fastest, on the first calls' operands; kept on disk. For targets with a choice
    context_parallel  over which ranks the sequence lies: a fuse.ContextParallel, or a process group or a DeviceMesh of one
              dimension, which stands for one. What cannot be computed so raises NotAcrossRanks
    mode      Inductor's mode, as torch.compile got it
    inductor  Inductor's own options
    """

    target: str = registry.AUTO
    inner: str = "inductor"
    disable: bool = False
    verify: bool = False
    qualify: str = "once"
    require: bool = False
    tune: bool = False
    context_parallel: ContextParallel | None = None
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value, allowed = getattr(self, name), choices()
            if (type(value), value) not in [(type(a), a) for a in allowed]:  # 1 == True
                hint = did_you_mean(str(value), _names(allowed))
                raise InvalidOption(name=name, value=value, allowed=_listed(allowed), hint=hint)
        if self.tune and self.target not in (tunable := registry.tunable()):
            raise NotTunable(what="tune", target=self.target, tunable=_listed(tunable))
        if self.disable and self.context_parallel is not None:
            raise DisabledAcrossRanks
        if self.inner != "inductor" and (self.mode or self.inductor):
            what = f"mode={self.mode!r}" if self.mode else f"option {next(iter(self.inductor))!r}"
            raise InductorOnly(what=what, inner=self.inner)


CHOICES: dict[str, Callable[[], tuple[str | bool, ...]]] = {
    "target": lambda: (registry.AUTO, *registry.names()), "inner": lambda: INNER, "qualify": lambda: QUALIFY,
    **dict.fromkeys(("disable", "verify", "require", "tune"), lambda: (False, True)),
}  # fmt: skip
"""By option, the values that it can have."""


def resolve(mode: str | None, given: Mapping[str, Any] | Options | None) -> Options:
    """Options from what torch.compile passes on; raises a FuseError for a name or a value that is not allowed.

    Options that are made already are whole: no variable counts beside them.
    """
    _reject_unknown_variables()
    if isinstance(given, Options):
        _reject_unknown_options(given.inductor)
        return given
    own: dict[str, Any] = {**_from_environment(), **{k: v for k, v in (given or {}).items() if k in CHOICES}}
    across = (given or {}).get(ACROSS)
    inductor = {k: v for k, v in (given or {}).items() if k not in CHOICES and k != ACROSS}
    _reject_unknown_options(inductor)
    if across is not None:
        from fuse.parallel.option import context_parallel  # torch.distributed takes its time to load

        own[ACROSS] = context_parallel(across)
    return Options(**own, mode=None if mode == "default" else mode, inductor=inductor)


VARIABLES = (*(f"FUSE_{name.upper()}" for name in CHOICES), *(f"FUSE_{f.name.upper()}" for f in fields(Settings)))


def _from_environment() -> dict[str, str | bool]:
    found: dict[str, str | bool] = {}
    for name, values in CHOICES.items():
        variable, allowed = f"FUSE_{name.upper()}", values()
        text = os.environ.get(variable)
        if text is None:
            continue
        parse: Mapping[str, str | bool] = SWITCH if True in allowed else {str(a): a for a in allowed}
        if text.lower() not in parse:
            choices = ("1", "0") if True in allowed else allowed
            raise InvalidVariable(name=variable, value=text, allowed=_listed(choices), hint=did_you_mean(text, _names(allowed)))
        found[name] = parse[text.lower()]
    return found


def _reject_unknown_variables() -> None:
    """Only what looks like a slip: FUSE_ is also the prefix of the file system in user space."""
    for name in os.environ:
        if name.startswith("FUSE_") and name not in VARIABLES and (hint := did_you_mean(name, VARIABLES, cutoff=0.8)):
            raise UnknownVariable(name=name, hint=hint, allowed=_listed(VARIABLES))


def _reject_unknown_options(given: Mapping[str, Any]) -> None:
    if not given:
        return
    known = {name.replace("-", "_") for name in inductor_config.get_config_copy()}
    for name in given:
        if name.replace("-", "_") not in known:
            hint = did_you_mean(name, (*CHOICES, ACROSS)) or did_you_mean(name, known)
            raise UnknownOption(name=name, hint=hint, allowed=_listed((*CHOICES, ACROSS)))


def _names(allowed: tuple[str | bool, ...]) -> list[str]:
    return [a for a in allowed if isinstance(a, str)]


def _listed(values: tuple[str | bool, ...]) -> str:
    return ", ".join(map(repr, values))
