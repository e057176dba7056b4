"""`visionmoe plan`: does a model fit these devices, in which layout, and how long does a step take."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from visionmoe.cli.info import find_config
from visionmoe.cli.options import Plan as Options
from visionmoe.cli.shared import output_folder
from visionmoe.config import ModelConfig, to_dict
from visionmoe.distributed.layout import Layout
from visionmoe.files import write_json
from visionmoe.plan.estimate import MOST_DEVICES, Candidate, Plan, plan
from visionmoe.plan.sizes import in_words, parse_bytes, scale
from visionmoe.plan.work import PRESETS, Rates, Work

OVERRIDES = ("image_size", "num_classes", "num_experts", "num_selected_experts", "capacity_factor")
IMAGES_PER_DEVICE = 32
GB = 1e9


def run(options: Options) -> None:
    from visionmoe.analysis.figures import plan as figures  # before the work: matplotlib may be missing

    limit = parse_bytes(options.memory)
    if options.devices < 1:
        raise ValueError(f"devices must be >= 1, got {options.devices}")
    chosen = (
        None if options.layout is None else Layout.parse(options.layout, options.devices, "--devices says how many")
    )
    work, rates = work_of(options), rates_of(options)
    work.images(options.devices)
    result = plan(work, options.devices, limit, rates, chosen)
    out = output_folder(options.out)
    write_json(out / "results.json", _facts(options, work, rates, limit, result))
    size, unit = scale(limit)
    bars = [(str(one.layout), {k: v / size for k, v in _kinds(one).items()}) for one in result.candidates]
    title = f"{options.model}, {_step(work)}"
    figures.memory_of_layouts(out / "plan.png", bars, limit / size, unit=unit, title=title)
    for line in _head(options, work, result):
        print(line)
    Console(width=None if Console().is_terminal else 200).print(_table(work, result, limit))
    print("GB are 10^9 bytes; peak: of one device; sent: by one device in one step. Time: the longer of operations and "
          "memory traffic at the given rates, plus what is sent; nothing of it hidden.")  # fmt: skip
    print(_beside(result))
    print(_answer(options, work, result, limit))
    print(f"everything: {out / 'results.json'}, picture: {out / 'plan.png'}")


def _kinds(one: Candidate) -> dict[str, int]:
    """Bytes of one device, by what they are for."""
    if one.process is None:
        return one.memory.at_peak
    return one.memory.at_peak | {"process": one.process.total - one.process.tensors}


def _beside(result: Plan) -> str:
    """What is held beside the tensors."""
    one = result.candidates[0].process
    if one is None:
        return "peak is what tensors hold; what CUDA, its libraries and torch's allocator hold beside it is not in it."
    return (
        f"process: the peak of its tensors, holes in the heap, oneDNN's code ({in_words(one.onednn)}) and libraries "
        f"({in_words(one.imports)}), by measured factors (docs/distributed.md); without loaders and caches of images."
    )


def work_of(options: Options) -> Work:
    given = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    config: ModelConfig = find_config(options.model).replace(**given)
    inference = options.mode == "inference"
    return Work(
        config=config,
        batch_size=IMAGES_PER_DEVICE * options.devices * max(1, options.accumulation)
        if options.batch_size is None
        else options.batch_size,
        accumulation=options.accumulation,
        mode=options.mode,
        precision=options.precision,
        optimizer=optimizer_of(options),
        options={} if inference else _optimizer_options(options, config),
        gpu=options.device != "cpu",
    )


def _optimizer_options(options: Options, config: ModelConfig) -> dict[str, Any]:
    """As the recipes have them: SGD with momentum 0.9; Adafactor never factors over the experts."""
    name = optimizer_of(options)
    dtype = options.momentum_dtype or ("bfloat16" if name == "adafactor" else "float32")
    if name == "adam":
        return {"mu_dtype": dtype} if dtype != "float32" else {}
    if name == "sgd":
        return {"momentum": 0.9} | ({"accumulator_dtype": dtype} if dtype != "float32" else {})
    return {"momentum_dtype": dtype, "min_dim_size_to_factor": config.moe.num_experts + 1}


def optimizer_of(options: Options) -> str:
    return options.optimizer or ("adafactor" if options.model == "vmoe_15b" else "adam")


def rates_of(options: Options) -> Rates:
    rates = PRESETS[options.device][options.precision]
    given = {"flops": (options.flops_rate, 1e12), "bandwidth": (options.bandwidth, GB),
             "link": (options.link_bandwidth, GB)}  # fmt: skip
    for name, (value, unit) in given.items():
        if value is not None:
            if not 0 < value < float("inf"):
                flag = {"flops": "flops_rate", "bandwidth": "bandwidth", "link": "link_bandwidth"}[name]
                raise ValueError(f"{flag} must be > 0 and finite, got {value}")
            rates = dataclasses.replace(rates, **{name: value * unit})
    return rates


def _step(work: Work) -> str:
    if not work.training:
        return f"inference in {work.precision}, {work.batch_size} images"
    parts = f" in {work.accumulation} parts" if work.accumulation > 1 else ""
    return f"training step with {work.optimizer} in {work.precision}, {work.batch_size} images{parts}"


def _head(options: Options, work: Work, result: Plan) -> list[str]:
    held, state = result.held, result.held.dense_state + result.held.expert_state
    lines = [
        f"{options.model}: {_step(work)}, {options.devices} devices of {options.memory}",
        f"  parameters       {held.parameters:,} ({held.experts:,} of experts), "
        f"{in_words(held.parameters * work.parameter_bytes)}",
    ]
    if work.training:
        lines.append(f"  gradients        {in_words(held.parameters * 4)}, optimizer's state {in_words(state)}")
    return [*lines, f"  operations       {result.flops / 1e12:,.2f} TFLOP per step over all devices"]


def _table(work: Work, result: Plan, limit: int) -> Table:
    table = Table(title=f"per device (memory {in_words(limit)})")
    training = work.training
    columns = ["layout", "parameters", *(["gradients", "optimizer", "activations"] if training else []), "peak"]
    columns += [] if work.gpu else ["process"]
    columns += ["sent: gradients", "gather", "scatter", "tokens"] if training else ["sent: gather", "tokens"]
    columns += ["TFLOP", "moved", "seconds", "fits"]
    for name in columns:
        table.add_column(name, justify="left" if name == "layout" else "right")
    for one in result.candidates:
        memory, sent = one.memory, one.traffic
        sizes = [memory.parameters]
        sizes += [memory.gradients, memory.optimizer, memory.activations] if training else []
        traffic = [sent.gradients, sent.gather, sent.scatter, sent.tokens] if training else [sent.gather, sent.tokens]
        sizes += [memory.peak, *([] if one.process is None else [one.process.total])]
        name = f"{one.layout} *" if one is result.recommended else str(one.layout)
        table.add_row(
            name, *(in_words(size) for size in [*sizes, *traffic]), f"{one.flops / 1e12:,.2f}",
            in_words(one.moved), f"{one.seconds.total:.3g}", "yes" if one.fits else "no",
        )  # fmt: skip
    return table


def _answer(options: Options, work: Work, result: Plan, limit: int) -> str:
    best = result.recommended
    if best is not None:
        return (
            f"it fits: {best.layout} (*), {in_words(best.needed)} of {in_words(limit)}, "
            f"{best.seconds.total:.3g} s per step, {work.batch_size / best.seconds.total:,.0f} images/s at these rates"
        )
    smallest = min(result.candidates, key=lambda one: one.needed)
    text = f"none fits: the smallest, {smallest.layout}, needs {in_words(smallest.needed)} of {in_words(limit)}; "
    if result.accumulation is not None:
        text += f"on {options.devices} devices --accumulation {result.accumulation} would do; "
    if result.fewest is None:
        return text + f"no number of devices up to {MOST_DEVICES} that divides the batch would do"
    devices, layout = result.fewest
    return text + f"the smallest number of devices that would is {devices} ({layout})"


def _facts(options: Options, work: Work, rates: Rates, limit: int, result: Plan) -> dict[str, Any]:
    def of(one: Candidate | None) -> str | None:
        return None if one is None else str(one.layout)

    fewest = result.fewest and {"devices": result.fewest[0], "layout": str(result.fewest[1])}
    return {
        "command": "plan",
        "model": options.model,
        "devices": options.devices,
        "memory_bytes": limit,
        "batch_size": work.batch_size,
        "accumulation": work.accumulation,
        "mode": work.mode,
        "precision": work.precision,
        "optimizer": work.optimizer if work.training else None,
        "optimizer_options": work.options,
        "rates": dataclasses.asdict(rates),
        "parameters": result.held.parameters,
        "parameters_of_experts": result.held.experts,
        "optimizer_state_bytes": result.held.dense_state + result.held.expert_state,
        "flops_per_step": result.flops,
        "layouts": [one.as_dict() for one in result.candidates],
        "recommended": of(result.recommended),
        "accumulation_that_fits": result.accumulation,
        "fewest_devices": fewest,
        "config": to_dict(work.config) | {"moe": to_dict(work.config.moe)},
    }
