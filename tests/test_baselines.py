"""The trained baselines: ResNet and CLIP with heads, in RAHF's loop."""

import dataclasses
import json

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest
import tiny_baselines
import tiny_clip
import tiny_data

import rahf
from rahf import convert, evaluate, experiments, partitioning, predict, predictor, pretrained, readers, sources, train
from rahf import program as programs
from rahf.models import baselines, critics
from rahf.models.clip import CLIPConfig
from rahf.models.parameters import param_shapes
from rahf.models.resnet import STATISTICS, ResNet, ResNetConfig, with_statistics
from rahf.reward import specs
from richhf_data import checked, preprocessors, vocabulary
from richhf_data.tensorflow_cpu import tf

pytestmark = pytest.mark.usefixtures("standard_promotion")
PARTS = {"resnet": ("scores", "heatmaps"), "clip": ("scores",)}


def count(shapes) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in shapes.values())


# ---- ResNet ---------------------------------------------------------------------------------------------------------


def read_resnet(path):
    """The module and the parameters of a file."""
    found = readers.encoders.resnet(path)
    config = ResNetConfig(**found.config["resnet"])
    flat = {name: tensor.read() for name, tensor in found.tensors.items()}
    return ResNet(config), {"params": flax.traverse_util.unflatten_dict(flat, sep="/")}


def test_resnet50_has_the_parameters_of_torchvision():
    shapes = param_shapes(ResNet(ResNetConfig()).init, np.zeros((1, 64, 64, 3), np.float32))
    statistics = count({name: leaf for name, leaf in shapes.items() if name.endswith(("mean", "var"))})
    assert count(shapes) - statistics == 25_557_032 - 2_049_000  # torchvision's, without its classifier
    assert statistics == 53_120


def test_resnet_equals_golden_output_of_transformers(unpacked):
    folder = unpacked("resnet_tiny")
    module, params = read_resnet(folder)
    golden = np.load(folder / "golden.npz")
    features = jax.jit(module.apply)(params, golden["image"])
    np.testing.assert_allclose(features, golden["features"], atol=1e-5 * np.abs(golden["features"]).max())


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnet50_equals_the_library(library, torch, tmp_path):
    models = pytest.importorskip(library)
    model = models.models.resnet50() if library == "torchvision" else models.create_model("resnet50")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(model.state_dict(), tmp_path / "resnet50.pth")
    ours, params = read_resnet(tmp_path / "resnet50.pth")
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    pixels = pixels / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    children = list(model.eval().children())[:-2]
    with torch.no_grad():
        expected = torch.nn.Sequential(*children)(pixels).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(jax.jit(ours.apply)(params, image), expected, atol=1e-5 * np.abs(expected).max())


def test_training_statistics_and_gradients_equal_torchs(torch, unpacked):
    transformers = pytest.importorskip("transformers")
    folder = unpacked("resnet_tiny")
    model = transformers.ResNetModel.from_pretrained(folder).train()
    module, params = read_resnet(folder)
    image = np.random.default_rng(1).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)

    def loss(params):
        features, new = module.apply({"params": params}, image, train=True, mutable=[STATISTICS])
        return (features**2).mean(), new[STATISTICS]

    (value, statistics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params["params"])
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (torch.from_numpy(image).permute(0, 3, 1, 2) * 0.5 + 0.5 - mean) / std
    expected = (model(pixels).last_hidden_state ** 2).mean()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    trained = with_statistics(params["params"], statistics)
    theirs = model.embedder.embedder
    np.testing.assert_allclose(trained["stem"]["norm"]["mean"], theirs.normalization.running_mean, atol=1e-5)
    np.testing.assert_allclose(trained["stem"]["norm"]["var"], theirs.normalization.running_var, rtol=1e-5)
    kernel = theirs.convolution.weight.grad.permute(2, 3, 1, 0).numpy()
    np.testing.assert_allclose(gradient["stem"]["conv"]["kernel"], kernel, atol=1e-5 * np.abs(kernel).max())
    assert not np.any(gradient["stem"]["norm"]["mean"]) and not np.any(gradient["stem"]["norm"]["var"])


def test_frozen_norms_compute_the_same_in_training(unpacked):
    module, params = read_resnet(unpacked("resnet_tiny"))
    frozen = ResNet(dataclasses.replace(module.config, frozen_norm=True))
    image = np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3), np.uint8)
    features, new = frozen.apply(params, image, train=True, mutable=[STATISTICS])
    assert not new
    np.testing.assert_array_equal(features, module.apply(params, image))


def test_other_resnets_are_refused_by_name(unpacked, tmp_path):
    folder = unpacked("resnet_tiny")
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for name, value in (("downsample_in_bottleneck", True), ("layer_type", "basic"), ("hidden_act", "silu")):
        (tmp_path / "config.json").write_text(json.dumps(settings | {name: value}))
        with pytest.raises(ValueError, match=f"config.json says {name} {value!r}, expected"):
            readers.encoders.resnet(tmp_path)


# ---- Critics --------------------------------------------------------------------------------------------------------


def test_critics_have_their_sizes():
    resnet, clip = baselines.ResNetCriticConfig(), baselines.CLIPCriticConfig()
    assert (resnet.heatmap_size, resnet.resnet.stride, clip.image_size) == (224, 32, 224)
    found = {}
    for config in (resnet, dataclasses.replace(resnet, predicts="scores"), clip):
        shapes = param_shapes(critics.module_of(config).init, *critics.dummy_inputs(config, 8))
        found[config.architecture, "heatmaps" in config.parts] = count(shapes)
    scores = 2048 * 2048 + 2048 + 2048 * 1024 + 1024 + 1024 * 4 + 4
    assert found["resnet", False] == 23_561_152 + scores
    assert found["clip", False] == 151_277_313 + 3 * 512 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 4 + 4
    assert found["resnet", True] == 50_301_254


@pytest.mark.parametrize("name", ["baseline_resnet50", "baseline_clip"])
def test_a_baselines_config_names_every_option_of_its_model(name):
    def keys(tree):
        return {key: keys(value) if isinstance(value, dict) else None for key, value in tree.items()}

    model = experiments.load(name).model.to_dict()
    assert keys(model) == keys(dataclasses.asdict(critics.CONFIGS[model["architecture"]]()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architecture": "vgg"}, r"model.architecture: got 'vgg', expected one of \('rahf', 'resnet', 'clip'\)"),
        ({"architecture": "resnet", "image_size": 100}, r"image_size: got 100, expected a multiple of the ResNet's 32"),
        ({"architecture": "resnet", "predict": "scores"}, r"unknown option 'model.predict'; did you mean 'model.predicts'"),
        ({"architecture": "resnet", "resnet": {"depths": ()}}, r"model.resnet.depths: got \(\), expected a list"),
        ({"architecture": "clip", "dense": (0,)}, r"model.dense\[0\]: got 0, expected an integer from 1"),
    ],
)
def test_wrong_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        critics.config_of(values)


def step(config, rows, devices):
    """(new parameters, metrics) of one update by the program of a run."""
    config.train.batch_size = len(rows["image"])
    training = programs.assemble(train.program(config), config, partitioning.make_mesh(devices=devices))
    params = jax.device_get(jax.jit(lambda key: nn.unbox(training.program.init(key)))(jax.random.key(0)))
    placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, training.params)
    new, metrics = training.step(training.init_state(placed), training.place(rows))
    return params, jax.device_get(new["params"]), jax.device_get(metrics)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A batch of 16 for the ResNet."""
    config = tiny_baselines.config("resnet")
    config.train.batch_size = 16
    found = sources.install_vocabulary(config, tmp_path_factory.mktemp("rows"))
    return next(sources.training_batches(config, found, start=0))


@pytest.fixture(scope="module")
def on_one_device(rows):
    return step(tiny_baselines.config("resnet"), rows, jax.devices()[:1])


def test_batch_norm_of_8_devices_is_that_of_one(rows, on_one_device):
    _, expected, metrics = on_one_device
    _, found, others = step(tiny_baselines.config("resnet"), rows, jax.devices())
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(others["gradient_norm"], metrics["gradient_norm"], rtol=1e-4)
    for name in ("mean", "var"):
        for i in range(2):
            ours, theirs = (x["resnet"][f"stage_{i}_block_0"]["conv_2"]["norm"][name] for x in (found, expected))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_step_moves_the_running_statistics_and_accumulation_averages_them(rows, on_one_device):
    before, after, metrics = on_one_device
    old, new = (x["resnet"]["stem"]["norm"] for x in (before, after))
    assert STATISTICS not in metrics
    assert not np.any(old["mean"]) and np.all(new["mean"]) and np.all(new["var"] != 1)
    config = tiny_baselines.config("resnet")
    config.train.accumulation_steps = 2
    accumulated = step(config, rows, jax.devices()[:1])[1]["resnet"]["stem"]["norm"]
    np.testing.assert_allclose(accumulated["mean"], new["mean"], atol=1e-6)  # a mean of means; a variance has none


def test_a_frozen_resnet_keeps_its_running_statistics(rows):
    config = tiny_baselines.config("resnet")
    config.optimizer.freeze = ("resnet",)
    before, after, _ = step(config, rows, jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, before["resnet"], after["resnet"])


@pytest.fixture(scope="module", params=["resnet", "clip"])
def run(request, tmp_path_factory):
    """(architecture, workdir, last evaluation) of a finished run."""
    workdir, config = tmp_path_factory.mktemp(request.param) / "run", tiny_baselines.config(request.param)
    return request.param, workdir, train.train(config, workdir)


def test_a_baseline_is_trained_evaluated_and_loaded_as_rahf(run, capsys):
    architecture, workdir, results = run
    assert np.isfinite(results["score/plcc/overall"]) and np.isnan(results["keywords/micro/f1"])
    assert np.isfinite(results["heatmap/mse/misalignment"]) == (architecture == "resnet")
    evaluated = evaluate.evaluate(workdir, "test", 8)
    assert evaluated["num_examples"] == 8
    assert "| this model" in capsys.readouterr().out
    model, image = rahf.load(workdir), np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    feedback = model.predict([image, image], ["a red cat", "two dogs"])
    assert feedback.scores["overall"].shape == (2,) and feedback.keywords is feedback.labelled_prompts is None
    assert {name: maps.shape for name, maps in feedback.heatmaps.items()} == (
        {"implausibility": (2, 32, 32), "misalignment": (2, 32, 32)} if architecture == "resnet" else {}
    )
    (first, second) = feedback.scores["overall"]
    assert (first == second) == (architecture == "resnet")  # which reads no prompt


def test_a_baselines_predictions_are_written_and_its_page_made(run, tmp_path):
    architecture, workdir, _ = run
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    examples = [{"name": "a.png", "image": image, "prompt": "a red cat"}]
    assert predict.predict(rahf.load(workdir), examples, ["state"], tmp_path) == 0
    (line,) = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
    assert set(line["scores"]) == {"plausibility", "alignment", "aesthetics", "overall"} and line["keywords"] is None
    assert len(line["heatmaps"]) == (2 if architecture == "resnet" else 0)
    page = (tmp_path / "report.html").read_text()
    assert "a red cat" in page and "The model says nothing of the words." in page
    assert ("<h2>Heatmaps</h2>" in page) == (architecture == "resnet")


def test_a_baseline_is_a_reward_of_what_it_predicts(run):
    architecture, workdir, _ = run
    images, prompts = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8), ["a red cat", "two dogs"]
    reward = specs.reward_of(f"rahf:{workdir}:alignment=2,overall")
    rewards = specs.checked(reward, images, prompts)
    differentiable = reward.differentiable
    pixels = images.astype(np.float32) / 127.5 - 1
    again = differentiable.score(differentiable.params, pixels, differentiable.rows(prompts))
    np.testing.assert_allclose(again, rewards, atol=1e-5)
    if architecture == "clip":
        for spec in (f"rahf:{workdir}:implausibility=-1", f"rahf:{workdir}"):
            with pytest.raises(ValueError, match="the model predicts scores, expected one that predicts heatmaps too"):
                (specs.reward_of if "=" in spec else specs.critic_of)(spec)


def test_a_converted_baseline_predicts_as_its_workdir_and_starts_another(run, tmp_path):
    architecture, workdir, _ = run
    convert.convert("workdir", workdir, tmp_path / "converted")
    images, prompts = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8), ["a red cat"]
    expected, found = (rahf.load(folder).predict(images, prompts) for folder in (workdir, tmp_path / "converted"))
    np.testing.assert_array_equal(found.scores["overall"], expected.scores["overall"])
    config = tiny_baselines.config(architecture)
    config.init.rahf = str(tmp_path / "converted")
    training = programs.assemble(train.program(config), config)
    tensors = pretrained.starting_tensors(config.init, training.params, critics.config_of(config.model.to_dict()))
    params = pretrained.initialise(training.init_params(), tensors)
    np.testing.assert_array_equal(params["score_head"]["output"]["bias"], tensors["score_head/output/bias"].read())


# ---- CLIP's weights and ids -----------------------------------------------------------------------------------------


def test_clip_starts_from_converted_weights_and_reads_its_own_ids(tmp_path):
    folder = tiny_clip.write(tmp_path / "clip")
    sizes = checked.conform(CLIPConfig, pretrained.read(folder, "clip").config["clip"])
    config = tiny_baselines.config("clip")
    config.model.clip.update(dataclasses.asdict(sizes))
    config.data.update(source="seqio", data_dir=tiny_data.built(), text_length=sizes.text.length + 1, keyword_length=90)
    config.init.clip = str(folder)
    config.optimizer.freeze = ("clip",)
    train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "vocabulary.model").exists()
    model = rahf.load(tmp_path / "run")
    assert isinstance(model.vocabulary, vocabulary.CLIPVocabulary)
    trained = flax.traverse_util.flatten_dict(jax.device_get(model.params["clip"]), sep="/")
    for name, tensor in pretrained.read(folder, "clip").tensors.items():
        np.testing.assert_array_equal(trained[name], tensor.read())  # frozen towers stay as they are
    ids = model.text_ids("red cat")[0]
    assert ids[np.flatnonzero(ids == sizes.text.eos_id)[0] + 1] == 1 and not ids[-1]
    with pytest.raises(ValueError, match=r"takes .* ids with its end, the model reads data.text_length=41; shorten it"):
        model.text_ids("red cat " * 40)


def test_a_table_of_texts_gives_the_ids_of_the_vocabulary(tmp_path):
    pieces = vocabulary.of(tiny_clip.write(tmp_path))
    texts = ["red cat", "a dog on the moon", "cat " * 9]
    table = preprocessors.TextTable(pieces, texts, 12)
    arguments = table, 12, True, tf.constant("uid")
    np.testing.assert_array_equal(
        preprocessors.tokenize(tf.constant(texts), *arguments), np.stack([pieces.encode(text, 12) for text in texts])
    )
    assert pieces.encode("cat " * 9, 12)[-2:].tolist() == [pieces.end_id, 1]  # a long text keeps its end
    with pytest.raises(tf.errors.InvalidArgumentError):
        preprocessors.tokenize(tf.constant(["unseen"]), *arguments)


def test_texts_that_the_model_cannot_read_are_refused(tmp_path):
    clip, model = vocabulary.of(tiny_clip.write(tmp_path)), tiny_baselines.config("clip").model.to_dict()
    written = sources.install_vocabulary(tiny_baselines.config("clip"), tmp_path / "run")
    model["clip"]["text"]["vocab_size"] = 600
    tower = model["clip"]["text"] | {"eos_id": clip.end_id}
    cases = (
        (model, clip, 24, r"ends a text with the id \d+, the model reads its text at model.clip.text.eos_id=1"),
        (model, written, 25, r"data.text_length: got 25, the CLIP reads at most 24; .*truncate_long_prompts=True"),
        (model | {"clip": model["clip"] | {"text": tower}}, clip, 26, r"got 26, the CLIP reads at most 25"),
        ({}, clip, 24, r"is a CLIP's, expected a SentencePiece model, which writes keywords"),
    )
    for values, found, length, message in cases:
        with pytest.raises(ValueError, match=message):
            predictor.check_vocabulary(critics.config_of(values), found, length)
