"""Blocks of encoded events in the order of the input in; columns on disk, sorted by user and time, out.

Sorting takes two passes over the disk: events go to the region of their user, then each region, which fits into the
processor's caches or nearly so, is sorted by itself. Memory holds some blocks, whatever the number of events.

# E events, U users, R regions
"""

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from elasticrec.columns import TIME, USER
from elasticrec.data.sequences import Int64

_BLOCK_EVENTS = 1 << 21
_REGION_EVENTS = 1 << 20
_REGION_USERS = 1 << 16  # so that a place in the region is one digit of the sort
_DIGIT_BITS = 16  # numpy's stable sort of 16-bit numbers is a radix sort

Column = npt.NDArray[Any]


class Spool:
    """Columns of events as raw files in a folder, appended block by block."""

    def __init__(self, folder: Path) -> None:
        self.rows = 0
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._kinds: dict[str, np.dtype[Any]] = {}

    def append(self, block: Mapping[str, Column]) -> None:
        """Adds events; every block has the same columns."""
        for name, values in block.items():
            if name not in self._files:
                self._files[name] = (self._folder / f"{name}.spool").open("wb")
                self._kinds[name] = values.dtype
            self._files[name].write(np.ascontiguousarray(values).data)
        self.rows += len(next(iter(block.values())))

    def close(self) -> None:
        """Ends the writing."""
        for file in self._files.values():
            file.close()

    @property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """The columns and their types."""
        return dict(self._kinds)

    def blocks(self) -> list[slice]:
        """The events in pieces that fit into memory."""
        return [slice(begin, min(begin + _BLOCK_EVENTS, self.rows)) for begin in range(0, self.rows, _BLOCK_EVENTS)]

    def read(self, name: str, rows: slice) -> Column:
        """Some events of a column."""
        kind = self._kinds[name]
        file = self._folder / f"{name}.spool"
        return np.fromfile(file, kind, rows.stop - rows.start, offset=rows.start * kind.itemsize)

    def column(self, name: str) -> Column:
        """A column, mapped."""
        return _mapped(self._folder / f"{name}.spool", self._kinds[name])

    def drop(self) -> None:
        """Removes the files."""
        for name in self._kinds:
            (self._folder / f"{name}.spool").unlink()


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the result is to look."""

    offset_U1: Int64  # where each user's events begin
    index_of: Mapping[str, Column]  # column → the index of each code; users become 0..U-1
    keep_E: npt.NDArray[np.bool_] | None = None  # which events of the spool stay; all without it


def arrange(spool: Spool, layout: Layout, folder: Path) -> dict[str, Column]:
    """Sorts by (user, time, place in the spool) into `folder` and drops the spool; the columns come mapped."""
    regions = _Regions.of(layout.offset_U1)
    with ThreadPoolExecutor(os.cpu_count()) as threads, contextlib.ExitStack() as opened:
        counted = list(threads.map(lambda rows: _count(spool, rows, layout, regions), spool.blocks()))
        begin_BR = regions.begin_R + np.cumsum([np.zeros_like(regions.begin_R), *counted], axis=0)[:-1]
        target = opened.enter_context(contextlib.closing(_Target(folder, layout, spool.kinds)))
        list(threads.map(lambda job: _part(spool, job[0], layout, regions, job[1], target),
                         zip(spool.blocks(), begin_BR, strict=True)))  # fmt: skip
        spool.drop()
        list(threads.map(lambda region: _sort(regions, region, target), range(len(regions.begin_R))))
    return target.columns()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Regions:
    """Consecutive users whose events together are few enough to be sorted at once."""

    user_R1: Int64  # the first user of each, and U
    begin_R: Int64  # the first event of each
    end_R: Int64

    @classmethod
    def of(cls, offset_U1: Int64) -> "_Regions":
        users = len(offset_U1) - 1
        full = np.searchsorted(offset_U1, np.arange(0, offset_U1[-1], _REGION_EVENTS), side="right") - 1
        user_R1 = np.unique(np.concatenate([full, np.arange(0, users, _REGION_USERS), [users]]))
        return cls(user_R1=user_R1, begin_R=offset_U1[user_R1[:-1]], end_R=offset_U1[user_R1[1:]])

    def of_users(self, user_E: Column) -> Column:
        """The region of each event; of the narrowest type, which sorts fastest."""
        regions = len(self.begin_R)
        kind = np.uint8 if regions <= 1 << 8 else np.uint16 if regions <= 1 << _DIGIT_BITS else np.uint32
        region_U = np.repeat(np.arange(regions, dtype=kind), np.diff(self.user_R1))
        return region_U[user_E]


class _Target:
    """The columns of the result as raw files that are written and read at any place."""

    def __init__(self, folder: Path, layout: Layout, kinds: Mapping[str, np.dtype[Any]]) -> None:
        self._folder = folder
        self._rows = int(layout.offset_U1[-1])
        self.kinds = {name: layout.index_of[name].dtype if name in layout.index_of else kinds[name] for name in kinds}
        self._files = {name: os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for name in kinds}

    def write(self, name: str, begin: int, values: Column) -> None:
        rest = memoryview(values.tobytes())
        place = begin * values.dtype.itemsize
        while rest:
            done = os.pwrite(self._files[name], rest, place)
            rest, place = rest[done:], place + done

    def read(self, name: str, begin: int, end: int) -> Column:
        kind = self.kinds[name]
        return np.fromfile(self._path(name), kind, end - begin, offset=begin * kind.itemsize)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)

    def columns(self) -> dict[str, Column]:
        """Everything but the users, whose events the offsets give."""
        self._path(USER).unlink()
        return {name: _mapped(self._path(name), kind) for name, kind in self.kinds.items() if name != USER}

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.raw"


def _count(spool: Spool, rows: slice, layout: Layout, regions: _Regions) -> Int64:
    """Events of a block in each region: (R,)."""
    user_E = layout.index_of[USER][_read(spool, USER, rows, layout)]
    return np.bincount(regions.of_users(user_E), minlength=len(regions.begin_R))


def _part(spool: Spool, rows: slice, layout: Layout, regions: _Regions, begin_R: Int64, target: _Target) -> None:
    """Brings the events of a block to their regions, in their order."""
    user_E = layout.index_of[USER][_read(spool, USER, rows, layout)]
    region_E = regions.of_users(user_E)
    order_E = np.argsort(region_E, kind="stable")
    cut_R1 = np.concatenate([[0], np.cumsum(np.bincount(region_E, minlength=len(begin_R)))])
    for name in spool.kinds:
        value_E = user_E if name == USER else _read(spool, name, rows, layout)
        if name != USER and name in layout.index_of:
            value_E = layout.index_of[name][value_E]
        value_E = value_E[order_E]
        for region in np.flatnonzero(np.diff(cut_R1)):
            target.write(name, begin_R[region], value_E[cut_R1[region] : cut_R1[region + 1]])


def _read(spool: Spool, name: str, rows: slice, layout: Layout) -> Column:
    values = spool.read(name, rows)
    return values if layout.keep_E is None else values[layout.keep_E[rows]]


def _sort(regions: _Regions, region: int, target: _Target) -> None:
    """Sorts the events of a region by user and time, in place."""
    begin, end = int(regions.begin_R[region]), int(regions.end_R[region])
    user_E = target.read(USER, begin, end) - np.int32(regions.user_R1[region])
    time_E = target.read(TIME, begin, end) if TIME in target.kinds else None
    order_E, time_E = order_of(user_E, time_E)
    for name in target.kinds:
        if name == TIME and time_E is not None:
            target.write(name, begin, time_E)
        elif name != USER:
            target.write(name, begin, target.read(name, begin, end)[order_E])


def order_of(user_E: Column, time_E: Column | None) -> tuple[Int64, Column | None]:
    """`np.lexsort((time_E, user_E))` and the times in that order, many times as fast; nothing may be negative."""
    order_E = _radix(user_E, None)
    if time_E is None:
        return order_E, None
    sorted_E = time_E[order_E]
    if not _in_order(user_E[order_E], sorted_E):
        order_E = _radix(user_E, _radix(time_E - time_E.min(), None))
        sorted_E = time_E[order_E]
    return order_E, sorted_E


def _in_order(user_E: Column, time_E: Column) -> bool:
    back_E = time_E[1:] < time_E[:-1]
    return bool((user_E[1:][back_E] != user_E[:-1][back_E]).all())


def _radix(value_E: Column, order_E: Int64 | None) -> Int64:
    """The order of `order_E`, sorted stably by value: one digit after the other, lowest first."""
    largest = int(value_E.max(initial=0))
    for shift in range(0, max(1, largest.bit_length()), _DIGIT_BITS):
        digit_E = (value_E >> shift).astype(np.uint16)
        if order_E is None:
            order_E = np.argsort(digit_E, kind="stable")
        else:
            order_E = order_E[np.argsort(digit_E[order_E], kind="stable")]
    assert order_E is not None
    return order_E


def _mapped(path: Path, kind: np.dtype[Any]) -> Column:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r")
