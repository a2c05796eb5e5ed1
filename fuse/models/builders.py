"""A callable of the user's that returns a model and its arguments, by the name of its module or file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fuse.errors import BuilderFailed, BuilderTakes, FuseError, UnknownModel, UnusableModel, did_you_mean
from fuse.failure import told
from fuse.models.call import ModelCall, Wanted, to

_CONVERTED = "dtype"  # what is asked for is done to its result, where the builder does not take it


def is_file(name: str) -> bool:
    """Whether ``name`` can only be meant as that of a file."""
    return name.endswith(".py") or "/" in name


def load(name: str, wanted: Wanted) -> ModelCall:
    """Calls the builder, with what is ``wanted`` of it."""
    source, _, attribute = name.rpartition(":")
    if not source:
        raise UnknownModel(name=name, problem="it names no callable", hint=f" Add one, as in {name}:{_suggested(Path(name))}.")
    builder = _attribute(name, _module(name, source), attribute)
    try:
        arguments = _arguments(name, builder, wanted)
        call = _call(name, builder(**arguments))
        return call if wanted.dtype is None or _CONVERTED in arguments else to(call, wanted.dtype)
    except FuseError:
        raise
    except Exception as error:
        raise BuilderFailed(name=name, error=told(error)) from error


def _call(name: str, made: Any) -> ModelCall:
    match made:
        case (model, tuple(args)):
            return ModelCall(model, args, {})
        case (model, dict(kwargs)):
            return ModelCall(model, (), kwargs)
        case (model, tuple(args), dict(kwargs)):
            return ModelCall(model, args, kwargs)
    raise UnusableModel(name=name, got=type(made).__name__)


def _attribute(name: str, module: ModuleType, attribute: str) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    there = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    problem = f"{module.__name__} has no callable {attribute!r}" if found is None else f"{attribute!r} cannot be called"
    raise UnknownModel(name=name, problem=problem, hint=did_you_mean(attribute, there))


def _arguments(name: str, builder: Callable[..., Any], wanted: Wanted) -> dict[str, Any]:
    """What of ``wanted`` the builder takes; raises BuilderTakes where that is not all, or not enough."""
    given = wanted.given
    parameters = inspect.signature(builder).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    for what in given:
        if what not in parameters and not takes_all and what != _CONVERTED:
            raise BuilderTakes(
                name=name, problem=f"takes no {what!r}", remedy=f"Give it a parameter of that name, or drop --{what}"
            )
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    for what, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind not in variadic and what not in given:
            remedy = f"Give that a default, or it with --{what}" if hasattr(wanted, what) else "Give that a default"
            raise BuilderTakes(name=name, problem=f"needs {what!r}", remedy=remedy)
    return {what: value for what, value in given.items() if what in parameters or takes_all}


# --------------------------------------------------------------------------------------------------------------- modules


def _module(name: str, source: str) -> ModuleType:
    try:
        return _of_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except FileNotFoundError as error:
        if not Path(source).exists():
            raise UnknownModel(name=name, problem=f"there is no file {source}", hint=_like(Path(source))) from error
        raise BuilderFailed(name=source, error=told(error)) from error
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise BuilderFailed(name=source, error=told(error)) from error
        raise UnknownModel(name=name, problem=error, hint=_like(Path(f"{source}.py"))) from error
    except Exception as error:
        raise BuilderFailed(name=source, error=told(error)) from error


def _of_file(path: Path) -> ModuleType:
    """As ``python path`` has it: what lies beside it can be imported, and its classes find their module by its name."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules or _is(sys.modules[path.stem], path) else f"{path.stem}_of_user"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _is(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()


def _like(path: Path) -> str:
    """A hint: the file that is called much like ``path``."""
    folder = path.parent
    names = [file.name for file in folder.glob("*.py")] if folder.is_dir() else []
    return did_you_mean(path.name, names)


def _suggested(path: Path) -> str:
    """A function of the file, rather one that is called as builders are."""
    names = list(_functions(path))
    return next((name for name in names if name in ("build", "make", "model", "main")), names[0] if names else "build")


def _functions(path: Path) -> Iterator[str]:
    """Of the file, as it reads: it is not run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return
    yield from (node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))
