"""Attention as models write it, on a device: every case by fuse and by each of its peers, timed in one run."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import medians, synchronize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fuse

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}  # fmt: skip
PACKAGES = {"flash-attn": "flash_attn", "flash-attn-4": "flash_attn.cute"}  # which have flash_attn_func, where installed
PEERS = (*BACKENDS, *PACKAGES, "flex", "inductor", "eager")
COMPILED = ("flex", "inductor")
WINDOW, CAP, DOCUMENTS = 1024, 50.0, 8
SCORES = 5e9  # bytes of all scores: ways that keep them are left out beyond
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """Batches times ``q_len`` are 16384 queries where there is one, of ``heads`` heads that share ``kv_heads``."""

    kind: str
    kv_len: int
    width: int
    heads: int
    kv_heads: int
    batch: int
    q_len: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        heads = "" if self.heads == self.kv_heads else f" {self.heads}/{self.kv_heads} heads"
        return f"{self.kind} S={self.kv_len} D={self.width}{heads}"

    @property
    def seen(self) -> float:
        """Share of the scores that the mask leaves."""
        s = self.kv_len
        if self.kind in ("causal", "alibi", "soft-cap"):
            return (s + 1) / (2 * s)
        if self.kind == "window":
            w = min(WINDOW, s)
            return (w * (w + 1) / 2 + (s - w) * w) / s**2
        if self.kind == "documents":
            n = s // DOCUMENTS
            return DOCUMENTS * n * (n + 1) / 2 / s**2
        return 1.0

    @property
    def operations(self) -> float:
        """Of forward; backward has two and a half times as many."""
        return 4 * self.batch * self.heads * self.q_len * self.kv_len * self.width * self.seen

    @property
    def bytes_read(self) -> float:
        """Keys and values, once."""
        return 2.0 * self.batch * self.kv_heads * self.kv_len * self.width * getattr(torch, self.dtype).itemsize


def case(kind: str, length: int, width: int, kv_heads: int = 0) -> Case:
    heads = 64 if kv_heads else 2048 // width
    batch = max(1, 16384 // length) if not kv_heads else max(1, 8192 // length)
    if kind == "decode":
        return Case(kind, length, width, 64, 8, 16, 1)
    return Case(kind, length, width, heads, kv_heads or heads, batch, length)


# The most telling first: what time is left for is measured.
CASES = (
    case("causal", 8192, 128), case("full", 8192, 128), case("causal", 4096, 64), case("causal", 8192, 128, kv_heads=8),
    case("decode", 16384, 128), case("window", 8192, 128), case("soft-cap", 4096, 128), case("alibi", 4096, 128),
    case("documents", 8192, 128), case("causal", 2048, 128), case("causal", 16384, 128), case("full", 4096, 64),
    case("causal", 1024, 64), case("full", 16384, 128), case("window", 8192, 64), case("alibi", 4096, 64),
    case("soft-cap", 4096, 64), case("documents", 8192, 64), case("decode", 2048, 128), case("full", 1024, 64),
    case("causal", 1024, 128), case("full", 1024, 128), case("causal", 16384, 64), case("full", 2048, 128),
    case("causal", 2048, 64), case("full", 2048, 64), case("full", 16384, 64), case("causal", 4096, 128),
)  # fmt: skip
TINY = (Case("causal", 40, 16, 4, 2, 1, 40, "float32"), Case("decode", 40, 16, 4, 2, 1, 1, "float32"))


@dataclass(frozen=True)
class Inputs:
    """query (batch, heads, q_len, width), key, value (batch, kv_heads, kv_len, width), slopes (heads, 1, 1), ids (kv_len)."""

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor
    ids: Tensor

    @staticmethod
    def make(c: Case, device: str, gradients: bool) -> Inputs:
        torch.manual_seed(0)
        dtype = getattr(torch, c.dtype)

        def tensor(length: int, heads: int) -> Tensor:  # as a projection gives it
            made = torch.randn(c.batch, length, heads, c.width, device=device).to(dtype).transpose(1, 2)
            return made.requires_grad_(gradients)

        slopes = 2.0 ** -(torch.arange(1, c.heads + 1, device=device) * 8 / c.heads)
        ids = torch.arange(c.kv_len, device=device) // max(1, c.kv_len // DOCUMENTS)
        query, key, value = tensor(c.q_len, c.heads), tensor(c.kv_len, c.kv_heads), tensor(c.kv_len, c.kv_heads)
        return Inputs(query, key, value, slopes.view(-1, 1, 1).to(dtype), ids)


def attention(kind: str, x: Inputs) -> Tensor:
    """The unmodified code."""
    groups = x.query.shape[1] // x.key.shape[1]
    key, value = (t if groups == 1 else t.repeat_interleave(groups, 1) for t in (x.key, x.value))
    scores = x.query @ key.transpose(-1, -2) * x.query.shape[-1] ** -0.5
    k = torch.arange(scores.shape[-1], device=scores.device)
    q = k[:, None]
    if kind == "alibi":
        scores = scores + x.slopes * (k - q)
    if kind == "soft-cap":
        scores = torch.tanh(scores / CAP) * CAP
    if kind not in ("full", "decode"):
        scores = scores.masked_fill(~_visible(kind, q, k, x.ids), -math.inf)
    return F.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value


def _visible(kind: str, q: Tensor, k: Tensor, ids: Tensor) -> Tensor:
    seen = k <= q
    if kind == "window":
        seen = seen & (k > q - WINDOW)
    if kind == "documents":
        seen = seen & (ids[q] == ids[k])
    return seen


def _sdpa(backend: str, c: Case, x: Inputs) -> Call:
    """With the mask that it needs to be given."""
    if c.kind == "soft-cap":
        raise NotImplementedError("SDPA has no soft-cap")
    mask, k = None, torch.arange(c.kv_len, device=x.query.device)
    if c.kind in ("window", "documents"):
        mask = _visible(c.kind, k[:, None], k, x.ids)
    if c.kind == "alibi":
        mask = (x.slopes * (k - k[:, None])).masked_fill(k > k[:, None], -math.inf)[None].to(x.query.dtype)
    grouped = c.heads != c.kv_heads

    def call() -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(
                x.query, x.key, x.value, attn_mask=mask, is_causal=c.kind == "causal", enable_gqa=grouped
            )

    return call


def _flash_attn(name: str, c: Case, x: Inputs) -> Call:
    """One of the two packages, which take (batch, length, heads, width). Documents of one length are so many more batches."""
    function = importlib.import_module(PACKAGES[name]).flash_attn_func
    given: dict[str, Any] = {"causal": c.kind not in ("full", "decode")}
    if c.kind == "window":
        given["window_size"] = (WINDOW - 1, 0)
    if c.kind == "soft-cap":
        given["softcap"] = CAP
    if c.kind == "alibi":
        if "alibi_slopes" not in inspect.signature(function).parameters:
            raise NotImplementedError(f"{name} has no ALiBi")
        given["alibi_slopes"] = x.slopes.flatten().float()
    parts = DOCUMENTS if c.kind == "documents" else 1

    def call() -> Tensor:
        apart = (t.transpose(1, 2).unflatten(1, (parts, -1)).flatten(0, 1) for t in (x.query, x.key, x.value))
        out = function(*apart, **given)
        out = out[0] if isinstance(out, tuple) else out  # the other is the log-sum-exp
        return out.unflatten(0, (-1, parts)).flatten(1, 2).transpose(1, 2)  # type: ignore[no-any-return]

    return call


def _flex(c: Case, x: Inputs) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    slopes, ids, device = x.slopes.flatten(), x.ids, x.query.device.type
    changes: dict[str, Callable[..., Tensor]] = {
        "alibi": lambda s, b, h, q, k: s + slopes[h] * (k - q),
        "soft-cap": lambda s, b, h, q, k: torch.tanh(s / CAP) * CAP,
    }
    blocks = None
    if c.kind not in ("full", "decode"):
        compiled_mask = torch.compile(create_block_mask, dynamic=False)
        blocks = compiled_mask(lambda b, h, q, k: _visible(c.kind, q, k, ids), None, None, c.q_len, c.kv_len, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = c.heads != c.kv_heads
    return lambda: compiled(x.query, x.key, x.value, score_mod=changes.get(c.kind), block_mask=blocks, enable_gqa=grouped)


def way(name: str, c: Case, x: Inputs) -> Call:
    """One way to compute the case. Raises where it cannot."""
    scores = c.batch * c.heads * c.q_len * c.kv_len * getattr(torch, c.dtype).itemsize
    if name in ("math", "inductor", "eager") and scores > SCORES:
        raise MemoryError(f"not run: scores of {scores / 1e9:.0f} GB")
    if name in BACKENDS:
        return _sdpa(name, c, x)
    if name in PACKAGES:
        return _flash_attn(name, c, x)
    if name == "flex":
        return _flex(c, x)
    if name == "eager":
        return lambda: attention(c.kind, x)
    compiled = compile_with(name, lambda x: attention(c.kind, x), x.query.device.type)
    return lambda: compiled(x)


def compile_with(backend: str, of: Any, device: str) -> Any:
    """By "inductor" or "fuse", of which a fallback to plain PyTorch is an error here."""
    warnings.filterwarnings("error", message="fuse runs attention without its kernels")
    own = {"target": "triton"} if device == "cuda" else {"inner": "aot_eager"}  # which is quick to compile
    return torch.compile(of, backend=backend, dynamic=False, options=own if backend == "fuse" else None)


def check_fused() -> None:
    """Raises where a site that fuse has seen since the last reset runs without it."""
    sites = fuse.report().sites
    if not sites or not all(site.fused for site in sites):
        raise RuntimeError(f"not fused: {[site.reason for site in sites]}")


def measure(c: Case, device: str, peers: list[str], gradients: bool, seconds: float) -> dict[str, Any]:
    """Seconds of each way forward, and backward where there are ``gradients``; and why ways are missing.

    With gradients forward is that of training, which keeps what backward needs.

    With no ``seconds``, ways are only built and run once, which leaves what they compile in the caches on disk.
    """
    torch._dynamo.reset()
    fuse.reset()
    torch._functorch.config.donated_buffer = False  # backward is run many times on one forward
    x = Inputs.make(c, device, gradients)
    forward: dict[str, Call] = {}
    backward: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    with nullcontext() if gradients else torch.inference_mode():
        for name in ("fuse", *(p for p in peers if seconds or p in COMPILED)):
            try:
                made = way(name, c, x)
                out = made()
                if gradients:
                    backward[name] = _backward(out, x)
                    backward[name]()
                if name == "fuse":
                    check_fused()
                synchronize(device)
                forward[name] = made
            except Exception as error:  # a way that cannot compute a case is a result
                if "CUDA error" in str(error):  # nothing works after it in this process
                    raise
                backward.pop(name, None)
                missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        found: dict[str, Any] = {"missing": missing, "differences": _differences(forward)}
        if seconds and forward:
            found["forward"] = medians(forward, device, seconds)
            if gradients:
                found["backward"] = medians(backward, device, seconds)
    return found


def _backward(out: Tensor, x: Inputs) -> Callable[[], object]:
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (x.query, x.key, x.value), grad, retain_graph=True)


def _differences(forward: dict[str, Call]) -> dict[str, float]:
    """How far each result is from that of fuse, or of the first way where fuse has none, relative to its largest entry."""
    with torch.no_grad():
        if not forward:
            return {}
        first = next(iter(forward.values()))().float()
        return {name: float((call().float() - first).abs().max() / first.abs().max()) for name, call in forward.items()}
