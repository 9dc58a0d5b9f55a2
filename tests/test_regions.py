"""compile_regions: compiled in pieces, a step computes what it computes eagerly, on the weights that the model has at that moment."""

import copy
import gc
import io
import re
import runpy
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers  # noqa: E402
from torch._dynamo.backends.registry import lookup_backend  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402

from twilight_ops import Full, TwilightConfig  # noqa: E402
from twilight_ops.integration import CapturedStep, Decoder, TwilightCache, join_linears  # noqa: E402
from twilight_ops.integration.compile import cuda_graph, private, regions, rewrites  # noqa: E402
from twilight_ops.integration.compile.regions import compile_regions  # noqa: E402

PROMPT = 20
# With every token kept, attention is exact, so that a model in fp64 is an oracle.
EXACT = TwilightConfig(Full(), top_p=1.0, dense_layers=0, dense_below=0)
SIZES = dict(
    vocab_size=99,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
    initializer_range=0.2,
)
# A compiler without code generation: what is tested here is what the pieces are, and that they are given the right tensors.
FAST = lookup_backend("aot_eager")

pytestmark = pytest.mark.filterwarnings("error:compile_regions")  # a step that is compiled as one fails the test that does not expect it


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(family="Llama", **sizes):
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "head_dim": 64, **sizes})
    config._attn_implementation = "twilight"
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


class Steps:
    """Decode steps of a model on a filled cache, compiled in pieces where a compiler is given."""

    def __init__(self, model, compiler=None):
        self.model, self.cache = model, TwilightCache(model.config, EXACT, max_batch_size=1, max_cache_len=64)
        self.position = torch.zeros(1, 1, dtype=torch.long)
        self.pieces = []
        cache, token, position = self.cache, torch.full((1, 1), 7), self.position

        def step():
            logits = model(token, position_ids=position, past_key_values=cache).logits
            position.add_(1)
            return logits

        def note(piece, inputs):
            self.pieces.append(piece)
            return compiler(piece, inputs)

        self.step = (
            torch.compile(step, backend=partial(compile_regions, compiler=note), fullgraph=True, dynamic=False) if compiler else step
        )

    @torch.no_grad()
    def __call__(self, steps=2):
        """Logits [1, steps, V] after the prompt, with the weights that the model has now."""
        self.cache.reset()
        self.model(ids(PROMPT), past_key_values=self.cache)
        self.cache.sequences.begin_decoding()
        self.position.fill_(PROMPT)
        return torch.cat([self.step() for _ in range(steps)], dim=1)

    def products(self):
        """Linear layers of every compiled piece."""
        return [len(piece.graph.find_nodes(op="call_function", target=nn.functional.linear)) for piece in self.pieces]


def ids(tokens):
    return torch.randint(1, 99, (1, tokens), generator=torch.Generator().manual_seed(3))


def oracle(model, steps=2):
    """The same logits in fp64, by transformers' own attention on the whole text."""
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    if hasattr(exact.config, "num_local_experts"):
        exact.set_experts_implementation("eager")  # grouped products know no fp64
    with torch.no_grad():
        return exact(torch.cat([ids(PROMPT), torch.full((1, steps), 7)], dim=1)).logits[:, -steps:]


def assert_as_eager(model, compiled, true=None):
    """Logits no further from fp64 ones than a few times what eager ones are."""
    true = oracle(model) if true is None else true
    allowed = 4 * (Steps(model)().double() - true).abs().max() + 1e-6 * true.abs().max()
    assert (compiled.double() - true).abs().max() <= allowed


# ---- models ----


class Lora(nn.Module):
    """An adapted linear layer, as peft makes it: dropout, a scaling by name, and a flag that says whether it is merged."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        self.dropout, self.scaling, self.merged = nn.Dropout(0.1), {"default": 0.5}, False

    def forward(self, x):
        result = self.base(x)
        return result if self.merged else result + self.b(self.a(self.dropout(x))) * self.scaling["default"]

    @torch.no_grad()
    def merge(self, safely=False):
        delta = self.b.weight @ self.a.weight * self.scaling["default"]
        if safely:
            self.base.weight.data = self.base.weight + delta
        else:
            self.base.weight.data += delta
        self.merged = True


def adapted(names=("q_proj", "v_proj")):
    model = make()
    for layer in model.model.layers:
        for name in names:
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)))
    return model.eval()


WIDE = dict(num_attention_heads=2, num_key_value_heads=1)  # for configurations that take head_dim from the hidden size
MODELS = {
    "llama": make,
    "biases of q, k and v": partial(make, "Qwen2", **WIDE),
    "a norm a head": partial(make, "StableLm", qk_layernorm=True, **WIDE),
    "half of a head turned": partial(make, "StableLm", use_qkv_bias=True, use_parallel_residual=True, **WIDE),
    "q, k and v in one": partial(make, "Phi3", **WIDE),
    "tied embeddings": partial(make, "Gemma"),
    "experts": partial(make, "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "adapters on all of q, k, v": partial(adapted, ("q_proj", "k_proj", "v_proj")),
}


@pytest.mark.parametrize("name, groups", [*((name, 0) for name in MODELS), ("biases of q, k and v", 4)])
def test_a_step_in_pieces_gives_the_logits_of_the_whole(name, groups):
    model = MODELS[name]()
    assert groups == 0 or join_linears(model) == groups
    steps = Steps(model, FAST)
    assert_as_eager(model, steps())
    assert len(steps.pieces) == 3  # before the first attention, between two, after the last


def test_quantised_weights_are_compiled_in_pieces():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = make()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert join_linears(model) == 0
    steps = Steps(model, FAST)
    torch.testing.assert_close(steps(), Steps(model)(), atol=1e-4, rtol=1e-4)
    assert len(steps.pieces) == 3
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(steps(), Steps(model)(), atol=1e-4, rtol=1e-4)


# ---- weights ----


def each_parameter(change):
    def apply(model, other):
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
                change(parameter, new.detach().clone())

    return apply


def replace_modules(model, other):
    for layer, new in zip(model.model.layers, other.model.layers, strict=True):
        layer.self_attn.q_proj, layer.mlp.up_proj = new.self_attn.q_proj, new.mlp.up_proj


def replace_parameters(model, other):
    for layer, new in zip(model.model.layers, other.model.layers, strict=True):
        layer.self_attn.k_proj.weight = nn.Parameter(new.self_attn.k_proj.weight.detach().clone())


def add_and_merge_adapters(model, other):
    """In place for one layer, `p.data = new` for the others, unloaded afterwards."""
    for index, layer in enumerate(model.model.layers):
        lora = Lora(layer.self_attn.q_proj)
        lora.merge(safely=index > 0)
        layer.self_attn.q_proj = lora.base


CHANGES = {
    "copied in place": each_parameter(lambda parameter, new: parameter.copy_(new)),
    "one of a group replaced": lambda model, other: setattr(
        model.model.layers[1].self_attn.v_proj.weight, "data", other.model.layers[1].self_attn.v_proj.weight.detach().clone()
    ),
    "data replaced": each_parameter(lambda parameter, new: setattr(parameter, "data", new)),
    "state dict loaded": lambda model, other: model.load_state_dict(other.state_dict()),
    "state dict assigned": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "moved there and back": lambda model, other: model.double().float(),
    "modules replaced": replace_modules,
    "parameters replaced": replace_parameters,
    "adapters merged": add_and_merge_adapters,
}


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_a_compiled_step_reads_the_weights_that_the_model_has_now(joined):
    model = make()
    assert not joined or join_linears(model) == 4
    steps = Steps(model, FAST)
    before = steps()
    for seed, (name, change) in enumerate(CHANGES.items()):
        torch.manual_seed(seed)
        change(model, transformers.LlamaForCausalLM(model.config).eval())
        after = steps()
        torch.testing.assert_close(after, Steps(model)(), atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        assert name == "moved there and back" or not torch.allclose(after, before, atol=1e-2), name
        before = after


def test_an_adapter_that_is_merged_in_place_is_not_added_again():
    model = adapted()
    steps = Steps(model, FAST)
    assert_as_eager(model, steps())
    for layer in model.model.layers:
        layer.self_attn.q_proj.merge()
    assert_as_eager(model, steps())
    assert len(steps.pieces) == 6


def everything_about(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return [
        (name, id(value), value.data_ptr(), value.stride(), value.storage_offset(), value.untyped_storage().nbytes(), value._version)
        for name, value in model.named_parameters()
    ], len(buffer.getvalue())


def test_only_joining_moves_weights_and_makes_one_product_of_several_without_storing_any_twice():
    model = make("Qwen2", num_attention_heads=2, num_key_value_heads=1)
    untouched = everything_about(model)
    apart = Steps(model, FAST)
    expected = apart()
    assert everything_about(model) == untouched
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    identities = {name: id(weight) for name, weight in model.named_parameters()}
    size = everything_about(model)[1]
    assert join_linears(model) == 4
    assert {name: id(weight) for name, weight in model.named_parameters()} == identities
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    memory = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    assert sum(memory.values()) == sum(weight.nbytes for weight in model.parameters())
    assert everything_about(model)[1] < size + 4096
    addresses = everything_about(model)
    assert join_linears(model) == 4  # found again
    joined = Steps(model, FAST)
    torch.testing.assert_close(joined(), expected, atol=1e-4, rtol=1e-4)
    # Query, key and value; output, gate and up, down, and the next three, or the head.
    assert (apart.products(), joined.products()) == ([3, 7, 5], [1, 4, 4])
    assert everything_about(model) == addresses


def test_joined_weights_are_saved_copied_and_pickled_like_others(tmp_path):
    model = make()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    join_linears(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for other in (loaded, copy.deepcopy(model), torch.load(pickled, weights_only=False)):
        assert all(torch.equal(weight, weights[name]) for name, weight in other.state_dict().items())


def test_weights_that_cannot_move_are_not_joined():
    tied, odd, mixed, adapters = make(), make(), make(), adapted(("q_proj", "k_proj", "v_proj"))
    for layer in tied.model.layers:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    for layer in odd.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = nn.Linear(127, 3, bias=False), nn.Linear(127, 3, bias=False)
    for layer in mixed.model.layers:
        layer.self_attn.q_proj.bias = nn.Parameter(torch.zeros(256))
    assert [join_linears(model) for model in (tied, odd, mixed, adapters)] == [2, 2, 2, 2]
    with torch.device("meta"):
        assert join_linears(make()) == 0


def test_joined_weights_of_which_one_has_left_are_products_of_their_own_from_then_on():
    model = make()
    join_linears(model)
    steps = Steps(model, FAST)
    steps()
    model.model.layers[0].mlp.up_proj.weight.data = torch.randn(96, 128)
    assert_as_eager(model, steps())
    assert steps.products()[3:] == [3, 7, 5]
    join_linears(model)
    steps.pieces.clear()
    assert_as_eager(model, steps())
    assert steps.products() == []  # both are there already


def test_nothing_is_written_between_layers_that_become_one_product():
    first, second = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    both = nn.ModuleDict({"gate_proj": first, "up_proj": second})
    assert join_linears(both) == 1

    def steps(x, write):
        x = x + 1
        a = first(x)
        if write:
            x.add_(1)
        return torch.erf(a) + second(x)

    for write, products in ((False, [1]), (True, [2])):
        torch._dynamo.reset()
        made = []
        backend = partial(compile_regions, compiler=lambda piece, inputs, made=made: made.append(piece) or FAST(piece, inputs))
        with torch.no_grad():
            x = torch.randn(4, 32)
            torch.testing.assert_close(torch.compile(steps, backend=backend, fullgraph=True)(x, write), steps(x, write))
        assert [len(piece.graph.find_nodes(op="call_function", target=nn.functional.linear)) for piece in made] == products


# ---- where a step can be cut ----


@pytest.fixture
def cut_at_erf(monkeypatch):
    """torch.erf and torch.frexp, which returns a tuple, stand for Twilight's operators."""
    monkeypatch.setattr(regions, "_runs_as_it_is", lambda node: node.target in (torch.erf, torch.frexp))


def compiled(function, *, parts=None):
    """`function` through compile_regions; `parts` collects the pieces."""
    parts = [] if parts is None else parts
    backend = partial(compile_regions, compiler=lambda piece, inputs: parts.append(piece) or FAST(piece, inputs))
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def view_of_a_buffer(x, buffer):
    view = buffer[:2]
    y = torch.erf(x)
    buffer.add_(y.sum())
    return torch.erf(view), view, buffer


def written_before_and_after(x, buffer):
    buffer.mul_(2)
    y = torch.erf(x + buffer)
    buffer.sub_(y)
    return torch.erf(buffer * 1) + y, x


def taken_apart_later(x, buffer):
    halves = torch.split(x, 2)
    y = torch.erf(buffer)
    return y[:2] + halves[0] * halves[1]


def autocast_inside_a_piece(x, buffer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.T
    return torch.erf(y.float()) @ x


def branches(x, buffer):
    y = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))
    return torch.erf(y) + torch.cond(buffer.sum() > 0, lambda x: x * 3, lambda x: x - 1, (x,))


def numbers_of_the_host(x, buffer):
    y = torch.erf(x * x.shape[0] + torch.tensor([0.0, -0.0, 1.0, 2.0]))
    return torch.erf(y + 1) + torch.erf(y + True) + torch.erf(y * 0.0) + torch.erf(1 / (y * 0.0)) + torch.erf(1 / (y * -0.0))


def twice_the_same(x, buffer):
    return torch.erf(torch.erf(torch.cat([x, x]) + torch.cat([buffer, buffer])) + torch.cat([x, buffer]))


def operators_in_a_row(x, buffer):
    mantissa, exponent = torch.frexp(x)
    return torch.erf(mantissa) + torch.erf(buffer), exponent


CUT = [
    operators_in_a_row,
    view_of_a_buffer,
    written_before_and_after,
    taken_apart_later,
    autocast_inside_a_piece,
    branches,
    numbers_of_the_host,
    twice_the_same,
]


def assert_same(function, through, arguments):
    """Equal results, equal writes, and equal tensors that share memory."""
    mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    with torch.no_grad():
        for _ in range(2):
            results, expected = through(*mine), function(*theirs)
            torch.testing.assert_close(results, expected)
            torch.testing.assert_close(mine, theirs)
            shared = [
                [[a.untyped_storage()._cdata == b.untyped_storage()._cdata for a in (*kept, *out)] for b in (*kept, *out)]
                for kept, out in ((mine, flat(results)), (theirs, flat(expected)))
            ]
            assert shared[0] == shared[1]


def flat(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("function", CUT, ids=lambda function: function.__name__)
def test_what_can_be_cut_means_the_same_in_pieces(function, cut_at_erf):
    parts = []
    assert_same(function, compiled(function, parts=parts), (torch.randn(4, 4), torch.randn(4, 4)))
    assert not any(node.target is torch.erf for piece in parts for node in piece.graph.nodes)
    assert parts and all(any(node.op.startswith("call") for node in piece.graph.nodes) for piece in parts)


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_read_where_they_are(mesh, cut_at_erf):
    from torch.distributed.tensor import Shard, distribute_tensor

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("gate_proj", "up_proj"):
                linear = nn.Linear(8, 8, bias=False)
                linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0)]))
                setattr(self, name, linear)

        def forward(self, x):
            return torch.erf(nn.functional.linear(x, self.gate_proj.weight.to_local())) + x @ self.up_proj.weight.to_local()

    layer, parts = Layer(), []
    assert join_linears(layer) == 0
    call, watched, x = compiled(layer, parts=parts), cuda_graph.Weights(layer), torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(call(x), layer(x))
        assert not watched.changed()
        layer.up_proj.weight._local_tensor.data = torch.randn(8, 8)
        assert watched.changed()
        torch.testing.assert_close(call(x), layer(x))


def written_in_a_later_piece(x, buffer):
    y = x + 1
    view = y[:2]
    z = torch.erf(y)
    y.add_(z)
    return torch.erf(view) + view


def autocast_around(x, buffer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.erf(x @ x.T)
        return (y.to(x.dtype) @ x).float()


def gradients_off_around(x, buffer):
    torch._C._set_grad_enabled(True)
    y = torch.erf(x + 1) * 2
    torch._C._set_grad_enabled(False)
    return y


def shared_inputs(x, buffer):
    view = buffer[:2]
    y = torch.erf(x)
    total = view.sum()
    buffer.add_(1)
    return torch.erf(y) + total * view.sum() + buffer


def a_branch_that_may_write(x, buffer):
    y = x + 1
    z = torch.erf(y)
    return torch.cond(x.sum() > 0, lambda y, z: y * z, lambda y, z: y - z, (y, z))


WHOLE = {
    a_branch_that_may_write: "makes is written to in another",
    written_in_a_later_piece: "makes is written to in another",
    autocast_around: "surrounds an operator",
    gradients_off_around: "surrounds an operator",
    shared_inputs: "shares memory with another",
}


@pytest.mark.filterwarnings("default:compile_regions")
@pytest.mark.parametrize("function", WHOLE, ids=lambda function: function.__name__)
def test_what_cannot_be_cut_is_compiled_as_one_and_says_why(function, cut_at_erf):
    parts, grad, autocast = [], torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    with pytest.warns(UserWarning, match=f"compiled as one, .* because .*{WHOLE[function]}"):
        assert_same(function, compiled(function, parts=parts), (torch.randn(4, 4), torch.randn(4, 4)))
    assert len(parts) == 1 and any(node.target is torch.erf for node in parts[0].graph.nodes)
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (grad, autocast)


@pytest.mark.filterwarnings("default:compile_regions")
def test_sizes_that_change_and_gradients_are_left_to_the_compiler_of_the_whole(cut_at_erf):
    def function(x):
        return torch.erf(x + 1) * x.shape[0]

    changing = torch.compile(function, backend=partial(compile_regions, compiler=FAST), fullgraph=True, dynamic=True)
    with torch.no_grad(), pytest.warns(UserWarning, match="has a size that changes"):
        for rows in (3, 5):
            torch.testing.assert_close(changing(torch.ones(rows, 2)), function(torch.ones(rows, 2)))
    torch._dynamo.reset()
    x = torch.ones(3, 2, requires_grad=True)
    with pytest.warns(UserWarning, match="gradients are recorded"):
        compiled(function)(x).sum().backward()
    expected = torch.autograd.grad(function(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.filterwarnings("default:compile_regions")
def test_a_fault_of_the_cutting_itself_costs_time_and_no_result(monkeypatch):
    monkeypatch.setattr(regions, "cut_at_operators", lambda graph, values: [][0])
    model = make()
    steps = Steps(model, FAST)
    with pytest.warns(UserWarning, match="compiled as one, .* because IndexError: list index out of range"):
        logits = steps()
    assert_as_eager(model, logits)
    assert len(steps.pieces) == 1


@pytest.mark.filterwarnings("default:compile_regions")
def test_a_torch_without_the_names_that_cutting_needs_compiles_as_one(monkeypatch):
    monkeypatch.setattr(regions, "MISSING", ImportError("cannot import name 'tracing'"))
    with torch.no_grad(), pytest.warns(UserWarning, match="lacks what cutting needs: cannot import name 'tracing'"):
        assert compiled(lambda x: x + 1)(torch.zeros(2)).tolist() == [1, 1]


def test_a_torch_without_a_private_name_is_named_in_one_message(monkeypatch):
    with monkeypatch.context() as without:
        without.delattr(torch._guards, "tracing")
        assert "cannot import name 'tracing'" in str(runpy.run_path(private.__file__)["MISSING"])
    with monkeypatch.context() as without:
        without.delattr(torch._dynamo.utils, "counters")
        expected = r"twilight_ops.integration: torch: expected a version with the names .* got \d.*: cannot import name 'counters'"
        with pytest.raises(ImportError, match=expected):
            runpy.run_path(private.__file__)


def test_private_names_of_torch_are_imported_in_one_file():
    folder = Path(private.__file__).parents[1]
    found = [
        f"{path.relative_to(folder)}: {line.strip()}"
        for path in sorted(folder.rglob("*.py"))
        if path != Path(private.__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\btorch(\.\w+)*\._\w|\bfrom torch\b.*\bimport\b.*\b_\w|\btorch\.fx\.experimental\b", line)
    ]
    assert not found


@pytest.mark.filterwarnings("default:compile_regions")
def test_what_is_no_tensor_does_not_cross_from_piece_to_piece(cut_at_erf):
    def function(x):
        halves = torch.split(x, 2)
        return (torch.erf(halves[0]) + torch.cat(halves)[:2],)

    x = torch.randn(4)
    graph = torch.fx.symbolic_trace(function)
    with torch.no_grad(), pytest.warns(UserWarning, match="split, a (list|tuple), would cross from piece to piece"):
        torch.testing.assert_close(compile_regions(graph, [x], FAST)(x), list(function(x)))


def test_constants_of_the_graph_belong_to_no_piece(cut_at_erf):
    """Two pieces that differ in nothing but a tensor that the graph holds are compiled once, and each is given its own."""

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])

        def forward(self, x):
            return (torch.erf(torch.erf(x * self.first) * self.second),)

    module, parts = Holds(), []
    with torch.no_grad():
        graph = torch.fx.symbolic_trace(module)
        call = compile_regions(graph, [torch.ones(2)], lambda piece, inputs: parts.append(piece) or FAST(piece, inputs))
        torch.testing.assert_close(call(torch.ones(2)), module(torch.ones(2)))
    assert len(parts) == 1


def test_a_compiled_step_keeps_neither_the_model_nor_the_cache(monkeypatch):
    made = []
    original = regions.compile_regions

    def backend(graph, inputs):
        made.append(original(graph, inputs, FAST))
        return made[0]

    model = make()
    join_linears(model)
    cache = TwilightCache(model.config, EXACT, max_batch_size=1, max_cache_len=64)
    position = torch.full((1, 1), PROMPT)

    def step(model, cache):
        return model(position, past_key_values=cache, position_ids=position).logits

    with torch.no_grad():
        model(ids(PROMPT), past_key_values=cache)
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(model, cache)
    alive = [weakref.ref(weight) for weight in model.parameters()]
    alive += [weakref.ref(layer.paged.kv.k_cache) for layer in cache.layers]
    del model, cache
    torch._dynamo.reset()
    gc.collect()
    assert made and not [reference for reference in alive if reference() is not None]


def test_equal_layers_are_compiled_once_and_one_of_another_shape_for_itself():
    model = make(num_hidden_layers=4)
    mlp = model.model.layers[1].mlp
    for name, features in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128))):
        setattr(mlp, name, nn.Linear(*features, bias=False))
    steps = Steps(model, FAST)
    assert_as_eager(model, steps())
    # Before the first attention, between two, around the odd layer, after the last.
    assert len(steps.pieces) == 4
    assert not any("twilight" in str(node.target) for piece in steps.pieces for node in piece.graph.nodes)


# ---- a recorded step ----


class Recorded(CapturedStep):
    """Records as a GPU does: a replay reads the addresses of the recording, which are gone once a weight has moved."""

    def __init__(self, step, module, read):
        super().__init__(step, torch.device("cuda"), module)
        self.read = read

    def _record(self):
        self.step()  # on a GPU this would run nothing
        recorded = self.read()

        class Graph:
            def replay(_):
                assert self.read() == recorded, "a replay reads freed memory"

        self.graph = Graph()

    def _on_side_stream(self):
        self.step()


def test_a_recorded_step_is_recorded_again_where_weights_moved():
    model = make()
    join_linears(model)
    other = make()
    step = Recorded(lambda: None, model, lambda: [weight.data_ptr() for weight in model.parameters()])

    def run():
        for _ in range(2 * cuda_graph.WARMUP_STEPS + 2):
            step()
        return step.recordings

    assert run() == 1
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    model.load_state_dict(other.state_dict())
    assert run() == 1  # same places: the recording reads the new values
    for expected, change in enumerate(
        (
            lambda: setattr(model.model.layers[1].mlp.up_proj.weight, "data", torch.zeros(96, 128)),
            lambda: model.load_state_dict(other.state_dict(), assign=True),
            lambda: setattr(model.model.layers[1], "mlp", make().model.layers[0].mlp),
            lambda: setattr(model.model.layers[1].self_attn, "q_proj", Lora(model.model.layers[1].self_attn.q_proj)),
            lambda: model.double().float(),
            lambda: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq.clone()),
        ),
        start=2,
    ):
        change()
        assert run() == expected


def test_watching_weights_keeps_none_of_them_alive():
    model = make()
    watched = cuda_graph.Weights(model)
    replaced, removed = weakref.ref(model.lm_head.weight), weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    model.lm_head.weight = nn.Parameter(torch.zeros(99, 128))
    model.model.layers[0].mlp.up_proj = nn.Identity()
    assert replaced() is None and removed() is None
    assert watched.changed()
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None


def test_after_recheck_a_step_that_means_something_else_is_recorded_again():
    """Guards see what addresses do not: a flag of the model, also one that was seen before."""
    model = nn.Linear(8, 8, bias=False)
    model.merged = False
    x, out = torch.ones(1, 8), torch.zeros(1, 8)

    def step():
        out.copy_(model(x) if model.merged else 2 * model(x))

    compiled_step = compiled(step)
    recorded = Recorded(torch.no_grad()(compiled_step), model, list)
    for merged, recordings in ((False, 1), (False, 1), (True, 2), (False, 3), (False, 3)):
        model.merged = merged
        recorded.recheck()
        for _ in range(cuda_graph.WARMUP_STEPS + 2):
            recorded()
        assert recorded.recordings == recordings, merged
        torch.testing.assert_close(out, (1 if merged else 2) * model(x).detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_a_cuda_graph_decodes_with_the_weights_that_the_model_has_now(joined):
    model = adapted(("o_proj",)).cuda()
    other = adapted(("o_proj",)).cuda()
    assert not joined or join_linears(model) == 4
    decoder = Decoder(model, TwilightCache(model.config, EXACT, 1, 64), eos_token_ids=())

    def replace():
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.data = new.data * 1.5

    def merge():
        for layer in model.model.layers:
            layer.self_attn.o_proj.merge()

    for change, recordings in ((lambda: None, 1), (lambda: None, 1), (replace, 2), (merge, 3)):
        change()
        decoder.cache.reset()
        eager = Decoder(model, TwilightCache(model.config, EXACT, 1, 64), eos_token_ids=(), capture="eager")
        assert torch.equal(decoder.generate(ids(PROMPT), max_new_tokens=12).tokens, eager.generate(ids(PROMPT), max_new_tokens=12).tokens)
        assert decoder.captured.recordings == recordings


# ---- sums over processes ----


def summed_over_processes(sizes, dtype=torch.bfloat16):
    """A traced step that sums tensors of so many words over processes, as transformers' sharded layers do, on the fake GPU."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x_{index}") for index in range(len(sizes))]
    for node, size in zip(nodes, sizes, strict=True):
        with FakeTensorMode():
            node.meta["example_value"] = torch.empty(1, 1, size, dtype=dtype, device="cuda")
        pending = graph.call_function(torch.ops._c10d_functional.all_reduce, (node, "sum", "0"))
        waited = graph.call_function(torch.ops._c10d_functional.wait_tensor, (pending,))
        last = graph.call_method("copy_", (node, waited))
    graph.output((last,))
    return torch.fx.GraphModule(nn.Module(), graph)


def test_small_sums_over_processes_share_one_buffer_a_shape_and_large_ones_stay(monkeypatch):
    made, makers = [], []
    monkeypatch.setattr(rewrites, "_shared_buffer", lambda like, group: made.append((like.shape[-1], group)) or torch.empty(like.shape))
    large = rewrites.ONE_SHOT_BYTES // 2 + 8
    graph = summed_over_processes([4096, 4096, 64, large])
    rewrites.reduce_in_one_shot(graph, makers)
    graph.graph.lint()
    assert made == [(4096, "0"), (64, "0")]
    sums = [node for node in graph.graph.nodes if node.target is torch.ops.symm_mem.one_shot_all_reduce_copy]
    assert [node.args[0].name for node in sums] == ["shared_buffer_0", "shared_buffer_0", "shared_buffer_1"]
    assert [node.name for node in graph.graph.find_nodes(op="placeholder")][-2:] == ["shared_buffer_0", "shared_buffer_1"]
    assert [make([]).shape[-1] for make in makers] == [4096, 64]
    left = [node for node in graph.graph.nodes if node.target is torch.ops._c10d_functional.all_reduce]
    assert [node.args[0].name for node in left] == ["x_3"] and all(len(node.users) == 1 for node in left)
    assert [len(node.users) for node in sums] == [1, 1, 1]


def test_sums_over_processes_stay_where_no_memory_is_shared(monkeypatch):
    monkeypatch.setattr(rewrites, "_shared_buffer", lambda like, group: None)
    graph = summed_over_processes([64, 64])
    before = [str(node.target) for node in graph.graph.nodes]
    rewrites.reduce_in_one_shot(graph, [])
    assert [str(node.target) for node in graph.graph.nodes] == before
    graph = summed_over_processes([64], dtype=torch.float16)
    rewrites.reduce_in_one_shot(graph, [])
    assert not any("symm_mem" in str(node.target) for node in graph.graph.nodes)
