"""Many steps, several models and several threads in one process."""

import functools
import gc
import sys
import threading

import processes
import pytest
import torch
from tiny import assert_same_step, batch, selections, step, tiny

import lemo_fx
from lemo_fx import Elimination, LemoConfig, install
from lemo_fx.graph.probe import quiet
from lemo_fx.kernels.select_blocks import op

MEASURED, BY_THRESHOLD = Elimination(keep=0.5), Elimination(threshold=2.0)
EXACT = Elimination(keep=0.5, eliminated="exact", score="step")


@pytest.mark.parametrize(
    ("site", "checkpointing", "steps"),
    [(MEASURED, False, 1000), (BY_THRESHOLD, True, 300), (EXACT, True, 300)],
    ids=["measured", "threshold", "exact"],
)
@pytest.mark.slow
def test_memory_does_not_grow(site, checkpointing, steps):
    processes.in_clean_process(processes.assert_no_growth, {"attention": site, "mlp": site}, checkpointing, steps)


def counts():
    gc.collect()
    return len(op._records), len(install._classes), sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def test_transforming_and_reverting_leaves_nothing_behind():
    model, inputs = tiny("llama"), batch(2, 48)
    seen = []
    for number in range(12):
        lemo_fx.transform(model, plan(MEASURED if number % 2 else EXACT))
        step(model, inputs)
        lemo_fx.revert(model)
        model.zero_grad(set_to_none=True)
        if number in (3, 11):
            seen.append(counts())
    # What tests before this one left to the collector may go meanwhile.
    assert all(later <= earlier for earlier, later in zip(*seen, strict=True)), seen


def plan(site):
    return LemoConfig(site, site, block_size=8, dense_layers=())


PLANS = {"llama": plan(MEASURED), "opt": plan(EXACT), "gpt_neox": plan(BY_THRESHOLD)}


def prepared(architecture, seed=0):
    model = lemo_fx.transform(tiny(architecture, seed=seed), PLANS[architecture])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def descend(model, result):
    """A step of gradient descent along gradients; returns the loss."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in result[1]:
                parameter -= 0.05 * result[1][name]
    return result[0]


def separate(architecture, seed=0, steps=4):
    model = prepared(architecture, seed)
    return [descend(model, step(model, batch(2, 56, "both", seed=n))) for n in range(steps)]


@pytest.mark.parametrize("others", [("opt", 0), ("gpt_neox", 0), ("llama", 1)])
def test_interleaved_steps_of_two_models_equal_separate_ones(others):
    both = [("llama", 0), others]
    expected = [separate(*which) for which in both]
    models = [prepared(*which) for which in both]
    for number in range(4):
        inputs = batch(2, 56, "both", seed=number)
        losses = [model(**inputs).loss for model in models]
        for model, loss, wanted in zip(models, losses, expected, strict=True):
            model.zero_grad(set_to_none=True)
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            assert torch.equal(descend(model, (loss.detach(), gradients)), wanted[number])
    lemo_fx.revert(models[0])
    assert selections(models[1]), "reverting one leaves the other"
    assert not selections(models[0])


@pytest.fixture
def restless():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*functions):
    """What each returns; an error in a thread is raised."""
    results = [None] * len(functions)

    def run(index):
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.slow
def test_two_models_in_two_threads(restless):
    """Each thread makes, transforms and trains its own model, while the other one does."""
    runs = [("llama", 0), ("gpt_neox", 0), ("llama", 1)]

    def threaded(which, model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = []
        for number in range(4):
            lemo_fx.transform(model, PLANS[which[0]])
            losses.append(descend(model, step(model, batch(2, 56, "both", seed=number))))
            lemo_fx.revert(model)
        return losses

    expected = [separate(*which) for which in runs]
    for _ in range(3):
        # Before the threads start: a checkpoint sets back the process's one generator, from which weights are drawn.
        models = [tiny(architecture, seed=seed) for architecture, seed in runs]
        found = in_threads(*(functools.partial(threaded, *which) for which in zip(runs, models, strict=True)))
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_compiler_works_after_two_threads_have_tried_layers_out():
    models, entered = [tiny("llama"), tiny("llama")], threading.Event()

    def first():
        with quiet(models[0]):
            entered.set()
            # Time for the other to enter too, if it could.
            threading.Event().wait(0.2)

    def second():
        entered.wait()
        with quiet(models[1]):
            threading.Event().wait(0.4)

    in_threads(first, second)
    compiled = []
    function = torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    function(torch.ones(2))
    assert len(compiled) == 1


def test_transforming_in_one_thread_while_another_trains(restless):
    inputs = batch(2, 56, "both")
    dense, other = tiny("llama"), tiny("llama", 3)
    expected = step(dense, inputs)
    calls = torch.nn.Module.__call__, torch.nn.Module.__getattr__

    def transforming():
        for _ in range(8):
            lemo_fx.transform(other, PLANS["llama"])
            lemo_fx.revert(other)

    results = in_threads(transforming, lambda: [step(dense, inputs) for _ in range(60)])
    for result in results[1]:
        assert_same_step(result, expected, "same")
    assert (torch.nn.Module.__call__, torch.nn.Module.__getattr__) == calls
