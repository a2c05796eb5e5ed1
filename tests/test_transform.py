"""The passes on graphs that torch.compile does not bring: exported programs, traced modules, graphs of others."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import attend, heads
from spellings.unnormalised import FeedForward
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import scaled_dot_product_attention

import fuse
from fuse.errors import NotPackaged
from fuse.targets.cpp.compiler import cxx_compiler

open_sizes = pytest.mark.skipif(
    not hasattr(ShapeEnv, "error_on_new_guards"), reason=f"torch {torch.__version__} cannot keep the sizes of a program open"
)


@pytest.fixture(autouse=True)
def reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs a site matters to those alone that have a compiler."""
    if request.node.get_closest_marker("compiler") is None:
        monkeypatch.setenv("FUSE_TARGET", "reference")


class Layer(nn.Module):
    """Causal attention of 4 heads; every way to keep a number: a parameter, a constant, a number in the code."""

    def __init__(self, sdpa: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.sdpa = nn.Linear(64, 192), nn.Linear(64, 64), sdpa

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4)
        if self.sdpa:
            attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            score = torch.where(torch.ones(n, n).tril().bool(), q @ k.mT / 4, torch.tensor(-torch.inf))
            attended = score.softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(b, n, 64))


def exported(model: nn.Module, length: int = 40) -> ExportedProgram:
    return export(model.eval(), (torch.randn(2, length, 64),), dynamic_shapes={"x": {1: Dim("n", max=500)}})


def as_it_is(program: ExportedProgram) -> ExportedProgram:
    return program


# ----------------------------------------------------------------------------------------------------- exported programs


@open_sizes
@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("form", [as_it_is, ExportedProgram.run_decompositions])
def test_a_program_keeps_its_sizes_signature_and_state(form: Callable[..., ExportedProgram], sdpa: bool) -> None:
    model = Layer(sdpa)
    program = form(exported(model))
    fused, report = fuse.transform(program)
    (site,) = report.sites
    line = "= scaled_dot_product_attention(q" if sdpa else "= score.softmax(-1) @ v"
    number = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if line in text)
    assert site.recovered and site.mask == "k <= q" and site.where == f"test_transform.py:{number}", report
    assert fused.graph_signature.user_outputs == tuple(n.name for n in fused.graph.output_node().args[0])
    assert fused.state_dict is program.state_dict and fused.range_constraints == program.range_constraints
    for length in (40, 77):
        x = torch.randn(2, length, 64)
        torch.testing.assert_close(fused.module()(x), model(x))
    assert not any("fuse" in str(n.target) for n in program.graph.nodes)


@open_sizes
def test_a_size_that_a_program_leaves_open_is_not_fixed() -> None:
    q, k, v = heads()
    program = export(Attend(), (q, k, v), dynamic_shapes={name: {3: Dim.DYNAMIC} for name in "qkv"})
    fused, report = fuse.transform(program)
    (site,) = report.sites
    assert site.reason is not None and site.reason.name == "UnsupportedShape"
    q, k, v = (x[..., :8] for x in (q, k, v))
    torch.testing.assert_close(fused.module()(q, k, v), attend(q, k, v))


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


@open_sizes
def test_layers_are_no_attention_by_the_names_of_their_weights() -> None:
    """A program's parameters are inputs like any others."""
    layer, x, chosen = FeedForward(), torch.randn(1, 300, 8), torch.tensor([2, 0])
    fused, report = fuse.transform(export(layer, (x, chosen)))
    assert not report.sites and not report.others
    torch.testing.assert_close(fused.module()(x, chosen), layer(x, chosen))


class Detached(nn.Module):
    """A bias without gradient, in two ways."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            slope = bias * 2
        return (q @ k.mT + slope + bias.detach()).softmax(-1) @ v


@open_sizes
def test_gradients_stop_where_the_model_stops_them() -> None:
    inputs = [x.double().requires_grad_() for x in (*heads(), torch.randn(9, 9))]
    fused, report = fuse.transform(export(Detached(), tuple(x.detach() for x in inputs)))
    assert report.recovered == 1
    got, expected = (
        torch.autograd.grad(f(*inputs).square().sum(), inputs, allow_unused=True) for f in (fused.module(), Detached())
    )
    assert got[3] is None is expected[3]
    torch.testing.assert_close(got[:3], expected[:3])


LOADED = """
import sys, torch
x, expected = torch.load("inputs.pt")
loads = (lambda: torch.export.load("program.pt2").module(), lambda: torch._inductor.aoti_load_package("package.pt2"))
for load in loads:
    try:
        load()
    except RuntimeError as error:
        print(error, file=sys.stderr)
import fuse
for load in loads:
    torch.testing.assert_close(load()(x), expected)
"""


@open_sizes
@pytest.mark.compiler
def test_a_program_is_packaged_and_runs_in_a_new_process(tmp_path: Path) -> None:
    """Which has to import fuse: torch says so by the name of the operator."""
    model, x = Layer(), torch.randn(2, 77, 64)
    fused, _ = fuse.transform(exported(model))
    torch.export.save(fused, tmp_path / "program.pt2")
    torch._inductor.aoti_compile_and_package(fused, package_path=str(tmp_path / "package.pt2"))
    torch.save((x, model(x).detach()), tmp_path / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed to resolve torch.ops.fuse.attention" in done.stderr
    assert "Could not find schema for fuse::attention" in done.stderr
    assert in_cpp(tmp_path, fused, x, model(x).detach()) < 1e-5


class InBfloat16(nn.Module):
    """Nothing but attention: what else asks the system for a matrix unit would have asked for its kernels too."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.bfloat16().unflatten(-1, (4, 16)).transpose(1, 2)
        return scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2).float()


@pytest.mark.compiler
def test_a_package_in_bfloat16_runs_without_python(tmp_path: Path) -> None:
    """Whose kernels may need a matrix unit, for which a process has to ask."""
    model, x = InBfloat16(), torch.randn(2, 77, 64)
    fused, _ = fuse.transform(export(model, (x,)))
    torch._inductor.aoti_compile_and_package(fused, package_path=str(tmp_path / "package.pt2"))
    assert in_cpp(tmp_path, fused, x, model(x)) < 0.05


def in_cpp(folder: Path, fused: ExportedProgram, x: Tensor, expected: Tensor) -> float:
    """How far the package's result is from ``expected`` in a process without Python, with the library of its kernels."""
    library = fuse.save_library(fused, folder / "attention")
    torch_folder, program = Path(torch.__file__).parent, folder / "main"
    linked = ("-Wl,--no-as-needed", f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu")
    source = Path(__file__).with_name("packaged.cpp")
    command = (*cxx_compiler(), "-std=c++20", "-w", str(source), f"-I{torch_folder / 'include'}", "-o", str(program), *linked)
    subprocess.run([*command, "-lc10", "-ldl"], check=True)
    x.numpy().tofile(folder / "x"), expected.numpy().tofile(folder / "expected")
    done = subprocess.run([program, "package.pt2", library], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "libpython" not in subprocess.run(["ldd", program, library], capture_output=True, text=True).stdout
    return float(done.stdout)


@open_sizes
def test_a_library_is_of_c_kernels_of_results_alone(tmp_path: Path) -> None:
    with pytest.raises(NotPackaged, match="no attention that was fused"):
        fuse.save_library(export(nn.Linear(64, 64), (torch.randn(2, 64),)), tmp_path)
    with pytest.raises(NotPackaged, match="calls for the target 'reference'"):
        fuse.save_library(fuse.transform(exported(Layer())).graph, tmp_path)


# --------------------------------------------------------------------------------------------------------- traced modules


class Parts(nn.Module):
    """Modules that a tracer does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax, self.drop, self.router = nn.Softmax(-1), nn.Dropout(0.5), nn.Linear(64, 4)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x, scale=0.25):  # type: ignore[no-untyped-def]  # torch cannot pickle annotations that are text
        y = self.drop(self.softmax(x @ x.mT * scale)) @ x
        return self.attention(y, y, y, need_weights=False)[0], self.router(x).softmax(-1)


@open_sizes
def test_a_traced_module_is_checked_and_can_be_pickled() -> None:
    model, x = Parts().eval(), torch.randn(2, 40, 64)
    fused, report = fuse.transform(symbolic_trace(model), x)
    assert [site.recovered for site in report.sites] == [True, True]
    assert [(other.operator, other.where) for other in report.others] == [("softmax", "%softmax_1")]
    for module in (fused, pickle.loads(pickle.dumps(fused))):
        for y in (x, torch.randn(3, 50, 64)):
            torch.testing.assert_close(module(y), model(y))
        for wrong in ((x.double(),), (x, 0.5), (x[:1],), (x[0],)):
            with pytest.raises(fuse.FuseError, match="Transform the traced module again"):
                module(*wrong)
        with pytest.raises(fuse.FuseError, match="Transform the traced module again"):
            module.train()(x)
        model.eval()


def test_sizes_that_a_trace_fixed_stay_fixed() -> None:
    q, k, v = heads()
    fused, report = fuse.transform(make_fx(Attend())(q, k, v), q, k, v)
    assert report.recovered == 1
    torch.testing.assert_close(fused(q, k, v), attend(q, k, v))
    with pytest.raises(fuse.FuseError, match="and got"):
        fused(*heads(length=8))


def test_a_graph_of_another_backend() -> None:
    reports = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        gm, report = fuse.transform(gm, *example_inputs)
        reports.append(report)
        return gm

    torch.testing.assert_close(torch.compile(attend, backend=backend)(*heads_of(0)), attend(*heads_of(0)))
    assert [report.recovered for report in reports] == [1]


def heads_of(seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return heads()


def test_what_is_no_graph_is_told_so() -> None:
    with pytest.raises(fuse.FuseError, match=r"torch.export.export\(model, inputs\)"):
        fuse.transform(Layer())  # type: ignore[arg-type]
    with pytest.raises(fuse.FuseError, match="missing a required argument"):
        fuse.transform(symbolic_trace(Parts()))


# --------------------------------------------------------------------------------------------------------- the second door


@pytest.mark.compiler
def test_inductor_fuses_by_itself_also_what_it_has_in_its_caches() -> None:
    def wrong_dimension(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 2.0).softmax(-2) @ v

    inputs = [torch.randn(4, 4, 8, 16) for _ in range(3)]
    with fresh_cache():
        for program, fused in ((attend, 1), (attend, 1), (wrong_dimension, 0)):
            torch._dynamo.reset()
            fuse.reset()
            compiled = torch.compile(program, options=fuse.inductor_configs())
            torch.testing.assert_close(compiled(*inputs), program(*inputs))
            assert [site.fused for site in fuse.report().sites] == [bool(fused)]
