"""`visionmoe bench`."""

from typing import Any, get_args

from visionmoe.bench.measure import Case, Setup
from visionmoe.bench.plan import plan
from visionmoe.bench.report import line, print_tables
from visionmoe.bench.run import Results, run_all
from visionmoe.cli.options import Bench, BenchSection
from visionmoe.cli.shared import output_folder, progress
from visionmoe.distributed.world import choose_device


def run(options: Bench) -> None:
    from visionmoe.bench import plots  # before the work: matplotlib may be missing

    if not options.sections:
        raise ValueError(f"sections must name at least one of {', '.join(get_args(BenchSection))}")
    out = output_folder(options.out)
    setup = Setup(choose_device(options.device or "cpu"), options.quick)
    sections = [name for name in get_args(BenchSection) if name in options.sections]
    cases = plan(setup, sections)
    results = Results(out / "results.json", setup)
    if results.renewed:
        print(results.renewed)
    with progress("benchmark", len(cases)) as advance:

        def on_case(case: Case, rows: list[dict[str, Any]]) -> None:
            advance(1)
            for row in rows:
                print(f"{case.section}: {line(row)}", flush=True)

        run_all(cases, results, on_case)
    results.write()
    rows = results.rows()
    print_tables(rows, results.left_out, sections)
    pictures = plots.draw(out, rows)
    print(f"{results.reused} of {len(cases)} cases were there already")
    print(f"everything: {out / 'results.json'}, pictures: {', '.join(path.name for path in pictures) or 'none'}")
