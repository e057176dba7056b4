"""What the experts of early and late layers know: mutual information of expert and class, and of expert and place.

    python benchmarks/claims/specialisation.py --data-set cifar10 --images parquet:PATH
    python benchmarks/claims/specialisation.py --data-set fashion_mnist

For every seed's V-MoE, on the test images, with `visionmoe.analysis`: bits of the tokens' first choices beyond those
that permuted labels give, and the accuracy with one layer's experts drawn at random.
"""

import figures
import runs
from runs import Run

from visionmoe.analysis.analyze import Analysis, AnalysisConfig
from visionmoe.analysis.summary import summarise_layer
from visionmoe.data.loader import EvalLoader

NUMBERS = ("class_bits", "class_chance", "class_share", "position_bits", "position_chance", "position_share",
           "entropy_bits", "dropped", "random_router_top1")  # fmt: skip


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--permutations", type=int, default=10)
    arguments = parser.parse_args()
    sparse = runs.trained(arguments, "sparse")
    loader = runs.loader_of(arguments, sparse[0])
    config = AnalysisConfig(seeds=1, permutations=arguments.permutations, gallery=1)
    found = [analyse(run, loader, config) for run in sparse]
    blocks = list(found[0]["layers"])
    content = {
        "permutations": arguments.permutations,
        "num_experts": runs.facts(sparse[0])["experts"]["number"],
        "top1": runs.over_seeds([one["top1"] for one in found]),
        "all_random_top1": runs.over_seeds([one["all_random_top1"] for one in found]),
        "layers": {
            n: {name: runs.over_seeds([one["layers"][n][name] for one in found]) for name in NUMBERS} for n in blocks
        },
        "late_minus_early": {
            kind: runs.over_seeds([one["layers"][blocks[-1]][kind] - one["layers"][blocks[0]][kind] for one in found])
            for kind in ("class_bits", "position_bits")
        },
    }  # fmt: skip
    report = runs.write_report(arguments, "specialisation", content)
    figures.draw("specialisation", report, arguments.pictures)


def analyse(run: Run, loader: EvalLoader, config: AnalysisConfig) -> dict:
    """Numbers of every sparse layer; bits are beyond chance, shares are of the experts' entropy."""
    model = run.model()
    analysis = Analysis(model, loader, run.folder / "analysis", config)
    statistics = analysis.load_statistics()
    analysis.run_statistics(statistics, on_batch=lambda images: None)
    random = analysis.run_random_routers(analysis.load_evaluations(), on_batch=lambda images: None)
    layers = {}
    for n, table in statistics.layers.items():
        layer = summarise_layer(table, statistics.shapes[n], loader.class_names)
        own = {}
        for kind in ("class", "position"):
            first = layer["information"][kind]["first"]
            own |= {f"{kind}_bits": first["excess"], f"{kind}_chance": first["shuffled_mean"],
                    f"{kind}_share": first["share"]}  # fmt: skip
        own |= {"entropy_bits": layer["entropy_bits"]["mean"], "dropped": layer["load"]["dropped"]}
        layers[str(n)] = own | {"random_router_top1": random["alone"][str(n)]["mean"]}
        print(run.folder, f"block {n}", layers[str(n)], flush=True)
    last = str(max(model.moe_layers))
    return {"top1": random["trained"]["top1"], "all_random_top1": random["cumulative"][last]["mean"], "layers": layers}


if __name__ == "__main__":
    runs.run_script(main)
