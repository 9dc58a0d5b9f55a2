"""A compiler backend for decode steps: the traced step is cut at Twilight's operators, and pieces that are equal are compiled once.

A model of 32 equal layers has three different pieces instead of 33, so it compiles in the time of two layers. The operators between them
are called as they are. What a piece costs the host on every call vanishes where the step is recorded as a CUDA graph.

A step that cannot be cut without changing what it means is compiled as one, with a warning that says why. The backend changes no
parameter and keeps none: every call computes on the tensors that it is given.
"""

from __future__ import annotations

import copy
import enum
import itertools
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

try:  # Private names: where a PyTorch lacks one, every step is compiled as one.
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    MISSING = None
except ImportError as error:  # pragma: no cover
    MISSING = error

PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
# Linear layers that read one input in transformers' decoders. A name that is not there, or reads another input, costs nothing.
JOINED_LINEARS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
JOIN_ALIGNMENT = 16  # bytes; the compiler copies inputs that start elsewhere on every call
# Dynamo 2.11 fails to trace a sharded parameter whose local part is a view, so a second decoder could not be made; 2.13 traces it.
JOINS_SHARDS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)
# Up to so many bytes every process adds up what it reads from the others. Two H200s, 8 KB: through NCCL a sum costs a step 22 us, so 17.
ONE_SHOT_BYTES = 512 * 1024
ONE_SHOT_DTYPES = (torch.float32, torch.bfloat16)

# An input that the backend adds: computed before every call from all inputs before it.
Maker = Callable[[list], Tensor]
_numbers = itertools.count(1)


class Uncuttable(Exception):
    """The step would mean something else if it were compiled in pieces; says why."""


class _Called(threading.local):
    number = 0


_called = _Called()


def last_called() -> int:
    """The number of the compiled step that this thread called last, 0 for none: every step that `compile_regions` made has its own."""
    return _called.number


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
        _called.number = number
        return step(*arguments)

    return call


class _Step:
    """A compiled step: variants for weights that lie side by side and for weights that do not, made when first needed."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence, compiler: Callable):
        if MISSING is not None:
            raise Uncuttable(f"this PyTorch lacks what cutting needs: {MISSING}")
        self.compiler = compiler
        self.graph = _own_copy(graph)  # Dynamo goes on to read its own
        self.makers: list[Maker] = []
        values = list(example_inputs)
        refuse_what_pieces_lack(self.graph, values)
        lift_constants(self.graph, self.makers)
        take_local_shards(self.graph, values, self.makers)
        reduce_in_one_shot(self.graph, self.makers)
        self.graph.recompile()
        self.joined: _Pieces | None = None
        self.apart: _Pieces | None = None
        self._choose(self._complete(values))

    @torch.no_grad()
    def _complete(self, arguments: Sequence) -> list:
        values = list(arguments)
        for make in self.makers:
            values.append(make(values))
        return values

    def _choose(self, values: list) -> _Pieces:
        """The variant for these inputs; compiles it where there is none yet."""
        if self.joined is None and self.apart is None:
            pieces = _Pieces(_own_copy(self.graph), values, self.compiler, join=True)
            self.joined, self.apart = (pieces, None) if pieces.joints else (None, pieces)
        if self.joined is not None and self.joined.accepts(values):
            return self.joined
        if self.apart is None:
            self.apart = _Pieces(_own_copy(self.graph), values, self.compiler, join=False)
        return self.apart

    def __call__(self, *arguments) -> tuple:
        values = self._complete(arguments)
        return self._choose(values)(values)


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


def _add_input(graph: fx.GraphModule, makers: list[Maker], name: str, make: Maker) -> fx.Node:
    """A placeholder after all others."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    before = graph.graph.inserting_after(placeholders[-1]) if placeholders else graph.graph.inserting_before(next(iter(graph.graph.nodes)))
    with before:
        node = graph.graph.placeholder(name)
    makers.append(make)
    return node


def lift_constants(graph: fx.GraphModule, makers: list[Maker]) -> None:
    """Turns tensors that the graph holds into inputs, in place, so that a compiled piece holds none and serves its equals."""
    lifted: dict[str, fx.Node] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(node.target)(graph)
        if isinstance(value, Tensor):
            if node.target not in lifted:
                lifted[node.target] = _add_input(graph, makers, f"constant_{len(lifted)}", lambda values, value=value: value)
            node.replace_all_uses_with(lifted[node.target])
            graph.graph.erase_node(node)


def take_local_shards(graph: fx.GraphModule, values: Sequence, makers: list[Maker]) -> None:
    """Replaces the local parts of sharded parameters by inputs of their own, in place: pieces see plain tensors."""
    for index, (node, value) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), values, strict=True)):
        if isinstance(value, DTensor) and node.users and all("to_local" in _name(user) for user in node.users):
            # The very tensor that the parameter holds, since no gradient is asked for.
            local = _add_input(graph, makers, f"{node.name}_local", lambda values, index=index: values[index].to_local())
            for user in list(node.users):
                user.replace_all_uses_with(local)
                graph.graph.erase_node(user)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


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
        as_it_is = _runs_as_it_is(node)
        if not parts or parts[-1].compiled == as_it_is:
            if regions or grad != last_grad:
                raise Uncuttable("autocast or a gradient mode that the step itself turns on surrounds an operator")
            parts.append(_Part([], not as_it_is, [], []))
        part[node] = len(parts) - 1
        # What returns a tuple is taken apart beside it, so that only tensors cross from part to part.
        source = node.args[0] if node.target is operator.getitem else None
        if source in part and not isinstance(values[source], Tensor):
            part[node] = part[source]
        parts[part[node]].nodes.append(node)
        if _name(node).startswith("_enter_"):
            regions.add(node)
        elif _name(node).startswith("_exit_"):
            regions.discard(node.args[0])
        elif node.target is torch._C._set_grad_enabled:
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


def _changes_modes(node: fx.Node) -> bool:
    return node.op == "call_function" and _name(node).startswith(("_enter_", "_exit_", "_set_grad_enabled"))


# ---- what a step does, on fake tensors ----


class _Writes(TorchDispatchMode):
    """Notes the memory that operators write to."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # a higher-order operator does not say what it writes to
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
        if _name(n).startswith("_enter_"):
            self._entered[n] = self.values[n]
        elif _name(n).startswith("_exit_"):
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

    def __init__(self, graph: fx.GraphModule, values: list, compiler: Callable, join: bool):
        fake_mode = FakeTensorMode(shape_env=ShapeEnv())
        fakes = [_fake(value, fake_mode) for value in values]
        run = _FakeRun(graph, fake_mode, fakes)
        self.makers: list[Maker] = []
        self.joints: list[list[int]] = []  # inputs that have to lie side by side
        if join:
            self.joints = join_side_by_side(graph, values, self.makers, run.writes)
            if self.joints:
                graph.recompile()
                for make in self.makers:
                    values = [*values, make(values)]
                run = _FakeRun(graph, fake_mode, [_fake(value, fake_mode) for value in values])
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
                key = structure(module, inputs)
                if key not in by_structure:
                    # In a context of its own: guards and metadata of one piece are not those of the step.
                    with tracing(TracingContext(fake_mode)):
                        by_structure[key] = compiler(module, inputs)
                call = by_structure[key]
            dead = [slots[node] for node in part.inputs if last_use[node] == index and slots[node] not in kept]
            self.steps.append((call, [slots[node] for node in part.inputs], [slots[node] for node in part.outputs], dead))

    def accepts(self, values: Sequence) -> bool:
        return all(lie_side_by_side([values[index] for index in joint]) for joint in self.joints)

    def __call__(self, values: list) -> tuple:
        for make in self.makers:
            values.append(make(values))
        held: list = [None] * self.slots
        for slot, value in zip(self.inputs, values, strict=True):
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


_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum)


def structure(module: fx.GraphModule, inputs: Sequence) -> tuple:
    """What two pieces have in common when one compiled function serves both: operations, constants, wiring, their inputs' layout and
    which of them share memory."""
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
        if isinstance(value, _CONSTANTS) or value is Ellipsis:
            return (type(value).__qualname__, repr(value))  # 0.0 and -0.0, 1 and True are equal, and not the same
        return _Same(value)

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

    nodes = tuple(
        (node.op, target(node), *((plain(node.args), plain(node.kwargs)) if node.op != "placeholder" else ())) for node in module.graph.nodes
    )
    # A tensor given twice is compiled as one.
    first = {id(value): index for index, value in reversed(list(enumerate(inputs)))}
    memory = [storages(value) for value in inputs]
    first_holder = {key: index for index, keys in reversed(list(enumerate(memory))) for key in keys}
    return (
        nodes,
        tuple(map(layout, inputs)),
        tuple(first[id(value)] for value in inputs),
        tuple(tuple(first_holder[key] for key in keys) for keys in memory),
    )


# ---- linear layers of one input ----


@torch.no_grad()
def join_linears(model: torch.nn.Module, groups: Sequence[Sequence[str]] = JOINED_LINEARS) -> int:
    """Moves weights of linear layers that read one input side by side in memory, so that a compiled step reads them in one product.

    The parameters of each group become views of one tensor: names, identity, values, shapes and strides stay, addresses change. Nothing is
    stored twice afterwards; meanwhile one group is. Whatever moves a parameter away again (`p.data = new`, `load_state_dict(assign=True)`,
    `model.to`) undoes it for this group: the next step computes with the new weights, in products of their own. `torch.save` of one
    parameter of a group writes the whole group.

    Args:
        model: any module.
        groups: names of linear layers that are attributes of one module and read its input. Layers of other classes, with tied, sharded
            (before PyTorch 2.13), quantised or unaligned weights stay as they are.

    Returns:
        How many groups lie side by side now.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        local = _local(parameter)
        if type(local) in PLAIN_TENSORS and not local.is_meta:
            address = local.untyped_storage().data_ptr()
            uses[address] = uses.get(address, 0) + 1
    joined = 0
    for module in model.modules():
        for names in groups:
            linears = [getattr(module, name, None) for name in names]
            if len(linears) < 2 or any(type(layer) is not torch.nn.Linear for layer in linears):
                continue
            biases = [layer.bias for layer in linears]
            if any((bias is None) != (biases[0] is None) for bias in biases):
                continue
            tensors = [[layer.weight for layer in linears]] + ([] if biases[0] is None else [biases])
            tensors = [[_local(tensor) for tensor in row] for row in tensors]
            if all(map(lie_side_by_side, tensors)):
                joined += 1
            elif all(_can_move(row, uses) for row in tensors):
                for row in tensors:
                    joint = torch.cat([tensor.detach() for tensor in row])
                    for tensor, part in zip(row, joint.split([tensor.shape[0] for tensor in row]), strict=True):
                        tensor.data = part
                joined += 1
    return joined


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) and JOINS_SHARDS else parameter


def _can_move(tensors: Sequence[Tensor], uses: dict[int, int]) -> bool:
    return (
        all(type(tensor) in PLAIN_TENSORS and not tensor.is_meta and tensor.is_contiguous() for tensor in tensors)
        and len({(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}) == 1
        and all(uses.get(tensor.untyped_storage().data_ptr()) == 1 for tensor in tensors)
        and all(tensor.nbytes % JOIN_ALIGNMENT == 0 for tensor in tensors)
    )


def lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether the rows of all tensors, in this order, are one contiguous tensor already."""
    first = tensors[0]
    if not all(type(tensor) in PLAIN_TENSORS and tensor.is_contiguous() and tensor.numel() for tensor in tensors):
        return False
    if any(tensor.dtype != first.dtype or tensor.shape[1:] != first.shape[1:] for tensor in tensors):
        return False
    home = first.untyped_storage().data_ptr()
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    return all(tensor.untyped_storage().data_ptr() == home for tensor in tensors) and ends[:-1] == [t.data_ptr() for t in tensors[1:]]


def _as_one(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of tensors that lie side by side, without copying."""
    first = tensors[0].detach()
    return first.as_strided((sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]), first.stride())


def join_side_by_side(
    graph: fx.GraphModule, values: Sequence, makers: list[Maker], writes: dict[fx.Node, set[int]]
) -> list[list[int]]:
    """Turns linear layers of one input whose weights lie side by side into one product, in place; nothing may be written in between.

    Returns:
        The inputs, as indices into `values`, that have to lie side by side for this graph to be right.
    """
    index = {node: position for position, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    groups: dict[tuple, list[tuple]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=linear):
        named = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        source, tensors = named["input"], [named["weight"], *([] if named.get("bias") is None else [named["bias"]])]
        if all(tensor in index and type(values[index[tensor]]) in PLAIN_TENSORS for tensor in tensors):
            groups.setdefault((source, len(tensors)), []).append((node, [index[tensor] for tensor in tensors]))
    quiet = {node for node in graph.graph.nodes if not writes[node] and not _changes_modes(node)}
    joints: list[list[int]] = []
    for (source, _), members in groups.items():
        members.sort(key=lambda member: values[member[1][0]].data_ptr())
        for run in _runs(members, lambda some: all(lie_side_by_side([values[i] for i in row]) for row in _rows(some))):
            nodes = sorted((node for node, _ in run), key=order.__getitem__)
            between = itertools.takewhile(lambda node: node is not nodes[-1], _from(nodes[0]))
            if len(run) < 2 or not all(node in quiet for node in between):
                continue
            rows = _rows(run)
            joints.extend(rows)
            inputs = [
                _add_input(graph, makers, f"joint_{len(joints)}_{kind}", lambda values, row=row: _as_one([values[i] for i in row]))
                for kind, row in enumerate(rows)
            ]
            with graph.graph.inserting_before(nodes[0]):
                product = graph.graph.call_function(linear, (source, *inputs))
                parts = graph.graph.call_function(torch.split, (product, [values[i].shape[0] for i in rows[0]], -1))
                taken = [graph.graph.call_function(operator.getitem, (parts, place)) for place in range(len(run))]
            for (node, _), part in zip(run, taken, strict=True):
                node.replace_all_uses_with(part)
                graph.graph.erase_node(node)
    return joints


def _rows(members: Sequence[tuple]) -> list[list[int]]:
    """Weights, and biases where there are some, of (node, [weight, bias]) in turn."""
    return [list(row) for row in zip(*(tensors for _, tensors in members), strict=True)]


def _runs(members: Sequence[tuple], together: Callable[[Sequence[tuple]], bool]) -> list[list[tuple]]:
    """The longest runs of neighbours of which each two are `together`."""
    runs: list[list[tuple]] = []
    for member in members:
        if runs and together([runs[-1][-1], member]):
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _from(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "root":
        yield node
        node = node.next


# ---- sums over processes ----


def reduce_in_one_shot(graph: fx.GraphModule, makers: list[Maker]) -> None:
    """Turns sums over processes of up to ONE_SHOT_BYTES into reads of each other's memory, in place, where GPUs can do that.

    The buffers that the processes share become inputs after the others; sums of one shape take turns in one buffer.
    """
    buffers: dict[tuple, fx.Node | None] = {}
    for node in [node for node in graph.graph.nodes if str(node.target).startswith("_c10d_functional.all_reduce")]:
        source, reduction, group = node.args
        value = source.meta["example_value"]
        if reduction != "sum" or value.device.type != "cuda" or value.dtype not in ONE_SHOT_DTYPES or value.nbytes > ONE_SHOT_BYTES:
            continue
        key = (tuple(value.shape), value.dtype, group)
        if key not in buffers:
            shared = _shared_buffer(value, group)
            name = f"shared_buffer_{len(buffers)}"
            buffers[key] = None if shared is None else _add_input(graph, makers, name, lambda values, shared=shared: shared)
        if buffers[key] is None:
            continue
        with graph.graph.inserting_before(node):
            total = graph.graph.call_function(torch.ops.symm_mem.one_shot_all_reduce_copy, (buffers[key], source, reduction, group))
        for wait in list(node.users):
            wait.replace_all_uses_with(total)
            graph.graph.erase_node(wait)
        graph.graph.erase_node(node)


def _shared_buffer(like: Tensor, group: str) -> Tensor | None:
    """Memory of each process that all of `group` read; every process has to call this. None where their GPUs cannot."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    try:
        buffer = symmetric_memory.empty(tuple(like.shape), dtype=like.dtype, device=torch.device("cuda", torch.cuda.current_device()))
        symmetric_memory.rendezvous(buffer, group)
    except RuntimeError as error:
        warnings.warn(f"compile_regions: sums over processes go through NCCL, because their GPUs share no memory: {error}", stacklevel=2)
        return None
    return buffer
