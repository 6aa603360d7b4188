"""Predictor folders that are damaged, swapped or made to harm: a PredictorError before anything large is read."""

import json
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import SPARSE
from safetensors.torch import save_file
from tiny import anatomy, tiny

import lemo_fx
from lemo_fx import PredictorError, Predictors
from lemo_fx.predictors import RECORD, TENSORS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    Predictors.random(tiny("llama"), SPARSE).save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "predictors")


def edit(folder, **changes):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | changes))


def replace_tensors(folder, change):
    """Other tensors, and a json that fits them: what only a check of sizes can find."""
    tensors = change(dict(Predictors.load(folder).tensors))
    save_file(tensors, folder / TENSORS)
    listed = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()}
    edit(folder, tensors=listed, sha256=None)


@contextmanager
def little_memory(more=1 << 28):
    """Whatever asks for more memory than this fails, tensors included; not a file that is mapped, however large."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def refused(folder, match=None):
    with little_memory(), pytest.raises(PredictorError, match=match):
        Predictors.load(folder)


@pytest.mark.parametrize("make", [lambda: torch.ones(10**8), lambda: bytearray(4 * 10**8)], ids=["tensor", "bytes"])
def test_little_memory_is_too_little_for_400_megabytes(make):
    with little_memory(), pytest.raises((RuntimeError, MemoryError)):
        make()
    make()


FIRST = "layers.0.attention.predictor.first"
HUGE = 10**15


@pytest.mark.parametrize("file", [TENSORS, RECORD])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(folder, file, share):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: int(len(data) * share)])
    refused(folder, file)


def test_one_bit_of_the_weights(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-5] ^= 1
    (folder / TENSORS).write_bytes(data)
    refused(folder, "damaged")


@pytest.mark.parametrize("file", [TENSORS, RECORD])
def test_one_file_of_another_model_of_the_same_size(folder, file, tmp_path):
    Predictors.random(tiny("llama"), SPARSE, seed=9).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / file, folder / file)
    refused(folder, "not the one")


def test_the_whole_folder_of_another_model(tmp_path):
    Predictors.random(tiny("llama", intermediate_size=96), SPARSE).save(tmp_path)
    model = tiny("llama")
    before = anatomy(model)
    with pytest.raises(PredictorError, match="other kind or size"):
        lemo_fx.transform(model, SPARSE, predictors=Predictors.load(tmp_path))
    assert anatomy(model) == before


@pytest.mark.parametrize("version", [0, 99, "2", None, [2]])
def test_another_version(folder, version):
    edit(folder, format_version=version)
    refused(folder, "version")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": HUGE},
        {"hidden_size": -1},
        {"hidden_size": "32"},
        {"layers": HUGE},
        {"block_size": 0},
        {"block_size": True},
        {"fingerprint": None},
        {"sha256": "../../elsewhere"},
        {"tensors": []},
        {"tensors": {FIRST: 5}},
        {"tensors": {FIRST: ["int8", HUGE, HUGE]}},
        {"hidden_size": 16},
        {"layers": 1},
    ],
    ids=str,
)
def test_a_json_that_claims_other_things(folder, changes):
    edit(folder, **changes)
    refused(folder)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "null", "3", "[]", '{"tensors": {}}', '{"a": 1' + "0" * 5000 + "}", "\0"]
)
def test_a_json_of_another_kind(folder, text):
    (folder / RECORD).write_text(text)
    refused(folder, "damaged")


def test_a_json_of_a_terabyte(folder):
    with (folder / RECORD).open("ab") as file:
        file.truncate(1 << 40)
    refused(folder, "larger than")


@pytest.mark.parametrize("claimed", [None, 1 << 62])
def test_a_header_that_claims_a_huge_tensor(folder, claimed):
    header = {FIRST: {"dtype": "F32", "shape": [1 << 25, 1 << 23], "data_offsets": [0, 1 << 50]}}
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes((claimed or len(text)).to_bytes(8, "little") + text)
    edit(folder, tensors={FIRST: ["float32", 1 << 25, 1 << 23]})
    refused(folder, "damaged")


def test_a_sparse_file_of_a_terabyte(folder):
    """Consistent throughout, but no model has such weights."""
    header = json.dumps({FIRST: {"dtype": "F32", "shape": [1 << 20, 1 << 18], "data_offsets": [0, 1 << 40]}}).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    edit(folder, tensors={FIRST: ["float32", 1 << 20, 1 << 18]}, hidden_size=1 << 20, sha256=None)
    refused(folder, "does not fit|damaged")


def widen(tensors):
    tensors[FIRST] = torch.zeros(2, 32, 9, dtype=torch.int8)
    return tensors


def other_names(tensors):
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [widen, other_names])
def test_weights_that_do_not_fit_together(folder, change):
    replace_tensors(folder, change)
    refused(folder, "does not fit")


def test_a_site_with_some_of_its_weights(folder):
    replace_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("second_bias")})
    model = tiny("llama")
    before = anatomy(model)
    with pytest.raises(PredictorError, match="no predictor"):
        lemo_fx.transform(model, SPARSE, predictors=Predictors.load(folder))
    assert anatomy(model) == before


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_change_of_any_byte_is_refused_or_changes_nothing(saved, tmp_path_factory, data):
    original = Predictors.load(saved)
    file = data.draw(st.sampled_from([TENSORS, RECORD]))
    content = bytearray((saved / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("changed") / "p")
    (folder / file).write_bytes(content)
    try:
        loaded = Predictors.load(folder)
    except PredictorError:
        return
    assert loaded.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in original.tensors.items())
    try:
        lemo_fx.transform(tiny("llama"), SPARSE, predictors=loaded)
    except PredictorError:
        assert loaded.record != original.record
