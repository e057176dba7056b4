"""Tables of docs/results.md as lines of Markdown, each from one stored JSON file. Needs nothing but Python."""

from collections.abc import Callable, Sequence
from typing import Any

Report = dict[str, Any]
NAMES = {"sparse": "V-MoE", "dense": "dense ViT"}


def setup(report: Report) -> list[str]:
    """Of equal_compute's file: models, training, machine."""
    facts = report["facts"]
    train, test = report["num_images"]["train"], report["num_images"]["test"]
    own = facts["sparse"]
    rows = [
        ["recipe", *(f"`{facts[kind]['recipe']}`" for kind in NAMES)],
        ["width D, MLP width F, blocks", *(_sizes(facts[kind]) for kind in NAMES)],
        ["experts", _experts(own["experts"]), "none"],
        ["parameters", *(f"{facts[kind]['parameters']:,}" for kind in NAMES)],
        ["MFLOP per image, forward", *(f"{facts[kind]['flops_per_image'] / 1e6:.2f}" for kind in NAMES)],
        ["training, TFLOP", *(f"{facts[kind]['train_flops'] / 1e12:.1f}" for kind in NAMES)],
        ["one training step, ms", *(f"{1000 * report['seconds_per_step'][kind]:.0f}" for kind in NAMES)],
    ]
    machine = report["machine"]
    return [
        *table(["", *NAMES.values()], rows),
        "",
        f"{train:,} training and {test:,} test images, {own['image_size']} px, patches of {own['patch_size']} px; "
        f"{own['steps']:,} steps of {own['batch_size']} images; {report['seeds']} seeds. Machine: {machine['cpu']}, "
        f"{machine['threads']} thread; torch {machine['torch']}; {report['date']}.",
    ]


def equal_compute(report: Report) -> list[str]:
    """Accuracy at every evaluation, and what follows from the curves."""
    curves = report["curves"]
    rows = []
    for number in thinned(len(curves["sparse"][0]), 7):
        point = curves["sparse"][0][number]
        found = {kind: [one[number]["top1"] for one in curves[kind]] for kind in NAMES}
        minutes = {kind: _mean([one[number]["train_seconds"] for one in curves[kind]]) / 60 for kind in NAMES}
        differences = [s - d for s, d in zip(found["sparse"], found["dense"], strict=True)]
        rows.append([
            f"{point['step']:,}", f"{point['train_flops'] / 1e12:.1f}",
            *(f"{spread_of(found[kind])} %" for kind in NAMES), points(differences),
            *(f"{minutes[kind]:.1f}" for kind in NAMES),
        ])  # fmt: skip
    header = ["step", "TFLOP", "V-MoE", "dense ViT", "difference", "V-MoE, minutes", "dense, minutes"]
    compared = report["compared"]
    ratio = report["seconds_per_step"]["sparse"] / report["seconds_per_step"]["dense"]
    reached = compared["to_dense_accuracy"]
    return [
        *table(header, rows),
        "",
        f"- Equal FLOPs, both finished: {points(compared['final']['per_seed'], each=True)}.",
        f"- Equal seconds: a V-MoE step takes {ratio:.2f} times as long. When the dense run has finished, "
        f"the V-MoE, whose rate has not yet fallen to 0, is at "
        f"{points(compared['at_dense_seconds']['per_seed'], each=True)}.",
        f"- Share of the dense run's FLOPs after which the V-MoE has the dense model's final accuracy, seed by seed: "
        f"{_shares(reached['train_flops'])}; of its seconds: {_shares(reached['train_seconds'])}.",
    ]


def capacity(report: Report) -> list[str]:
    """One line per capacity factor, both orders; then how far each order can go."""
    by = {(row["capacity_factor"], row["batch_priority"]): row for row in report["rows"]}
    rows, gained = [], {}
    for factor in sorted({factor for factor, _ in by}, reverse=True):
        vanilla, priority = by[factor, False], by[factor, True]
        gains = gained[factor] = _differences(priority["top1"], vanilla["top1"])
        rows.append([
            f"{factor:g}", f"{vanilla['flops'] / 1e6:.2f}", f"{100 * vanilla['dropped']['mean']:.0f} %",
            f"{spread(vanilla['top1'])} %", f"{spread(priority['top1'])} %", points(gains),
        ])  # fmt: skip
    rows.append(
        ["dense ViT", f"{report['dense']['flops'] / 1e6:.2f}", "", f"{spread(report['dense']['top1'])} %", "", ""]
    )
    trained = by[report["trained_capacity_factor"], False]
    most = max(gained, key=lambda factor: _mean(gained[factor]))
    lines = [f"- The largest difference, at C = {most:g}, seed by seed: {points(gained[most], each=True)}."]
    for priority, name in ((True, "Batch-priority"), (False, "Vanilla")):
        own = [row for row in report["rows"] if row["batch_priority"] == priority]
        close = [row for row in own if row["top1"]["mean"] >= trained["top1"]["mean"] - 0.01]
        lowest = min(close, key=lambda row: row["capacity_factor"], default=None)
        lines.append(f"- {name}: " + _within(lowest, trained))
    header = ["C", "MFLOP per image", "requests dropped (vanilla)", "vanilla", "batch-priority", "difference"]
    return [*table(header, rows), "", *lines]


def experts_per_token(report: Report) -> list[str]:
    """One line per K, at both capacities."""
    rows = []
    trained = report["trained_num_selected_experts"]
    base = next(row for row in report["same_factor"] if row["num_selected_experts"] == trained)
    for factor, places in zip(report["same_factor"], report["same_places"], strict=True):
        k = factor["num_selected_experts"]
        rows.append([f"{k}{' (trained)' if k == trained else ''}"])
        for row in (factor, places):
            change = "" if k == trained else points(_differences(row["top1"], base["top1"]))
            rows[-1] += [f"{row['flops'] / 1e6:.2f}", f"{spread(row['top1'])} %", change]
    factor = report["trained_capacity_factor"]
    header = ["K", f"MFLOP at C = {factor:g}", "accuracy", "change",
              f"MFLOP at K C = {factor * trained:g}", "accuracy", "change"]  # fmt: skip
    return table(header, rows)


def specialisation(report: Report) -> list[str]:
    """One line per sparse block."""
    rows = []
    for n, layer in report["layers"].items():
        worse = _differences(layer["random_router_top1"], report["top1"])
        rows.append([
            n, *(spread(layer[f"{kind}_bits"], 1, ".3f") for kind in ("class", "position")),
            f"{layer['class_chance']['mean']:.4f}, {layer['position_chance']['mean']:.4f}",
            *(f"{100 * layer[f'{kind}_share']['mean']:.0f} %" for kind in ("class", "position")),
            f"{spread(layer['random_router_top1'])} %", points(worse),
        ])  # fmt: skip
    header = ["block", "bits about class", "bits about place", "chance alone", "share: class", "share: place",
              "accuracy, experts at random", "change"]  # fmt: skip
    late = report["late_minus_early"]
    all_worse = _differences(report["all_random_top1"], report["top1"])
    return [
        *table(header, rows),
        "",
        f"- Last block less first, seed by seed: about the class {_numbers(late['class_bits']['per_seed'])} bits, "
        f"about the place {_numbers(late['position_bits']['per_seed'])} bits.",
        f"- As trained {spread(report['top1'])} %; with the experts of all sparse blocks at random "
        f"{spread(report['all_random_top1'])} % ({points(all_worse)}).",
    ]


def transfer(report: Report) -> list[str]:
    """Few-shot by data set and number of shots, and fine-tuning."""
    few, tuning = report["few_shot"], report["fine_tuning"]
    rows = []
    for name, said in (("target", report["target"]), ("own", "their own images")):
        for number, shot in enumerate(report["shots"]):
            found = {kind: few[kind][name][number] for kind in NAMES}
            label = f"few-shot, {said}, {shot} per class"
            rows.append([label, *(f"{spread(found[kind])} %" for kind in NAMES),
                         points(_differences(found["sparse"], found["dense"]))])  # fmt: skip
    for start in tuning["top1"]["sparse"]:
        found = {kind: tuning["top1"][kind][start] for kind in NAMES}
        label = "fine-tuned" if start != "scratch" else "from scratch"
        rows.append([f"{label}, {report['target']} {tuning['subset']}", *(f"{spread(found[kind])} %" for kind in NAMES),
                     points(_differences(found["sparse"], found["dense"]))])  # fmt: skip
    gains = {kind: _differences(tuning["top1"][kind]["fine-tuned"], tuning["top1"][kind]["scratch"]) for kind in NAMES}
    return [
        *table(["", *NAMES.values(), "difference"], rows),
        "",
        f"- Pretraining gains, fine-tuned less scratch: V-MoE {points(gains['sparse'], each=True)}; dense ViT "
        f"{points(gains['dense'], each=True)}.",
        f"- {tuning['steps']} steps of {tuning['batch_size']} images; peak rate {tuning['rate']:g} fine-tuned, "
        f"{tuning['scratch_rate']:g} from scratch.",
    ]


def upcycle(report: Report) -> list[str]:
    """Of benchmarks/upcycle.py's file: the dense model that went on, and its upcycled form."""
    options, first = report["options"], report["rows"][0]
    names = {"start": "dense, the start", "dense": "dense, went on", "upcycled": "upcycled, went on"}
    rows = []
    for name, said in names.items():
        steps = options["dense_steps"] if name == "start" else first[f"steps_{name}"]
        added = "" if name == "start" else f"{first[f'added_train_flops_{name}'] / 1e12:.1f}"
        seconds = [row[f"train_seconds_{name}"] for row in report["rows"]]
        top1 = [row[f"top1_{name}"] for row in report["rows"]]
        rows.append([said, f"{steps:,}", added, spread_of(seconds, 1, ".0f"), f"{spread_of(top1)} %"])
    gains = [row["top1_upcycled"] - row["top1_dense"] for row in report["rows"]]
    losses = [row["loss_upcycled"] - row["loss_dense"] for row in report["rows"]]
    blocks = ", ".join(map(str, options["layers"])) if options["layers"] else "as in the recipe"
    changes = "".join(f" `{text}`" for text in options.get("set", []))
    weights = "normalised" if options.get("normalize_weights") else "not normalised"
    return [
        *table(["", "steps", "added TFLOP", "seconds", "accuracy"], rows),
        "",
        f"- Upcycled less dense, at equal added FLOPs: {points(gains, each=True)}; in loss "
        f"{_mean(losses):+.4f} ± {_std(losses):.4f} ({', '.join(f'{loss:+.4f}' for loss in losses)}).",
        f"- Recipe `{options['recipe']}`{changes and ' with' + changes}; E {options['num_experts']}, "
        f"K {options['num_selected_experts']}, capacity factor {options['capacity_factor']:g}, blocks {blocks}, noise "
        f"{options['noise']:g}, weights {weights}; peak rate {options['rate']:g} "
        f"(routers {options['router_rate']:g} times that, experts {options.get('expert_rate', 1):g}; dense "
        f"{options.get('dense_rate') or options['rate']:g}); "
        f"{len(report['rows'])} seeds; {report['date']}.",
    ]


TABLES: dict[str, Callable[[Report], list[str]]] = {
    "setup": setup,
    "equal_compute": equal_compute,
    "capacity": capacity,
    "experts_per_token": experts_per_token,
    "specialisation": specialisation,
    "transfer": transfer,
    "upcycle": upcycle,
}


def thinned(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0 .. count - 1, evenly apart, the last always."""
    step = -(-count // most)
    return list(range(count - 1, -1, -step))[::-1]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def spread(found: Report, unit: float = 100, form: str = ".1f") -> str:
    """mean +- standard deviation of what `runs.over_seeds` made, in points by default."""
    return f"{found['mean'] * unit:{form}} ± {found['std'] * unit:{form}}"


def spread_of(values: Sequence[float], unit: float = 100, form: str | None = None) -> str:
    form = form or (".1f" if unit == 100 else ".2f")
    return spread({"mean": _mean(values), "std": _std(values)}, unit, form)


def points(differences: Sequence[float], *, each: bool = False) -> str:
    """A signed mean difference with its spread, in points; `each`: and of every seed."""
    text = f"{100 * _mean(differences):+.1f} ± {100 * _std(differences):.1f}"
    return f"**{text} points** ({', '.join(f'{100 * d:+.1f}' for d in differences)})" if each else text


def _differences(a: Report, b: Report) -> list[float]:
    """Of the same seeds."""
    return [x - y for x, y in zip(a["per_seed"], b["per_seed"], strict=True)]


def _within(lowest: Report | None, trained: Report) -> str:
    if lowest is None:
        return "at no capacity within a point of the accuracy at the trained one."
    share = lowest["flops"] / trained["flops"]
    return (
        f"within a point of the accuracy at the trained capacity down to C = {lowest['capacity_factor']:g}, "
        f"{100 * share:.0f} % of the operations."
    )


def _sizes(facts: Report) -> str:
    return f"{facts['hidden_size']}, {facts['mlp_dim']}, {facts['blocks']}"


def _experts(experts: Report) -> str:
    blocks = " and ".join(map(str, experts["blocks"]))
    return f"{experts['number']} in blocks {blocks}, K {experts['selected']}, C {experts['capacity_factor']:g}"


def _shares(values: Sequence[float | None]) -> str:
    return ", ".join("never" if value is None else f"{100 * value:.0f} %" for value in values)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    """Of the sample; 0 for one."""
    mean = _mean(values)
    return (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0
