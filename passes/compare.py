"""The first attention of a graph asks whether all ranks have made the same call: see fuse.parallel.alike."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Graph

from fuse.ir.serial import in_graph
from fuse.parallel.plan import Plan


def compare_first(graph: Graph) -> None:
    found = graph.find_nodes(op="call_function", target=torch.ops.fuse.context_attention.default)
    for node in found[:1]:
        *others, plan = node.args
        node.args = (*others, in_graph(replace(Plan.from_json(plan), compares=True).to_json()))
