"""What a save and a resume cost, side by side with the peers: the loop's own cost, the time until durable, the restore, the bytes.

    make bench
    .venv-bench/bin/python benchmarks/checkpoint.py [--quick] [--only NAME ...] [--rounds N] [--folder DIR] [--save] [--out FILE]

Every scenario (scenarios.py) runs in a process of its own and returns its samples as JSON; report.py makes the ratios, holds them
against their targets, and draws. `--save` writes `results/<cpus>cpu-<date>.{json,md,png}`. Results that were taken while something
else ran on the machine are worth nothing: look at the ranges.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from plot import draw
from report import as_markdown, show
from rich.console import Console

HERE = Path(__file__).resolve().parent
_PACKAGES = (
    "torch",
    "safetensors",
    "torch_checkpointing",
    "torchsnapshot-nightly",
    "orbax-checkpoint",
    "jax",
    "obstore",
    "numpy",
)
_ROUNDS, _QUICK_ROUNDS = 5, 3


def run_here(name: str, quick: bool, rounds: int, folder: Path, result: Path) -> None:
    """In the child: one scenario, its samples as JSON into `result`."""
    from scenarios import plan

    found = plan(quick)[name](folder, rounds)
    result.write_text(json.dumps({
        "state": found.state, "samples": found.samples, "facts": found.facts, "notes": found.notes, "verified": found.verified,
    }))  # fmt: skip


def run_there(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any] | str:
    """In the parent: the scenario's result, or the end of what it said when it failed."""
    result, log = folder / "result.json", folder / "log"
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, str(HERE / "checkpoint.py"), "--scenario", name, "--rounds", str(arguments.rounds)]
    command += ["--folder", str(work), "--out", str(result), *(["--quick"] if arguments.quick else [])]
    with log.open("wb") as output:
        status = subprocess.run(command, check=False, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on. Names of machines and folders are left out."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    return {
        "cpus": os.cpu_count(),
        "cpu": model[0] if model else platform.machine(),
        "memory_gib": round(memory["MemTotal"] / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def measure(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from scenarios import plan

    chosen = [name for name in plan(arguments.quick) if not arguments.only or name in arguments.only]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "rounds": arguments.rounds, "quick": arguments.quick, "machine": machine(),
        "load_before": os.getloadavg()[0], "scenarios": {}, "failed": {},
    }  # fmt: skip
    for number, name in enumerate(chosen, start=1):
        started_s = time.perf_counter()
        with (
            console.status(f"{number}/{len(chosen)} {name}"),
            tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".bench-") as folder,
        ):
            found = run_there(name, arguments, Path(folder))
        result["failed" if isinstance(found, str) else "scenarios"][name] = found
        console.print(f"{name}: {time.perf_counter() - started_s:.0f} s{' FAILED' if isinstance(found, str) else ''}")
        if isinstance(found, str):
            console.print(found, style="red", markup=False)
    return result


def save(result: dict[str, Any]) -> Path:
    base = HERE / "results" / f"{result['machine']['cpus']}cpu-{result['date']}"
    base.parent.mkdir(exist_ok=True)
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    base.with_suffix(".md").write_text(as_markdown(result, base.with_suffix(".png").name))
    draw(result, base.with_suffix(".png"))
    return base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller states, three rounds: to see that it works")
    parser.add_argument("--only", action="append", metavar="NAME", help="a scenario; may be repeated")
    parser.add_argument("--rounds", type=int, help=f"rounds that count; default {_ROUNDS}, quick {_QUICK_ROUNDS}")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to be measured")
    parser.add_argument("--save", action="store_true", help="write dated results beside this script")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="measure nothing; report (and with --save: save) these figures"
    )
    parser.add_argument("--scenario", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (_QUICK_ROUNDS if arguments.quick else _ROUNDS)
    if arguments.scenario:
        run_here(arguments.scenario, arguments.quick, arguments.rounds, arguments.folder, arguments.out)
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    result = json.loads(arguments.show.read_text()) if arguments.show else measure(arguments, console)
    show(result, console)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.save:
        console.print(f"saved as {save(result)}.*")
    sys.exit(1 if result["failed"] else 0)


if __name__ == "__main__":
    main()
