"""What the fields of a row mean: texts, chats, prompts with completions, instructions, token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemo_fx.errors import InputError

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "observation": "tool", "function_response": "tool",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}  # fmt: skip
"""What a speaker is called in ShareGPT's `from` -> in a chat template."""


@dataclass(frozen=True)
class Text:
    """A text that is learnt whole."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it; only that is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages for a chat template.

    Attributes:
        tools: what the template is told of functions that can be called.
        given: messages at the beginning that are a prompt: of such a chat only what follows is learnt.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Any = None
    given: int = 0


@dataclass(frozen=True)
class Instruction:
    """A task and its answer, which alone is learnt: a chat where the tokenizer has a template, else Alpaca's text."""

    chat: Chat
    plain: Completion


@dataclass(frozen=True)
class Ids:
    """Tokens, and the labels that came with them."""

    ids: Sequence[int]
    labels: Sequence[int] | None = None


def _string(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise InputError(f"{where}: `{name}` must be a string")
    return value


def _ids(where: str, row: Mapping[str, Any]) -> Ids:
    ids = _numbers(where, row, "input_ids")
    if min(ids, default=0) < 0:
        raise InputError(f"{where}: `input_ids` must be a list of token numbers")
    labels = _numbers(where, row, "labels") if "labels" in row else None
    for name in ("completion_mask", "assistant_masks", "assistant_mask"):
        if labels is None and name in row:
            mask = _numbers(where, row, name)
            if len(mask) == len(ids):
                labels = [i if learnt else -100 for i, learnt in zip(ids, mask, strict=True)]
    attended = _numbers(where, row, "attention_mask") if "attention_mask" in row else [1] * len(ids)
    for name, found in (("labels", labels), ("attention_mask", attended)):
        if found is not None and len(found) != len(ids):
            raise InputError(f"{where}: {len(found)} `{name}` for {len(ids)} `input_ids`")
    if labels is not None and any(label not in (-100, i) for i, label in zip(ids, labels, strict=True)):
        raise InputError(f"{where}: every one of `labels` must be -100 or the token itself: do not shift them")
    kept = [n for n, seen in enumerate(attended) if seen]
    return Ids([ids[n] for n in kept], None if labels is None else [labels[n] for n in kept])


def _numbers(where: str, row: Mapping[str, Any], name: str) -> list[int]:
    value = row[name]
    if not (isinstance(value, list) and all(type(i) is int for i in value)):
        raise InputError(f"{where}: `{name}` must be a list of token numbers")
    return value


def _chat(where: str, row: Mapping[str, Any]) -> Chat:
    name = "messages" if "messages" in row else "conversations"
    messages = _messages(where, row, name)
    if name == "conversations" and _string(where, row, "system"):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return Chat(messages, _cell(where, row, "tools"))


def _cell(where: str, row: Mapping[str, Any], name: str) -> Any:
    """A field that a table holds as JSON; None where it is empty."""
    value = row.get(name) or None
    if isinstance(value, str):
        try:
            return json.loads(value) or None
        except ValueError as error:
            raise InputError(f"{where}: `{name}` is not JSON ({error})") from error
    return value


def _messages(where: str, row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, made of ShareGPT's `from` and `value` where they are such."""
    found = _cell(where, row, name)
    if not (found and isinstance(found, list) and all(isinstance(m, Mapping) for m in found)):
        raise InputError(f"{where}: `{name}` must be a list of objects with `role` and `content`")
    return [_message(where, name, dict(message)) for message in found]


def _message(where: str, name: str, message: dict[str, Any]) -> dict[str, Any]:
    if "from" in message and "role" not in message:
        message = {"role": message["from"], "content": message.get("value")}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: role {role!r} in `{name}` is not known: use one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        if content is None and message.get("tool_calls"):
            content = ""
        else:
            raise InputError(f"{where}: `content` of a message in `{name}` must be text (pictures are not read)")
    # Tables fill the fields of other messages with nothing.
    return {key: v for key, v in message.items() if v is not None} | {"role": ROLES[role], "content": content}


def _completion(where: str, row: Mapping[str, Any]) -> Completion | Chat:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(where, row, "prompt")
        return Chat([*before, *_messages(where, row, "completion")], _cell(where, row, "tools"), given=len(before))
    raise InputError(f"{where}: `prompt` and `completion` must both be strings, or both lists of messages")


def _instruction(where: str, row: Mapping[str, Any]) -> Instruction:
    system, task, more, answer = (_string(where, row, name) for name in ("system", "instruction", "input", "output"))
    messages = [{"role": "system", "content": system}] if system else []
    plain = f"{system}\n\n" if system else ""
    for turn in row.get("history") or ():
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn)):
            raise InputError(f"{where}: `history` must be a list of pairs of strings")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        plain += f"### Instruction:\n{turn[0]}\n\n### Response:\n{turn[1]}\n\n"
    messages.append({"role": "user", "content": f"{task}\n\n{more}" if more else task})
    plain += f"### Instruction:\n{task}\n\n" + (f"### Input:\n{more}\n\n" if more else "") + "### Response:\n"
    chat = Chat([*messages, {"role": "assistant", "content": answer}], given=len(messages))
    return Instruction(chat, Completion(plain, answer))


SHAPES: dict[tuple[str, ...], Callable[[str, Mapping[str, Any]], Any]] = {
    ("input_ids",): _ids,
    ("messages",): _chat,
    ("conversations",): _chat,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _instruction,
    ("text",): lambda where, row: Text(_string(where, row, "text")),
}
"""Fields that a row must have -> how it is read; the first that fits."""
