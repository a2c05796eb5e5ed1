"""Every spelling of attention is found, and gives what eager gives; see tests/spellings."""

from __future__ import annotations

import pytest
from spellings import (
    SPELLINGS,
    beside,
    biases,
    check,
    composites,
    layouts,
    masks,
    near_miss_masks,
    near_miss_operands,
    near_misses,
    products,
    regions,
    scales,
    sets_of_keys,
    softmaxes,
    statistics,
    terms,
    unnormalised,
)
from together import narrow

TOPICS = (
    beside, softmaxes, products, scales, masks, biases, layouts, sets_of_keys, terms, composites, regions, near_misses,
    near_miss_masks, near_miss_operands, statistics, unnormalised,
)  # fmt: skip


# A row that is NaN gives NaN to all gradients; eager's masked_fill keeps it from those of queries and keys.
NAN_ROWS = {
    "beside.weights_of_rows_without_a_score", "beside.logsumexp_by_hand_of_rows_without_a_score",
    "near_misses.mean_of_masked_scores_subtracted",
    "near_misses.large_scores_without_max",  # the rows that overflow in eager are those with the largest errors
    *(f"near_miss_masks.{n}" for n in (
        "mask_multiplied_by_negative_scale", "empty_rows_infinite", "empty_rows_infinite_bfloat16", "infinity_against_infinity",
        "lowest_times_a_mask_of_halves",  # the mask's gradient is a sum of multiples of finfo.min, which overflow
    )),
}  # fmt: skip
TRAINED = [n for n, case in SPELLINGS.items() if not case.random and n not in NAN_ROWS]
# Plain functions, in which nothing is a mask or written in place: in training they are the same graphs.
PLAIN = ("softmaxes", "products", "scales", "layouts")


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n.partition(".")[0] not in PLAIN or n not in TRAINED])
def test_spelling(name: str) -> None:
    check(name)


# Fused, but not as they look at first sight; beside them all that is called a near miss.
CLOSE = {f"regions.{n}" for n in (
    "query_mutated_after_use", "query_mutated_before_the_values", "value_mutated_between",
    "value_mutated_that_was_the_key", "key_mutated_through_a_view",
    "mask_mutated_after_use", "bias_written_after_use_in_training", "scores_written_over_a_slice", "probabilities_mutated",
    "probabilities_used_twice", "probabilities_masked_again", "table_renormalised_by_its_lookup",
)}  # fmt: skip


def is_close(name: str) -> bool:
    return name in CLOSE or name.startswith(("near_miss", "statistics"))


@pytest.mark.compiler
@pytest.mark.parametrize("name", [n for n, case in SPELLINGS.items() if case.fused and is_close(n)])
def test_near_miss_on_a_kernel(name: str) -> None:
    """The reference normalises first and visits every entry, so it is right even where a kernel must not be made.

    Where none is made, ``test_spelling`` has said so.
    """
    with narrow():
        check(name, target="cpp")


@pytest.mark.parametrize("name", TRAINED)
def test_spelling_in_training(name: str) -> None:
    check(name, training=True)


SYMBOLIC = (
    "softmaxes.in_float32", "softmaxes.deferred_normalisation_minus_max", "softmaxes.sink_per_head",
    "softmaxes.transposed_scores", "statistics.maximum_of_all_below_a_clamp",
    "products.einsum_heads_third", "products.einsum_batch_last_in_scores", "products.sum_of_products", "products.bmm",
    "scales.on_both_by_power", "scales.as_full_tensor", "masks.causal_buffer_slice", "masks.window", "masks.padding_extended",
    "masks.causal_and_padding_combined", "masks.four_masks", "biases.alibi", "biases.t5", "biases.relative_by_gather",
    "biases.added_to_a_part_in_place",
    "sets_of_keys.weights_sliced_the_other_way_round", "sets_of_keys.causal_among_the_first",
    "terms.difference_by_head_in_place", "terms.convit",
    "layouts.packed_split", "layouts.cache_by_cat", "composites.sdpa_causal_more_keys", "composites.mha_both_masks",
    "composites.encoder_layer", "regions.autocast_inside", "regions.two_in_a_row", "near_miss_masks.empty_rows_lowest",
)  # fmt: skip


@pytest.mark.parametrize("name", SYMBOLIC)
def test_spelling_with_symbolic_sizes(name: str) -> None:
    check(name, dynamic=True)
