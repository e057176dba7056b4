"""bfloat16 training on a CPU: the numbers of torch's own operations, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import visionmoe as vm
from visionmoe.model import cpu_training
from visionmoe.model.cpu_training import attention, gelu, transposed

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products of oneDNN here"
)


def relative(got, wanted):
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-12)).item()


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    scale=st.floats(0.1, 8.0),
    seed=st.integers(0, 2**31),
)
def test_attention_equals_plain(shape, scale, seed):
    """Also where scores are in the tens, which bfloat16 would round by more than 0.1: they are float32.

    Where differences of rounded values are left, torch's own operation is off as well, by up to 0.4: twice its error.
    """
    torch.manual_seed(seed)
    batch, heads, tokens, dim = shape
    qkv = (scale * torch.randn(batch, tokens, 3, heads, dim)).bfloat16().requires_grad_()
    exact, torchs = qkv.detach().double().requires_grad_(), qkv.detach().clone().requires_grad_()
    weight = torch.randn(shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*(part.transpose(1, 2) for part in qkv.unbind(2)))
    expected, usual = (
        F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in given.unbind(2))) for given in (exact, torchs)
    )
    assert out.dtype == torch.bfloat16 and out.grad_fn.name() == "_AttentionBackward"
    out.backward(weight)
    expected.backward(weight.double())
    usual.backward(weight)
    assert relative(out, expected) < 2 * relative(usual, expected) + 0.03
    # of one token the gradient of q and k is 0, and of few it is a difference of rounded values: so of all three
    assert relative(qkv.grad, exact.grad) < 2 * relative(torchs.grad, exact.grad) + 0.06


def test_attention_of_many_tokens_keeps_no_probabilities():
    q = torch.randn(1, 1, cpu_training.MAX_TOKENS + 1, 8, dtype=torch.bfloat16, requires_grad=True)
    less = q[:, :, 1:]
    assert attention(less, less, less).grad_fn.name() == "_AttentionBackward"
    assert attention(q, q, q).grad_fn.name() != "_AttentionBackward"


@pytest.mark.parametrize("form", ["tanh", "none"])
@pytest.mark.parametrize("width", [16, 48, 50])
def test_gelu_equals_plain(form, width):
    """To one rounding of bfloat16, 2^-8 of the value, and one of the small differences near 0 where tanh is near -1."""
    x = torch.linspace(-12, 12, 40 * width).view(40, width).bfloat16()
    got = gelu(x, form)
    assert got.shape == x.shape and got.is_contiguous()
    torch.testing.assert_close(got.double(), F.gelu(x.double(), approximate=form), rtol=2**-7, atol=1e-4)


def test_transposed_in_parts():
    x = torch.randn(77, 13).bfloat16()  # 32 + 32 + 13 rows
    assert torch.equal(transposed(x), x.t()) and transposed(x).is_contiguous()


def test_whole_model_has_the_gradients_of_torch(monkeypatch):
    """Under autocast, of a dense and a sparse block: as near to the float32 ones as torch's operations come.

    Both experts are chosen for every token, so that no rounding changes the routing.
    """
    torch.manual_seed(0)
    model = vm.create_model("vit_s32", num_classes=5, image_size=64, num_layers=2, hidden_size=64, mlp_dim=128,
                            num_heads=2, layers=(1,), num_experts=2, num_selected_experts=2,
                            capacity_factor=2.0)  # fmt: skip
    model.head.weight.data.normal_(std=0.3)
    model.eval()  # without noise
    images = torch.randn(4, 3, 64, 64)

    def step(bf16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, bf16):
            out = model(images)
        (out.logits.float().logsumexp(-1).sum() + out.auxiliary_loss).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact, ours = step(False), step(True)
    monkeypatch.setattr(cpu_training, "applies", lambda x: False)
    torchs = step(True)
    assert ours.keys() == torchs.keys() == exact.keys()
    names = [n for n in exact if exact[n].norm() > 1e-6 and "router" not in n]
    error = {n: relative(ours[n], exact[n].double()) for n in names}
    usual = {n: relative(torchs[n], exact[n].double()) for n in names}
    assert len(names) > 20
    for name in names:
        assert error[name] < 1.5 * usual[name] + 0.01, name
