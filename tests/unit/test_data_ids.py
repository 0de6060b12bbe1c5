"""Dense ids: popular items first, users by first appearance, none lost."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elasticrec.data import ids

CODES = st.lists(st.integers(0, 9), max_size=60)


@given(codes=CODES)
def test_items_are_ordered_by_count_then_first_appearance(codes: list[int]) -> None:
    code_E = np.array(codes, dtype=np.int32)
    order_I = ids.items_by_popularity(ids.counts(code_E, 10), ids.first_positions(code_E, 10))
    found = Counter(codes)
    assert order_I.tolist() == sorted(found, key=lambda code: (-found[code], codes.index(code)))


@given(codes=CODES)
def test_users_are_ordered_by_first_appearance(codes: list[int]) -> None:
    code_E = np.array(codes, dtype=np.int32)
    order_U = ids.users_by_appearance(ids.counts(code_E, 10), ids.first_positions(code_E, 10))
    assert order_U.tolist() == list(dict.fromkeys(codes))


@given(codes=CODES, start=st.integers(0, 1))
def test_index_is_the_inverse_of_the_order(codes: list[int], start: int) -> None:
    order_I = np.array(list(dict.fromkeys(codes)), dtype=np.int64)
    index_N = ids.index_of(order_I, 10, start)
    assert index_N[order_I].tolist() == list(range(start, start + len(order_I)))
    assert all(index_N[code] == ids.ABSENT for code in set(range(10)) - set(codes))
