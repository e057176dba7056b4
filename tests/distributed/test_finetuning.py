"""Fine-tuning starts with the same parameters on any number of processes, each of which reads its own parts."""

import torch
from tests.distributed.finetuning import LAYOUTS, first_parameters, of_all_layouts
from tests.distributed.jobs import run_job

import visionmoe as vm


def test_a_new_head_and_resized_positions_are_those_of_one_process(tmp_path):
    torch.manual_seed(0)
    moe = vm.MoEConfig(num_experts=4, layers=(1,))
    model = vm.create_model(vm.ModelConfig(image_size=28, patch_size=14, in_channels=1, num_classes=10, hidden_size=16,
                                           num_layers=2, mlp_dim=16, num_heads=2, moe=moe))  # fmt: skip
    with torch.no_grad():
        model.head.weight.normal_()
    model.save_pretrained(tmp_path / "model")
    expected = first_parameters(tmp_path / "model", tmp_path / "alone", None)
    assert expected["pos_embed"].shape == (1, 3 * 3 + 1, 16)  # 42 / 14 patches a side, and the class token
    assert not expected["head.weight"].any() and (expected["head.bias"] == -3).all()
    for found in run_job(2, of_all_layouts, tmp_path / "job", tmp_path / "model", tmp_path / "job"):
        for layout in LAYOUTS:
            assert found[layout].keys() == expected.keys()
            assert all(torch.equal(found[layout][name], value) for name, value in expected.items()), layout
