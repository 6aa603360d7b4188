"""Transform every causal-language-model type that the installed transformers has, tiny, and check what it computes.

Each in a process of its own: it must train a step plainly, then by `lemo_fx.transform(model)` and by LeMo's own rule.
`exact` must give the original's loss, keep 1.0 its loss and gradients, and `skip` those of a masked original written
with module hooks, in which no graph takes part; without padding, with it and with packed documents; and with activation
checkpointing.

    python tools/survey_architectures.py --out benchmarks/architectures/survey.json --page docs/architectures.md
    python tools/survey_architectures.py --only llama,qwen3_next
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import VOCABULARY, model_types, tiny_model

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.cli.machine import environment
from lemo_fx.graph.anatomy import is_softmax_attention
from lemo_fx.graph.capture import argument_names, by_name
from lemo_fx.install import installed

ROWS, LENGTH, BLOCK, DOCUMENT = 2, 48, 8, 29
KINDS = ("plain", "padded", "packed")
PLANS = {
    "default": LemoConfig(block_size=BLOCK),
    "LeMo's rule": LemoConfig(Elimination(), Elimination(), block_size=BLOCK, dense_layers=()),
}
EVERYTHING = LemoConfig(Elimination(keep=1.0), Elimination(keep=1.0), block_size=BLOCK, dense_layers=())
VALUE, GRADIENT, FLOOR = 1e-4, 5e-3, 1e-4
"""Largest difference of losses (relative), of a gradient (of its largest entry), and of one that nearly cancels (of the
largest of all)."""
WARM = ("llama", "gemma3", "mixtral")
"""Types whose imports the others share."""
INTERPOLATING = ("dory",)
"""Types whose branches add a share of the difference between what their modules make and the stream."""
START, END = "<!-- survey -->", "<!-- end of survey -->"

Step = tuple[float, dict[str, torch.Tensor]]
Kept = dict[tuple[str, str], list[torch.Tensor]]
"""By (layer, site), the tokens [B, K] that it kept, call by call: some models call a layer several times."""


class WrongError(Exception):
    """A check failed: which, and by how much."""


def batch(kind: str) -> dict[str, Any]:
    """Token ids and labels [ROWS, LENGTH].

    Args:
        kind: "plain"; "padded" has padding at the end of the second row; "packed" has two documents a row, with
            positions that restart.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY - 16, (ROWS, LENGTH), generator=generator)
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[1, -11:] = 0
        return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    if kind == "packed":
        positions = torch.cat([torch.arange(DOCUMENT), torch.arange(LENGTH - DOCUMENT)]).expand(ROWS, -1)
        # transformers looks for documents only where there is no cache.
        return {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    return {"input_ids": ids, "labels": ids}


def step(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """A forward and backward from clean gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(words: str, expected: Step, found: Step, gradients: bool = True) -> None:
    """Raises: WrongError."""
    if not abs(expected[0] - found[0]) <= VALUE * abs(expected[0]):
        raise WrongError(f"{words}: loss {found[0]:.6f} instead of {expected[0]:.6f}")
    if not gradients:
        return
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name in expected[1].keys() | found[1].keys():
        one, other = (s[1].get(name, torch.zeros(())) for s in (expected, found))
        gap = float((one - other).abs().max())
        if not gap <= GRADIENT * float(one.abs().max()) + FLOOR * largest:
            raise WrongError(f"{words}: gradient of {name} off by {gap:.2g} (largest {float(one.abs().max()):.2g})")


@contextlib.contextmanager
def recorded(model: nn.Module, tokens: Kept) -> Iterator[None]:
    """While active, the tokens that each site of a transformed model keeps are noted."""
    hooks = []
    for name, module, record in installed(model):
        for row in record.rows:
            select = module._modules.get(f"lemo_{row.tokens_of}_select")
            if select is not None:
                key = (name, row.site)
                calls = tokens.setdefault(key, [])
                hooks.append(select.register_forward_hook(lambda *a, calls=calls: calls.append(a[2].clone())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def masked_step(
    original: nn.Module, model: nn.Module, tokens: Kept, inputs: Mapping[str, Any], interpolates: bool = False
) -> Step:
    """A step of the original in which attention sees kept keys alone and what branches add at other tokens is zeroed.

    Args:
        model: the original transformed, which says what modules a branch calls.
        tokens: see `recorded`.
        interpolates: whether nothing is added where a branch's modules make what they read, not zeros.
    """
    shape = inputs["input_ids"].shape
    # Modules may serve several sites, and layers may be called several times.
    turns: dict[nn.Module, list[list[torch.Tensor]]] = defaultdict(list)
    firsts: dict[nn.Module, nn.Module] = {}
    read: dict[nn.Module, torch.Tensor] = {}
    masks: dict[nn.Module, list[torch.Tensor]] = {}
    for name, _, record in installed(model):
        for row in record.rows:
            if row.eliminated == "dense":
                continue
            calls = tokens[name, row.site]
            kept = [torch.zeros(shape, dtype=torch.bool).scatter_(1, call, True) for call in calls]
            called = [original.get_submodule(f"{name}.{part}") for part in row.called]
            # Of zeros, a norm that comes after makes zeros; a projection may add its bias, and is one of those below.
            for module in called:
                if module is called[-1] or any(p.dim() > 1 for p in module.parameters()):
                    turns[module].append(kept)
            firsts[called[-1]] = called[0]
            masks.update({module: kept for module in called if is_softmax_attention(module)})
    count: Counter[nn.Module] = Counter()
    masked: Counter[nn.Module] = Counter()

    def zero(module: nn.Module, args: Any, out: Any) -> Any:
        call, site = divmod(count[module], len(turns[module]))
        kept = turns[module][site][call]
        count[module] += 1
        if interpolates:
            return torch.where(kept[..., None], out, read[firsts[module]]) if module in firsts else out
        if isinstance(out, tuple):
            return zero_rows(out[0], kept), *out[1:]
        return zero_rows(out, kept)

    def mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = by_name(argument_names(module), args, kwargs)
        own = given.get("attention_mask")
        lowest = torch.finfo(torch.float32).min
        if not isinstance(own, torch.Tensor) or own.dim() != 4:
            own = torch.ones(1, 1, shape[1], shape[1], dtype=torch.bool).tril()
        if own.dtype == torch.bool:
            own = torch.where(own, 0.0, lowest)
        kept = masks[module][masked[module]]
        masked[module] += 1
        given["attention_mask"] = own.masked_fill(~kept[:, None, None, :], lowest)
        return (), given

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read[module] = args[0] if args else kwargs["hidden_states"]

    hooks = [module.register_forward_hook(zero) for module in turns]
    hooks += [module.register_forward_pre_hook(note, with_kwargs=True) for module in firsts.values() if interpolates]
    hooks += [module.register_forward_pre_hook(mask, with_kwargs=True) for module in masks]
    try:
        return step(original, inputs)
    finally:
        for hook in hooks:
            hook.remove()


def zero_rows(out: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[B, S, H], or flat [B S, H], with zeros at the tokens that are not kept [B, S]."""
    return (out.reshape(*kept.shape, -1) * kept[..., None]).reshape(out.shape)


def survey_one(model_type: str, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """What becomes of one model type, ready for JSON.

    Args:
        kinds: of the batches that are tried; packed ones only where the model takes positions.
    """
    names = model_types()[model_type]
    row: dict[str, Any] = {"type": model_type, "class": names if isinstance(names, str) else names[0]}
    try:
        model = tiny_model(model_type)
        if hasattr(model.config.get_text_config(), "index_topk"):
            # Sparse indexers rank keys by sums of ReLUs, many of them 0, and the largest of equals are arbitrary.
            functional.relu = functional.softplus
        if "position_ids" not in inspect.signature(model.forward).parameters:
            kinds = tuple(kind for kind in kinds if kind != "packed")
        expected = {kind: step(model, batch(kind)) for kind in kinds}
        again = batch(kinds[0])
        same("the original twice", expected[kinds[0]], step(model, again))
    except Exception as error:
        return {**row, "outcome": "does not train", "why": _line(error), "at": _place(error)}
    try:
        for name, plan in PLANS.items():
            row[name] = _left(model, plan)
            for kind, wanted in expected.items():
                words = f"{name}, {kind}"
                tokens: Kept = {}
                with recorded(model, tokens):
                    found = step(model, batch(kind))
                if plan.attention and plan.attention.eliminated == "exact":
                    same(f"{words}: values", wanted, found, gradients=False)
                else:
                    original = tiny_model(model_type, attention="eager")
                    interpolates = model_type in INTERPOLATING
                    masked = masked_step(original, model, tokens, batch(kind), interpolates)
                    same(f"{words}: masked original", masked, found)
            _checkpointed(model, name)
            lemo_fx.revert(model)
        _left(model, EVERYTHING)
        for kind, wanted in expected.items():
            same(f"keep 1.0, {kind}", wanted, step(model, batch(kind)))
        same("reverted", expected[kinds[0]], step(lemo_fx.revert(model), again))
    except lemo_fx.UnsupportedModelError as error:
        return {**row, "outcome": "refused", "why": str(error)}
    except WrongError as error:
        return {**row, "outcome": "wrong", "why": str(error)}
    except Exception as error:
        return {**row, "outcome": "crash", "why": _line(error), "at": _place(error)}
    left = {**row["default"]["left"], **row["LeMo's rule"]["left"]}
    return {**row, "outcome": "partly" if left else "works"}


def _checkpointed(model: nn.Module, name: str) -> None:
    """A plan with one choice of its own a step cannot be compared from step to step, but must run."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        with torch.random.fork_rng():
            plain = step(model, batch("padded"))
        if name != "default":
            model.gradient_checkpointing_disable()
            same(f"{name}: checkpointed", step(model, batch("padded")), plain)
    finally:
        model.gradient_checkpointing_disable()


def _left(model: nn.Module, plan: LemoConfig) -> dict[str, Any]:
    """Transform, and by branch, what was left dense and why; layers by their place."""
    report = lemo_fx.report(lemo_fx.transform(model, plan))
    left: dict[str, list[str]] = defaultdict(list)
    for site in report.sites:
        if site.eliminated == "dense" and "dense (" not in site.note:
            left[f"{site.site}: {site.note.removeprefix('left dense: ')}"].append(site.module.rpartition(".")[2])
    notes = []
    for note in report.notes:
        layer, _, reason = note.partition(": ")
        if "left as it is" in reason:
            left[reason.replace(f"{layer}: ", "")].append(layer.rpartition(".")[2])
        elif "not proven" in note or "not segmented" in note:
            notes.append(note)
    done = Counter(site.site for site in report.sites if site.eliminated != "dense")
    reasons = {reason: ", ".join(layers) for reason, layers in left.items()}
    return {"rewritten": dict(done), "left": reasons, "notes": notes}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-3:])


def in_a_process(work: Callable[[str], dict[str, Any]], model_type: str, limit: float) -> dict[str, Any]:
    """Run in a forked process, which shares what this one has imported; what it returned, or how it died."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
            sender.send(work(model_type))

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return {"type": model_type, "outcome": "crash", "why": f"took more than {limit:g} s"}
        return receiver.recv()
    except EOFError:
        return {"type": model_type, "outcome": "crash", "why": "its process died"}
    finally:
        process.kill()
        process.join()


def main(
    only: Annotated[str, typer.Option(help="model types, separated by commas; all if empty")] = "",
    out: Annotated[Path | None, typer.Option(help="file for the JSON; what it has of other types stays")] = None,
    page: Annotated[Path | None, typer.Option(help="page whose table is written from the JSON")] = None,
    limit: Annotated[float, typer.Option(help="seconds a model type")] = 120.0,
    again: Annotated[str, typer.Option(help="run those alone whose outcome in the file is one of these")] = "",
) -> None:
    """Survey, print a line a type, and write the file after each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    known: dict[str, Any] = {}
    runs = [environment(" ".join(["python", *sys.argv]))]
    if out is not None and out.exists():
        before = json.loads(out.read_text())
        known = {row["type"]: row for row in before["models"]}
        runs = [*before["environments"], *runs] if only or again else runs
    chosen = only.split(",") if only else list(model_types())
    if again:
        chosen = [name for name in chosen if known.get(name, {"outcome": "new"})["outcome"] in again.split(",")]
    if len(chosen) > len(WARM):
        survey_one(WARM[0])
        for name in WARM[1:]:
            tiny_model(name)
    for name in chosen:
        row = in_a_process(survey_one, name, limit)
        known[name] = row
        left = {**row.get("default", {}).get("left", {}), **row.get("LeMo's rule", {}).get("left", {})}
        print(row["outcome"], name, row.get("why", ""), row.get("at", ""), *left, sep=" | ", flush=True)
        if out is not None:
            models = [known[name] for name in sorted(known)]
            out.write_text(json.dumps({"environments": runs, "models": models}, indent=1) + "\n")
    if page is not None:
        text = page.read_text()
        above, below = text.split(START)[0], text.split(END)[1]
        page.write_text(f"{above}{START}\n{table(known, runs[-1])}\n{END}{below}")


def table(known: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The survey as a page's section.

    Args:
        run: what made the latest of its rows, as in the JSON.
    """
    by_outcome: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name in sorted(known):
        by_outcome[known[name]["outcome"]].append(known[name])
    lines = [
        f"{len(known)} model types of transformers {run['transformers']}, torch {run['torch']}, "
        f"lemo_fx {run['lemo_fx']}, {run['cpu']}, {run['date'][:10]}; "
        "`python tools/survey_architectures.py` makes this list from benchmarks/architectures/survey.json.",
        "",
        f"**Every branch is rewritten ({len(by_outcome['works'])}):** "
        + ", ".join(f"`{row['type']}`" for row in by_outcome["works"])
        + ".",
        "",
        f"**Rewritten but for some branches ({len(by_outcome['partly'])}):**",
        "",
        "| model type | left dense |",
        "|---|---|",
    ]
    for row in by_outcome["partly"]:
        left = {**row["default"]["left"], **row["LeMo's rule"]["left"]}
        lines.append(f"| `{row['type']}` | {'; '.join(left).replace('|', '/')} |")
    for outcome, words in (
        ("refused", "Refused"),
        ("wrong", "Wrong"),
        ("crash", "Fails"),
        ("does not train", "Does not train a step at this size, so nothing was tried"),
    ):
        if by_outcome[outcome]:
            lines += ["", f"**{words} ({len(by_outcome[outcome])}):**", "", "| model type | why |", "|---|---|"]
            lines += [f"| `{row['type']}` | {row['why'].replace('|', '/')} |" for row in by_outcome[outcome]]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
