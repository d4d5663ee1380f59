"""One side of one row, in a process of its own.

    python -m benchmarks.peers.worker make KIND FOLDER full|small        writes a model and its inputs (inputs.py)
    python -m benchmarks.peers.worker SIDE ROW FOLDER NAME SECONDS       writes FOLDER/NAME.json and FOLDER/NAME.npz

SIDE is a module: ours, with_torch, our_metrics or with_scipy. The JSON holds

    load_s, first_s     of reading the model, and of the first call, with what is compiled in it
    seconds, core_s     of each further call, until SECONDS are over; of all cores together, whatever else runs
    process_gib         the highest resident memory of the process (Linux); run_gib: of the further calls alone
    flops               of a call without what is recomputed; with_torch only
"""

import ctypes
import importlib
import json
import pathlib
import sys
import time

import numpy as np

GIB = 2**30
COMPARED = 2  # calls whose outputs are kept


def make(kind: str, place: pathlib.Path, small: bool) -> None:
    """Writes what the rows of a kind read."""
    from benchmarks.peers import inputs

    if kind == "metrics":
        return inputs.write_metrics(place, *((4, 32) if small else (50, 224)))
    from benchmarks.peers import with_torch

    if kind == "rahf":
        with_torch.write_rahf(place, small)
        inputs.write_rahf(place)
    else:
        with_torch.write_diffusion(place, small)
        inputs.write_diffusion(place)


def measure(side: str, row: str, place: pathlib.Path, seconds: float, count: bool = False) -> tuple[dict, dict]:
    """What is measured of a row, and the outputs of its first calls, name -> array[calls, ...].

    Args:
      seconds: how long calls are repeated after the first, at least one. count: whether FLOPs are counted.
    """
    start = time.perf_counter()
    call = importlib.import_module(f"benchmarks.peers.{side}").ROWS[row](place)
    load, start = time.perf_counter() - start, time.perf_counter()
    outputs = [call()]
    first, before = time.perf_counter() - start, process_peak()
    reset_peak()
    taken, of_cores = [], []
    while not taken or sum(taken) < seconds:
        start, began = time.perf_counter(), time.process_time()
        found = call()
        taken.append(time.perf_counter() - start)
        of_cores.append(time.process_time() - began)
        if len(outputs) < COMPARED:
            outputs.append(found)
    result = {"load_s": load, "first_s": first, "seconds": taken, "core_s": of_cores, "run_gib": peak()}
    result["process_gib"] = max(before, process_peak())
    if count and hasattr(call, "flops"):
        result["flops"] = call.flops()
    return result, {name: np.stack([found[name] for found in outputs]) for name in outputs[0]}


def on_gpu() -> bool:
    """Whether this process computes on a GPU."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    return torch.cuda.is_available() if torch else jax is not None and jax.default_backend() == "gpu"


def reset_peak() -> None:
    """Begins `peak` anew, without memory that the C library keeps unused; JAX on a GPU has no such function."""
    if "torch" in sys.modules and on_gpu():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # of glibc
        library.malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak() -> float:
    """GiB: the process's highest memory since `reset_peak`, or the GPU's."""
    if on_gpu():
        torch = sys.modules.get("torch")
        most = torch.cuda.max_memory_allocated() if torch else 0
        return (most or sys.modules["jax"].devices()[0].memory_stats()["peak_bytes_in_use"]) / GIB
    return process_peak()


def process_peak() -> float:
    """GiB: the process's highest resident memory since `reset_peak`."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / GIB


def main(argv):
    if argv[0] == "make":
        return make(argv[1], pathlib.Path(argv[2]), argv[3] == "small")
    side, row, place, name, seconds, count = argv
    place = pathlib.Path(place)
    result, outputs = measure(side, row, place, float(seconds), count == "count")
    np.savez(place / f"{name}.npz", **outputs)
    (place / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
