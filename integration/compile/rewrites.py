"""What `compile_regions` rewrites in a traced step before it cuts it, and where weights have to lie for that.

Every rewrite works in place. What it adds to the step's inputs is computed before each call from those that the step was given, so that
nothing is read from an earlier call.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from .private import symmetric_memory

PLAIN_TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
# Linear layers that read one input in transformers' decoders. A name that is not there, or reads another input, costs nothing.
JOINED_LINEARS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
JOIN_ALIGNMENT = 16  # bytes; the compiler copies inputs that start elsewhere on every call
# Up to so many bytes every process adds up what it reads from the others. Two H200s, 8 KB: through NCCL a sum costs a step 22 us, so 17.
ONE_SHOT_BYTES = 512 * 1024
ONE_SHOT_DTYPES = (torch.float32, torch.bfloat16)

# An input that the backend adds: computed before every call from all inputs before it.
Maker = Callable[[list], Tensor]


def name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def changes_modes(node: fx.Node) -> bool:
    return node.op == "call_function" and name_of(node).startswith(("_enter_", "_exit_", "_set_grad_enabled"))


# ---- inputs ----


def add_input(graph: fx.GraphModule, makers: list[Maker], name: str, make: Maker) -> fx.Node:
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
                lifted[node.target] = add_input(graph, makers, f"constant_{len(lifted)}", lambda values, value=value: value)
            node.replace_all_uses_with(lifted[node.target])
            graph.graph.erase_node(node)


def take_local_shards(graph: fx.GraphModule, values: Sequence, makers: list[Maker]) -> None:
    """Replaces the local parts of sharded parameters by inputs of their own, in place: pieces see plain tensors."""
    for index, (node, value) in enumerate(zip(graph.graph.find_nodes(op="placeholder"), values, strict=True)):
        if isinstance(value, DTensor) and node.users and all("to_local" in name_of(user) for user in node.users):
            # The memory that the parameter holds, since no gradient is asked for.
            local = add_input(graph, makers, f"{node.name}_local", lambda values, index=index: values[index].to_local())
            for user in list(node.users):
                user.replace_all_uses_with(local)
                graph.graph.erase_node(user)


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
            (Dynamo up to 2.13 cannot trace shards that are views), quantised or unaligned weights stay as they are.

    Call it before the first step is compiled: a step that was compiled for weights that lay apart goes on with products of their own.

    Returns:
        How many groups lie side by side now.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) in PLAIN_TENSORS and not parameter.is_meta:
            address = parameter.untyped_storage().data_ptr()
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
            if all(map(lie_side_by_side, tensors)):
                joined += 1
            elif all(_can_move(row, uses) for row in tensors):
                for row in tensors:
                    joint = torch.cat([tensor.detach() for tensor in row])
                    for tensor, part in zip(row, joint.split([tensor.shape[0] for tensor in row]), strict=True):
                        tensor.data = part
                joined += 1
    return joined


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


def join_side_by_side(graph: fx.GraphModule, values: Sequence, makers: list[Maker], writes: dict[fx.Node, set[int]]) -> list[list[int]]:
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
    quiet = {node for node in graph.graph.nodes if not writes[node] and not changes_modes(node)}
    joints: list[list[int]] = []
    for (source, _), members in groups.items():
        members.sort(key=lambda member: values[member[1][0]].data_ptr())
        for run in _runs(members, lambda some: all(lie_side_by_side([values[i] for i in row]) for row in _rows(some))):
            nodes = sorted((node for node, _ in run), key=order.__getitem__)
            if len(run) < 2 or not quiet.issuperset(_between(nodes[0], nodes[-1])):
                continue
            rows = _rows(run)
            joints.extend(rows)
            inputs = [
                add_input(graph, makers, f"joint_{len(joints)}_{kind}", lambda values, row=row: _as_one([values[i] for i in row]))
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


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    while first is not last:
        yield first
        first = first.next


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
            buffers[key] = None if shared is None else add_input(graph, makers, name, lambda values, shared=shared: shared)
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
    shared = symmetric_memory()
    try:
        buffer = shared.empty(tuple(like.shape), dtype=like.dtype, device=torch.device("cuda", torch.cuda.current_device()))
        shared.rendezvous(buffer, group)
    except RuntimeError as error:
        warnings.warn(f"compile_regions: sums over processes go through NCCL, because their GPUs share no memory: {error}", stacklevel=2)
        return None
    return buffer
