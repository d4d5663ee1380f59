"""Ours beside PyTorch, diffusers and transformers, in one run: seconds, memory, and how far the outputs differ.

    python -m benchmarks.peers [--only=unet,vae_decode] [--repeats=3] [--size=small]     (pip install -e '.[parity]')

Both sides read the same random weights and inputs, in float32, with all cores of this process. Where JAX and PyTorch see a
GPU: in bfloat16, PyTorch compiled. A side of a row runs in a process of its own, and the sides take turns, --repeats times;
what is given is the least time of a call after the first. The rows:

    rahf_predict     2 pictures with 32 ids of text: scores, heatmaps, 32 ids decoded; ViT-B/16, T5 v1.1 base, release heads
    rahf_step        a training step of the same on 2 examples, AdamW
    unet             Stable Diffusion 1.5's UNet, 512 px, 2 rows
    vae_decode       its VAE's decoder, 512 px, 1 row
    text_to_image    1 picture of 512 px from a text, 4 steps of DDIM with guidance, decoded
    sd_step          a training step of the whole UNet, 512 px, 1 row, AdamW
    sd_step_remat    the same, blocks recomputed in the backward pass (diffusers: gradient checkpointing)
    metrics          scores and heatmaps of 50 examples, 224 px, beside numpy, scipy and scikit-learn, a map at a time

The largest difference is relative to the largest value; of decoded ids it is the share that differ. Of a training step
it is that of loss and gradient's norm in two steps. Prints a table, and on the last line a JSON object with more; exits
with 1 where a side failed.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import psutil
import tabulate
from absl import flags

from benchmarks import peaks
from richhf_data import command, ranges
from richhf_data.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """kind: what `worker.make` writes for it. needs: GiB of free memory at full size. ours, theirs: the sides' modules."""

    kind: str
    needs: float
    ours: str = "ours"
    theirs: str = "with_torch"


ROWS = {
    "rahf_predict": Row("rahf", 6),
    "rahf_step": Row("rahf", 14),
    "unet": Row("sd", 8),
    "vae_decode": Row("sd", 8),
    "text_to_image": Row("sd", 10),
    "sd_step": Row("sd", 19),
    "sd_step_remat": Row("sd", 19),
    "metrics": Row("metrics", 2, "our_metrics", "with_scipy"),
}
SECONDS = 10  # that calls are repeated in one process
PROBE = "import jax; print(jax.devices()[0].device_kind if jax.default_backend() == 'gpu' else '')"
PROBE_TORCH = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


class Failed(Exception):
    """A process ended without a result; the message says how."""


def gpu() -> str:
    """The name of the GPU that JAX and PyTorch both see, or ''."""
    seen = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8").stdout.strip()
        for code in (PROBE, PROBE_TORCH)
    ]
    return seen[1] if all(seen) else ""


def start(arguments: list, place: pathlib.Path, device: str) -> None:
    """Runs the worker to its end."""
    ours = {"JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    ours |= {} if device else {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.worker", *map(str, arguments)],
        env=os.environ | ours,
        stderr=subprocess.PIPE,
        stdout=sys.stderr,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        killed = f"ended by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Failed(killed or last)


def compare(name: str, place: pathlib.Path, repeats: int, small: bool, device: str) -> dict:
    """Both sides of a row in turns: the row of the JSON object."""
    row, out, files = ROWS[name], {}, {}
    free = psutil.virtual_memory().available / 2**30
    if not small and free < row.needs:
        return {"failed": f"needs {row.needs:g} GiB of free memory, {free:.0f} are"}
    try:
        if not (place / f"{row.kind}.npz").exists():
            start(["make", row.kind, place, "small" if small else "full"], place, device)
        for turn in range(repeats):
            for side, module in (("ours", row.ours), ("theirs", row.theirs)):
                file = f"{name}_{side}_{turn}"
                count = "count" if not turn else ""
                start([module, name, place, file, 0 if small else SECONDS, count], place, device)
                found = json.loads((place / f"{file}.json").read_text(encoding="utf-8"))
                say(f"{name}, {side}: {min(found['seconds']):.3f} s, {found['run_gib']:.2f} GiB")
                out.setdefault(side, []).append(found)
                files.setdefault(side, place / f"{file}.npz")
    except Failed as error:
        return {"failed": f"{side}: {error}" if out or files else str(error)} | {k: merged(v) for k, v in out.items()}
    found = result(merged(out["ours"]), merged(out["theirs"]), difference(files["ours"], files["theirs"]), device)
    say(f"{name}: speed {found['speed']:.2f}, difference {found['difference']:.1e}")
    return found


def merged(turns: list[dict]) -> dict:
    """One side's turns in one: the least time, the highest memory; compilation is of the first turn."""
    least = {name: min(second for turn in turns for second in turn[name]) for name in ("seconds", "core_s")}
    compiled = max(0.0, turns[0]["first_s"] - min(turns[0]["seconds"]))
    most = {name: max(turn[name] for turn in turns) for name in ("run_gib", "process_gib")}
    return {**least, "compile_s": compiled, **most, "flops": turns[0].get("flops"), "turns": turns}


def result(ours: dict, theirs: dict, difference: float, device: str) -> dict:
    """The ratios of two sides; above 1 in speed, ours is the faster; above 1 in memory, ours takes more."""
    flops = theirs["flops"]
    peak = peaks.flops(device)
    for side in (ours, theirs):
        side["tflops"] = flops and flops / side["seconds"] / 1e12
        side["mfu"] = flops and peak and flops / side["seconds"] / peak
    ratios = {"speed": theirs["seconds"] / ours["seconds"], "memory": ours["run_gib"] / theirs["run_gib"]}
    return ratios | {"difference": difference, "ours": ours, "theirs": theirs}


def difference(ours: pathlib.Path, theirs: pathlib.Path) -> float:
    """The largest difference between two files' arrays, relative to the largest value; of ids, the share that differ."""
    with np.load(ours) as one, np.load(theirs) as other:
        if set(one) != set(other):
            raise AssertionError(f"outputs: ours are {sorted(one)}, theirs {sorted(other)}")
        calls = {name: min(len(one[name]), len(other[name])) for name in one}
        pairs = [(one[name][: calls[name]], other[name][: calls[name]]) for name in calls]
    ids = [np.mean(a != b) for a, b in pairs if a.dtype.kind == "i"]
    numbers = [np.abs(a - b).max() / max(np.abs(b).max(), 1e-12) for a, b in pairs if a.dtype.kind != "i"]
    return float(max(ids + numbers))


def table(rows: dict[str, dict]) -> str:
    """The rows in GitHub's Markdown."""
    lines = []
    for name, row in rows.items():
        ours, theirs = row.get("ours", {}), row.get("theirs", {})
        line = {"row": name}
        for key, title, form in (
            ("seconds", "s", ".3g"),
            ("core_s", "core s", ".3g"),
            ("run_gib", "GiB", ".2f"),
            ("process_gib", "process GiB", ".2f"),
            ("compile_s", "compile s", ".0f"),
            ("tflops", "TFLOP/s", ".3g"),
            ("mfu", "MFU", ".0%"),
        ):
            pair = [format(side[key], form) if side.get(key) is not None else "-" for side in (ours, theirs)]
            line |= {f"{title}, {side}": text for side, text in zip(("ours", "theirs"), pair, strict=True)}
            if key == "seconds":
                line["speed"] = f"{row['speed']:.2f}" if "speed" in row else row["failed"]
            if key == "run_gib":
                line["memory"] = f"{row['memory']:.2f}" if "memory" in row else "-"
        line["largest difference"] = f"{row['difference']:.1e}" if "difference" in row else "-"
        lines.append(line)
    empty = [key for key in lines[0] if all(line[key] == "-" for line in lines)]
    lines = [{key: text for key, text in line.items() if key not in empty} for line in lines]
    return tabulate.tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def chosen(only: list[str] | None) -> list[str]:
    """The names of the rows to measure. Raises UserError for an unknown one, or one whose libraries are missing."""
    names = only or list(ROWS)
    if unknown := sorted(set(names) - set(ROWS)):
        raise UserError(f"only: got {', '.join(unknown)}, expected some of {', '.join(ROWS)}")
    missing = [module for module in ("torch", "diffusers") if not importlib.util.find_spec(module)]
    if missing and any(ROWS[name].theirs == "with_torch" for name in names):
        raise UserError(f"only: these rows need {' and '.join(missing)}; pip install -e '.[parity]', or --only=metrics")
    return names


def main():
    """The command."""
    args = flags.FLAGS
    names = chosen(args.only)
    device, small = gpu() if importlib.util.find_spec("torch") else "", args.size == "small"
    with tempfile.TemporaryDirectory() as folder:
        rows = {name: compare(name, pathlib.Path(folder), args.repeats, small, device) for name in names}
    print(table(rows))
    print(json.dumps({"device": device or "cpu", "threads": len(os.sched_getaffinity(0)), "size": args.size, "rows": rows}))
    if any("failed" in row for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_list("only", None, f"Some of {', '.join(ROWS)}; all by default.")
    ranges.flag("repeats", 3, "Turns of both sides.", ranges.Range(1, 100, whole=True))
    flags.DEFINE_enum("size", "full", ("full", "small"), "The size of the models; the small one is to try the command.")
    command.run(main)
