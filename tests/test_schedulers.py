"""Scheduler configs of a diffusers folder: every key means what diffusers makes of it, or is refused by its name."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

from rahf.diffusion import folder
from rahf.diffusion.schedule import SAMPLERS, plan
from richhf_data.errors import UserError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpm++": "DPMSolverMultistepScheduler"}
TRAILING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "clip_sample": False, **SD}
LINSPACE = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace", "set_alpha_to_one": False, **SD}
PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": True, **SD}
TRAINED = {"_class_name": "DDPMScheduler", "num_train_timesteps": 10, "trained_betas": [0.01 * i for i in range(1, 11)]}
NOTHING = {"_class_name": "DDIMScheduler"}


def schedule(tmp_path, values):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(values))
    return folder._schedule(tmp_path / "scheduler_config.json")


def drawn(i):
    """The network's output and the noise of step i: any fixed numbers."""
    return np.sin(3.0 * i + 1), np.cos(5.0 * i)


def trajectory(tmp_path, values, sampler, steps) -> tuple[list[int], float]:
    """The timesteps, and where the sampler ends if it starts at 1 and the network's outputs are `drawn`."""
    ours = schedule(tmp_path, values)
    steps = plan(ours, sampler, steps)
    x, before = 1.0, 0.0
    for i, timestep in enumerate(steps.timesteps):
        prediction, noise = drawn(i)
        x0 = ours.x0(x, prediction, ours.alphas_cumprod[timestep])
        x = steps.x[i] * x + steps.x0[i] * x0 + steps.x0_before[i] * before + steps.noise[i] * noise
        before = x0
    return steps.timesteps.tolist(), float(x)


def of_diffusers(tmp_path, values, sampler, steps) -> tuple[list[int], float]:
    """The same by the installed diffusers, with what its pipelines set."""
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(values))
    of_folder = getattr(diffusers, values["_class_name"]).from_pretrained(tmp_path)
    theirs = getattr(diffusers, CLASSES[sampler]).from_config(of_folder.config)
    theirs.register_to_config(steps_offset=1, **({"clip_sample": False} if "clip_sample" in theirs.config else {}))
    theirs.set_timesteps(steps)
    x = torch.ones(1, 1, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for i, timestep in enumerate(theirs.timesteps):
            prediction, noise = (torch.full((1, 1), value, dtype=torch.float64) for value in drawn(i))
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
            x = theirs.step(prediction, timestep, x).prev_sample
    return theirs.timesteps.tolist(), float(x)


CASES = [(values, sampler, 4) for values in (TRAILING, LINSPACE, PNDM, TRAINED, NOTHING) for sampler in SAMPLERS]
CASES += [(TRAILING, sampler, 1) for sampler in SAMPLERS] + [(TRAILING | {"prediction_type": "v_prediction"}, "dpm++", 7)]
GOLDEN = [  # of diffusers 0.42.1: python tests/test_schedulers.py
    ([999, 749, 499, 249], 7.427003),
    ([999, 749, 499, 249], 9.244629),
    ([999, 749, 499, 249], 8.644326),
    ([999, 666, 333, 0], 4.171824),
    ([999, 666, 333, 0], 7.314133),
    ([999, 749, 500, 250], 8.626771),
    ([751, 501, 251, 1], 2.412774),
    ([751, 501, 251, 1], 3.514237),
    ([999, 749, 500, 250], 8.626771),
    ([7, 5, 3, 1], 1.170437),
    ([7, 5, 3, 1], 1.367246),
    ([9, 7, 4, 2], 1.745265),
    ([751, 501, 251, 1], 6.993814),
    ([751, 501, 251, 1], 8.816718),
    ([999, 749, 500, 250], 57.75212),
    ([999], 2.351018),
    ([999], 2.351018),
    ([999], 2.351018),
    ([999, 856, 713, 570, 428, 285, 142], 0.918755),
]


@pytest.mark.parametrize(("case", "golden"), list(zip(CASES, GOLDEN, strict=True)))
def test_steps_equal_the_recorded_ones_of_diffusers(case, golden, tmp_path):
    timesteps, end = trajectory(tmp_path, *case)
    assert timesteps == golden[0]
    np.testing.assert_allclose(end, golden[1], rtol=2e-4)


def test_steps_equal_those_of_the_installed_diffusers(tmp_path):
    for spacing in (None, "leading", "linspace", "trailing"):
        for name in ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            for more in ({}, SD, SD | {"set_alpha_to_one": False}, {"beta_schedule": "squaredcos_cap_v2"}):
                values = {"_class_name": name, **more} | ({"timestep_spacing": spacing} if spacing else {})
                for sampler in SAMPLERS:
                    ours, theirs = (made(tmp_path, values, sampler, 7) for made in (trajectory, of_diffusers))
                    assert ours[0] == theirs[0]
                    np.testing.assert_allclose(ours[1], theirs[1], rtol=2e-3)


@pytest.mark.parametrize("steps", [1, 2, 7, 49, 50, 300, 999])
def test_spacings_are_those_of_their_definition(steps, tmp_path):
    """arXiv 2305.08891, table 2; diffusers counts from 0, not from 1, and DPM-Solver++ leaves out the last step."""
    every = np.arange(steps)
    trailing = [round(1000 - 1000 * i / steps) - 1 for i in every]
    linspace = [round(999 * i / max(steps - 1, 1)) for i in every][::-1]
    for sampler in SAMPLERS:
        assert plan(schedule(tmp_path, TRAILING), sampler, steps).timesteps.tolist() == trailing
        expected = [round(999 * (i + 1) / steps) for i in every][::-1] if sampler == "dpm++" else linspace
        assert plan(schedule(tmp_path, LINSPACE), sampler, steps).timesteps.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep_spacing": "middle"}, r"timestep_spacing: got 'middle', expected one of \('leading', 'linspace', 'trail"),
        ({"timestep_spacing": None}, r"timestep_spacing: got None, expected one of"),
        ({"prediction_type": "sample"}, r"prediction_type: got 'sample', expected one of \('epsilon', 'v_prediction'\)"),
        ({"beta_schedule": "sigmoid"}, r"beta_schedule: got 'sigmoid', expected one of"),
        ({"beta_start": 0}, r"beta_start: got 0, expected a number of 1e-07 or more and below 1"),
        ({"beta_end": 1.0}, r"beta_end: got 1.0, expected a number"),
        ({"beta_end": -0.1}, r"beta_end: got -0.1, expected"),
        ({"beta_end": None}, r"beta_end: got None, expected"),
        ({"beta_start": 0.5, "beta_end": 0.9}, r"schedule.beta_end: got 0.9 .* leave a share of the image"),
        ({"trained_betas": [0.1, 0.2]}, r"schedule.trained_betas: got 2, expected num_train_timesteps = 1000 of them"),
        ({"trained_betas": [0.1, 2]}, r"trained_betas\[1\]: got 2, expected"),
        ({"num_train_timesteps": 0}, r"num_train_timesteps: got 0, expected an integer from 1 to 100,000"),
        ({"num_train_timesteps": 10**9}, r"num_train_timesteps: got 1000000000, expected"),
        ({"set_alpha_to_one": "no"}, r"set_alpha_to_one: got 'no', expected true or false"),
        ({"steps_offset": 1.5}, r"steps_offset: got 1.5, expected an integer"),
        ({"clip_sample": "yes"}, r"clip_sample: got 'yes', expected true or false"),
        ({"thresholding": True}, r"got thresholding = True, only False is supported"),
        ({"rescale_betas_zero_snr": True}, r"got rescale_betas_zero_snr = True, only False is supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, r"got _class_name = 'FlowMatchEuler.*', expected one of DDIM"),
        ({"_class_name": ["DDIMScheduler"]}, r"got _class_name = \['DDIMScheduler'\], expected"),
    ],
)
def test_a_value_that_no_sampler_implements_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=rf"scheduler_config.json: {message}"):
        schedule(tmp_path, NOTHING | SD | change)


@pytest.mark.parametrize(
    ("change", "refuse"),
    [
        ({"variance_type": "learned_range"}, ("ddpm", "dpm++")),
        ({"variance_type": "fixed_large"}, ("ddpm",)),
        ({"variance_type": "fixed_small_log"}, ()),
        ({"use_karras_sigmas": True}, ("dpm++",)),
        ({"use_karras_sigmas": None}, ()),
        ({"use_beta_sigmas": True}, ("dpm++",)),
        ({"solver_order": 3}, ("dpm++",)),
        ({"algorithm_type": "sde-dpmsolver++"}, ("dpm++",)),
        ({"solver_type": "heun"}, ("dpm++",)),
        ({"solver_type": "bh2"}, ()),
        ({"final_sigmas_type": "sigma_min"}, ("dpm++",)),
        ({"lambda_min_clipped": -5.1}, ("dpm++",)),
        ({"lambda_min_clipped": -float("inf")}, ()),
    ],
)
def test_an_option_is_refused_for_the_samplers_that_would_read_it(change, refuse, tmp_path):
    made, (name,) = schedule(tmp_path, {"_class_name": CLASSES["dpm++"]} | SD | change), change
    for sampler in SAMPLERS:
        if sampler in refuse:
            with pytest.raises(UserError, match=rf"sampler: {sampler.replace('+', '.')} does not support .* {name} = "):
                plan(made, sampler, 5)
        else:
            assert len(plan(made, sampler, 5).timesteps) == 5


def test_every_option_of_diffusers_is_ours_or_fixed_or_changes_nothing():
    diffusers = pytest.importorskip("diffusers")
    of_samplers = {name for options in folder.SAMPLER_FIXED.values() for name in options}
    free = {"sample_size", "dropout", "upcast_attention", "force_upcast", "down_block_types", "up_block_types"}
    free |= {"mid_block_only_cross_attention", "addition_time_embed_dim", "addition_embed_type_num_heads"}  # of other blocks
    free |= {"class_embeddings_concat", "projection_class_embeddings_input_dim"}
    free |= {"clip_sample", "clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"}  # pipelines clip nothing
    free |= {"lower_order_final", "euler_at_final", "flow_shift", "time_shift_type"}  # of other solvers
    for name, ours, fixed in (
        ("UNet2DConditionModel", folder.UNetConfig, folder.UNET_FIXED),
        ("AutoencoderKL", folder.VAEConfig, folder.VAE_FIXED),
        *((name, folder.Schedule, folder.SCHEDULE_FIXED.keys() | of_samplers) for name in CLASSES.values()),
    ):
        theirs = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
        assert theirs - {field.name for field in dataclasses.fields(ours)} - set(fixed) - free == set()


def main():
    """Prints `GOLDEN`."""
    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        for case in CASES:
            timesteps, end = of_diffusers(pathlib.Path(temporary), *case)
            print(f"    ({timesteps}, {end:.7g}),")


if __name__ == "__main__":
    main()
