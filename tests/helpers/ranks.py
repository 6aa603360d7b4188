"""What tests/behaviour/test_distributed.py runs on each of two CPU ranks, in one start of two
processes, since starting is slow.

python tests/helpers/ranks.py FOLDER PORT PORT   (RANK, WORLD_SIZE and so on set as torchrun does)
"""

import contextlib
import datetime
import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import TOLERANCE, batch, gradients, step, tiny, with_lora
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import Rows, arguments
from transformers.modeling_layers import GradientCheckpointingLayer

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.api import suspended
from lemo_fx.graph.anatomy import decoder_layers
from lemo_fx.runtime.logits import LateLogits

ROOT = Path(__file__).parents[2]
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def config(keep=0.5, treatment="skip", score="measured", **more) -> LemoConfig:
    site = Elimination(keep=keep, eliminated=treatment, score=score) if keep else more.pop("site")
    return LemoConfig(site, site, block_size=8, **{"dense_layers": (), **more})


THRESHOLD = config(None, site=Elimination(keep=None, threshold=0.2))


def shard(model, units=(), mesh=None):
    """fully_shard on every decoder layer, on further units, and on the root."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for unit in (*base.model.layers, *units, model):
        fully_shard(unit, mesh=mesh)
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def batches(lengths=(48, 48)):
    return [batch(2, length, padding="both", seed=rank) for rank, length in enumerate(lengths)]


def items(inputs) -> int:
    return sum(int((i["labels"][:, 1:] != -100).sum()) for i in inputs)


def alone(model, inputs):
    """One process: the batches of all ranks one after another; (loss, gradients) of their token mean."""
    losses = []
    model.zero_grad()
    for one in inputs:
        loss = model(**one, num_items_in_batch=items(inputs)).loss
        loss.backward()
        losses.append(loss.detach())
    return sum(losses), gradients(model)


def together(model, inputs):
    """Two ranks, each with its own batch: the same, gathered."""
    model.zero_grad()
    loss = model(**inputs[dist.get_rank()], num_items_in_batch=items(inputs)).loss
    (loss * dist.get_world_size()).backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    found = {name.removeprefix("module."): whole(grad) for name, grad in gradients(model).items()}
    return total, found


def assert_equal_steps(expected, found, label=""):
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE["fp32"])
    assert found[1].keys() == expected[1].keys(), label
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, **TOLERANCE["fp32"], msg=lambda text, name=name: f"{label} {name}: {text}"
        )


def make(lora=True, checkpointing=False, layers=3, **settings):
    model = tiny("llama", layers, **settings)
    if lora:
        model = with_lora(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def raises(text, function, *args, **kwargs):
    with pytest.raises(lemo_fx.LemoError, match=re.escape(text)):
        function(*args, **kwargs)


MODES = {
    "keep 1": config(1.0),
    "skip measured": config(0.5),
    "exact random": config(0.25, "exact", "random"),
    "default ends, shared": LemoConfig(Elimination(0.5), Elimination(0.5, score="shared"), block_size=8),
    "threshold": THRESHOLD,
    "exact, one choice": config(0.25, "exact", "step"),
}


@check
def losses_and_gradients_equal_those_of_one_process():
    inputs = batches()
    for lora in (True, False):
        for checkpointing in (True, False):
            dense = alone(make(lora, checkpointing), inputs)
            # The full table for LoRA with checkpointing; the three ways to compute a layer for the rest.
            for name, settings in list(MODES.items())[: None if lora and checkpointing else 3]:
                label = f"{name}, lora={lora}, checkpointing={checkpointing}"
                model = lemo_fx.transform(make(lora, checkpointing), settings)
                expected = alone(model, inputs)
                if name == "keep 1":
                    assert_equal_steps(dense, expected, label)
                else:
                    assert any(not torch.equal(dense[1][n], expected[1][n]) for n in dense[1]), label
                assert_equal_steps(expected, together(DistributedDataParallel(model), inputs), f"DDP, {label}")
                shard(model)
                for _ in range(2):
                    assert_equal_steps(expected, together(model, inputs), f"FSDP2, {label}")


@check
def other_architectures():
    inputs = batches()
    for architecture in ("opt", "gemma3", "gpt_neox", "mixtral"):
        model = lemo_fx.transform(tiny(architecture), config())
        expected = alone(model, inputs)
        for _, layer in decoder_layers(model):
            fully_shard(layer)
        assert_equal_steps(expected, together(fully_shard(model), inputs), architecture)


@check
def ranks_with_batches_of_their_own_shape_do_not_wait_for_each_other():
    cases = [((48, 80), "exact random"), ((64, 4), "skip measured"), ((9, 64), "threshold")]
    for number, (lengths, mode) in enumerate(cases):
        inputs = batches(lengths)
        model = lemo_fx.transform(make(True, checkpointing=number != 1), MODES[mode])
        expected = alone(model, inputs)
        assert_equal_steps(expected, together(DistributedDataParallel(model), inputs), f"DDP {mode}")
        assert_equal_steps(expected, together(shard_like_accelerate(model), inputs), f"FSDP2 {mode}")


def shard_like_accelerate(model):
    """The final norm and the head are one unit, the embedding another."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return shard(model, units=[base.model.embed_tokens, [base.model.norm, base.lm_head]])


@check
def one_rank_in_eval_or_suspended():
    inputs = batches((64, 48))
    model = shard_like_accelerate(lemo_fx.transform(make(checkpointing=True), config()))
    expected = together(model, inputs)
    if dist.get_rank() == 0:
        model.eval()
    together(model, inputs)
    model.train()
    with suspended(model) if dist.get_rank() == 1 else contextlib.nullcontext():
        together(model, inputs)
    assert_equal_steps(expected, together(model, inputs))


@check
def a_sharded_head_is_gathered_once_whatever_the_number_of_segments():
    inputs = batches()
    for adapted, tied in ((False, False), (False, True), (True, False)):
        model = lemo_fx.transform(make(False, tie_word_embeddings=tied), config(loss_segments=7))
        base = model
        if adapted:
            model = with_lora(model, targets=["q_proj", "lm_head"])
        expected = alone(model, inputs)
        shard(model, units=[[base.model.norm, base.lm_head] + ([base.model.embed_tokens] if tied else [])])
        calls = []
        base.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for step_number in (1, 2):
            assert_equal_steps(expected, together(model, inputs), f"adapted={adapted} tied={tied}")
            assert len(calls) == step_number
        assert isinstance(model(**inputs[0]).logits, LateLogits) is not adapted


@check
def each_branch_is_recomputed_once_under_fsdp():
    model = lemo_fx.transform(make(checkpointing=True), config())
    counts = []
    model.get_base_model().model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: counts.append(1))
    alone(model, batches()[:1])
    expected = len(counts)
    counts.clear()
    together(shard(model), batches())
    assert len(counts) == expected, (counts, expected)


@check
def transform_after_fully_shard_and_back():
    inputs = batches()
    for checkpointing in (False, True):
        dense = alone(make(True, checkpointing), inputs)
        expected = alone(lemo_fx.transform(make(True, checkpointing), config()), inputs)
        more = alone(lemo_fx.transform(make(True, checkpointing), config(0.25)), inputs)
        for order in ("before", "after"):
            model = make(True, checkpointing)
            if order == "before":
                shard(lemo_fx.transform(model, config()))
            else:
                lemo_fx.transform(shard(model), config())
            assert_equal_steps(expected, together(model, inputs), order)
            lemo_fx.transform(model, config(0.25))
            assert_equal_steps(more, together(model, inputs), order)
            lemo_fx.revert(model)
            assert_equal_steps(dense, together(model, inputs), order)
            lemo_fx.transform(model, config())
            assert_equal_steps(expected, together(model, inputs), order)
    model = DistributedDataParallel(make())
    assert lemo_fx.transform(model, config()) is model
    assert_equal_steps(expected, together(model, inputs))


@check
def saved_state_loads_in_one_process():
    inputs = batches()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for wrap in (DistributedDataParallel, shard):
        for lora in (True, False):
            plain = make(lora)
            model = wrap(lemo_fx.transform(make(lora), config()))
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
            together(model, inputs)
            optimizer.step()
            state = get_model_state_dict(model, options=options)
            logits = (model.eval()(inputs[0]["input_ids"])).logits
            if dist.get_rank() == 0:
                assert list(state) == list(plain.state_dict())
                plain.load_state_dict(state)
                torch.testing.assert_close(plain.eval()(inputs[0]["input_ids"]).logits, logits, **TOLERANCE["fp32"])
                if lora:
                    again = make()
                    set_peft_model_state_dict(again, get_peft_model_state_dict(plain, state_dict=state))
                    torch.testing.assert_close(again.eval()(inputs[0]["input_ids"]).logits, logits, **TOLERANCE["fp32"])


@check
def fsdp1_works_after_the_transform_and_is_named_before_it():
    inputs = batches((48, 80))
    policy = ModuleWrapPolicy({GradientCheckpointingLayer})
    more = {"use_orig_params": True, "device_id": torch.device("cpu"), "auto_wrap_policy": policy}
    for checkpointing in (False, True):
        expected = alone(lemo_fx.transform(make(False, checkpointing), config()), inputs)
        model = FullyShardedDataParallel(lemo_fx.transform(make(False, checkpointing), config()), **more)
        loss, _ = together(model, inputs)
        torch.testing.assert_close(loss, expected[0], **TOLERANCE["fp32"])
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {n.replace("_fsdp_wrapped_module.", ""): g for n, g in gradients(model).items()}
            assert_equal_steps(expected, (loss, found), "FSDP1")
    raises("call lemo_fx.transform before", lemo_fx.transform, FullyShardedDataParallel(make(False), **more), config())


@check
def parallelism_that_cuts_a_layer_or_a_sequence_is_refused_by_name():
    inputs = batches()[0]
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))

    def cut(model):
        for layer in model.model.layers:
            parallelize_module(
                layer, mesh["tp"], {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
            )
        return model

    raises("tensor and sequence parallelism are not supported", lemo_fx.transform, cut(make(False)), config())
    raises("layers.0.mlp.gate_proj holds a DTensor", cut(lemo_fx.transform(make(False), config())), **inputs)
    raises("parallelism are not supported", lemo_fx.transform, shard(cut(make(False)), mesh=mesh["dp"]), config())
    hybrid = shard(make(False), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    step(lemo_fx.transform(hybrid, config()), inputs)

    model = lemo_fx.transform(make(False), config())
    with context_parallel(mesh["tp"], buffers=[inputs["input_ids"].clone()], buffer_seq_dims=[1]):
        raises("context_parallel is active", model, **inputs)
        raises("context_parallel is active", lemo_fx.transform, make(False), config())
    step(model.train(), inputs)

    refused = {
        "tp": "tensor parallelism is not supported",
        "cp": "context parallelism is not supported",
        "sp": "lemo_fx.transform(model, sequence_group=...) with a group of that many ranks",
    }
    for kind, words in refused.items():
        AcceleratorState._shared_state["parallelism_config"] = ParallelismConfig(**{f"{kind}_size": 2})
        raises(words, model, **inputs)
        raises(words, lemo_fx.transform, make(False), config())
        AcceleratorState._reset_state()

    model = lemo_fx.transform(make(False), config())
    fully_shard(model.model.layers[1].mlp)
    raises("layers.1.mlp is an FSDP2 unit of its own", model, **inputs)
    model = make(False)
    fully_shard(model.model.layers[1].self_attn)
    raises("layers.1.self_attn is an FSDP2 unit of its own", lemo_fx.transform, model, config())


@check
def fit_runs_on_a_rank_of_its_own_or_is_refused():
    sequences = [batch(1, 40)["input_ids"][0].tolist()] * 2
    for wrap in (DistributedDataParallel, shard):
        raises("needs the model before it is wrapped", lemo_fx.fit, wrap(make()), sequences, config())
    if dist.get_rank() == 0:
        predictors = lemo_fx.fit(make(), sequences, config(), progress=False)
        assert predictors.tensors
    else:
        raises("several ranks must not write one folder", lemo_fx.fit, make(), sequences, config(), folder="unused")


def train(folder, rows, resume=False, **settings):
    """Losses of a Trainer run with the middle layer dense, and the model; the adapter is saved."""
    model = lemo_fx.transform(make(), config(dense_layers=(1,)))
    given = arguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=rows,
        # Adam's own would make whole steps of the rounding of gradients near zero.
        adam_epsilon=1e-4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        save_strategy="steps",
        save_steps=2,
        **settings,
    )
    if "fsdp" in settings:
        # accelerate takes its FSDP plugin for granted on accelerators only, but its sharding runs anywhere.
        for state in (vars(given.distributed_state), PartialState._shared_state):
            state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = transformers.Trainer(model, given, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    trainer.save_model(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


@check
def trainer_with_ddp_and_fsdp2():
    folder = Path(sys.argv[1])
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    losses = {"ddp": train(folder / "ddp", 1)[0]}
    losses["fsdp2"], model = train(folder / "fsdp2", 1, fsdp=True, fsdp_config=dict(fsdp))
    assert all(isinstance(layer, FSDPModule) for layer in model.get_base_model().model.layers)
    losses["resumed"], _ = train(folder / "fsdp2", 1, resume=True, fsdp=True, fsdp_config=dict(fsdp))
    ring = {"fsdp": True, "fsdp_config": dict(fsdp), "parallelism_config": ParallelismConfig(cp_size=2)}
    raises("accelerate's ParallelismConfig(cp_size=2)", train, folder / "ring", 1, **ring)
    AcceleratorState._reset_state(reset_partial_state=True)
    fsdp["cpu_ram_efficient_loading"] = True
    losses["fsdp2, rank 0 loads"], _ = train(folder / "ram", 1, fsdp=True, fsdp_config=fsdp)
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def the_example():
    example = runpy.run_path(str(ROOT / "examples" / "fsdp2.py"))
    example["main"](out=Path(sys.argv[1]) / "example", tokens=512, steps=2)


def the_benchmark():
    sys.path.insert(0, str(ROOT / "tools"))
    import bench_scaling

    out = Path(sys.argv[1]) / "scaling"
    bench_scaling.main("tiny", "256", "skip-0.5-eager", "ddp,fsdp2", 4, "float32", 1, out, 1e9, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for function in (*CHECKS, dist.destroy_process_group, the_example, the_benchmark):
        if function in (the_example, the_benchmark):
            # Both set up their own process group, as under torchrun.
            os.environ["MASTER_PORT"] = sys.argv[2 + (function is the_benchmark)]
        began = time.perf_counter()
        function()
        print(f"{function.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
