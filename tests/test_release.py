"""RAHFs of the first author's PyTorch code other than the published one: parity with a rebuild of it, notes, refusals."""

import copy
import functools
import json

import flax.traverse_util
import jax
import numpy as np
import pytest
import release_torch
import safetensors.numpy

from rahf import convert, predictor, readers
from rahf import weights as files
from rahf.models import t5
from rahf.models.rahf import RAHF, RAHFConfig
from rahf.weights import Tensor
from richhf_data import schema, vocabulary

pytestmark = pytest.mark.usefixtures("standard_promotion")
CASES = release_torch.CASES


@functools.cache
def golden(name) -> dict:
    with np.load(release_torch.FILE) as held:
        return {key.partition("/")[2]: held[key] for key in held if key.startswith(f"{name}/")}


def state(name, tied=None) -> dict[str, np.ndarray]:
    tied = CASES[name]["t5"].get("tie_word_embeddings", True) if tied is None else tied
    return release_torch.weights(json.loads(str(golden(name)["shapes"])), tied)


def convert_state(arrays, notes):
    tensors = {name: Tensor(array.shape, lambda array=array: array) for name, array in arrays.items()}
    return readers.release.rahf_from_release(tensors, notes, "release")


def notes_of(name) -> dict:
    """New on each call."""
    return copy.deepcopy(release_torch.notes(CASES[name]) | {"pixels": CASES[name].get("pixels", {})})


def everything(model, image, text_ids, targets):
    scores, heatmaps, fused, mask = model.perceive(image, text_ids)
    memory = model._for_decoder(fused, mask)
    logits = model.t5.decode(*memory, t5.shift_right(targets))
    return {"scores": scores, "heatmaps": heatmaps, "logits": logits, "written": model.t5.greedy_decode(*memory, 8)}


@pytest.mark.parametrize("name", CASES)
def test_other_parts_and_single_heads_equal_pytorch(name):
    converted = convert_state(state(name), notes_of(name))
    model = RAHF(RAHFConfig.from_dict(converted.config["model"]))
    params = flax.traverse_util.unflatten_dict(dict(files.read_all(converted.tensors)), sep="/")
    rows, expected = release_torch.inputs(CASES[name]), golden(name)
    apply = jax.jit(functools.partial(model.apply, method=everything))
    found = apply({"params": params}, rows["image"], rows["text_ids"], rows["targets"])
    assert len(np.unique(expected["written"])) > 1
    for output, array in found.items():
        np.testing.assert_allclose(
            array, expected[output], atol=2e-6 * max(1, np.abs(expected[output]).max()), err_msg=output
        )


SINGLE, MULTI = "single_heads_with_flan_t5", "flan_t5_with_equal_widths"


def test_single_heads_convert_and_predict_with_the_prompts_of_the_release(tmp_path):
    safetensors.numpy.save_file(state(SINGLE), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(release_torch.notes(CASES[SINGLE])))
    words = vocabulary.train(["a red cat", "a blue dog"], tmp_path / "spiece.model", release_torch.VOCAB)
    converted = convert.convert("rahf-pytorch", tmp_path / "model.safetensors", tmp_path / "out", tmp_path)
    assert "one score head and one heatmap head" in converted.found and "gated GELU" in converted.found
    model = predictor.load(tmp_path / "out")
    text_ids = model.prepare(np.zeros((9, 9, 3), np.uint8), "a red cat")["text_ids"]
    texts = [
        f"<output> SCORE: {name} </output> a red cat" for name in ("plausibility", "alignment", "aesthetics", "overall")
    ]
    texts += [f"<output> HEATMAP: {name} </output> a red cat" for name in ("implausibility", "misalignment")]
    np.testing.assert_array_equal(text_ids, [words.encode(text, 160) for text in [*texts, "a red cat"]])


@pytest.mark.parametrize("name", CASES)
def test_a_torch_file_predicts_as_pytorch_from_pictures_and_prompts(name, torch, tmp_path):
    import transformers

    case, prompts = CASES[name], ["a red cat", "a blue dog and a red dog"]
    model = release_torch.build(case)
    torch.save({f"module.{key}": array for key, array in model.state_dict().items()}, tmp_path / "model_best.pt")
    for part, values in (("vit", case["vit"]), ("t5", case["t5"])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(values | {"model_type": part}))
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(case.get("pixels", {})))
    arguments = {"vit_model": str(tmp_path / "vit"), "t5_model": str(tmp_path / "t5"), "multi_heads": case["multi_heads"]}
    (tmp_path / "args_config.json").write_text(json.dumps(arguments))
    vocabulary.train(prompts, tmp_path / "t5" / "spiece.model", release_torch.VOCAB)
    convert.convert("rahf-pytorch", tmp_path, tmp_path / "out", tmp_path / "t5")
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path / "t5")
    ours, images = predictor.load(tmp_path / "out"), release_torch.inputs(case)["image"]
    found = ours.predict(images, prompts)
    for i, prompt in enumerate(prompts):
        texts = [prompt] if case["multi_heads"] else schema.task_prompts(prompt, "augmented_prompt_pytorch")
        expected = release_torch.run(model, case, images[i], tokenizer(texts).input_ids, [1], length=20)
        for j, score in enumerate(schema.SCORES):
            np.testing.assert_allclose(found.scores[score][i], expected["scores"][j], atol=2e-6)
        for j, heatmap in enumerate(schema.HEATMAPS):
            np.testing.assert_allclose(found.heatmaps[heatmap][i], expected["heatmaps"][..., j], atol=2e-6)
        assert found.labelled_prompts[i].startswith(ours.vocabulary.decode(expected["written"]))


def test_the_fixture_is_what_the_rebuild_computes(torch):
    for name, case in CASES.items():
        rows, model = release_torch.inputs(case), release_torch.build(case)
        ids = [row[row != 0].tolist() for row in rows["text_ids"][1]]
        found = release_torch.run(model, case, rows["image"][1], ids, rows["targets"][1].tolist())
        for output, array in found.items():
            np.testing.assert_allclose(array, golden(name)[output][1], atol=1e-5)


# ---- What is beside the file ----------------------------------------------------------------------------------------
def notes_in(folder, **written):
    for name, values in written.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return readers.release.release_notes(folder)


def test_notes_come_from_the_arguments_of_the_training_and_from_config_json(tmp_path):
    assert notes_in(tmp_path) == {"vit": {}, "t5": {}, "pixels": readers.release.PIXELS["google/vit-"], "multi_heads": None}
    arguments = {"vit_model": "facebook/dino-vitb8", "t5_model": "google/flan-t5-base", "multi_heads": False}
    notes = notes_in(tmp_path, args_config=arguments)
    assert notes == {"vit": {}, "t5": {}, "pixels": release_torch.IMAGENET, "multi_heads": False}
    (tmp_path / "vit").mkdir()
    theirs = {"num_attention_heads": 4, "layer_norm_eps": 1e-6}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(theirs))
    notes = notes_in(tmp_path, args_config={"vit_model": str(tmp_path / "vit")}, config={"vit": {"num_heads": 2}})
    assert notes["vit"] == {"num_attention_heads": 2, "layer_norm_eps": 1e-6} and notes["pixels"] == {}


def test_a_vit_of_unknown_pixels_is_refused_until_they_are_said(tmp_path):
    arguments = {"vit_model": "facebook/vit-msn-small"}
    with pytest.raises(ValueError, match=r"args_config.json: got vit_model 'facebook/vit-msn-small', expected a folder or"):
        notes_in(tmp_path, args_config=arguments)
    said = {"config": {"vit": {"layer_norm_eps": 1e-6}}, "preprocessor_config": release_torch.IMAGENET}
    assert notes_in(tmp_path, args_config=arguments, **said)["pixels"] == release_torch.IMAGENET
    with pytest.raises(ValueError, match=r"config.json: vit: got 3, expected an object"):
        notes_in(tmp_path, config={"vit": 3})


def test_one_of_two_checkpoints_has_to_be_named(tmp_path):
    for name in ("model.pt", "model_best.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"has model_best.pt and model.pt, expected one; name the file"):
        readers.release.rahf_pytorch(tmp_path)


# ---- Tensors --------------------------------------------------------------------------------------------------------
def older_name(name):
    """A ViT's tensor as transformers 4 names it."""
    if name.startswith("vit.layers."):
        name = name.replace("vit.layers.", "vit.encoder.layer.").replace(".mlp.fc1.", ".intermediate.dense.")
        name = name.replace(".mlp.fc2.", ".output.dense.").replace(".attention.o_proj.", ".attention.output.dense.")
        for part in ("query", "key", "value"):
            name = name.replace(f".attention.{part[0]}_proj.", f".attention.attention.{part}.")
    return name


def as_saved_by_safetensors(arrays):
    shared = [f"t5.{name}.weight" for name in ("shared", "encoder.embed_tokens", "lm_head")]
    return {name: array for name, array in arrays.items() if name not in shared}


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {f"module.{name}": array for name, array in arrays.items()},
        lambda arrays: {older_name(name): array for name, array in arrays.items()},
        as_saved_by_safetensors,
    ],
    ids=["distributed", "older", "safetensors"],
)
def test_files_that_name_the_same_tensors_otherwise_give_the_same(change):
    name = "single_heads_with_dino_pixels"
    changed, expected = convert_state(change(state(name)), notes_of(name)), convert_state(state(name), notes_of(name))
    assert changed.config == expected.config and change(state(name)).keys() != state(name).keys()
    for parameter, tensor in expected.tensors.items():
        np.testing.assert_array_equal(changed.tensors[parameter].read(), tensor.read())


def test_v1_1_with_one_matrix_does_not_scale_its_logits():
    arrays = state(MULTI) | {"t5.lm_head.weight": state(MULTI)["t5.shared.weight"]}
    notes = notes_of(MULTI)
    del notes["t5"]["tie_word_embeddings"]
    converted = convert_state(arrays, notes)
    assert not converted.config["model"]["t5"]["logits_via_embedding"]
    kernel = converted.tensors["t5/decoder/logits_dense/kernel"].read()
    np.testing.assert_array_equal(kernel, arrays["t5.shared.weight"].T)
    converted = convert_state(arrays, notes | {"t5": {"tie_word_embeddings": True}})
    assert converted.config["model"]["t5"]["logits_via_embedding"]


def test_heads_of_a_usual_vit_are_known():
    assert readers.release._usual_heads({"num_hidden_layers": 12, "hidden_size": 384, "intermediate_size": 1536}, "") == 6
    # The first ViT-S of timm: 8 heads.
    with pytest.raises(ValueError, match="a ViT of 8 layers and width 768, whose number of heads is unknown"):
        readers.release._usual_heads({"num_hidden_layers": 8, "hidden_size": 768, "intermediate_size": 2304}, "")


def say(part, **values):
    def change(arrays, notes):
        notes[part] |= values

    return change


def drop(part):
    def change(arrays, notes):
        for name in [name for name in arrays if part in name]:
            del arrays[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (say("vit", num_attention_heads=None), "a ViT of 2 layers and width 24, whose number of heads is unknown"),
        (say("vit", num_attention_heads=5), "vit.width: got 24, expected a multiple of vit.num_heads = 5"),
        (say("vit", num_attention_heads=0), "num_attention_heads 0 of the ViT, expected int above 0"),
        (say("vit", num_attention_heads="3"), "num_attention_heads '3' of the ViT, expected int above 0"),
        (say("vit", num_attention_heads=2.5), "num_attention_heads 2.5 of the ViT, expected int above 0"),
        (say("vit", layer_norm_eps=float("nan")), "layer_norm_eps nan of the ViT, expected float above 0"),
        (say("vit", hidden_size=32), "its notes say hidden_size 32 of the ViT, its tensors 24"),
        (say("vit", image_size=18), "its notes say image_size 18 of the ViT, its tensors 16"),
        (say("vit", hidden_act="quick_gelu"), "release: hidden_act: got 'quick_gelu', expected one of"),
        (say("t5", num_layers=[2]), r"its notes say num_layers \[2\] of the T5, its tensors 1"),
        (say("t5", feed_forward_proj="gated-silu"), "release: feed_forward_proj: got 'gated-silu', expected one of"),
        (say("t5", feed_forward_proj="relu"), "its notes say feed_forward_proj 'relu', its MLPs are gated"),
        (say("t5", layer_norm_epsilon=1e-5), "release: layer_norm_epsilon: got 1e-05, expected 1e-06"),
        (say("t5", relative_attention_max_distance=0), "relative_attention_max_distance 0 of the T5, expected int above 0"),
        (say("t5", tie_word_embeddings="false"), "tie_word_embeddings 'false' of the T5, expected true or false"),
        (say("t5", tie_word_embeddings=True), "one matrix for embedding and logits .* its t5.lm_head.weight is another"),
        (say("pixels", resample=3), "preprocessor has resample 3, expected one of"),
        (say("pixels", rescale_factor=10**400), "rescale_factor .* expected a finite number above 0"),
        (say("pixels", do_normalize="no"), "preprocessor has do_normalize 'no'"),
        (say("pixels", do_center_crop=True), "preprocessor has do_center_crop True"),
        (say("pixels", size={"shortest_edge": 16}), "preprocessor has size {'shortest_edge': 16}"),
        (say("pixels", image_std=[0.5, 0, 0.5]), r"image_std \[0.5, 0, 0.5\], expected 3 finite numbers above 0"),
        (say("pixels", image_mean=0.5), "image_mean 0.5, expected 3 finite numbers"),
        (lambda arrays, notes: notes.update(multi_heads=False), "its notes say multi_heads False, its tensors True"),
        (drop("score_predictor.overall"), "expected one head for each of"),
        (drop("heatmap_predictor"), r"heatmap_predictor \[\], expected one head for each of"),
        (drop("t5.lm_head"), "missing, expected the tensor t5.lm_head.weight"),
        (drop("conv_layers.0"), r"lacks \['score_predictor.plausibility.conv_layers.0.weight'\]"),
        (drop("vit.embeddings.position"), r"lacks \['vit.embeddings.position_embeddings'\]"),
        (
            lambda arrays, notes: arrays.update({"t5.encoder.embed_tokens.weight": arrays["t5.shared.weight"] + 1}),
            "t5.encoder.embed_tokens.weight differs from t5.shared.weight, expected one embedding",
        ),
        (
            lambda arrays, notes: arrays.update({"vit.embeddings.position_embeddings": np.zeros((17, 24), np.float32)}),
            r"vit.embeddings.position_embeddings has shape \(17, 24\), expected 3 axes",
        ),
        (
            lambda arrays, notes: arrays.update({"vit.layers.0.attention.q_proj.weight": np.zeros((48, 12), np.float32)}),
            r"query/kernel \(24, 3, 8\): the tensor vit.layers.0.attention.q_proj.weight has shape \(48, 12\)",
        ),
        (
            lambda arrays, notes: arrays.update({"score_predictor.overall.extra": np.zeros(1, np.float32)}),
            r"score_predictor.overall.extra \(1,\): no parameter of ours takes it",
        ),
    ],
)
def test_what_cannot_be_expressed_or_contradicts_itself_is_refused_by_name(change, message):
    arrays, notes = state(MULTI), notes_of(MULTI)
    change(arrays, notes)
    with pytest.raises(ValueError, match=message):
        convert_state(arrays, notes)
