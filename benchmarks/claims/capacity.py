"""Batch-priority against vanilla routing as the experts' capacity falls, on the same trained weights.

    python benchmarks/claims/capacity.py --data-set cifar10 --images parquet:PATH
    python benchmarks/claims/capacity.py --data-set fashion_mnist

Every seed's V-MoE on the images of --split, with K as trained; the dense twin is there to compare.
"""

import figures
import routing
import runs

from visionmoe.evaluate.adaptive import routing_grid


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--capacity-factors", type=float, nargs="+", default=[1.5, 1.05, 0.5, 0.3, 0.2, 0.1, 0.05])
    arguments = parser.parse_args()
    sparse, dense = (runs.trained(arguments, kind) for kind in runs.KINDS)
    experts = runs.facts(sparse[0])["experts"]
    settings = routing_grid([experts["selected"]], arguments.capacity_factors)
    content = {
        "num_selected_experts": experts["selected"],
        "trained_capacity_factor": experts["capacity_factor"],
        "batch_size": sparse[0].config.data.eval_batch_size,
        "rows": routing.evaluate_settings(arguments, sparse, settings),
        "dense": routing.evaluate_dense(arguments, dense),
    }
    report = runs.write_report(arguments, "capacity", content)
    figures.draw("capacity", report, arguments.pictures)


if __name__ == "__main__":
    runs.run_script(main)
