"""Hypothesis strategies of programs. What a draw shrinks to is first among its choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from fuzz import masks
from fuzz.draft import Draft, Sizes
from fuzz.operands import operands, positions, shared, shared_for_all
from fuzz.program import Program, listed
from fuzz.written_out import broadcast, form, mask, normalised, scores, step, unnormalised

DTYPES = ("float32", "float32", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Limits:
    """What a target has time for: the most positions and features; and the least positions."""

    length: int = 70
    least: int = 1
    features: int = 130
    sources: tuple[str, ...] = ("plain",) * 13 + ("sdpa",) * 3 + ("flex", "mha")
    inner: str = "eager"


# -------------------------------------------------------------------------------------------------------------- sources


def plain(d: Draft) -> None:
    operands(d)
    attended(d)


def written(d: Draft) -> None:
    """As ``plain``, with queries and keys that are written by halves into new memory, as rotary positions often are."""
    operands(d)
    for x in "qk":
        d.write(f"{x}_in = {x}.transpose(-1, -2)")
        d.write(f"{x}_out = torch.empty_like({x}_in)")
        d.write(f"{x}_out[..., 0::2, :], {x}_out[..., 1::2, :] = {x}_in[..., 0::2, :] * 0.8, {x}_in[..., 1::2, :] + 0.1")
        d.write(f"{x} = {x}_out{d.one('', f'.type_as({x})', '.contiguous()')}.transpose(-1, -2)")
    attended(d)


def attended(d: Draft) -> None:
    positions(d)
    shared(d)
    mutated(d, "q", "k", "v", percent=4)
    scores(d)
    mutated(d, "q", "k", "v", percent=5)
    masked = d.one(0, 1, 1, 1, 2)
    for turn in range(d.one(0, 1, 1, 2, 3)):
        d.write(step(d))
        if turn == 0 and masked == 2:
            mask(d)
    if masked:
        mask(d)
    if d.often(2):
        d.write("s = s + torch.ones(m + 1)")
    mutated(d, "k", "v", *learned(d), percent=5)
    normalised(d)
    mutated(d, "q", "k", "v", *learned(d), percent=5)
    if d.sizes.qk == d.sizes.v and d.often(10):
        d.write("out = (out @ k.mT * 0.2).softmax(-1) @ v")
    beside(d, "s", "p")
    if len(d.sizes.lead) == 3:
        d.write(d.one("out = out.flatten(1, 2)", "out = out"))


def plain_unnormalised(d: Draft) -> None:
    """As ``plain``, without a softmax."""
    operands(d)
    positions(d)
    shared(d)
    scores(d)
    for _ in range(d.one(0, 1, 1, 2)):
        d.write(step(d))
    unnormalised(d)
    mutated(d, "q", "k", "v", *learned(d), percent=5)
    beside(d, "s", "p")


def sdpa(d: Draft) -> None:
    z = d.sizes
    operands(d)
    positions(d)
    arguments = ""
    way = d.one("", "is_causal=True", "keep", "float", "sum")
    if way == "is_causal=True":
        arguments += ", is_causal=True"
    elif way:
        d.write(f"keep = ({form(d)})")
        added = f"torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, {d.one('-math.inf', 'torch.finfo(q.dtype).min')})"
        text = {"keep": "keep", "float": added, "sum": f"({added} + {broadcast(d) if way == 'sum' else 0})"}[way]
        d.write(f"mask = {text}.expand({listed(z.lead)}{', ' if z.lead else ''}n, m)")
        arguments += ", attn_mask=mask"
    arguments += d.one("", "", f", scale={d.one(0.25, 0.1, 1.0)}")
    if z.lead != z.kv_lead:
        if d.often(50) and len(z.lead) == 2 == len(z.kv_lead):
            arguments += ", enable_gqa=True"
        else:
            shared_for_all(d)
    mutated(d, "q", "k", "v", percent=5)
    d.write(f"out = F.scaled_dot_product_attention(q, k, v{arguments})")
    mutated(d, "q", "k", "v", *learned(d), percent=6)
    beside(d)


SCORE_MODS = (
    "s", "s * 0.5", "s + (j - i)", "torch.tanh(s / 5) * 5", "torch.where(j <= i, s, -math.inf)", "s - (i - j).abs() * 0.25",
    "s + {heads}[h]", "s + {table}[j - i + n - 1]", "s * {heads}[h] + {keys}[b, j]",
)  # fmt: skip
MASK_MODS = (
    "j <= i", "(j <= i) & (i - j < 4)", "i // 4 == j // 4", "(j <= i) | (j < 3)", "j < {limits}[b]",
    "({ids}[b, i] == {ids}[b, j]) & (j <= i)", "j < i",
)  # fmt: skip


def flex(d: Draft) -> None:
    """FlexAttention, of four dimensions."""
    operands(d)
    z = d.sizes
    b, h = z.lead
    tables = {"heads": f"randn({h})", "table": "randn(n + m - 1)", "keys": f"randn({b}, m)",
              "limits": f"randint(0, m + 1, {b})", "ids": f"randint(0, 3, {b}, max(n, m))"}  # fmt: skip

    def filled(text: str) -> str:
        return text.format(**{x: d.given(expression) for x, expression in tables.items() if f"{{{x}}}" in text})

    d.write(f"score_mod = lambda s, b, h, i, j: {filled(d.one(*SCORE_MODS))}")
    arguments = ""
    if d.often(40):
        d.write(f"mask_mod = lambda b, h, i, j: {filled(d.one(*MASK_MODS))}")
        size = d.one("", ", BLOCK_SIZE=16")
        d.write(f'block_mask = create_block_mask(mask_mod, {b}, {d.one("None", str(h))}, n, m, device="cpu"{size})')
        arguments += ", block_mask=block_mask"
    if z.lead != z.kv_lead:
        arguments += ", enable_gqa=True"
    d.write(f"out = flex_attention(q, k, v, score_mod{arguments})")
    beside(d)


def mha(d: Draft) -> None:
    """nn.MultiheadAttention, in which heads lie beside features."""
    z = d.sizes
    batch, heads = z.lead[0], z.lead[1]
    width = heads * z.qk
    options = d.one("", ", bias=False", ", add_zero_attn=True", ", add_bias_kv=True")
    layer = d.given(f"mha({width}, {heads}, batch_first=True{options})")
    q = d.given(f"randn({batch}, n, {width})")
    k = q if z.square and d.often(60) else d.given(f"randn({batch}, m, {width})")
    v = k if d.often(70) else d.given(f"randn({batch}, m, {width})")
    d.write(f"q, k, v = {q}, {k}, {v}")
    d.write("n, m = q.shape[-2], k.shape[-2]")
    positions(d)
    arguments = d.one("", ", need_weights=False", ", average_attn_weights=False")
    if d.often(50):
        d.write(f"hide = ~({d.draw(masks.forms(data=False))}).expand(n, m)")
        arguments += ", attn_mask=hide"
    if d.often(40):
        arguments += f", key_padding_mask={d.given(f'coin({batch}, m)')}"
    d.write(f"out, w = {layer}(q, k, v{arguments})")
    if "need_weights" not in arguments and d.often(50):
        d.beside.append("w")


SOURCES = {"plain": plain, "written": written, "unnormalised": plain_unnormalised, "sdpa": sdpa, "flex": flex, "mha": mha}


# ------------------------------------------------------------------------------------- what else is read, and written to


WRITES = ("{0}.mul_(0.5)", "{0}.zero_()", "{0}[..., 0].fill_(2)", "{0}.copy_({0}.flip(-1))", "{0} += 1")


def mutated(d: Draft, *names: str, percent: int) -> None:
    """A write in place."""
    if d.often(percent):
        d.write(d.one(*WRITES).format(d.one(*names)))


def learned(d: Draft) -> list[str]:
    """Inputs so far that numbers can be written to."""
    return [name for name, expression in d.inputs if expression.startswith("randn")]


def beside(d: Draft, *names: str) -> None:
    """Other results, of the operands and of ``names``."""
    if d.often(12):
        mean = ".mean(-3)" if d.sizes.lead else ".sum(-2)"
        of_names = [f"{x}{read}" for x in names for read in ("", ".amax(-1)", " @ v", ".logsumexp(-1)", mean)]
        d.beside.append(d.one("q", "q * 2", "k.sum()", "v[..., 0]", "out", "out.mT", "out[..., :1]", "out.detach()", *of_names))


ENDS = (
    "out = out + 1", "out = out.contiguous()", "out += 1", "out.mul_(2)", "out = out.mT", "out = out.to(torch.float32)",
    "out = out.flatten(-2)", "out = F.gelu(out)", "out = out[..., 0]", "out = out.transpose(0, 1)",
)  # fmt: skip


def finished(d: Draft) -> str:
    """The text of what is returned."""
    if d.often(40):
        d.write(d.one(*ENDS))
    return f"({', '.join(['out', *d.beside])})" if d.beside else "out"


def regions(d: Draft) -> None:
    """All lines under autocast, or without gradients."""
    if d.often(5):
        head = d.one('with torch.autocast("cpu", dtype=torch.bfloat16):', "with torch.no_grad():")
        d.lines = [head, *(f"    {line}" for line in d.lines)]


# -------------------------------------------------------------------------------------------------------------- programs


def sizes(draw: st.DrawFn, limits: Limits, source: str) -> Sizes:
    features = st.one_of(st.sampled_from((16, 8, 1, 24, 32, 40, 64, 80, 96, 128)), st.integers(1, 130))
    few = features.map(lambda n: min(n, limits.features))
    qk = draw(few)
    v = qk if draw(st.booleans()) else draw(few)
    square = draw(st.booleans())
    leads: list[tuple[int, ...]] = [(2, 2), (1, 1), (2, 1), (1, 3), (2, 4)]
    if source == "mha":
        return Sizes(draw(st.sampled_from(leads)), (), min(qk, 32), v, square)
    if source == "flex":
        qk = v = max(16, min(qk, 64))
    else:
        leads += [(2,), (), (1,), (5,), (2, 1, 2)]
    lead = draw(st.sampled_from(leads))
    kv_lead = lead
    if len(lead) == 2 and lead[1] > 1 and draw(st.integers(0, 3)) == 3:
        kv_lead = (lead[0], draw(st.sampled_from([g for g in (1, 2) if lead[1] % g == 0])))
    elif source == "plain" and lead and draw(st.integers(0, 9)) == 9:
        kv_lead = lead[1:]
    return Sizes(lead, kv_lead, qk, v, square)


def lengths(draw: st.DrawFn, limits: Limits, square: bool) -> tuple[tuple[int, int], ...]:
    most = limits.length
    one = st.one_of(
        st.sampled_from([n for n in (9, 1, 2, 16, 17, 33, 64) if limits.least <= n <= most]), st.integers(limits.least, most)
    )
    n, m = draw(one), draw(one)
    m = n if square else m
    if draw(st.integers(0, 9)) < 8:
        return ((n, m),)
    others = st.integers(max(2, limits.least), most)
    more = draw(others)
    return ((n, m), (more, more if square else draw(others)))


def programs(limits: Limits = Limits()) -> st.SearchStrategy[Program]:
    @st.composite
    def drawn(draw: st.DrawFn) -> Program:
        source = draw(st.sampled_from(limits.sources))
        chosen = sizes(draw, limits, source)
        d = Draft(draw, draw(st.sampled_from(DTYPES)), chosen, draw(st.booleans()))
        SOURCES[source](d)
        result = finished(d)
        regions(d)
        return d.program(result, lengths(draw, limits, chosen.square), limits.inner)

    found: Any = drawn()
    return found
