"""What was found in a graph: its attention sites, what became of each, and the normalisations that are no attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuse.ir.spec import AttentionSpec
from fuse.report.reasons import Reason
from fuse.report.runs import Part, Runs


@dataclass(frozen=True)
class Frame:
    """A line of the user's source; ``function``: what holds it."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


@dataclass(frozen=True)
class Site:
    """What the passes found at one place of the model.

    recovered its function was read and proved, and one op of fuse stands in its place
    reason    why it was left as it is; None where it was recovered
    where     "file.py:line" of the user's source
    module    path of the module in the model, "model.layers.0.self_attn", or ""
    formula   the score in the user's terms
    mask      the predicate that was recovered: "k <= q"; "" where there is none
    sizes     the values of spec.symbols in the call that was compiled; 0 for one that only the data tell
    names     operand number → what the graph calls the tensor
    kernels   target → source of what computes the result, filled in when kernels are built
    wanted    for each operand whether training asks for its gradient
    target    that computes it; "" where it was left as it is
    steps     the spec after each pass, by the pass's name
    frames    the calls that led to ``where``, outermost first; () where the tracer kept none
    measured  seconds beside what torch has, in words; "" where nothing was timed
    relies    buffers whose contents were read as formulas: the graph is compiled anew when they are written
    beside    what it gives beside its result, in words
    weights   of each matrix of weights among that, what is written of the probabilities: see fuse.ops.weights
    runs      what computes its result ("forward"), its gradients ("backward"), its mask's map ("tile map") and weights beside
              it ("weights"), as far as known
    """

    recovered: bool
    reason: Reason | None
    where: str
    module: str
    formula: str = ""
    mask: str = ""
    spec: AttentionSpec | None = None
    sizes: tuple[int, ...] = ()
    names: dict[int, str] = field(default_factory=dict)
    kernels: dict[str, Path] = field(default_factory=dict)
    wanted: tuple[bool, ...] = ()
    target: str = ""
    steps: tuple[tuple[str, AttentionSpec], ...] = ()
    frames: tuple[Frame, ...] = ()
    measured: str = ""
    relies: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    weights: tuple[AttentionSpec, ...] = ()
    runs: dict[Part, Runs] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """In a notebook."""
        from fuse.report.notebook import site_html  # which reads formulas

        return site_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In IPython."""
        from fuse.report.notebook import site_text

        printer.text(site_text(self))

    @property
    def fused(self) -> bool:
        """A generated kernel computes its result, or would: nothing is known against it."""
        return self.recovered and not self.by_reference

    @property
    def by_reference(self) -> bool:
        """Plain PyTorch computes its result, where a kernel could not be had or was not asked for."""
        return "forward" in self.runs and self.runs["forward"].by == "reference"


@dataclass(frozen=True)
class Other:
    """A normalisation that is no attention, called by ``operator``; ``why``: what it lacks; the others as of a site."""

    operator: str
    where: str
    module: str
    why: str


@dataclass(frozen=True)
class Reading:
    """All that is to be said of one graph. ``unread``: why nobody looked into it; "" where somebody did."""

    sites: tuple[Site, ...] = ()
    others: tuple[Other, ...] = ()
    unread: str = ""
