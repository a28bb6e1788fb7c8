"""Chat records as text: what the tokenizer's own template makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from care_mla.errors import CalibrationError

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""ShareGPT's names of roles."""


def is_chat(value: Any) -> bool:
    """A list of messages, as {role, content} or as ShareGPT's {from, value}."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and bool({"role", "from"} & message.keys()) for message in value)
    )


def chat_text(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """What the tokenizer's chat template writes for a conversation, special tokens included.

    Args:
        where: the record, for messages.

    Raises:
        CalibrationError: no template, a message that is none, content that is not text, or a template that refuses it.
    """
    if not messages:
        return ""
    chat = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    if tokenizer is None or tokenizer.chat_template is None:
        raise CalibrationError(
            f"{where} is a chat, and the model's tokenizer has no chat template to write it with; use records with a text field, or the tokenizer of an instruct model"
        )
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception as error:  # a template is a program of the checkpoint, and raises what it likes
        raise CalibrationError(
            f"{where}: the chat template of the tokenizer cannot write this conversation: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an exception says, shortened to one line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _message(message: Any, where: str) -> dict[str, Any]:
    """{role, content} with content as text, what else the message has with it.

    Raises:
        CalibrationError
    """
    if not isinstance(message, dict):
        raise CalibrationError(f"{where} is {kind_of(message)}, not an object with role and content")
    names = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    role = message.get(names[0])
    if not isinstance(role, str):
        raise CalibrationError(f"{where}: {names[0]!r} is {kind_of(role)}, not text")
    rest = {key: value for key, value in message.items() if key not in names}
    return {**rest, "role": SPEAKERS.get(role, role), "content": _content(message.get(names[1]), where, names[1])}


def _content(content: Any, where: str, name: str) -> str:
    """Text of a message; of its parts where it is a list of them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise CalibrationError(f"{where}: {name!r} is {kind_of(content)}, not text")
    return "".join(_part(part, f"{where}: {name!r}") for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise CalibrationError(f"{where} holds {kind_of(part)} among its parts, not text")
    text = part.get("text")
    if part.get("type", "text") != "text" or not isinstance(text, str):
        raise CalibrationError(f"{where} holds a part of type {part.get('type')!r}; only text can be read")
    return text


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
