"""What fuse needs of torch's private parts: a test for each name of fuse.torch_private, which fails where torch has changed."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint
from torch_graphs import Look, given_to_backend, placeholders

from fuse import torch_private as private

aten = torch.ops.aten


def test_every_name_has_a_test() -> None:
    files = [ast.parse(file.read_text()) for file in Path(__file__).parent.glob("test_torch_private*.py")]
    tests = {n.name for file in files for n in ast.walk(file) if isinstance(n, ast.FunctionDef)}
    assert {f"test_{name.lower()}" for name in private.__all__} <= tests


def faked(*shape: int) -> Tensor:
    return private.FakeTensorMode().from_tensor(torch.empty(*shape))


# ------------------------------------------------------------------------------------------------------------ operators


def test_opoverload() -> None:
    add = aten.add.Tensor
    assert isinstance(add, private.OpOverload)
    assert (add.namespace, add.name(), add.overloadpacket) == ("aten", "aten::add.Tensor", aten.add)
    assert torch.Tag.pointwise in add.tags
    assert add.__module__ == "torch._ops.aten"  # passes/replace.py tells torch's own from a user's


def test_opoverloadpacket() -> None:
    assert isinstance(aten.exp, private.OpOverloadPacket) and aten.exp.default is aten.exp.default


def test_packet_name() -> None:
    assert private.packet_name(aten.add) == "aten::add"


def test_higherorderoperator() -> None:
    assert isinstance(torch.ops.higher_order.flex_attention, private.HigherOrderOperator)
    gm = given_to_backend(lambda x: checkpoint(torch.sin, x, use_reentrant=False), torch.ones(2, requires_grad=True))
    assert any(isinstance(n.target, private.HigherOrderOperator) for n in gm.graph.nodes)


def test_schema() -> None:
    found = private.schema(aten.add_.Tensor)
    assert (found.name, found.is_mutable) == ("aten::add_", True)
    assert [a.name for a in found.arguments] == ["self", "other", "alpha"]
    assert found.arguments[0].alias_info.is_write and not found.arguments[1].alias_info
    assert found.arguments[2].default_value == 1 and found.arguments[2].kwarg_only
    assert [str(r.type) for r in found.returns] == ["Tensor"]
    assert isinstance(private.schema(aten.split.Tensor).returns[0].type, torch.ListType)
    assert private.schema(torch.sin) is None


def test_safe_softmax() -> None:
    hidden = torch.full((1, 2), -torch.inf)
    assert torch.equal(private.safe_softmax(hidden, -1), torch.zeros(1, 2))
    assert torch.equal(private.safe_softmax(torch.zeros(1, 2), -1), torch.full((1, 2), 0.5))


def test_to_copy() -> None:
    graph = private.make_fx(lambda x: x.to(torch.float64))(torch.ones(2)).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [private.to_copy]


def test_custom_op() -> None:
    @torch.library.custom_op("fuse_tests::kept", mutates_args=())
    def kept(x: Tensor) -> Tensor:
        return x.clone()

    def setup(ctx: Any, inputs: Any, output: Any) -> None: ...

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    kept.register_autograd(backward, setup_context=setup)
    overload = torch.ops.fuse_tests.kept.default
    assert private.custom_op(overload.name()) == private.CustomOp(overload, backward, setup)
    assert private.custom_op("aten::add.Tensor") is None


def test_decomposition_table() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.allclose(private.decomposition_table[aten.gelu.default](x), torch.nn.functional.gelu(x))


def test_make_fx() -> None:
    gm = private.make_fx(lambda x: x.exp().sum())(torch.ones(2))
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [aten.exp.default, aten.sum.default]


# ------------------------------------------------------------------------------------------------------------- autograd


def test_below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with private.below_autograd():
        assert x.sin().grad_fn is None
    assert x.sin().grad_fn is not None


def test_version() -> None:
    x = torch.zeros(2)
    before = private.version(x)
    x[0] = 1
    assert private.version(x) > before


def test_any_tangent() -> None:
    x = torch.ones(2)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert private.any_tangent((x, dual)) and not private.any_tangent((x,))
    assert not private.any_tangent((x,))
    assert torch.func.jvp(lambda y: y * private.any_tangent((y,)), (x,), (x,))[0].eq(x).all()


def test_saves_by_hooks() -> None:
    assert not private.saves_by_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert private.saves_by_hooks()
    assert not private.saves_by_hooks()


class Double(private.SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad(), private.below_autograd():
            return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_singlelevelfunction() -> None:
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(torch.autograd.grad(Double.apply(x).sum(), x)[0], torch.full((2,), 2.0))  # type: ignore[no-untyped-call]


def test_enable_single_level_autograd_function() -> None:
    library = torch.library.Library("fuse_tests", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")

    def autograd(x: Tensor) -> Any:
        with private.enable_single_level_autograd_function():
            return Double.apply(x)  # type: ignore[no-untyped-call]

    library.impl("double", autograd, "Autograd")
    library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
    gradient = torch.func.grad(lambda x: torch.ops.fuse_tests.double.default(x).sum())
    assert torch.equal(gradient(torch.ones(2)), torch.full((2,), 2.0))


# ------------------------------------------------------------------------------------------------- levels of torch.func


def test_transforms_active() -> None:
    look = Look(lambda x: private.transforms_active())
    torch.vmap(look)(torch.ones(2))
    assert look == [True] and not private.transforms_active()


def seen_in(transform: Callable[..., Any]) -> Tensor:
    """What a function is given under a transform, which has ended."""
    look = Look(lambda x: x)
    transform(lambda x: look(x).sum())(torch.ones(2, 3))
    return look[0]  # type: ignore[no-any-return]


def test_is_wrapped() -> None:
    assert private.is_wrapped(seen_in(torch.vmap)) and private.is_wrapped(seen_in(torch.func.grad))
    assert not private.is_wrapped(torch.ones(2))


def test_unwrapped() -> None:
    assert private.unwrapped(seen_in(torch.vmap)).shape == (2, 3)


def test_is_batched() -> None:
    assert private.is_batched(seen_in(torch.vmap)) and not private.is_batched(seen_in(torch.func.grad))


def test_level_of() -> None:
    look = Look(lambda x: (private.level_of(x), private.level_of(private.unwrapped(x))))
    torch.vmap(torch.vmap(look))(torch.ones(2, 3))
    assert look == [(2, 1)]


def test_vmapinfo() -> None:
    look = Look(lambda info: info.batch_size)

    @torch.library.custom_op("fuse_tests::counted", mutates_args=())
    def counted(x: Tensor) -> Tensor:
        return x.clone()

    @counted.register_vmap
    def rule(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        assert isinstance(look(info), private.VmapInfo)
        return x.clone(), in_dims[0]

    torch.vmap(counted)(torch.ones(3, 2))
    assert look == [3] and private.VmapInfo(3, "error").batch_size == 3


class Watched(torch.autograd.Function):
    """Calls ``watch`` with the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.watch = watch
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.watch(grad), None


def with_batched_gradients(watch: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradients by three of a function of two numbers, each taken through ``watch``."""
    x = torch.ones(2, requires_grad=True)
    result = Watched.apply(x, watch)  # type: ignore[no-untyped-call]
    return torch.autograd.grad(result, x, torch.arange(6.0).view(3, 2), is_grads_batched=True)[0]


def test_is_legacy_batched() -> None:
    with_batched_gradients(look := Look(private.is_legacy_batched))
    assert look == [True] and not private.is_legacy_batched(torch.ones(2))


def test_legacy_vmap_level() -> None:
    with_batched_gradients(look := Look(lambda grad: private.legacy_vmap_level()))
    assert look == [1]


def test_remove_batch_dim() -> None:
    look = Look(lambda grad: private.remove_batch_dim(grad, private.legacy_vmap_level(), 1, 0).shape)
    with_batched_gradients(look)
    assert look == [(3, 2)]


def test_add_batch_dim() -> None:
    def watch(grad: Tensor) -> Tensor:
        level = private.legacy_vmap_level()
        return private.add_batch_dim(private.remove_batch_dim(grad, level, 3, 0) * 2, 0, level)

    assert torch.equal(with_batched_gradients(watch), torch.arange(6.0).view(3, 2) * 2)


def test_without_vmap_loops() -> None:
    library = torch.library.Library("fuse_tests", "FRAGMENT")
    library.define("ruleless(Tensor x) -> Tensor")
    library.impl("ruleless", torch.clone, "CompositeExplicitAutograd")
    each = torch.vmap(torch.ops.fuse_tests.ruleless.default)
    with private.without_vmap_loops(), pytest.raises(RuntimeError, match="fallback"):
        each(torch.ones(2))
    assert torch.equal(each(torch.ones(2)), torch.ones(2))


# -------------------------------------------------------------------------------------------------- tensors and sizes


def test_faketensor() -> None:
    fake = faked(2, 3)
    assert isinstance(fake, private.FakeTensor) and isinstance(fake.fake_mode, private.FakeTensorMode)
    assert (fake @ fake.mT).shape == (2, 2) and isinstance(fake + 1, private.FakeTensor)


def test_faketensormode() -> None:
    mode = private.FakeTensorMode(shape_env=private.ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    fake = mode.from_tensor(torch.empty(5, 5))
    assert fake.shape[0].node.expr != fake.shape[1].node.expr  # type: ignore[attr-defined]
    assert mode.from_tensor(torch.empty(5), static_shapes=True).shape == (5,)
    with mode:
        assert isinstance(torch.empty(3), private.FakeTensor)


def test_detect_fake_mode() -> None:
    fake = faked(2)
    assert private.detect_fake_mode([None, fake]) is fake.fake_mode and private.detect_fake_mode([torch.ones(2)]) is None


def test_tensor_id() -> None:
    x, y = torch.ones(2), torch.ones(2)
    assert private.tensor_id(x) == private.tensor_id(x) != private.tensor_id(y)


def test_storage_id() -> None:
    x, fake = torch.empty(4), faked(4)
    assert private.storage_id(x) == private.storage_id(x[1:]) != private.storage_id(x.clone())
    assert private.storage_id(fake) == private.storage_id(fake[1:]) != private.storage_id(fake.clone())


def divided(x: Tensor) -> Tensor:
    """A DTensor of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Shard(0)])
    finally:
        dist.destroy_process_group()


def test_is_distributed() -> None:
    x = torch.ones(4)
    assert private.is_distributed(divided(x)) and not private.is_distributed(x)


def test_local_part() -> None:
    x = torch.ones(4)
    assert private.storage_id(private.local_part(divided(x))) == private.storage_id(x)


def test_shapeenv() -> None:
    shapes = private.ShapeEnv(duck_shape=False)
    fake = private.FakeTensorMode(shape_env=shapes).from_tensor(torch.empty(6, 4))
    n: Any = fake.shape[0]
    assert str(shapes.create_symintnode(n.node.expr + 1, hint=None)) == f"{n.node.expr} + 1"
    assert n % 2 == 0
    written = shapes.produce_guards_expression([fake], ignore_static=False)
    assert written is not None
    assert private.ShapeEnv().evaluate_guards_expression(written, [torch.empty(8, 4)])
    assert not private.ShapeEnv().evaluate_guards_expression(written, [torch.empty(7, 4)])


def test_hint() -> None:
    (size,) = (n for n in placeholders(given_to_backend(torch.sin, torch.ones(5), dynamic=True)) if n.name.startswith("s"))
    assert private.hint(size.meta["example_value"]) == 5
    shapes = private.ShapeEnv()
    assert private.hint(shapes.create_unbacked_symint()) is None


def test_rebind_unbacked() -> None:
    class Nonzero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero()

    gm = torch.export.export(Nonzero(), (torch.ones(3),)).graph_module
    (node,) = (n for n in gm.graph.nodes if n.meta.get("unbacked_bindings"))
    mode = private.detect_fake_mode([node.meta["val"]])
    assert mode is not None and mode.shape_env is not None
    with mode, mode.shape_env.ignore_fresh_unbacked_symbols():
        again = node.args[0].meta["val"].nonzero()
        private.rebind_unbacked(mode.shape_env, node, again)
    assert mode.shape_env.replace(again.shape[0].node.expr) == node.meta["val"].shape[0].node.expr


def test_open_sizes() -> None:
    for shapes in (None, private.ShapeEnv()):
        mode = private.FakeTensorMode(shape_env=shapes)
        with private.open_sizes(mode) or nullcontext():
            mode.from_tensor(torch.empty(5)).sum()


def test_sizewouldbefixed() -> None:
    mode = private.FakeTensorMode(shape_env=private.ShapeEnv())
    size, opened = mode.from_tensor(torch.empty(5)).shape[0], private.open_sizes(mode)
    if opened is None:
        pytest.skip("this torch fixes sizes without a word")
    with opened, pytest.raises(private.SizeWouldBeFixed):
        bool(size == 5)


def test_datadependentoutputexception() -> None:
    with pytest.raises(private.DataDependentOutputException):
        faked(1).item()


def test_dynamicoutputshapeexception() -> None:
    with pytest.raises(private.DynamicOutputShapeException):
        faked(3).nonzero()


def of_size(compute: Callable[[Any], Any]) -> sympy.Expr:
    """What is computed of a size, in sympy."""
    n: Any = private.FakeTensorMode(shape_env=private.ShapeEnv()).from_tensor(torch.empty(6)).shape[0]
    result: sympy.Expr = compute(n).node.expr
    return result


def test_floordiv() -> None:
    assert isinstance(of_size(lambda n: n // 4), private.FloorDiv)
    assert private.FloorDiv(sympy.Integer(-1), sympy.Integer(2)) == -1


def test_mod() -> None:
    assert isinstance(of_size(lambda n: n % 4), private.Mod)


def test_pythonmod() -> None:
    assert isinstance(of_size(lambda n: (n - 20) % 4), private.PythonMod)
    assert private.PythonMod(sympy.Integer(-1), sympy.Integer(3)) == 2


def test_cleandiv() -> None:
    n, m = sympy.symbols("n m", integer=True, positive=True)
    assert private.CleanDiv(n, m).args == private.FloorDiv(n, m).args == (n, m)


# ------------------------------------------------------------------------------------------------------- modes of tracing


class Names(private.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_torchdispatchmode() -> None:
    x = torch.ones(2, 2)
    with Names() as names:
        torch.nn.functional.linear(x, x)
    assert names.seen == ["aten::t", "aten::mm"]


def test_disable_current_modes() -> None:
    with private.FakeTensorMode(), private.disable_current_modes():
        assert not isinstance(torch.ones(2), private.FakeTensor)


def test_enable_python_dispatcher() -> None:
    with faked(1).fake_mode, private.enable_python_dispatcher(), Names() as names:  # type: ignore[attr-defined]
        torch.func.functionalize(lambda x: x.add_(1), remove="mutations")(torch.empty(2))
    assert "aten::add.Tensor" in names.seen


def test_pytree() -> None:
    tree, pytree = {"a": [1, (2, None)]}, private.pytree
    leaves, structure = pytree.tree_flatten(tree)
    assert leaves == pytree.tree_leaves(tree) == [1, 2, None] and structure == pytree.tree_structure(tree)
    assert pytree.tree_unflatten(leaves, structure) == tree
    assert pytree.tree_map(str, tree) == {"a": ["1", ("2", "None")]}
    assert pytree.tree_map_only(int, lambda n: n + 1, tree) == {"a": [2, (3, None)]}
    ((path, leaf), *_), _ = pytree.tree_flatten_with_path(((), {"a": [1]}))
    assert (path[0].idx, path[1].key, str(path[2]), leaf) == (1, "a", "[0]", 1)
    assert pytree.tree_any(lambda x: x is None, tree)
