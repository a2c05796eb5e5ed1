"""How Inductor's code calls the operators: by a name, defined once above with its formula, and no text in the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from typing import Any

import torch

from fuse import targets
from fuse.kernel.source import header_lines
from fuse.ops.attention import parsed
from fuse.torch_private import WrittenCall, write_calls

OPERATORS = ("attention", "attention_lse", "attention_forward", "attention_backward")
FORM = "calls have names"
"""Part of the keys of torch's caches: code of another form is not taken from them."""

_FIXED = frozenset({"spec", "target"})


@cache
def register() -> None:
    """Has Inductor write calls so, in this process."""
    for operator in OPERATORS:
        write_calls(getattr(torch.ops.fuse, operator).default, partial(_written, operator))


def _written(operator: str, arguments: dict[str, Any]) -> WrittenCall:
    return _definition(operator, arguments["spec"], arguments["target"])


@cache
def _definition(operator: str, text: str, target: str) -> WrittenCall:
    spec = parsed(text)
    name = f"{operator}_{spec.out_dtype}_{spec.qk_dim}x{spec.v_dim}_{sha256(f'{target} {text}'.encode()).hexdigest()[:8]}"
    definition = (
        "import fuse.ops.written",
        *(f"# {line}" for line in header_lines(spec)[:-1]),
        f"{name} = fuse.ops.written.caller({operator!r}, {text!r}, {target!r})",
    )
    return WrittenCall(name, definition, _FIXED)


@cache
def caller(operator: str, text: str, target: str) -> Callable[..., Any]:
    """``fuse::operator`` with the spec that is written ``text`` and with ``target``: a function of its other arguments."""
    op = getattr(torch.ops.fuse, operator).default

    def of_operands(operands: Any, sizes: Any) -> Any:
        return op(operands, sizes, text, target)

    def of_gradients(grad_out: Any, operands: Any, sizes: Any, out: Any, lse: Any, wanted: Any, grad_lse: Any = None) -> Any:
        return op(grad_out, operands, sizes, out, lse, text, target, wanted, grad_lse)

    return targets.caller(operator, text, target, of_gradients if operator == "attention_backward" else of_operands)
