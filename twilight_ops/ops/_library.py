"""The `twilight` operator library: flat schemas derived from grouped Python signatures, fakes, and calls in both forms.

Schemas stay in Python because tags on a schema need libtorch 2.12 from C++, and we support 2.11. Processes without this package take
those of `csrc/schemas.cpp`, a copy that `tests/test_export.py` compares; what has asked for them and imports this package keeps them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ._checks import NO_BACKWARD

LIBRARY = torch.library.Library(ops.name, "DEF")

# Inductor must hand over tensors with the strides that eager would have given them: q, k and v arrive as transposed
# views of a projection and every kernel reads strides, so no copy is ever needed.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_TYPES = {Tensor: "Tensor", int: "int", float: "float", str: "str"}


def define(schema: str, tags: Sequence[torch.Tag] = ()) -> None:
    """Defines an operator by its schema without the namespace, where the native library has not done so.

    Raises:
        RuntimeError: it has, and otherwise: it is of another version.
    """
    known = getattr(ops, schema.partition("(")[0], None)
    if known is None:
        LIBRARY.define(schema, tags=tags)
    elif (found := known.default._schema) != (wanted := torch._C.parse_schema(add_op_namespace_prefix(schema))):
        raise RuntimeError(f"twilight_ops: schema: expected {wanted}, got {found} from a native library of another version")


class _Leaf(NamedTuple):
    """One argument of a flat schema."""

    name: str
    kind: str
    default: Any  # inspect.Parameter.empty where there is none


class _Node(NamedTuple):
    """A parameter of the grouped signature: one leaf, or a group of nodes."""

    group: type | None
    parts: tuple[Any, ...]  # of _Node for a group, of one _Leaf else
    optional: bool

    @property
    def leaves(self) -> list[_Leaf]:
        return list(self.parts) if self.group is None else [leaf for part in self.parts for leaf in part.leaves]


def _node(name: str, annotation: Any, default: Any, optional: bool = False) -> _Node:
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    optional = optional or len(kinds) != len(get_args(annotation) or (annotation,))
    if kinds[0] in _TYPES:
        question = "?" if optional else ""
        return _Node(None, (_Leaf(name, _TYPES[kinds[0]] + question, default),), optional)
    hints, defaults = get_type_hints(kinds[0]), kinds[0]._field_defaults
    missing = inspect.Parameter.empty
    parts = []
    for field, hint in hints.items():
        own = None if optional else getattr(default, field) if isinstance(default, tuple) else defaults.get(field, missing)
        parts.append(_node(field, hint, own, optional))
    return _Node(kinds[0], tuple(parts), optional)


class Operator:
    """`twilight::<name>` in its two forms: the groups that Python passes, and the flat arguments that the dispatcher passes.

    Args:
        signature: a function with annotated parameters: tensors, numbers, and groups of `twilight_ops/arguments.py`.
        returns: of the schema.
        check: takes the groups, raises RuntimeError on the first malformed argument.
        outputs: takes the groups, allocates the results.
        mutates: flat arguments that the operator writes.
    """

    def __init__(
        self,
        signature: Callable[..., Any],
        returns: str,
        check: Callable[..., None],
        outputs: Callable[..., Any],
        mutates: Sequence[str] = (),
    ):
        self.name = signature.__name__
        self.check, self.outputs = check, outputs
        hints = get_type_hints(signature)
        parameters = inspect.signature(signature).parameters.values()
        self.nodes = [_node(parameter.name, hints[parameter.name], parameter.default) for parameter in parameters]
        self.leaves = [leaf for node in self.nodes for leaf in node.leaves]
        self.widths = tuple(len(node.leaves) for node in self.nodes)
        self.arguments, self.returns = self._flat_arguments(mutates), returns
        define(f"{self.name}({self.arguments}) -> {returns}", _TAGS)
        torch.library.register_fake(add_op_namespace_prefix(self.name), self.flat(self._fake), lib=LIBRARY)
        self.overload = getattr(ops, self.name).default

    def _flat_arguments(self, mutates: Sequence[str]) -> str:
        """The argument list of the schema; only what nothing without a default follows may have one."""
        arguments: list[str] = []
        optional = True
        for leaf in reversed(self.leaves):
            optional = optional and leaf.default is not inspect.Parameter.empty
            kind = leaf.kind
            if leaf.name in mutates:
                kind = kind.replace("Tensor", f"Tensor({chr(ord('a') + mutates.index(leaf.name))}!)")
            arguments.append(f"{kind} {leaf.name}" + (f"={leaf.default}" if optional else ""))
        return ", ".join(reversed(arguments))

    def _fake(self, *groups: Any) -> Any:
        self.check(*groups)
        return self.outputs(*groups)

    def __call__(self, *groups: Any) -> Any:
        return call(self.overload, flatten(self.widths, groups))

    def values(self, arguments: Sequence[Any], named: dict[str, Any]) -> list[Any]:
        """The flat arguments of a call, all of them: PyTorch leaves out trailing defaults."""
        values = list(arguments)
        for leaf in self.leaves[len(values) :]:
            value = named.pop(leaf.name, leaf.default)
            if value is inspect.Parameter.empty:
                raise TypeError(f"{add_op_namespace_prefix(self.name)}: {leaf.name}: expected an argument, got none")
            values.append(value)
        if named:
            raise TypeError(f"{add_op_namespace_prefix(self.name)}: {next(iter(named))}: expected an argument of the operator, got another")
        return values

    def groups(self, values: Sequence[Any]) -> list[Any]:
        """The grouped arguments made of flat ones; an optional group is None where all of it is."""
        return _regroup(self.nodes, iter(values))

    def flat(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which takes groups, as a function of flat arguments: what the dispatcher calls."""

        @functools.wraps(run)
        def flat_run(*arguments: Any, **named: Any) -> Any:
            return run(*self.groups(self.values(arguments, named)))

        return flat_run

    def kernel(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same behind the operator's checks."""

        @functools.wraps(run)
        def checked(*groups: Any) -> Any:
            self.check(*groups)
            return run(*groups)

        return self.flat(checked)


def _regroup(nodes: Sequence[_Node], values: Iterator[Any]) -> list[Any]:
    out: list[Any] = []
    for node in nodes:
        if node.group is None:
            out.append(next(values))
            continue
        parts = _regroup(node.parts, values)
        out.append(None if node.optional and all(part is None for part in parts) else node.group(*parts))
    return out


def flatten(widths: Sequence[int], groups: Sequence[Any]) -> list[Any]:
    """The flat arguments of grouped ones; a missing group is as many None."""
    flat: list[Any] = []
    for width, group in zip(widths, groups, strict=True):
        if group is None:
            flat.extend([None] * width)
        else:
            _extend(flat, (group,))
    return flat


def _extend(flat: list[Any], group: Sequence[Any]) -> None:
    for value in group:
        if isinstance(value, tuple):
            _extend(flat, value)
        else:
            flat.append(value)


def empty_lists(like: Tensor, batch: int, kv_heads: int, capacity: int) -> tuple[Tensor, Tensor]:
    """indices [B, Hkv, capacity] and counts [B, Hkv], int32."""
    return like.new_empty((batch, kv_heads, capacity), dtype=torch.int32), like.new_empty((batch, kv_heads), dtype=torch.int32)


def _first_requiring_grad(tensors: list[Tensor]) -> int:
    """Index of the first tensor that asks for a gradient, or -1."""
    return next((i for i, tensor in enumerate(tensors) if tensor.requires_grad), -1)


# The stable ABI cannot ask a tensor: the C++ kernels call this, and only while gradients are enabled.
define("_first_requiring_grad(Tensor[] tensors) -> int")
LIBRARY.impl("_first_requiring_grad", _first_requiring_grad, "CompositeExplicitAutograd")


def call(op: torch._ops.OpOverload, arguments: Sequence[Any]) -> Any:
    """`op(*arguments)`; under `torch.func` only a wrapper knows that a gradient is asked for, and no kernel sees it."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for argument, value in zip(op._schema.arguments, arguments, strict=True):
            if isinstance(value, Tensor) and value.requires_grad:
                name = op._schema.name
                raise RuntimeError(f"{name}: {argument.name}: expected {NO_BACKWARD[0]}, got {NO_BACKWARD[1]}")
    return op(*arguments)
