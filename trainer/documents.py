"""Documents from local files, whatever they are called: text, JSON and Parquet, as they are or compressed.

What a file holds decides how it is read, so that a wrong name trains on nothing in silence; what cannot be read with
certainty is refused, with the place.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

UNPACK: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
    rb"\xfd7zXZ\0": lzma.open,
}
REFUSED = {
    rb"\x28\xb5\x2f\xfd": "is compressed with Zstandard: unpack it with `zstd -d`, or use gzip, bzip2 or xz",
    rb"\x04\x22\x4d\x18": "is compressed with LZ4: unpack it with `lz4 -d`, or use gzip, bzip2 or xz",
    rb"PK\x03\x04": "is a zip archive: unpack it with `unzip`, and name the files in it",
    rb"7z\xbc\xaf|Rar!\x1a": "is an archive: unpack it, and name the files in it",
    rb"(?s).{257}ustar": "is a tar archive: unpack it with `tar -xf`, and name the files in it",
    rb"%PDF-": "is a PDF: extract its text first",
    rb"ARROW1\0|\xff\xff\xff\xff": "is an Arrow file: write it as JSON lines or Parquet",
    rb"\xff\xfe|\xfe\xff": "is UTF-16 or UTF-32: convert it with `iconv -f UTF-16 -t UTF-8`",
}
JSON_NAMES, TABLE_NAMES, PACKED_NAMES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv"), (".gz", ".bz2", ".xz")
KINDS = {str: "text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
KINDS |= dict.fromkeys((int, float), "a number")
MARK = "\ufeff"  # a byte order mark, which no text has
SURROGATE = re.compile("[\ud800-\udfff]")
SPACE = re.compile(r"[ \t\r\n\ufeff]*")
DECODER = json.JSONDecoder(parse_int=float)  # so that no number is too long

Row = tuple[str, Any]  # where it is, and what it is


class DataError(Exception):
    """Data that cannot be used; the message says what to do."""


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns match, each pattern's in alphabetical order; a file of the very name comes first.

    Raises:
        DataError: naming all patterns that match no file.
    """
    found, problems, missing = [], [], []
    for pattern in map(os.path.expanduser, patterns):
        if os.path.isfile(pattern):
            found.append(Path(pattern))
        elif os.path.isdir(pattern):
            problems.append(f"{pattern} is a folder; name the files in it, for example '{Path(pattern) / '*.txt'}'")
        elif os.path.exists(pattern):
            problems.append(f"{pattern} is not a file on a disk, which can be read twice")
        elif files := sorted(filter(os.path.isfile, _matching(pattern))):
            found += map(Path, files)
        else:
            missing.append(pattern)
    if missing:
        problems.append(f"no file matches {', '.join(missing)} (looked in {Path.cwd()})")
    if problems:
        raise DataError("\n".join(problems))
    return found


def _matching(pattern: str) -> list[str]:
    """What a pattern matches; folders at its beginning that exist are what they are called, brackets included."""
    parts = Path(pattern).parts
    for count in range(len(parts) - 1, 0, -1):
        if (folder := Path(*parts[:count])).is_dir():
            return glob.glob(os.path.join(glob.escape(str(folder)), *parts[count:]), recursive=True)
    return glob.glob(pattern, recursive=True)


def kinds_of(files: Iterable[Path]) -> set[str]:
    """What files hold: "text", "json" or "parquet"; empty ones hold nothing.

    Raises:
        DataError: naming all files that are something else, or text beside something else.
    """
    kinds: dict[str, str] = {}
    problems = []
    for file in files:
        try:
            if kind := _kind(file):
                kinds.setdefault(kind, str(file))
        except DataError as error:
            problems.append(str(error))
    if "text" in kinds and len(kinds) > 1:
        problems.append(f"plain text and rows cannot be mixed in one list: {' and '.join(kinds.values())}")
    if problems:
        raise DataError("\n".join(problems))
    return set(kinds)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    while name.endswith(PACKED_NAMES):
        name = name.rpartition(".")[0]
    with _opened(path) as stream:
        first = next((line for line in stream if not line.removeprefix(MARK.encode()).isspace()), b"")
    if first.startswith(b"PAR1"):
        return "parquet"
    if not first:
        return None
    if name.endswith(TABLE_NAMES):
        raise DataError(
            f"{path} is a table: write it as JSON lines or Parquet with the text in a field of its own; to read it as "
            "plain text, commas and all, give it another name, such as .txt"
        )
    return "json" if name.endswith(JSON_NAMES) or _is_object(first.decode("utf-8-sig", "replace")) else "text"


def _is_object(line: str) -> bool:
    try:
        return isinstance(DECODER.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def read_documents(path: Path, column: str, ends: str | None = None) -> Iterator[str | None]:
    """The documents of a file, in its order; None for a row that has no text.

    Args:
        column: the field of a row that holds the text; nothing else of a row is looked at.
        ends: where a document of plain text ends: at an empty line ("paragraph", the default), at every line ("line"),
            or at the end of the file ("document").

    Raises:
        DataError: saying what cannot be read, and where.
    """
    kind = _kind(path)
    if kind == "parquet":
        yield from _texts(_parquet_rows(path, column), path, column)
    elif kind is not None:
        with _opened(path) as stream:
            lines = _lines(stream, path)
            if kind == "json":
                yield from _texts(_json_rows(lines, path), path, column)
            else:
                yield from _split((line for _, line in lines), ends or "paragraph")


def _split(lines: Iterator[str], ends: str) -> Iterator[str]:
    """Lines as documents; those of blanks alone are empty ones."""
    if ends == "document":
        yield "".join(lines)
        return
    document: list[str] = []
    for line in lines:
        if not line.isspace():
            document.append(line)
        if document and (line.isspace() or ends == "line"):
            yield "".join(document).removesuffix("\n")
            document = []
    if document:
        yield "".join(document).removesuffix("\n")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked as often as it was packed.

    Raises:
        DataError: for what is no text, and what cannot be read to its end; inside the block, too.
    """
    try:
        with path.open("rb") as stream:
            while True:
                head = _peek(stream)
                unpack = next((unpack for magic, unpack in UNPACK.items() if re.match(magic, head)), None)
                if unpack is None:
                    break
                stream = unpack(stream)  # type: ignore[assignment]
            if why := next((why for magic, why in REFUSED.items() if re.match(magic, head)), None):
                raise DataError(f"{path} {why}")
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error


def _peek(stream: BinaryIO) -> bytes:
    head = stream.read(262)
    stream.seek(0)
    return head


def _lines(stream: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number from 1, ended by "\\n" on any system.

    Raises:
        DataError: at the first byte that is not UTF-8.
    """
    place, number = 0, 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode()
            at = text.find("\0")
            wrong = None if at < 0 else len(text[:at].encode())
        except UnicodeDecodeError as error:
            wrong = error.start
        if wrong is not None:
            raise DataError(
                f"{path}, line {number}: byte {place + wrong} is {line[wrong]:#04x}, so this is not text in UTF-8; "
                "convert it, for example with `iconv -f WINDOWS-1252 -t UTF-8`"
            )
        place += len(line)
        text = text.removeprefix(MARK)
        if "\r" in text:
            for part in io.StringIO(text, newline=None):
                yield number, part
        elif text:
            yield number, text


def _json_rows(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Row]:
    """The values of JSON lines; or else those of JSON as a whole, where the items of a list are what counts."""
    first = next(((number, line) for number, line in lines if not line.isspace()), None)
    if first is None:
        return
    if not _is_object(first[1]):
        yield from _items(first[1] + "".join(line for _, line in lines), first[0], path)
        return
    for number, line in chain([first], lines):
        if not line.isspace():
            with _as_json(path, lambda _, number=number: number):
                value = DECODER.decode(line)
            yield f"{path}, line {number}", value


def _items(text: str, first_line: int, path: Path) -> Iterator[Row]:
    """The values in JSON, one after the other, and of a list its items."""
    line, counted = first_line, 0

    def line_of(place: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, place), place
        return line

    def item() -> Row:
        nonlocal at
        start = at
        with _as_json(path, line_of):
            value, at = DECODER.raw_decode(text, at)
        return f"{path}, line {line_of(start)}", value

    def skip(count: int = 0) -> str:
        """Goes on by as many characters, and past spaces; the character there."""
        nonlocal at
        at = SPACE.match(text, at + count).end()
        return text[at : at + 1]

    at = 0
    while next_one := skip():
        if next_one != "[":
            yield item()
            continue
        next_one = skip(1)
        while next_one != "]":
            yield item()
            next_one = skip(1) if skip() == "," else skip()
        skip(1)


@contextmanager
def _as_json(path: Path, line_of: Callable[[int], int]) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line_of(error.pos)}: is not JSON: {error.msg}") from error
    except RecursionError:
        raise DataError(f"{path} is nested too deep to be read") from None


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                yield f"{path}, row 1", dict.fromkeys(names)
                return
            batches = file.iter_batches(batch_size=1024, columns=[column])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, 1):
                yield f"{path}, row {number}", {column: value}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _texts(rows: Iterable[Row], path: Path, column: str) -> Iterator[str | None]:
    """The text of each row.

    Raises:
        DataError: at the first that is neither text nor null, and if no row has the field.
    """
    found, others = False, {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{where}: is {_name(row)}, not an object with the text in the field {column!r}")
        found = found or column in row
        if not found:
            others |= dict.fromkeys(row)
        yield _text(row.get(column), where, column)
    if not found and others:
        raise DataError(f"{path} has no field {column!r}; it has {list(others)[:20]}. Set data.column")


def _text(value: object, where: str, column: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: the field {column!r} is {_name(value)}, not text")
    if value and SURROGATE.search(value):
        raise DataError(f"{where}: the field {column!r} holds half a character, which no encoding has")
    return value


def _name(value: object) -> str:
    return KINDS.get(type(value), type(value).__name__)
