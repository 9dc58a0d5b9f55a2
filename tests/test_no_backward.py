"""No operator has a backward: inputs that ask for a gradient are refused by name, and cost nothing where gradients are off."""

from __future__ import annotations

import pytest
import torch
from inputs import Shape, make_inputs
from test_malformed import assert_unwritten, inputs, valid, written_arguments

from twilight_ops import KV, Candidates, Paging, attend_sparse, backends

EXPECTED = "expected a tensor that needs no gradient (there is no backward: call under torch.no_grad()), got requires_grad=True"


def differentiable(op: str) -> list[str]:
    """The arguments of an operator that could ask for a gradient."""
    arguments = valid(op, inputs("uint8"))
    return [name for name, a in arguments.items() if isinstance(a, torch.Tensor) and a.is_floating_point()]


EVERY_ARGUMENT = [(op, name) for op in backends.OPS for name in differentiable(op)]


def asking(op: str, argument: str, device: str = "cpu") -> dict:
    """Well-formed arguments, one of which asks for a gradient."""
    arguments = valid(op, inputs("uint8").clone())
    arguments = {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
    return arguments | {argument: arguments[argument].detach().clone().requires_grad_()}


def overload(op: str):
    return getattr(torch.ops.twilight, op).default


@pytest.mark.parametrize("op, argument", EVERY_ARGUMENT)
def test_an_input_that_asks_for_a_gradient_is_refused_and_nothing_is_written(backend, op, argument):
    arguments = asking(op, argument, backend.device)
    written = written_arguments(op, arguments)
    with pytest.raises(RuntimeError) as raised:
        getattr(backend, op)(**arguments)
    assert f"twilight::{op}: {argument}: {EXPECTED}" in str(raised.value)
    with torch.no_grad():
        assert_unwritten(arguments, written)


@pytest.mark.parametrize("op, argument", EVERY_ARGUMENT)
def test_the_fake_refuses_it_in_the_same_words(op, argument):
    on_meta = asking(op, argument, "meta")
    with pytest.raises(RuntimeError) as raised:
        overload(op)(**on_meta)
    assert f"twilight::{op}: {argument}: {EXPECTED}" in str(raised.value)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", backends.OPS)
def test_without_gradients_the_same_call_is_served(op, off):
    for argument in differentiable(op):
        with off():
            outputs = overload(op)(**asking(op, argument))
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs or ()
        assert not any(t.requires_grad for t in outputs)


@pytest.mark.parametrize("op", ["attend_sparse", "decode_attention", "append_kv"])
def test_a_compiled_call_is_refused_at_trace_time_and_served_without_gradients(op):
    argument = differentiable(op)[0]
    arguments = asking(op, argument)
    compiled = torch.compile(lambda a: overload(op)(**a), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError) as raised:
        compiled(arguments)
    assert f"twilight::{op}: {argument}: {EXPECTED}" in str(raised.value)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(arguments)
    torch._dynamo.reset()
    # The same from inside, where only the traced part runs without gradients.
    torch.compile(torch.no_grad()(lambda a: overload(op)(**a)), fullgraph=True, backend="aot_eager")(arguments)
    torch._dynamo.reset()


class Projected(torch.nn.Module):
    """A decode call on what a layer with parameters projects."""

    def __init__(self, kv: KV, sm_scale: float):
        super().__init__()
        self.kv, self.sm_scale = kv, sm_scale
        self.projection = torch.nn.Linear(64, 64)

    def forward(self, hidden, page_table, seq_lens):
        paging = Paging(page_table, seq_lens)
        return attend_sparse(self.projection(hidden), self.kv, paging, Candidates(), self.sm_scale)


def test_a_module_is_exported_with_its_parameters_and_any_page_table():
    x = make_inputs(Shape((40, 17), 4, 2, 64, 16, 1, torch.float32))
    module = Projected(KV(x.k_cache, x.v_cache), x.sm_scale)
    tokens = (x.q, x.page_table, x.seq_lens)
    exported = torch.export.export(module, tokens, dynamic_shapes=(None, {1: torch.export.Dim.DYNAMIC}, None), strict=False)
    wider = (x.q, torch.nn.functional.pad(x.page_table, (0, 3)), x.seq_lens)
    with torch.no_grad():
        for got, want in zip(exported.module()(*wider), module(*tokens), strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match="twilight::attend_sparse: q: expected a tensor that needs no gradient"):
        exported.module()(*wider)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_the_public_functions_refuse_a_transform_that_differentiates(transform):
    x = make_inputs(Shape((40, 17), 4, 2, 64, 16, 1, torch.float32))
    arguments = (KV(x.k_cache, x.v_cache), Paging(x.page_table, x.seq_lens), Candidates(), x.sm_scale)

    def total(q, scale):
        return (attend_sparse(q, *arguments)[0] * scale).sum()

    with pytest.raises(RuntimeError) as raised:
        transform(total)(x.q, torch.ones(()))
    assert f"twilight::attend_sparse: q: {EXPECTED}" in str(raised.value)
    # What does not go through the operator has its gradient.
    expected = attend_sparse(x.q, *arguments)[0].sum()
    torch.testing.assert_close(transform(total, argnums=1)(x.q, torch.ones(())), expected)


def test_a_tensor_of_a_backend_without_kernels_is_refused_with_the_operators_name():
    arguments = valid("attend_sparse", inputs())
    with pytest.raises(NotImplementedError, match="twilight::attend_sparse.*MkldnnCPU"):
        overload("attend_sparse")(**arguments | {"q": arguments["q"].contiguous().to_mkldnn()})


@pytest.mark.parametrize("op", backends.OPS)
def test_a_call_on_meta_tensors_has_the_shapes_of_the_real_one(op):
    arguments = valid(op, inputs("uint8").clone())
    on_meta = {name: a.to("meta") if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
    real, fake = (call if isinstance(call, tuple) else (call,) for call in (overload(op)(**arguments), overload(op)(**on_meta)))
    for one, other in zip(real, fake, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (other.is_meta and one.shape == other.shape and one.dtype == other.dtype)
