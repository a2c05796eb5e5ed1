"""Twenty masks in plain PyTorch, and their pictures.

    python docs/gallery.py      writes docs/masks/*.svg, and the gallery in docs/masks.md

The page shows these functions as they are, with what fuse reads in them. tests/test_gallery.py compiles each, and compares the
page and the pictures with what this script would write.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import fuse

LENGTH, TILE, PIXELS = 64, 8, 4
HERE = Path(__file__).parent
Mask = Callable[..., Tensor]

POSITIONS = torch.arange(LENGTH)
# What masks read beside positions.
TENSORS = {
    "document": torch.tensor([0] * 24 + [1] * 27 + [2] * 13),
    "real": POSITIONS < 45,
    "start": torch.tensor(13),
    "span": torch.tensor([0] * 10 + [1] * 16 + [0] * 14 + [2] * 16 + [0] * 8),
    "answer": torch.tensor([0] * 26 + [1] * 14 + [2] * 15 + [3] * 9),
}


# ------------------------------------------------------------------------------------------------- functions of positions


def causal(q, k):
    """A token sees itself and those before it."""
    return q >= k


def window(q, k):
    """The last 16 tokens: Mistral, and the local layers of Gemma."""
    return (q >= k) & (q - k < 16)


def window_on_both_sides(q, k):
    """Neighbours before and after, as in Longformer's encoder."""
    return (q - k).abs() <= 8


def dilated_window(q, k):
    """Every fourth token of a window."""
    return (q >= k) & (q - k < 32) & ((q - k) % 4 == 0)


def strided(q, k):
    """The last tokens, and every eighth: Sparse Transformer (Child et al. 2019), strided."""
    return (q >= k) & ((q - k < 8) | ((q - k) % 8 == 0))


def fixed(q, k):
    """The own block, and the last token of each: Sparse Transformer, fixed."""
    return (q >= k) & ((q // 8 == k // 8) | (k % 8 == 7))


def blocks(q, k):
    """Blocks that do not see each other: windows of an image, chunks of speech."""
    return q // 16 == k // 16


def causal_blocks(q, k):
    """All of the own block and of those before it: frames of a video, block diffusion."""
    return q // 16 >= k // 16


def neighbouring_blocks(q, k):
    """The own block and the one before it, up to the token itself."""
    return (q >= k) & (q // 8 - k // 8 <= 1)


def prefix(q, k):
    """A prompt that sees all of itself, then causal: PrefixLM, T5."""
    return (k < 20) | (q >= k)


def sinks(q, k):
    """The first tokens and a window: StreamingLLM (Xiao et al. 2023)."""
    return (q >= k) & ((q - k < 16) | (k < 4))


def global_tokens(q, k):
    """Neighbours, and tokens that see all and that all see: Longformer, BigBird without its random blocks."""
    return ((q - k).abs() <= 6) | (q < 4) | (k < 4)


def neighbourhood(q, k):
    """An image of 8 x 8, row by row: pixels at most two apart in both directions."""
    return ((q // 8 - k // 8).abs() <= 2) & ((q % 8 - k % 8).abs() <= 2)


def rows_and_columns(q, k):
    """An image of 8 x 8: pixels of the same row or column, as in axial attention."""
    return (q // 8 == k // 8) | (q % 8 == k % 8)


# ------------------------------------------------------------------------------------- functions of positions and tensors


def documents(q, k, document):
    """Texts that are packed into one row; `document` says which one a token belongs to."""
    return document[q] == document[k]


def causal_documents(q, k, document):
    """The same in a decoder."""
    return (document[q] == document[k]) & (q >= k)


def padding(q, k, real):
    """Padding at the end, which nobody sees; `real` is true where a token is."""
    return real[k]


def padding_on_the_left(q, k, start):
    """A batch that is generated from; `start` is where the text begins."""
    return (q >= k) & (k >= start)


def spans(q, k, span):
    """Causal, but images see all of themselves: Gemma 3, PaliGemma. `span` numbers images from 1 on, text is 0."""
    return (q >= k) | ((span[q] == span[k]) & (span[q] > 0))


def shared_prompt(q, k, answer):
    """One prompt (0) and several answers to it, which do not see each other: sampling, rewards, verified drafts."""
    return (q >= k) & ((answer[k] == 0) | (answer[q] == answer[k]))


MASKS: tuple[Mask, ...] = (
    causal, window, window_on_both_sides, dilated_window, strided, fixed, blocks, causal_blocks, neighbouring_blocks, prefix,
    sinks, global_tokens, neighbourhood, rows_and_columns, documents, causal_documents, padding, padding_on_the_left, spans,
    shared_prompt,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is said of one


def tensors(mask: Mask) -> dict[str, Tensor]:
    """What a mask reads beside positions."""
    return {name: TENSORS[name] for name in inspect.signature(mask).parameters if name in TENSORS}


def attention(mask: Mask) -> Callable[..., Tensor]:
    """Attention under a mask, as a model writes it: (batch, heads, length, width) of each."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **read: Tensor) -> Tensor:
        q, k = torch.arange(query.shape[-2])[:, None], torch.arange(key.shape[-2])
        score = query @ key.mT / query.shape[-1] ** 0.5
        return score.masked_fill(~mask(q, k, **read), -torch.inf).softmax(-1) @ value

    return attend


@cache
def site(mask: Mask) -> fuse.Site:
    """What fuse makes of it."""
    with torch.no_grad():
        (found,) = fuse.explain(attention(mask), *torch.randn(3, 1, 2, LENGTH, 16), **tensors(mask)).sites
    return found


def entries(mask: Mask) -> Tensor:
    """bool, (LENGTH, LENGTH): the mask itself, by the code that the page shows."""
    seen: Tensor = mask(POSITIONS[:, None], POSITIONS, **tensors(mask))
    return seen.expand(LENGTH, LENGTH)


def tiles(seen: Tensor) -> Tensor:
    """int, (LENGTH / TILE,) * 2: entries that are seen in each tile."""
    return seen.int().unfold(0, TILE, TILE).unfold(1, TILE, TILE).sum((-1, -2))


def picture(mask: Mask) -> str:
    """An SVG, a row for each query: seen entries of full tiles dark, of partial ones bright, empty tiles grey."""
    seen, count = entries(mask), tiles(entries(mask))
    full = count.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1) == TILE**2
    empty = (count == 0).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    side = LENGTH * PIXELS
    shapes = [
        f'<path fill="{colour}" d="{_runs(which)}"/>'
        for colour, which in (("#e0e0e0", empty), ("#1565c0", seen & full), ("#64b5f6", seen & ~full))
    ]
    lines = "".join(f"M{i},0V{side}M0,{i}H{side}" for i in range(0, side + 1, TILE * PIXELS))
    shapes.append(f'<path stroke="#9e9e9e" stroke-width="0.5" d="{lines}"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" width="{side}" height="{side}">'
    return "\n".join([head, f'<rect width="{side}" height="{side}" fill="white"/>', *shapes, "</svg>\n"])


def _runs(which: Tensor) -> str:
    """Entries as rectangles, one for each run of a row."""
    found = []
    for row, line in enumerate(which.tolist()):
        edges = [i for i in range(LENGTH + 1) if (i > 0 and line[i - 1]) != (i < LENGTH and line[i])]
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            width = (end - begin) * PIXELS
            found.append(f"M{begin * PIXELS},{row * PIXELS}h{width}v{PIXELS}h-{width}z")
    return "".join(found)


def entry(mask: Mask) -> str:
    """Its part of the page."""
    name, about = mask.__name__, inspect.getdoc(mask)
    source = inspect.getsource(mask).replace(f'    """{about}"""\n', "")
    count = tiles(entries(mask))
    empty, full = int((count == 0).sum()), int((count == TILE**2).sum())
    title = name.replace("_", " ").capitalize()
    return f"""### {title}

{about}

```python
{source.strip()}
```

![{title}](masks/{name}.svg)

Read as `{site(mask).mask}`. Of {count.numel()} tiles {empty} are empty, {full} full.
"""


BEGIN = "<!-- from here on written by docs/gallery.py -->\n"


def page() -> str:
    """docs/masks.md with the gallery as it is now."""
    written = (HERE / "masks.md").read_text().partition(BEGIN)[0]
    return written + BEGIN + "\n" + "\n".join(map(entry, MASKS))


def main() -> None:
    (HERE / "masks.md").write_text(page())
    (HERE / "masks").mkdir(exist_ok=True)
    for mask in MASKS:
        (HERE / f"masks/{mask.__name__}.svg").write_text(picture(mask))


if __name__ == "__main__":
    main()
