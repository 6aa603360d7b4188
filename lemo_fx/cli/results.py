"""What a training run leaves: its summary, the adapter with a card, the merged model, a picture of the plan."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from matplotlib.figure import Figure
from peft import PeftModel
from torch import fx
from transformers import Trainer

import lemo_fx
from lemo_fx import __version__
from lemo_fx.api import suspended
from lemo_fx.cli import page
from lemo_fx.cli.load import load_model, load_tokenizer
from lemo_fx.cli.machine import environment, processes
from lemo_fx.cli.prepare import Prepared, Say
from lemo_fx.cli.run import Run
from lemo_fx.config import LemoConfig
from lemo_fx.draw import captured, draw
from lemo_fx.errors import LemoError, UnsupportedModelError
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.measure import device_name


def summarise(run: Run, trainer: Trainer, prepared: Prepared) -> dict[str, Any]:
    """All of a run's figures in plain types."""
    state = trainer.state
    model: Any = trainer.model
    logged, evaluated = page.entries(state.log_history, "loss"), page.entries(state.log_history, "eval_loss")
    device = next(model.parameters()).device
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "model": run.job.model,
        "heldout_loss": {"before": evaluated[0]["eval_loss"], "after": evaluated[-1]["eval_loss"]},
        "steps": state.global_step,
        "median_step_seconds": statistics.median(e["lemo_fx/seconds"] for e in logged),
        "peak_memory_gib": max(e["lemo/peak_memory_gib"] for e in logged),
        # Not numel of each: bitsandbytes packs two weights in one number.
        "parameters": {"all": model.num_parameters(), "trained": trained},
        "data": {
            "data": run.job.data,
            "windows": len(prepared.train),
            "tokens": sum(len(piece) for window in prepared.train for piece in window),
            "documents_together": max(map(len, prepared.train)),
            "heldout_windows": len(prepared.heldout),
        },
        "processes": processes(),
        "settings": dataclasses.asdict(run.settings),
        "report": lemo_fx.report(model).to_dict(),
        "history": state.log_history,
        "environment": {**environment(run.command), "device": device_name(device)},
    }


CARD = """---
{data}
---

# {name}

A LoRA adapter for `{model}`, trained with lemo_fx {version}; it loads with PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "THIS FOLDER OR ITS NAME")
```

{table}

Held-out loss is that of the model's original code with every token.

Plan: {plan}. Settings: {settings}.
"""


def save_adapter(run: Run, trainer: Trainer, summary: dict[str, Any]) -> None:
    """The adapter, with a card."""
    adapted: Any = trainer.model
    # Where the adapter is to look for its model: not a place in a cache. PEFT would ask the Hub for the size of the
    # vocabulary, too, which has not changed.
    adapted.peft_config["default"].base_model_name_or_path = run.job.model
    adapted.save_pretrained(run.out / "adapter", save_embedding_layers=False)
    on_hub = not Path(run.job.model).exists()
    card = ModelCardData(
        base_model=run.job.model if on_hub else None, library_name="peft", tags=["lora", "lemo_fx", "text-generation"]
    )
    rows = "".join(f"| {name} | {value} |\n" for name, value in page.figures_of(summary).items())
    text = CARD.format(
        data=card.to_yaml(), name=run.out.name, model=run.job.model, version=__version__,
        table=f"| | |\n|---|---|\n{rows}".rstrip(), plan=page.plan_in_words(summary["report"]["config"]),
        settings=page.in_words(summary["settings"]),
    )  # fmt: skip
    ModelCard(text).save(run.out / "adapter" / "README.md")


def merge_and_push(run: Run, folder: Path, say: Say) -> None:
    """What was asked for beside the adapter."""
    adapter = run.out / "adapter"
    if run.job.merge:
        say("merging the adapter into the model")
        # Read again: the trained one may be quantised, and lies on the device.
        merged: Any = PeftModel.from_pretrained(load_model(folder), adapter)
        merged.merge_and_unload().save_pretrained(run.out / "merged")
        if (folder / "tokenizer_config.json").exists():
            load_tokenizer(folder).save_pretrained(run.out / "merged")
    if run.job.push:
        api = HfApi()
        try:
            api.create_repo(run.job.push, private=True, exist_ok=True)
            api.upload_folder(repo_id=run.job.push, folder_path=adapter, commit_message="Upload the adapter")
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LemoError(
                f"the run is done, but {run.job.push} was not uploaded: {first}; try `hf upload {run.job.push} "
                f"{adapter}`"
            ) from error
        say(f"uploaded to https://huggingface.co/{run.job.push}")


@dataclasses.dataclass(frozen=True)
class RewrittenLayer:
    """A decoder layer's graphs before and after the transform, with its name and that of its class."""

    name: str
    kind: str
    before: fx.Graph
    after: fx.GraphModule

    def picture(self) -> Figure:
        """Both, side by side."""
        return draw({"before": self.before, "after": self.after}, self.kind)


def rewritten_layer(model: Any) -> RewrittenLayer | None:
    """The middle one of the rewritten decoder layers; None where there is none."""
    graphs = lemo_fx.graphs(model)
    layers = [name for name, _ in decoder_layers(model) if name in graphs]
    if not layers:
        return None
    name = layers[len(layers) // 2]
    with suspended(model):
        layer = model.get_submodule(name)
        return RewrittenLayer(name, type(layer).__name__, captured(layer), graphs[name])


def graph_picture(model: Any, plan: LemoConfig) -> Any:
    """The middle rewritten decoder layer before and after; None where the plan eliminates nothing."""
    if not plan.eliminations:
        return None
    found = rewritten_layer(model)
    if found is None:
        raise UnsupportedModelError("the plan leaves every decoder layer dense: lower keep, or name fewer dense_layers")
    return found.picture()
