"""Columns of raw ids, block by block, in; codes 0, 1, 2, … by first appearance and the distinct ids as text out.

Most logs number their users and items, as whole numbers or as text such as `u17`: those ids are looked up in a table
by their number. All other text goes through a hash table. Both give the same codes.

# E events of a block, N distinct raw ids so far
"""

import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from elasticrec.data.sequences import Int32, Int64

_TABLE_ROWS = 1 << 26  # 256 MiB; ids that are spread wider are hashed


class Codes:
    """The codes of one column over all blocks of a log."""

    def __init__(self) -> None:
        self._coder: _Numbered | _Hashed | None = None

    def add(self, column: pa.Array) -> Int32:
        """Codes of a block of ids, which are strings or int64 without nulls: (E,).

        A dictionary of strings will do where the order of the codes is of no interest: they then follow its order.
        """
        if self._coder is None:
            prefix = _prefix(column)
            self._coder = _Hashed(self.values()) if prefix is None else _Numbered(prefix)
        if isinstance(self._coder, _Numbered):
            code_E = self._coder.add(column)
            if code_E is not None:
                return code_E
            self._coder = _Hashed(self._coder.values())
        return self._coder.add(column)

    def values(self) -> pa.Array:
        """The distinct ids in the order of their codes: strings (N,)."""
        return pa.array([], pa.string()) if self._coder is None else self._coder.values()


class _Numbered:
    """Ids that are a whole number behind a prefix that all share, maybe an empty one."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._number_N: list[Int64] = []
        self._count = 0
        self._low = 0
        self._code1_of = np.zeros(0, dtype=np.int32)  # code + 1 by number - low; zeros cost no memory until written

    def add(self, column: pa.Array) -> Int32 | None:
        """None, and nothing changed, when an id is of another kind or too far from the others."""
        number_E = _numbers(column, self._prefix)
        if number_E is None or not self._reach(number_E):
            return None
        code1_E = self._code1_of[number_E - self._low]
        new_E = code1_E == 0
        if new_E.any():
            self._learn(number_E[new_E])
            code1_E[new_E] = self._code1_of[number_E[new_E] - self._low]
        code1_E -= 1
        return code1_E

    def values(self) -> pa.Array:
        number_N = np.concatenate([np.zeros(0, dtype=np.int64), *self._number_N])
        text = pc.cast(pa.array(number_N), pa.string())
        return pc.binary_join_element_wise(pa.scalar(self._prefix), text, "") if self._prefix else text

    def _learn(self, number_E: Int64) -> None:
        fresh_N = pc.unique(pa.array(number_E)).to_numpy()
        self._code1_of[fresh_N - self._low] = np.arange(self._count + 1, self._count + 1 + len(fresh_N))
        self._number_N.append(fresh_N)
        self._count += len(fresh_N)

    def _reach(self, number_E: Int64) -> bool:
        """Makes room in the table. False when it would become too large."""
        if len(number_E) == 0:
            return True
        low, high = int(number_E.min()), int(number_E.max()) + 1
        if self._count:
            low, high = min(low, self._low), max(high, self._low + len(self._code1_of))
        if high - low > _TABLE_ROWS:
            return False
        if not self._count or low < self._low or high > self._low + len(self._code1_of):
            grown = np.zeros(min(_TABLE_ROWS, 2 * (high - low)), dtype=np.int32)
            if self._count:
                grown[self._low - low : self._low - low + len(self._code1_of)] = self._code1_of
            self._low, self._code1_of = low, grown
        return True


class _Hashed:
    """Ids of any text."""

    def __init__(self, values: pa.Array) -> None:
        self._values = values

    def add(self, column: pa.Array) -> Int32:
        given = pa.types.is_dictionary(column.type)
        encoded = column if given else pc.cast(column, pa.string()).dictionary_encode()
        code_N = pc.index_in(encoded.dictionary, self._values)
        new = encoded.dictionary.filter(pc.is_null(code_N))
        code_N = pc.fill_null(code_N, -1).to_numpy(zero_copy_only=False).copy()
        code_N[code_N < 0] = np.arange(len(self._values), len(self._values) + len(new))
        self._values = pa.concat_arrays([self._values, new])
        return np.asarray(code_N[encoded.indices.to_numpy()], dtype=np.int32)

    def values(self) -> pa.Array:
        return self._values


def _prefix(column: pa.Array) -> str | None:
    """What stands before the number in the first id; None where no number ends it."""
    if pa.types.is_dictionary(column.type):
        return None
    if pa.types.is_integer(column.type) or len(column) == 0:
        return ""
    found = re.match(r"^(.*?)-?\d+$", column[0].as_py(), re.DOTALL)
    return None if found is None else found[1]


def _numbers(column: pa.Array, prefix: str) -> Int64 | None:
    """The number of each id; None unless every id is the prefix and a number as this process would write it."""
    if pa.types.is_integer(column.type):
        return column.to_numpy(zero_copy_only=False) if not prefix else None
    if prefix:
        if not pc.all(pc.starts_with(column, prefix)).as_py():
            return None
        column = pc.utf8_slice_codeunits(column, len(prefix))
    number = whole_numbers(column)
    return None if number is None else _as_numpy(number)


def whole_numbers(column: pa.Array) -> pa.Array | None:
    """Strings as int64; None unless every one is written as this process would write the number: 007 is not 7."""
    if len(column) and not column[0].as_py()[-1:].isdigit():
        return None  # arrow words an error for every value that it cannot read, which takes long
    try:
        number = pc.cast(column, pa.int64())
    except pa.ArrowInvalid:
        return None
    return number if pc.all(pc.equal(pc.cast(number, pa.string()), column), min_count=0).as_py() else None


def _as_numpy(number: pa.Array) -> npt.NDArray[np.int64]:
    return np.asarray(number.to_numpy(zero_copy_only=False), dtype=np.int64)
