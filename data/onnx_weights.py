"""The weights of an ONNX file by name, without the onnx package: it reads protobuf's wire format.

Only what is needed: graph (field 7 of the model), its nodes (1) and initialisers (5), float32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FLOAT = 1  # ONNX's number of float32
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # protobuf's kinds of fields


class Node(NamedTuple):
    """One operation of the graph."""

    kind: str
    inputs: list[str]
    outputs: list[str]


class Graph(NamedTuple):
    """Operations in order, and the float32 tensors that they read."""

    nodes: list[Node]
    weights: dict[str, NDArray[np.float32]]


def read_graph(content: bytes) -> Graph:
    """The graph of a model file."""
    (graph,) = [value for number, value in _fields(memoryview(content)) if number == 7]
    assert isinstance(graph, memoryview)
    nodes, weights = [], {}
    for number, value in _fields(graph):
        if number == 1:
            nodes.append(_node(value))
        elif number == 5 and (found := _tensor(value)) is not None:
            weights[found[0]] = found[1]
    return Graph(nodes, weights)


def _node(content: int | memoryview) -> Node:
    fields = [
        (number, bytes(value).decode()) for number, value in _fields(content) if number in (1, 2, 4)
    ]
    inputs, outputs = ([value for n, value in fields if n == wanted] for wanted in (1, 2))
    return Node(next(value for n, value in fields if n == 4), inputs, outputs)


def _tensor(content: int | memoryview) -> tuple[str, NDArray[np.float32]] | None:
    """Name and values of a float32 tensor."""
    shape: list[int] = []
    kind, name, raw = 0, "", b""
    for number, value in _fields(content):
        if number == 1:  # one dimension, or all of them packed
            shape += [value] if isinstance(value, int) else [n for n, _ in _numbers(value)]
        elif number == 2:
            kind = int(value)
        elif number == 8:
            name = bytes(value).decode()
        elif number in (4, 9):
            raw = bytes(value)
    return (name, np.frombuffer(raw, dtype="<f4").reshape(shape)) if kind == FLOAT else None


def _numbers(content: memoryview) -> Iterator[tuple[int, int]]:
    """Every variable-length number, and the place after it."""
    at = 0
    while at < len(content):
        number, at = _number(content, at)
        yield number, at


def _number(content: memoryview, at: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        byte = content[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at


def _fields(content: int | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of every field of a message."""
    assert isinstance(content, memoryview)
    at = 0
    while at < len(content):
        key, at = _number(content, at)
        match key & 7:
            case 0:
                value, at = _number(content, at)
                yield key >> 3, value
                continue
            case 2:
                size, at = _number(content, at)
            case other:
                size = {EIGHT: 8, FOUR: 4}[other]
        yield key >> 3, content[at : at + size]
        at += size
