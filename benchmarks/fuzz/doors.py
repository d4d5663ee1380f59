"""The doors: each has a small good input, the command or function that reads it, and a check of what comes out."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable

import numpy as np
import PIL.Image

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import quick_xla  # noqa: E402, F401 - for __main__.py
import tiny_clip  # noqa: E402
import tiny_data  # noqa: E402
import tiny_diffusion  # noqa: E402
import tiny_preference  # noqa: E402

import rahf  # noqa: E402
from rahf import names, predict, readers, workdirs  # noqa: E402
from rahf.diffusion import folder as diffusion_folder  # noqa: E402
from rahf.diffusion import sample  # noqa: E402
from rahf.reward import embed, image_table, model  # noqa: E402
from rahf.reward import predict as reward_predict  # noqa: E402
from richhf_data import images, json_files, vocabulary  # noqa: E402

DATA = ROOT / "tests/data"
PROMPTS = ("two red cats on a table", "a blue dog")


@dataclasses.dataclass(frozen=True)
class Door:
    """Where RAHF reads something.

    Attributes:
      name: of the door. group: the column of the table.
      make: writes the good input into a folder.
      call: the arguments of a command, the module first, with {input} and {output} for the folders; or a function of the
        input's folder that returns JSON.
      result: of a command: output's folder -> JSON, after checking what it wrote.
      flags: those of the command that are numbers.
      files: a glob of the input's files that are broken.
      share: of the time, in proportion to the other doors'.
      left_out: the exit code that says that parts of the input were refused, and the others done.
    """

    name: str
    group: str
    make: Callable[[pathlib.Path], object]
    call: Callable[[pathlib.Path], object] | tuple[str, ...]
    result: Callable[[pathlib.Path], object] = lambda output: None
    flags: tuple[str, ...] = ()
    files: str = "**/*"
    share: float = 1.0
    left_out: int | None = None


# ---- Good inputs ----------------------------------------------------------------------------------------------------
def _unzip(name, folder, inside=""):
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(folder / "zip")
    shutil.copytree(folder / "zip" / inside, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "zip")


def _converted(folder):
    _unzip("older_workdirs", folder)
    shutil.copy(folder / "run/vocabulary.model", folder / "converted/vocabulary.model")
    for path in folder.iterdir():
        if path.name != "converted":
            shutil.rmtree(path)
    shutil.copytree(folder / "converted", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "converted")


def _workdir(folder):
    folder.mkdir(exist_ok=True)
    _unzip("older_workdirs", folder, "run")
    shutil.rmtree(folder / "checkpoints")
    (folder / "golden.json").unlink()


def _picture(place, seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    place.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).resize(size).save(place)


def _list(folder, labels=False):
    rows = []
    for i, prompt in enumerate(PROMPTS * (4 if labels else 1)):
        _picture(folder / f"{i}.{'jpg' if i % 2 else 'png'}", i)
        rows.append({"image": f"{i}.{'jpg' if i % 2 else 'png'}", "prompt": prompt} | ({"label": i % 2} if labels else {}))
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _predicted(folder):
    _converted(folder / "workdir")
    _list(folder / "images")


def _diffusers(folder):
    folder.mkdir(exist_ok=True)
    _unzip("diffusion_tiny", folder, "first")
    tiny_diffusion.write_weights(folder)
    for name in ("tensors.json", "golden.npz"):
        (folder / name).unlink()


def _reward(folder):
    tiny_clip.write(folder / "clip")
    mlp = model.RewardMLP((8,))
    reward_predict.write_params(_numbers(model.init, mlp, 12), folder / "reward/weights.safetensors")
    config = {"kind": "reward", "model": {"hidden": [8]}}
    config["clip"] = {"folder": "clip", "digest": embed.Clip(folder / "clip").digest}
    json_files.write(folder / "reward/config.json", config)


def _numbers(init, mlp, width):
    import flax.linen as nn
    import jax

    shapes = nn.unbox(jax.eval_shape(lambda key: init(mlp, width, width, key), jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)


def _records(folder):
    tiny_data.write_sources(folder, {"train": 4, "dev": 3})


def _rapidata(folder):
    tiny_data.write_rapidata(folder / "rapidata.parquet", [f"a red cat on {n} tables" for n in ("one", "two", "six", "ten")])


def _captions(folder):
    tiny_data.write_captions(folder / "captions.parquet", ["a red cat", "two dogs", "the moon", "a table"] * 3)


def _image_folder(folder):
    from richhf_data import records

    uids = [f"train-{i:03d}" for i in range(4)]
    records.write(folder / "records/train.tfrecord", map(tiny_data.raw_record, uids))
    for uid in uids:
        (folder / f"images/{uid}.png").parent.mkdir(exist_ok=True)
        (folder / f"images/{uid}.png").write_bytes(tiny_data.png(tiny_data.image_of(uid)))
    rows = "".join(f'{uid},"{tiny_data.prompt_of(uid)}"\n' for uid in uids)
    (folder / "images/captions.csv").write_text("uid,caption\n" + rows, encoding="utf-8")


def _dataset(folder):
    from richhf_data import build  # which defines flags

    work = folder.with_name("sources")
    build.build(*tiny_data.write_sources(work, {"train": 4, "dev": 3}), folder / "data", vocabulary_size=60)
    shutil.rmtree(work)


def _annotations(folder):
    lines = [tiny_data.annotation(f"u{i}", name) for i in range(3) for name in ("ann", "bob")]
    tiny_data.write_annotations(folder, lines)


def _prompts(folder):
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")


def _vit(folder):
    _unzip("vit_augreg_tiny", folder)
    (folder / "golden.npz").unlink()


def _hugging_face(kind, folder):
    """A folder of Hugging Face's, with the configuration that transformers writes and a tensor of each name."""
    import safetensors.numpy
    import transformers

    from rahf.models.clip import CLIP
    from rahf.models.parameters import param_shapes

    if kind == "vit":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
        transformers.ViTConfig(**sizes, patch_size=4, image_size=8).save_pretrained(folder)
    elif kind == "t5":
        sizes = {"d_model": 8, "num_heads": 2, "d_kv": 4, "num_layers": 1, "d_ff": 12, "vocab_size": 40}
        transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False).save_pretrained(folder)
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
        size = len(tiny_diffusion.write_tokenizer(folder))
        text = sizes | {"vocab_size": size, "eos_token_id": size - 1, "bos_token_id": size - 2}
        text["max_position_embeddings"] = 16
        vision = sizes | {"image_size": 8, "patch_size": 4}
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if kind == "vit":
        config = readers.encoders.vit_config_from_hugging_face(settings)
        table, ours = names.vit_from_hugging_face(config), readers.encoders._vit_shapes(config, 5, kind)
    elif kind == "t5":
        config = readers.encoders.t5_config_from_hugging_face(settings)
        table, ours = names.t5_from_hugging_face(config), readers.encoders._t5_shapes(config)
    else:
        config = readers.clip.clip_config_from_hugging_face(settings)
        ids, image = np.zeros((1, 16), np.int32), np.zeros((1, 8, 8, 3), np.float32)
        table, ours = names.clip_from_hugging_face(config), param_shapes(CLIP(config).init, image, ids)
    rng = np.random.default_rng(0)
    shapes = {theirs: _shape_before(layout, ours[name].shape) for name, (theirs, layout) in table.items()}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _preference(name, folder):
    """The files of one of the published preference scores."""
    with tempfile.TemporaryDirectory() as temporary:
        _unzip("preference_tiny", pathlib.Path(temporary))
        tiny_preference.write(pathlib.Path(temporary), name)
        shutil.copytree(pathlib.Path(temporary) / name, folder, dirs_exist_ok=True)
    for unread in ("golden.npz", "tensors.json"):
        (folder / unread).unlink()


def _shape_before(layout, shape):
    """The shape of which a layout of names.py makes `shape`."""
    if not shape:
        return shape
    choices = {shape, shape[::-1], shape[1:], (math.prod(shape),), (math.prod(shape[1:]), shape[0])}
    choices |= {(shape[-1], math.prod(shape[:-1])), (*shape[:1:-1], *shape[:2])}
    choices.add((shape[-1], 3, *[math.isqrt(shape[0] // 3)] * 2))  # of a convolution over patches
    for choice in sorted(choices):
        with contextlib.suppress(ValueError, IndexError):
            if layout(np.broadcast_to(np.float32(0), choice)).shape == shape:
                return choice
    raise ValueError(f"no shape of which {layout} makes {shape}")


def _evaluated(folder):
    _workdir(folder / "workdir")
    _dataset(folder)


def _rated(folder):
    _list(folder / "feedback", labels=True)
    tiny_clip.write(folder / "clip")


def _tuned(folder):
    _diffusers(folder / "model")
    _list(folder / "pictures")


def _compared(folder):
    _list(folder / "images")
    tiny_clip.write(folder / "clip")


def _t5x(folder):
    _unzip("t5x_v1_1_tiny", folder, "checkpoint_0")


def _nothing(folder):
    (folder / "unused.txt").write_text("unused\n", encoding="utf-8")


# ---- Calls and results ----------------------------------------------------------------------------------------------
def _fed_back(folder):
    feedback = rahf.load(folder).predict([tiny_diffusion.picture(20)], [PROMPTS[0]])
    scores = {name: float(values[0]) for name, values in feedback.scores.items()}
    assert all(0 <= value <= 1 for value in scores.values()), scores
    assert all(np.isfinite(maps).all() for maps in feedback.heatmaps.values())
    return scores | {"labelled": feedback.labelled_prompts}


def _predictions(output):
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_bytes().splitlines()]
    assert len(rows) >= 1, "no rows"
    for row in rows:
        assert all(0 <= value <= 1 for value in row["scores"].values()), row
        for file in row["heatmaps"].values():
            PIL.Image.open(output / file).verify()
    assert (output / "report.html").stat().st_size > 1000
    return [row["scores"] for row in rows]


def _read_diffusers(folder):
    read = diffusion_folder.read(folder)
    for part in read.params.values():
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in _leaves(part)), "not finite"
    return read.text_ids(["red cat"]).tolist()


def _read_configs(folder):
    return [round(float(value), 8) for value in diffusion_folder.read_config(folder).schedule.alphas_cumprod[::100]]


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def _sampled(output):
    files = sorted(output.glob("*.png"))
    pixels = [np.asarray(PIL.Image.open(file)) for file in files]
    assert files and all(image.std() > 0 for image in pixels), "no pictures, or black ones"
    return [float(image.mean()) for image in pixels]


def _embedded(folder):
    clip = embed.Clip(folder)
    values = np.concatenate([clip.texts(["red cat"])[0], clip.images([tiny_diffusion.picture(20)])[0]])
    assert np.isfinite(values).all() and abs(np.square(values).sum() - 2) < 1e-3, values
    return values.tolist()


def _rewarded(folder):
    values = reward_predict.load(folder / "reward", folder / "clip")([tiny_diffusion.picture(20)], ["red cat"])
    assert np.isfinite(values).all(), values
    return values.tolist()


def _all_pictures(folder):
    found = []
    for path in sorted(folder.rglob("*.*")):
        if path.suffix in (".png", ".jpg"):
            image = images.read(path)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
            found.append(image.shape)
    return len(found)


def _mask(folder):
    mask = sample.read_mask(folder / "0.png")
    assert mask.dtype == bool and mask.ndim == 2
    return list(mask.shape)


def _texts(folder):
    return [sample.read_prompts(path) for path in (folder / "prompts.txt", folder / "prompts.jsonl")]


def _inputs(folder):
    return [prompt for _, prompt in predict.read_inputs(str(folder / "images.jsonl"), None)]


def _feedback(folder):
    table = image_table.LabelledImages(folder / "images.jsonl")
    return [table.prompts, table.labels, len([images.decode(data, where) for where, data in table.images()])]


def _vocabulary(folder):
    found = vocabulary.Vocabulary(folder / "vocabulary.model")
    return [found.size, found.encode("a red cat", 16).tolist()]


def _config(folder):
    config = workdirs.read_config(folder)
    return [config.model.image_size, config.data.text_length]


def _built(output):
    from richhf_data import tasks  # which imports TensorFlow

    report = tasks.report(output)
    for split in report["splits"]:
        examples, count = tasks.decoded(output, split)
        assert count == len(list(examples)) > 0
    return report["splits"]


def _weights(output):
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(output / "weights.safetensors")
    assert tensors and all(np.isfinite(tensor).all() for tensor in tensors.values()), "not finite"
    json.loads((output / "config.json").read_bytes())
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _scores(file):
    results = json.loads(file.read_bytes())
    assert results["num_examples"] > 0, results
    return results


def _page(output):
    assert (output / "index.html").is_file() or list(output.rglob("*.html")), "no page"


def _consolidated(output):
    assert (output / "train.tfrecord").stat().st_size > 0
    return len(list((output / "images").iterdir()))


def _synthetic(output):
    assert (output / "train.tfrecord").stat().st_size > 0
    return json.loads((output / "statistics.json").read_bytes())


DOORS = [
    Door("rahf.load", "JSON, weights", _converted, _fed_back, share=2),
    Door("rahf.load of a run", "JSON, weights", _workdir, _fed_back, share=2),
    Door("workdirs.read_config", "JSON, weights", _converted, _config, files="config.json"),
    Door("vocabulary", "JSON, weights", _converted, _vocabulary, files="vocabulary.model", share=0.3),
    Door("diffusers' folder", "JSON, weights", _diffusers, _read_diffusers, share=3),
    Door("diffusers' configs", "JSON, weights", _diffusers, _read_configs, files="**/*config.json"),
    Door("CLIP", "JSON, weights", lambda folder: tiny_clip.write(folder), _embedded, share=2),
    Door("reward", "JSON, weights", _reward, _rewarded),
    Door(
        "convert vit-npz", "JSON, weights", _vit,
        ("rahf.convert", "--source=vit-npz", "--input={input}/vit_tiny_p8.npz", "--output={output}"), _weights,
    ),
    Door(
        "convert t5x", "JSON, weights", _t5x,
        ("rahf.convert", "--source=t5x", "--input={input}", "--output={output}"), _weights,
    ),
    Door(
        "convert workdir", "JSON, weights", _workdir,
        ("rahf.convert", "--source=workdir", "--input={input}", "--output={output}"), _weights,
    ),
    *(
        Door(
            f"convert {kind}-hf", "JSON, weights", functools.partial(_hugging_face, kind),
            ("rahf.convert", f"--source={kind}-hf", "--input={input}", "--output={output}"), _weights,
        )
        for kind in ("vit", "t5", "clip")
    ),
    Door(
        "convert open-clip", "JSON, weights", functools.partial(_preference, "open_clip"),
        ("rahf.convert", "--source=open-clip", "--input={input}", "--output={output}"), _weights,
    ),
    Door(
        "convert image-reward", "JSON, weights", functools.partial(_preference, "image_reward"),
        ("rahf.convert", "--source=image-reward", "--input={input}/image_reward.safetensors", "--output={output}"), _weights,
    ),
    Door("prompts", "texts", _prompts, _texts),
    Door("list of images", "texts", _list, _inputs, files="*.jsonl"),
    Door("feedback", "texts", lambda folder: _list(folder, labels=True), _feedback),
    Door(
        "consolidate", "annotations", _annotations,
        ("richhf_data.consolidate", "--annotations={input}/lines.jsonl", "--images={input}/pictures", "--output={output}"),
        _consolidated, flags=("holdout", "split_seed"), share=2,
    ),
    Door(
        "build of records", "datasets", _records,
        ("richhf_data.build", "--records={input}/records", "--images=parquet:{input}/images/*.parquet",
         "--data_dir={output}", "--workers=0", "--vocabulary_size=60", "--max_missing_share=1"),
        _built, flags=("workers", "vocabulary_size", "max_missing_share", "max_pixels"), share=2,
    ),
    Door(
        "build of a folder", "datasets", _image_folder,
        ("richhf_data.build", "--records={input}/records", "--images=folder:{input}/images", "--data_dir={output}",
         "--workers=0", "--vocabulary_size=60", "--max_missing_share=1"),
        _built, flags=("workers",), share=2,
    ),
    Door(
        "build of Rapidata", "datasets", _rapidata,
        ("richhf_data.build", "--records=rapidata:{input}/*.parquet", "--data_dir={output}", "--holdout=0"),
        _built, flags=("holdout", "word_threshold"),
    ),
    Door(
        "build of captions", "datasets", _captions,
        ("richhf_data.build", "--records=captions:{input}/*.parquet", "--data_dir={output}", "--holdout=0"),
        _built, flags=("holdout", "max_pixels"),
    ),
    Door(
        "browse", "datasets", _dataset,
        ("richhf_data.browse", "--data_dir={input}/data", "--output={output}/page.html"),
        _page, flags=("limit", "thumbnail"), share=3,
    ),
    Door("pictures", "pictures", _list, _all_pictures, files="*.[pj][np]g", share=2),
    Door("masks", "pictures", _list, _mask, files="0.png"),
    Door(
        "predict", "pictures", _predicted,
        ("rahf.predict", "--workdir={input}/workdir", "--images={input}/images/images.jsonl", "--output={output}"),
        _predictions, flags=("limit", "batch_size"), files="images/*", share=3, left_out=predict.FAILED,
    ),
    Door(
        "compare pictures", "pictures", _compared,
        ("rahf.diffusion.evaluate", "--images={input}/images", "--clip={input}/clip", "--output={output}"),
        lambda output: json.loads((output / "results.json").read_bytes()), files="images/*",
    ),
    Door(
        "sample", "JSON, weights", _diffusers,
        ("rahf.diffusion.sample", "--model={input}", "--prompt=red cat", "--output={output}", "--steps=2"), _sampled,
        flags=("num_images", "batch_size", "steps", "guidance_scale", "seed", "height", "width", "strength"),
        files="**/*.json", share=2,
    ),
    Door(
        "train", "flags", _nothing,
        ("rahf.train", "--config=rahf_ci", "--config.data.source=stream", "--workdir={output}",
         "--config.optimizer.warmup_steps=0", "--config.train.num_steps=1"),
        lambda output: [path.name for path in (output / "checkpoints").iterdir()],
        flags=("config.optimizer.learning_rate", "config.optimizer.b2", "config.optimizer.ema_decay", "config.seed",
               "config.optimizer.clip_norm", "config.optimizer.warmup_steps", "config.train.batch_size",
               "config.train.loss_weights.score", "config.data.text_length", "config.model.vit.dropout",
               "config.eval.batch_size", "config.eval.every", "config.data.num_workers", "config.log_every",
               "config.model.image_size", "config.model.t5.num_heads", "config.model.vit.depth"),
        files="", share=2,
    ),
    Door(
        "evaluate", "datasets", _evaluated,
        ("rahf.evaluate", "--workdir={input}/workdir", "--split=dev", "--config.data.data_dir={input}/data",
         "--config.data.source=seqio"),
        lambda output: _scores(next(pathlib.Path().glob("*/workdir/eval/dev.json"))),
        flags=("num_examples", "config.eval.batch_size"), files="data/**/*",
    ),
    Door(
        "train a reward", "flags", _rated,
        ("rahf.reward.train", "--feedback={input}/feedback/images.jsonl", "--clip={input}/clip", "--workdir={output}",
         "--config.train.num_steps=2", "--config.eval.data_sizes=(1.0,)", "--config.loss.classification_weight=0",
         "--config.eval.validation=0.4"),
        lambda output: json.loads((output / "results.json").read_bytes())["results"][-1]["train"],
        flags=("config.train.learning_rate", "config.train.batch_size", "config.loss.temperature", "config.seed",
               "config.eval.validation", "config.train.weight_decay", "config.loss.num_prompts"), files="feedback/*",
    ),
    Door(
        "fine-tune", "flags", _tuned,
        ("rahf.diffusion.train", "--config=sd_reward", "--workdir={output}", "--config.model.folder={input}/model",
         "--config.data.pretraining={input}/pictures", "--config.data.resize=True", "--config.model.dtype=float32",
         "--config.train.num_steps=1", "--config.train.batch_size=2", "--config.optimizer.warmup_steps=0",
         "--config.sample.steps=1", "--config.sample.prompts=('a cat',)"),
        lambda output: (output / "model/model_index.json").stat().st_size,
        flags=("config.optimizer.learning_rate", "config.train.beta", "config.lora.rank", "config.lora.alpha",
               "config.sample.every", "config.sample.seed", "config.sample.guidance_scale", "config.train.text_dropout",
               "config.reward.temperature", "config.reward.fraction", "config.mesh.data"), files="pictures/*",
    ),
    Door(
        "compile", "flags", _nothing, ("rahf.compile", "--config=rahf_ci", "--step=predict"),
        flags=("batch_size", "config.model.image_size", "config.data.text_length", "config.mesh.model"), files="",
    ),
    Door(
        "synthetic", "flags", _nothing,
        ("richhf_data.synthetic", "--output={output}", "--train=2", "--dev=1", "--test=0", "--size=16", "--workers=1"),
        _synthetic, flags=("train", "dev", "test", "test_novel", "size", "seed", "workers"), files="",
    ),
    Door(
        "launch", "flags", _nothing,
        ("launch.tpu_vm", "logs", "--name=n", "--project=p", "--zone=z", "--dry_run"), flags=("lines",), files="", share=0.2,
    ),
]  # fmt: skip
