"""Train a small Llama and its byte-level BPE tokenizer from scratch on a corpus made by `build_corpus.py`.

One GPU, a few minutes: `python tools/train_small_model.py --corpus corpus --out small-model --minutes 6`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import lzma
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SEPARATOR_LINE = "\n\f\n"
END_OF_TEXT = "<|endoftext|>"
# Pieces of like size keep all cores busy to the end of a batch.
ENCODE_CHARACTERS = 50_000
SIZE_LIMIT = 12_000_000


def log(message: str) -> None:
    print(message, flush=True)


def read_documents(path: Path) -> list[str]:
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    return text.split(SEPARATOR_LINE)


def train_tokenizer(documents: list[str], vocab_size: int, sample_bytes: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on a random sample of the documents; all 256 bytes are tokens, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample, size = [], 0
    for i in np.random.default_rng(seed).permutation(len(documents)):
        sample.append(documents[i])
        size += len(documents[i])
        if size >= sample_bytes:
            break
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[np.ndarray]:
    """Token ids of each document, encoded on all cores; long documents are cut at line ends to spread the work.

    In int16 where all of the tokenizer's fit into it, else in int32.
    """
    dtype = np.int16 if len(tokenizer) <= np.iinfo(np.int16).max + 1 else np.int32
    pieces: list[str] = []
    owners: list[int] = []
    for owner, text in enumerate(documents):
        start = 0
        while start < len(text):
            end = start + ENCODE_CHARACTERS
            if end < len(text):
                cut = text.rfind("\n", start, end)
                end = cut if cut > start else end
            pieces.append(text[start:end])
            owners.append(owner)
            start = end
    backend = tokenizer.backend_tokenizer
    parts: list[list[np.ndarray]] = [[] for _ in documents]
    batch = 512
    for start in range(0, len(pieces), batch):
        encodings = backend.encode_batch_fast(pieces[start : start + batch], add_special_tokens=False)
        for owner, encoding in zip(owners[start : start + batch], encodings, strict=True):
            parts[owner].append(np.array(encoding.ids, dtype=dtype))
    return [np.concatenate(part) if part else np.zeros(0, dtype) for part in parts]


class WindowSampler:
    """Windows of `context + 1` tokens: out of one document if it is long enough, else out of packed short ones."""

    def __init__(
        self, encoded: list[np.ndarray], context: int, separator: int, device: torch.device, seed: int
    ) -> None:
        self.length = context + 1
        self.rng = np.random.default_rng(seed)
        self.short = [np.append(ids, ids.dtype.type(separator)) for ids in encoded if len(ids) < self.length]
        # The separator leads, so that the model learns what it begins a document with.
        long = [np.concatenate(([ids.dtype.type(separator)], ids)) for ids in encoded if len(ids) >= self.length]
        self.long_tokens = sum(len(ids) for ids in long)
        self.short_tokens = sum(len(ids) for ids in self.short)
        if self.long_tokens + self.short_tokens < self.length:
            raise ValueError(f"the corpus holds fewer than {self.length} tokens")
        self.long_starts = np.cumsum([0] + [len(ids) for ids in long])[:-1]
        self.long_lengths = np.array([len(ids) for ids in long], dtype=np.int64)
        self.device = device
        # In few bytes on the device: the whole corpus is a few hundred MB, and no batch crosses the bus.
        self.tokens = torch.from_numpy(np.concatenate([*long, *self.short]) if long else np.concatenate(self.short))
        self.tokens = self.tokens.to(device)
        self.offsets = torch.arange(self.length, device=device)
        self._windows = np.zeros(0, dtype=np.int64)
        self.epochs = 0

    def _refill(self) -> None:
        """One epoch of window starts: each long document is cut at a fresh random phase."""
        starts: list[np.ndarray] = []
        for begin, length in zip(self.long_starts, self.long_lengths, strict=True):
            phase = int(self.rng.integers(0, min(self.length, length - self.length + 1)))
            cuts = np.arange(phase, length - self.length + 1, self.length)
            # Without these two the head and the tail of a document would hardly be seen.
            edges = [0] if phase > self.length // 2 else []
            if length - cuts[-1] - self.length > self.length // 2:
                edges.append(length - self.length)
            starts.append(begin + np.concatenate((cuts, np.array(edges, dtype=np.int64))))
        if self.short_tokens >= self.length:
            phase = int(self.rng.integers(0, min(self.length, self.short_tokens - self.length + 1)))
            base = self.long_tokens
            starts.append(base + np.arange(phase, self.short_tokens - self.length + 1, self.length))
        self._windows = self.rng.permutation(np.concatenate(starts))
        self.epochs += 1

    def batch(self, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, each `[sequences, context]`."""
        while len(self._windows) < sequences:
            rest = self._windows
            self._refill()
            self._windows = np.concatenate((rest, self._windows))
        chosen, self._windows = self._windows[:sequences], self._windows[sequences:]
        starts = torch.from_numpy(chosen)
        if self.device.type == "cuda":
            starts = starts.pin_memory().to(self.device, non_blocking=True)
        window = self.tokens[starts[:, None] + self.offsets].long()
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True)
class HeldOut:
    bits_per_byte: float
    bytes: int
    tokens: int
    documents: int
    first_quarter_bits_per_byte: float
    last_quarter_bits_per_byte: float


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Number of UTF-8 bytes each token stands for; in the byte-level alphabet one character is one byte."""
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        counts[index] = 0 if token == END_OF_TEXT else len(token)
    return counts


@torch.no_grad()
def evaluate(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    encoded: list[np.ndarray],
    counts: np.ndarray,
    context: int,
    separator: int,
    device: torch.device,
    sequences: int,
    limit_bytes: int | None = None,
) -> HeldOut:
    """Bits per byte of whole documents, cut into windows of `context` tokens, each window begun by the separator.

    The quarters are taken over full windows only, so that both are averages over the same windows.
    """
    rows, sizes, full = [], [], []
    used_bytes = documents = 0
    for ids in encoded:
        if limit_bytes is not None and used_bytes >= limit_bytes:
            break
        documents += 1
        used_bytes += int(counts[ids].sum())
        for start in range(0, len(ids), context):
            piece = ids[start : start + context]
            row = np.full(context + 1, separator, dtype=np.int64)
            row[1 : len(piece) + 1] = piece
            rows.append(row)
            sizes.append(len(piece))
            full.append(len(piece) == context)
    nats = np.zeros((len(rows), context))
    for start in range(0, len(rows), sequences):
        chunk = rows[start : start + sequences]
        # One batch shape: another would be another compilation.
        chunk = chunk + [rows[0]] * (sequences - len(chunk))
        window = torch.from_numpy(np.stack(chunk)).to(device)
        logits = logits_of(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten(), reduction="none")
        count = min(sequences, len(rows) - start)
        nats[start : start + count] = loss.view(sequences, context)[:count].double().cpu().numpy()
    valid = np.arange(context) < np.array(sizes)[:, None]
    labels = np.stack(rows)[:, 1:]
    text_bytes = counts[labels] * valid
    bits = nats * valid / math.log(2)
    quarter = context // 4
    whole = np.array(full)

    def ratio(rows_kept: np.ndarray, columns: slice) -> float:
        total = text_bytes[rows_kept, columns].sum()
        return float(bits[rows_kept, columns].sum() / total) if total else float("nan")

    return HeldOut(
        bits_per_byte=float(bits.sum() / text_bytes.sum()),
        bytes=int(text_bytes.sum()),
        tokens=int(valid.sum()),
        documents=documents,
        first_quarter_bits_per_byte=ratio(whole, slice(0, quarter)),
        last_quarter_bits_per_byte=ratio(whole, slice(context - quarter, context)),
    )


def forward(
    model: LlamaForCausalLM, tokens: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """Logits `[B, S, V]` of `model` for `tokens` `[B, S]`, without a mask, with the residual stream in `dtype`.

    The model's own forward builds a mask of `[B, 1, S, S]` while it is traced, and a mask keeps attention off the
    causal flash kernel.
    """
    hidden = model.model.embed_tokens(tokens)
    if dtype is not None:
        hidden = hidden.to(dtype)
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        output = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False)
        hidden = output[0] if isinstance(output, tuple) else output
    return model.lm_head(model.model.norm(hidden))


def check_forward(model: LlamaForCausalLM, positions: torch.Tensor, separator: int) -> None:
    """Raises if `forward` is not the model's own forward, as when a release changes the layer's arguments."""
    length = min(64, positions.shape[1])
    tokens = torch.randint(model.config.vocab_size, (2, length), device=positions.device)
    tokens[:, 0] = separator
    with torch.no_grad():
        ours = forward(model, tokens, positions[:, :length], None)
        theirs = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def learning_rate_share(progress: float, warmup: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: linear warm-up, then linear to zero."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1.0 - progress) / (1.0 - warmup))


def make_config(args: argparse.Namespace, separator: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=separator,
        eos_token_id=separator,
        pad_token_id=separator,
        attention_bias=False,
        attn_implementation="sdpa",
        use_cache=False,
        dtype="float32",
    )


def make_optimizer(model: torch.nn.Module, rate: float, weight_decay: float, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.txt.xz and heldout.txt.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0, help="training time; the schedule is laid over it")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--micro-batch", type=int, default=32, help="sequences per forward pass")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the time")
    parser.add_argument("--tokenizer-mb", type=float, default=30.0, help="text the tokenizer is trained on")
    parser.add_argument("--corpus-mb", type=float, default=None, help="use only so much of the training text")
    parser.add_argument("--heldout-mb", type=float, default=None, help="evaluate on only so much text")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU only")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    device = torch.device(name)
    on_gpu = device.type == "cuda"
    args.micro_batch = min(args.micro_batch, args.batch)
    if args.batch % args.micro_batch:
        raise SystemExit("--batch must be a multiple of --micro-batch")
    if args.vocab_size > np.iinfo(np.int16).max:
        raise SystemExit("--vocab-size must fit 16 bits with a sign")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    args.out.mkdir(parents=True, exist_ok=True)

    documents = read_documents(args.corpus / "train.txt.xz")
    heldout_documents = read_documents(args.corpus / "heldout.txt.xz")
    if args.corpus_mb is not None:
        order = np.random.default_rng(args.seed).permutation(len(documents))
        kept, size = [], 0
        for i in order:
            kept.append(documents[i])
            size += len(documents[i])
            if size >= args.corpus_mb * 1e6:
                break
        documents = kept
    train_bytes = sum(len(text.encode()) for text in documents)
    log(f"corpus: {len(documents)} documents, {train_bytes / 1e6:.1f} MB [{time.perf_counter() - began:.0f} s]")

    tokenizer = train_tokenizer(documents, args.vocab_size, int(args.tokenizer_mb * 1e6), args.seed)
    tokenizer.model_max_length = args.context
    tokenizer.save_pretrained(args.out)
    separator = tokenizer.eos_token_id
    probe = "naïve — 漢字 \x00\t🙂 end\n"
    if tokenizer.decode(tokenizer(probe)["input_ids"]) != probe:
        raise RuntimeError("the tokenizer does not round-trip")
    log(f"tokenizer: {len(tokenizer)} tokens [{time.perf_counter() - began:.0f} s]")
    encoded = encode_documents(tokenizer, documents)
    heldout = encode_documents(tokenizer, heldout_documents)
    corpus_tokens = sum(map(len, encoded))
    counts = token_bytes(tokenizer)
    log(
        f"encoded: {corpus_tokens / 1e6:.1f}M tokens, {train_bytes / corpus_tokens:.2f} bytes per token "
        f"[{time.perf_counter() - began:.0f} s]"
    )
    demo_tokens = {
        path.name: len(tokenizer.backend_tokenizer.encode(path.read_text(encoding="utf-8")).ids)
        for path in sorted((args.corpus / "documents").glob("*.txt"))
    }
    for document, tokens in demo_tokens.items():
        log(f"  {document}: {tokens} tokens")
    sampler = WindowSampler(encoded, args.context, separator, device, args.seed)
    log(f"in documents of a window or more: {sampler.long_tokens / corpus_tokens:.0%} of the tokens")

    model = LlamaForCausalLM(make_config(args, separator)).to(device)
    # Residual branches start small, so that the depth does not set the scale of the residual stream.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.div_(math.sqrt(2 * args.layers))
            layer.mlp.down_proj.weight.div_(math.sqrt(2 * args.layers))
    parameters = sum(p.numel() for p in model.parameters())
    log(f"model: {parameters:,} parameters, {2 * parameters:,} bytes as bf16")
    if args.hidden == 256 and 2 * parameters > SIZE_LIMIT:
        raise SystemExit(f"the model is over {SIZE_LIMIT} bytes")
    positions = torch.arange(args.context, device=device)[None]
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if on_gpu else contextlib.nullcontext()

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        return forward(model, tokens, positions, torch.bfloat16 if on_gpu else None)

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(tokens).flatten(0, 1).float(), labels.flatten())

    check_forward(model, positions, separator)
    use_compile = on_gpu if args.compile is None else args.compile
    compiled_loss = torch.compile(loss_of, fullgraph=False, dynamic=False) if use_compile else loss_of
    optimizer = make_optimizer(model, args.rate, args.weight_decay, device)
    micro_steps = args.batch // args.micro_batch

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for _ in range(micro_steps):
            tokens, labels = sampler.batch(args.micro_batch)
            with autocast:
                loss = compiled_loss(tokens, labels)
            (loss / micro_steps).backward()
            total += loss.detach() / micro_steps
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    # Compilation is not training: with a rate of zero it changes nothing but the optimizer's averages.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    first_loss = step().item()
    optimizer.state.clear()
    log(f"first loss {first_loss:.3f}, ready to train [{time.perf_counter() - began:.0f} s]")

    history: list[dict[str, float]] = []
    seconds = args.minutes * 60
    start = time.perf_counter()
    last_log = start
    steps = tokens_seen = logged_tokens = 0
    pending: torch.Tensor | None = None
    while (elapsed := time.perf_counter() - start) < seconds:
        share = learning_rate_share(elapsed / seconds, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * share
        loss = step()
        # Reading the loss one step late keeps the clock honest without idling the GPU.
        if pending is not None:
            value = pending.item()
            if not math.isfinite(value):
                raise RuntimeError(f"the loss is {value} at step {steps}")
            now = time.perf_counter()
            if now - last_log >= max(1.0, seconds / 60):
                speed = (tokens_seen - logged_tokens) / (now - last_log)
                log(
                    f"{now - start:6.0f} s  step {steps}  loss {value:.4f}  rate {args.rate * share:.2e}  "
                    f"{tokens_seen / 1e6:.0f}M tokens  {speed / 1e6:.3f}M tokens/s  epoch {sampler.epochs}"
                )
                history.append({"seconds": round(now - start, 1), "step": steps, "loss": round(value, 4)})
                last_log, logged_tokens = now, tokens_seen
        pending = loss
        steps += 1
        tokens_seen += args.batch * args.context
    final_loss = pending.item() if pending is not None else first_loss
    training_seconds = time.perf_counter() - start
    log(f"trained: {steps} steps, {tokens_seen / 1e6:.0f}M tokens in {training_seconds:.0f} s, loss {final_loss:.4f}")

    model.eval()
    # What is measured is what is saved: the weights rounded to bf16.
    # Not `model.to`: that would round the rotary frequencies as well.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    limit = None if args.heldout_mb is None else int(args.heldout_mb * 1e6)
    result = evaluate(logits_of, heldout, counts, args.context, separator, device, args.micro_batch, limit)
    log(
        f"held-out: {result.bits_per_byte:.4f} bits per byte over {result.bytes} bytes; first quarter of the context "
        f"{result.first_quarter_bits_per_byte:.4f}, last quarter {result.last_quarter_bits_per_byte:.4f}"
    )

    model.config.use_cache = True
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=separator, eos_token_id=separator, pad_token_id=separator)
    model.save_pretrained(args.out)
    sources = args.corpus / "SOURCES.json"
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "seed": args.seed,
        "parameters": parameters,
        "model_bytes": (args.out / "model.safetensors").stat().st_size,
        "context": args.context,
        "batch_tokens": args.batch * args.context,
        "peak_rate": args.rate,
        "weight_decay": args.weight_decay,
        "corpus_bytes": train_bytes,
        "corpus_tokens": corpus_tokens,
        "tokens_seen": tokens_seen,
        "epochs": round(tokens_seen / corpus_tokens, 2),
        "steps": steps,
        "training_seconds": round(training_seconds, 1),
        "wall_seconds": round(time.perf_counter() - began, 1),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "first_loss": round(first_loss, 4),
        "losses": history,
        "last_loss": round(final_loss, 4),
        "heldout": vars(result),
        "demo_document_tokens": demo_tokens,
        "corpus": json.loads(sources.read_text(encoding="utf-8")) if sources.exists() else None,
    }
    (args.out / "TRAINING.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    reloaded = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(device)
    sample = torch.from_numpy(heldout[0][: args.context].astype(np.int64)).to(device)[None]
    with torch.no_grad():
        difference = (reloaded(sample).logits - model(sample).logits).abs().max().item()
    # One step of bf16 at the size of a logit: the kernels may differ, the weights may not.
    if (
        difference > 0.125
        or AutoTokenizer.from_pretrained(args.out)(probe)["input_ids"] != tokenizer(probe)["input_ids"]
    ):
        raise RuntimeError(f"what was saved is not what was trained: logits differ by {difference}")
    log(f"wrote {args.out} [{time.perf_counter() - began:.0f} s]")


if __name__ == "__main__":
    main()
