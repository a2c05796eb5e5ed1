"""What fuse needs of torch's private parts of graphs and their compilers; tests/test_torch_private.py has the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph, GraphModule
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch_graphs import Look, given_to_backend, placeholders

from fuse import torch_private as private


def targets(gm: GraphModule) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes if n.op == "call_function"]


def test_impure() -> None:
    class Looks(private.Impure):
        def forward(self, x: Tensor) -> None: ...

    graph = Graph()
    x = graph.placeholder("x")
    graph.call_module("looks", (x,))
    graph.output(x)
    gm = GraphModule({"looks": Looks()}, graph)
    gm.graph.eliminate_dead_code()
    assert len(gm.graph.find_nodes(op="call_module")) == 1


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.mask  # type: ignore[no-any-return]


def test_source_name() -> None:
    names = [private.source_name(n) for n in placeholders(given_to_backend(Named(), torch.ones(1, 2)))]
    assert any("proj" in name and "_parameters" in name for name in names)
    assert any("mask" in name and "_buffers" in name for name in names)
    assert private.source_name(Graph().placeholder("x")) == ""


def test_given_for() -> None:
    class Own(Tensor):
        pass

    look = Look(lambda gm: [private.given_for(n) for n in placeholders(gm)])
    given_to_backend(torch.sin, x := torch.ones(2).as_subclass(Own), look=look)
    assert look == [[x]] and type(look[0][0]) is Own
    assert private.given_for(Graph().placeholder("x")) is None


def test_guard_input() -> None:
    graphs: list[GraphModule] = []
    allowed = [True]

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        (x,) = placeholders(gm)
        assert private.guard_input(x, lambda value: value[0] > 0, lambda: allowed[0], "what a test allows")
        return gm.forward

    compiled = torch.compile(torch.sin, backend=backend)
    for x in (1.0, 2.0, 3.0):
        compiled(torch.full((2,), x))
    assert len(graphs) == 1
    with pytest.raises(AssertionError, match="what a test allows"):  # of the graph that is compiled anew, at once
        compiled(-torch.ones(2))
    allowed[0] = False
    with pytest.raises(AssertionError, match="what a test allows"):
        compiled(torch.ones(2))
    assert len(graphs) == 3
    assert not private.guard_input(Graph().placeholder("x"), bool, bool, "")


def test_compiler_of_trace() -> None:
    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return gm.forward

    look = Look(lambda _: private.compiler_of_trace())
    constant = torch.compiler.assume_constant_result(lambda: look(True))
    for chosen in ({"backend": backend}, {"backend": "fuse", "options": {"inner": "eager"}}):
        torch.compile(lambda x: x.sin() if constant() else x, **chosen)(torch.ones(2))
    assert look[0] is backend and look[1].__module__ == "fuse.backend"


def test_original() -> None:
    model = nn.Linear(2, 2)
    assert private.original(torch.compile(model)) is model and private.original(torch.sin) is torch.sin


def test_lookup_backend() -> None:
    (x,) = inputs = (torch.ones(2),)
    call = private.lookup_backend("aot_eager")(given_to_backend(torch.sin, x), list(inputs))
    assert torch.equal(call(x)[0], x.sin())


def test_dynamo_config() -> None:
    names = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20, "automatic_dynamic_shapes": False}
    with private.dynamo_config.patch(names):
        assert {name: getattr(private.dynamo_config, name) for name in names} == names


def test_inductor_config() -> None:
    known = private.inductor_config.get_config_copy()
    assert {"joint_custom_pre_pass", "joint_custom_post_pass", "pre_grad_custom_pass", "max_autotune"} <= known.keys()
    with private.inductor_config.patch({"max_autotune": True}):
        assert private.inductor_config.max_autotune


class Seen(private.CustomGraphPass):
    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: Graph) -> None:
        self.graphs.append(str(graph))

    def uuid(self) -> None:
        return None  # nothing is taken from a cache


@pytest.mark.compiler
def test_inductor() -> None:
    gm, seen = given_to_backend(lambda x: x.exp(), torch.ones(2)), Seen()
    call = private.Inductor(None, {"joint_custom_pre_pass": seen}, dynamic=None)(gm, [torch.zeros(2)])
    assert torch.equal(call(torch.zeros(2))[0], torch.ones(2)) and "aten.exp" in seen.graphs[0]


@pytest.mark.compiler
def test_customgraphpass() -> None:
    before, pre_grad = Seen(), Seen()
    options = {"joint_custom_post_pass": before, "pre_grad_custom_pass": pre_grad}
    torch.compile(lambda x: x.exp(), options=options)(torch.zeros(2))
    assert len(before.graphs) == len(pre_grad.graphs) == 1


def test_get_hash_for_files(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(path.name)
    a, b = (private.get_hash_for_files((str(path),)) for path in paths)
    assert isinstance(a, bytes) and a != b


# What graphs of Dynamo call things: fuse compares these names.


@pytest.mark.parametrize(
    ("function", "names"),
    (
        (lambda x: torch.vmap(torch.sin)(x), ["_vmap_increment_nesting", "_vmap_decrement_nesting"]),
        (lambda x: torch.func.grad(lambda y: y.sin().sum())(x), ["_grad_increment_nesting", "_grad_decrement_nesting"]),
        (lambda x: torch.func.jvp(torch.sin, (x,), (x,)), ["_jvp_increment_nesting", "_jvp_decrement_nesting"]),
    ),
)
def test_transforms_are_nodes_of_the_graph(function: Callable[[Tensor], Any], names: list[str]) -> None:
    found = targets(given_to_backend(function, torch.ones(2)))
    assert [name for name in found if name.endswith("crement_nesting")] == names


def test_grad_mode_and_autocast_are_nodes_of_the_graph() -> None:
    def states(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    gm = given_to_backend(states, torch.ones(2, 2))
    found = [name for name in targets(gm) if name.startswith("_")]
    assert found == ["_set_grad_enabled", "_set_grad_enabled", "_enter_autocast", "_exit_autocast"]
    enter, leave = (n for n in gm.graph.nodes if "autocast" in str(n.target))
    assert enter.args[:3] == ("cpu", torch.bfloat16, True) and leave.args == (enter,)


def test_nodes_tell_what_they_hold_and_where_they_come_from() -> None:
    gm = given_to_backend(nn.Sequential(Named()), torch.ones(1, 2))
    assert all(isinstance(n.meta["example_value"], private.FakeTensor) for n in gm.graph.nodes if n.op != "output")
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    path, kind = list(node.meta["nn_module_stack"].values())[-1]
    assert "0" in path and "proj" in path and kind is nn.Linear
    assert Path(__file__).name in node.meta["stack_trace"]


# --------------------------------------------------------------------------------------------------------- FlexAttention


def qkv() -> list[Tensor]:
    return [torch.randn(1, 1, 4, 8) for _ in range(3)]


def flex_arguments(f: Callable[..., Any]) -> tuple[Any, ...]:
    gm = given_to_backend(f, *qkv())
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
    return node.args  # type: ignore[no-any-return]


def test_math_attention() -> None:
    query, key, value = qkv()
    block_mask = create_block_mask(lambda b, h, q, k: k <= q, 1, 1, 4, 4, device="cpu").as_tuple()
    found, lse, _ = private.math_attention(query, key, value, lambda s, b, h, q, k: s, block_mask, 0.5, {}, (), ())
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
    assert torch.allclose(found, expected, atol=1e-6)
    first = (query[..., 0, :] * key[..., 0, :]).sum(-1) * 0.5
    assert torch.allclose(lse[..., 0] * torch.log(torch.tensor(2.0)), first, atol=1e-6)  # base 2


def test_large_sparse_block_size() -> None:
    block_mask = flex_arguments(lambda q, k, v: flex_attention(q, k, v))[4]
    assert block_mask[-3:-1] == (private.LARGE_SPARSE_BLOCK_SIZE,) * 2


def test_flex_options() -> None:
    query, key, value = qkv()
    options = private.flex_options(query, key, value, False, None, AuxRequest(lse=True))
    in_graph = flex_arguments(lambda q, k, v: flex_attention(q, k, v))[6]
    assert options["OUTPUT_MAX"] is False and options.keys() == in_graph.keys()
    with pytest.raises(NotImplementedError, match="max"):
        private.flex_options(query, key, value, False, None, AuxRequest(max_scores=True))


def test_flex_refusal() -> None:
    query, key, value = qkv()
    private.flex_refusal(query, key, value)
    if private.flex_refusal.__module__.startswith("torch"):
        with pytest.raises(NotImplementedError):
            private.flex_refusal(query.requires_grad_(), key, value)


@pytest.mark.compiler
def test_write_calls() -> None:
    """By a name that is defined once, in Python; in C++ as before."""
    library = torch.library.Library("fuse_tests", "DEF")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    library.define("scaled(Tensor[] xs, str how, float by) -> Tensor", tags=tags)
    library.impl("scaled", lambda xs, how, by: xs[0] * by, "CompositeExplicitAutograd")
    torch.library.register_fake("fuse_tests::scaled", lambda xs, how, by: torch.empty_like(xs[0]), lib=library)
    op = torch.ops.fuse_tests.scaled.default
    definition = ("# by how much", "scale = lambda xs, by: torch.ops.fuse_tests.scaled.default(xs, 'well', by)")
    private.write_calls(op, lambda given: private.WrittenCall("scale", definition, frozenset({"how"})))

    def twice(x: Tensor) -> Tensor:
        return op([op([x.sin()], "well", 2.0)], "well", 2.0)  # type: ignore[no-any-return]

    x = torch.randn(3, 4).T
    for in_cpp in (False, True):
        torch._dynamo.reset()
        with private.inductor_config.patch(cpp_wrapper=in_cpp):
            found, (code, *_) = run_and_get_code(torch.compile(twice), x)
        torch.testing.assert_close(found, x.sin() * 4)
        assert code.count("# by how much") == code.count("scale = lambda") == (not in_cpp)
        assert code.count(" = scale([") == (0 if in_cpp else 2)


# ------------------------------------------------------------------------------------------------------------- processes


def test_maybe_mark_dynamic() -> None:
    x = torch.ones(2, 6)
    private.maybe_mark_dynamic(x, 1)
    (held,) = placeholders(given_to_backend(lambda x: x + 1, x))[-1:]
    assert [isinstance(n, torch.SymInt) for n in held.meta["example_value"].shape] == [False, True]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """The only process of a group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_default_store() -> None:
    store = private.default_store()
    assert [store.compare_set("key", "", text) for text in ("first", "second")] == [b"first", b"first"]


@pytest.mark.usefixtures("alone")
def test_group_named() -> None:
    group = torch.distributed.group.WORLD
    assert private.group_named(group.group_name) is group


def test_artifact_manager() -> None:
    loaded: list[tuple[str, bytes]] = []
    kind = "fuse_tests"
    manager = private.artifact_manager(kind, lambda key, content: loaded.append((key, content)))
    manager.record_artifact(kind, "a/b", b"content")
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None and saved[1].artifacts[kind] == ["a/b"]
    torch.compiler.load_cache_artifacts(saved[0])
    assert loaded == [("a/b", b"content")]
