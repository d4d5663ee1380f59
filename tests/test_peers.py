"""The comparison with PyTorch: what each side computes is equal, and the table says what was measured."""

import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion

from benchmarks.peers import __main__ as peers
from benchmarks.peers import inputs, worker
from rahf.diffusion import finetuning, folder
from richhf_data.errors import UserError

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = pathlib.Path(__file__).parent.parent


def test_the_metrics_of_both_sides_are_equal(tmp_path):
    worker.make("metrics", tmp_path, small=True)
    found, outputs = worker.measure("our_metrics", "metrics", tmp_path, 0)
    assert len(found["seconds"]) == 1 and 0 < found["run_gib"] <= found["process_gib"] + 1e-3
    theirs, others = worker.measure("with_scipy", "metrics", tmp_path, 0)
    for name, values in (("ours", outputs), ("theirs", others)):
        np.savez(tmp_path / f"{name}.npz", **values)
    difference = peers.difference(tmp_path / "ours.npz", tmp_path / "theirs.npz")
    assert difference < 1e-5
    row = peers.result(*map(peers.merged, ([found], [theirs])), difference, "")
    assert row["speed"] == min(theirs["seconds"]) / min(found["seconds"])
    lines = peers.table({"metrics": row, "unet": {"failed": "ours: ended by SIGKILL"}}).splitlines()
    assert f"{row['speed']:.2f}" in lines[2] and "ours: ended by SIGKILL" in lines[3] and "MFU" not in lines[0]


def test_our_side_runs_without_torch_and_draws_what_theirs_is_given(tmp_path, unpacked):
    tiny_diffusion.write_weights(unpacked("diffusion_tiny") / "first")
    (tmp_path / "sd").symlink_to(unpacked("diffusion_tiny") / "first")
    inputs.write_diffusion(tmp_path)
    _, outputs = worker.measure("ours", "vae_decode", tmp_path, 0)
    assert outputs["output"].shape == (2, 1, 16, 16, 3) and np.isfinite(outputs["output"]).all()

    given, config = inputs.read(tmp_path, "sd"), folder.read_config(tmp_path / "sd")
    mean, logvar = np.split(given["moments"], 2, axis=-1)
    latents = config.vae.scaling_factor * (mean + np.exp(logvar / 2) * given["latent_noise"][1])
    noised = config.schedule.add_noise(latents, given["noise"][1], given["times"][1])
    seen = []

    def unet(variables, noised, timesteps, context):
        seen.append((noised, timesteps))
        return jnp.zeros_like(noised)

    modules = {"unet": types.SimpleNamespace(apply=unet)}
    model = types.SimpleNamespace(modules=modules, schedule=config.schedule, vae=config.vae)
    rows = {"moments": given["moments"], "context": given["context"], "weight": np.zeros(1), "pretraining": np.ones(1)}
    _, step_key = jax.random.split(jax.random.key(0))
    key = jax.random.fold_in(jax.random.fold_in(step_key, 1), 0)
    loss, _ = finetuning.make_loss(model, 1.0, 1.0)({"unet": {}}, rows, finetuning.normalisers_of(rows), key)
    np.testing.assert_allclose(seen[0][0], noised, atol=1e-6)
    np.testing.assert_array_equal(seen[0][1], given["times"][1])
    np.testing.assert_allclose(loss, np.mean(given["noise"][1] ** 2), rtol=1e-6)


def test_both_sides_of_every_row_compute_the_same(torch, tmp_path):
    pytest.importorskip("diffusers")
    command = [sys.executable, "-m", "benchmarks.peers", "--size=small", "--repeats=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert found.keys() == peers.ROWS.keys()
    assert {name: row["difference"] for name, row in found.items() if row["difference"] > 1e-4} == {}


def test_rows_that_are_unknown_or_need_torch_are_refused(monkeypatch):
    with pytest.raises(UserError, match="only: got vae, expected some of rahf_predict, "):
        peers.chosen(["unet", "vae"])
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.chosen(["metrics"]) == ["metrics"]
    with pytest.raises(UserError, match="only: these rows need torch and diffusers; pip install"):
        peers.chosen(None)
