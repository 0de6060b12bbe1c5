"""What items must be in; for each item of a catalogue whether it is allowed out.

A filter is part of a request's body as it is. `allows` says it of one item, `Masks` of all at once.

# I items + 1 (0 pads and is never allowed)
"""

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Annotated, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from elasticrec.data.inputs import Bool
from elasticrec.data.sequences import Int64
from elasticrec.serving.catalogue import Catalogue, Item
from elasticrec.serving.items import Attribute

MAX_NAMES: Final = 100
MAX_ATTRIBUTES: Final = 20
MAX_NAME_CHARACTERS: Final = 256
_KEPT: Final = 32  # masks of the newest filters; one of a million items is 1 MB

Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Value = Name | bool | Number
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
Values = Annotated[list[Value], Field(max_length=MAX_NAMES)]


class CategoryFilter(BaseModel):
    """Every list that is not empty must hold: one of `any`, all of `all`, none of `none`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    any: Names = []
    all: Names = []
    none: Names = []


class AttributeFilter(BaseModel):
    """What the value of one attribute must be. An item without the attribute passes `none` only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    any: Values = []
    none: Values = []
    min: Number | None = None
    max: Number | None = None


class Filters(BaseModel):
    """All of it must hold."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    categories: CategoryFilter = CategoryFilter()
    attributes: Annotated[dict[Name, AttributeFilter], Field(max_length=MAX_ATTRIBUTES)] = {}

    @cached_property
    def key(self) -> str:
        """The same for the same filters."""
        return self.model_dump_json()

    @cached_property
    def allows_all(self) -> bool:
        return self.key == Filters().key


def allows(filters: Filters, item: Item) -> bool:
    """Whether one item passes."""
    wanted, has = filters.categories, set(item.categories)
    if (wanted.any and not has.intersection(wanted.any)) or not has.issuperset(wanted.all):
        return False
    if has.intersection(wanted.none):
        return False
    return all(_fits(rule, item.attributes.get(name)) for name, rule in filters.attributes.items())


def _fits(rule: AttributeFilter, value: Attribute | None) -> bool:
    if value is None:
        return not rule.any and rule.min is None and rule.max is None
    if (rule.any and not _among(value, rule.any)) or _among(value, rule.none):
        return False
    if rule.min is None and rule.max is None:
        return True
    if isinstance(value, str | bool):
        return False
    return (rule.min is None or float(value) >= rule.min) and (rule.max is None or float(value) <= rule.max)


def _among(value: Attribute, values: list[Any]) -> bool:
    """True is not 1 here, and numbers are floats, as in a mask."""
    return any(_plainly(value) == _plainly(other) for other in values)


def _plainly(value: Attribute) -> tuple[bool, Attribute]:
    return isinstance(value, bool), float(value) if type(value) is int else value


class Masks:
    """Masks over the items of one catalogue; those of filters that come again are kept."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Bool] = OrderedDict()

    @cached_property
    def _members(self) -> dict[str, Int64]:
        """Indices of the items of each category, ascending; made when the first filter comes."""
        categories = self._catalogue.categories
        row_M = pc.list_parent_indices(categories).to_numpy()
        names = pc.list_flatten(categories).dictionary_encode()
        code_M = names.indices.to_numpy(zero_copy_only=False)
        order_M = np.argsort(code_M, kind="stable")
        ends = np.cumsum(np.bincount(code_M, minlength=len(names.dictionary)))
        pieces = np.split(row_M[order_M].astype(np.int64) + 1, ends[:-1]) if len(ends) else []
        return dict(zip(names.dictionary.to_pylist(), pieces, strict=True))

    def members(self, category: str) -> Int64:
        """Indices of the items of a category, ascending."""
        return self._members.get(category, np.zeros(0, dtype=np.int64))

    def mask(self, filters: Filters) -> Bool:
        """bool (I,); it is shared, so nobody may write to it."""
        with self._lock:
            found = self._kept.pop(filters.key, None)
            if found is None:
                found = self._make(filters)
                found.setflags(write=False)
            self._kept[filters.key] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    def _make(self, filters: Filters) -> Bool:
        wanted = filters.categories
        mask_I = np.ones(len(self._catalogue) + 1, dtype=np.bool_)
        mask_I[0] = False
        if wanted.any:
            mask_I &= self._marked(wanted.any)
        for name in wanted.all:
            mask_I &= self._marked([name])
        if wanted.none:
            mask_I &= ~self._marked(wanted.none)
        for name, rule in filters.attributes.items():
            mask_I[1:] &= self._fitting(name, rule)
        return mask_I

    def _marked(self, names: list[str]) -> Bool:
        mask_I = np.zeros(len(self._catalogue) + 1, dtype=np.bool_)
        for name in names:
            mask_I[self.members(name)] = True
        return mask_I

    def _fitting(self, name: str, rule: AttributeFilter) -> Bool:
        column = self._catalogue.attributes.get(name)
        if column is None:
            return np.full(len(self._catalogue), _fits(rule, None))
        fitting = np.ones(len(column), dtype=np.bool_)
        if rule.any:
            fitting &= _is_in(column, rule.any)
        if rule.none:
            fitting &= ~_is_in(column, rule.none)
        for compare, limit in ((pc.greater_equal, rule.min), (pc.less_equal, rule.max)):
            if limit is not None:
                fitting &= _compared(column, compare, limit)
        return fitting


def _is_in(column: pa.Array, values: list[Any]) -> Bool:
    if pa.types.is_boolean(column.type):
        fitting: list[Any] = [value for value in values if isinstance(value, bool)]
    elif _is_number(column.type):
        column = _floats(column)
        fitting = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    else:
        column = column.cast(pa.string())
        fitting = [value for value in values if isinstance(value, str)]
    return _plain(pc.is_in(column, value_set=pa.array(fitting, column.type)))


def _compared(column: pa.Array, compare: Any, limit: float) -> Bool:
    if not _is_number(column.type):
        return np.zeros(len(column), dtype=np.bool_)
    return _plain(pc.fill_null(compare(_floats(column), limit), False))


def _floats(column: pa.Array) -> pa.Array:
    """Numbers as filters compare them; a whole one above 2**53 is the nearest float, as it is in JSON readers."""
    return column.cast(pa.float64(), safe=False)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _plain(column: pa.Array) -> Bool:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.bool_)
