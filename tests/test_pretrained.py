"""Training that starts from converted weights."""

import dataclasses

import flax.traverse_util
import jax
import numpy as np
import pytest
import tiny_model

import rahf
from rahf import experiments, pretrained, train, weights
from rahf.models import critics, t5
from rahf.models.rahf import RAHF, RAHFConfig
from rahf.models.vit import ViT
from rahf.pretrained import Pretrained
from rahf.weights import Tensor

pytestmark = pytest.mark.usefixtures("standard_promotion")


def tensors_of(params):
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: Tensor(np.shape(value), lambda value=value: np.asarray(value)) for name, value in flat.items()}


def test_positions_are_resampled_as_torch_does(torch):
    positions = np.random.default_rng(0).normal(size=(1, 1 + 36, 5)).astype(np.float32)
    for side in (3, 6, 9):
        ours = pretrained.resample_positions(positions, side * side, class_token=True)
        grid = torch.from_numpy(positions[:, 1:].reshape(1, 6, 6, 5).transpose(0, 3, 1, 2).copy())
        grid = torch.nn.functional.interpolate(grid, (side, side), mode="bilinear", antialias=True, align_corners=False)
        np.testing.assert_allclose(ours[:, 1:], grid.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 5), atol=1e-5)
        np.testing.assert_array_equal(ours[:, :1], positions[:, :1])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a ViT (48 px, with a class token) and of a T5 that fit configs/rahf_ci.py."""
    folder, config = tmp_path_factory.mktemp("parts"), RAHFConfig.from_dict(ci_config().model.to_dict())
    vit = dataclasses.replace(config.vit, class_token=True)
    params = tiny_model.random_params(ViT(vit), np.zeros((1, 48, 48, 3), np.float32))
    converted = {"vit": dataclasses.asdict(vit), "image_size": 48}
    pretrained.write(Pretrained("vit", converted, tensors_of(params)), folder / "vit")
    ids = np.zeros((1, 2), np.int32)
    params = tiny_model.random_params(t5.T5(config.t5), ids, ids)
    pretrained.write(Pretrained("t5", {"t5": dataclasses.asdict(config.t5)}, tensors_of(params)), folder / "t5")
    return folder


def ci_config(**optimizer):
    config = experiments.load("rahf_ci")
    config.data.source = "stream"
    config.optimizer.update(optimizer)
    return config


def initial(config):
    """Parameters before training, as numpy."""
    model_config = RAHFConfig.from_dict(config.model.to_dict())
    params = jax.jit(RAHF(model_config).init)(jax.random.key(0), *critics.dummy_inputs(model_config))["params"]
    params = jax.tree.map(jax.numpy.asarray, flax.linen.unbox(params))
    tensors = pretrained.starting_tensors(config.init, params, model_config)
    return jax.device_get(pretrained.initialise(params, tensors))


def test_training_starts_from_converted_parts_and_leaves_frozen_ones_alone(parts, tmp_path):
    config = ci_config(freeze=("vit", "t5/token_embedder"), ema_decay=0.9)
    config.init.update(vit=str(parts / "vit"), t5=str(parts / "t5"))
    config.train.num_steps, config.eval.every = 8, 8
    before = initial(config)
    train.train(config, tmp_path)
    after = jax.device_get(rahf.load(tmp_path).params)  # the moving average's
    for part in (("vit",), ("t5", "token_embedder")):
        for x, y in zip(jax.tree.leaves(get(before, part)), jax.tree.leaves(get(after, part)), strict=True):
            assert x.tobytes() == y.tobytes()
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max() > 0, before, after)
    assert all(jax.tree.leaves(get(moved, ("t5", "encoder"))))
    assert all(jax.tree.leaves(get(moved, ("heatmap_head_implausibility",))))
    held = dict(weights.read_all(pretrained.read(parts / "vit", "vit").tensors))
    np.testing.assert_array_equal(before["vit"]["embedding"]["kernel"], held["embedding/kernel"])
    resampled = pretrained.resample_positions(held["pos_embedding"][:, 1:], 16, class_token=False)
    np.testing.assert_array_equal(before["vit"]["pos_embedding"], resampled)


def get(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_multipliers_scale_the_updates_of_a_part(tmp_path):
    from rahf import optimizers

    params = {"vit": {"kernel": np.ones((2, 2), np.float32)}, "score_head": {"kernel": np.ones((2, 2), np.float32)}}
    section = ci_config(learning_rate_multipliers=dict(vit=0.1, t5=1.0, heads=1.0)).optimizer
    optimizer = optimizers.make_optimizer(section, 4)
    state = optimizer.init(params)
    for _ in range(2):  # the first learning rate of the warm-up is 0
        updates, state = optimizer.update(params, state, params)
    ratio = np.asarray(updates["vit"]["kernel"] / updates["score_head"]["kernel"])
    np.testing.assert_allclose(ratio, 0.1, rtol=1e-5)
    section.learning_rate_multipliers = dict(vit=0.1, t4=1.0, heads=1.0)
    with pytest.raises(ValueError, match="learning_rate_multipliers: got"):
        optimizers.make_optimizer(section, 4)


def test_initial_weights_of_another_model_are_refused(parts):
    config = ci_config()
    config.init.vit = str(parts / "t5")
    with pytest.raises(ValueError, match=r"init.vit: .* holds a t5, expected one whose kind is vit"):
        pretrained.starting_tensors(config.init, {}, RAHFConfig.from_dict(config.model.to_dict()))
    config.init.vit = str(parts / "vit")
    config.model.vit.gelu = "erf"
    with pytest.raises(ValueError, match=r"model.vit.gelu: the weights have 'tanh', the config 'erf'"):
        pretrained.starting_tensors(config.init, {}, RAHFConfig.from_dict(config.model.to_dict()))


def test_weights_of_images_cut_otherwise_are_taken(tmp_path):
    config = ci_config()
    wanted = initial(config)
    model = config.model.to_dict() | {"heatmap_head": config.model.heatmap_head.to_dict() | {"strips": 1}}
    assert model != config.model.to_dict()
    pretrained.write(Pretrained("rahf", {"model": model}, tensors_of(wanted)), tmp_path)
    config.seed, config.init.rahf = 1, str(tmp_path)
    for ours, theirs in zip(jax.tree.leaves(initial(config)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_freezing_nothing_or_starting_from_nothing_leaves_no_workdir(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer.freeze: nothing lies under 'vitt', expected one of"):
        train.train(ci_config(freeze=("vitt",)), tmp_path / "run")
    config = ci_config()
    config.init.t5 = str(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"init.t5: .*t5 is no folder that rahf.convert wrote"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
