"""Every command answers wrong input in one line that says what to do, with exit code 2, and writes nothing."""

import json
import shlex
import shutil

import pytest
import transformers
from tiny import tiny
from typer.testing import CliRunner

import lemo_fx
from lemo_fx.cli.app import app
from lemo_fx.cli.demo import ASSETS

OLD_RUN = '{"settings": {"steps": 3}}'
CASES = [
    # what is typed, words of the answer
    ("", "Usage"),
    ("trian model data.json", "Did you mean 'train'?"),
    ("train", "Missing argument"),
    ("train model", "Missing argument"),
    ("train model data.json more", "more"),
    ("train model data.json --contxt 64", "--context"),
    ("train model data.json --steps many", "--steps"),
    ("train model data.json --steps 1.5", "--steps"),
    ("train model data.json --steps 0", "steps=0 must be a number greater than 0"),
    ("train model data.json --context -4", "context=-4 must be a number greater than 0"),
    ("train model data.json --batch 0", "batch=0 must be a number greater than 0"),
    ("train model data.json --rate 0", "rate=0.0 must be a number greater than 0"),
    ("train model data.json --rate nan", "rate=nan must be a number greater than 0"),
    ("train model data.json --epochs -1", "epochs=-1.0 must be a number greater than 0"),
    ("train model data.json --alpha 0", "alpha=0 must be a number greater than 0"),
    ("train model data.json --dropout 1", "dropout=1.0 must be at least 0 and below 1"),
    ("train model data.json --warmup -1", "warmup=-1.0 must be a number of steps, or a share below 1"),
    ("train model data.json --scheduler cosin", "--scheduler 'cosin' is not one of linear, cosine"),
    ("train model data.json --load-in 3bit", "load_in='3bit' is not one of '4bit', '8bit'"),
    ("train model data.json --eval-share 1", "eval_share=1.0 must lie between 0 and 1"),
    ("train model data.json --report-to mlflow", "--report-to 'mlflow' is not one of wandb, tensorboard"),
    ("train model data.json --push name", "--push 'name' is no name on the Hub: give owner/name"),
    ("train model data.json --compare-with empty", "is no summary of a finished run"),
    (
        "train model data.json --compare-with list.json",
        "no summary of a finished run: give the --out folder",
    ),
    ("train model data.json --predictors empty", "predictors.json is missing; fit or save the predictors again"),
    ("train model data.json --out old", "old holds a run already: add --resume to go on with it"),
    ("train model data.json --preset fastest", "preset='fastest' is not one of 'careful', 'balanced', 'fast', 'dense'"),
    ("train model data.json --preset dense --keep 0.5", "--preset dense eliminates nothing: leave out --keep"),
    ("train model data.json --keep 0", "keep=0.0 must be a number in (0, 1]"),
    ("train model data.json --block-size 0", "block_size=0 must be a positive number of tokens"),
    ("train model data.json --plan absent.json", "absent.json cannot be read as JSON"),
    ("train model data.json --plan notes.txt", "notes.txt cannot be read as JSON"),
    ("train model data.json --plan wrong.json", "kep is no field of LemoConfig"),
    ("train model data.json --config absent.yaml", "absent.yaml cannot be read as YAML"),
    ("train model data.json --config wrong.json", "there is no option 'kep'"),
    ("train absent data.json", "absent does not exist: give a local model folder"),
    ("train data.json data.json", "data.json is not a model: give a local folder"),
    ("train empty data.json", "empty is not a model"),
    ("train model absent.jsonl", "absent.jsonl does not exist: give a file or a folder of"),
    ("train model empty", "empty holds no text: give a file"),
    ("train model model/config.json", "needs a field `text`, or others that are known"),
    ("train model paper.pdf", ".pdf is not read: give a file or a folder of"),
    ("train model chats.jsonl", "has no chat template for messages: put one into"),
    ("train model pairs.jsonl", "are for preference training: see examples/trl_dpo.py"),
    ("train model ids.jsonl", "token 9999 is outside the model's vocabulary of 2048"),
    ("train model data.json --eval absent.txt", "absent.txt does not exist"),
    ("train model data.json --targets nothing", "targets=['nothing'] do not fit LlamaForCausalLM"),
    ("train model data.json --context 4096", "reads up to 512 tokens: choose --context 512 or less"),
    ("train model data.json --context 100", "under four blocks of 64 tokens"),
    ("train '' data.json", "'' does not exist: give a local model folder"),
    ("train model ''", "DATA is empty: give a file"),
    ("train strange data.json", "strange does not describe a model"),
    ("train flat data.json", "flat describes a model without layers"),
    ("train model deep.json", "deep.json: not JSON"),
    ("train model half.jsonl", "half.jsonl:1: holds half a character"),
    ("train model data.json --attention sdp", "--attention 'sdp' is not one of eager, sdpa"),
    ("train model data.json --out list --resume", "list/settings.json cannot be read"),
    ("fit model data.json", "--out"),
    ("fit model absent.txt --out out", "absent.txt does not exist"),
    ("fit model data.json --limit 0 --out out", "--limit 0 must be at least 1"),
    ("fit absent data.json --out out", "absent does not exist"),
    ("inspect absent", "absent does not exist"),
    ("inspect notes.txt", "notes.txt does not describe a model"),
    ("inspect model --layer 9", "--layer 9: the model that was built has 4 decoder layers"),
    ("inspect model --slope 3", "slope=3.0 must be a number between -1 and 1"),
    ("bench absent", "absent does not exist"),
    ("bench model --context long", "--context 'long' must be a number of tokens"),
    ("bench model --context 9999", "reads up to 512 tokens"),
    ("bench model --steps 0", "steps=0 must be greater than 0"),
    ("demo --steps 0", "--steps"),
    ("demo --seed first", "--seed"),
    ("estimate absent", "absent does not exist"),
    ("estimate model --context 0", "--context '0': a sequence has at least one token"),
    ("estimate model --rank 0", "--rank 0 must be at least 1"),
    ("train model data.json --steps -3", "steps=-3 must be a number greater than 0"),
    ("train model data.json --rate fast", "--rate"),
    ("train model data.json --context ''", "--context"),
    ("train model data.json --context 512 --block-size 256", "under four blocks of 256 tokens"),
    ("train model data.json --keep half", "--keep"),
    ("train model data.json --keep nan", "keep=nan must be a number in (0, 1]"),
    ("train model data.json --slope 3", "slope=3.0 must be a number between -1 and 1"),
    ("train model data.json --eliminated drop", "eliminated='drop' is not one of 'skip'"),
    ("train model data.json --score best", "score='best' is not one of 'auto'"),
    ("train model data.json --keys all", "keys='all' is not one of 'kept'"),
    ("train model data.json --seed -1", "seed=-1 must be a number from 0"),
    ("train model data.json --rank a", "--rank"),
    ("train model data.json --eval-every 0", "eval_every=0 must be a number greater than 0"),
    ("train model data.json --warmup nan", "warmup=nan must be a number of steps"),
    ("train model data.json --out notes.txt", "notes.txt is not a folder; give another one"),
    ("train model data.json --out ''", "'--out': the name is empty: give a folder"),
    ("fit model data.json --out ''", "'--out': the name is empty: give a folder"),
    ("train model data.json --eval binary.jsonl", "binary.jsonl cannot be read as UTF-8 text"),
    ("train model data.json --predictors absent", "there is no folder absent of predictors"),
    (
        "train model data.json --context 256 --predictors predictors",
        "fitted to a LlamaForCausalLM of other kind or size",
    ),
    ("train model data.json --targets ''", "targets: name modules, with commas"),
    (
        "train model data.json --targets q_proj,v_porj",
        "no module is named 'v_porj'; its linear ones are q_proj, k_proj",
    ),
    ("train model data.json --plan model", "model cannot be read as JSON"),
    ("train model data.json --plan keep.json", "keep.json: keep=2 must be a number in (0, 1]"),
    ("train model data.json --plan list.json", "list.json: a plan is an object"),
    ("train model data.json --plan keep.json --keep 0.5", "the plan is in a file: leave out --preset, --keep"),
    ("train model data.json --plan far.json", "dense_layers names [77], but the model has 4 decoder layers"),
    ("train --config list.json", "must hold options and values"),
    ("train --config binary.jsonl", "binary.jsonl cannot be read as YAML"),
    (
        "train model data.json --out run --resume --context 256 --rank 3",
        "other settings (settings.eval_windows, settings.rank)",
    ),
    ("train model data.json --out run --resume --context 256 --keep 0.3", "other settings (plan.attention.keep"),
    ("train model data.json --out run --context 256", "run holds a run already: add --resume"),
    ("train bare data.json", "bare is not a model: give a local folder with config.json"),
    ("train pickled data.json", "pickled holds no *.safetensors, the one format that is read"),
    ("train torn data.json", "torn cannot be loaded as a transformers causal language model"),
    ("train broken data.json", "broken does not describe a model"),
    ("train newer data.json", "newer does not describe a model"),
    ("train mute data.json", "mute holds no tokenizer that transformers can load"),
    ("train encoder data.json --context 256", "no causal decoder layers that lemo_fx can rewrite"),
    (
        "train adapter data.json",
        "adapter holds an adapter of some/model, not a model: give that model, or the merged one",
    ),
    ("estimate adapter", "adapter holds an adapter of some/model"),
    ("train predictors data.json", "predictors is not a model"),
    ("train https://hub/a/b data.json", "does not exist: give a local model folder"),
    ("train model binary.jsonl", "binary.jsonl cannot be read as UTF-8 text"),
    ("train model binary.parquet", "binary.parquet cannot be read"),
    ("train model zero.jsonl", "zero.jsonl holds no text: give a file"),
    ("train model list.json", "list.json holds no text: give a file"),
    ("train model head.csv", "head.csv holds no text: give a file"),
    ("train model cut.jsonl", "cut.jsonl:2: not JSON"),
    ("train model number.json", "number.json:1: a row must be an object with fields"),
    ("train model names.csv", "names.csv:2: needs a field `text`, or others that are known"),
    ("train model ragged.csv", "ragged.csv:2: not as many cells as the first line names"),
    ("train model five.jsonl", "five.jsonl:1: `text` must be a string"),
    ("train model silent.jsonl", "silent.jsonl:1: `messages` must be a list of objects with `role` and `content`"),
    ("train model nobody.jsonl", "nobody.jsonl:1: role None in `messages` is not known"),
    ("train model short.jsonl", "short.jsonl:1: 1 `labels` for 2 `input_ids`"),
    ("train model one.jsonl", "there is too little text to train on and to hold some out"),
    ("train model notes", "notes: a file without suffix is not read"),
    ("fit encoder data.json --out out", "no causal decoder layers to fit to"),
    ("fit model one.jsonl --out out", "less than one block: give longer ones, or lower it"),
    ("inspect encoder", "no causal decoder layers that lemo_fx can rewrite"),
    ("inspect model --layer a", "--layer"),
    ("inspect model --dump notes.txt", "notes.txt is not a folder"),
    ("bench model --context 64,a", "--context '64,a' must be a number of tokens"),
    ("bench encoder --context 256", "a bert model has no decoder layers with causal attention"),
    ("bench model --context 256 --targets nothing", "no module is named 'nothing'"),
    ("bench model --preset nothing", "preset='nothing' is not one of"),
    ("demo --plans nothing", "plan 'nothing' is not one of careful, balanced, fast, lemo"),
    ("demo --rate nan", "rate=nan must be a number greater than 0"),
    ("demo --context 0", "context=0: the demo needs a context of 64 to 4096 tokens"),
    ("estimate model --gpu 24gigs", "--gpu '24gigs' must be sizes such as 24GB,80GB"),
    ("estimate model --gpu -5GB", "--gpu '-5GB' must be sizes"),
    ("estimate model --gpu H100", "--gpu 'H100' must be sizes"),
    ("estimate model --gpu ''", "--gpu '' must be sizes"),
    ("estimate model --context a", "--context 'a' must be a number of tokens"),
    ("estimate data.json", "data.json does not describe a model"),
    ("compare model data.json --plans nothing", "--plans 'nothing' is not one of cut, fewer, careful"),
    ("compare model data.json --resume", "leave out --resume and --preview"),
    ("compare model data.json --keep 0.5", "No such option: --keep"),
    ("compare model absent", "absent does not exist: give a file"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("wrong")
    tiny("llama", layers=4, vocab_size=2048).save_pretrained(place / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "model" / name, place / "model")
    text = (ASSETS / "documents" / "train_sqlite_vtab.txt").read_text()
    (place / "data.json").write_text(json.dumps([{"text": text[i : i + 400]} for i in range(0, 8000, 400)]))
    (place / "empty").mkdir()
    (place / "old").mkdir()
    (place / "list").mkdir()
    for name, changed in {"strange": {"hidden_size": "big"}, "flat": {"num_hidden_layers": 0}}.items():
        shutil.copytree(place / "model", place / name)
        config = json.loads((place / name / "config.json").read_text())
        (place / name / "config.json").write_text(json.dumps(config | changed))
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    files = {
        "old/settings.json": OLD_RUN, "notes.txt": "notes", "wrong.json": '{"kep": 1}', "paper.pdf": "%PDF",
        "chats.jsonl": json.dumps(chat), "pairs.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}',
        "list/settings.json": "[]", "deep.json": "[" * 100_000, "half.jsonl": '{"text": "a \\ud800 b"}',
        "ids.jsonl": '{"input_ids": [9999]}',
        "list.json": "[]",
    }  # fmt: skip
    for name, content in files.items():
        (place / name).write_text(content)
    add_data(place)
    add_models(place)
    return place


def add_data(place):
    """Files of rows that cannot be used."""
    files = {
        "zero.jsonl": "", "head.csv": "text\n", "names.csv": "a,b\n1,2\n", "ragged.csv": "text,b\n1\n",
        "notes": "notes",
        "cut.jsonl": '{"text": "a"}\n{"text": \n', "number.json": "5", "five.jsonl": '{"text": 5}',
        "silent.jsonl": '{"messages": []}', "nobody.jsonl": '{"messages": [{"content": "a"}]}',
        "short.jsonl": '{"input_ids": [1, 2], "labels": [1]}', "one.jsonl": '{"text": "a"}',
        "keep.json": '{"attention": {"keep": 2}}', "far.json": '{"dense_layers": [77]}',
    }  # fmt: skip
    for name, content in files.items():
        (place / name).write_text(content)
    for name in ("binary.jsonl", "binary.parquet"):
        (place / name).write_bytes(b"PAR1" + bytes(range(256)))


def add_models(place):
    """Folders that hold no model, half of one or another kind of one; predictors of another; and a run."""
    for name in ("bare", "pickled", "torn", "broken", "newer", "mute"):
        shutil.copytree(place / "model", place / name)
    (place / "bare" / "config.json").unlink()
    (place / "pickled" / "model.safetensors").rename(place / "pickled" / "pytorch_model.bin")
    weights = place / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (place / "broken" / "config.json").write_text("{")
    config = json.loads((place / "newer" / "config.json").read_text())
    (place / "newer" / "config.json").write_text(json.dumps(config | {"model_type": "llama17"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "mute" / name).unlink()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=2048)).save_pretrained(place / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "model" / name, place / "encoder")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    lemo_fx.Predictors.random(tiny("llama", layers=2, vocab_size=2048)).save(place / "predictors")
    options = ["--steps", "1", "--context", "256", "--eval-windows", "1", "--out", str(place / "run")]
    result = CliRunner().invoke(app, ["train", str(place / "model"), str(place / "data.json"), *options])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("typed", "says"), CASES, ids=[typed or "nothing" for typed, _ in CASES])
def test_wrong_input_is_answered_in_one_line(place, monkeypatch, typed, says):
    monkeypatch.chdir(place)
    before = sorted(path.relative_to(place) for path in place.rglob("*"))
    result = CliRunner().invoke(app, shlex.split(typed), prog_name="lemo-fx")
    assert result.exit_code == 2, result.output
    if typed:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.output, result.output
    assert "Traceback" not in result.output
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == before
