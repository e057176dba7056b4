"""Every layout computes what one process computes on the same global batch."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed.compiling import losses
from tests.distributed.jobs import run_job
from tests.distributed.starting import start
from tests.distributed.training import Case, config_of, train, train_all

import visionmoe as vm

ADAFACTOR = {"name": "adafactor", "min_dim_size_to_factor": 4, "momentum": 0.9}
SGD = {"name": "sgd", "momentum": 0.9, "gradient_scale": (("router", 0.5),)}


def variants(layout: str) -> list[Case]:
    """What a layout is tried with: noise is on in all of them."""
    short = layout.replace("=", "").replace(",", "_")
    return [
        Case(f"{short}_average", layout, ema_decay=0.5),
        Case(f"{short}_mixup_accumulation", layout, mixup_alpha=0.5, accumulation=2, messages=2),
        Case(f"{short}_adafactor_bpr", layout, optimizer=ADAFACTOR, moe={"batch_priority": True}),
        Case(f"{short}_sgd_token_groups", layout, optimizer=SGD, moe={"group_size": 32}, model={"pooling": "gap"}),
        Case(f"{short}_expert_choice", layout, moe={"router": "expert_choice", "num_selected_experts": 1}),
        Case(f"{short}_soft", layout, moe={"router": "soft", "num_experts": 8}, model={"pooling": "map"}, messages=3),
        Case(f"{short}_ensemble", layout, messages=3, moe={"ensemble_size": 2, "num_selected_experts": 1}),
        Case(f"{short}_not_finite", layout, bad_step=(3, 13)),
    ]


@pytest.mark.parametrize("layout", ["dp=2", "ep=2", "fsdp=2"])
def test_two_processes_equal_one(layout, tmp_path):
    check(layout, 2, tmp_path)


@pytest.mark.distributed4
@pytest.mark.parametrize("layout", ["dp=4", "ep=4", "fsdp=4", "dp=2,ep=2", "fsdp=2,ep=2", "dp=2,fsdp=2"])
def test_four_processes_equal_one(layout, tmp_path):
    check(layout, 4, tmp_path)


STARTS = [
    Case("learned", model={"pooling": "map", "representation_size": 8}, moe={"split_rngs": True}),
    Case("soft", model={"attention_qk_norm": True}, moe={"router": "soft"}),
]


@pytest.mark.parametrize("case", STARTS, ids=lambda case: case.name)
def test_a_skeleton_gets_the_parameters_of_a_model_that_was_made_as_a_whole(case):
    model = vm.VisionTransformer(config_of(case))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # what is not set shows
    torch.manual_seed(7)
    model.reset_parameters()
    expected = dict(model.named_parameters())
    for name, found in start(None, case).items():
        assert torch.equal(found, expected[name].detach()), name


def start_and_train(layout: str, first: Case, cases: list[Case]) -> dict[str, Any]:
    return {"start": start(layout, first)} | train_all(cases)


def check(layout: str, processes: int, folder: Path) -> None:
    cases, expected_start = variants(layout), start(None, STARTS[0])
    by_rank = run_job(processes, start_and_train, folder, layout, STARTS[0], cases)
    for found in by_rank:
        assert all(torch.equal(found["start"][name], value) for name, value in expected_start.items())
    for case in cases:
        expected = train(dataclasses.replace(case, layout=None))
        assert not all(expected["applied"]) if case.bad_step else all(expected["applied"])
        for found in by_rank:
            compare(found[case.name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep=2", "fsdp=2"])
def test_compiled_parts_of_a_divided_model_compute_the_same(layout, tmp_path):
    for plain, compiled in run_job(2, losses, tmp_path / "job", tmp_path, layout):
        assert len(plain) == 3 and plain[0] == pytest.approx(math.log(10), abs=1e-4)  # of the new head, all zeros
        assert plain[2] != plain[0]
        assert compiled == pytest.approx(plain, rel=1e-5)


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["applied"] == expected["applied"]
    for name in ("losses", "norms"):
        pairs = zip(found[name], expected[name], strict=True)
        applied = expected["applied"]
        for (ours, theirs), good in zip(pairs, applied, strict=True):
            if good:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
    for name in ("gradients", "parameters"):
        assert list(found[name]) == list(expected[name])
        for key, value in expected[name].items():
            ours, theirs = (without_key_bias(key, x) if name == "parameters" else x for x in (found[name][key], value))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def without_key_bias(name: str, x: torch.Tensor) -> torch.Tensor:
    """A bias of the keys moves all of a query's scores alike, so its gradient is 0 but for rounding, which Adam and
    Adafactor scale up to full steps."""
    if not name.endswith((".qkv.bias", ".kv.bias")):
        return x
    q_k_v = x.view(3 if ".qkv." in name else 2, -1)
    return torch.cat([q_k_v[:-2], q_k_v[-1:]])
