"""What `visionmoe bench` measures, on small shapes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import visionmoe as vm
from visionmoe.bench import build, ceilings, layer, memory, models, products, share
from visionmoe.bench.measure import Case, Effort, LeftOutError, Row, Setup, Target, Times, in_turns
from visionmoe.bench.plan import plan
from visionmoe.bench.report import line, shown
from visionmoe.bench.run import Results

CPU = torch.device("cpu")
QUICK = Setup(CPU, quick=True)


def test_ratios_are_of_neighbours_in_time():
    # The machine is twice as slow in the second round, for both: every round's ratio is 2, that of medians too; in the
    # third round only `a` is disturbed, and the median forgets it.
    times = Times({"a": (2.0, 4.0, 9.0), "b": (1.0, 2.0, 1.0)})
    assert times.ratio("a", "b") == 2.0
    assert times.ms("a") == 4000 and times.rounds == 3
    assert times.median(lambda now: 1 - now["b"] / now["a"]) == 0.5


def test_calls_take_turns():
    order: list[str] = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: time.sleep(0.002)}, Effort(4, 5.0), CPU)
    assert len(order) == 5 and times.rounds == 4
    assert times.ms("b") >= 2.0 > times.ms("a")


@pytest.mark.parametrize(
    ("target", "value", "met", "text"),
    [
        (Target(0.8), 0.8, True, "<= 0.8"),
        (Target(0.8), 0.81, False, "<= 0.8"),
        (Target(15, at_least=True), 14.9, False, ">= 15"),
        (Target(15, at_least=True), 15.0, True, ">= 15"),
    ],
)
def test_targets(target: Target, value: float, met: bool, text: str):
    assert target.met(value) is met
    assert str(target) == text


def test_targets_are_of_the_full_sizes_on_a_cpu():
    assert Setup(CPU).target(1.0) == Target(1.0)
    assert QUICK.target(1.0) is None
    assert Setup(torch.device("cuda")).target(1.0) is None


def test_every_promised_figure_has_a_case_and_every_case_a_key_of_its_own():
    cases = plan(Setup(CPU), ("ceilings", "layer", "share", "adaptive", "models", "growth", "memory"))
    keys = [json.dumps([c.section, c.name, dict(c.settings)]) for c in cases]
    assert len(set(keys)) == len(keys)
    # S/32, B/32, B/16, L/16 x (every 2, last 2) x E (8, 32) x dtype x (inference, training), and four latencies
    assert sum(c.section == "models" for c in cases) == 4 * 2 * 2 * 2 * 2 + 4
    # tokens, E, K and C, in two dtypes
    assert sum(c.section == "growth" for c in cases) == 2 * (6 + 5 + 3 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compared_products_are_those_of_the_layer(dtype: torch.dtype):
    size = layer.LayerSize("tiny", 40, 32, 64, num_experts=4, num_selected_experts=2, capacity_factor=0.5)
    built = layer.build_layer(size, dtype, CPU)
    # capacity: 40 * 2 * 0.5 / 4 = 10 places, up to a multiple of 4: 12; loads are about 20, so all are full
    assert built.counts == [12, 12, 12, 12] and built.kept == 48
    assert layer.layer_flops(size, built.kept) == 48 * 2 * (2 * 32 * 64) + 40 * 2 * 32 * 4
    assert layer.layer_bytes(size, dtype) == dtype.itemsize * (4 * 2 * 32 * 64 + 2 * 40 * 32)
    parameters = products.mlp_parameters(32, 64, built.tokens)
    rows = built.tokens[0]
    expected = F.linear(
        F.gelu(F.linear(rows, parameters[0], parameters[1]), approximate="tanh"), parameters[2], parameters[3]
    )
    torch.testing.assert_close(products.mlp(rows, parameters), expected, rtol=0, atol=0)
    if products.can_pack(CPU):
        with torch.no_grad():
            found = products.packed_mlp(rows, products.packed(parameters))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_stages_by_themselves_make_the_layer():
    """Sorting, gathering, the experts' own MLPs and combining, as the share section times them, give its output."""
    size = layer.LayerSize("tiny", 40, 32, 64, num_experts=4, capacity_factor=0.7)
    built = layer.build_layer(size, torch.float32, CPU)
    routing = built.moe.router(built.tokens, built.moe.setting)[0]
    token, weights = share.by_expert(routing)
    assert len(token) == built.kept
    experts = built.moe.experts
    starts = torch.tensor([0, *built.counts]).cumsum(0)
    rows = torch.cat(
        [
            products.mlp(built.tokens[0][token[starts[e] : starts[e + 1]]],
                         [experts.fc1.weight[e], experts.fc1.bias[e], experts.fc2.weight[e], experts.fc2.bias[e]])
            for e in range(4)
        ]
    )  # fmt: skip
    expected = built.moe(built.tokens).tokens[0]
    torch.testing.assert_close(share.combine(built.tokens[0], rows, token, weights), expected, rtol=1e-5, atol=1e-6)
    assert set(share.stages(built)) == {"routing", "sort by expert", "gather", "combine"}


def test_the_floor_is_operations_over_the_best_rate_plus_bytes_over_bandwidth():
    full = [
        {"unit": "GFLOP/s", "dtype": "float32", "value": 100.0},
        {"unit": "GFLOP/s", "dtype": "float32", "value": 200.0},
        {"unit": "GFLOP/s", "dtype": "bfloat16", "value": 800.0},
        {"unit": "GB/s", "dtype": "float32", "value": 10.0},
    ]
    # 4e8 / 2e11 = 2 ms, and 1e7 / 1e10 = 1 ms
    row = {"flops": 4e8, "bytes": 1e7, "dtype": "float32"}
    assert ceilings.floor_ms(row, full) == pytest.approx(3.0)
    # 4e8 / 8e11 = 0.5 ms
    assert ceilings.floor_ms(row | {"dtype": "bfloat16"}, full) == pytest.approx(1.5)
    assert ceilings.floor_ms(row | {"flops": 0.0}, full) is None
    assert ceilings.floor_ms(row, full[:3]) is None


def test_the_figure_at_the_floor():
    # 4 ms beside 5 ms: 0.8; in 3 ms it would be 0.6. 8 images in 4 ms are 2,000 a second, in 2 ms 4,000.
    row = {"unit": "ratio", "value": 0.8, "ms": 4.0, "reference_ms": 5.0}
    assert ceilings.at_floor(row, 3.0) == pytest.approx(0.6)
    assert ceilings.at_floor({"unit": "images/s", "value": 2000.0, "ms": 4.0, "reference_ms": 1.0}, 2.0) == 4000.0
    assert ceilings.at_floor(row, None) is None and ceilings.at_floor(row | {"unit": "share"}, 3.0) is None


def test_fast_models_are_those_of_their_config_and_balanced():
    config = build.config_of("s16", "every2 e8", quick=True)
    assert config.moe.layers == (1,) and config.moe.num_experts == 8
    model = build.build_model(config, torch.float32, CPU)
    reference = vm.create_model(config)
    shapes = {name: p.shape for name, p in reference.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert build.num_parameters(config) == sum(shape.numel() for shape in shapes.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not model.training and not model.blocks[0].training
    with torch.no_grad():
        metrics = model(models.random_images(config, 8, torch.float32, CPU)).metrics
    # 8 * 17 tokens, K 2: 34 requests an expert of 36 places (C 1.05: 35.7); one in twenty may find none, not more
    assert metrics["blocks.1.dropped"] < 0.12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settled_gates_choose_evenly_without_noise(dtype: torch.dtype):
    config = build.config_of("s16", "every2 e8", quick=True)
    images = models.random_images(config, 64, dtype, CPU)
    model = build.settle_gates(build.build_model(config, dtype, CPU), images[:32])
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        first, again, other = (model(own).metrics for own in (images[:32], images[:32], images[32:]))
    assert torch.equal(first["blocks.1.expert_load"], again["blocks.1.expert_load"])
    # 32 * 17 tokens, K 2: 136 requests an expert, by chance give or take 11, of 144 places; images never seen as well
    for metrics in (first, other):
        assert metrics["blocks.1.dropped"] < 0.12
        assert metrics["blocks.1.expert_load"].sub(1 / 8).abs().max() < 4 * 11 / (8 * 136)


def test_the_dense_twin_has_equal_operations():
    sparse = build.build_model(build.config_of("s16", "every2 e8", quick=True), torch.float32, CPU)
    config = build.config_of("s16", "dense", quick=True)
    dense = build.build_model(config, torch.float32, CPU)
    flops, dense_flops = vm.count_flops(sparse, batch_size=1), vm.count_flops(dense)
    widths = build.widened(sparse.config, flops, dense_flops)
    # one image: 17 tokens ask for 34 places, there are 8 * 8 (4.46 up to a multiple of 4), so K = 2 MLPs of width 256
    # and 8 logits a token, which are 2 D E / (4 D) = 4 more columns
    assert widths == {1: 2 * 256 + 4}
    build.widen(dense, widths)
    # count_flops knows the config's width alone; a wider MLP costs 4 T D per column
    assert dense_flops + 4 * 17 * 64 * (widths[1] - 256) == pytest.approx(flops, rel=1e-3)
    assert dense.blocks[1].mlp.fc1.weight.shape == (widths[1], 64)
    assert dense.blocks[0].mlp.fc1.weight.shape == (256, 64)


def test_models_that_do_not_fit_are_left_out():
    largest = build.config_of("l16", "every2 e32")
    # 3.43e9 parameters (to the unit in the tests of variants); training holds each four times in float32
    assert build.needed_bytes(largest, "float32", 1, training=True) > 16 * 3.4e9
    assert build.needed_bytes(largest, "bfloat16", 2, training=False) == 2 * 2 * build.num_parameters(largest)
    with pytest.raises(LeftOutError, match=r"needs about 1048576.0 GiB of memory, [\d.]+ GiB are free"):
        build.check_memory(1 << 50, CPU)
    build.check_memory(1 << 20, CPU)


def test_memory_is_measured_in_a_process_of_its_own():
    question = memory.Question("s32", "last2 e8", "inference", "float32", 1, "cpu", quick=False)
    held = 4 * build.num_parameters(build.config_of("s32", "last2 e8"))
    # the parameters once, at most once more as packed copies, and the activations of one image
    assert 0.95 * held < memory.ask(question) < 2.5 * held
    with pytest.raises(RuntimeError, match="unknown model"):
        memory.ask(replace(question, size="q16"))


class Counting:
    """A case that counts how often it is measured."""

    def __init__(self, name: str = "one", settings: dict | None = None) -> None:
        self.runs = 0
        self.case = Case("layer", name, settings or {"n": (1, 2)}, self.measure)

    def measure(self) -> list[Row]:
        self.runs += 1
        return [Row("something", 0.7, "ratio", "float32", ms=1.0, target=Target(0.8))]


def test_finished_cases_are_not_measured_again(tmp_path: Path):
    counting, other = Counting(), Counting(settings={"n": (1, 3)})
    path = tmp_path / "results.json"
    first = Results(path, QUICK)
    first.run(counting.case)
    again = Results(path, QUICK)
    rows = again.run(counting.case)
    assert counting.runs == 1 and again.reused == 1
    assert rows[0]["target"] == "<= 0.8" and rows[0]["met"] is True
    assert line(rows[0]) == "something, float32: 0.700 (target <= 0.8: met)"
    again.run(other.case)  # the same name with another setting is another case
    assert other.runs == 1 and len(again.rows()) == 2
    stored = json.loads(path.read_text())
    assert stored["targets"] == {"met": 2, "of": 2}


def test_an_interruption_loses_the_case_in_progress_alone(tmp_path: Path):
    path = tmp_path / "results.json"
    counting = Counting()

    def interrupted() -> list[Row]:
        raise KeyboardInterrupt

    results = Results(path, QUICK)
    results.run(counting.case)
    with pytest.raises(KeyboardInterrupt):
        results.run(Case("layer", "two", {}, interrupted))
    assert len(Results(path, QUICK).rows()) == 1


def test_results_of_another_machine_are_not_taken(tmp_path: Path):
    path = tmp_path / "results.json"
    Results(path, QUICK).run(Counting().case)
    stored = json.loads(path.read_text())
    stored["machine"]["threads"] = 99
    path.write_text(json.dumps(stored))
    counting = Counting()
    results = Results(path, QUICK)
    assert results.renewed is not None and "of another machine" in results.renewed
    results.run(counting.case)
    assert counting.runs == 1


def test_what_is_left_out_is_said_and_tried_again(tmp_path: Path):
    def too_large() -> list[Row]:
        raise LeftOutError("needs 60 GiB")

    case = Case("models", "L/16", {}, too_large)
    results = Results(tmp_path / "results.json", QUICK)
    assert results.run(case) == []
    assert results.left_out == [{"section": "models", "name": "L/16", "reason": "needs 60 GiB"}]
    assert Results(tmp_path / "results.json", QUICK).cases == []


def test_figures_as_people_read_them():
    assert shown({"value": 0.0312, "unit": "share"}) == "3.1%"
    assert shown({"value": 12.345, "unit": "images/s"}) == "12.3 images/s"
    assert shown({"value": 1234.5, "unit": "MiB"}) == "1234 MiB"
