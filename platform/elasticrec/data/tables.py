"""One input file and the wanted columns in; an arrow table that can say where in the file a row stands out."""

import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from elasticrec.data.files import InputFile, ParquetFormat, TextFormat
from elasticrec.data.rows import CountedLines, Row, number_columns, rows, value
from elasticrec.errors import InputError, suggestion

_BLOCK_BYTES = 8 << 20
_BLOCK_ROWS = 1 << 20
_STAND_IN = "\x1f"  # replaces separators of several letters, which arrow does not know


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The wanted columns of a file, or of some row groups of it. `first_row`: data rows of the file before these."""

    file: InputFile
    table: pa.Table
    first_row: int = 0

    @property
    def is_text(self) -> bool:
        """Whether values were written as text, so that an empty one means none."""
        return isinstance(self.file.format, TextFormat)

    def column(self, name: str) -> pa.Array:
        """One column in one piece."""
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def error(self, row: int | None, column: str, why: str) -> InputError:
        """The error for the part's row (from 0) and the user's column."""
        where = f"'{self.file.shown}', "
        if row is not None:
            where += f"row {self.first_row + row + 1}"
            where += f" (line {_line_of(self.file, self.first_row + row)}), " if self.is_text else ", "
        return InputError(f"{where}column '{column}': {why}")


def first_true(mask: pa.Array) -> int | None:
    """Index of the first true value."""
    row = pc.index(mask, pa.scalar(True)).as_py()
    return None if row < 0 else int(row)


def read(file: InputFile, columns: Sequence[str], row_groups: Sequence[int] | None = None) -> Part:
    """Reads `columns` of a file; columns of text files come as strings.

    Raises:
        InputError: the file is empty, damaged, not UTF-8, or lacks a column.
    """
    blocks = list(read_blocks(file, columns, row_groups=row_groups))
    return Part(file=file, table=pa.concat_tables([block.table for block in blocks]), first_row=blocks[0].first_row)


def read_blocks(
    file: InputFile, columns: Sequence[str], *, row_groups: Sequence[int] | None = None, kinds: Sequence[str] = ()
) -> Iterator[Part]:
    """What `read` gives in pieces of about a million rows; at least one, which may hold no row.

    Args:
        kinds: columns of few distinct texts; those of parquet files come as dictionaries, which is faster.

    Raises:
        InputError: as `read`, when the piece with what is wrong is reached.
    """
    try:
        if file.bytes == 0 and file.filesystem.get_file_info(file.path).size == 0:
            raise InputError(f"'{file.shown}' is empty (0 bytes); take it out or write it again")
        if isinstance(file.format, ParquetFormat):
            yield from _parquet_blocks(file, columns, row_groups, kinds)
        else:
            yield from _text_blocks(file, file.format, columns)
    except OSError as error:
        raise InputError(f"'{file.shown}' cannot be read: {error}") from None


def row_group_pieces(file: InputFile, rows: int) -> list[tuple[int, ...]]:
    """Consecutive row groups of a parquet file that together reach `rows`; none for text, which is read whole."""
    if not isinstance(file.format, ParquetFormat):
        return []
    try:
        with file.filesystem.open_input_file(file.path) as source:
            metadata = pq.ParquetFile(source).metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"'{file.shown}' is no readable parquet file: {error}") from None
    size_G = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    piece_G = [before // rows for before in itertools.accumulate(size_G, initial=0)][:-1]
    return [tuple(groups) for _, groups in itertools.groupby(range(len(size_G)), key=piece_G.__getitem__)]


def _parquet_blocks(
    file: InputFile, columns: Sequence[str], row_groups: Sequence[int] | None, kinds: Sequence[str]
) -> Iterator[Part]:
    with file.filesystem.open_input_file(file.path) as source:
        try:
            parquet = pq.ParquetFile(source, read_dictionary=list(kinds))
            _require(file, columns, parquet.schema_arrow.names)
            groups = list(range(parquet.num_row_groups)) if row_groups is None else list(row_groups)
            row = sum(parquet.metadata.row_group(group).num_rows for group in range(min(groups, default=0)))
            wanted = [field for field in parquet.schema_arrow if field.name in columns]
            batches = parquet.iter_batches(_BLOCK_ROWS, row_groups=groups, columns=list(columns))
            yield from _in_blocks(file, batches, pa.schema(wanted), row)
        except pa.ArrowInvalid as error:
            raise InputError(f"'{file.shown}' is no readable parquet file: {error}") from None


def _text_blocks(file: InputFile, format: TextFormat, columns: Sequence[str]) -> Iterator[Part]:
    header = list(format.header) if format.header else _header(file, format)
    _require(file, columns, header)
    rows_read = 0
    try:
        with file.filesystem.open_input_stream(file.path) as stream:
            counted = CountedLines(stream)
            batches = _parse(counted, format, header, columns)
            for part in _in_blocks(file, batches, batches.schema, 0):
                rows_read += part.table.num_rows
                yield part
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise _explained(file, format, header, str(error)) from None
    _require_all_rows(file, format, header, counted.lines, rows_read)


def _require_all_rows(file: InputFile, format: TextFormat, header: list[str], lines: int, rows_read: int) -> None:
    """Raises InputError where quotes swallowed rows; quoted fields may well hold line breaks of their own."""
    header_rows = 0 if format.header else 1
    if lines == rows_read + header_rows:
        return
    rows_there, numbers = -header_rows, number_columns(file, format, len(header))
    for row in rows(file, format):
        rows_there += 1
        if (error := _stray_quote(file, format, header, numbers, row, rows_there)) is not None:
            raise error
    if rows_there != rows_read:
        raise InputError(f"'{file.shown}' has {rows_there} rows, of which {rows_read} were read; write it as parquet")


def _in_blocks(file: InputFile, batches: Iterable[pa.RecordBatch], schema: pa.Schema, row: int) -> Iterator[Part]:
    """Joins small batches; `row` is the place of the first row in the file."""
    waiting: list[pa.RecordBatch] = []
    rows, empty = 0, True
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= _BLOCK_ROWS:
            yield Part(file=file, table=pa.Table.from_batches(waiting, schema), first_row=row)
            waiting, row, rows, empty = [], row + rows, 0, False
    if waiting or empty:
        yield Part(file=file, table=pa.Table.from_batches(waiting, schema), first_row=row)


def _parse(stream: Any, format: TextFormat, header: list[str], columns: Sequence[str]) -> Any:
    single = len(format.separator) == 1
    if not single:
        stream = pa.BufferReader(stream.read().replace(format.separator.encode(), _STAND_IN.encode()))
    return pacsv.open_csv(
        pa.PythonFile(stream, mode="r") if single else stream,
        read_options=pacsv.ReadOptions(
            column_names=header if format.header else None, encoding=format.encoding, block_size=_BLOCK_BYTES
        ),
        parse_options=pacsv.ParseOptions(
            delimiter=format.separator if single else _STAND_IN, quote_char='"' if format.quoted else False
        ),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(columns),
            column_types=dict.fromkeys(columns, pa.string()),
            strings_can_be_null=False,
        ),
    )


def _header(file: InputFile, format: TextFormat) -> list[str]:
    """The names in the first line that is not blank."""
    row = next(rows(file, format), None)
    if row is None:
        raise InputError(f"'{file.shown}' is empty: it has no header line; take it out or write it again")
    try:
        row.text.decode(format.encoding)
        return [value(field).decode(format.encoding) for field in row.fields]
    except UnicodeDecodeError as error:
        raise _not_utf8(file, row.line, row.text, error) from None


def _require(file: InputFile, wanted: Sequence[str], present: Sequence[str]) -> None:
    for name in wanted:
        if name not in present:
            known = f" (columns: {', '.join(present)})" if len(present) <= 30 else ""
            raise InputError(f"'{file.shown}' has no column '{name}'{suggestion(name, present)}{known}")
        if list(present).count(name) > 1:
            raise InputError(f"'{file.shown}' has column '{name}' twice; rename one of them")


def _line_of(file: InputFile, row: int) -> int:
    """Line of a data row, which blank lines and the header shift; runs only on the way to an error."""
    assert isinstance(file.format, TextFormat)
    wanted = row if file.format.header else row + 1
    return next((found.line for index, found in enumerate(rows(file, file.format)) if index == wanted), wanted + 1)


def _explained(file: InputFile, format: TextFormat, header: list[str], problem: str) -> InputError:
    """Finds the line that arrow could not read; runs only on the way to an error."""
    number, numbers = 0 if format.header else -1, number_columns(file, format, len(header))
    for row in rows(file, format):
        number += 1
        try:
            text = row.text.decode(format.encoding)
        except UnicodeDecodeError as error:
            return _not_utf8(file, row.line, row.text, error)
        if (stray := _stray_quote(file, format, header, numbers, row, number)) is not None:
            return stray
        if len(row.fields) != len(header):
            return InputError(
                f"'{file.shown}', row {number} (line {row.line}): has {len(row.fields)} fields where the header has "
                f"{len(header)}; correct the line: {text.strip()[:80]!r}"
            )
    if number <= 0:
        return InputError(f"'{file.shown}' has a header and no rows; take it out or write it again")
    return InputError(f"'{file.shown}' cannot be read as separated text; write it as parquet: {problem}")


def _stray_quote(
    file: InputFile, format: TextFormat, header: list[str], numbers: Set[int], row: Row, number: int
) -> InputError | None:
    column = row.stray_quote(len(header), format.separator.encode(), numbers)
    if column is None:
        return None
    name = f"column '{header[column]}'" if column < len(header) else f"column number {column + 1}"
    return InputError(
        f"'{file.shown}', row {number} (line {row.line}), {name}: a quote opens here and takes in all up to line "
        f"{row.last_line}; close it, or take it out if it means nothing; if these lines are one text, write the file "
        "as parquet"
    )


def _not_utf8(file: InputFile, number: int, line: bytes, error: UnicodeDecodeError) -> InputError:
    separator = file.format.separator if isinstance(file.format, TextFormat) else ","
    field = line[: error.start].count(separator.encode()) + 1
    byte = line[error.start]
    return InputError(
        f"'{file.shown}', line {number}, column number {field}: is not UTF-8 (byte 0x{byte:02x}); "
        "write the file as UTF-8, for example with: iconv -f latin1 -t utf-8"
    )
