"""Writes the tables of docs/results.md from the stored JSON files; the text around them stays as it is.

    python benchmarks/claims/write_results.py

A table stands between <!-- table NAME FILE --> and <!-- end -->; FILE is under benchmarks/results, NAME one of
`tables.TABLES`. A file that is not there yet leaves a line that says so.
"""

import argparse
import json
import re
from pathlib import Path

import tables

ROOT = Path(__file__).resolve().parents[2]
REGION = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    text = arguments.page.read_text(encoding="utf-8")
    arguments.page.write_text(with_tables(text, arguments.results), encoding="utf-8")


def with_tables(text: str, results: Path) -> str:
    """The page with every table as its file has it. ValueError for a table that does not exist."""

    def region(match: re.Match[str]) -> str:
        begin, name, file, end = match.groups()
        if name not in tables.TABLES:
            raise ValueError(f"no table is called {name!r}; there are: {', '.join(tables.TABLES)}")
        path = results / file
        lines = ["Not measured yet; the command makes it."]
        if path.is_file():
            lines = tables.TABLES[name](json.loads(path.read_text(encoding="utf-8")))
        return "\n".join([begin, *lines, "", end])

    return REGION.sub(region, text)


if __name__ == "__main__":
    main()
