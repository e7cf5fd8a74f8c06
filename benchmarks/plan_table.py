"""Plans of the published sizes on common slices, as the table of docs/benchmarks/planning.md.

python benchmarks/plan_table.py [--only NAME ...] [--results FILE] [--python PYTHON_WITH_CUDA]

Each case is one `plan --json` in a process of its own, kept in the results file; the table is made
of what is in there, so cases may be run one by one.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
GIB = 2**30
DECODE = ["--decode", "--context", "2048"]
# name -> (arguments, published result of MaxText on such a machine)
CASES: dict[str, tuple[list[str], str]] = {
    "7B v5e:4x4": (["--config", "pretrain_llama2_7b_v5e-16", "--topology", "v5e:4x4"], ""),
    "7B v5e:2x4, moments on the hosts": (
        [
            *("--config", "pretrain_llama2_7b_v5e-16", "--topology", "v5e:2x4"),
            *("--accumulate", "64", "--optimizer.offload"),
        ],
        "",
    ),
    "7B v5p:4x4x4": (["--config", "pretrain_llama2_7b_v5p-128", "--topology", "v5p:4x4x4"], ""),
    "7B 2 x v5p:4x4x4": (
        [
            *("--config", "pretrain_llama2_7b_v5p-128", "--topology", "v5p:4x4x4"),
            *("--slices", "2", "--mesh.data", "2"),
        ],
        "",
    ),
    "7B v5p:4x4x4, four rows a chip, full remat": (
        [
            *("--config", "pretrain_llama2_7b_v5p-128", "--topology", "v5p:4x4x4"),
            *("--compute.remat", "full", "--compute.remat_save"),
            *("--data.batch_size", "256", "--accumulate", "1"),
        ],
        "",
    ),
    "8B v5p:4x4x4, 131,072 tokens": (
        ["--config", "pretrain_llama3.1_8b_128k_v5p-128", "--topology", "v5p:4x4x4"],
        "",
    ),
    "7B v6e:16x16": (["--config", "pretrain_llama2_7b_v6e-256", "--topology", "v6e:16x16"], ""),
    "13B v5e:16x16": (["--config", "pretrain_llama2_13b_v5e-256", "--topology", "v5e:16x16"], ""),
    "70B v5p:4x4x8": (
        ["--config", "pretrain_llama2_70b_v5p-256", "--topology", "v5p:4x4x8"],
        "MFU 65 % on v5p-128",
    ),
    "70B v5p:8x8x8": (
        ["--config", "pretrain_llama2_70b_v5p-1024", "--topology", "v5p:8x8x8"],
        "65.4 %, 692 tokens/s per chip",
    ),
    "405B v5p:16x16x16": (
        ["--config", "pretrain_llama3.1_405b_v5p-8192", "--topology", "v5p:16x16x16"],
        "",
    ),
    "decode 70B v6e:2x4, 16 rows": (
        [
            *("--config", "pretrain_llama2_70b_v5p-256", "--topology", "v6e:2x4"),
            *(*DECODE, "--batch", "16"),
        ],
        "",
    ),
    "decode 7B v5e:2x4, 32 rows": (
        [
            *("--config", "pretrain_llama2_7b_v5e-16", "--topology", "v5e:2x4"),
            *(*DECODE, "--batch", "32"),
        ],
        "",
    ),
    "7B h100:8": (
        ["--config", "pretrain_llama2_7b_h100-8", "--topology", "h100:8"],
        "49.7 %, 492 TFLOP/s per GPU",
    ),
    "7B h100:8, XLA attention": (
        [
            "--config",
            "pretrain_llama2_7b_h100-8",
            "--topology",
            "h100:8",
            "--compute.attention",
            "xla",
        ],
        "49.7 %, 492 TFLOP/s per GPU",
    ),
}
HEADINGS = (
    "case",
    "chips",
    "mesh",
    "rows",
    "peak GiB",
    "in closed form",
    "of",
    "sent GB",
    "FLOPs executed / model",
    "bound by",
    "MFU bound, serial, estimate",
    "tokens/s per chip",
    "compile s",
    "planner GiB",
    "published (MaxText)",
)


def run(name: str, python: str) -> dict:
    """The record of one case."""
    command = [python, str(REPOSITORY / "main.py"), "plan", *CASES[name][0], "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def line(name: str, record: dict) -> tuple[str, ...]:
    """A row of the table."""
    axes = " ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1)
    speeds = [record["overlapped"], record["serial"], record["calibrated"]]
    fits = "" if record["fits"] else " (does not fit)"
    return (
        name,
        f"{record['chips']:,}",
        axes,
        f"{record['rows']:,}",
        f"{record['peak_bytes_per_chip'] / GIB:.2f}{fits}",
        f"{record['memory_closed_form'] / GIB:.2f}",
        f"{record['hbm_bytes_per_chip'] / GIB:.2f}",
        f"{record['wire_bytes_per_chip'] / 1e9:,.2f}",
        f"{record['executed_flops_per_chip'] / record['model_flops_per_chip']:.2f}",
        record["bound"],
        ", ".join(f"{one['mfu']:.1%}" if one else "-" for one in speeds),
        " / ".join(f"{one['tokens_per_second_per_chip']:,.0f}" for one in speeds if one),
        f"{record['compile_seconds']:.0f}",
        f"{record['planner_bytes'] / GIB:.1f}",
        CASES[name][1] or "none found",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="names of cases; none: all")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "docs" / "benchmarks" / "planning.json"
    )
    parser.add_argument("--python", default=sys.executable, help="has libtpu or jax's CUDA plugin")
    arguments = parser.parse_args()
    found = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for name in CASES if arguments.only is None else arguments.only:
        found[name] = run(name, arguments.python)
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")
    rows = [HEADINGS, ("---",) * len(HEADINGS)]
    rows += [line(name, found[name]) for name in CASES if name in found]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
