"""The command line: what it does, and that a user's mistake is one clear line and exit code 2, never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visionmoe as vm
from visionmoe.cli import main
from visionmoe.cli.main import COMMANDS

TINY = ["--set", "model.num_layers=2", "--set", "model.moe.layers=[1]", "--set", "model.hidden_size=16", "--set",
        "model.mlp_dim=32", "--set", "model.num_heads=2", "--set", "data.train_split=train[:200]", "--set",
        "data.eval_split=test[:100]", "--set", "data.batch_size=50", "--set", "tensorboard=false"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--steps", "3", "--out", str(out), *TINY]) == 0
    return out


@pytest.fixture
def workplace(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the mistakes below name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "typo.json").write_text('{"hidden_sizes": 16}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"not an image")
    vm.create_model(vm.load(trained / "model").config, layers=()).save_pretrained(tmp_path / "dense")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((trained / "model" / "config.json").read_bytes())
    weights = (trained / "model" / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for number in range(12):  # one class more than the model has, and another one
        folder = tmp_path / "twelve" / f"class{number:02}"
        folder.mkdir(parents=True)
        Image.fromarray(np.full((28, 28), number, dtype=np.uint8)).save(folder / "1.png")
    return tmp_path


def test_load_takes_a_run_as_the_commands_do(trained):
    state = vm.load(trained / "model").state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in vm.load(trained).state_dict().items())


MISTAKES = {
    "unknown command": ("trian", "unknown command 'trian'; did you mean 'train'?"),
    "unknown option": ("train --stepz 3", "--stepz"),
    "not a number": ("train --steps many", "--steps must be INT, got 'many'"),
    "no value": ("train --steps", "Missing value for argument '--steps'"),
    "no model": ("evaluate", "required but missing: PATH"),
    "one argument too many": ("evaluate run fashion-mnist", "Unrecognized options: fashion-mnist"),
    "not a choice": ("sweep run --order random", "('vanilla', 'batch-priority', 'both')"),
    "unknown recipe": ("train --recipe fashion_minst", "did you mean 'fashion_mnist'?"),
    "recipe of the other command": ("train --recipe finetune", "use visionmoe finetune PATH --recipe finetune"),
    "unknown model": ("train --model vmoe_b16_e8_every3", "unknown model 'vmoe_b16_e8_every3'; near ones: vmoe_b16_e8"),
    "unknown model to info": ("info vit_b17", "unknown model 'vit_b17'; near ones: vit_b16"),
    "unknown data": ("evaluate run --data cifar", "data must be one of fashion-mnist, folder:PATH"),
    "unknown split": ("evaluate run --data fashion-mnist --split valid", "valid"),
    "unknown field": ("train --set optimizer.learning_rate.peak_valeu=1", "did you mean 'optimizer.learning_rate.peak"),
    "wrong type": ("train --set model.hidden_size=wide", "model.hidden_size must be int, got 'wide'"),
    "impossible value": ("train --set data.batch_size=0", "batch_size must be between 1"),
    "not an assignment": ("train --set seed", "NAME=VALUE, got 'seed'"),
    "steps and epochs": ("train --steps 3 --epochs 2", "--steps or --epochs"),
    "recipe and config": ("train --recipe fashion_mnist --config run/config.json", "--recipe or --config"),
    "config without out": ("train --config run/config.json", "--config needs --out"),
    "missing folder": ("evaluate nowhere", "'nowhere' is neither a directory"),
    "missing data folder": ("evaluate run --data folder:nowhere", "nowhere"),
    "data folder without classes": ("evaluate run --data folder:empty --split train", "one folder of images per class"),
    "broken images": ("evaluate run --data folder:images --split train", "cat/1.png"),
    "more classes than the model": ("evaluate run --data folder:twelve --split train", "classes, folder:twelve has 12"),
    "cut weights": ("evaluate cut", "cut/model.safetensors"),
    "no data": ("evaluate run/model", "run/model is no run that says its images: give --data, one of fashion-mnist"),
    "not a model": ("evaluate empty", "empty/config.json is missing"),
    "broken config": ("info broken.json", "broken.json is not valid JSON"),
    "typo in a config": ("info typo.json", "did you mean 'hidden_size'?"),
    "missing config": ("info nowhere.json", "nowhere.json"),
    "capacity of zero": ("evaluate run --capacity-factor 0", "capacity_factor must be > 0 and finite, got 0.0"),
    "K above the experts": ("sweep run --num-selected-experts 9", "must be between 1 and 8, got 9"),
    "layer without experts": ("sweep run --layers 0", "layers must be among the sparse ones [1], got [0]"),
    "sweep of a dense model": ("sweep dense --data fashion-mnist", "the model has no sparse layers"),
    "dense model with experts": ("sweep run --dense run", "--dense must be a model without experts"),
    "missing dense model": ("sweep run --dense nowhere", "'nowhere' is neither a directory"),
    "no budget": ("tune run", "give --flops or --images-per-second, one of them"),
    "two budgets": ("tune run --flops 0.9 --images-per-second 9", "give --flops or --images-per-second, one of them"),
    "budget out of reach": ("tune run --flops 0.2", "(the lowest setting) and 1 (the present one)"),
    "budget above the present": ("tune run --flops 1.5", "(the present one) of 0.23 MFLOP per image, got 1.500"),
    "no number as a budget": ("tune run --flops nan", "--flops must be a finite number, got nan"),
    "speed out of reach": ("tune run --images-per-second 1e9", "images_per_second must be between"),
    "tuning a dense model": ("tune dense --data fashion-mnist --flops 0.9", "the model has no sparse layers"),
    "calibration on held-out images": ("tune run --flops 0.9 --calibration-split test[:50]",
                                       "50 images of the calibration split test[:50] are in the held-out split"),
    "no device": ("evaluate run --device tpu", "device 'tpu' cannot be used"),
    "out is a file": ("evaluate run --out file", "file"),
    "out below a file": ("evaluate run --out file/out", "file/out: Not a directory"),
    "a run is there": ("train --steps 3 --out run", "run already holds a run"),
    "nothing to resume": ("train --steps 3 --out empty --resume", "empty holds no run to resume"),
    "another config on resume": ("train --steps 4 --out run --resume", "a resumed run must keep its config"),
    "another recipe on resume": ("train --recipe fashion_mnist_dense --out run --resume", "must keep its config: "),
    "out is a run": ("evaluate run --out run", "--out run is the folder of a training run"),
    "no output folder": ("convert run", "required but missing: --out DIR"),
    "no such prefix": ("convert ckpt --config run/model/config.json --out new", "ckpt"),
    "not a format": ("convert run --to onnx --out new", "('safetensors', 'vmoe')"),
    "size that patches do not divide": ("info vit_b16 --image-size 225", "image_size must be a multiple of patch_size"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: str, workplace: Path, capfd: pytest.CaptureFixture[str]):
    arguments, expected = MISTAKES[mistake]
    assert main(arguments.split()) == 2
    error = capfd.readouterr().err
    # The run that is there was made with other settings, so notes ("warning: ...") may come before the error.
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, error
    assert lines[0].startswith("visionmoe")
    assert expected in lines[0]
    assert "Traceback" not in error
    assert not (workplace / "new" / "results.json").exists()


def test_an_output_folder_that_cannot_be_written(workplace: Path, capfd: pytest.CaptureFixture[str]):
    if os.geteuid() == 0:
        folder = Path("/proc/visionmoe")  # root may write everywhere else
    else:
        folder = workplace / "locked"
        folder.mkdir(mode=0o500)
    assert main(["info", "vit_b16", "--out", str(folder)]) == 2
    assert str(folder) in capfd.readouterr().err


def test_a_missing_extra_says_how_to_install_it(
    workplace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.startswith("visionmoe.analysis.figures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("visionmoe.analysis.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert main(["sweep", "run"]) == 2
    assert "needs matplotlib, which is not installed: pip install 'visionmoe[figures]'" in capfd.readouterr().err


@pytest.mark.parametrize("too_much", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)])
def test_out_of_memory_is_one_line(
    too_much: Callable[[], object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("visionmoe.cli.evaluation.run", lambda options: too_much())
    assert main(["evaluate", "run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("visionmoe evaluate: out of memory (") and error.count("\n") == 1
    assert "--batch-size" in error


def test_as_a_program(tmp_path: Path):
    """The same from outside, with a real standard error: no traceback, no box, no colours."""
    program = [sys.executable, "-m", "visionmoe"]
    done = subprocess.run([*program, "evaluate", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("visionmoe evaluate: 'nowhere' is neither")
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: visionmoe COMMAND" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    assert "--out" in capsys.readouterr().out


def test_help_of_the_program_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"visionmoe {vm.__version__}\n"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_train_evaluate_and_sweep(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = results(trained)
    assert (run["status"], run["step"]) == ("finished", 3)
    # Without --data: the images of the run, in one batch as there, so the same numbers.
    assert main(["evaluate", str(trained), "--out", str(tmp_path / "e")]) == 0
    evaluated = results(tmp_path / "e")
    assert evaluated["num_images"] == 100
    assert (evaluated["data"], evaluated["split"], evaluated["batch_size"]) == ("fashion-mnist", "test[:100]", 256)
    assert evaluated["top1"] == run["eval"]["test"]["top1"]
    assert evaluated["loss"] == pytest.approx(run["eval"]["test"]["loss"], rel=1e-5)
    assert set(evaluated["per_class_accuracy"]) <= {"Bag", "Coat", "Dress", "Pullover", "Sandal", "Shirt", "Sneaker",
                                                    "T-shirt/top", "Trouser", "Ankle boot"}  # fmt: skip
    assert "top-1" in capsys.readouterr().out
    arguments = ["--capacity-factors", "1.05", "0.2", "--num-selected-experts", "1", "2"]
    assert main(["sweep", str(trained), *arguments, "--out", str(tmp_path / "s")]) == 0
    points = results(tmp_path / "s")["points"]
    assert len(points) == 2 * 2 * 2
    own = next(p for p in points if (p["num_selected_experts"], p["capacity_factor"]) == (2, 1.05))
    assert own["top1"] == evaluated["top1"]
    assert (tmp_path / "s" / "accuracy_vs_compute.png").stat().st_size > 10_000


def test_sweep_of_some_layers_beside_a_dense_model(workplace: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    config = vm.load(workplace / "run" / "model").config
    dense = vm.create_model(config.replace(image_size=35), layers=())  # of another size: it gets its own pixels
    dense.save_pretrained("another")
    arguments = ["sweep", "run", "--capacity-factors", "1.0", "0.3", "--num-selected-experts", "1", "2"]
    arguments += ["--layers", "1", "--dense", "another", "--out", "swept"]
    assert main(arguments) == 0
    first = results(workplace / "swept")
    assert first["layers"] == [1]
    assert first["own_routing"]["1"]["num_selected_experts"] == 2
    assert len(first["points"]) == 2 * 2 * 2
    for point in first["points"]:
        assert point["milliseconds_per_image"] == pytest.approx(1000 / point["images_per_second"])
    best = [p for p in first["points"] if p["on_pareto_frontier"]]
    assert sorted(best, key=lambda p: p["flops"]) == first["pareto_frontier"]
    assert max(p["top1"] for p in first["points"]) == first["pareto_frontier"][-1]["top1"]
    assert first["dense"]["flops"] == vm.count_flops(dense)
    assert 0 <= first["dense"]["top1"] <= 1
    assert "median" in first["timing"]["method"]
    assert sum(q["images"] for q in first["per_image_compute"]["quartiles"]) == 100
    for name in ("accuracy_vs_compute.png", "accuracy_vs_time.png", "per_image_compute.png"):
        assert (workplace / "swept" / name).stat().st_size > 10_000
    # Again, with one setting more: the eight are not evaluated again, and are the same to the last digit.
    capsys.readouterr()
    arguments[3:5] = ["1.0", "0.3", "0.5"]
    drawn = (workplace / "swept" / "per_image_compute.png").stat().st_mtime_ns
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "8 of 12 settings were evaluated before" in out
    assert "results of other models" not in out  # those of the dense model are not
    assert (workplace / "swept" / "per_image_compute.png").stat().st_mtime_ns == drawn
    assert results(workplace / "swept")["per_image_compute"] == first["per_image_compute"]
    second = results(workplace / "swept")
    old = [p for p in second["points"] if p["capacity_factor"] != 0.5]
    keys = ("num_selected_experts", "capacity_factor", "batch_priority", "top1", "loss", "flops", "dropped")
    assert [[p[k] for k in keys] for p in old] == [[p[k] for k in keys] for p in first["points"]]
    assert all(p["finite"] for p in second["points"])
    # Other images in the same folder are not mixed with them.
    assert main([*arguments, "--split", "test[100:150]"]) == 0
    out = capsys.readouterr().out
    assert "results of other models or images; they are left alone" in out
    assert "were evaluated before" not in out
    assert results(workplace / "swept")["num_images"] == 50


def reachable_speed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """--images-per-second with something between the slowest and the fastest that the command names."""
    assert main([*arguments, "--images-per-second", "1"]) == 2
    allowed = capsys.readouterr().err.split("between ")[1].split(" and ")
    slow, fast = (float(text.split()[0]) for text in allowed)
    return ["--images-per-second", str(0.7 * slow + 0.3 * fast)]


@pytest.mark.parametrize("budget", [["--flops", "0.93"], ["--images-per-second", "SPEED"]], ids=lambda b: b[0])
def test_tune(budget: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["tune", str(trained), "--split", "test[:60]", "--out", str(tmp_path)]
    for _ in range(4):  # a busy machine may change its speed between two measurements
        code = main([*arguments, *(reachable_speed(arguments, capsys) if budget[1] == "SPEED" else budget)])
        if code != 2:
            break
    found = results(tmp_path)
    assert code == (0 if found["speed"] is None or found["speed"]["met"] else 1)
    assert (found["calibration_split"], found["calibration_images"], found["check_images"]) == ("train[:200]", 100, 100)
    assert (found["split"], found["num_images"]) == ("test[:60]", 60)
    assert found["tuned"]["flops"] <= found["budget"]["flops"] <= found["present"]["flops"]
    assert found["tuned"]["held_out"]["top1"] >= found["uniform"]["held_out"]["top1"]  # one sparse layer: the same
    model = vm.load(tmp_path / "model")
    assert (found["batch_size"], found["calibration_batch_size"]) == (256, 100)
    assert vm.count_flops(model, batch_size=256) == found["tuned"]["flops"]
    setting = found["tuned"]["routing"]["1"]
    assert model.config.moe.routing(1) == vm.RoutingSetting(**setting)
    assert setting["batch_priority"]
    assert model.class_names is not None and model.class_names == vm.load(trained / "model").class_names
    before, after = vm.load(trained / "model").state_dict(), model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "tuned_routing.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "kept:" in text and "present" in text
    # Again: nothing is evaluated again, but speeds are measured again, and may then ask for another budget.
    again_code = main([*arguments, *(reachable_speed(arguments, capsys) if budget[1] == "SPEED" else budget)])
    again = results(tmp_path)
    assert again["budget"] == found["budget"] or found["speed"] is not None
    if found["speed"] is None:
        assert again_code == 0
        done = found["evaluations"]
        assert again["evaluations"] == {"new": 0, "reused": done["new"] + done["reused"]}
        speeds = [one["tuned"]["held_out"].pop("images_per_second") for one in (found, again)]
        assert again["tuned"] == found["tuned"]
        assert speeds[0] != speeds[1]
    else:
        assert again_code == (0 if again["speed"]["met"] else 1)
        assert again["speed"]["reached"] != found["speed"]["reached"]
        assert again["evaluations"]["reused"] >= 3


def test_evaluate_with_streamed_experts(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for folder, stream in (("a", []), ("b", ["--stream"])):
        arguments = ["--split", "test[:50]", "--capacity-factor", "0.7", "--out", str(tmp_path / folder)]
        assert main(["evaluate", str(trained), *arguments, *stream]) == 0
    usual, streamed = (results(tmp_path / folder) for folder in ("a", "b"))
    for name in ("top1", "top5", "loss", "dropped", "per_class_accuracy"):
        assert usual[name] == streamed[name], name
    assert main(["evaluate", str(trained), "--stream", "--config", "x.json", "--out", str(tmp_path / "c")]) == 2
    assert "leave --config out" in capsys.readouterr().err


def test_evaluate_at_another_setting(trained: Path, tmp_path: Path):
    changes = ["--num-selected-experts", "1", "--capacity-factor", "0.5", "--batch-priority", "True"]
    arguments = [*changes, "--bf16", "--split", "test[:50]", "--image-size", "35", "--out", str(tmp_path)]
    assert main(["evaluate", str(trained), *arguments]) == 0
    assert results(tmp_path)["routing"] == {"num_selected_experts": 1, "capacity_factor": 0.5, "batch_priority": True}


def test_a_run_is_repeated_from_its_config(trained: Path, tmp_path: Path):
    out = tmp_path / "again"
    assert main(["train", "--config", str(trained / "config.json"), "--out", str(out)]) == 0
    first, second = (vm.load(folder / "model").state_dict() for folder in (trained, out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_finetune(trained: Path, workplace: Path):
    arguments = ["--data", "folder:twelve", "--steps", "2", "--set", "data.eval_split=train"]
    more = ["--set", "data.batch_size=6", "--set", "tensorboard=false", "--set", "image_size=35", "--out", "tuned"]
    assert main(["finetune", str(trained), *arguments, *more]) == 0
    model = vm.load(workplace / "tuned" / "model")
    assert (model.config.num_classes, model.config.image_size) == (12, 35)


def test_convert_there_and_back(trained: Path, tmp_path: Path):
    assert main(["convert", str(trained), "--to", "vmoe", "--shards", "2", "--out", str(tmp_path / "vmoe")]) == 0
    config = ["--config", str(tmp_path / "vmoe" / "config.json")]
    assert main(["convert", str(tmp_path / "vmoe" / "ckpt"), *config, "--out", str(tmp_path / "back")]) == 0
    before, after = trained / "model" / "model.safetensors", tmp_path / "back" / "model.safetensors"
    assert before.read_bytes() == after.read_bytes()
    assert results(tmp_path / "back")["parameters"] == results(trained)["num_parameters"]


@pytest.mark.parametrize(
    ("model", "parameters", "per_token"),
    [
        ("vit_b16", 86_567_656, 86_567_656),
        # 6 layers of 8 experts of 2*768*3072 + 3072 + 768 = 4,722,432 parameters, of which a token meets 2.
        ("vmoe_b16_e8_every2", 284_946_664, 284_946_664 - 6 * 6 * 4_722_432),
    ],
)
def test_info(model: str, parameters: int, per_token: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", model, "--out", str(tmp_path)]) == 0
    facts = results(tmp_path)
    assert (facts["parameters"], facts["parameters_per_token"]) == (parameters, per_token)
    out = capsys.readouterr().out
    assert f"{parameters:,}" in out
    if per_token < parameters:  # 2 bytes * 284,946,664, and * (284,946,664 - 48*4,722,432)
        assert "0.57 GB, 0.12 GB without the experts" in out


def test_info_of_a_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(trained), "--out", str(tmp_path)]) == 0
    assert "8 in blocks 1" in capsys.readouterr().out
    assert results(tmp_path)["parameters"] == results(trained)["num_parameters"]


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path):
    """As a program: Ctrl-C leaves with 130 after saving, and the resumed run ends with code 0."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "visionmoe", "train", "--out", str(out), *TINY, "--set", "log_every=1"]
    command += ["--steps", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"train"' in log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert results(out)["status"] == "interrupted"
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(out)["step"] == 60
