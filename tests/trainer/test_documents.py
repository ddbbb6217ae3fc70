"""Files as people have them: what they hold decides how they are read; what is doubtful is refused with its place."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from trainer.documents import DataError, find_files, kinds_of, read_documents

ROWS = [{"text": "one"}, {"text": "two\nlines"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = ["one", "two\nlines"]


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(folder: Path, name: str, content: bytes | str, column: str = "text", ends: str | None = None) -> list:
    return list(read_documents(written(folder, name, content), column, ends))


def as_parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def in_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def in_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", content)
    return file.getvalue()


def said(value: object) -> str:
    """A parameter in a test's name, which must not hold the time of day, as an archive does."""
    return "bytes" if isinstance(value, bytes) else repr(value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress], ids=["as is", "gz", "bz2", "xz"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.rstrip(b"\n"),
        LINES.replace(b"\n", b"\r\n"),
        b"\n \n" + LINES.replace(b"\n", b"\n\n"),
        b"\xef\xbb\xbf" + LINES,
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        b"\n" + json.dumps(ROWS, indent=2).encode() + b"\n",
        b"".join(json.dumps(row, indent=1).encode() for row in ROWS),
        json.dumps(ROWS).replace("}, {", "},\n{").encode(),
    ],
)
def test_rows_are_read_whatever_form_of_json_they_are_in(pack, content, tmp_path):
    for name in ("a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "A.JSON.bz2", "a.json.xz"):
        assert read(tmp_path, name, pack(content)) == TEXTS, name


@pytest.mark.parametrize("name", ["a", "a.txt", "part-00000", "a.gz", "a.dat"])
@pytest.mark.parametrize("content", [LINES, gzip.compress(LINES), gzip.compress(gzip.compress(LINES))], ids=said)
def test_json_lines_are_known_without_their_name(name, content, tmp_path):
    assert read(tmp_path, name, content) == TEXTS


@pytest.mark.parametrize("text", ["[Illustration]\n\none", "{one}\n\n{\n", '"one"\n\n12', "{'text': 'one'}\n\nb", "7"])
def test_text_that_looks_a_little_like_json_is_text(text, tmp_path):
    assert read(tmp_path, "a.txt", text) == [part.removesuffix("\n") for part in text.split("\n\n")]


def test_parquet_is_read_whatever_its_name(tmp_path):
    rows = [{"id": 1, "text": "one"}, {"id": None, "text": None}, {"id": 3, "text": "two\nlines"}]
    for name in ("a.parquet", "a", "a.txt"):
        assert read(tmp_path, name, as_parquet(rows)) == ["one", None, "two\nlines"]
    large = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode()})
    parquet.write_table(large, tmp_path / "large")
    assert list(read_documents(tmp_path / "large", "text")) == TEXTS


@pytest.mark.parametrize(
    ("content", "ends", "documents"),
    [
        ("one a\n \ntwo a\n\t\nthree\n", "paragraph", ["one a", "two a", "three"]),
        ("one\n\n\n\ntwo", "paragraph", ["one", "two"]),
        ("\n\none\r\nb\r\n\r\ntwo\r\n", "paragraph", ["one\nb", "two"]),
        ("one\rb\r\rtwo", "paragraph", ["one\nb", "two"]),
        ("one\n\u00a0\ntwo\n\u3000\t\n", "paragraph", ["one", "two"]),
        ("  one\n   b\n", "paragraph", ["  one\n   b"]),
        ("one\u2028b\x0bc\x85d\n\ntwo", "paragraph", ["one\u2028b\x0bc\x85d", "two"]),
        ("one\n \ntwo\n\t\n\nthree", "line", ["one", "two", "three"]),
        ("one\n \n\n two\n", "document", ["one\n \n\n two\n"]),
        ("\ufeffone\n\n\ufefftwo\n", "paragraph", ["one", "two"]),
        ("\ufeff\none\n", "line", ["one"]),
        ("\ufeffone\n", "document", ["one\n"]),
        ("\n \n\t", "paragraph", []),
        ("", "paragraph", []),
        ("\ufeff", "paragraph", []),
    ],
)
def test_where_documents_of_text_end(content, ends, documents, tmp_path):
    assert read(tmp_path, "a.txt", content, ends=ends) == documents
    assert read(tmp_path, "a.txt.gz", gzip.compress(content.encode()), ends=ends) == documents


WORDS = st.text(st.characters(exclude_characters="\r\n\ufeff\0", exclude_categories=["Cs"]), min_size=1).filter(
    str.strip
)


@given(st.lists(st.lists(WORDS, min_size=1), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_any_text_comes_back(tmp_path_factory, documents, end):
    text = (end * 2).join(end.join(lines) for lines in documents)
    expected = ["\n".join(lines) for lines in documents]
    assert read(tmp_path_factory.mktemp("text"), "a.txt", f" {end}{text}") == expected


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.sampled_from([None, 1]))
def test_any_text_in_json_comes_back(tmp_path_factory, texts, indent):
    folder, rows = tmp_path_factory.mktemp("json"), [{"text": text} for text in texts]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert read(folder, "a.jsonl", lines) == texts
    assert read(folder, "a.json", json.dumps(rows, indent=indent)) == texts


OTHERS = '{"text": "one", "x": 1}\n{"x": ["y"], "text": "two"}\n{"text": "three"}\n{"text": "four", "x": 1%s}\n'


def test_only_the_field_that_is_used_is_looked_at(tmp_path):
    assert read(tmp_path, "a.jsonl", OTHERS % ("0" * 5000)) == ["one", "two", "three", "four"]
    assert read(tmp_path, "a.json", '[{"text": "one", "x": {"text": 1}}, {"text": "two", "x": null}]') == ["one", "two"]
    assert read(tmp_path, "b", as_parquet([{"x": [1, 2], "text": "one", "y": {"text": 1}}])) == ["one"]


def test_rows_without_text_are_none(tmp_path):
    content = '{"text": "one"}\n{"text": null}\n{"other": 1}\n{"text": "", "other": 2}\n'
    assert read(tmp_path, "a.jsonl", content) == ["one", None, None, ""]


ONE = '{"text": "one"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": ["one", "two"]}\n' * 2, "line 1: the field 'text' is a list, not text"),
        (ONE + '\n{"text": 5}\n', "line 3: the field 'text' is a number, not text"),
        (ONE + '{"text": 0.5}\n', "line 2: the field 'text' is a number, not text"),
        (ONE + '{"text": NaN}\n', "line 2: the field 'text' is a number, not text"),
        (ONE + '{"text": true}\n', "line 2: the field 'text' is true or false, not text"),
        (ONE + '{"text": {"text": "two"}}\n', "line 2: the field 'text' is an object, not text"),
        (ONE + '{"text": "\\ud83d"}\n', "line 2: the field 'text' holds half a character"),
        (ONE + '["two"]\n', "line 2: is a list, not an object"),
        (ONE + '"two"\n', "line 2: is text, not an object"),
        (ONE + "two\n", "line 2: is not JSON"),
        (ONE + '{"text": "tw', "line 2: is not JSON"),
        (
            '{"messages": [{"role": "user", "content": "one"}]}\n',
            "no field 'text'; it has ['messages']. Set data.column",
        ),
        ('[\n {"text": "one"},\n {"text":\n 5}\n]', "line 3: the field 'text' is a number, not text"),
        ('[{"text": "one"},\n ["two"]]', "line 2: is a list, not an object"),
        ('[\n{"text": "one"},\n{"text": "two"}', "line 3: is not JSON"),
        ('["one", "two"]', "line 1: is text, not an object"),
        ('{"text":\n["one", "two"]}', "line 1: the field 'text' is a list, not text"),
        ('{"data":\n[{"text": "one"}]}', "no field 'text'; it has ['data']"),
        ('{"text": {"0": "one"}}', "line 1: the field 'text' is an object, not text"),
        ("12\n", "line 1: is a number, not an object"),
        ("plain\n", "line 1: is not JSON"),
        ("[" * 100_000, "is nested too deep to be read"),
        (ONE + '{"text": ' + "[" * 100_000, "is nested too deep to be read"),
        (ONE + '{"text": "\0"}', "line 2: byte 26 is 0x00"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(content, message, tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, "a.jsonl", content)
    assert str(tmp_path / "a.jsonl") in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": ["one"]}], "row 1: the field 'text' is a list, not text"),
        ([{"text": 1}], "row 1: the field 'text' is a number, not text"),
        ([{"text": b"one"}], "row 1: the field 'text' is bytes, not text"),
        ([{"body": "one"}], "no field 'text'; it has ['body']"),
    ],
)
def test_what_is_no_text_in_parquet_is_named(rows, message, tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet") as caught:
        read(tmp_path, "a.parquet", as_parquet(rows))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\ncaf\u00e9".encode("latin-1"), "line 2: byte 7 is 0xe9, so this is not text in UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1: byte 13 is 0xe9"),
        ("a.txt", "one".encode("utf-16"), "is UTF-16 or UTF-32"),
        ("a.txt", "one".encode("utf-16-le"), "byte 1 is 0x00"),
        ("a.jsonl", ONE.encode("utf-32"), "is UTF-16 or UTF-32"),
        ("a.txt.gz", gzip.compress("one\n\ncaf\u00e9".encode("latin-1")), "line 3: byte 8 is 0xe9"),
        ("a.txt", b"one\xed\xa0\x80", "byte 3 is 0xed"),
        ("a.txt", gzip.compress(b"one" * 999)[:-20], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-4], "cannot be read"),
        ("a.txt", bz2.compress(b"one")[:-5], "cannot be read"),
        ("a.txt", lzma.compress(b"one")[:-5], "cannot be read"),
        ("a.txt", gzip.compress(b"one")[:-8] + b"\0" * 8, "cannot be read"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with Zstandard: unpack it with `zstd -d`"),
        ("a.txt", b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with Zstandard"),
        ("a.zip", in_zip(b"one"), "is a zip archive"),
        ("a.tar", in_tar(b"one"), "is a tar archive"),
        ("a.tar.gz", gzip.compress(in_tar(b"one")), "is a tar archive"),
        ("a.csv", "text\none\n", "is a table"),
        ("a.tsv.gz", gzip.compress(b"text\tx\none\t1\n"), "is a table"),
        ("a.pdf", b"%PDF-1.7\n", "is a PDF"),
        ("a.arrow", b"ARROW1\0\0", "is an Arrow file"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "byte 1 is 0x00"),
    ],
    ids=said,
)
def test_files_that_hold_something_else_are_refused_with_a_reason(name, content, message, tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, name, content)
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name", ["book[final].txt", "x::y.txt", "dir [v2]/a.txt", "a*b?.txt", "https:/x.txt", "zip::a.txt", "!a.txt", "#1"]
)
def test_a_file_that_exists_is_that_file(name, tmp_path, monkeypatch):
    written(tmp_path / "here [1]", name, "one")
    monkeypatch.chdir(tmp_path / "here [1]")
    assert find_files([name]) == [Path(name)]
    assert find_files([str(tmp_path / "here [1]" / name)]) == [tmp_path / "here [1]" / name]
    assert list(read_documents(Path(name), "text")) == ["one"]


def test_patterns_match_in_folders_with_brackets(tmp_path):
    for name in ("dir [v2]/a.txt", "dir [v2]/sub/b.txt", "dir v/c.txt"):
        written(tmp_path, name, "one")
    assert find_files([str(tmp_path / "dir [v2]/*.txt")]) == [tmp_path / "dir [v2]/a.txt"]
    assert find_files([str(tmp_path / "dir [v2]/**/*.txt")]) == [
        tmp_path / "dir [v2]" / x for x in ("a.txt", "sub/b.txt")
    ]
    assert find_files([str(tmp_path / "dir [uv]/*.txt")]) == [tmp_path / "dir v/c.txt"]


def test_a_home_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = written(tmp_path, "a.txt", "one")
    assert find_files(["~/a.txt"]) == find_files(["~/*.txt"]) == [file]


def test_all_that_is_no_file_is_named_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path / "folder"), str(tmp_path / "none.txt"), str(tmp_path / "fol*"), "/dev/null"])
    for part in (
        "folder is a folder",
        "folder/*.txt",
        f"{tmp_path}/none.txt, {tmp_path}/fol*",
        "/dev/null is not a file",
    ):
        assert part in str(caught.value)


def test_kinds_are_of_the_content_and_plain_text_is_not_mixed_with_rows(tmp_path):
    text, lines = written(tmp_path, "a.txt", "one"), written(tmp_path, "b.txt", LINES)
    table, empty = written(tmp_path, "c.txt", as_parquet(ROWS)), written(tmp_path, "d.txt", " \n\n")
    assert kinds_of([text, empty]) == {"text"}
    assert kinds_of([lines, table, empty]) == {"json", "parquet"}
    assert kinds_of([empty]) == set()
    with pytest.raises(DataError, match=r"plain text and rows cannot be mixed in one list: .*a.txt and .*b.txt"):
        kinds_of([text, lines])
    with pytest.raises(DataError, match=r"(?s)e.zip.*f.csv"):
        kinds_of([written(tmp_path, "e.zip", in_zip(b"")), text, written(tmp_path, "f.csv", "a,b\n")])
