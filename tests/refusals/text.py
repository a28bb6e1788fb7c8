"""Text that cannot be calibrated on, evaluated on or healed with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer

from refusals import CALIBRATE, CONVERT, Place, Refusal

KIND = "Text"
EVALUATE = ("eval", "SOURCE", "--text", "TEXT", "--windows", "2", "--seqlen", "32")


def _of(name: str, *words: str) -> tuple[str, ...]:
    """Calibration on a file or SPEC other than TEXT."""
    return tuple(name if word == "TEXT" else word for word in CALIBRATE) + words


def _writes(name: str, content: str | bytes) -> Callable[[Place], object]:
    """Puts a file into WORK."""
    data = content.encode() if isinstance(content, str) else content
    return lambda place: (place.directory / name).write_bytes(data)


def _lines(name: str, *records: Any) -> Callable[[Place], object]:
    """Puts a .jsonl file into WORK."""
    return _writes(name, "".join(json.dumps(record) + "\n" for record in records))


def _tokenizer(change: Callable[[Any], object]) -> Callable[[Place], object]:
    """Changes the tokenizer of SOURCE."""

    def prepare(place: Place) -> None:
        tokenizer = AutoTokenizer.from_pretrained(place.source)
        change(tokenizer)
        tokenizer.save_pretrained(place.source)

    return prepare


def _with_long_word(place: Place) -> None:
    """A tokenizer of 401 tokens, and a text with one that the model does not embed."""
    _tokenizer(lambda tokenizer: tokenizer.add_tokens([f"word{i:03}" for i in range(142)]))(place)
    place.text.write_text("line of word141 " * 200)


def _without_tokenizer(place: Place) -> None:
    for path in place.source.glob("tokenizer*"):
        path.unlink()


def _template(text: str) -> Callable[[Place], object]:
    def prepare(place: Place) -> None:
        _lines("chat.jsonl", {"messages": [{"role": "system", "content": "Be brief."}]})(place)
        _tokenizer(lambda tokenizer: setattr(tokenizer, "chat_template", text))(place)

    return prepare


def _chat(*messages: Any) -> Callable[[Place], object]:
    """One conversation, and a template that would write it."""

    def prepare(place: Place) -> None:
        _template("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")(place)
        _lines("chat.jsonl", {"messages": list(messages)})(place)

    return prepare


def _unreadable(place: Place) -> None:
    """A file that opens and cannot be read, whoever tries."""
    os.symlink("/proc/self/mem", place.directory / "memory.txt")


def _loop(place: Place) -> None:
    os.symlink(place.directory / "loop.txt", place.directory / "loop.txt")


SURROGATE = '{"text": "half \\ud83d of it"}\n'
CASES = [
    Refusal(KIND, "no such file", _of("WORK/absent.txt"), "neither a file nor one of the named corpora"),
    Refusal(KIND, "a directory", _of("SOURCE"), "is a directory; give a file"),
    Refusal(
        KIND, "a pipe", _of("WORK/pipe.txt"), "is a pipe or a device", lambda p: os.mkfifo(p.directory / "pipe.txt")
    ),
    Refusal(KIND, "a link to itself", _of("WORK/loop.txt"), "cannot be read: ", _loop),
    Refusal(KIND, "a file that cannot be read", _of("WORK/memory.txt"), "cannot be read: ", _unreadable),
    Refusal(KIND, "a name that is too long", _of("WORK/" + "n" * 300 + ".txt"), "cannot be read: File name too long"),
    Refusal(KIND, "another kind of file", _of("WORK/x.csv"), "text files are .txt", _writes("x.csv", "a,b")),
    Refusal(KIND, "a compressed file", _of("WORK/x.txt.gz"), "text files are .txt", _writes("x.txt.gz", b"\x1f\x8b")),
    Refusal(KIND, "an empty file", _of("WORK/empty.txt"), "holds no text", _writes("empty.txt", "")),
    Refusal(KIND, "white space alone", _of("WORK/blank.txt"), "holds no text", _writes("blank.txt", "\n \n" * 9)),
    Refusal(KIND, "a text of five letters", _of("WORK/short.txt"), "has 5 tokens", _writes("short.txt", "short")),
    Refusal(
        KIND,
        "UTF-16",
        _of("WORK/wide.txt"),
        "begins as UTF-16 does; save it as UTF-8",
        _writes("wide.txt", "wide text".encode("utf-16")),
    ),
    Refusal(
        KIND,
        "Latin-1",
        _of("WORK/latin.txt"),
        "not UTF-8 text: byte 0xe9 at position 3; save it as UTF-8",
        _writes("latin.txt", "café au lait".encode("latin-1")),
    ),
    Refusal(KIND, "zero bytes", _of("WORK/zero.txt"), "holds zero bytes", _writes("zero.txt", b"a\0b\0c\0")),
    Refusal(
        KIND,
        "a broken line of JSONL",
        _of("WORK/bad.jsonl"),
        "not valid JSONL (one value a line), line 3: Unterminated string",
        _writes("bad.jsonl", '{"text": "one"}\n\n{"text": "tw\n'),
    ),
    Refusal(
        KIND,
        "Latin-1 in JSONL",
        _of("WORK/latin.jsonl"),
        "byte 0xe9 at line 2",
        _writes("latin.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n'),
    ),
    Refusal(
        KIND,
        "a list of JSON that is cut short",
        _of("WORK/cut.json"),
        "not valid JSON, line 2",
        _writes("cut.json", '[{"text": "one"},\n {"text": "tw'),
    ),
    Refusal(
        KIND,
        "JSON nested a hundred thousand deep",
        _of("WORK/deep.jsonl"),
        "not valid JSONL",
        _writes("deep.jsonl", "[" * 100_000 + "\n"),
    ),
    Refusal(
        KIND,
        "a number of five thousand digits",
        _of("WORK/digits.json"),
        "not valid JSON, line 1",
        _writes("digits.json", "1" * 5000),
    ),
    Refusal(
        KIND,
        "half a character in JSON",
        _of("WORK/half.jsonl"),
        "line 1 holds \\ud83d, half of a character",
        _writes("half.jsonl", SURROGATE),
    ),
    Refusal(KIND, "a record that is a list", _of("WORK/r.jsonl"), "line 1 is a list", _lines("r.jsonl", ["a", "b"])),
    Refusal(KIND, "a record that is a number", _of("WORK/r.json"), "record 1 is a number", _writes("r.json", "[7]")),
    Refusal(
        KIND,
        "records without a known field",
        _of("WORK/r.jsonl"),
        "it has question, answer: choose with --field",
        _lines("r.jsonl", {"question": "?", "answer": "!"}),
    ),
    Refusal(
        KIND,
        "a --field that is not there",
        _of("WORK/r.jsonl", "--field", "body"),
        "line 2 has no field 'body'; it has text",
        _lines("r.jsonl", {"body": "one"}, {"text": "two"}),
    ),
    Refusal(
        KIND,
        "a text that is a number",
        _of("WORK/r.jsonl"),
        "line 1: field 'text' is a number, not text",
        _lines("r.jsonl", {"text": 42}),
    ),
    Refusal(
        KIND,
        "a --field that is a list",
        _of("WORK/r.jsonl", "--field", "tags"),
        "line 1: field 'tags' is a list, not text",
        _lines("r.jsonl", {"tags": ["a", "b"]}),
    ),
    Refusal(
        KIND,
        "an answer of Alpaca that is an object",
        _of("WORK/r.json"),
        "record 1: field 'output' is an object, not text",
        _writes("r.json", '[{"instruction": "say", "input": null, "output": {"a": 1}}]'),
    ),
    Refusal(
        KIND,
        "texts that are all null",
        _of("WORK/r.jsonl"),
        "holds no text",
        _lines("r.jsonl", {"text": None}, {"text": None}),
    ),
    Refusal(
        KIND,
        "chats for a model without a chat template",
        _of("WORK/chat.jsonl"),
        "line 1 is a chat, and the model's tokenizer has no chat template",
        _lines("chat.jsonl", {"messages": [{"role": "user", "content": "Hi"}]}),
    ),
    Refusal(
        KIND,
        "a chat that the template refuses",
        _of("WORK/chat.jsonl"),
        "cannot write this conversation: no system role",
        _template("{{ raise_exception('no system role') }}"),
    ),
    Refusal(
        KIND,
        "an image in a chat",
        _of("WORK/chat.jsonl"),
        "holds a part of type 'image_url'; only text can be read",
        _chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
    ),
    Refusal(
        KIND,
        "a message that is a number",
        _of("WORK/chat.jsonl"),
        "message 2: 'content' is a number, not text",
        _chat({"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": 42}),
    ),
    Refusal(
        KIND,
        "a message without a role",
        _of("WORK/chat.jsonl"),
        "message 1: 'role' is null, not text",
        _chat({"content": "Hi"}),
    ),
    Refusal(
        KIND,
        "evaluation on `self`",
        tuple("self" if word == "TEXT" else word for word in EVALUATE),
        "evaluation needs a text",
    ),
    Refusal(KIND, "an evaluation text that is too short", (*EVALUATE, "--seqlen", "200000"), "lower --windows"),
    Refusal(KIND, "an empty --text", ("eval", "SOURCE", "--text", ""), "the name of the text is empty"),
    Refusal(KIND, "a seed of thirty digits", (*CALIBRATE, "--seed", "9" * 30), "--seed"),
    Refusal(KIND, "an empty --calibration", _of(""), "NAME:WEIGHT with a positive weight"),
    Refusal(KIND, "a weight of 0", _of("TEXT:0"), "NAME:WEIGHT with a positive weight"),
    Refusal(KIND, "an infinite weight", _of("TEXT:inf,copy"), "NAME:WEIGHT with a positive weight"),
    Refusal(KIND, "a weight that is no number", _of("TEXT:nan"), "NAME:WEIGHT with a positive weight"),
    Refusal(KIND, "a weight without a name", _of(":0.5"), "NAME:WEIGHT with a positive weight"),
    Refusal(KIND, "one text named twice", _of("TEXT:0.5,WORK/./text.txt:0.5"), "name it once, with the sum"),
    Refusal(
        KIND,
        "healing on one text named twice",
        (*CONVERT, "--method", "svd", "--heal-tokens", "64", "--heal-data", "TEXT,TEXT"),
        "name it once, with the sum",
    ),
    Refusal("Tokenizers", "a model without one", _of("TEXT"), "has no tokenizer (tokenizer.json", _without_tokenizer),
    Refusal(
        "Tokenizers",
        "a damaged tokenizer.json",
        _of("TEXT"),
        "has no usable tokenizer",
        lambda p: (p.source / "tokenizer.json").write_text('{"model": 1}'),
    ),
    Refusal(
        "Tokenizers",
        "more tokens than the model embeds, calibrating on a text with one of these",
        _of("TEXT"),
        "token 400 ('word141') has no embedding: the tokenizer knows 401 tokens, the model embeds 300",
        _with_long_word,
    ),
    Refusal(
        "Tokenizers", "the same, evaluating", EVALUATE, "the evaluation text: token 400 ('word141')", _with_long_word
    ),
    Refusal(
        "Tokenizers",
        "a text in which it finds no token",
        _of("WORK/none.txt"),
        "makes no token of the calibration text",
        lambda p: (_only_known(p), (p.directory / "none.txt").write_text("日本語" * 50)),
    ),
]


def _only_known(place: Place) -> None:
    """A tokenizer that drops what it does not know."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0, "a": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(place.source)
