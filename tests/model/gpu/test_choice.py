"""Which way the experts run on which device."""

import pytest
import torch

import visionmoe as vm
from visionmoe.model.gpu.choice import choose_dispatch, choose_on_cuda

B16 = (768, 3072)


@pytest.mark.parametrize(
    ("capability", "triton", "grouped_mm", "dtype", "sizes", "expected"),
    [
        ((9, 0), True, True, torch.bfloat16, B16, "triton"),  # H100
        ((8, 0), True, True, torch.float32, B16, "triton"),  # A100
        ((9, 0), True, True, torch.float64, B16, "buffers"),  # the kernels sum in float32
        ((9, 0), False, True, torch.bfloat16, B16, "grouped"),
        ((9, 0), False, True, torch.bfloat16, (768, 3076), "buffers"),  # rows of 6152 bytes, no multiple of 16
        ((9, 0), False, True, torch.float32, B16, "buffers"),
        ((8, 0), False, True, torch.bfloat16, B16, "buffers"),  # torch would bring the offsets to the host
        ((9, 0), False, False, torch.bfloat16, B16, "buffers"),
        ((7, 5), True, True, torch.float16, B16, "buffers"),  # T4
        ((0, 0), True, True, torch.bfloat16, B16, "buffers"),  # not NVIDIA's
    ],
)
def test_on_cuda(capability, triton, grouped_mm, dtype, sizes, expected):
    assert choose_on_cuda(capability, triton, grouped_mm, dtype, sizes) == expected


def test_elsewhere():
    assert choose_dispatch(torch.zeros(2, 8), 16) == "segments"
    assert choose_dispatch(torch.zeros(2, 8, device="meta"), 16) == "buffers"
    compiled = torch.compile(lambda x: x + (choose_dispatch(x, 16) == "buffers"), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == 1


def test_experts_that_drop_out_run_on_buffers():
    """The other ways know no dropout: asked for, the kernels would fail on a CPU, and so would rows of 8 and 18."""
    config = vm.MoEConfig(num_experts=2, layers=(0,), expert_dropout_rate=0.5)
    layer = vm.create_model("vit_b16", hidden_size=8, num_layers=1, mlp_dim=18, num_heads=1, image_size=16,
                            moe=config).moe_layer(0)  # fmt: skip
    for layer.dispatch in ("triton", "grouped"):
        layer.train()
        assert layer(torch.randn(1, 4, 8)).tokens.shape == (1, 4, 8)
