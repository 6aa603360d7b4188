"""Hand-built layers of two MLP branches, in every way of adding them, and their rewrites."""

import torch
from torch import nn

from lemo_fx.graph.capture import capture, graph_module
from lemo_fx.graph.sites import find_sites
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite
from lemo_fx.runtime.scores import RandomScore
from lemo_fx.runtime.select import SelectBlocks
from lemo_fx.runtime.step import Step


class Layer(nn.Module):
    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, attention_mask=None):
        x = x + self.first(self.norm(x))
        return x + self.second(self.norm(x))


class Parallel(Layer):
    def forward(self, x, attention_mask=None):
        return x + self.first(self.norm(x)) + self.second(self.norm(x))


class ParallelByFunction(Layer):
    def forward(self, x, attention_mask=None):
        return torch.add(torch.add(x, self.first(self.norm(x))), self.second(self.norm(x)))


class ParallelByMethod(Layer):
    def forward(self, x, attention_mask=None):
        return x.add(self.first(self.norm(x))).add(self.second(self.norm(x)))


class ParallelInPlace(Layer):
    def forward(self, x, attention_mask=None):
        y = self.second(self.norm(x))
        y += self.first(self.norm(x)) + x
        return y


PARALLEL = [Parallel, ParallelByFunction, ParallelByMethod, ParallelInPlace]


def rewrite_of(layer, treatments=("skip", "skip"), score="random"):
    graph = capture(layer)
    sites, refusals = find_sites(graph)
    assert not refusals
    planned = [PlannedSite(f"mlp_{i}", s, t, score) for i, (s, t) in enumerate(zip(sites, treatments, strict=True))]
    rewrite = LayerRewrite(layer, graph, planned)
    for i, site in enumerate(planned):
        if site.treatment:
            rewrite.modules[f"lemo_mlp_{i}_score"] = RandomScore(i + 1, 4)
            rewrite.modules[f"lemo_mlp_{i}_select"] = SelectBlocks(4, 0.5, Step())
    return rewrite


def count(graph, *targets):
    return sum(node.target in targets for node in graph.nodes)


def output_of(rewrite, x):
    """The rewritten layer's output."""
    for name, part in rewrite.modules.items():
        rewrite.layer.add_module(name, part)
    return graph_module(rewrite.layer, rewrite.graph, rewrite.functions)(x)
