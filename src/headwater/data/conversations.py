"""Read a cell that holds a conversation: the messages of OpenAI, TRL and verl, and the turns of ShareGPT and ORZ."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headwater.errors import UserError
from headwater.tasks.thinking import after_thinking
from headwater.types import Turn

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
"""Roles as files spell them, and as chat templates do."""
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_FIRST_MESSAGE = re.compile(r"\s*(?:array\(\s*)?\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")
_A_ROLE = re.compile(r"['\"](?:role|from)['\"]\s*:")
_PAIR = ("user", "assistant")
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios", "tools")
"""Columns next to a conversation that belong to its prompt; a text prompt would lose them."""
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
"""Columns next to a problem that hold its system turn."""
HISTORY_COLUMNS = ("history", "chat_history", "previous_messages")
"""Columns next to a problem that hold the turns before it, the first as in the files of LLaMA-Factory."""


@dataclass(frozen=True)
class Conversation:
    """The turns of a prompt, which end with the user's, and the assistant's answer that follows them in the file, if any."""

    turns: tuple[Turn, ...]
    reference: Any = None


def messages_of(value: Any) -> Sequence[Mapping[str, Any]] | None:
    """The messages in a cell, as they are; None if it holds no conversation.

    A list of objects with a role, the same as text in JSON or in Python's spelling (which pandas writes into CSV files), one such
    object, an object of lists (as `datasets` stores a sequence of objects), or an object whose `messages` are any of these.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _parsed(value.strip())
        messages = messages_of(value) if isinstance(value, (list, dict)) else None
        if not messages or _value(messages[0], _CONTENT_KEYS) is None:
            return None  # a text that happens to be JSON
        return messages
    if isinstance(value, dict) and "messages" in value and not _has_role(value):
        return messages_of(value["messages"])
    if _has_role(value):
        columns = {name: column for name, column in value.items() if column is not None}
        if all(isinstance(column, list) for column in columns.values()):
            if len({len(column) for column in columns.values()}) > 1:
                return None
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        value = [value]
    if isinstance(value, list) and value and all(map(_has_role, value)):
        return value
    return None


def spells_messages(text: str) -> bool:
    """Whether a text looks like a list of messages from its beginning to its end, in JSON or as Python or numpy print it."""
    return bool(_FIRST_MESSAGE.match(text) and _A_ROLE.search(text) and text.rstrip().endswith(("]", ")")))


def _parsed(text: str) -> Any:
    """The value that a text spells in JSON or as a Python literal; None if it spells none."""
    for parse in (json.loads, ast.literal_eval) if spells_messages(text) else (json.loads,):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def read_conversation(messages: Sequence[Mapping[str, Any]], column: str, where: str) -> Conversation:
    """The prompt in a list of messages. `where` names the row.

    A last turn of the assistant is the reference answer and no part of the prompt, except in a column named `prompt`, where it
    is refused: it could be either. Raises UserError for roles, contents and orders that a text prompt cannot hold.
    """
    reference = None
    if messages and ROLES.get(_role(messages[-1])) == "assistant":
        *messages, last = messages
        if column.lower().endswith("prompt"):
            raise UserError(
                f"{where}: {column!r} ends with a turn of the assistant; remove it, or name the column `messages` if that turn is "
                "the reference answer"
            )
        reference = reference_of(last, f"{where}: the last turn of {column!r}")
    turns = tuple(
        _turn(message, f"{where}: turn {number} of {column!r}")
        for number, message in enumerate(messages, 1)
        if not _is_blank_system(message)
    )
    if not turns or turns[-1][0] != "user":
        ends = f"its last turn is {turns[-1][0]}" if turns else "it has no other turn"
        raise UserError(f"{where}: the conversation in {column!r} does not end with a turn of the user ({ends})")
    return Conversation(turns, reference)


def with_columns(conversation: Conversation, row: Mapping[str, Any], where: str) -> Conversation:
    """The conversation with the system turn and the earlier turns in columns of their own.

    A conversation with a system turn keeps it, and one with earlier turns keeps these.
    """
    *earlier, question = conversation.turns
    if not any(role != "system" for role, _ in earlier):
        earlier = [*earlier, *(turn for name in HISTORY_COLUMNS for turn in _history(row.get(name), name, where))]
    system = next((row[name] for name in SYSTEM_COLUMNS if isinstance(row.get(name), str) and row[name].strip()), None)
    if system is not None and not any(role == "system" for role, _ in earlier):
        earlier = [_turn({"role": "system", "content": system}, f"{where}: the system turn"), *earlier]
    return replace(conversation, turns=(*earlier, question))


def _history(cell: Any, column: str, where: str) -> tuple[Turn, ...]:
    """Earlier turns: a list of messages, or of pairs of a question and its answer; none for any other cell."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        cell = _parsed(cell.strip())
    messages = messages_of(cell)
    if messages is None and isinstance(cell, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in cell):
        messages = [{"role": role, "content": text} for pair in cell for role, text in zip(_PAIR, pair, strict=True)]
    turns = tuple(
        _turn(message, f"{where}: turn {number} of {column!r}") for number, message in enumerate(messages or (), 1)
    )
    if turns and turns[-1][0] != "assistant":
        raise UserError(f"{where}: {column!r} does not end with a turn of the assistant")
    return turns


def refuse_media(row: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a row whose conversation comes with images, audio or tools."""
    for name in MEDIA_COLUMNS:
        if row.get(name) not in (None, [], "", {}, "[]"):
            raise UserError(
                f"{where}: {name!r} is not empty, and a text prompt cannot hold it; remove the row, or the column if the "
                "conversation is complete without it"
            )


def _value(message: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What a message holds under the first of these names; None where it holds nothing."""
    return next((message[name] for name in names if message.get(name) is not None), None)


def _has_role(message: Any) -> bool:
    return isinstance(message, dict) and _value(message, _ROLE_KEYS) is not None


def _role(message: Mapping[str, Any]) -> str:
    """The role of a message in lower case; "" if it has none, which `_turn` refuses."""
    role = _value(message, _ROLE_KEYS)
    return "" if role is None else str(role).strip().lower()


def _is_blank_system(message: Mapping[str, Any]) -> bool:
    """Whether a message is a system turn without text, which says nothing and which many templates refuse."""
    content = _value(message, _CONTENT_KEYS)
    blank = content in (None, [], {}) or (isinstance(content, str) and not content.strip())
    return blank and ROLES.get(_role(message)) == "system"


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    role = _role(message)
    if role not in ROLES:
        raise UserError(
            f"{where} has the role {role!r:.40}; a prompt can hold system, user and assistant turns, so remove such rows"
        )
    for name in _CALLS:
        if message.get(name):
            raise UserError(f"{where} holds {name}, which a text prompt cannot; remove such rows")
    value = _value(message, _CONTENT_KEYS)
    if value is None:
        raise UserError(f"{where} ({role}) has no content; give it a text, or remove the row")
    content = _text(value, where)
    if not content.strip() and ROLES[role] == "user":
        raise UserError(f"{where} is blank")
    return ROLES[role], encodable(content, where)


def encodable(text: str, where: str) -> str:
    """The text itself. Raises UserError that begins with `where` for one that is not UTF-8, such as "\\ud800", which is valid JSON."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a surrogate pair and is not UTF-8 text") from None
    return text


def _text(content: Any, where: str) -> str:
    """A turn's text; the texts of a list of parts follow one another."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} holds no text but {type(content).__name__}")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise UserError(f"{where} holds a part of type {kind!r:.40}, which a text prompt cannot; remove such rows")
    return text


def reference_of(message: Mapping[str, Any], where: str) -> Any:
    """What a turn of the assistant says after its thinking; ORZ's files have the bare answer in its `ground_truth`."""
    truth = message.get("ground_truth")
    if truth is not None:
        return truth["value"] if isinstance(truth, dict) and "value" in truth else truth
    content = _value(message, _CONTENT_KEYS)
    text = _text(content, where) if isinstance(content, list) and content else content
    return after_thinking(text) if isinstance(text, str) else text
