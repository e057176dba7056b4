"""`visionmoe plan`: its answer, its files, and one line for every mistake."""

import json
from pathlib import Path

import pytest
from PIL import Image

from visionmoe.cli import main

SMALL = ["plan", "--model", "vmoe_s32_e8_last2", "--devices", "4"]


def test_the_15b_model_fits_eight_devices_with_expert_parallelism(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["plan", "--model", "vmoe_15b", "--devices", "8", "--memory", "80GB", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "14,705,071,769" in text and "it fits: dp=1,fsdp=1,ep=8" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["optimizer"] == "adafactor" and results["optimizer_options"]["momentum_dtype"] == "bfloat16"
    assert results["recommended"] == "dp=1,fsdp=1,ep=8" and len(results["layouts"]) == 10
    for one in results["layouts"]:
        assert one["memory"]["peak"] == sum(one["memory"]["at_peak"].values())
        assert one["fits"] == (one["memory"]["peak"] <= 80e9)
    with Image.open(tmp_path / "plan.png") as picture:
        assert min(picture.size) > 300


def test_where_nothing_fits_it_says_how_many_devices_would(tmp_path: Path, capsys: pytest.CaptureFixture):
    small = [*SMALL, "--memory", "400MB", "--batch-size", "64", "--out", str(tmp_path)]
    assert main(small) == 0
    assert "none fits" in (text := capsys.readouterr().out)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["recommended"] is None and results["fewest_devices"]["devices"] > 4
    assert f"the smallest number of devices that would is {results['fewest_devices']['devices']}" in text


def test_inference_of_one_layout_at_given_rates(tmp_path: Path, capsys: pytest.CaptureFixture):
    given = ["--mode", "inference", "--layout", "dp=2,ep=2", "--flops-rate", "2", "--bandwidth", "100"]
    assert main([*SMALL, *given, "--link-bandwidth", "5", "--num-experts", "16", "--out", str(tmp_path)]) == 0
    assert "it fits" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    (one,) = results["layouts"]
    assert results["rates"] == {"flops": 2e12, "bandwidth": 1e11, "link": 5e9}
    assert results["config"]["moe"]["num_experts"] == 16 and one["memory"]["gradients"] == 0
    assert one["seconds"]["compute"] == pytest.approx(results["flops_per_step"] / 4 / 2e12)


def test_sizes_are_shown_in_units_that_suit(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([*SMALL, "--memory", "1MB", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "memory 1 MB" in text and " of 1 MB; " in text and "0.001 GB" not in text


def test_on_a_cpu_the_process_is_planned_too(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([*SMALL, "--device", "cpu", "--precision", "float32", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "process" in text and "oneDNN's code (13 MB) and libraries (730 MB)" in text
    for one in json.loads((tmp_path / "results.json").read_text())["layouts"]:
        parts = one["process"]
        assert parts["tensors"] == one["memory"]["peak"]
        assert parts["total"] == sum(parts[name] for name in ("tensors", "holes", "onednn", "imports")) == one["needed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "80 gigs"], "a size must be like 80GB"),
        (["--layout", "dp=2"], "'dp=2' is for 2 processes, but the job has 4: --devices says how many"),
        (["--layout", "tp=4"], "must be like dp=2,fsdp=2,ep=2"),
        (["--layout", "dp=1,ep=4", "--num-experts", "6"], "ep must divide the 6 experts, got 4"),
        (["--batch-size", "6"], "the batch size must be a multiple"),
        (["--devices", "0"], "devices must be >= 1"),
        (["--mode", "inference", "--accumulation", "2"], "accumulation must be 1 in inference"),
        (["--flops-rate", "0"], "flops_rate must be > 0"),
        (["--model", "vmoe_b99"], "unknown model 'vmoe_b99'"),
        (["--model", "nope"], "unknown model 'nope'; names are like vit_b16, vmoe_b16_e8_every2"),
        (["--accumulation", "0"], "accumulation must be >= 1, got 0"),
        (["--batch-size", "0"], "batch_size must be >= 1, got 0"),
        (["--optimizer", "lion"], "--optimizer"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([*SMALL, "--out", str(tmp_path), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
