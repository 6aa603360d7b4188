"""What to eliminate, where and how: the two frozen dataclasses that `transform` takes."""

from __future__ import annotations

import difflib
import functools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lemo_fx.errors import ConfigError

Treatment = Literal["skip", "stand_in", "exact"]
Score = Literal["auto", "predicted", "measured", "random", "step", "shared"]
SiteKind = Literal["attention", "mlp"]
KnownKeys = Literal["kept", "every"]
Precision = Literal["model", "float8"]


def is_number(value: object) -> bool:
    """Whether a setting is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether a setting is a whole number of at least one."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_seed(seed: int) -> None:
    """Raise ConfigError where NumPy would not take a seed."""
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ConfigError(f"seed={seed!r} must be a number from 0 to {2**32 - 1}")


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's; anything else as it is."""
    if isinstance(value, numbers.Real) and type(value) not in (int, float, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in allowed):
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def _check_choices(plan: Any) -> None:
    """Raise ConfigError where a field that names its values, or is true or false, holds another one."""
    for name, kind in _kinds_of(plan.__class__).items():
        value = getattr(plan, name)
        if get_origin(kind) is Literal:
            _choice(name, value, get_args(kind))
        elif kind is bool and not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} must be True or False")


_kinds_of = functools.cache(get_type_hints)

Plan = TypeVar("Plan", bound=type)


def _checked_names(cls: Plan) -> Plan:
    """A dataclass whose wrong argument names are ConfigErrors that say what was meant."""
    made: Any = cls
    given_names = made.__init__

    @functools.wraps(given_names)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        check_names(cls, kwargs)
        names = [field.name for field in fields(cls)]
        twice = [name for name in names[: len(args)] if name in kwargs]
        if len(args) > len(names) or twice:
            raise ConfigError(
                f"{cls.__name__} has {len(names)} fields, each given once, by position or by name: {', '.join(names)}"
            )
        given_names(self, *args, **kwargs)

    made.__init__ = __init__
    return cls


def check_names(cls: type, given: Iterable[str]) -> None:
    """Raise ConfigError where a name is none of a dataclass's fields, with the one that was probably meant."""
    names = [field.name for field in fields(cls)]
    for name in given:
        if name in names:
            continue
        if cls is LemoConfig and name in (field.name for field in fields(Elimination)):
            meant = f"it belongs to a site: LemoConfig(attention=Elimination({name}=...), mlp=Elimination({name}=...))"
        elif cls is Elimination and name in (field.name for field in fields(LemoConfig)):
            meant = f"it belongs to the whole plan: LemoConfig({name}=...)"
        else:
            close = difflib.get_close_matches(str(name), names, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            meant += f"Its fields are {', '.join(names)}"
        raise ConfigError(f"{name} is no field of {cls.__name__}: {meant}")


@_checked_names
@dataclass(frozen=True)
class Elimination:
    """How one kind of site (attention or MLP) drops its uninformative token blocks.

    Args:
        keep: share of the blocks that stay, in (0, 1]; one number, or one per decoder layer. 0.5 unless a
            threshold is given. `keep=1.0` computes what the original model computes.
        threshold: instead of `keep`, the block score from which a block stays (LeMo section 4.1); one number, or one
            per decoder layer. The count then depends on the data and costs one host synchronisation per site.
        eliminated: what happens to the tokens that are dropped. `"skip"`: the branch adds nothing to them (LeMo).
            `"stand_in"`: a frozen low-rank linear map, fitted by `lemo_fx.fit`, stands in for the branch. `"exact"`:
            the branch is computed for them without saving anything, and the gradient flows through the kept ones only.
        score: what ranks the blocks. `"measured"`: LeMo's block informativeness from Q and K, or the intermediate
            activations of the MLP. `"predicted"`: pattern predictors; an MLP's name the tokens of each block whose
            activations are measured. `"random"`: a stateless hash of the layer's input. `"step"`: one such hash for the
            whole step, so that all sites keep the same blocks; with `exact`, the gradient of a kept token then passes
            every layer (TokenTune, arXiv 2501.18824). `"shared"` (MLP only): the blocks that the attention of the same
            layer kept. `"auto"`: predicted where predictors were given, else "step" for `exact` with `keep` (a backward
            wants unbiased blocks), else measured.
        balance: give every eighth of the sequence the same share of its blocks, ranked by the score within it. LeMo's
            score sums over the rows that see a block, so without this the early blocks win and late ones starve.
        slope: how much more of its blocks the last decoder layer keeps than the first: the share changes evenly from
            layer to layer, around a `keep` that is one number. With one choice a step (`score="step"`) a lower layer
            then keeps a part of what the layers above it keep.
        keys: (attention, `exact` only) of which keys and values the gradient of a kept query knows. `"kept"`: those of
            kept tokens. `"every"`: all, as the forward does; gradients of the keys and values of dropped tokens reach
            the adapters of their own layer and end there. For data in which few tokens carry labels and what they
            depend on is far away: there this learns what "kept" does not (docs/accuracy.md). Costs a backward of
            attention that goes with the kept share, not with its square, and the layer's whole input kept for it.
    """

    keep: float | Sequence[float] | None = None
    threshold: float | Sequence[float] | None = None
    eliminated: Treatment = "skip"
    score: Score = "auto"
    balance: bool = False
    slope: float = 0.0
    keys: KnownKeys = "kept"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.keep is not None:
            raise ConfigError("give either keep or threshold, not both: keep fixes the count, threshold derives it")
        if self.balance and self.threshold is not None:
            raise ConfigError("balance=True ranks blocks within windows, so it needs keep instead of a threshold")
        if self.keep is None and self.threshold is None:
            object.__setattr__(self, "keep", 0.5)
        for name in ("keep", "threshold", "slope"):
            value = getattr(self, name)
            several = isinstance(value, Sequence) and not isinstance(value, str | bytes)
            object.__setattr__(self, name, tuple(map(_plain, value)) if several else _plain(value))
        for keep in self.keep if isinstance(self.keep, tuple) else (self.keep,):
            if self.keep is not None and not (is_number(keep) and 0 < keep <= 1):
                raise ConfigError(f"keep={keep!r} must be a number in (0, 1]; 1.0 keeps every block")
        for threshold in self.threshold if isinstance(self.threshold, tuple) else (self.threshold,):
            if self.threshold is not None and not (is_number(threshold) and -math.inf < threshold < math.inf):
                raise ConfigError(f"threshold={threshold!r} must be a finite number")
        if not (is_number(self.slope) and abs(self.slope) < 1):
            raise ConfigError(f"slope={self.slope!r} must be a number between -1 and 1")
        if self.slope:
            keep = self.keep
            if not isinstance(keep, int | float):
                raise ConfigError("slope changes one keep from layer to layer: give keep as one number")
            ends = [keep - self.slope / 2, keep + self.slope / 2]
            if not all(0 < end <= 1 for end in ends):
                raise ConfigError(
                    f"keep={keep:g} with slope={self.slope:g} goes from {ends[0]:g} in the first layer to {ends[1]:g} "
                    "in the last; every share must be in (0, 1]"
                )
        if self.keep == () or self.threshold == ():
            raise ConfigError("keep and threshold take one number, or one per decoder layer: an empty list is neither")
        _check_choices(self)
        if self.keys == "every" and self.eliminated != "exact":
            raise ConfigError(
                "keys='every' completes the gradient of a forward of every token, which only eliminated='exact' "
                f"computes, not {self.eliminated!r}"
            )

    def at_layer(self, name: str, layer: int, layers: int) -> float | None:
        """The value of `name` ("keep" or "threshold") for one decoder layer.

        Raises:
            ConfigError: a per-layer sequence does not have one value per decoder layer.
        """
        value = getattr(self, name)
        if name == "keep" and self.slope and layers > 1:
            return value + self.slope * (layer / (layers - 1) - 0.5)
        if not isinstance(value, tuple):
            return value
        if len(value) != layers:
            raise ConfigError(f"{name} lists {len(value)} values, but the model has {layers} decoder layers")
        return value[layer]


DEFAULT_SITE = Elimination(keep=0.4375, eliminated="exact", slope=0.5)
"""What both kinds of site do unless told otherwise: of what was measured without float8, what loses least in less than
1 / 1.8 of LoRA's time (docs/accuracy.md). LeMo's own rule is `Elimination()`."""


@_checked_names
@dataclass(frozen=True)
class LemoConfig:
    """The whole plan of a transform.

    Args:
        attention: elimination around attention; `None` leaves attention dense. Unless given, the forward is the
            original's and the gradient flows through seven sixteenths of the tokens, more in upper layers than in lower
            ones, drawn anew every step.
        mlp: elimination around the MLP; as attention.
        block_size: tokens per block (LeMo uses 64).
        dense_layers: decoder layers, by index, that are left alone. `()` makes every layer sparse; `None` is the
            default depth plan: first and last layer dense in models of more than three layers (the last one's MLP is
            recomputed in segments under activation checkpointing).
        loss_segments: number of sequence segments in which the head and the loss are computed, so that full logits
            never exist in training; `"auto"` chooses by vocabulary and length, `None` leaves the head alone.
        recompute: what activation checkpointing, where the model has it switched on, computes again in the backward.
            `"all"`: a branch keeps its kept rows only. `"projections"`: it keeps the attention's output too, so that
            attention, quadratic in length, is not computed twice. `"elementwise"`: it keeps what every matmul
            computed as well, and recomputes only norms, casts and activation functions: about a quarter less
            activation memory than training without checkpointing, for little time. Dense layers take part.
        offload: under activation checkpointing on a GPU, what a layer keeps for the backward waits in pinned host
            memory and comes back while the layer after it is in its backward, so that GPU memory does not grow with
            the number of layers. Dense layers take part. Changes no number; does nothing on the CPU.
        forward: precision of the forward without gradient that `exact` runs. `"model"`: the model's own. `"float8"`:
            the matmuls of frozen linear layers in float8, rounded with one scale a token and one an output channel,
            where a GPU has float8 matmuls (NVIDIA compute capability 8.9 and up; other GPUs stay with the model's own,
            and the CPU rounds as if it had them).
        backward: precision of the matmuls that `exact` runs with gradient: the recomputation of the kept tokens and the
            input gradients of frozen linear layers. In eager mode the forward values of the kept tokens come from that
            recomputation and are rounded as well. With `forward="float8"` too, all other branches of the decoder layers
            run in float8, those of dense layers included, but for sites with `keep=1.0`. Float32 adapters of a bfloat16
            model then multiply in bfloat16, as they do under autocast.
        base: `"float8"`: frozen linear layers of the layers that compute in float8 are held in it from the transform
            on, or from the step before which adapters freeze them, rounded once as `forward="float8"` rounds them in
            every step: half of the memory of bfloat16 weights. Needs `forward` and `backward` in float8. Gradients go
            through the same rounded weights, where else the backward rounds them anew. Whatever does not multiply in
            float8 (`eval()`, `generate()`, `set_dense`, `keep=1.0`, other GPUs) computes with them de-quantised, and
            `revert` gives them back so. Merge adapters into the model as it was loaded; not for DoRA.
        active: `"training"`: in `eval()`, in `generate()` or with a cache that a call brings or asks for the original
            code runs. `"always"`: the sparse forward also runs in `eval()`, for studies, where there is no such cache.
        sequence_parts: choose as many blocks from each of this many equal parts of the sequence, each with its ends and
            from a hash of its own; its length must be a multiple of parts and `block_size`. Ranks that share a sequence
            (`transform(sequence_group=...)`) have as many parts as there are ranks, or a multiple of that, and one
            process with as many parts makes the same choice. Dense layers take part.
    """

    attention: Elimination | None = DEFAULT_SITE
    mlp: Elimination | None = DEFAULT_SITE
    block_size: int = 64
    dense_layers: Sequence[int] | None = None
    loss_segments: int | Literal["auto"] | None = "auto"
    recompute: Literal["all", "projections", "elementwise"] = "all"
    offload: bool = False
    forward: Precision = "model"
    backward: Precision = "model"
    base: Precision = "model"
    active: Literal["training", "always"] = "training"
    sequence_parts: int = 1

    def __post_init__(self) -> None:
        for name in ("block_size", "loss_segments", "sequence_parts"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for kind in ("attention", "mlp"):
            site = getattr(self, kind)
            if site is not None and not isinstance(site, Elimination):
                raise ConfigError(f"{kind}={site!r} must be an Elimination, or None to leave it dense")
        if not is_count(self.block_size):
            raise ConfigError(f"block_size={self.block_size!r} must be a positive number of tokens")
        if self.dense_layers is not None:
            if isinstance(self.dense_layers, str) or not isinstance(self.dense_layers, Iterable):
                raise ConfigError(f"dense_layers={self.dense_layers!r} must be a list of layer indices, or None")
            layers = tuple(map(_plain, self.dense_layers))
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
                raise ConfigError(f"dense_layers={layers!r} must hold layer indices")
            object.__setattr__(self, "dense_layers", layers)
        segments = self.loss_segments
        if not (segments is None or is_count(segments) or (isinstance(segments, str) and segments == "auto")):
            raise ConfigError(f"loss_segments={segments!r} must be 'auto', None, or a positive count")
        if not is_count(self.sequence_parts):
            raise ConfigError(f"sequence_parts={self.sequence_parts!r} must be a positive number of parts")
        if self.sequence_parts > 1 and any(site.threshold is not None for site in self.eliminations):
            raise ConfigError(
                "a threshold keeps another number of blocks in every part of a sequence: give keep instead of "
                "threshold, or sequence_parts=1"
            )
        _check_choices(self)
        if self.base == "float8" and not self.float8_everywhere:
            raise ConfigError("base='float8' is for plans that multiply in it: forward='float8', backward='float8'")
        if self.mlp is not None and self.mlp.keys != "kept":
            raise ConfigError("keys='every' is for attention: an MLP has none")
        if self.attention is not None and self.attention.score == "shared":
            raise ConfigError("score='shared' is for the MLP: it reuses the blocks that the attention kept")
        if self.mlp is not None and self.mlp.score == "shared":
            if self.attention is None:
                raise ConfigError("mlp score='shared' needs an attention Elimination to share with")
            for name in ("keep", "slope", "threshold", "balance"):
                mlp, attention = (getattr(site, name) for site in (self.mlp, self.attention))
                if mlp != attention:
                    raise ConfigError(
                        f"mlp score='shared' keeps what the attention kept, but its {name} is {mlp!r} and the "
                        f"attention's {attention!r}"
                    )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LemoConfig:
        """One of the measured plans in `PRESETS`, with other fields changed: `LemoConfig.preset("fast", offload=True)`.

        Raises:
            ConfigError: there is no preset of this name, or no such field.
        """
        _choice("preset", name, tuple(PRESETS))
        return replace(PRESETS[name], **changes)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> LemoConfig:
        """The plan that `dataclasses.asdict` or a JSON file wrote down; what is left out keeps its default.

        Raises:
            ConfigError: a name is no field, or a value is not one of its field's.
        """
        if not isinstance(given, Mapping):
            raise ConfigError(f"a plan is an object with the fields of LemoConfig, not {type(given).__name__}")
        check_names(cls, given)
        sites = {}
        for kind in ("attention", "mlp"):
            site = given.get(kind)
            if isinstance(site, Mapping):
                check_names(Elimination, site)
                sites[kind] = Elimination(**site)
        return cls(**{**given, **sites})

    def site(self, kind: SiteKind) -> Elimination | None:
        """The elimination of one kind of site."""
        return self.attention if kind == "attention" else self.mlp

    @property
    def eliminations(self) -> tuple[Elimination, ...]:
        """Those of the kinds of site that are not left dense."""
        return tuple(site for site in (self.attention, self.mlp) if site is not None)

    @property
    def predicts(self) -> bool:
        """Whether it names predictors to choose the blocks."""
        return any(site.score == "predicted" for site in self.eliminations)

    @property
    def float8_everywhere(self) -> bool:
        """Whether branches that are not `exact` compute in float8 too."""
        return self.forward == self.backward == "float8"

    @property
    def rewrites_dense_layers(self) -> bool:
        """Whether layers without any elimination take part in something that a rewritten layer does."""
        return self.offload or self.recompute != "all" or self.float8_everywhere or self.sequence_parts > 1

    def is_dense(self, layer: int, layers: int) -> bool:
        """Whether decoder layer `layer` of `layers` is left alone.

        Raises:
            ConfigError: `dense_layers` names a layer that the model does not have.
        """
        if self.dense_layers is None:
            return layers > 3 and layer in (0, layers - 1)
        bad = [i for i in self.dense_layers if not -layers <= i < layers]
        if bad:
            raise ConfigError(f"dense_layers names {bad}, but the model has {layers} decoder layers")
        return layer in {i % layers for i in self.dense_layers}


def _all_in_float8(keep: float) -> LemoConfig:
    site = replace(DEFAULT_SITE, keep=keep, slope=0.6)
    return LemoConfig(attention=site, mlp=site, forward="float8", backward="float8")


PRESETS = {
    "careful": LemoConfig(),
    "balanced": _all_in_float8(0.5),
    "fast": _all_in_float8(0.375),
    "dense": LemoConfig(attention=None, mlp=None),
}
"""Plans whose speed, memory and loss in quality were measured (docs/presets.md); "dense" eliminates nothing: plain
training with the loss in segments."""


def as_config(config: LemoConfig | str | None) -> LemoConfig:
    """A plan, the preset of this name, or the default.

    Raises:
        ConfigError: it is none of these.
    """
    if config is None:
        return LemoConfig()
    if isinstance(config, str):
        return LemoConfig.preset(config)
    if not isinstance(config, LemoConfig):
        raise ConfigError(
            f"config must be a LemoConfig or the name of a preset ({', '.join(PRESETS)}), not {type(config).__name__}"
        )
    return config
