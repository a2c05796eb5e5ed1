"""Text token by token: the keys of earlier tokens come from a cache that grows, or that has its final length from the start.

By hand, with kernels and against float64; and by ``generate``, with the tokens and no more graphs than without fuse.
"""

from __future__ import annotations

import copy
import gc
import resource
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    Cache,
    CompileConfig,
    DynamicCache,
    StaticCache,
)

import fuse
from models import MODELS, decoders, padded, pairs, text, tokens  # noqa: F401  (they register the models)
from models.measure import Wide, draws, errors_of, pooled, prepared, widened
from models.weights import redraw

PROMPT, LENGTH = 37, 45  # tokens given at once, and in the end
SETTLED = 40  # from here on, nothing compiles


def dynamic(network: nn.Module) -> Cache:
    return DynamicCache(config=network.config)


def static(network: nn.Module) -> Cache:
    return StaticCache(config=network.config, max_cache_len=LENGTH + 6)


def decode(run: Callable[..., Any], cache: Cache, side: str | None) -> tuple[list[Tensor], int]:
    """The hidden states of each step, and how many sites had been compiled when things should have settled."""
    ids, mask = tokens(LENGTH), padded(side or "left", LENGTH)
    states, settled = [], 0
    for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        given = {} if side is None else {"attention_mask": mask[:, :stop].clone()}
        given["input_ids"] = ids[:, start:stop].clone()  # a slice has strides, which torch would guard on
        with torch.no_grad():
            states.append(run(past_key_values=cache, use_cache=True, **given).last_hidden_state)
        settled = len(fuse.report().sites) if stop == SETTLED else settled
    return states, settled


@pytest.mark.parametrize(
    ("name", "attention", "side", "make_cache", "declined"),
    [
        ("Llama padded", "sdpa", None, dynamic, set()),
        ("GPT-2", "eager", "left", dynamic, set()),
        ("Gemma2", "eager", None, dynamic, set()),
        ("Llama padded", "sdpa", None, static, set()),
        ("GPT-2", "eager", "left", static, set()),
    ],
)
def test_decoding_with_a_cache_settles_and_stays_right(
    name: str, attention: str, side: str | None, make_cache: Callable[[nn.Module], Cache], declined: set[str]
) -> None:
    """``declined`` names what is not fused yet: a window that slides, and a cache that counts its length in place."""
    network, _ = prepared(*MODELS[name].build(attention), torch.float32)
    compiled = torch.compile(network, backend="fuse", options={"target": "cpp", "inner": "aot_eager"})
    errors, settled = [], []
    for _ in draws(network):
        states, count = decode(compiled, make_cache(network), side)
        eager, _ = decode(network, make_cache(network), side)
        with Wide():
            truth, _ = decode(widened(network), make_cache(network), side)
        errors.append(errors_of(states, eager, truth))
        settled.append(count)
    sites = fuse.report().sites
    assert {type(s.reason).__name__ for s in sites if not s.fused} == declined
    assert len(sites) == settled[0], "a graph was compiled for a later step"
    pooled(errors).assert_no_farther()


# ------------------------------------------------------------------------------------------------------------- generate

HEADS = {"T5": AutoModelForSeq2SeqLM, "Whisper": AutoModelForSpeechSeq2Seq}
LONG = {"max_new_tokens": 5, "min_new_tokens": 5, "decoder_start_token_id": 1}
WAYS = {"greedy": {}, "sampling": {"do_sample": True, "temperature": 0.7}, "beams": {"num_beams": 2}}
Ways = Mapping[str, Mapping[str, Any]]


def generator(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model of ``MODELS`` with a head for tokens, and a prompt whose texts are padded on the left.

    The head has weights of its own: with those of the embedding the likeliest token is the last one again, whatever is seen.
    """
    body, given = MODELS[name].build("eager")
    body.config.tie_word_embeddings = False
    if name != "Whisper":
        given = text("right" if name == "T5" else "left", PROMPT)
    given.pop("decoder_input_ids", None)
    return prepared(HEADS.get(name, AutoModelForCausalLM).from_config(body.config), given, torch.float32)


Found = dict[str, tuple[Tensor, Tensor]]


def generated(network: Any, given: Mapping[str, Tensor], ways: Ways, **more: Any) -> Found:
    """By way, each from one seed, the tokens and the logits that they were chosen by."""
    found = {}
    for way, how in ways.items():
        torch.manual_seed(1)
        every = {**LONG, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **how, **more}
        result = network.generate(**given, **every)
        found[way] = (result.sequences, torch.stack(result.logits))
    return found


def assert_same(found: Found, eager: Found) -> None:
    assert all(torch.equal(found[way][0], eager[way][0]) for way in eager)
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-3)


def compiled(network: Any, backend: str, **more: Any) -> Any:
    fresh = copy.deepcopy(network)
    fresh.forward = torch.compile(fresh.forward, backend=backend, **more)
    return fresh


def counted(run: Callable[[], Found]) -> tuple[Found, int]:
    """With how many graphs were compiled for it."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=64):  # behind it the model would run, and be right, without fuse
        return run(), counters["stats"]["unique_graphs"]


def graphs_without(network: Any, given: Mapping[str, Tensor], ways: Ways) -> int:
    """Those of a backend that asks nothing of a size: Inductor has no fewer."""
    return counted(lambda: generated(compiled(network, "eager"), given, ways))[1]


def assert_as_eager(network: Any, given: Mapping[str, Tensor], ways: Ways, target: str, fewest: int, **more: Any) -> None:
    """Tokens are eager's, with no more graphs than ``fewest``, and all attention in them is fused."""
    eager = generated(network, given, ways, **more)
    fused = compiled(network, "fuse", options={"target": target, "inner": "eager"})
    found, graphs = counted(lambda: generated(fused, given, ways, **more))
    assert_same(found, eager)
    assert graphs == fuse.report().graphs <= fewest
    sites = fuse.report().sites
    assert sites and not [s.reason for s in sites if not s.recovered]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama padded", "Mistral", "Gemma2", "GPT-OSS", "T5", "Whisper", "Qwen3-MoE"])
def test_generate_gives_eagers_tokens_with_no_more_graphs(name: str, cache: str) -> None:
    ways = WAYS if (name, cache) == ("GPT-2", "dynamic") else {way: WAYS[way] for way in ("greedy", "sampling")}
    target = "cpp" if name == "GPT-2" else "reference"  # what is read is the same
    network, given = generator(name)
    if cache == "dynamic":
        assert_as_eager(network, given, ways, target, graphs_without(network, given, ways))
    else:  # one for the prompt, one for each token behind it
        assert_as_eager(network, given, ways, target, 2, cache_implementation=cache)


def test_an_assistant_proposes_what_the_model_would_have_said() -> None:
    network, given = generator("GPT-2")
    assistant, _ = generator("GPT-2")
    redraw(assistant, 1)
    one = {key: value[:1] for key, value in given.items()}
    ways = {"assisted": {"assistant_model": assistant}}
    assert_as_eager(network, one, ways, "reference", graphs_without(network, one, ways))


def test_generate_compiles_by_fuse_in_the_mode_that_it_chooses_itself() -> None:
    """The mode is for CUDA graphs; on CPUs nothing is compiled by itself, so that it has to be asked for."""
    network, given = generator("GPT-2")
    config = CompileConfig(backend="fuse")
    assert config.mode == "reduce-overhead"
    config._compile_all_devices = True
    static = {"cache_implementation": "static"}
    eager = generated(network, given, {"greedy": {}}, **static)
    with warnings.catch_warnings(record=True) as warned:
        found = generated(network, given, {"greedy": {}}, compile_config=config, **static)
    assert_same(found, eager)
    assert [site.fused for site in fuse.report().sites] == [True]
    assert not [w for w in warned if "fuse" in str(w.message)]


def test_texts_of_500_lengths_take_no_more_memory_than_of_100() -> None:
    network, _ = prepared(*MODELS["Llama padded"].build("eager"), torch.float32)
    run = torch.compile(network, backend="fuse", options={"target": "cpp", "inner": "eager"})
    held = []
    for length in range(3, 503):
        with torch.no_grad():
            run(input_ids=tokens(length), attention_mask=padded("left", length), use_cache=False)
        if length in (102, 502):
            gc.collect()
            held.append((len(fuse.report().sites), len(gc.get_objects()), resident()))
    (sites, objects, megabytes), (sites_after, objects_after, megabytes_after) = held
    assert sites_after == sites
    assert objects_after < objects + 100
    assert megabytes_after < megabytes + 16  # the largest call has larger tensors


def resident() -> float:
    """What this process holds, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
