"""Text of one record: which of its fields holds it, and what is refused."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from care_mla.errors import CalibrationError
from care_mla.text.chat import chat_text, is_chat, kind_of


def record_text(record: Any, field: str | None, tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """Text of one record; empty where its text is null.

    Without a field, the first of these that is not null: `text`, chats in `messages` or `conversations`, `prompt` and
    `completion` (text, or messages), Alpaca's `instruction`, `input` and `output`.

    Raises:
        CalibrationError: no such field, or a field that is neither text nor a chat.
    """
    if isinstance(record, str):
        return _sound(record, where)
    if not isinstance(record, dict):
        raise CalibrationError(f"{where} is {kind_of(record)}, not an object with a text field")
    if field is not None:
        if field not in record:
            raise CalibrationError(f"{where} has no field {field!r}; it has {_names(record)}: choose with --field")
        value = record[field]
        text = chat_text(value, tokenizer, where) if is_chat(value) or value == [] else _text_of(record, field, where)
        return _sound(text, where)
    return _sound(_known_text(record, tokenizer, where), where)


def _known_text(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    known = False
    if "text" in record:
        known = True
        if record["text"] is not None:
            return _text_of(record, "text", where)
    for name in ("messages", "conversations"):
        if name in record:
            known = True
            if record[name] is not None:
                if not isinstance(record[name], list):
                    raise CalibrationError(
                        f"{where}: field {name!r} is {kind_of(record[name])}, not a list of messages; choose with --field"
                    )
                return chat_text(record[name], tokenizer, where)
    if {"prompt", "completion"} <= record.keys():
        known = True
        prompt, completion = record["prompt"], record["completion"]
        if is_chat(prompt) or is_chat(completion):
            turns = [
                value if isinstance(value, list) else [{"role": role, "content": value}]
                for role, value in (("user", prompt), ("assistant", completion))
                if value is not None
            ]
            return chat_text([*chain(*turns)], tokenizer, where)
        if prompt is not None or completion is not None:
            return _text_of(record, "prompt", where) + _text_of(record, "completion", where)
    if {"instruction", "output"} <= record.keys():
        known = True
        parts = [_text_of(record, name, where) for name in ("instruction", "input", "output") if name in record]
        return "\n".join(part for part in parts if part)
    if known:
        return ""
    raise CalibrationError(
        f"{where} has no text, messages, conversations, prompt and completion, or instruction and output; it has {_names(record)}: choose with --field"
    )


def _text_of(record: dict[str, Any], field: str, where: str) -> str:
    """A field's text; empty where it is null."""
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: field {field!r} is {kind_of(value)}, not text; choose with --field")
    return value


def _sound(text: str, where: str) -> str:
    """A text that tokenizers can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where} holds \\u{ord(text[error.start]):04x}, half of a character (a lone surrogate), which is no text; remove the record, or put the whole character there"
        ) from error
    return text


def _names(record: dict[str, Any], most: int = 20) -> str:
    """Fields of a record, in a form that can be printed."""
    names = [str(name).encode("utf-8", "backslashreplace").decode() for name in islice(record, most)]
    return ", ".join([*names, "..."] if len(record) > most else names) or "none"
