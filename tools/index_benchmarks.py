"""The index of committed results, benchmarks/README.md: what each answers, how it was made, and who cites it.

    python tools/index_benchmarks.py

Questions stand in benchmarks/questions.toml; command, hardware and date are read from the files themselves.
"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks"
CITING = ("README.md", "passes/README.md", "docs/*.md")
NAMED = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*(?:\.(?:jsonl?|md|png|txt)\b|/(?=`))")
"""A file or, at its end, a folder. `-16k.json` is every file that ends so."""
DEVICE = re.compile(r"NVIDIA \w+|\d-core CPU")
HEAD = """# Committed results

Written by `tools/index_benchmarks.py` from the files and `questions.toml`; every measured figure on a page comes from
one of these. Files that differ in their ending alone are one result: its runs, their table, their picture.

| result | question | command | hardware | date | cited in |
|---|---|---|---|---|---|
"""


def questions() -> list[dict[str, str]]:
    return tomllib.loads((RESULTS / "questions.toml").read_text())["files"]


def results() -> dict[str, list[Path]]:
    """The files of each result by its path below benchmarks/, without ending."""
    found: dict[str, list[Path]] = {}
    for path in sorted(RESULTS.rglob("*")):
        if path.is_file() and path.name not in ("README.md", "questions.toml"):
            found.setdefault(str(path.relative_to(RESULTS).with_suffix("")), []).append(path)
    return found


def entry(path: Path) -> dict[str, str]:
    """What questions.toml says of a file.

    Raises:
        LookupError: nothing.
    """
    name = str(path.relative_to(RESULTS))
    for one in questions():
        if fnmatch.fnmatch(name, one["path"]):
            return one
    raise LookupError(f"benchmarks/{name}: say in benchmarks/questions.toml what it answers")


def origin(path: Path) -> dict[str, str]:
    """Command, hardware and date, as far as a file says them."""
    text = path.read_text()
    if path.suffix == ".txt":
        head = "\n".join(text.splitlines()[:8])
        read = {"command": r"^python3? .+", "hardware": DEVICE.pattern, "date": r"\d{4}-\d\d-\d\d"}
        found = {name: re.search(pattern, head, re.MULTILINE) for name, pattern in read.items()}
        return {name: match.group() for name, match in found.items() if match}
    records: list[dict[str, Any]] = [
        json.loads(line) for line in ([text] if path.suffix == ".json" else text.splitlines())
    ]
    notes = [
        {**record, **run} for record in records for run in record.get("environments") or [record.get("environment", {})]
    ]
    commands = list(dict.fromkeys(note["command"] for note in notes if "command" in note))
    more = f" (and {len(commands) - 1} more)" if len(commands) > 1 else ""
    devices = dict.fromkeys(note.get("device") or note.get("hardware") or note.get("cpu") or "" for note in notes)
    dates = sorted({note["date"][:10] for note in notes if "date" in note})
    return {
        "command": commands[0] + more if commands else "",
        "hardware": ", ".join(filter(None, devices)),
        "date": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
    }


def cites(name: str, path: Path) -> bool:
    """Whether the name of a file or a folder on a page is that of this file."""
    if name.endswith("/"):
        return f"/{path.parent.relative_to(ROOT)}/".endswith(f"/{name}")
    if name.startswith("-"):
        return path.name.endswith(name)
    return fnmatch.fnmatch(f"/{path.relative_to(ROOT)}", f"*/{name}")


def index() -> str:
    """The whole page."""
    pages = [path for pattern in CITING for path in sorted(ROOT.glob(pattern))]
    named = {str(page.relative_to(ROOT)): set(NAMED.findall(page.read_text())) for page in pages}
    rows = []
    for stem, paths in results().items():
        data = [path for path in paths if path.suffix in (".json", ".jsonl", ".txt")]
        said = entry((data or paths)[0])
        made = {**(origin(data[0]) if data else {}), **said}
        cited = [page for page, names in named.items() if any(cites(name, path) for name in names for path in paths)]
        command = made.get("command")
        cells = [
            ", ".join(f"[{stem}{path.suffix}]({path.relative_to(RESULTS)})" for path in paths),
            made["question"],
            f"`{command}`" if command else "",
            made.get("hardware", ""),
            made.get("date", ""),
            ", ".join(cited),
        ]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    (RESULTS / "README.md").write_text(index())
