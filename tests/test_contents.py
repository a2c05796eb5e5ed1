"""What a buffer holds is read as a formula where it equals one in every entry, for as long as it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fuse
from fuse import contents as held_contents
from fuse import models
from fuse.ir.expr import Load, const, index
from fuse.ir.grid import Grid
from fuse.memoize import forget
from fuse.models.call import Wanted
from fuse.passes.contents import _formula
from fuse.report.report import Report

OPTIONS = {"target": "reference", "inner": "eager"}
T = 12


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()
    fuse.reset()
    forget()


class Attention(nn.Module):
    """With a mask that is stored."""

    def __init__(self, mask: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("kept", mask)
        self.apply_mask = apply

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        return self.apply_mask(q @ k.transpose(-1, -2) * 0.25, self.kept[..., :n, :n]).softmax(-1) @ v


def hidden_where_zero(scores: Tensor, mask: Tensor) -> Tensor:
    """As nanoGPT has it."""
    return scores.masked_fill(mask == 0, float("-inf"))


def seen(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scores, float("-inf"))


def added(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + mask


def qkv(length: int = T) -> list[Tensor]:
    return [torch.randn(2, 2, length, 16) for _ in range(3)]


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="fuse", options={**OPTIONS, **options})  # type: ignore[no-any-return]


def ones() -> Tensor:
    return torch.ones(T, T)


FORMS = {
    "k <= q": (ones().tril().view(1, 1, T, T), hidden_where_zero),
    "k < q": (ones().tril(-1).long(), hidden_where_zero),
    "k >= q": (ones().triu().bool(), seen),
    "k - q < 3": (torch.full((T, T), float("-inf")).triu(3), added),
    "abs(q - k) < 4": ((ones().tril(3) * ones().triu(-3)).bool(), seen),
    "q - k < 3 and k <= q": ((ones().tril() * ones().triu(-2)).bool(), seen),
    "": (torch.ones(1, 1, T, T), hidden_where_zero),
}


@pytest.mark.parametrize("text", FORMS)
def test_a_stored_mask_is_read(text: str) -> None:
    model = Attention(*FORMS[text])
    report = fuse.explain(model, *qkv())
    (site,) = report.sites
    assert site.mask == text and site.relies == ("kept",)
    assert "relies on   what kept holds: compiled anew when that changes" in str(report)
    tensors = qkv(T - 3)
    torch.testing.assert_close(compiled(model)(*tensors), model(*tensors), equal_nan=True)


def mask_of_report() -> list[str]:
    report: Report = fuse.report()
    return [site.mask for site in report.sites]


def test_one_entry_that_differs_is_not_overlooked() -> None:
    mask = ones().tril()
    mask[7, 2] = 0
    model, tensors = Attention(mask, hidden_where_zero), qkv()
    torch.testing.assert_close(compiled(model)(*tensors), model(*tensors), equal_nan=True)
    assert mask_of_report() == ["kept[q, k] != 0"]


@pytest.mark.parametrize("by_tags", [False, True])
def test_a_buffer_that_is_written_is_obeyed_and_trusted_no_more(by_tags: bool) -> None:
    """Also where Dynamo looks no further than at whether a module's attributes were replaced."""
    model, tensors = Attention(ones().tril(), hidden_where_zero), qkv()
    call = compiled(model)
    with torch.no_grad(), torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=by_tags):
        for change in (lambda: None, lambda: model.kept.triu_(-3), lambda: model.kept.tril_(-1).fill_diagonal_(1)):
            change()
            torch.testing.assert_close(call(*tensors), model(*tensors))
            torch.testing.assert_close(call(*tensors), model(*tensors))
    assert mask_of_report() == ["k <= q", "kept[q, k] != 0"]  # compiled once more, and not for the last change


def test_a_buffer_with_another_in_its_place_is_looked_at() -> None:
    model, tensors = Attention(ones().tril(), hidden_where_zero), qkv()
    call = compiled(model)
    call(*tensors)
    model.kept = ones().tril()
    call(*tensors)
    assert len(mask_of_report()) == 1
    model.kept = ones().triu()
    torch.testing.assert_close(call(*tensors), model(*tensors))
    assert len(mask_of_report()) == 2


def test_a_state_that_is_loaded_is_looked_at() -> None:
    model, tensors = Attention(ones().tril(), hidden_where_zero), qkv()
    call = compiled(model)
    call(*tensors)
    model.load_state_dict({"kept": ones().triu()})
    torch.testing.assert_close(call(*tensors), model(*tensors))


def test_memory_that_nobody_has_set_holds_nothing() -> None:
    """A model type is explained without weights: whatever its buffers show is not the model's."""
    model = Attention(ones().tril(), hidden_where_zero)
    held_contents.unset(model.buffers())
    assert [site.mask for site in fuse.explain(model, *qkv()).sites] == ["kept[q, k] != 0"]
    call = models.load("swin", Wanted(layers=1), weights=False)
    for buffer in call.model.buffers():
        buffer.zero_()  # as new memory is
    assert all(not site.relies for site in fuse.explain(call.model, *call.args, **call.kwargs).sites)


def test_layers_that_are_compiled_one_by_one_share_a_graph() -> None:
    first = Attention(ones().tril(), hidden_where_zero)
    layers, tensors = [first, *(copy.deepcopy(first) for _ in range(9))], qkv()
    for layer in layers:
        layer.compile(backend="fuse", options=OPTIONS)
        layer(*tensors)
    assert len(mask_of_report()) == 1


class Writes(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kept.mul_(-1).add_(1)
        return super().forward(q, k, v)


def test_a_buffer_that_the_graph_writes_is_data() -> None:
    model, tensors = Writes(ones().tril(-1), hidden_where_zero), qkv()
    reference = copy.deepcopy(model)
    call = compiled(model)
    for _ in range(2):
        torch.testing.assert_close(call(*tensors), reference(*tensors), equal_nan=True)
    assert all(not site.relies for site in fuse.report().sites)


def test_a_parameter_keeps_its_gradient() -> None:
    model = Attention(torch.zeros(T, T), added)
    del model.kept
    model.kept = nn.Parameter(torch.zeros(T, T))
    compiled(model)(*qkv()).square().sum().backward()
    assert model.kept.grad is not None and model.kept.grad.any()


def test_tensors_of_inference_mode_have_no_versions_to_trust() -> None:
    with torch.inference_mode():
        model = Attention(ones().tril(), hidden_where_zero)
        compiled(model)(*qkv())
    assert mask_of_report() == ["kept[q, k] != 0"]


positions = torch.arange(40)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = (positions[: q.shape[-2], None] - positions[: k.shape[-2]]).abs() < 5
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


def test_positions_that_are_stored_are_positions() -> None:
    tensors = qkv()
    assert [site.mask for site in fuse.explain(windowed, *tensors).sites] == ["abs(q - k) < 5"]
    torch.testing.assert_close(compiled(windowed)(*tensors), windowed(*tensors))


def test_what_heads_have_is_not_counted() -> None:
    """Any two numbers are steps of a progression."""
    reach = torch.tensor([3, 5])
    load = Load("int64", 0, (index("b1"),))
    assert _formula(load, reach) is None and _formula(replace(load, coords=(index("q"),)), reach) is None


def test_a_mask_of_the_call_is_data_and_says_what_would_be_a_formula() -> None:
    report = fuse.explain(F.scaled_dot_product_attention, *qkv(), attn_mask=ones().tril().bool())
    assert [site.mask for site in report.sites] == ["attn_mask[q, k]"]
    assert "attn_mask has a value for each query and key; read as a formula would be positions" in str(report)


def test_a_guard_costs_no_graph() -> None:
    counter = CompileCounterWithBackend("eager")
    model = Attention(ones().tril(), hidden_where_zero)
    call, tensors = compiled(model), qkv()
    for _ in range(5):
        call(*tensors)
    torch.compile(model, backend=counter)(*tensors)
    assert len(mask_of_report()) == counter.frame_count == 1


@st.composite
def contents(draw: st.DrawFn) -> Tensor:
    """Bands and progressions, some of them with one entry that differs."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from([torch.float32, torch.int64, torch.bool]))
    held = torch.full((rows, columns), draw(st.integers(0, 1))).to(kind)
    inside = draw(st.integers(0, 1))
    low, high = draw(st.integers(-9, 9)), draw(st.integers(-9, 9))
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    held[(distance >= low) & (distance <= high)] = inside
    if draw(st.booleans()):
        held[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = draw(st.integers(0, 1))
    if draw(st.booleans()) and kind == torch.int64:
        held = (draw(st.integers(-3, 3)) + draw(st.integers(-3, 3)) * torch.arange(columns)).expand(rows, columns).clone()
    return held


@given(contents(), st.booleans())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_formula_gives_what_is_held(held: Tensor, turned: bool) -> None:
    rows, columns = (index("k"), index("q")) if turned else (index("q"), index("k"))
    load = Load(str(held.dtype).removeprefix("torch."), 0, (rows, columns))
    one_row = Load(load.dtype, 0, (const(0), columns))
    for read, expected in ((load, held), (one_row, held[:1].expand_as(held))):
        formula = _formula(read, held)
        if formula is not None:
            extents = {rows.axis: (0, held.shape[0]), columns.axis: (0, held.shape[1])}
            found = Grid.over(extents, {}, ()).evaluate(formula)
            assert formula.dtype == load.dtype and torch.equal(torch.as_tensor(found).to(held.dtype).expand_as(held), expected)


@pytest.mark.parametrize(
    "held", [ones().tril(-5).tril(2), ones().triu(4), ones().tril(3).triu(-2) * 7, torch.arange(T).expand(T, T)]
)
def test_what_is_a_formula_is_found(held: Tensor) -> None:
    load = Load(str(held.dtype).removeprefix("torch."), 0, (index("q"), index("k")))
    assert (_formula(load, held) is None) == (held.dtype == torch.int64)  # a progression has one place
