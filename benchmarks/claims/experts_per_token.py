"""K changed after training: more or fewer experts per token on the same weights.

    python benchmarks/claims/experts_per_token.py --data-set cifar10 --images parquet:PATH
    python benchmarks/claims/experts_per_token.py --data-set fashion_mnist

Once with the capacity factor as trained, so that the experts' places grow with K, and once with K times the capacity
factor held as trained, so that the experts have the same number of places whatever K is. Vanilla order.
"""

import figures
import routing
import runs

from visionmoe.config import RoutingSetting


def main() -> None:
    parser = runs.parser(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 2, 3, 4], help="values of K")
    arguments = parser.parse_args()
    sparse, dense = (runs.trained(arguments, kind) for kind in runs.KINDS)
    experts = runs.facts(sparse[0])["experts"]
    factor, places = experts["capacity_factor"], experts["selected"] * experts["capacity_factor"]
    content = {
        "trained_num_selected_experts": experts["selected"],
        "trained_capacity_factor": factor,
        "batch_size": sparse[0].config.data.eval_batch_size,
        "same_factor": routing.evaluate_settings(
            arguments, sparse, [RoutingSetting(k, factor, False) for k in arguments.experts]
        ),
        "same_places": routing.evaluate_settings(
            arguments, sparse, [RoutingSetting(k, places / k, False) for k in arguments.experts]
        ),
        "dense": routing.evaluate_dense(arguments, dense),
    }
    report = runs.write_report(arguments, "experts_per_token", content)
    figures.draw("experts_per_token", report, arguments.pictures)


if __name__ == "__main__":
    runs.run_script(main)
