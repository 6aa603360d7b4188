"""Files, folders and data sets of the Hub -> rows: texts, chats, prompts with completions, token ids.

What a row is follows from its fields (`SHAPES`); a row or file of a kind that is not known is refused by name.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemo_fx.errors import InputError

TEXT = (".txt", ".md", ".rst", ".text")
JSON = (".json", ".jsonl")
TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*JSON, *TABLES, ".parquet", *TEXT)
GIVE = f"give a file or a folder of {', '.join(SUFFIXES)}, or the name of a data set on the Hub (owner/name)"
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>.+))?")
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


@dataclass(frozen=True)
class Row:
    """One document as it was read.

    Attributes:
        where: file and line. source: what it has in common with rows of its kind: its file, or its folder for a text.
        fields: those of the row that were read.
    """

    where: str
    source: str
    fields: tuple[str, ...]
    content: Text | Completion | Chat | Instruction | Ids


def read_rows(data: str | Path, say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """The rows of a file, of all files under a folder, or of a data set on the Hub (`owner/name[:config][@split]`).

    Args:
        say: gets a line on what was read as what, and on what was left out.

    Raises:
        InputError: nothing there, or something that cannot be used; names the file and the line.
    """
    path, named = Path(data), HUB_NAME.fullmatch(str(data))
    if path.exists():
        rows = _of_folder(path, say) if path.is_dir() else [*_of_file(path)]
    elif named and path.suffix not in SUFFIXES:
        rows = _of_hub(**named.groupdict())
    else:
        raise InputError(f"{data} does not exist: {GIVE}")
    if not rows:
        raise InputError(f"{data} holds no text: {GIVE}")
    kinds = collections.Counter(" and ".join(f"`{name}`" for name in row.fields) for row in rows)
    say("read from " + str(data) + ": " + ", ".join(f"{n:,} x {kind}" for kind, n in kinds.items()))
    return rows


def _of_folder(folder: Path, say: Callable[[str], None]) -> list[Row]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _saved(folder)
    every = sorted(file for file in folder.rglob("*") if file.is_file() and not _hidden(file, folder))
    files = [file for file in every if file.suffix in SUFFIXES]
    if any(file.suffix not in TEXT for file in files):
        # A data set's own words about itself.
        files = [file for file in files if file.stem.upper() not in ("README", "LICENSE")]
    tables = [file for file in files if file.suffix not in TEXT]
    of_test = [file for file in tables if _words_of(file) & {"test", "validation", "valid", "val", "dev", "eval"}]
    if of_test and any("train" in _words_of(file) for file in tables):
        say(f"left out, not for training by their names: {', '.join(map(str, of_test))} (--eval takes one)")
        files = [file for file in files if file not in of_test]
    left = collections.Counter(file.suffix or file.name for file in every if file not in (*files, *of_test))
    if left:
        say("left out: " + ", ".join(f"{n} {suffix}" for suffix, n in left.most_common(6)))
    return [row for file in files for row in _of_file(file)]


def _words_of(file: Path) -> set[str]:
    return {*re.split(r"[^a-z]+", file.stem.lower())}


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _of_file(file: Path) -> Iterator[Row]:
    if file.suffix == ".parquet":
        import datasets

        with _in_words(str(file)):
            table = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            yield from _shaped(str(file), ((f"{file}, row {n}", row) for n, row in enumerate(table, 1)))
        return
    if file.suffix not in SUFFIXES:
        raise InputError(
            f"{file}: {file.suffix or 'a file without suffix'} is not read: {GIVE}; text of another kind as a .txt"
        )
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if file.suffix in TEXT:
        if content.strip():
            yield Row(str(file), f"texts in {file.parent}", ("text",), Text(content))
    elif file.suffix in JSON:
        yield from _shaped(str(file), _json_rows(file, content))
    else:
        yield from _shaped(str(file), _table_rows(file, content))


def _json_rows(file: Path, content: str) -> Iterator[tuple[str, Any]]:
    """A list of rows, or a row a line, whatever the file's suffix says."""
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except ValueError as error:
            raise InputError(f"{file}: not JSON ({error})") from error
        yield from ((f"{file}, row {n}", row) for n, row in enumerate(rows, 1))
        return
    lines: Iterable[tuple[int, str]]
    try:
        json.loads(content)
        lines = [(1, content)]
    except ValueError:
        # Not splitlines: JSON strings may hold other line separators than this one.
        lines = enumerate(content.split("\n"), 1)
    for number, line in lines:
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}:{number}: not JSON ({error})") from error


def _table_rows(file: Path, content: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=TABLES[file.suffix], strict=True)
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: not as many cells as the first line names: put quotes around such as hold "
                                 "the separator")  # fmt: skip
            yield where, row
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: not a table ({error})") from error


def _saved(folder: Path) -> list[Row]:
    import datasets

    with _in_words(str(folder)):
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            found = _split(found, "train", str(folder))
        return [*_shaped(str(folder), ((f"{folder}, row {n}", row) for n, row in enumerate(found, 1)))]


def _split(found: Mapping[str, Any], split: str, where: str) -> Any:
    if split not in found:
        raise InputError(f"{where} has no part {split!r}: give one of {', '.join(found)} as {where}@PART")
    return found[split]


def _of_hub(name: str, config: str | None, split: str | None) -> list[Row]:
    import datasets

    with _in_words(name):
        found = datasets.load_dataset(name, config, split=split)
        if split is None:
            found = _split(found, "train", name)
        return [*_shaped(name, ((f"{name}, row {n}", row) for n, row in enumerate(found, 1)))]


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    """What `datasets` and the Hub raise, as one line."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        known = Path(what).exists()
        hint = "" if known else "; it is no file or folder here, and neither the Hub nor its cache gave it"
        raise InputError(f"{what} cannot be read: {first}{hint}") from error


def _shaped(source: str, rows: Iterable[tuple[str, Any]]) -> Iterator[Row]:
    for where, row in rows:
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: a row must be an object with fields, and this is a {type(row).__name__}")
        present = {name: value for name, value in row.items() if value is not None}
        for fields, shape in SHAPES.items():
            if all(name in present for name in fields):
                yield Row(where, source, fields, shape(where, present))
                break
        else:
            raise InputError(f"{where}: {_unknown(present)}")


def _unknown(row: Mapping[str, Any]) -> str:
    if {"chosen", "rejected"} <= set(row):
        return "pairs of `chosen` and `rejected` are for preference training: see examples/trl_dpo.py"
    shapes = ", ".join(" + ".join(f"`{name}`" for name in fields) for fields in SHAPES)
    has = ", ".join(f"`{name}`" for name in row) or "nothing"
    return f"needs a field `text`, or others that are known ({shapes}), and has {has}: rename what it has"


def _text(where: str, row: Mapping[str, Any]) -> Text:
    return Text(_string(where, row, "text"))


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
    return Chat(messages, _tools(where, row))


def _tools(where: str, row: Mapping[str, Any]) -> Any:
    tools = row.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except ValueError as error:
            raise InputError(f"{where}: `tools` is not JSON ({error})") from error
    return tools


def _messages(where: str, row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, made of ShareGPT's `from` and `value` where they are such."""
    found = row[name]
    if isinstance(found, str):
        # A cell of a table.
        try:
            found = json.loads(found)
        except ValueError as error:
            raise InputError(f"{where}: `{name}` is not JSON ({error})") from error
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
        return Chat([*before, *_messages(where, row, "completion")], _tools(where, row), given=len(before))
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
    ("text",): _text,
}
"""Fields that a row must have -> how it is read; the first that fits."""
