# SPDX-License-Identifier: Apache-2.0
"""What calls read, seen through views.

A view computes nothing, so whatever needs one can make it again; an item of a call with
several results is of that call.
"""

from __future__ import annotations

import operator
from typing import Final

import torch
from torch.fx import Node

from zfunc.program import ir

_UNSAFE_VIEW: Final = torch.ops.aten._unsafe_view.default


def is_view(node: Node) -> bool:
    """True for a node that only looks at the memory of what it is given."""
    if is_item(node):
        return is_view(node.args[0])  # type: ignore[arg-type]
    return node.target is _UNSAFE_VIEW or ir.is_view(node)


def is_item(node: Node) -> bool:
    """True for one of several results."""
    return node.target is operator.getitem


def made_by(node: Node) -> Node:
    """The call whose result a node is, or is an item of."""
    return node.args[0] if is_item(node) else node  # type: ignore[return-value]


def sources(node: Node, *, calls_only: bool = False) -> list[Node]:
    """What a node reads: inputs of the program, and results of calls or their items."""
    found: dict[Node, None] = {}
    todo = list(node.all_input_nodes)
    while todo:
        read = todo.pop()
        if is_view(read) or (calls_only and is_item(read)):
            todo += read.all_input_nodes
        elif not (calls_only and read.op == "placeholder"):
            found[read] = None
    return list(found)


def readers(node: Node) -> list[Node]:
    """The calls that read a value."""
    found: dict[Node, None] = {}
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if is_view(user):
            todo += user.users
        elif user.op == "call_function":
            found[user] = None
    return list(found)
