"""Models and tokenizers, from a local folder or by their name on the Hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lemo_fx.cli.console import in_short
from lemo_fx.cli.rows import HUB_NAME
from lemo_fx.errors import InputError

SHOWN_LAYERS = 4
"""Decoder layers of a model that is built from a config, to be shown."""
WEIGHT_LIMIT = 8 * 2**30
"""Bytes of weights up to which such a model is built."""
FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def folder_of(name: str | Path, weights: bool = True) -> Path:
    """The local folder (or config.json) of a model: as given, or what the Hub has under owner/name[@revision].

    Args:
        weights: whether they are needed, and not the config alone.
    """
    path, named = Path(name), HUB_NAME.fullmatch(str(name))
    if path.exists() and str(name).strip():
        return path
    if named is None or named["config"] or path.suffix == ".json":
        raise InputError(
            f"{name or repr(name)} does not exist: give a local model folder with config.json, safetensors and "
            "tokenizer, or a name on the Hub (owner/name[@revision])"
        )
    import huggingface_hub
    from huggingface_hub import errors

    fetched = FILES if weights else ["config.json"]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                named["name"], revision=named["split"], allow_patterns=fetched, ignore_patterns=["original/*"]
            )
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} asks for its licence to be accepted: do so at https://huggingface.co/{named['name']}, and log in "
            "with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is no folder here, and the Hub shows no such model: mind the spelling, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise InputError(
            f"{name} is no folder here, and the Hub cannot be reached (offline?) nor has its cache all of it: "
            f"{in_short(error)}"
        ) from error


def read_config(path: Path) -> Any:
    """The transformers config of a causal language model: of a folder, or a config.json."""
    if not path.exists():
        raise InputError(f"{path} does not exist: give a model folder, a config.json or a name on the Hub (owner/name)")
    _refuse_adapter(path)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise InputError(f"{path} does not describe a model: {in_short(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{path}: a {config.model_type} model is no causal language model")
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise InputError(f"{path} describes a model without layers")
    return config


def has_weights(path: Path) -> bool:
    """Whether a path is a folder with safetensors."""
    return path.is_dir() and any(path.glob("*.safetensors"))


def check_weights(path: Path) -> None:
    """Raise InputError where a path is no folder with a config and safetensors."""
    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model: give a local folder with config.json, safetensors and tokenizer")
    if not has_weights(path):
        raise InputError(
            f"{path} holds no *.safetensors, the one format that is read: load the model with transformers and save it "
            "with save_pretrained"
        )


def _refuse_adapter(path: Path) -> None:
    record = path / "adapter_config.json"
    if record.is_file() and not (path / "config.json").exists():
        base = ""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            base = json.loads(record.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
        raise InputError(
            f"{path} holds an adapter{base and f' of {base}'}, not a model: give that model, or the merged one that "
            "lemo-fx train --merge writes"
        )


def load_model(
    path: Path, dtype: torch.dtype | None = None, attention: str | None = None, load_in: str | None = None
) -> Any:
    """A causal language model with all of its weights from a local folder of safetensors.

    Args:
        load_in: "4bit" (NF4, as QLoRA has it) or "8bit" by bitsandbytes; the model then is on its device.
    """
    check_weights(path)
    read_config(path)
    given: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    given |= {} if attention is None else {"attn_implementation": attention}
    given |= {} if dtype is None else {"dtype": dtype}
    given |= {} if load_in is None else _quantised(load_in, dtype)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loading = load(path, output_loading_info=True, **given)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be loaded as a transformers causal language model: {in_short(error)}"
        ) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    return model


def from_config(path: Path, config: Any, **settings: Any) -> Any:
    """A model with random weights, of the config that was read from a path."""
    try:
        return AutoModelForCausalLM.from_config(config, **settings)
    except (ValueError, TypeError, KeyError, ImportError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"{path} does not describe a causal language model: {in_short(error)}") from error


def _quantised(load_in: str, dtype: torch.dtype | None) -> dict[str, Any]:
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"--load-in {load_in} needs bitsandbytes: pip install bitsandbytes")
    config: Any = BitsAndBytesConfig
    made = (
        config(load_in_8bit=True)
        if load_in == "8bit"
        else config(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or torch.bfloat16,
        )
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": made, "device_map": {"": device}}


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a model's folder."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{path} holds no tokenizer that transformers can load: {in_short(error)}") from error


def shown(name: str, say: Callable[[str], None]) -> Any:
    """A model to look at: a folder with its weights; of a config, a folder without any or a Hub name, random ones."""
    path = folder_of(name, weights=False)
    config = read_config(path)
    if has_weights(path):
        return load_model(path)
    model = built(path, config, say)
    say("random weights: built from a config")
    return model


def built(path: Path, config: Any, say: Callable[[str], None] = lambda line: None) -> Any:
    """A model of random weights with the first decoder layers of a config, which is changed, and a small vocabulary."""
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and layers > SHOWN_LAYERS:
        config.num_hidden_layers = SHOWN_LAYERS
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:SHOWN_LAYERS]
        say(f"built with {SHOWN_LAYERS} of the {layers} decoder layers")
    # The graph does not depend on the vocabulary, and its matrices are the largest of all.
    vocabulary = getattr(config, "vocab_size", 0)
    if vocabulary > 1024:
        config.vocab_size = 1024
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, token, None)
        say(f"built with a vocabulary of 1024 instead of {vocabulary}")
    with torch.device("meta"):
        size = sum(p.numel() * 2 for p in from_config(path, config).parameters())
    if size > WEIGHT_LIMIT:
        raise InputError(
            f"{SHOWN_LAYERS} layers of this {config.model_type} model take {size / 2**30:.0f} GiB of memory"
        )
    return from_config(path, config, dtype=torch.bfloat16)
