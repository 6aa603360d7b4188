"""Files, folders and data sets of the Hub -> rows: texts, chats, prompts with completions, token ids.

What a row is follows from its fields (`SHAPES`); a row or file of a kind that is not known is refused by name.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemo_fx.cli.console import in_short
from lemo_fx.cli.shapes import SHAPES, Chat, Completion, Ids, Instruction, Text
from lemo_fx.errors import InputError

TEXT = (".txt", ".md", ".rst", ".text")
JSON = (".json", ".jsonl")
TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*JSON, *TABLES, ".parquet", *TEXT)
GIVE = f"give a file or a folder of {', '.join(SUFFIXES)}, or the name of a data set on the Hub (owner/name)"
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>.+))?")


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
    """
    path, named = Path(data), HUB_NAME.fullmatch(str(data))
    if not str(data).strip():
        raise InputError(f"DATA is empty: {GIVE}")
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
    try:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    every = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
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
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: not JSON ({error})") from error
        yield from ((where, _whole(where, row)) for n, row in enumerate(rows, 1) if (where := f"{file}, row {n}"))
        return
    lines: Iterable[tuple[int, str]]
    try:
        json.loads(content)
        lines = [(1, content)]
    except (ValueError, RecursionError):
        # Not splitlines: JSON strings may hold other line separators than this one.
        lines = enumerate(content.split("\n"), 1)
    for number, line in lines:
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}:{number}: not JSON ({error})") from error
            yield f"{file}:{number}", _whole(f"{file}:{number}", row)


def _whole(where: str, row: Any) -> Any:
    """A row that is text all through: JSON can name one half of a character, which no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: holds half a character ({error.object[error.start]!a}): write it anew as UTF-8"
        ) from error
    return row


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
    # What it logs as an error is raised as well.
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except (datasets.exceptions.DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        known = Path(what).exists()
        hint = "" if known else "; it is no file or folder here, and neither the Hub nor its cache gave it"
        raise InputError(f"{what} cannot be read: {in_short(error)}{hint}") from error


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
