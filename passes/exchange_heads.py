"""Compute every attention between two exchanges of the ranks that share a sequence (`lemo_fx.runtime.sequence`).

before:  a' = attention(n', mask', rope')
after:   known = told(lemo_attention_exchange, mask, tokens)             # outside of what is recomputed
         a' = lemo_attention_exchange(n', mask', rope', lemo_told=known)
The choice of blocks reads the rank's own part of the mask. Does nothing where no ranks share a sequence.
"""

from torch import fx

from lemo_fx.errors import UnsupportedModelError
from lemo_fx.graph.capture import remove_dead_nodes
from lemo_fx.passes.rewrite import META, LayerRewrite, PlannedSite, call, part_name
from lemo_fx.runtime import parts, sequence
from lemo_fx.runtime.scores import Predictor
from lemo_fx.runtime.select import SelectBlocks


def exchange_heads(rewrite: LayerRewrite) -> int:
    """Returns the number of attention calls that are now exchanged.

    Raises:
        UnsupportedModelError: an attention cannot be shared out.
    """
    group = rewrite.group
    if group is None:
        return 0
    mask = rewrite.argument("attention_mask")
    if mask is None or mask.op != "placeholder":
        raise UnsupportedModelError("it takes no attention_mask, by which a part would be told of the whole sequence")
    changed = 0
    for planned in rewrite.sites:
        if planned.site.kind == "attention":
            changed += _exchange(rewrite, planned, mask)
    if changed:
        _read_own_mask(rewrite, mask)
    return changed


def _exchange(rewrite: LayerRewrite, planned: PlannedSite, mask: fx.Node) -> int:
    group = rewrite.group
    assert group is not None
    target, name = str(planned.site.mixer.target), part_name(planned.name, "exchange")
    calls = [n for n in rewrite.graph.nodes if n.op == "call_module" and n.target == target]
    if calls:
        rewrite.modules[name] = sequence.ExchangedAttention(rewrite.layer.get_submodule(target), group)
    for node in calls:
        # What runs with gradient, runs on the kept rows; under `exact` all of them come first, without.
        on_kept = planned.treatment is not None and node.meta[META].gradient
        tokens = planned.tokens if on_kept else None
        part = node.meta[META]
        first = next(n for n in rewrite.graph.nodes if n.meta.get(META) == part)
        with rewrite.graph.inserting_before(first):
            exchange = rewrite.graph.create_node("get_attr", name)
            args = (exchange, mask, tokens, rewrite.length())
            known = call(rewrite.graph, sequence.told, args, f"{part.name.removeprefix('lemo_')}_told")
        node.target = name
        node.kwargs = {**node.kwargs, "lemo_told": known}
    return len(calls)


def _read_own_mask(rewrite: LayerRewrite, mask: fx.Node) -> None:
    """What chooses is told which tokens of the part are real; attention, which is told otherwise, gets no mask."""
    users = [user for user in mask.users if user.target is not sequence.told]
    first = next(n for n in rewrite.graph.nodes if n.op != "placeholder")
    with rewrite.graph.inserting_before(first):
        within = call(rewrite.graph, parts.mask_within, (mask,), "mask_within")
        exchange = rewrite.graph.create_node("get_attr", next(n for n in rewrite.modules if n.endswith("_exchange")))
        own = call(rewrite.graph, sequence.own_mask, (exchange, mask), "own_mask")
    for user in users:
        chooses = isinstance(rewrite.modules.get(str(user.target)), SelectBlocks | Predictor)
        user.replace_input_with(mask, own if chooses else within)
    remove_dead_nodes(rewrite.graph)
