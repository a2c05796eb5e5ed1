"""Unmodified Hugging Face models with random weights, end to end: forward, and a step of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_attention import check_fused, compile_with
from gpu_timing import medians, synchronize

import fuse

# How attention is spelled in the model, and who compiles it: the most telling first.
WAYS = (("sdpa", "fuse"), ("sdpa", "inductor"), ("eager", "fuse"), ("sdpa", "none"), ("eager", "inductor"), ("eager", "none"))


@dataclass(frozen=True)
class Shape:
    """Of a model, and of what it is given."""

    model: str
    batch: int
    length: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    vocabulary: int
    inner: int
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.batch * self.length


# GPT-2 medium; a Llama with the sizes of Llama 3.2 1B.
SHAPES = (
    Shape("gpt2", 8, 1024, 24, 1024, 16, 16, 50257, 4096),
    Shape("llama", 2, 4096, 16, 2048, 32, 8, 128256, 8192),
)  # fmt: skip
TINY = (Shape("llama", 1, 24, 1, 32, 2, 1, 64, 64, "float32"),)


def build(shape: Shape, attention: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": shape.vocabulary, "use_cache": False}
    if shape.model == "gpt2":
        config: Any = GPT2Config(n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads, n_inner=shape.inner, **common)
    else:
        config = LlamaConfig(
            hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, intermediate_size=shape.inner, max_position_embeddings=2 * shape.length,
            tie_word_embeddings=True, **common,
        )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=getattr(torch, shape.dtype))


def measure(shape: Shape, training: bool, device: str, ways: list[list[str]], seconds: float) -> dict[str, Any]:
    """Seconds of a forward, or of a step of training with AdamW, for each way; as gpu_attention.measure."""
    torch._dynamo.reset()
    ways = [way for way in ways if seconds or way[1] != "none"]
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length), device=device)
    models = {name: build(shape, name, device).train(training) for name in dict.fromkeys(a for a, _ in ways)}
    optimizers = {name: _optimizer(model, device) for name, model in models.items()} if training else {}
    calls: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    losses: dict[str, float] = {}
    for attention, compiler in ways:
        name = f"{attention}, {compiler}"
        fuse.reset()
        try:
            model = models[attention]
            run = model if compiler == "none" else compile_with(compiler, model, device)
            calls[name] = _step(optimizers[attention], run, tokens) if training else _forward(run, tokens)
            losses[name] = float(calls[name]())
            if compiler == "fuse":
                check_fused()
            synchronize(device)
        except Exception as error:  # a way that cannot run a model is a result
            if "CUDA error" in str(error):
                raise
            calls.pop(name, None)
            if device == "cuda":
                torch.cuda.empty_cache()
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    found: dict[str, Any] = {"missing": missing, "losses": losses}
    if seconds and calls:
        found["memory"] = {name: _peak(call, device) for name, call in calls.items()}
        found["seconds"] = medians(calls, device, seconds)
    return found


def _forward(run: Any, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with torch.inference_mode():
            loss: torch.Tensor = run(tokens, labels=tokens).loss
            return loss

    return call


def _optimizer(model: Any, device: str) -> torch.optim.Optimizer:
    """Learns nothing, so that every step of every way has the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=device == "cuda")


def _step(optimizer: torch.optim.Optimizer, run: Any, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: torch.Tensor = run(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def _peak(call: Callable[[], object], device: str) -> float | None:
    """MB of the device's memory at the peak of a call, weights and all."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated() / 2**20
