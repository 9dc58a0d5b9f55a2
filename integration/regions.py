"""A compiler backend for decode steps: the traced step is cut at Twilight's operators, and pieces that are equal are compiled once.

A model of 32 equal layers has three different pieces instead of 33, so it compiles in the time of two layers. The operators between them
are called as they are. What a piece costs the host on every call vanishes where the step is recorded as a CUDA graph.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.split_module import split_module
from torch.nn.functional import linear

PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
# Dynamo 2.11 fails to trace a sharded parameter whose local part is a view, so a second decoder could not be made; 2.13 traces it.
JOINS_SHARDS = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)
# Up to so many bytes every process adds up what it reads from the others. Two H200s, 8 KB: through NCCL a sum costs a step 22 us, so 17.
ONE_SHOT_BYTES = 512 * 1024
ONE_SHOT_DTYPES = (torch.float32, torch.bfloat16)


def compile_regions(graph: fx.GraphModule, example_inputs: Sequence[Tensor], compiler: Callable = compile_fx) -> Callable[..., tuple]:
    """Compiles a traced step, equal pieces once: a backend of torch.compile(dynamic=False).

    Linear layers of one input (query, key and value; gate and up) become one product, see `join_linears`; all-reduces of a sharded model
    become one launch each, see `reduce_in_one_shot`.

    Args:
        graph, example_inputs: as Dynamo hands them over.
        compiler: of a piece; takes a module that returns a tuple, and fake inputs.
    """
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph))  # Dynamo goes on to read the inputs of its own
    inputs = dict(zip(graph.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    shards = take_local_shards(graph, inputs)
    join_linears(graph, inputs, apart=() if JOINS_SHARDS else shards)
    reduce_in_one_shot(graph, inputs)
    graph.recompile()
    split = split_at_operators(graph)
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    pieces = _PieceCompiler(split, fake_mode, compiler)
    # Whatever is no tensor, a device mesh for one, goes to parts that run as they are.
    pieces.run(*(fake_mode.from_tensor(x, static_shapes=True) if type(x) in PLAIN_TENSORS else x for x in inputs.values()))
    for name, compiled in pieces.by_name.items():
        delattr(split, name)  # the name of a module takes no plain function
        setattr(split, name, compiled)
    added = list(inputs.values())[len(example_inputs) :]
    return lambda *arguments: split(*arguments, *added)


def _runs_as_it_is(node: fx.Node) -> bool:
    """Operators that one launch serves, and what handles sharded tensors, which a piece could not take."""
    if node.op == "call_function" and str(node.target).startswith(("twilight.", "symm_mem.")):
        return True
    return any(isinstance(other.meta.get("example_value"), DTensor) for other in (node, *node.all_input_nodes))


def split_at_operators(graph: fx.GraphModule) -> fx.GraphModule:
    """Modules `submod_piece_<i>` and `submod_operators_<i>` in the order of the trace."""
    part: dict[fx.Node, str] = {}
    index, inside = 0, False
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        # What an operator returns is a tuple; it is taken apart beside it, so that only tensors cross from part to part.
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and _runs_as_it_is(source):
            part[node] = part[source]
            continue
        if _runs_as_it_is(node) != inside:
            index, inside = index + 1, not inside
        part[node] = f"{'operators' if inside else 'piece'}_{index}"
    return split_module(graph, graph, part.__getitem__, keep_original_order=True)


class _PieceCompiler(fx.Interpreter):
    """Runs the split step on fake tensors, which gives every piece its inputs, and compiles each structure when it first appears."""

    def __init__(self, split: fx.GraphModule, fake_mode: FakeTensorMode, compiler: Callable):
        super().__init__(split)
        self.fake_mode, self.compiler = fake_mode, compiler
        self.by_structure: dict[tuple, Callable] = {}
        self.by_name: dict[str, Callable] = {}

    def call_module(self, target: str, args: tuple, kwargs: dict):
        module = self.fetch_attr(target)
        if "piece" in target:
            key = structure(module, args)
            if key not in self.by_structure:
                self.by_structure[key] = self._compile(module, args)
            self.by_name[target] = self.by_structure[key]
        with self.fake_mode:
            return super().call_module(target, args, kwargs)

    def _compile(self, module: fx.GraphModule, args: tuple) -> Callable:
        """Compiles a copy that returns a tuple, in a context of its own: guards and metadata of one piece are not those of the step."""
        piece = fx.GraphModule(module, fx.Graph())
        returned = piece.graph.graph_copy(module.graph, {})
        single = not isinstance(returned, tuple)
        piece.graph.output((returned,) if single else returned)
        piece.recompile()
        with tracing(TracingContext(self.fake_mode)):
            compiled = self.compiler(piece, list(args))
        return (lambda *inputs: compiled(*inputs)[0]) if single else compiled


def structure(module: fx.GraphModule, inputs: Sequence) -> tuple:
    """What two pieces have in common when one compiled function serves both: operations, constants, wiring, and their inputs' layout."""
    number = {node: index for index, node in enumerate(module.graph.nodes)}

    def plain(value):
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(plain, value))
        if isinstance(value, dict):
            return ("dict", *((name, plain(item)) for name, item in value.items()))
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        return (type(value).__name__, repr(value))

    def layout(value):
        if isinstance(value, Tensor):
            return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad)
        return plain(value)

    def attribute(node: fx.Node):
        # A tensor of the module is part of the compiled function, so only pieces that hold the same one are equal.
        return id(operator.attrgetter(node.target)(module)) if node.op == "get_attr" else None

    nodes = tuple(
        (
            node.op,
            None if node.op == "placeholder" else node.target if node.op != "get_attr" else attribute(node),
            plain(node.args) if node.op != "placeholder" else None,
            plain(node.kwargs),
        )
        for node in module.graph.nodes
    )
    # A tensor given twice is compiled as one.
    first = {id(value): index for index, value in reversed(list(enumerate(inputs)))}
    return nodes, tuple(map(layout, inputs)), tuple(first[id(value)] for value in inputs)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _add_input(graph: fx.GraphModule, inputs: dict[fx.Node, Tensor], name: str, value: Tensor) -> fx.Node:
    """A placeholder after all others, which it joins in `inputs`."""
    with graph.graph.inserting_after(next(reversed(inputs))):
        node = graph.graph.placeholder(name)
    inputs[node] = value
    return node


@torch.no_grad()
def take_local_shards(graph: fx.GraphModule, inputs: dict[fx.Node, Tensor]) -> list[fx.Node]:
    """Replaces the local parts of sharded parameters by inputs of their own, in place, and returns those: pieces see plain tensors."""
    shards = []
    for node, value in list(inputs.items()):
        if isinstance(value, DTensor) and all("to_local" in _name(user) for user in node.users):
            # The very tensor that the parameter holds, since no gradient is asked for.
            shards.append(_add_input(graph, inputs, f"{node.name}_local", value.to_local()))
            for user in list(node.users):
                user.replace_all_uses_with(shards[-1])
                graph.graph.erase_node(user)
    return shards


def join_linears(graph: fx.GraphModule, inputs: dict[fx.Node, Tensor], apart: Sequence[fx.Node] = ()) -> None:
    """Turns linear layers of one input into one product, in place; their joint weights become inputs after the others.

    Weights in `apart` stay as they are. A joint weight holds what was apart: the parameters are set to views of it, so nothing is stored
    twice, and a CUDA graph recorded before by other means must not be replayed after.
    """
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=linear):
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if len(node.args) > 1 and bias is None and node.args[1] in inputs and node.args[1] not in apart:
            groups.setdefault(node.args[0], []).append(node)
    for index, (source, nodes) in enumerate(groups.items()):
        weights = [inputs[node.args[1]] for node in nodes]
        if len({id(weight) for weight in weights}) < max(2, len(nodes)) or len({(type(w), w.dtype, w.device) for w in weights}) > 1:
            continue
        joint = _add_input(graph, inputs, f"joint_weight_{index}", _side_by_side(weights))
        with graph.graph.inserting_before(nodes[0]):
            product = graph.graph.call_function(linear, (source, joint, None))
            parts = graph.graph.call_function(torch.split, (product, [weight.shape[0] for weight in weights], -1))
            for part, node in enumerate(nodes):
                node.replace_all_uses_with(graph.graph.call_function(operator.getitem, (parts, part)))
                graph.graph.erase_node(node)


@torch.no_grad()
def _side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """The rows of all weights as one tensor, of which the weights become views; one that they are views of already is found again."""
    first, rows = weights[0], sum(weight.shape[0] for weight in weights)
    ends = [weight.storage_offset() + weight.numel() for weight in weights]
    adjacent = all(
        weight.is_contiguous() and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for weight in weights
    ) and ends[:-1] == [weight.storage_offset() for weight in weights[1:]]
    if adjacent:
        return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
    joint = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, joint.split([weight.shape[0] for weight in weights]), strict=True):
        weight.data = part
    return joint


def reduce_in_one_shot(graph: fx.GraphModule, inputs: dict[fx.Node, Tensor]) -> None:
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
            buffers[key] = None if shared is None else _add_input(graph, inputs, f"shared_buffer_{len(buffers)}", shared)
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
