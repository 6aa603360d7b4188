"""kill -9 and a full disk, in the middle of training, of `fit` and of saving: nothing is lost, nothing is mixed."""

import json
import re
import shutil
import signal

import processes
import pytest
import torch
from processes import KILLED, SPARSE, die_at, in_clean_process, in_fork, limit_files
from tiny import tiny

from lemo_fx import Predictors, StorageError
from lemo_fx.predictors import RECORD, TENSORS


@pytest.fixture(scope="module")
def generations():
    """Predictors of one model that differ in every tensor and in their record."""
    made = [Predictors.random(tiny("llama"), SPARSE, seed=seed) for seed in range(3)]
    return [Predictors(p.tensors, {**p.record, "generation": i}) for i, p in enumerate(made)]


def generation(folder, generations):
    """Which of the generations lies in a folder, whole."""
    loaded = Predictors.load(folder)
    found = generations[loaded.record["generation"]]
    assert loaded.record == found.record
    assert loaded.tensors.keys() == found.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in found.tensors.items())
    return loaded.record["generation"]


def save_and_die(predictors, folder, number):
    die_at(folder, number)
    predictors.save(folder)


def save_with_room_for(predictors, folder, size, deadly):
    limit_files(size, deadly)
    with pytest.raises(StorageError, match=re.escape(str(folder))):
        predictors.save(folder)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_kill_between_two_writes_leaves_the_old_or_the_new_predictors(tmp_path, generations):
    generations[0].save(tmp_path / "old")
    left, number, code = [], 0, KILLED
    while code == KILLED:
        number += 1
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(number))
        code = in_fork(save_and_die, generations[1], folder, number)
        assert code in (KILLED, 0)
        left.append(generation(folder, generations))
    assert left == sorted(left)
    assert left.count(0) > 2
    assert left.count(1) > 2
    # A second save, killed likewise, into what the first kill left.
    for first in range(1, number):
        for second in range(1, number, 2):
            folder = shutil.copytree(tmp_path / str(first), tmp_path / f"{first} {second}")
            in_fork(save_and_die, generations[2], folder, second)
            assert generation(folder, generations) in (left[first - 1], 2)
        generations[2].save(folder)
        assert generation(folder, generations) == 2
        assert names(folder) == {TENSORS, RECORD}


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_predictors(tmp_path, generations):
    generations[0].save(tmp_path)
    sizes = sorted((tmp_path / name).stat().st_size for name in (TENSORS, RECORD))
    for size in (0, 1, sizes[0] // 2, sizes[0], sizes[1] - 1):
        assert in_fork(save_with_room_for, generations[1], tmp_path, size, True) == -signal.SIGXFSZ
        assert generation(tmp_path, generations) == 0
    generations[1].save(tmp_path)
    assert generation(tmp_path, generations) == 1
    assert names(tmp_path) == {TENSORS, RECORD}


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_the_old_predictors_and_nothing_else(tmp_path, generations, earlier):
    generations[0].save(tmp_path)
    sizes = sorted((tmp_path / name).stat().st_size for name in (TENSORS, RECORD))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if not earlier:
        shutil.rmtree(tmp_path)
        before = {}
    # The json is the larger of the two here, so the last size has room for the tensors.
    for size in (0, 100, sizes[0] - 1, sizes[0]):
        assert in_fork(save_with_room_for, generations[1], tmp_path, size, False) == 0
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    generations[1].save(tmp_path)
    assert generation(tmp_path, generations) == 1


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path, generations):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        generations[0].save(tmp_path / "file")


@pytest.mark.slow
def test_training_that_was_killed_twice_goes_on_as_if_it_were_not(tmp_path):
    in_clean_process(processes.train_and_kill, tmp_path)
    whole, killed = (json.loads((tmp_path / name / "done.json").read_text()) for name in ("whole", "killed"))
    assert len(whole[0]) == 6
    assert killed == whole


def same_predictors(folder, other):
    one, two = Predictors.load(folder), Predictors.load(other)
    # But for the day, which may change while they are fitted.
    assert {**one.record, "date": ""} == {**two.record, "date": ""}
    assert all(torch.equal(two.tensors[name], tensor) for name, tensor in one.tensors.items())


@pytest.mark.slow
def test_a_fit_that_is_killed_again_and_again_ends_with_the_same_predictors(tmp_path):
    in_clean_process(processes.fit_and_kill, tmp_path)
    ends = [folder for folder in tmp_path.iterdir() if folder.name.startswith(("killed", "again"))]
    assert len(ends) > 10
    for folder in ends:
        assert names(folder) == {TENSORS, RECORD}
        same_predictors(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_fit_on_a_full_disk_names_the_file_and_goes_on_when_there_is_room(tmp_path):
    in_clean_process(processes.fit_on_a_full_disk, tmp_path)
    assert names(tmp_path / "full") == {TENSORS, RECORD}
    same_predictors(tmp_path / "full", tmp_path / "whole")
