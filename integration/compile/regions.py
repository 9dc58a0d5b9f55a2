"""A compiler backend for decode steps: the traced step is cut at Twilight's operators, and pieces that are equal are compiled once.

A model of 32 equal layers has three different pieces instead of 33, so it compiles in the time of two layers. The operators between them
are called as they are. What a piece costs the host on every call vanishes where the step is recorded as a CUDA graph.

A step that cannot be cut without changing what it means is compiled as one, with a warning that says why. The backend changes no
parameter and keeps none: every call computes on the tensors that it is given.

PyTorch has no public way to compile a part of a traced graph, so this rests on private ones; `private` imports them all. A FakeTensorMode
runs the step without computing, and a TorchDispatchMode watches it, to know shapes, aliases and writes before anything is cut. A
TracingContext of its own keeps the guards of a piece apart from those of the step. Where the first or the last is missing, or any of this
fails, the step is compiled as one, with the warning; results stay what they were. Two conventions of Dynamo have no name to import:
`node.meta["example_value"]` is a node's fake value, `node.meta["grapharg"]` holds the example input and is dropped.
"""

from __future__ import annotations

import copy
import itertools
import operator
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from .private import (
    MISSING,
    FakeTensorMode,
    OpOverload,
    ShapeEnv,
    TorchDispatchMode,
    TracingContext,
    is_traceable_wrapper_subclass,
    lookup_backend,
    set_grad_enabled,
    tracing,
)
from .rewrites import Maker, join_side_by_side, lie_side_by_side, lift_constants, name_of, reduce_in_one_shot, take_local_shards

_numbers = itertools.count(1)


class Uncuttable(Exception):
    """The step would mean something else if it were compiled in pieces; says why."""


_calls: ContextVar[list[int] | None] = ContextVar("calls", default=None)


def calls_of(step: Callable[[], object]) -> list[int]:
    """Runs `step`; returns the numbers of the compiled graphs that it called: each that `compile_regions` made has its own."""
    numbers: list[int] = []
    outer = _calls.set(numbers)
    try:
        step()
        return numbers
    finally:
        _calls.reset(outer)


def compile_regions(graph: fx.GraphModule, example_inputs: Sequence[Tensor], compiler: Callable | None = None) -> Callable[..., tuple]:
    """Compiles a traced step, equal pieces once: a backend of torch.compile(dynamic=False).

    Linear layers of one input whose weights lie side by side in memory, see `join_linears`, become one product for as long as they lie
    there; all-reduces of a sharded model become one launch each, see `reduce_in_one_shot`.

    Args:
        graph, example_inputs: as Dynamo hands them over.
        compiler: of a piece, or of the whole; takes a module that returns a tuple, and its inputs, fake ones for a piece. None: inductor.

    Warns:
        UserWarning: the step is compiled as one, and why. It computes the same; compiling it takes longer.
    """
    compiler = compiler or lookup_backend("inductor")
    try:
        step = _Step(graph, example_inputs, compiler)
    except Exception as error:
        why = str(error) if isinstance(error, Uncuttable) else f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        warnings.warn(
            f"compile_regions: the step is compiled as one, which takes about four times as long for 32 equal layers, because {why}",
            stacklevel=2,
        )
        step = None
    step = step or compiler(graph, example_inputs)
    number = next(_numbers)

    def call(*arguments):
        if (numbers := _calls.get()) is not None:
            numbers.append(number)
        return step(*arguments)

    return call


class _Step:
    """A compiled step: one variant for weights that lie side by side as they did at first, one for weights that do not any more."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence, compiler: Callable):
        if MISSING is not None:
            raise Uncuttable(f"this PyTorch lacks what cutting needs: {MISSING}")
        self.compiler = compiler
        self.graph = _own_copy(graph)  # Dynamo goes on to read its own
        self.makers: list[Maker] = []
        values = list(example_inputs)
        refuse_what_pieces_lack(self.graph, values)
        take_local_shards(self.graph, values, self.makers)
        lift_constants(self.graph, self.makers)
        reduce_in_one_shot(self.graph, self.makers)
        self.graph.recompile()
        values = completed(values, self.makers)
        self.joined = self._pieces(values, join=True)
        self.apart: _Pieces | None = None  # made when first needed

    def _pieces(self, values: Sequence, join: bool) -> _Pieces:
        return _Pieces(_own_copy(self.graph), values, self.compiler, join)

    def __call__(self, *arguments) -> tuple:
        values = completed(arguments, self.makers)
        if self.joined.accepts(values):
            return self.joined(values)
        if self.apart is None:
            self.apart = self._pieces(values, join=False)
        return self.apart(values)


@torch.no_grad()
def completed(values: Sequence, makers: Sequence[Maker]) -> list:
    """Inputs, and behind them what the makers make of all before."""
    values = list(values)
    for make in makers:
        values.append(make(values))
    return values


def _own_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares no node, and does not keep the example inputs alive."""
    copied = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in copied.graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)
    return copied


# ---- what the step reads ----


def refuse_what_pieces_lack(graph: fx.GraphModule, values: Sequence) -> None:
    """Raises `Uncuttable` for sizes that change and for gradients: guards and a backward of the whole step are nobody's then."""
    for node in graph.graph.nodes:
        for value in _leaves(node.meta.get("example_value")):
            sizes = (*value.shape, *value.stride(), value.storage_offset()) if isinstance(value, Tensor) else (value,)
            if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
                raise Uncuttable(f"{node.name} has a size that changes (torch.compile needs dynamic=False)")
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise Uncuttable("gradients are recorded (a decode step needs torch.no_grad())")


def _leaves(value) -> list:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (tuple, list)) else [value]


# ---- cutting ----


@dataclass
class _Part:
    """Neighbouring nodes of a step: a piece to compile, or operators that are called as they are."""

    nodes: list[fx.Node]
    compiled: bool
    inputs: list[fx.Node]
    outputs: list[fx.Node]

    def module(self, root: fx.GraphModule) -> fx.GraphModule:
        """Takes `inputs`, returns a tuple of `outputs`."""
        graph, copies = fx.Graph(), {}
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)

        def own(node: fx.Node) -> fx.Node:
            if node not in copies:  # a module that a higher-order operator calls
                copies[node] = graph.node_copy(node)
            return copies[node]

        for node in self.nodes:
            copies[node] = graph.node_copy(node, own)
        graph.output(tuple(copies[node] for node in self.outputs))
        return fx.GraphModule(root, graph)


def _runs_as_it_is(node: fx.Node) -> bool:
    """Operators that one launch serves, and what handles sharded tensors, which a piece could not take."""
    if node.op == "call_function" and str(node.target).startswith(("twilight.", "symm_mem.")):
        return True
    return any(isinstance(other.meta.get("example_value"), DTensor) for other in (node, *node.all_input_nodes))


def cut_at_operators(graph: fx.GraphModule, values: dict[fx.Node, object]) -> list[_Part]:
    """Cuts a step whose nodes have these values; raises `Uncuttable` where a cut would separate what belongs together."""
    part: dict[fx.Node, int] = {}
    parts: list[_Part] = []
    regions, grad, last_grad = set(), torch.is_grad_enabled(), torch.is_grad_enabled()
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if source in part and not isinstance(values[source], Tensor):
            # What returns a tuple is taken apart beside it, so that only tensors cross from part to part.
            part[node] = part[source]
        else:
            compiled = not _runs_as_it_is(node)
            if not parts or parts[-1].compiled != compiled:
                if regions or grad != last_grad:
                    raise Uncuttable("autocast or a gradient mode that the step itself turns on surrounds an operator")
                parts.append(_Part([], compiled, [], []))
            part[node] = len(parts) - 1
        parts[part[node]].nodes.append(node)
        if name_of(node).startswith("_enter_"):
            regions.add(node)
        elif name_of(node).startswith("_exit_"):
            regions.discard(node.args[0])
        elif node.target is set_grad_enabled:
            last_grad = node.args[0]
    for node in graph.graph.nodes:
        for source in node.all_input_nodes:
            home = part.get(source)
            if source.op == "get_attr" or (node in part and part[node] == home):
                continue
            if home is not None and source not in parts[home].outputs:
                parts[home].outputs.append(source)
            if node in part and source not in parts[part[node]].inputs:
                parts[part[node]].inputs.append(source)
    for piece in parts:
        for node in (*piece.inputs, *piece.outputs) if piece.compiled else ():
            if not isinstance(values[node], Tensor) or isinstance(values[node], DTensor):
                raise Uncuttable(f"{node.name}, a {type(values[node]).__name__}, would cross from piece to piece")
    return parts


# ---- what a step does, on fake tensors ----


class _Writes(TorchDispatchMode):
    """Notes the memory that operators write to."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):  # a higher-order operator does not say what it writes to
            self._note((*args, *kwargs.values()))
            return func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise Uncuttable(f"{func} changes the shape or the memory of a tensor in place")
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named:
                self._note(named[argument.name])
        return func(*args, **kwargs)

    def _note(self, value) -> None:
        self.written.update(storages(value))


def storages(value) -> list[int]:
    """Which memory tensors hold, while they are alive."""
    if isinstance(value, dict):
        return storages(list(value.values()))
    if isinstance(value, (tuple, list)):
        return [key for item in value for key in storages(item)]
    if not isinstance(value, Tensor):
        return []
    if is_traceable_wrapper_subclass(value):
        return storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    return [value.untyped_storage()._cdata]


class _FakeRun(fx.Interpreter):
    """Runs a step on fake tensors: `values` of all nodes, and whether and where they write."""

    def __init__(self, graph: fx.GraphModule, fake_mode: FakeTensorMode, inputs: Sequence):
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[fx.Node, object] = {}
        self.writes: dict[fx.Node, set[int]] = {}
        self._recorder = _Writes()
        self._entered: dict[fx.Node, object] = {}  # autocast and the like
        grad = torch.is_grad_enabled()
        try:
            with fake_mode, self._recorder:
                self.run(*inputs)
        finally:
            for region in reversed(self._entered.values()):
                region.__exit__(None, None, None)
            torch.set_grad_enabled(grad)

    def run_node(self, n: fx.Node):
        self._recorder.written = set()
        self.values[n] = super().run_node(n)
        self.writes[n] = self._recorder.written
        if name_of(n).startswith("_enter_"):
            self._entered[n] = self.values[n]
        elif name_of(n).startswith("_exit_"):
            self._entered.pop(n.args[0], None)
        return self.values[n]


def refuse_lost_aliases(parts: Sequence[_Part], values: dict[fx.Node, object], writes: dict[fx.Node, set[int]]) -> None:
    """Raises `Uncuttable` where a write has to be seen through another tensor, and the pieces' compilers are not bound to keep it so.

    Views of a piece's inputs stay views, but two results of a piece that share memory need not.
    """
    made_by: dict[int, int] = {}
    for index, part in enumerate(parts):
        written = set().union(*(writes[node] for node in part.nodes))
        for key in written:
            maker = made_by.get(key)
            if maker is not None and parts[maker].compiled:
                raise Uncuttable("a tensor that one piece makes is written to in another")
        if part.compiled:
            holders = [{*storages(tensor)} & written for tensor in {id(values[node]): values[node] for node in part.inputs}.values()]
            if sum(map(len, holders)) > len(set().union(*holders)):
                raise Uncuttable("a piece writes to an input that shares memory with another")
        given = {key for node in part.inputs for key in storages(values[node])}
        for node in part.outputs:
            for key in storages(values[node]):
                if key not in given:
                    made_by.setdefault(key, index)


# ---- pieces ----


class _Pieces:
    """A step in compiled pieces, for inputs laid out like `values`."""

    def __init__(self, graph: fx.GraphModule, values: Sequence, compiler: Callable, join: bool):
        fake_mode = FakeTensorMode(shape_env=ShapeEnv())
        run = _FakeRun(graph, fake_mode, [_fake(value, fake_mode) for value in values])
        self.makers: list[Maker] = []
        self.joints: list[list[int]] = []  # inputs that have to lie side by side
        if join:
            self.joints = join_side_by_side(graph, values, self.makers, run.writes)
            if self.joints:
                graph.recompile()
                run = _FakeRun(graph, fake_mode, [_fake(value, fake_mode) for value in completed(values, self.makers)])
        parts = cut_at_operators(graph, run.values)
        refuse_lost_aliases(parts, run.values, run.writes)
        slots = {node: slot for slot, node in enumerate(graph.graph.nodes)}
        by_structure: dict[tuple, Callable] = {}
        last_use = {source: part for part, of in enumerate(parts) for source in of.inputs}
        returned = graph.graph.output_node().args[0]
        self.slots = len(slots)
        self.inputs = [slots[node] for node in graph.graph.find_nodes(op="placeholder")]
        self.outputs = [(slots[value], None) if isinstance(value, fx.Node) else (None, value) for value in returned]
        kept = {slot for slot, _ in self.outputs}
        self.steps = []  # (callable, slots of its inputs, of its outputs, of what nobody reads any more)
        for index, part in enumerate(parts):
            module = part.module(graph)
            call = module.forward
            if part.compiled:
                inputs = [run.values[node] for node in part.inputs]
                key = structure(module, inputs, [run.values[node] for node in part.outputs])
                if key not in by_structure:
                    # In a context of its own: guards and metadata of one piece are not those of the step.
                    with tracing(TracingContext(fake_mode)):
                        by_structure[key] = compiler(module, inputs)
                call = by_structure[key]
            dead = [slots[node] for node in part.inputs if last_use[node] == index and slots[node] not in kept]
            self.steps.append((call, [slots[node] for node in part.inputs], [slots[node] for node in part.outputs], dead))

    def accepts(self, values: Sequence) -> bool:
        return all(lie_side_by_side([values[index] for index in joint]) for joint in self.joints)

    def __call__(self, values: Sequence) -> tuple:
        held: list = [None] * self.slots
        for slot, value in zip(self.inputs, completed(values, self.makers), strict=True):
            held[slot] = value
        for call, inputs, outputs, dead in self.steps:
            results = call(*[held[slot] for slot in inputs])
            for slot, result in zip(outputs, results, strict=True):
                held[slot] = result
            for slot in dead:
                held[slot] = None
        return tuple(value if slot is None else held[slot] for slot, value in self.outputs)


def _fake(value, fake_mode: FakeTensorMode):
    """What pieces are compiled for. Sharded tensors and what is no tensor, a device mesh for one, go to parts that run as they are."""
    return fake_mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) and not isinstance(value, DTensor) else value


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to nothing but the same object, which it keeps, so that no other can take its address."""

    value: object

    def __eq__(self, other) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def structure(module: fx.GraphModule, inputs: Sequence, outputs: Sequence) -> tuple:
    """What two pieces have in common when one compiled function serves both: operations, constants, wiring, their inputs' layout, and
    which of them share memory that is returned, since the compiler may take a result for a view of any of these."""
    number = {node: index for index, node in enumerate(module.graph.nodes)}

    def plain(value):
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(plain, value))
        if isinstance(value, dict):
            return ("dict", *((plain(name), plain(item)) for name, item in value.items()))
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        if isinstance(value, (int, float, complex)):
            return (type(value).__qualname__, repr(value))  # 0.0 and -0.0, 1 and True are equal, and not the same
        try:
            hash(value)
        except TypeError:
            return _Same(value)
        return (type(value), value)

    def layout(value):
        if not isinstance(value, Tensor):
            return plain(value)
        common = (type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            return (*common, plain(context), *((name, layout(getattr(value, name))) for name in names))
        return (*common, value.storage_offset(), value.is_conj(), value.is_neg())

    def target(node: fx.Node):
        if node.op == "placeholder":
            return None
        if node.op in ("get_attr", "call_module"):
            return _Same(operator.attrgetter(node.target)(module))
        return node.target

    def written(node: fx.Node) -> tuple:
        return () if node.op == "placeholder" else (plain(node.args), plain(node.kwargs))

    nodes = tuple((node.op, target(node), *written(node)) for node in module.graph.nodes)
    # A tensor given twice is compiled as one.
    first = {id(value): index for index, value in reversed(list(enumerate(inputs)))}
    returned = set(storages(list(outputs)))
    memory = [[key for key in storages(value) if key in returned] for value in inputs]
    first_holder = {key: index for index, keys in reversed(list(enumerate(memory))) for key in keys}
    return (
        nodes,
        tuple(map(layout, inputs)),
        tuple(first[id(value)] for value in inputs),
        tuple(tuple(first_holder[key] for key in keys) for keys in memory),
    )
