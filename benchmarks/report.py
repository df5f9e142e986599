"""Turns what pytest-benchmark wrote into a result and its pages.

    python benchmarks/report.py build/bench.json [more.json]    a new result: <device>-<date>-<commit>.json and .csv,
                                                                README.md and its plots, in benchmarks/results/
    python benchmarks/report.py --readme RESULT                 the section "Speed" of the project's README

Several files are parts, or repeated runs, of one benchmark on one machine. A result is itself a file that this program
reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import outcome
import pages
import plots

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="what pytest-benchmark wrote, or a result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result and its pages")
    parser.add_argument("--readme", type=Path, metavar="RESULT", help="only write README.md's section from this result")
    args = parser.parse_args()
    if args.readme:
        readme = ROOT / "README.md"
        readme.write_text(pages.put_block(readme.read_text(), pages.readme_block(outcome.load([args.readme]))))
        return
    if not args.files:
        parser.error("no file")
    result = outcome.load(args.files)
    args.out.mkdir(parents=True, exist_ok=True)
    outcome.write_json(result, args.out / f"{result.name}.json")
    outcome.write_csv(result, args.out / f"{result.name}.csv")
    pictures = plots.draw(result, args.out)
    others = sorted(path.stem for path in args.out.glob("*.json") if path.stem != result.name)
    (args.out / "README.md").write_text(pages.page(result, pictures, others))
    print(f"{args.out / result.name}.json and .csv, README.md and {len(pictures)} plots")


if __name__ == "__main__":
    main()
