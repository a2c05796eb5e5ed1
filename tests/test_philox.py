"""Counter-based random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuse.ir.philox import Words, philox, uniform

# Known answers of Random123, the authors' implementation: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c, k = ([torch.tensor(x) for x in words] for words in (counter, key))
    found: Words = philox((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    assert tuple(int(x) for x in found) == expected


def grid(seed: int, planes: int, rows: int, columns: int) -> Tensor:
    sizes = [torch.arange(n) for n in (planes, rows, columns)]
    return uniform(torch.tensor(seed), sizes[0][:, None, None], sizes[1][:, None], sizes[2])


def test_a_number_depends_on_its_place_and_seed_alone() -> None:
    numbers = grid(7, 3, 40, 130)
    assert numbers.dtype == torch.float32 and float(numbers.min()) >= 0 and float(numbers.max()) < 1
    at = [torch.tensor(x) for x in (7, 2, 31, 77)]
    assert float(uniform(*at)) == float(numbers[2, 31, 77])
    assert torch.equal(grid(7, 3, 40, 130), numbers)


@pytest.mark.parametrize("column", [3, 19, 35, 51])
def test_columns_sixteen_apart_are_words_of_one_call(column: int) -> None:
    zero = torch.tensor(0)
    words = philox((torch.tensor(16 + 3), torch.tensor(5), torch.tensor(2), zero), (torch.tensor(9), zero))
    found = uniform(torch.tensor(9), torch.tensor(2), torch.tensor(5), torch.tensor(64 + column))
    assert float(found) == (int(words[column // 16]) >> 8) / 2**24


def test_numbers_are_uniform_and_uncorrelated_along_every_index_and_between_seeds() -> None:
    numbers = grid(123, 8, 64, 256).double()
    count = numbers.numel()
    assert abs(float(numbers.mean()) - 0.5) < 4 * (1 / 12 / count) ** 0.5
    assert abs(float(numbers.var()) - 1 / 12) < 4 * (1 / 180 / count) ** 0.5
    centred = (numbers - 0.5) * 12**0.5
    neighbours = [(centred * centred.roll(1, d)).mean() for d in range(3)]
    neighbours.append((centred * centred.roll(16, 2)).mean())
    neighbours.append((centred * ((grid(124, 8, 64, 256).double() - 0.5) * 12**0.5)).mean())
    for correlation in neighbours:
        assert abs(float(correlation)) < 4 / count**0.5
