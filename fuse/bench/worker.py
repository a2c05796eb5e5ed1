"""One way to run, in a process of its own."""

from __future__ import annotations

import os
import signal
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fuse.bench.case import Case, Failed, Measured
from fuse.bench.peak import peak_of
from fuse.bench.step import Step, relative_error
from fuse.errors import FuseError
from fuse.failure import told
from fuse.models import ModelCall, to
from fuse.report.report import report, reset

EAGER, FUSE = "eager", "fuse"
CALL = "call"
_CACHES = ("FUSE_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def begin(pipe: Connection, way: str, caches: Path | None) -> None:
    """A process, which whoever started it ends. ``caches``: a folder for those of fuse and of Inductor; None: as they are."""
    if caches is not None:
        os.environ.update({name: str(caches / name.lower()) for name in _CACHES})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    serve(pipe, way)


def serve(pipe: Connection, way: str) -> None:
    """For each (case, file of its exact results): Measured or Failed, then the seconds of one call for each CALL, until
    something else comes; None ends it. A mistake of the user's is sent as the FuseError that it is.
    """
    while (task := pipe.recv()) is not None:
        case, exact = task
        try:
            if way == EAGER:
                _keep_exact(case, exact)
            step = _step(case, way)
            pipe.send(_measured(step, way, exact))
        except FuseError as error:
            pipe.send(error)
            continue
        except Exception as error:
            pipe.send(Failed(told(error)))
            continue
        while pipe.recv() == CALL:
            pipe.send(step.seconds())
        del step


def _step(case: Case, way: str) -> Step:
    call = _made(case)
    if way == EAGER:
        return Step(call, call.model, case.train)
    torch.compiler.reset()
    reset()
    options = dict(case.options) if way == FUSE else None
    return Step(call, torch.compile(call.model, backend=way, options=options), case.train)


def _made(case: Case) -> ModelCall:
    """The same weights and inputs in every process."""
    torch.manual_seed(0)
    return case.make(*case.arguments)


def _measured(step: Step, way: str, exact: Path) -> Measured:
    first, results = step.timed()
    error = relative_error(results, torch.load(exact)) if exact.exists() else None
    del results
    return Measured(first, peak_of(step, step.device), error, report() if way == FUSE else None)


def _keep_exact(case: Case, file: Path) -> None:
    """Keeps what the call gives in float64, from weights and inputs as the case has them. Nothing is kept where that cannot be
    computed, or is another each time.
    """
    call = to(_made(case), torch.float64)
    step = Step(call, call.model, case.train)
    try:
        results, again = ([x.cpu() for x in step()] for _ in range(2))
    except (RuntimeError, NotImplementedError):
        return
    if all(map(torch.equal, results, again)):
        torch.save(results, file)
