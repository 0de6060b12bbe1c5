"""A file of separated text in; its lines, its rows, which quoted fields may stretch over lines, and stray quotes out.

Rows are cut as arrow cuts them, one by one in Python: this runs where arrow's rows and the lines of the file differ in
number, and on the way to an error.
"""

import codecs
import itertools
import re
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from elasticrec.data.files import InputFile, TextFormat

_BLOCK_BYTES = 8 << 20
_QUOTE = b'"'
_LINE_ENDS = b"\r\n"
_FIRST_LINES, _TELLING_LINES = 1_000, 4
_NUMBER = re.compile(rb'[\s"]*[+-]?\d[-+\d.,:/TZeE ]*"?\s*')  # or a time


class Row(NamedTuple):
    """One row, or the header, as it stands in the file. Lines count from 1."""

    line: int
    last_line: int
    text: bytes
    fields: Sequence[bytes]

    def stray_quote(self, width: int, separator: bytes, numbers: Set[int]) -> int | None:
        """The column (from 0) of a quote that takes in line ends it should not.

        Args:
            width: columns of the file.
            numbers: those of them that hold numbers, see `number_columns`.
        """
        if self.line == self.last_line:
            return None
        long = [place for place, field in enumerate(self.fields) if len(field.splitlines()) > 1 or _end(field) < 0]
        if len(self.fields) != width or self._holds_rows(width, separator, numbers):
            return long[0]
        return next((place for place in long if _end(self.fields[place]) < len(self.fields[place])), None)

    def _holds_rows(self, width: int, separator: bytes, numbers: Set[int]) -> bool:
        """Whether what follows the first line is rows of their own.

        Text has the separators of a row by chance, and hardly ever numbers in their places. Where no column tells, only
        many lines do, all of them.
        """
        _, *further = [line for line in self.text.splitlines() if line]
        alike = sum(_is_row(line.split(separator), width, numbers) for line in further)
        return 2 * alike > len(further) if numbers else len(further) >= _TELLING_LINES and alike == len(further)


def value(field: bytes) -> bytes:
    """Without the quotes around it."""
    if not field.startswith(_QUOTE):
        return field
    end = _end(field)
    inside, behind = (field[1:], b"") if end < 0 else (field[1 : end - 1], field[end:])
    return inside.replace(_QUOTE * 2, _QUOTE) + behind


class CountedLines:
    """A stream of bytes that counts the lines which pass; blank ones are none."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._within = False  # a line
        self.lines = 0

    def read(self, size: int | None = None) -> bytes:
        """The next bytes."""
        block: bytes = self._stream.read(size)
        byte = np.frombuffer(block, dtype=np.uint8)
        filled = (byte != _LINE_ENDS[0]) & (byte != _LINE_ENDS[1])
        if len(filled):
            self.lines += int(np.count_nonzero(filled[1:] > filled[:-1])) + int(filled[0] > self._within)
            self._within = bool(filled[-1])
        return block

    def close(self) -> None:
        """The stream is closed by whoever opened it."""


def lines(file: InputFile) -> Iterator[tuple[int, bytes]]:
    r"""Lines of a text file with their number from 1, without a byte order mark; they end in \n, \r\n or \r."""
    number = 0
    with file.filesystem.open_input_stream(file.path) as stream:
        rest = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        while block := stream.read(_BLOCK_BYTES):
            *whole, rest = (rest + block).splitlines(keepends=True)
            for line in whole:
                number += 1
                yield number, line
    if rest:
        yield number + 1, rest


def rows(file: InputFile, format: TextFormat) -> Iterator[Row]:
    """Rows of a text file, the header among them and blank lines not."""
    numbered, separator = lines(file), format.separator.encode()
    for number, line in numbered:
        if not line.strip(_LINE_ENDS):
            continue
        if format.quoted and _QUOTE in line:
            yield _quoted_row(number, line, numbered, separator)
        else:
            yield Row(number, number, line, line.rstrip(_LINE_ENDS).split(separator))


def _quoted_row(number: int, line: bytes, following: Iterator[tuple[int, bytes]], separator: bytes) -> Row:
    text, last, begin = bytearray(line), number, 0
    fields: list[bytes] = []
    while True:
        end = begin
        if text.startswith(_QUOTE, begin):
            end = _closing(text, begin + 1)
            while end < 0 and (more := next(following, None)) is not None:
                searched = len(text)
                last = more[0]
                text += more[1]
                end = _closing(text, searched)
            end = end if end >= 0 else len(text)
        end = text.find(separator, end)
        if end < 0:
            fields.append(bytes(text[begin:]).rstrip(_LINE_ENDS))
            return Row(number, last, bytes(text), fields)
        fields.append(bytes(text[begin:end]))
        begin = end + len(separator)


def _end(field: bytes) -> int:
    """Where the quoted part of a field ends; -1 where no quote ends it."""
    return _closing(field, 1) if field.startswith(_QUOTE) else len(field)


def _closing(text: bytes | bytearray, start: int) -> int:
    """Where the quoted text that goes on at `start` has ended; -1 where no quote ends it. A doubled quote does not."""
    while (place := text.find(_QUOTE, start)) >= 0:
        if not text.startswith(_QUOTE, place + 1):
            return place + 1
        start = place + 2
    return -1


def number_columns(file: InputFile, format: TextFormat, width: int) -> Set[int]:
    """Which columns (from 0) hold numbers or times in most of the first lines; quoted line ends do not count."""
    split = (line.rstrip(_LINE_ENDS).split(format.separator.encode()) for _, line in lines(file))
    first = list(itertools.islice((fields for fields in split if len(fields) == width), _FIRST_LINES))
    return {place for place in range(width) if 2 * sum(map(_is_number, (f[place] for f in first))) > len(first)}


def _is_row(fields: Sequence[bytes], width: int, numbers: Set[int]) -> bool:
    return len(fields) == width and all(_is_number(fields[place]) for place in numbers)


def _is_number(field: bytes) -> bool:
    return _NUMBER.fullmatch(field) is not None
