"""Every wrong input to the Python interface is answered by an error of our own, which says what to do, in one line.

The model is afterwards what it was before: its class, its state_dict and what it computes.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny, with_lora
from torch import nn

import lemo_fx
from lemo_fx import DenseFinish, Elimination, LemoCallback, LemoConfig, Predictors
from lemo_fx.errors import (
    ConfigError,
    InputError,
    LemoError,
    NotTransformedError,
    PredictorError,
    StorageError,
    UnsupportedModelError,
)
from lemo_fx.fitting.training import Recipe

IDS = torch.arange(3, 67)[None]
NAN, INFINITE = float("nan"), float("inf")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ROWS = [[1] * 70]


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    """What the cases work on: a model as it comes, a transformed one, predictors of such a model, and files."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("text")
    (folder / "empty").mkdir()
    config = LemoConfig(block_size=8, dense_layers=())
    predictors = lemo_fx.fit(tiny("llama", layers=4), [list(range(3, 67))] * 2, config, progress=False)
    return SimpleNamespace(
        folder=folder,
        plain=tiny("llama", layers=4),
        done=lemo_fx.transform(with_lora(tiny("llama", layers=4)), config),
        predictors=predictors,
    )


def transform(*args, **kwargs):
    return lambda w: lemo_fx.transform(w.plain, *args, **kwargs)


def make(function, *args, **kwargs):
    return lambda w: function(*args, **kwargs)


def encoder():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def translator():
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=97)
    return transformers.T5ForConditionalGeneration(config)


def of_pictures():
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8))


def predicted(**plan):
    return LemoConfig(attention=Elimination(score="predicted"), **plan)


def step(labels):
    return lambda w: w.done(input_ids=IDS, labels=labels)


def with_labels(labels):
    def run(w):
        with lemo_fx.labels(w.done, labels):
            w.done(input_ids=IDS)

    return run


def fit(sequences, **given):
    return lambda w: lemo_fx.fit(w.plain, sequences, progress=False, **given)


def recall_on(**batch):
    return lambda w: lemo_fx.report(w.done, recall_on=batch)


CASES = {
    UnsupportedModelError: {
        "transform a name": (make(lemo_fx.transform, "model"), "takes a loaded model, not str"),
        "transform None": (make(lemo_fx.transform, None), "not NoneType"),
        "transform a folder": (lambda w: lemo_fx.transform(w.folder), "takes a loaded model"),
        "transform a class": (make(lemo_fx.transform, transformers.LlamaForCausalLM), "takes a loaded model"),
        "transform a config": (lambda w: lemo_fx.transform(w.plain.config), "not LlamaConfig"),
        "transform a list": (lambda w: lemo_fx.transform([w.plain]), "not list"),
        "transform the layers": (lambda w: lemo_fx.transform(w.plain.model.layers), "not a ModuleList"),
        "transform one layer": (lambda w: lemo_fx.transform(w.plain.model.layers[0]), "LlamaDecoderLayer"),
        "transform an encoder": (lambda w: lemo_fx.transform(encoder()), "BertForMaskedLM"),
        "transform an encoder with a decoder": (lambda w: lemo_fx.transform(translator()), "T5"),
        "transform a model of pictures": (lambda w: lemo_fx.transform(of_pictures()), "ViTModel"),
        "transform a linear": (make(lemo_fx.transform, nn.Linear(3, 3)), "Linear"),
        "transform an empty module": (make(lemo_fx.transform, nn.Module()), "Module"),
        "revert a name": (make(lemo_fx.revert, "model"), "takes a loaded model"),
        "report of None": (make(lemo_fx.report, None), "not NoneType"),
        "graphs of a name": (make(lemo_fx.graphs, "model"), "takes a loaded model"),
        "labels for a name": (lambda w: lemo_fx.labels("model", IDS).__enter__(), "takes a loaded model"),
        "report of a batch": (make(lemo_fx.report, IDS), "not Tensor"),
        "set_dense of None": (make(lemo_fx.set_dense, None), "takes a loaded model"),
        "fit a name": (make(lemo_fx.fit, "model", []), "fit takes a loaded model"),
        "fit an encoder": (lambda w: lemo_fx.fit(encoder(), ROWS), "no causal decoder layers"),
        "random predictors of a name": (make(Predictors.random, "model"), "takes a loaded model"),
        "random predictors of an encoder": (lambda w: Predictors.random(encoder()), "no causal decoder layers"),
    },
    NotTransformedError: {
        "report of a model as it is": (lambda w: lemo_fx.report(w.plain), "call lemo_fx.transform"),
        "report of an encoder": (lambda w: lemo_fx.report(encoder()), "was not transformed"),
        "graphs of a model as it is": (lambda w: lemo_fx.graphs(w.plain), "was not transformed"),
        "set_dense of a model as it is": (lambda w: lemo_fx.set_dense(w.plain), "was not transformed"),
        "labels for a model as it is": (lambda w: lemo_fx.labels(w.plain, IDS).__enter__(), "was not transformed"),
        "a part for a model as it is": (lambda w: lemo_fx.shard_sequence(w.plain, {}), "was not transformed"),
    },
    ConfigError: {
        "a number as plan": (transform(0.5), "LemoConfig or the name of a preset"),
        "a dict as plan": (transform({"keep": 0.5}), "not dict"),
        "a class as plan": (transform(LemoConfig), "not type"),
        "a site as plan": (transform(Elimination()), "not Elimination"),
        "True as plan": (transform(True), "not bool"),
        "no such preset": (transform("fastest"), "not one of 'careful'"),
        "a preset without a name": (transform(""), "preset='' is not one of"),
        "dump is a number": (transform(dump=3), "dump=3 must be a folder"),
        "passes are None": (transform(passes=None), "passes"),
        "passes are a name": (transform(passes="all"), "passes"),
        "a pass is a name": (transform(passes=["one"]), "pass"),
        "the group is a name": (transform(sequence_group="world"), "must be a process group"),
        "a layer that there is not": (transform(LemoConfig(dense_layers=[9])), r"\[9\], but the model has 4"),
        "a keep for one layer": (transform(LemoConfig(attention=Elimination(keep=[0.5]))), "lists 1 values"),
        "a threshold for one layer": (transform(LemoConfig(mlp=Elimination(threshold=[1.0]))), "lists 1 values"),
        **{
            f"keep={keep!r}": (make(Elimination, keep=keep), "keep")
            for keep in (0, 1.5, -0.5, "half", "0.5", NAN, INFINITE, True, [], [None], [[0.5]], {0: 0.5}, 1j, b"1")
        },
        "keep is a tensor": (make(Elimination, keep=torch.tensor([0.5, 0.5])), "keep"),
        "keep is an array": (make(Elimination, keep=np.array([0.5, 0.5])), "keep"),
        "keep beside threshold": (make(Elimination, keep=0.5, threshold=1), "not both"),
        **{
            f"{name}={value!r}": (make(Elimination, **{name: value}), name)
            for name, values in {
                "threshold": (NAN, "a", True),
                "slope": (2, NAN, "a", None, [0.1]),
                "eliminated": ("drop", None, ["skip"]),
                "score": ("best", 1),
                "keys": ("all", None, "every"),
                "balance": ("yes", 1),
                "kep": (0.5,),
                "block_size": (8,),
            }.items()
            for value in values
        },
        "a slope beyond all": (make(Elimination, keep=0.2, slope=0.8), "goes from"),
        "balance beside threshold": (make(Elimination, balance=True, threshold=1), "balance"),
        **{
            f"plan {name}={value!r}": (make(LemoConfig, **{name: value}), name)
            for name, values in {
                "block_size": (0, -1, 1.5, True, "64", None),
                "dense_layers": ("all", [0.5], 3, [True]),
                "loss_segments": (0, "many", 1.5),
                "sequence_parts": (0, 1.5),
                "recompute": ("none",),
                "offload": ("yes",),
                "forward": ("fp8",),
                "backward": (8,),
                "base": ("float8", "4bit"),
                "active": ("eval",),
                "attention": (0.5, {"keep": 0.5}, Elimination),
                "mlp": ("skip",),
                "keep": (0.5,),
                "blocksize": (4,),
            }.items()
            for value in values
        },
        "too many fields": (make(LemoConfig, *range(20)), "each given once"),
        "too many fields of a site": (make(Elimination, *range(20)), "each given once"),
        "a field twice": (make(Elimination, 0.5, keep=0.5), "each given once"),
        "a list of shares with a slope": (make(Elimination, keep=[0.5, 0.5], slope=0.1), "give keep as one number"),
        "a share beyond its range among others": (make(Elimination, keep=[0.5, 2.0]), "keep=2.0"),
        "scores are an array": (make(Elimination, score=np.array(["a", "b"])), "score="),
        "segments are an array": (make(LemoConfig, loss_segments=np.array([1, 2])), "loss_segments="),
        "attention shares": (make(LemoConfig, attention=Elimination(score="shared")), "for the MLP"),
        "nothing to share": (make(LemoConfig, attention=None, mlp=Elimination(score="shared")), "to share with"),
        "keys of an MLP": (make(LemoConfig, mlp=Elimination(eliminated="exact", keys="every")), "for attention"),
        "a list as dict": (make(LemoConfig.from_dict, [1]), "not list"),
        "a dict's wrong name": (make(LemoConfig.from_dict, {"atention": {}}), "did you mean attention"),
        "a dict's number for a name": (make(LemoConfig.from_dict, {1: 2}), "no field"),
        "a dict's wrong name in a site": (make(LemoConfig.from_dict, {"mlp": {"kep": 1}}), "did you mean keep"),
        "a preset that is None": (make(LemoConfig.preset, None), "not one of"),
        "a preset's wrong field": (make(LemoConfig.preset, "fast", kep=1), "no field"),
        "a preset's field of a site": (make(LemoConfig.preset, "fast", keep=0.2), "belongs to a site"),
        "a dict's number for a site": (make(LemoConfig.from_dict, {"mlp": 0.5}), "mlp=0.5 must be an Elimination"),
        "a preset's wrong value": (make(LemoConfig.preset, "fast", block_size=0), "block_size"),
        **{
            f"dense={dense!r}": (lambda w, dense=dense: lemo_fx.set_dense(w.done, dense), "must be True or False")
            for dense in ("yes", None, 2, [1], 1.0, torch.tensor(True), np.array([1, 0]))
        },
        "a part without a group": (lambda w: lemo_fx.shard_sequence(w.done, {"input_ids": IDS}), "share no sequence"),
        "fit's rank": (fit(ROWS, rank=0), "rank=0"),
        "fit's rank in words": (fit(ROWS, rank="8"), "rank='8'"),
        "fit's preset": (fit(ROWS, config="fastest"), "'fastest' is not one of"),
        "fit's ridge": (fit(ROWS, ridge=0), "ridge=0"),
        "fit's recipe": (fit(ROWS, recipe={}), "must be a Recipe"),
        "fit's folder": (fit(ROWS, folder=3), "folder=3"),
        "fit's plan": (fit(ROWS, config=3), "not int"),
        "fit's thresholds": (fit(ROWS, thresholds="yes"), "must be True or False"),
        "fit to too short a sequence": (fit([[1, 2, 3]]), "less than one block"),
        "a recipe's loss": (make(Recipe, loss="mse"), "not one of 'log'"),
        "a recipe's epochs": (make(Recipe, epochs=0), "epochs=0"),
        "a recipe's rate": (make(Recipe, rate=NAN), "rate=nan"),
        "a plan of random predictors": (lambda w: Predictors.random(w.plain, 3), "not int"),
        "a seed of random predictors": (lambda w: Predictors.random(w.plain, seed="a"), "seed='a'"),
        "a callback without a trainer": (make(LemoCallback, None), "takes the trainer"),
        **{f"a recall every {n!r}": (make(LemoCallback, None, n), "recall_every=") for n in ("5", 0, 1.5, True)},
        **{
            f"the share of a dense finish {share!r}": (make(DenseFinish, share), "share")
            for share in (2, -1, "half", NAN, None, True)
        },
    },
    PredictorError: {
        "predictors are a folder's name": (transform(predictors="folder"), "Predictors.load"),
        "predictors are a class": (transform(predictors=Predictors), "what lemo_fx.fit returns"),
        "predictors of another size": (
            lambda w: lemo_fx.transform(tiny("llama", layers=2), predictors=w.predictors),
            "run lemo_fx.fit on this",
        ),
        "predictors of another kind": (
            lambda w: lemo_fx.transform(tiny("qwen3", layers=4), predictors=w.predictors),
            "run lemo_fx.fit on this",
        ),
        "predictors of other blocks": (
            lambda w: lemo_fx.transform(w.plain, predicted(block_size=16), predictors=w.predictors),
            "8",
        ),
        "predicted without predictors": (transform(predicted()), "lemo_fx.fit"),
        "stand-ins without them": (transform(LemoConfig(mlp=Elimination(eliminated="stand_in"))), "lemo_fx.fit"),
        "load None": (make(Predictors.load, None), "takes a folder"),
        "load a number": (make(Predictors.load, 3), "takes a folder"),
        "load bytes": (make(Predictors.load, b"folder"), "takes a folder"),
        "load what is not there": (lambda w: Predictors.load(w.folder / "absent"), "there is no folder"),
        "load an empty folder": (lambda w: Predictors.load(w.folder / "empty"), "missing"),
        "load a file": (lambda w: Predictors.load(w.folder / "file"), "there is no folder"),
        "save to None": (lambda w: w.predictors.save(None), "save takes a folder"),
        "thresholds that were not set": (lambda w: w.predictors.thresholds("attention"), "thresholds=True"),
        "a stand-in of no layer": (lambda w: w.predictors.stand_in(99, "attention"), "layer 99"),
    },
    StorageError: {
        "dump into a file": (lambda w: lemo_fx.transform(w.plain, dump=w.folder / "file"), "file"),
        "dump where nobody may write": (transform(dump="/proc/none"), "cannot write /proc/none"),
        "save over a file": (lambda w: w.predictors.save(w.folder / "file"), "file"),
    },
    InputError: {
        "recall on a list": (lambda w: lemo_fx.report(w.done, recall_on=[1]), "takes a batch"),
        "recall on nothing": (recall_on(), "input_ids"),
        "recall on a text": (recall_on(input_ids="text"), "input_ids"),
        "recall on no batch": (recall_on(input_ids=IDS[0]), "input_ids"),
        "recall on no token": (recall_on(input_ids=IDS[:, :0]), "input_ids"),
        "recall on floats": (recall_on(input_ids=IDS.float()), "whole numbers"),
        "recall on unknown tokens": (recall_on(input_ids=IDS + 900), "the model has 97 tokens"),
        "recall with a short mask": (recall_on(input_ids=IDS, attention_mask=torch.ones(1, 9)), "attention_mask"),
        "labels are a list": (with_labels([1]), "not list"),
        "labels of one dimension": (with_labels(IDS[0]), r"not \[64\]"),
        "labels are floats": (with_labels(IDS.float()), "whole numbers"),
        "labels of other tokens": (with_labels(IDS[:, :9]), "for the tokens of the calls"),
        "labels of more rows": (with_labels(IDS.repeat(3, 1)), "for the tokens of the calls"),
        "a step's labels are short": (step(IDS[:, :9]), "64 hidden states meet 9 labels"),
        "a step that asks for attentions": (lambda w: w.done(input_ids=IDS, output_attentions=True), "in eval"),
        "a step's labels are floats": (step(IDS.float()), "labels must be a tensor"),
        "a step's labels are truths": (step(IDS > 3), "labels must be a tensor"),
        "a step's labels are a list": (step(IDS.tolist()), "labels must be a tensor"),
        "fit to None": (fit(None), "sequence"),
        "fit to nothing": (fit([]), "at least one sequence"),
        "fit to an empty sequence": (fit([[]]), "sequence"),
        "fit to a text": (fit("text"), "token ids"),
        "fit to texts": (fit(["some text"]), "token ids"),
        "fit to rows of text": (fit([{"text": "a"}]), "input_ids"),
        "fit to five": (fit(5), "token ids"),
        "fit to three dimensions": (fit(IDS[None]), "token ids"),
        "fit to single tokens": (fit([[3], [4]]), "every sequence is a single token"),
        "fit to a mask of other numbers": (fit([{"input_ids": [3], "attention_mask": [-9.0]}]), "a 1 or a 0"),
        "fit to a mask of nothing": (fit([{"input_ids": [3], "attention_mask": [0]}]), "leaves no token"),
        "fit to a number for a mask": (fit([{"input_ids": [3], "attention_mask": 1}]), "token ids"),
        "fit to numbers": (fit([1, 2, 3]), "sequence"),
        "fit to floats": (fit(torch.rand(2, 70)), "token ids"),
        "fit to unknown tokens": (fit([[9999] * 70]), "the model has 97 tokens"),
        "fit to tokens below 0": (fit([[-1] * 70]), "from -1 to -1"),
        "fit into a file": (lambda w: lemo_fx.fit(w.plain, ROWS, folder=w.folder / "file"), "is not a folder"),
        "fit to too long a sequence": (fit([[1] * 1000]), "512"),
        "fit to a mask of other tokens": (
            fit([{"input_ids": [1] * 70, "attention_mask": [1] * 3}]),
            "for each of its 70 token ids",
        ),
    },
}
TABLE = [(kind, name, *case) for kind, cases in CASES.items() for name, case in cases.items()]


def state(model):
    """What a wrong input must not change."""
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    classes = [(name, type(module)) for name, module in model.train().named_modules()]
    return classes, [*model.state_dict()], logits


@pytest.fixture(scope="module")
def before(w):
    return {"plain": state(w.plain), "done": state(w.done)}


@pytest.mark.parametrize(("kind", "wrong", "says"), [(k, c, s) for k, _, c, s in TABLE], ids=[row[1] for row in TABLE])
def test_wrong_input_is_answered_and_changes_nothing(w, before, kind, wrong, says):
    with pytest.raises(kind, match=says) as raised:
        wrong(w)
    assert isinstance(raised.value, LemoError)
    assert "\n" not in str(raised.value)
    for name, (classes, keys, logits) in before.items():
        now = state(getattr(w, name))
        assert now[:2] == (classes, keys)
        assert torch.equal(now[2], logits)
