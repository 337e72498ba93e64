"""Seconds from the start of an interpreter to the package, to `openo3 --help` and to the flags of a stage.

    python benchmarks/startup.py [--quick] [--json FILE]

The fastest of seven starts, files warm; the first one is told beside it.
"""

import subprocess
import sys
import time

import results

MOST_S = 1.5
STATEMENTS = {
    "import openo3_jax": "import openo3_jax",
    "openo3 --help": "from openo3_jax import cli; cli.main(['--help'])",
    "openo3 sft sft_7b --help": "from openo3_jax import cli; cli.main(['sft', 'sft_7b', '--help'])",
}
CLAIMED = ("import openo3_jax", "openo3 --help")


def main() -> int:
    args = results.make_parser(__doc__).parse_args()
    rows = []
    for name, statement in STATEMENTS.items():
        found = [seconds_of(statement) for _ in range(2 if args.quick else 7)]
        bound = {"most": MOST_S if name in CLAIMED else None, "judged": not args.quick}
        rows.append(
            results.compare(name, "-", ours=min(found), theirs=None, unit="s", note=f"first {found[0]:.2f} s", **bound)
        )
    return results.finish(rows, args)


def seconds_of(statement: str) -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started_s


if __name__ == "__main__":
    sys.exit(main())
