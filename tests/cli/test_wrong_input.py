"""Every command answers wrong input in one line that says what to do, with exit code 2, and writes nothing."""

import json
import shlex
import shutil

import pytest
from tiny import tiny
from typer.testing import CliRunner

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
    ("train model data.json --scheduler cosin", "--scheduler cosin is not one of linear, cosine"),
    ("train model data.json --load-in 3bit", "load_in='3bit' is not one of '4bit', '8bit'"),
    ("train model data.json --eval-share 1", "eval_share=1.0 must lie between 0 and 1"),
    ("train model data.json --report-to mlflow", "--report-to mlflow is not one of wandb, tensorboard"),
    ("train model data.json --push name", "--push name is no name on the Hub: give owner/name"),
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
    ("train model chats.jsonl", "has no chat template for messages: put a chat_template.jinja"),
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
    ("train model data.json --attention sdp", "--attention sdp is not one of eager, sdpa"),
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
    return place


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
