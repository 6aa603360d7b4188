"""Processes that end at a chosen moment, and the work that they are ended in."""

import gc
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import torch
import transformers
from tiny import VOCABULARY, anatomy, batch, tiny, with_lora
from training import Rows, arguments

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.fitting.training import Recipe

KILLED = -signal.SIGKILL


def free_ports(count: int) -> list[str]:
    """Ports on which processes of this machine may meet."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(folder, number):
    """kill -9 at the `number`-th time that this process opens, renames or removes something under a folder."""
    left = [number]

    def count(event, arguments):
        names = [str(a) for a in arguments[:2] if isinstance(a, str | Path)]
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            left[0] -= any(name.startswith(str(folder)) for name in names)
            if left[0] == 0:
                die()

    sys.addaudithook(count)


def limit_files(size, deadly=False):
    """No file may grow beyond `size` bytes, as on a full disk; or a kill comes in the middle of such a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def in_fork(function, *arguments):
    """The exit code of a function's call in a copy of this process: 1 if it raises."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_clean_process(function, *arguments):
    """Call a function where no backward has run, so that its forks may run one; it must not raise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft"]
    )
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0


SPARSE = LemoConfig(Elimination(keep=0.5), Elimination(keep=0.5), block_size=8, dense_layers=())


def train(folder, die_in=None, resume=False):
    """Six steps of the Trainer, a checkpoint after every second; the losses are written at the end.

    Args:
        die_in: step in whose backward the process kills itself.
    """
    torch.set_num_threads(1)
    model = lemo_fx.transform(with_lora(tiny("llama"), dropout=0.1), SPARSE)
    given = arguments(
        folder, gradient_checkpointing=True, lr_scheduler_type="linear", save_strategy="steps", save_steps=2
    )
    trainer = transformers.Trainer(model, given, train_dataset=Rows())
    if die_in is not None:
        parameter = next(p for p in model.parameters() if p.requires_grad)
        parameter.register_hook(lambda _: die() if trainer.state.global_step == die_in - 1 else None)
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    weights = {name: p.flatten().tolist() for name, p in model.named_parameters() if p.requires_grad}
    (Path(folder) / "done.json").write_text(json.dumps([losses, weights]))


def train_and_kill(folder):
    """The same training uninterrupted, and killed in the backward of its fourth and of its sixth step."""
    assert in_fork(train, folder / "whole") == 0
    for step in (4, 6):
        assert in_fork(train, folder / "killed", step, step == 6) == KILLED
    assert not (folder / "killed" / "done.json").exists()
    assert in_fork(train, folder / "killed", None, True) == 0


def fit(folder=None, model=None):
    """A short fit on a tiny model."""
    torch.set_num_threads(1)
    model = tiny("llama") if model is None else model
    sequences = torch.randint(3, VOCABULARY, (10, 32), generator=torch.Generator().manual_seed(3))
    recipe = Recipe(width=4, mlp_width=4, epochs=2)
    return lemo_fx.fit(model, sequences, SPARSE, recipe=recipe, folder=folder, progress=False)


def fit_and_die(folder, number):
    die_at(folder, number)
    fit(folder)


def fit_and_kill(folder):
    """Runs in one folder, each killed a little later than the last, until one gets through; and its end in detail."""
    assert in_fork(fit, folder / "whole") == 0
    number, code = 0, KILLED
    while code == KILLED and number < 200:
        number += 7
        code = in_fork(fit_and_die, folder / "killed", number)
        if (folder / "killed" / "unfinished").exists():
            last = folder / "last"
            shutil.rmtree(last, ignore_errors=True)
            shutil.copytree(folder / "killed", last)
    assert code == 0
    assert number > 20
    # From what the last killed run left: kills while the result is saved and the intermediate results are removed.
    for number in range(1, 200, 3):
        again = folder / f"again{number}"
        shutil.copytree(last, again)
        if in_fork(fit_and_die, again, number) == 0:
            break
        assert in_fork(fit, again) == 0
    assert number > 10


def fit_and_die_in(victim, calls, folder, sequences, config, recipe):
    """kill -9 instead of a further call of one of the fitting functions ("module.function") after so many."""
    torch.set_num_threads(1)
    where, _, name = victim.partition(".")
    module, left = importlib.import_module(f"lemo_fx.fitting.{where}"), [calls]
    real = getattr(module, name)

    def dying(*args, **kwargs):
        if not left[0]:
            die()
        left[0] -= 1
        return real(*args, **kwargs)

    setattr(module, name, dying)
    lemo_fx.fit(tiny("llama"), torch.tensor(sequences), config, recipe=recipe, folder=folder, progress=False)


def fit_and_be_killed_in(folder, sequences, config, recipe, victims):
    """Runs in one folder, each killed in a call of another of lemo_fx.fit's functions."""
    for victim, calls in victims.items():
        assert in_fork(fit_and_die_in, victim, calls, folder, sequences, config, recipe) == KILLED


ROOM = 7


def fit_with_room_for(folder, size):
    model = tiny("llama")
    before = anatomy(model)
    limit_files(size)
    try:
        fit(folder, model)
    except lemo_fx.StorageError as error:
        os._exit(ROOM if str(folder) in str(error) and anatomy(model) == before else 1)


def fit_on_a_full_disk(folder):
    """Fits in one folder on a disk that grows until one gets through."""
    assert in_fork(fit, folder / "whole") == 0
    codes = [in_fork(fit_with_room_for, folder / "full", size) for size in (50, 1500, 3000, 7000, 1 << 20)]
    assert codes == [ROOM, ROOM, ROOM, ROOM, 0], codes


def assert_no_growth(settings, checkpointing, steps):
    """Steps of one process: neither its memory nor the number of its live tensors grows after the first quarter."""
    torch.set_num_threads(1)
    model = lemo_fx.transform(with_lora(tiny("llama", 1)), LemoConfig(**settings, block_size=8, dense_layers=()))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    lengths = (64, 48, 61, 80)
    seen = []
    for number in range(steps):
        inputs = batch(2, lengths[number % 4], "both" if number % 3 else None, seed=number)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % (steps // 4) == steps // 4 - 1:
            gc.collect()
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
            seen.append((psutil.Process().memory_info().rss >> 10, tensors))
    assert seen[-1][1] == seen[0][1], seen
    # KiB; what an allocator keeps varies by some hundreds.
    assert seen[-1][0] - seen[0][0] < 3000, seen


def start(script: Path, folder: Path, count: int, *arguments: str) -> tuple[list[subprocess.Popen], list[Path]]:
    """A script of tests/helpers on several ranks, as torchrun would start it; their logs."""
    (port,) = free_ports(1)
    logs = [folder / f"rank{rank}.log" for rank in range(count)]
    paths = [str(script.parents[2]), str(script.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(script), *arguments]
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=own))
    return processes, logs


def ended(processes: list[subprocess.Popen], logs: list[Path], seconds: float) -> list[int]:
    """The ranks' exit codes; prints the end of their logs."""
    try:
        return [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
        print("\n\n".join(log.read_text()[-6000:] for log in logs))
