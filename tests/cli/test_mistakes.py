"""What is said where a folder, a path or a pattern is not what a command needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visionmoe as vm
from visionmoe.checkpoint.store import list_checkpoints
from visionmoe.cli import main
from visionmoe.files import read_json

TINY = ["--set", "model.num_layers=2", "--set", "model.moe.layers=[1]", "--set", "model.hidden_size=16", "--set",
        "model.mlp_dim=32", "--set", "model.num_heads=2", "--set", "data.train_split=train[:200]", "--set",
        "data.eval_split=test[:50]", "--set", "data.batch_size=50", "--set", "tensorboard=false"]  # fmt: skip


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints, whose model is gone as if it had been stopped."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unfinished") / "run"
    assert main(["train", "--steps", "20", "--set", "checkpoint_every=10", "--out", str(out), *TINY]) == 0
    (out / "model").rename(out.parent / "model")
    return out


def said(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake."""
    capfd.readouterr()
    assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("command", ["evaluate", "sweep", "tune", "analyze", "fewshot", "finetune", "upcycle", "info"])
def test_a_checkpoint_or_a_run_in_the_place_of_a_model(command, unfinished, tmp_path, capfd):
    more = {"fewshot": ["--data", "fashion-mnist"], "tune": ["--flops", "0.9"]}.get(command, [])
    step = unfinished / "checkpoints" / "step_00000020"
    convert = f"visionmoe convert {step} --out DIR"
    out = ["--out", str(tmp_path / "out")]
    assert f"the run in {unfinished} has not finished" in (line := said([command, str(unfinished), *more, *out], capfd))
    assert line.endswith(convert)
    line = said([command, str(step), *more, *out], capfd)
    assert f"{step} is what a run resumes from, no model: convert it first: {convert}" in line
    assert f"give the run, {unfinished}" in said([command, str(step.parent), *more, *out], capfd)


def test_what_the_hint_says_works(unfinished, tmp_path, capfd):
    path = list_checkpoints(unfinished)[-1][1]
    assert main(["convert", str(path), "--out", str(tmp_path / "model")]) == 0
    assert vm.load(tmp_path / "model").class_names == vm.load(unfinished.parent / "model").class_names
    assert f"resume it, or convert its checkpoint: visionmoe convert {path} --out DIR" in said(
        ["convert", str(unfinished), "--out", str(tmp_path / "b")], capfd
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")  # stopped before its first checkpoint
    line = said(["evaluate", str(tmp_path / "run"), "--out", str(tmp_path / "out")], capfd)
    assert line.endswith("has no folder model yet; resume it")


def test_fine_tuning_a_path_that_is_not_there(tmp_path, capfd):
    for more in ([], ["--data", "folder:nowhere"]):
        line = said(["finetune", "/nonexistent", *more, "--out", str(tmp_path / "run")], capfd)
        assert "'/nonexistent' is neither a directory, nor a checkpoint" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "recipe"), [("3", []), ("500", []), ("3", ["--recipe", "fashion_mnist", *TINY])])
def test_resuming_with_another_number_of_steps(steps, recipe, unfinished, capfd):
    line = said(["train", *recipe, "--steps", steps, "--out", str(unfinished), "--resume"], capfd)
    assert line.endswith(f"a resumed run must keep its config: steps was 20, got {steps}")


def test_a_pattern_of_shards_that_the_shell_took_apart(unfinished, capfd):
    shards = [f"wds:shards-{number}.tar" for number in range(3)]
    model = str(unfinished.parent / "model")
    line = said(["evaluate", model, "--data", *shards], capfd)
    assert line.endswith("quote it, as 'wds:NAME-{000..127}.tar'")
    line = said(["fewshot", model, "--data", *shards, "--out", str(unfinished.parent / "f")], capfd)
    assert line.endswith("quote it, as 'wds:NAME-{000..127}.tar'")
    assert "quote it" not in said(["evaluate", model, "--data", *shards[:1]], capfd)
    assert "quote it" not in said(["fewshot", model, "--data", "wds:a.tar", "wds:b.tar"], capfd)


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(tmp_path, capfd):
    if os.geteuid() == 0:
        folder, reason = Path("/proc/visionmoe"), "No such file or directory"  # root may write everywhere else
    else:
        folder, reason = tmp_path / "locked" / "run", "Permission denied"
        (tmp_path / "locked").mkdir(mode=0o500)
    line = said(["train", "--steps", "2", "--out", str(folder), *TINY], capfd)
    assert line == f"visionmoe train: cannot write to {folder}: {reason}"


def test_a_disk_that_gets_full_is_one_line_that_says_what_is_kept(tmp_path):
    """The limit on the size of a file stands for the disk: the log outgrows it after the first checkpoints."""
    out = tmp_path / "run"
    limited = (
        "import resource, sys; from visionmoe.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY)); "
        "sys.exit(main(sys.argv[2:]))"
    )
    training = ["train", "--steps", "2000", "--set", "log_every=1", "--set", "checkpoint_every=10", "--out", str(out)]
    command = [sys.executable, "-c", limited, str(400_000), *training, *TINY]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    kept = list_checkpoints(out)[-1][1]
    line = f"visionmoe train: cannot write to {out}: File too large; {kept} is kept, resume goes on there"
    assert done.stderr.splitlines()[-1] == line and "Traceback" not in done.stderr
    assert read_json(kept / "state.json")["step"] >= 10


REFUSED = {
    "no path": (["evaluate", ""], "the model's path is empty"),
    "no name of a model": (["train", "--model", ""], "unknown model ''"),
    "no name of a split": (["evaluate", "MODEL", "--data", "fashion-mnist", "--split", ""], "''"),
    "a device without memory": (["evaluate", "MODEL", "--device", "meta"], "device 'meta' cannot be used"),
    "converting a model onto itself": (["convert", "MODEL", "--out", "MODEL"], "holds the model that is read"),
    "upcycling a model onto itself": (["upcycle", "MODEL", "--out", "MODEL"], "holds the model that is read"),
    "shards of one file": (
        ["convert", "MODEL", "--shards", "2"],
        "--shards is for --to vmoe, got 2",
    ),
    "a seed without end": (
        ["upcycle", "MODEL", "--seed", "99999999999999999999"],
        "seed must be between 0 and 2^63 - 1",
    ),
    "nothing to measure": (["bench", "--sections"], "sections must name at least one of ceilings, layer"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_was_accepted_in_silence(mistake, unfinished, tmp_path, capfd):
    arguments, expected = REFUSED[mistake]
    arguments = [text.replace("MODEL", str(unfinished.parent / "model")) for text in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    before = (unfinished.parent / "model" / "model.safetensors").read_bytes()
    assert expected in said([*arguments, *out], capfd)
    assert (unfinished.parent / "model" / "model.safetensors").read_bytes() == before
