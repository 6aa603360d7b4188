"""A training run and its folder: what it was told, what it records, and what must not change where it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.trainer_utils import SchedulerType

from lemo_fx.cli import page
from lemo_fx.cli.commands import as_file
from lemo_fx.cli.data import Documents
from lemo_fx.cli.machine import check_attention, is_first
from lemo_fx.cli.options import Job, PlanOptions, Settings
from lemo_fx.cli.prepare import Say
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError
from lemo_fx.files import check_folder, write_json, write_text

SETTINGS, SUMMARY, PAGE = "settings.json", "summary.json", "report.html"

RUN_FILE = "run.yaml"

STATE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """A job, its plan and its settings.

    Attributes:
        command: as it was typed, for the record.
        cut: windows to train on are cut into so many; held-out ones stay whole.
    """

    job: Job
    options: PlanOptions
    settings: Settings
    command: str = ""
    cut: int = 1

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.job.out

    @property
    def written(self) -> list[Path]:
        """What it leaves."""
        merged = [self.out / "merged"] if self.job.merge else []
        return [self.out / "adapter", *merged, self.out / PAGE, self.out / SUMMARY, self.out / RUN_FILE]


def check_job(run: Run) -> None:
    """Raise InputError where a run must not start, before anything is read."""
    job, settings = run.job, run.settings
    check_folder(job.out)
    if is_first() and (job.out / SETTINGS).exists() and not job.resume:
        raise InputError(f"{job.out} holds a run already: add --resume to go on with it, or choose another --out")
    check_attention(settings.attention)
    schedulers = [kind.value for kind in SchedulerType]
    if settings.scheduler not in schedulers:
        raise InputError(f"--scheduler {settings.scheduler!r} is not one of {', '.join(schedulers)}")
    for name in job.reporters:
        if name not in ("wandb", "tensorboard"):
            raise InputError(f"--report-to {name!r} is not one of wandb, tensorboard")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--report-to {name} needs a package that is not installed: pip install {name}")
    if job.compare_with is not None:
        read_summary(job.compare_with)
    if job.push is not None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", job.push):
            raise InputError(f"--push {job.push!r} is no name on the Hub: give owner/name")
        if get_token() is None:
            raise InputError("--push needs to be logged in: run `hf auth login`, or set HF_TOKEN")


def recorded_of(run: Run, folder: Path, documents: Documents, plan: LemoConfig) -> dict[str, Any]:
    """What must be the same in a run that is resumed; but its steps may be more."""
    digest = hashlib.sha256()
    for document in (*documents.train, *documents.heldout):
        digest.update(document.ids.tobytes() + b"|" + document.labels.tobytes() + b"|")
    predictors = run.job.predictors
    found = {
        "model": str(folder.resolve()) if Path(run.job.model).exists() else run.job.model,
        "data": digest.hexdigest()[:16],
        "predictors": str(predictors.resolve()) if predictors else None,
        "plan": dataclasses.asdict(plan),
        "settings": dataclasses.asdict(run.settings),
    }
    return json.loads(json.dumps(found))


LONGER = {"settings.steps", "settings.epochs"}
"""What may differ in a run that is resumed."""


def check_earlier(run: Run, recorded: dict[str, Any], say: Say) -> None:
    """Raise InputError where OUT has a run that was started otherwise."""
    path = run.out / SETTINGS
    if path.exists():
        try:
            earlier = json.loads(path.read_text())
            before = earlier["settings"]["steps"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read: {error}; choose another --out") from error
        different = sorted({*_different(earlier, recorded)} - LONGER)
        if different:
            raise InputError(
                f"{run.out} holds a run with other settings ({', '.join(different[:6])}"
                f"{', ...' if len(different) > 6 else ''}): resume it with its own"
            )
        now = recorded["settings"]["steps"]
        if now < before:
            raise InputError(f"{run.out} holds a run of {before} steps: resume it with as many, or more")
        if now > before:
            say(f"{now} steps instead of {before}: from here the learning rate is that of the longer run")


def write_started(run: Run, recorded: dict[str, Any]) -> None:
    """Leave the record and the run file in OUT."""
    again = as_file(dataclasses.replace(run.job, resume=False, preview=False), run.options, run.settings)
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        write_json(run.out / SETTINGS, recorded)
        write_text(run.out / RUN_FILE, f"# lemo-fx train --config {run.out / RUN_FILE} --out ANOTHER\n{again}")
    except OSError as error:
        raise InputError(f"{run.out} cannot be written: {error}") from error


def _different(one: Any, other: Any, name: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {*one, *other}:
            yield from _different(one.get(key), other.get(key), f"{name}.{key}".removeprefix("."))
    elif one != other:
        yield name


def last_checkpoint(out: Path) -> Path | None:
    """The latest checkpoint that was written whole: the Trainer writes its state last."""
    found = []
    for path in (out / "checkpoints").glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.append((json.loads((path / STATE).read_text())["global_step"], path))
    return max(found)[1] if found else None


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run."""
    path = folder if folder.is_file() else folder / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        page.figures_of(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no summary of a finished run: give the --out folder of a lemo-fx train that has ended"
        ) from error
    return found
