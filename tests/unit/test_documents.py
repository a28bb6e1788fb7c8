"""Reading text: records, chats, line ends, encodings, and files larger than what is held."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import byte_tokenizer

from care_mla.errors import CalibrationError
from care_mla.text import documents, files, hub, load_text, make_windows, stream_documents
from care_mla.text.documents import corpus_reader, load_documents
from care_mla.text.fields import record_text

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CHATTY = byte_tokenizer()
CHATTY.chat_template = TEMPLATE
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SAID = "<user>Hi<assistant>Ho"


def _jsonl(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": HELLO}, SAID),
        ({"messages": []}, ""),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, SAID),
        ({"conversations": HELLO}, SAID),
        ({"prompt": HELLO[:1], "completion": HELLO[1:]}, SAID),
        ({"prompt": HELLO[:1], "completion": "Ho"}, SAID),
        ({"prompt": "Hi ", "completion": "Ho"}, "Hi Ho"),
        ({"text": None, "messages": HELLO}, SAID),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}]}, "<user>Hi"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "<assistant>"),
        ({"text": None}, ""),
        ({"text": ""}, ""),
        ({"instruction": "say", "input": None, "output": "hi"}, "say\nhi"),
        ({"instruction": None, "input": None, "output": None}, ""),
        ({"instruction": "say", "output": "hi"}, "say\nhi"),
        ("plain", "plain"),
    ],
)
def test_records_as_text(record: Any, text: str) -> None:
    """Chats as the template writes them; null is empty, never a word."""
    assert record_text(record, None, CHATTY, "here") == text


def test_a_field_may_hold_a_chat() -> None:
    assert record_text({"turns": HELLO, "text": "no"}, "turns", CHATTY, "here") == SAID
    assert record_text({"turns": []}, "turns", CHATTY, "here") == ""


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        ({"text": ["a"]}, None, "field 'text' is a list, not text"),
        ({"text": True}, None, "is true or false, not text"),
        ({"text": 1.5}, "text", "is a number, not text"),
        ({"a": {"b": "c"}}, "a", "field 'a' is an object, not text"),
        ({"messages": "Hi"}, None, "field 'messages' is text, not a list of messages"),
        ({"messages": ["Hi"]}, None, "message 1 is text, not an object with role and content"),
        ({"messages": [{"role": 3, "content": "x"}]}, None, "'role' is a number, not text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, None, "'content' is an object, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, None, "a part of type 'audio'"),
        ({"messages": [{"role": "user", "content": [3]}]}, None, "a number among its parts"),
        ({"prompt": 3, "completion": "x"}, None, "field 'prompt' is a number"),
        ({"instruction": "x", "input": 3, "output": "y"}, None, "field 'input' is a number"),
        ({"\ud800": "x"}, None, r"it has \\ud800: choose"),
        ({f"f{i}": "x" for i in range(99)}, None, "f19, ...: choose"),
        ({"text": "\udc00"}, None, "a lone surrogate"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, None, "a lone surrogate"),
        (None, None, "here is null, not an object"),
    ],
)
def test_what_is_no_text_is_refused_by_name(record: Any, field: str | None, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        record_text(record, field, CHATTY, "here")


def test_chats_reach_the_windows(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "chat.jsonl", *[{"messages": HELLO}] * 5)
    windows = make_windows(path, CHATTY, samples=1, seqlen=8, seed=0)
    joined = "\n\n".join([SAID] * 5)
    assert CHATTY.decode(windows.input_ids[0]) in joined
    with pytest.raises(CalibrationError, match="has no chat template"):
        make_windows(path, byte_tokenizer(), samples=1, seqlen=8, seed=0)


def test_lines_of_jsonl_end_at_newlines_alone(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour\x0cfive\x1csix"
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", "\x0b") + "\r\n\r\n" + '"b"')
    with pytest.raises(CalibrationError, match="line 1"):  # a raw control character is no JSON
        load_documents(str(path))
    text = text.translate({0x0B: None, 0x0C: None, 0x1C: None})
    path.write_bytes((json.dumps({"text": text}, ensure_ascii=False) + "\r\n\r\n" + '"b"').encode())
    assert load_documents(str(path)) == [text, "b"]


@pytest.mark.parametrize("name", ["t.txt", "t.TXT", "t.jsonl", "t.JSONL", "t.json", "t.Json"])
def test_a_byte_order_mark_is_no_text_and_suffixes_have_any_case(tmp_path: Path, name: str) -> None:
    text = "some text" if name.lower().endswith("txt") else '{"text": "some text"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_text(str(tmp_path / name)) == "some text"


def test_line_ends_of_text_are_newlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 3)  # between \r and \n, and within characters
    (tmp_path / "t.txt").write_bytes("ab\r\ncdé\r\nf€\rg\U0001f600h".encode())
    assert load_text(str(tmp_path / "t.txt")) == "ab\ncdé\nf€\ng\U0001f600h"


@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "a]\\n"}, "b" ,\n{"text": "c\\"", "n": [1, {"x": -1.5e3}]}]\n', ["a]\n", "b", 'c"']),
        ('{"text": "alone"}', ["alone"]),
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ('"a text"', ["a text"]),
    ],
)
def test_json_is_read_value_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, content: str, texts: list[str]
) -> None:
    monkeypatch.setattr(files, "PIECE", piece)
    (tmp_path / "r.json").write_text(content)
    assert load_documents(str(tmp_path / "r.json")) == texts


@pytest.mark.parametrize("piece", [1, 1 << 18])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a",\n"b"', "line 2: expecting ',' or ']'"),
        ('["a"\n"b"]', "line 2: expecting ',' or ']'"),
        ('["a",]', "line 1: Expecting value"),
        ('["a"]\n\n["b"]', "line 3: text after the end"),
        ('["a",\n{"text": tru}]', "line 2: Expecting value"),
        ("[", "expecting"),
        ('{"text": "a"', "line 1"),
        ('["a", ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_json_is_refused_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, content: str, message: str
) -> None:
    monkeypatch.setattr(files, "PIECE", piece if len(content) < 100 else 1 << 18)
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load_documents(str(tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("data", "position"), [(b"\xffab", 0), (b"abc\xe9def", 3), (b"ab\xc3", 2), (b"\xe2\x82\xacab\xe2\x82x", 5)]
)
def test_bytes_that_are_not_utf8_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, position: int
) -> None:
    for piece in (1, 4, 1 << 18):
        monkeypatch.setattr(files, "PIECE", piece)
        (tmp_path / "t.txt").write_bytes(data)
        with pytest.raises(CalibrationError, match=f"byte 0x{data[position]:02x} at position {position};"):
            load_text(str(tmp_path / "t.txt"))


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    stream = stream_documents(str(path))
    assert ["".join(next(stream)), "".join(next(stream))] == ["one", "two"]
    with pytest.raises(CalibrationError, match="line 3"):
        next(stream)


def test_a_name_that_is_a_file_and_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c4").write_text("text")
    with pytest.raises(CalibrationError, match="also a file here, whose name does not say its format; rename"):
        load_text("c4")


def test_a_directory_does_not_hide_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ptb").mkdir()
    monkeypatch.setattr(hub, "hub_dataset", lambda *words, **options: iter([("here", {"sentence": "read"})]))
    assert load_text("ptb") == "read"


def test_streamed_corpora_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def records(*words: Any, **options: Any) -> Iterable[tuple[str, Any]]:
        reads.append(options["split"])
        return iter([(f"record {i}", {"text": f"text {i}"}) for i in range(9)])

    monkeypatch.setattr(hub, "hub_dataset", records)
    monkeypatch.setattr(documents, "MAX_DOCUMENTS", 4)
    read = corpus_reader("c4")
    assert [["".join(document) for document in read()] for _ in range(2)] == [[f"text {i}" for i in range(4)]] * 2
    assert reads == ["train"]


def test_tables_are_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row; what fails on the way is one sentence."""
    path = tmp_path / "t.PARQUET"
    path.write_bytes(b"PAR1")

    def load_dataset(kind: str, data_files: str, split: str) -> Iterator[dict[str, str]]:
        assert (kind, data_files, split) == ("parquet", str(path), "train")
        yield {"text": "one"}
        raise OverflowError("page 2 is damaged\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    stream = stream_documents(str(path))
    assert "".join(next(stream)) == "one"
    with pytest.raises(CalibrationError, match=r"t\.PARQUET cannot be loaded: page 2 is damaged$"):
        next(stream)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"t\.PARQUET needs the `datasets` package"):
        load_documents(str(path))
