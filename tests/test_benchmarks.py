"""The scripts that measure the paper's claims: their arithmetic, and the page that they write."""

import dataclasses
import importlib
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
CLAIMS = ROOT / "benchmarks" / "claims"
SCRIPTS = ("equal_compute", "capacity", "experts_per_token", "specialisation", "transfer", "figures", "write_results")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a file of the folder, as the scripts import each other."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(CLAIMS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(CLAIMS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(CLAIMS / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert "--results" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_other_scripts_find_what_they_import(path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.syspath_prepend(str(path.parent))  # as python does for a script
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_the_page_is_what_the_stored_numbers_say(script):
    page = ROOT / "docs" / "results.md"
    text = page.read_text()
    assert script("write_results").with_tables(text, ROOT / "benchmarks" / "results") == text


def test_a_table_that_does_not_exist_is_named(script, tmp_path: Path):
    with pytest.raises(ValueError, match=r"'nothing'.*equal_compute"):
        script("write_results").with_tables("<!-- table nothing x.json -->\n<!-- end -->", tmp_path)


def test_accuracy_between_evaluations(script):
    module = script("equal_compute")
    points = [
        {"train_seconds": 10.0, "train_flops": 100, "top1": 0.2},
        {"train_seconds": 20.0, "train_flops": 200, "top1": 0.6},
        {"train_seconds": 30.0, "train_flops": 300, "top1": 0.7},
    ]
    # a quarter of the way from 0.2 to 0.6; before the first and after the last evaluation there is no line
    assert module.interpolated(points, "train_seconds", 12.5) == pytest.approx(0.3)
    assert module.interpolated(points, "train_seconds", 5.0) == 0.2
    assert module.interpolated(points, "train_seconds", 99.0) == 0.7
    # 0.65 lies halfway from 0.6 to 0.7
    assert module.first_reached(points, "train_flops", 0.65) == pytest.approx(250)
    assert module.first_reached(points, "train_flops", 0.1) == 100
    assert module.first_reached(points, "train_flops", 0.8) is None


def test_comparison_of_curves(script):
    sparse = [{"train_seconds": 2.0 * s, "train_flops": 10 * s, "top1": a} for s, a in ((1, 0.4), (2, 0.6), (3, 0.8))]
    dense = [{"train_seconds": 1.0 * s, "train_flops": 10 * s, "top1": a} for s, a in ((1, 0.3), (2, 0.5), (3, 0.6))]
    found = script("equal_compute").compare([sparse], [dense])
    # 0.8 - 0.6; at the dense run's 3 seconds the sparse one is halfway from 0.4 to 0.6; it has 0.6 at 20 of the
    # dense run's 30 operations and 4 of its 3 seconds
    assert found["final"]["per_seed"] == [pytest.approx(0.2)]
    assert found["at_dense_seconds"]["per_seed"] == [pytest.approx(-0.1)]
    assert found["to_dense_accuracy"]["train_flops"] == [pytest.approx(20 / 30)]
    assert found["to_dense_accuracy"]["train_seconds"] == [pytest.approx(4 / 3)]


def test_a_run_of_another_recipe_is_refused(script, tmp_path: Path):
    runs = script("runs")
    arguments = runs.parser(None).parse_args(
        ["--data-set", "fashion_mnist", "--work", str(tmp_path), "--train-steps", "3", "--no-training"]
    )
    with pytest.raises(ValueError, match="holds no finished run"):
        runs.trained(arguments, "sparse")
    first, second = (runs.wanted(arguments, "sparse", seed) for seed in (0, 1))
    runs.check_same(first, first)
    with pytest.raises(ValueError, match="seed is 0, the recipe has 1"):
        runs.check_same(first, second)


def test_each_of_the_upcycling_runs_goes_on_at_its_own_rate(monkeypatch: pytest.MonkeyPatch):
    given = ["--rate", "0.002", "--router-rate", "5", "--expert-rate", "0.5"]
    monkeypatch.setattr(sys, "argv", ["upcycle.py", "--out", "x", *given])
    script = runpy.run_path(str(ROOT / "benchmarks" / "upcycle.py"))
    recipe = dataclasses.replace(script["get_recipe"]("fashion_mnist"), steps=100, epochs=None)
    for own, dense_rate in ([], 0.002), (["--dense-rate", "0.004"], 0.004):
        monkeypatch.setattr(sys, "argv", [*sys.argv, *own])
        arguments = script["parse"]()
        runs = {name: script["continued"](recipe, arguments, name, Path("m"), 400) for name in ("dense", "upcycled")}
        # only the upcycled model has routers and experts
        assert runs["dense"].optimizer.learning_rate_factors == ()
        assert dict(runs["upcycled"].optimizer.learning_rate_factors) == {r"router\.gate": 5.0, r"mlp\.experts\.": 0.5}
        assert runs["dense"].optimizer.learning_rate.peak_value == dense_rate
        assert runs["upcycled"].optimizer.learning_rate.peak_value == 0.002
        # a twentieth of the steps
        assert {run.optimizer.learning_rate.warmup_steps for run in runs.values()} == {20}


def test_the_routing_of_an_upcycled_model_is_changed_and_its_parameters_kept():
    script = runpy.run_path(str(ROOT / "benchmarks" / "upcycle.py"))
    recipe = script["get_recipe"]("fashion_mnist")
    model = script["create_model"](recipe.model)
    model.class_names = tuple("abcdefghij")
    changed = script["with_moe"](model, recipe, ["router=expert_choice", "capacity_factor=1"])
    moe = recipe.model.moe
    assert changed.config.moe == dataclasses.replace(moe, router="expert_choice", capacity_factor=1.0)
    assert changed.class_names == model.class_names
    for name, parameter in model.state_dict().items():
        assert changed.state_dict()[name].equal(parameter), name
    with pytest.raises(ValueError, match=r"capacty_factor.*capacity_factor"):
        script["with_moe"](model, recipe, ["capacty_factor=1"])
