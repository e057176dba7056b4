"""Linear layers without gradients: the numbers of torch.nn.functional.linear, whatever makes the product."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from visionmoe.model import packed
from visionmoe.model.packed import Linear


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    gelu=st.sampled_from([None, "tanh", "none"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    autocast=st.booleans(),
    slow_mkl=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_plain_linear(shape, dims, gelu, dtype, autocast, slow_mkl, seed):
    """One rounding of bfloat16 is 2^-8 of a value; values are below 10 here, and GELU's slope is below 1.2."""
    torch.manual_seed(seed)
    layer = Linear(*dims).to(dtype)
    x = torch.randn(*shape, dims[0]).to(dtype)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    expected = expected if gelu is None else F.gelu(expected, approximate=gelu)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, autocast):
        patch.setattr(packed, "mkl_is_slow", lambda: slow_mkl)
        patch.setattr(packed, "PACKED_SIZE", 1)
        patch.setattr(packed, "FUSED_PRODUCT", 1)  # small float32 products through oneDNN, too
        out = layer(x, gelu)
    low = autocast or dtype == torch.bfloat16
    assert out.dtype == (torch.bfloat16 if low else torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0.03, atol=0.1 if low else 1e-5)


def test_packed_weights_follow_the_parameter():
    torch.manual_seed(0)
    layer, x = Linear(16, 8).bfloat16(), torch.randn(4, 16).bfloat16()
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        after = layer(x)
        torch.testing.assert_close(after, copy.deepcopy(layer)(x), rtol=0, atol=0)
    assert not torch.equal(before, after)
    layer(x).sum().backward()
    assert layer.packed._packed == []  # training does not hold the weights twice
    assert layer.weight.grad is not None


@torch.no_grad()
def test_large_float32_weights_are_packed_for_few_rows():
    """512 x 512 weights are 2^18 values, 511 x 512 fewer; where MKL is fast 256 rows still gain from packing."""
    torch.manual_seed(0)
    large, small = Linear(512, 512), Linear(512, 511)
    rows = torch.randn(2, 129, 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "mkl_is_slow", lambda: False)
        for layer, x in ((small, rows[:1]), (large, rows)):  # 129 rows, 258 rows
            layer(x)
            assert layer.packed._packed == []
        out = large(rows[:, :128], gelu="tanh")
    assert large.packed._packed[0].is_mkldnn
    expected = F.gelu(F.linear(rows[:, :128].double(), large.weight.double(), large.bias.double()), approximate="tanh")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_products_are_counted():
    """2 * 3 * 4 rows * 512 * 300 * 2 operations through oneDNN and through torch's own product."""
    layer, x = Linear(512, 300).bfloat16(), torch.randn(2, 3, 4, 512).bfloat16()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 3 * 4 * 512 * 300 * 2


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch's own
def test_transforms_of_torch_see_their_own_product():
    """The derivative of x @ w.T + b along t is t @ w.T; 512 x 512 weights would be packed for 4 rows."""
    torch.manual_seed(0)
    layer, x, t = Linear(512, 512), torch.randn(4, 512), torch.randn(4, 512)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t)))
    for value, derivative in (dual, torch.func.jvp(layer, (x,), (t,))):
        torch.testing.assert_close(value, F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(derivative, F.linear(t, layer.weight))
    two = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    once, twice = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(two)
    torch.testing.assert_close(twice, 2 * once)
