import dataclasses
import pickle

import numpy
import pytest

from lemo_fx import ConfigError, Elimination, LemoConfig


def test_defaults():
    assert Elimination().keep == 0.5
    assert Elimination(threshold=1.0).keep is None
    assert LemoConfig().block_size == 64
    assert LemoConfig().site("mlp") == Elimination(keep=0.4375, eliminated="exact", slope=0.5)


def test_presets_are_the_default_with_changes():
    assert LemoConfig.preset("careful") == LemoConfig()
    assert [LemoConfig().mlp.at_layer("keep", 0, layers) for layers in (1, 2, 5)] == [0.4375, 0.1875, 0.1875]
    balanced = LemoConfig.preset("balanced").mlp
    assert (balanced.keep, balanced.slope) == (0.5, 0.6)
    assert LemoConfig.preset("balanced").float8_everywhere
    fast = LemoConfig.preset("fast", offload=True, dense_layers=[0])
    assert (fast.attention.keep, fast.offload, fast.dense_layers) == (0.375, True, (0,))
    with pytest.raises(ConfigError, match="'careful', 'balanced', 'fast'"):
        LemoConfig.preset("quick")
    with pytest.raises(ConfigError, match=r"keep is no field of LemoConfig: .* mlp=Elimination"):
        LemoConfig.preset("fast", keep=0.5)


def test_numbers_of_numpy():
    site = Elimination(keep=numpy.float32(0.5), slope=numpy.float64(0.25))
    assert (site, type(site.keep)) == (Elimination(keep=0.5, slope=0.25), float)
    assert Elimination(keep=list(numpy.linspace(0.25, 0.5, 2))) == Elimination(keep=[0.25, 0.5])
    assert Elimination(threshold=numpy.float64(3)).threshold == 3
    plan = LemoConfig(block_size=numpy.int64(32), dense_layers=numpy.arange(2), loss_segments=numpy.int32(3))
    assert plan == LemoConfig(block_size=32, dense_layers=(0, 1), loss_segments=3)


def test_frozen_hashable_equal_and_picklable():
    config = LemoConfig(Elimination(keep=[0.5, 1]), None, dense_layers=[0, -1])
    assert config == LemoConfig(Elimination(keep=(0.5, 1)), None, dense_layers=(0, -1))
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 3


@pytest.mark.parametrize(
    ("layers", "count", "dense"),
    [(None, 3, []), (None, 4, [0, 3]), (None, 12, [0, 11]), ((), 12, []), ((0, -1), 5, [0, 4]), ([2], 5, [2])],
)
def test_dense_layers(layers, count, dense):
    config = LemoConfig(dense_layers=layers)
    assert [i for i in range(count) if config.is_dense(i, count)] == dense


@pytest.mark.parametrize(
    "settings",
    [
        {"eliminated": "drop"},
        {"score": "best"},
        {"threshold": "low"},
        {"threshold": float("nan")},
        {"threshold": float("inf")},
        {"threshold": [1.0, -float("inf")]},
        {"threshold": numpy.float32("inf")},
        {"threshold": []},
    ],
)
def test_bad_eliminations(settings):
    with pytest.raises(ConfigError):
        Elimination(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": 0.5},
        {"mlp": "skip"},
        {"dense_layers": ["first"]},
        {"dense_layers": 3},
        {"loss_segments": 0},
        {"loss_segments": "many"},
        {"active": "sometimes"},
        {"attention": Elimination(score="shared")},
        {"attention": None, "mlp": Elimination(score="shared")},
        {"attention": Elimination(keep=0.3), "mlp": Elimination(keep=0.4, score="shared")},
    ],
)
def test_bad_configs(settings):
    with pytest.raises(ConfigError):
        LemoConfig(**settings)


def test_slope_changes_keep_evenly_around_its_mean():
    site = Elimination(keep=0.5, slope=0.4)
    assert [site.at_layer("keep", i, 5) for i in range(5)] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert site.at_layer("threshold", 1, 5) is None
    assert [Elimination(keep=0.3, slope=-0.6 + 1e-9).at_layer("keep", i, 2) for i in (0, 1)] == pytest.approx(
        [0.6, 0], abs=1e-8
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"slope": "steep"}, "slope='steep'"),
        ({"slope": 1.5}, "slope=1.5"),
        ({"keep": 0.2, "slope": 0.5}, r"from -0\.05 in the first layer to 0\.45"),
        ({"keep": 0.9, "slope": 0.3}, r"to 1\.05"),
        ({"keep": [0.2, 0.3], "slope": 0.1}, "one number"),
        ({"threshold": 1.0, "slope": 0.1}, "one number"),
    ],
)
def test_slopes_that_lead_nowhere(settings, match):
    with pytest.raises(ConfigError, match=match):
        Elimination(**settings)


def test_keep_at_layer():
    site = Elimination(keep=[0.1, 0.2])
    assert [site.at_layer("keep", i, 2) for i in range(2)] == [0.1, 0.2]
    with pytest.raises(ConfigError, match="2 values"):
        site.at_layer("keep", 0, 3)
