"""What fuse makes of a model, and how far eager and fuse are from float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fuse
from fuse.report.site import Site
from models import MODELS, Inputs
from models.weights import redraw

Outputs = list[Tensor]
Record = Callable[[str, object], None]

# Both results carry the rounding errors of the same layers; what differs is their draw. The ratio of one draw of weights
# varies by several percent from processor to processor, by up to a third where ReLU amplifies what rounds to its other
# side; over DRAWS of them the root mean squares agree to a few percent.
DRAWS = 4
MARGIN = 1.05


class Errors(NamedTuple):
    """Against float64, see ``error``."""

    eager: float
    fuse: float

    def assert_no_farther(self, margin: float = MARGIN) -> None:
        """Fails unless fuse is as near to float64 as eager; a NaN is near to nothing."""
        assert self.fuse <= margin * self.eager, f"error {self.fuse:.3g} against float64; eager has {self.eager:.3g}"


@dataclass(frozen=True)
class Measured:
    sites: tuple[Site, ...]
    errors: Errors

    @property
    def fused(self) -> int:
        return sum(site.fused for site in self.sites)

    @property
    def recovered(self) -> int:
        return sum(site.recovered for site in self.sites)

    @property
    def declined(self) -> list[str]:
        return [f"{s.where}: {type(s.reason).__name__}: {s.reason}" for s in self.sites if not s.recovered]

    @property
    def masks(self) -> tuple[str, ...]:
        """Predicates in order, without repeats."""
        return tuple(dict.fromkeys(site.mask for site in self.sites))


@dataclass(frozen=True)
class Trained(Measured):
    gradients: Errors


class Case(NamedTuple):
    """One row of the table at the end of the run."""

    model: str
    attention: str
    dtype: str
    target: str

    def __str__(self) -> str:
        return "-".join(self)

    def prepared(self) -> tuple[nn.Module, Inputs]:
        return prepared(*MODELS[self.model].build(self.attention), getattr(torch, self.dtype))

    def assert_fused(self, measured: Measured, record: Record) -> None:
        """Fails unless every attention layer is fused with the mask that the architecture has, and its kernel runs where the
        target has any; ``record`` adds the row."""
        model, masks = MODELS[self.model], "; ".join(mask or "none" for mask in measured.masks)
        errors = [f"{e:.2e}" for e in measured.errors]
        record("row", (*self, str(model.sites), str(measured.recovered), *errors, masks))
        assert not measured.declined
        assert measured.recovered == model.sites
        assert self.target == "reference" or measured.fused == model.sites
        assert measured.masks == model.masks


def prepared(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """For inference in ``dtype``, with weights under which attention matters."""
    redraw(model)
    return model.eval().to(dtype), in_dtype(inputs, dtype)


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def measure(model: nn.Module, inputs: Inputs, *, dynamic: bool | None = None, **options: str) -> Measured:
    """Runs ``model`` in eager mode, in float64, and compiled by fuse with ``options``, for several draws of its weights."""
    compiled = torch.compile(model, backend="fuse", dynamic=dynamic, options=options)
    errors = errors_over_draws(compiled, model, inputs)
    return Measured(fuse.report().sites, errors)


def errors_over_draws(compiled: Callable[..., Any], model: nn.Module, inputs: Inputs) -> Errors:
    """Of the outputs of ``compiled``, which is ``model`` compiled, and of its own."""
    return pooled([errors_of(outputs(compiled, inputs), outputs(model, inputs), exact(model, inputs)) for _ in draws(model)])


def outputs(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Outputs:
    with torch.no_grad():
        return list(tensors(model(**inputs)))


def tensors(output: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of an output and of outputs in it; caches of keys and values are not results."""
    for value in output.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors(value)


def measure_gradients(model: nn.Module, inputs: Inputs, plain: nn.Module | None = None, **options: str) -> Trained:
    """As ``measure``, with the gradients of all parameters; ``plain``: the same model where eager mode cannot train it."""
    compiled = torch.compile(model, backend="fuse", options=options)
    plain = plain or model
    errors, of_gradients = [], []
    for _ in draws(model):
        plain.load_state_dict(model.state_dict())
        result, eager = trained(compiled, model, inputs), trained(plain, plain, inputs)
        with Wide():
            wide = widened(plain)
            truth = trained(wide, wide, in_dtype(inputs, torch.float64))
        errors.append(errors_of(result.outputs, eager.outputs, truth.outputs))
        # Some gradients are zero but for rounding, such as a key's bias: it shifts all scores of a row
        largest = max(float(t.square().mean()) for t in truth.gradients)
        kept = [i for i, t in enumerate(truth.gradients) if float(t.square().mean()) > 1e-12 * largest]
        of_gradients.append(errors_of(*([x.gradients[i] for i in kept] for x in (result, eager, truth))))
    return Trained(fuse.report().sites, pooled(errors), pooled(of_gradients))


def draws(model: nn.Module) -> Iterator[None]:
    """Draws the weights of ``model`` anew for each of DRAWS steps."""
    for draw in range(DRAWS):
        redraw(model, draw)
        yield


class Step(NamedTuple):
    """Of fixed random multiples of all outputs, the gradients for the parameters that they reach."""

    outputs: Outputs
    gradients: Outputs


def trained(run: Callable[..., Any], model: nn.Module, inputs: Inputs) -> Step:
    """``run`` is ``model``, or that compiled."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    found = list(tensors(run(**inputs)))
    reached = [x for x in found if x.requires_grad]
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).double().sum() for x in reached)
    assert isinstance(loss, Tensor)
    loss.backward()
    return Step([x.detach() for x in found], [p.grad for p in model.parameters() if p.grad is not None])


def exact(model: nn.Module, inputs: Inputs) -> Outputs:
    """The results of the same weights in float64 throughout."""
    with Wide():
        return outputs(widened(model), in_dtype(inputs, torch.float64))


def widened(model: nn.Module) -> nn.Module:
    wide = copy.deepcopy(model).double()
    if getattr(wide, "_can_set_experts_implementation", bool)():
        wide.set_experts_implementation("batched_mm")  # the default one has no float64
    return wide


class Wide(TorchFunctionMode):
    """Where a model asks for float32, it gets float64: softmax(scores, dtype=float32) would round, or overflow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        wide = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def errors_of(result: Outputs, eager: Outputs, truth: Outputs) -> Errors:
    return Errors(error(eager, truth), error(result, truth))


def pooled(errors: Sequence[Errors]) -> Errors:
    """Root mean squares over several runs, each an error in units of its own outputs."""
    return Errors(*(math.sqrt(sum(e**2 for e in column) / len(errors)) for column in zip(*errors, strict=True)))


def error(results: Outputs, truth: Outputs) -> float:
    """Root mean square over all elements, each in units of the root mean square of the output that it is in."""
    assert [x.shape for x in results] == [x.shape for x in truth]
    squares = sum(
        float(((x.double() - y) / y.square().mean().sqrt()).square().sum()) for x, y in zip(results, truth, strict=True)
    )
    return math.sqrt(squares / sum(x.numel() for x in truth))
