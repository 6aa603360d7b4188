"""Pictures of layer graphs: the residual stream as a vertical spine, branches at its side, one call per row.

save(draw({"before": lemo_fx.draw.captured(layer), "after": lemo_fx.graphs(model)[name]}), "graph.png")
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import networkx as nx
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from torch import fx, nn

from lemo_fx.graph.capture import ABSENT_IN_TRAINING, capture, readable
from lemo_fx.passes.rewrite import site_and_role
from lemo_fx.runtime import branch

ROLES = {
    "stream": ("residual stream", "#3a3a3a", "#ffffff"),
    "dense": ("the model's own modules, every token", "#6b7178", "#eef0f2"),
    "score": ("score the blocks (no gradient)", "#b8860b", "#fdf3d6"),
    "select": ("select blocks", "#7b4fa3", "#efe6f7"),
    "eliminate": ("eliminate", "#b23a3a", "#fae3e3"),
    "branch": ("the model's own modules, kept tokens", "#2f6fb0", "#e1edf9"),
    "rest": ("values without gradient", "#8a6d5a", "#f3ebe5"),
    "restore": ("restore / residual add", "#2e7d4f", "#e0f2e7"),
}
"""Role of a call -> (its words in the legend, edge colour, fill colour)."""

COLOURS = ("#6b7178", "#2f6fb0", "#2e7d4f", "#b8860b")
"""Of lines and bars."""

OUTLINED = (branch.branch, branch.token_wise_branch, branch.without_gradient, branch.token_wise_without_gradient)
"""What calls a function that a pass made of a region."""

SPINE, BRANCH, CHOICE = 0.0, 3.15, 6.8
"""Horizontal places: the residual stream, what computes, and what chooses. Units: a line of text is 0.32 high."""

WIDTH = {SPINE: 2.3, BRANCH: 3.0, CHOICE: 3.0}
LINE, GAP = 0.32, 0.32


@dataclass(frozen=True)
class Call:
    """What one drawn box stands for."""

    label: str
    role: str
    lines: tuple[str, ...] = ()

    @property
    def column(self) -> float:
        """Horizontal centre of the box."""
        if self.role in ("stream", "restore"):
            return SPINE
        return CHOICE if self.role in ("score", "select") else BRANCH

    @property
    def height(self) -> float:
        """Height of the box."""
        return LINE * (1 + len(self.lines)) + 0.2


def captured(layer: nn.Module) -> fx.Graph:
    """The graph of a decoder layer as it is before `transform`."""
    return capture(layer, ABSENT_IN_TRAINING)


def code(graph: fx.Graph | fx.GraphModule, name: str) -> str:
    """A graph and the functions it calls as readable Python."""
    if isinstance(graph, fx.Graph):
        return readable(graph, {}, name)
    functions = {n: child.graph for n, child in graph.named_children() if isinstance(child, fx.GraphModule)}
    return readable(graph.graph, functions, name)


def calls(graph: fx.Graph | fx.GraphModule) -> nx.DiGraph:
    """What is drawn of a graph: calls in the order of execution, each with its `Call`; edges are values that flow.

    Only the residual stream is shown of the layer's arguments. Look-ups and shapes are left out.
    """
    module = graph if isinstance(graph, fx.GraphModule) else graph.owning_module
    nodes = (graph.graph if isinstance(graph, fx.GraphModule) else graph).nodes
    drawn = nx.DiGraph()
    stands_for: dict[fx.Node, str] = {}
    for node in nodes:
        if node.target is operator.getitem:
            source = node.args[0]
            if source in stands_for:
                stands_for[node] = stands_for[source]
            continue
        call = _call(node, module, first=not drawn)
        if call is None:
            continue
        drawn.add_node(node.name, call=call)
        stands_for[node] = node.name
        for source in node.all_input_nodes:
            # A selection reads the stream's shape only.
            if source in stands_for and (call.role != "select" or source is node.all_input_nodes[0]):
                drawn.add_edge(stands_for[source], node.name)
    return drawn


def _call(node: fx.Node, module: nn.Module | None, first: bool) -> Call | None:
    if node.op == "placeholder":
        return Call(node.name, "stream", ("[B, S, H]",)) if first else None
    if node.op == "output":
        return None
    if node.op == "call_module":
        called = module.get_submodule(str(node.target)) if module is not None else None
        added = site_and_role(str(node.target))[1]
        if added == "select":
            budget = getattr(called, "threshold", None)
            numerator, denominator = getattr(called, "keep", (1, 1))
            share = numerator / denominator
            rule = f"keep {share:.4g} of the blocks" if budget is None else f"blocks scored {budget:g} or more"
            return Call(_name(node), "select", (rule,))
        role = "score" if added in ("score", "predictor") else "dense"
        return Call(str(node.target).removeprefix("lemo_"), role, (type(called).__name__,))
    if node.op != "call_function":
        return None
    if node.target in OUTLINED:
        return _outlined(node, module)
    if node.target is branch.rows_for_values:
        return Call(_name(node), "eliminate", ("dropped rows of the stream",))
    name = str(node.target)
    if "eliminate" in name:
        return Call(_name(node), "eliminate", ("kept rows of the stream",))
    if "restore" in name:
        rows = "stream + rows" if "exact" in name else "stream[tokens] += rows"
        return Call(_name(node), "restore", (rows,))
    if node.target in (operator.add, operator.iadd):
        return Call(_name(node), "restore", ("stream + branch",))
    return None


def _outlined(node: fx.Node, module: nn.Module | None) -> Call:
    """A call of an outlined function, with the calls that it makes."""
    function = node.args[0]
    assert isinstance(function, fx.Node)
    body = module.get_submodule(str(function.target)) if module is not None else None
    inner = [n for n in body.graph.nodes if n.op == "call_module"] if isinstance(body, fx.GraphModule) else []
    lines = tuple(f"· {str(n.target).removeprefix('lemo_')}" for n in inner)
    if node.target in (branch.branch, branch.token_wise_branch):
        return Call(_name(node), "branch", lines)
    scores = any(site_and_role(str(n.target))[1] == "score" for n in inner)
    return Call(_name(node), "score" if scores else "rest", lines)


def _name(node: fx.Node) -> str:
    """The node's name without the number that keeps it apart from an inner one."""
    head, _, tail = node.name.rpartition("_")
    return head if tail.isdigit() and head else node.name


def draw(graphs: Mapping[str, fx.Graph | fx.GraphModule], title: str = "") -> Figure:
    """Draw graphs side by side: under each caption a captured one, or a rewritten one from `lemo_fx.graphs`."""
    pictures = {caption: calls(graph) for caption, graph in graphs.items()}
    places = {caption: _places(picture) for caption, picture in pictures.items()}
    depth = -min(y for place in places.values() for y in place.values()) + 1.95
    roles = [r for r in ROLES if any(c.role == r for p in pictures.values() for _, c in p.nodes(data="call"))]
    spans = [_span(picture) for picture in pictures.values()]
    scale = 0.62
    legend_height = 0.27 * -(-len(roles) // 2) + 0.15
    size = (scale * sum(spans), scale * depth + legend_height + (0.35 if title else 0.0))
    figure = Figure(figsize=size)
    top = 1 - (0.35 / size[1] if title else 0.0)
    bottom = legend_height / size[1]
    left = 0.0
    for (caption, picture), span in zip(pictures.items(), spans, strict=True):
        share = span / sum(spans)
        axes = figure.add_axes((left, bottom, share, top - bottom))
        left += share
        axes.set(xlim=(-1.45, span - 1.45), ylim=(-depth + 0.75, 0.85))
        axes.axis("off")
        axes.text(-1.2, 0.6, caption, fontsize=10.5, fontweight="bold", va="center")
        _draw_edges(axes, picture, places[caption])
        _draw_boxes(axes, picture, places[caption])
    if title:
        figure.text(0.5, 1 - 0.2 / size[1], title, ha="center", va="center", fontsize=11.5)
    handles = [Patch(facecolor=ROLES[r][2], edgecolor=ROLES[r][1], label=ROLES[r][0]) for r in roles]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the suffix (png, svg, pdf) says how. The same graph gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "lemo_fx", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=200, facecolor="white", metadata=metadata)
    return path


def _span(picture: nx.DiGraph) -> float:
    farthest = max(call.column + WIDTH[call.column] / 2 for _, call in picture.nodes(data="call"))
    return farthest + 1.45 + 0.35


def _places(picture: nx.DiGraph) -> dict[str, float]:
    """Name -> vertical centre; one row per call, each below what it reads, what belongs together kept together."""
    places: dict[str, float] = {}
    y = 0.0
    order = {name: index for index, name in enumerate(picture)}
    backwards = nx.dfs_postorder_nodes(
        picture, sort_neighbors=lambda names: sorted(names, key=order.__getitem__, reverse=True)
    )
    for name in reversed(list(backwards)):
        call = picture.nodes[name]["call"]
        places[name] = y - call.height / 2 if places else 0.0
        y = places[name] - call.height / 2 - GAP
    return places


def _draw_boxes(axes, picture: nx.DiGraph, places: dict[str, float]) -> None:
    for name, call in picture.nodes(data="call"):
        width = WIDTH[call.column]
        _, edge, fill = ROLES[call.role]
        corner = (call.column - width / 2, places[name] - call.height / 2)
        style = "round,pad=0,rounding_size=0.09"
        axes.add_patch(FancyBboxPatch(corner, width, call.height, boxstyle=style, ec=edge, fc=fill, lw=1.3, zorder=3))
        top = places[name] + call.height / 2 - 0.1 - LINE / 2
        for row, line in enumerate((call.label, *call.lines)):
            font = {"fontsize": 7.2, "color": "#333333"} if row else {"fontsize": 8.2, "color": edge, "weight": "bold"}
            axes.text(call.column, top - LINE * row, line, ha="center", va="center", zorder=4, **font)


def _draw_edges(axes, picture: nx.DiGraph, places: dict[str, float]) -> None:
    last = min((name for name, call in picture.nodes(data="call") if call.column == SPINE), key=places.__getitem__)
    end = places[last] - picture.nodes[last]["call"].height / 2 - 0.6
    _line(axes, [(SPINE, 0.0), (SPINE, end)], width=2.6)
    for source, target in picture.edges:
        start, end_call = picture.nodes[source]["call"], picture.nodes[target]["call"]
        if start.column == end_call.column == SPINE:
            continue
        between = {
            call.column
            for name, call in picture.nodes(data="call")
            if name not in (source, target) and places[target] < places[name] < places[source]
        }
        points = _route(start, end_call, places[source], places[target], start.column in between)
        chosen = start.role == "select"
        colour = ROLES["select"][1] if chosen else ROLES[start.role][1] if start.role == "branch" else "#555555"
        _line(axes, points, color=colour, style=(0, (4, 2)) if chosen else "-")


def _route(start: Call, end: Call, y: float, goal: float, blocked: bool) -> list[tuple[float, float]]:
    """Corners of an edge between two boxes centred at heights y and goal; never behind a box of its own column."""
    half = WIDTH[start.column] / 2
    if start.column == SPINE:
        into = end.column - WIDTH[end.column] / 2
        if not blocked:
            return [(SPINE, goal), (into, goal)]
        # The stream has been added to since: leave it where it still was this value.
        lane = half + 0.12
        out = y - start.height / 2 - GAP / 2
        return [(SPINE, out), (lane, out), (lane, goal), (into, goal)]
    if start.column == end.column:
        if not blocked:
            return [(start.column, y - start.height / 2), (end.column, goal + end.height / 2)]
        gutter = start.column + half + 0.16
        return [(start.column + half, y), (gutter, y), (gutter, goal), (end.column + half, goal)]
    into = end.column + WIDTH[end.column] / 2
    # Tokens enter a little lower than rows, so that both can be told apart.
    goal += 0.1 if start.role != "select" else -0.16 if end.column == SPINE else 0.0
    if start.role == "select" or blocked:
        # Each selection has two gutters: to where tokens are used, and to where they are put back.
        gutter = start.column - half - (0.2 if end.column == SPINE else 0.36)
        out = y - 0.12 if end.column == SPINE else y + 0.08
        return [(start.column - half, out), (gutter, out), (gutter, goal), (into, goal)]
    return [(start.column, y - start.height / 2), (start.column, goal), (into, goal)]


def _line(axes, points, color: str = "#555555", style="-", width: float = 1.1) -> None:
    """A polyline with an arrow head at its end."""
    xs, ys = zip(*points, strict=True)
    if len(points) > 2:
        axes.plot(xs[:-1], ys[:-1], color=color, linestyle=style, lw=width, zorder=1, solid_joinstyle="miter")
    arrow = {"arrowstyle": "-|>", "color": color, "lw": width, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=arrow, zorder=2, annotation_clip=False)
