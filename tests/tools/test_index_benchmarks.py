"""benchmarks/README.md is what its tool writes, and every result says how it was made and is cited."""

import json
import re

import index_benchmarks
import typer

from lemo_fx.cli.app import app


def test_the_index_is_up_to_date():
    written = (index_benchmarks.RESULTS / "README.md").read_text()
    assert written == index_benchmarks.index(), "run `python tools/index_benchmarks.py`"


def test_every_result_is_cited_and_says_how_it_was_made():
    rows = index_benchmarks.index().removeprefix(index_benchmarks.HEAD).splitlines()
    assert len(rows) > 80
    for row in rows:
        result, question, command, hardware, date, cited = (cell.strip() for cell in row[2:-1].split(" | "))
        assert cited, f"{result}: cite it on a page, or delete it"
        if "no result" not in question and (".json" in result or ".txt" in result):
            assert all((command, hardware, date)), result


def test_every_question_is_one_of_a_file():
    files = [path for paths in index_benchmarks.results().values() for path in paths]
    assert {index_benchmarks.entry(path)["path"] for path in files} == {
        one["path"] for one in index_benchmarks.questions()
    }


def test_the_options_of_our_commands_exist():
    commands = typer.main.get_command(app).commands
    seen = 0
    for path in index_benchmarks.RESULTS.rglob("*.json"):
        written = json.loads(path.read_text())
        command = (written.get("environment") or {}).get("command", "") if isinstance(written, dict) else ""
        if command.startswith("lemo-fx "):
            seen += 1
            known = {option for p in commands[command.split()[1]].params for option in (*p.opts, *p.secondary_opts)}
            assert set(re.findall(r"--[a-z][a-z-]*", command)) <= known, path
    assert seen > 8
