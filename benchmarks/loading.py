"""Loading a Hugging Face directory, against safetensors' own reading of its files, page cache warm.

    python benchmarks/loading.py [--quick] [--json FILE] [--size 3b] [--work DIR]

A random bfloat16 model of a published size, loaded as it is stored, on one device. Our side checks the table of names,
transposes every matrix and stacks the layers; the other is `safetensors.numpy.load_file` of all files, its result kept.
Memory is the largest RssAnon while loading, the interpreter's included, beyond the bytes of the model.
"""

import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import big_model
import results
import sides

MOST = 3.0  # times safetensors' own
MOST_SHARDS = 1.2  # of memory beyond the model, in largest files
GIB = 2**30


def main() -> int:
    parser = results.make_parser(__doc__)
    sides.add_arguments(parser, ["ours", "theirs"])
    parser.add_argument("--size", default="3b", choices=["tiny", *big_model.QWEN2_5_VL])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.side:
        prepare = {"ours": prepare_ours, "theirs": prepare_theirs}[args.side]
        return sides.serve(lambda: prepare(args.work))
    size = "tiny" if args.quick else args.size
    with tempfile.TemporaryDirectory(dir=args.work) as directory:
        work = pathlib.Path(directory)
        big_model.write_directory(size, work / "model")
        files = [file.stat().st_size for file in (work / "model").glob("*.safetensors")]
        found: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
        for _ in range(args.rounds):  # one process at a time: memory for one model, and no other's pages
            for name, measured in found.items():
                with sides.Side(__file__, name, work) as side:
                    measured.append(side.round())
    best = {name: min(one["load_s"] for one in measured) for name, measured in found.items()}
    above = max(one["peak_bytes"] for one in found["ours"]) - sum(files)
    judged = not args.quick
    model = f"{size}, bfloat16, {sum(files) / GIB:.1f} GiB in {len(files)} files"
    rows = [
        results.compare(
            f"loading, {model}",
            "safetensors.numpy.load_file",
            ours=best["ours"],
            theirs=best["theirs"],
            unit="s",
            most=MOST,
            judged=judged,
        ),
        results.compare(
            "memory beyond the model while loading",
            "the largest file",
            ours=above / GIB,
            theirs=max(files) / GIB,
            unit="GiB",
            most=MOST_SHARDS,
            judged=judged,
        ),
    ]
    code = results.finish(rows, args)
    for name, measured in found.items():
        print(f"{name}: " + "; ".join(f"{one['load_s']:.2f} s" for one in measured))
    return code


def warm(directory: pathlib.Path) -> None:
    """Bring the files into the page cache."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass


def prepare_ours(work: pathlib.Path) -> tuple[dict, Callable]:
    import jax

    from openo3_jax import mesh as mesh_lib
    from openo3_jax import policy as policy_lib
    from openo3_jax.data import tokens

    tokens.load_processor(work / "model")  # imports transformers, which is a start's cost and not a directory's
    one = mesh_lib.make_mesh({}, devices=jax.devices()[:1])
    warm(work / "model")

    def do_round() -> dict[str, float]:
        with big_model.watched() as found:
            started_s = time.perf_counter()
            policy = policy_lib.load_pretrained(work / "model", dtype="bfloat16", mesh=one)
            jax.block_until_ready(policy.params)
            load_s = time.perf_counter() - started_s
        return {"load_s": load_s, "peak_bytes": max(found)}

    return {}, do_round


def prepare_theirs(work: pathlib.Path) -> tuple[dict, Callable]:
    import safetensors.numpy

    warm(work / "model")

    def do_round() -> dict[str, float]:
        started_s = time.perf_counter()
        kept = [safetensors.numpy.load_file(file) for file in sorted((work / "model").glob("*.safetensors"))]
        load_s = time.perf_counter() - started_s
        assert all(kept)
        return {"load_s": load_s}

    return {}, do_round


if __name__ == "__main__":
    sys.exit(main())
