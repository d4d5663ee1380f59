"""RichHF-Synth: the same from the same seed, true to its truth, calibrated to the paper, endless and on disk."""

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from richhf_data import consolidate, image_sources, keywords, schema, synthetic, vocabulary
from richhf_data.synthetic import annotators, backgrounds, ceiling, flaws, grammar, render, stream, write
from richhf_data.synthetic.grammar import Fact


@pytest.fixture(scope="module")
def drawn():
    return [synthetic.draw(0, index, "test", 48, 32) for index in range(1200)]


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    return vocabulary.train(synthetic.train_prompts(300, seed=0), path, size=300)


# --------------------------------------------------------------------------------------------------------- prompts


def test_prompts_have_3_to_20_words():
    lengths = {len(keywords.tokenize(text)) for text in synthetic.train_prompts(5000, seed=1)}
    assert min(lengths) >= 3 and max(lengths) <= 20 and len(lengths) > 12


def test_prompts_are_more_than_100_000():
    # One form of sentence with one group is enough; written out rather than computed.
    rng = np.random.default_rng(0)
    pairs = [(c, t) for c, t in itertools.product(grammar.COLOURS, grammar.THINGS) if not grammar.is_held_out(c, t)]
    facts = itertools.product(pairs, range(2, 7), (None, *grammar.ATTRIBUTES), (None, *grammar.ACTIONS), grammar.BACKGROUNDS)
    texts = set()
    for (colour, thing), count, attribute, action, background in facts:
        group = grammar.Group(thing, colour, count, attribute, action)
        texts.add(grammar.write(rng, grammar.Scene((group,), None, background)).text)
    assert len(texts) > 100_000


def test_every_fact_is_on_its_word():
    for index in range(500):
        prompt = synthetic.draw_prompt(0, index, "train")
        tokens = keywords.tokenize(prompt.text)
        words = {fact: tokens[token] for fact, token in prompt.facts.items()}
        for number, group in enumerate(prompt.scene.groups):
            assert words[Fact("colour", number)] == group.colour
            assert words[Fact("thing", number)] in (group.thing, grammar.PLURALS[group.thing])
            assert words.get(Fact("attribute", number)) == group.attribute
            assert words.get(Fact("action", number)) == group.action
            assert words.get(Fact("count", number), "one") == grammar.NUMBERS[group.count - 1]
        assert words.get(Fact("background")) == prompt.scene.background
        if prompt.scene.relation:
            wordings = grammar.RELATIONS[prompt.scene.relation]
            assert words[Fact("relation")] in [wording.split("*")[1] for wording in wordings]


def _pairs_of(picture):
    stated = {(group.colour, group.thing) for group in picture.prompt.scene.groups}
    return stated, {(item.colour, item.thing) for item in picture.objects}


def test_held_out_pairs_are_in_test_novel_only():
    colours, things = set(), set()
    for split in ("train", "dev", "test"):
        for index in range(1500):
            rng = np.random.default_rng((0, index))
            picture = flaws.plan(rng, synthetic.draw_prompt(0, index, split), split)
            stated, shown = _pairs_of(picture)
            assert not (stated | shown) & grammar.HELD_OUT
            if split == "train":
                colours |= {colour for colour, _ in stated}
                things |= {thing for _, thing in stated}
    assert colours == set(grammar.COLOURS) and things == set(grammar.THINGS)
    for index in range(300):
        scene = synthetic.draw_prompt(0, index, "test_novel").scene
        assert {(group.colour, group.thing) for group in scene.groups} & grammar.HELD_OUT


# -------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [48, 96, 256])
@pytest.mark.parametrize("name", grammar.BACKGROUNDS)
def test_background_covers_every_pixel(name, size):
    for seed in range(5):
        dark, light = (np.full((size, size, 3), fill, np.uint8) for fill in (0, 255))
        for image in (dark, light):
            backgrounds.PAINTERS[name](image, np.random.default_rng(seed))
        np.testing.assert_array_equal(dark, light)


def _digest(example):
    arrays = (example.image, example.scores, example.heatmaps, example.labels, example.latents, example.region_maps)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays) + example.prompt.encode()).hexdigest()


def test_draw_depends_on_its_arguments_alone():
    first = synthetic.draw(3, 7, "dev", 64, 32)
    assert _digest(first) == _digest(synthetic.draw(3, 7, "dev", 64, 32))
    others = [(4, 7, "dev"), (3, 8, "dev"), (3, 7, "train")]
    assert _digest(first) not in {_digest(synthetic.draw(*other, 64, 32)) for other in others}
    other_take = synthetic.draw(3, 7, "dev", 64, 32, take=1)
    assert other_take.prompt == first.prompt and other_take.uid != first.uid
    assert _digest(other_take) != _digest(first)


def test_draw_at_another_size_tells_the_same_story():
    small, large = synthetic.draw(0, 5, "train", 64, 32), synthetic.draw(0, 5, "train", 256, 64)
    assert small.prompt == large.prompt and small.picture == large.picture
    assert small.image.shape == (64, 64, 3) and large.image.shape == (256, 256, 3) and large.heatmaps.shape == (64, 64, 2)
    coarse = large.image.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.corrcoef(coarse.ravel(), small.image.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("kind", flaws.ARTIFACTS)
def test_artifact_changes_pixels_in_its_region_alone(kind):
    found = 0
    for index in range(400):
        rng = np.random.default_rng((0, 0, index))
        picture = flaws.plan(rng, synthetic.draw_prompt(0, index, "train"), "train")
        if artifacts := [artifact for artifact in picture.artifacts if artifact.kind == kind]:
            calm = flaws.Style(0, 0, 0, 0)
            picture = dataclasses.replace(picture, artifacts=(artifacts[0],), style=calm)
            image, regions = render.render(picture, 96)
            without, _ = render.render(dataclasses.replace(picture, artifacts=()), 96)
            inside = render.union(regions, 96)[..., 0] > 0
            differ = (image != without).any(axis=-1)
            assert not (differ & ~inside).any(), index
            clear = np.abs(image.astype(int) - without).max(axis=-1) > 24
            found += clear.sum() >= 12
            if found == 6:
                return
    raise AssertionError(f"{kind}: seen clearly {found} times in 400 pictures, expected 6")


def test_all_artifacts_together_stay_in_their_regions(drawn):
    for example in drawn[:100]:
        without, _ = render.render(dataclasses.replace(example.picture, artifacts=()), 48)
        differ = (example.image != without).any(axis=-1)
        assert not (differ & (example.region_maps[..., 0] == 0)).any(), example.uid


def test_misalignment_is_marked_as_the_paper_says(drawn):
    for example in drawn:
        wrong, picture = set(example.picture.wrong), example.picture
        tokens = {picture.prompt.facts[fact] for fact in wrong}
        assert set(np.flatnonzero(example.word_labels == keywords.MISALIGNED)) == tokens
        # Colour, attribute and action are marked on the things; a missing thing, count, relation, background never.
        marked = sorted(region.kind for region in example.regions if region.heatmap == 1)
        expected = [
            fact.kind
            for fact in wrong
            if fact.kind in ("colour", "attribute", "action")
            for item in picture.objects
            if item.group == fact.group
        ]
        assert marked == sorted(expected)


def test_wrong_facts_are_drawn_wrong_and_others_right(drawn):
    for example in drawn:
        picture, scene = example.picture, example.picture.prompt.scene
        wrong = set(picture.wrong)
        for number, group in enumerate(scene.groups):
            items = [item for item in picture.objects if item.group == number]
            if Fact("thing", number) in wrong:
                assert all(item.thing != group.thing for item in items)
                continue
            assert (len(items) != group.count) == (Fact("count", number) in wrong)
            for kind in ("colour", "attribute", "action"):
                stated = getattr(group, kind)
                assert all((getattr(item, kind) != stated) == (Fact(kind, number) in wrong) for item in items)
        if scene.background:
            assert (picture.background != scene.background) == (Fact("background") in wrong)
        groups = [[item for item in picture.objects if item.group == number] for number in (0, 1)]
        if scene.relation in ("left", "right") and all(groups):
            is_left = np.mean([item.x for item in groups[0]]) < np.mean([item.x for item in groups[1]])
            assert (is_left != (scene.relation == "left")) == (Fact("relation") in wrong)


def test_latents_follow_from_what_is_drawn(drawn):
    for example in drawn[:300]:
        plausibility, alignment, aesthetics, _ = example.latents
        assert (plausibility == 1) == (not example.picture.artifacts)
        assert (alignment == 1) == (not example.picture.wrong)
        assert aesthetics <= 1 - 0.6 * max(dataclasses.astuple(example.picture.style))


def test_refuses_an_unknown_split_and_a_tiny_picture():
    with pytest.raises(ValueError, match="split: got 'valid', expected one of"):
        synthetic.draw(0, 0, "valid", 64, 64)
    with pytest.raises(ValueError, match="image_size: got 8, expected at least 16"):
        synthetic.draw(0, 0, "train", 8, 64)


# ----------------------------------------------------------------------------------------- calibration and ceiling


def test_annotators_are_calibrated_to_the_paper(drawn):
    likert = np.array([[annotation.scores for annotation in example.annotations] for example in drawn])
    empty = np.array([~example.heatmaps.any(axis=(0, 1)) for example in drawn])
    figures = write.statistics(likert, empty)
    assert abs(figures["all three raters equal"] - 0.25) < 0.03
    assert abs(figures["within one point"] - 0.85) < 0.03
    assert abs(figures["score mean"] - 0.63) < 0.02
    assert abs(figures["score deviation"] - 0.20) < 0.02
    assert 0.07 < figures["empty implausibility maps"] < 0.16
    assert 0.55 < figures["empty misalignment maps"] < 0.68


def test_plausibility_is_distributed_as_the_real_labels(drawn):
    twelfths = np.rint([example.scores[0] * 12 for example in drawn]).astype(int)
    ours = np.bincount(twelfths, minlength=13) / len(drawn)
    real = np.array([0, *flaws.REAL_HISTOGRAM]) / sum(flaws.REAL_HISTOGRAM)
    assert np.abs(np.cumsum(ours) - np.cumsum(real)).max() < 0.06


def test_expected_heatmap_is_the_mean_of_many_annotators():
    example = next(e for i in range(50) if len((e := synthetic.draw(0, i, "train", 64, 64)).regions) >= 3)
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(100):
        three = annotators.annotate(rng, example.picture, example.regions, example.word_labels)
        maps.append(consolidate.consolidate(three, example.prompt, 64)["heatmaps"] / 255)
    expected = annotators.expected_heatmaps(example.regions, 64)
    assert np.abs(np.mean(maps, axis=0) - expected).mean() < 0.01
    assert np.corrcoef(np.mean(maps, axis=0)[..., 0].ravel(), expected[..., 0].ravel())[0, 1] > 0.97


def test_ceiling_is_high_and_beats_one_annotator(drawn):
    rows = ceiling.references([ceiling.evidence(example) for example in drawn[:300]])
    best, human = rows[ceiling.CEILING], rows[ceiling.ONE_ANNOTATOR]
    assert best.keys() == human.keys() and best["num_examples"] == 300
    for name in ("plausibility", "alignment", "aesthetics", "overall"):
        assert 0.85 < best[f"score/plcc/{name}"] < 0.94
        assert 0.5 < human[f"score/plcc/{name}"] < best[f"score/plcc/{name}"]
    for name in ("implausibility", "misalignment"):
        assert best[f"heatmap/cc/{name}"] > max(0.7, human[f"heatmap/cc/{name}"])
        assert best[f"heatmap/mse/{name}"] < human[f"heatmap/mse/{name}"]
    assert best["keywords/micro/f1"] > max(0.9, human["keywords/micro/f1"])


def test_alignment_needs_the_prompt_and_not_the_other_scores_alone(drawn):
    latents = np.array([example.latents for example in drawn])
    assert np.corrcoef(latents[:, 0], latents[:, 1])[0, 1] < 0.6


# ---------------------------------------------------------------------------------------------------------- stream


def _batches(small_vocabulary, **changes):
    arguments = {
        "seed": 0,
        "vocabulary": small_vocabulary,
        "variant": "multi_head",
        "image_size": 32,
        "heatmap_size": 16,
        "text_length": 48,
        "keyword_length": 80,
        "workers": 0,
    }
    return stream.batches(3, **arguments | changes)


def _equal(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_stream_yields_the_schema_s_batch(small_vocabulary):
    batch = next(_batches(small_vocabulary))
    shapes = {name: (value.dtype.name, value.shape) for name, value in batch.items()}
    assert shapes == {
        "image": ("uint8", (3, 32, 32, 3)),
        "text_ids": ("int32", (3, 1, 48)),
        "keyword_ids": ("int32", (3, 80)),
        "scores": ("float32", (3, 4)),
        "score_mask": ("bool", (3, 4)),
        "heatmaps": ("uint8", (3, 16, 16, 2)),
        "heatmap_mask": ("bool", (3, 2)),
    }
    example = synthetic.draw(0, 1, "train", 32, 16)
    assert small_vocabulary.decode(batch["text_ids"][1, 0]) == example.prompt
    labelled = keywords.label_prompt(keywords.tokenize(example.prompt), example.labels)
    assert small_vocabulary.decode(batch["keyword_ids"][1]) == labelled
    augmented = next(_batches(small_vocabulary, variant="augmented_prompt"))
    assert augmented["text_ids"].shape == (3, 7, 48)


def test_stream_is_the_same_for_two_workers_and_from_a_later_start(small_vocabulary):
    inline = list(itertools.islice(_batches(small_vocabulary), 7))
    parallel = _batches(small_vocabulary, workers=2)
    assert all(_equal(one, two) for one, two in zip(inline, itertools.islice(parallel, 7), strict=True))
    parallel.close()
    resumed = list(itertools.islice(_batches(small_vocabulary, start=4), 3))
    assert all(_equal(one, two) for one, two in zip(inline[4:], resumed, strict=True))
    assert not _equal(inline[0], inline[1])


def test_a_share_of_the_stream_is_captions_and_the_rest_is_as_without(small_vocabulary):
    plain, mixed = (list(itertools.islice(_batches(small_vocabulary, captions=share), 4)) for share in (0.0, 0.25))
    captions = np.concatenate([~batch["score_mask"].any(1) & ~batch["heatmap_mask"].any(1) for batch in mixed])
    assert captions.tolist() == 3 * [False, False, False, True]
    for row, caption in enumerate(captions):
        batch, place = divmod(row, 3)
        one, other = ({name: value[place] for name, value in batches[batch].items()} for batches in (plain, mixed))
        assert _equal(one, other) != caption
        if caption:
            assert small_vocabulary.decode(other["text_ids"][0]) == schema.CAPTION_PROMPT
            assert small_vocabulary.decode(other["keyword_ids"]) == synthetic.draw_prompt(0, row, "train").text


def test_a_captioned_picture_has_no_wrong_fact(monkeypatch):
    seen = []
    monkeypatch.setattr(render, "render", lambda picture, size: (seen.append(picture), None))
    for index in range(50):
        synthetic.draw_captioned(3, index, "train", 32, 16)
    assert not any(picture.wrong for picture in seen)
    assert any(picture.artifacts for picture in seen) and len({picture.background for picture in seen}) > 3
    with pytest.raises(ValueError, match="map_size: got 8, expected at least 16 pixels"):
        synthetic.draw_captioned(3, 0, "train", 32, 8)


def test_stream_raises_a_worker_s_error_here(small_vocabulary):
    broken = _batches(small_vocabulary, workers=1, text_length=4)
    with pytest.raises(ValueError, match="text_length: got 4, expected at least"):
        next(broken)


# --------------------------------------------------------------------------------------------------------- command

COMMAND = ["--train=5", "--dev=2", "--test=3", "--size=48", "--seed=3"]


def _run(output, *arguments, check=True):
    return subprocess.run(
        [sys.executable, "-m", "richhf_data.synthetic", f"--output={output}", *arguments],
        check=check,
        capture_output=True,
        text=True,
    )


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_command_writes_the_published_formats(tmp_path):
    from richhf_data import records

    done = _run(tmp_path / "a", *COMMAND, "--workers=1")
    assert "within one point" in done.stdout and "0.850" in done.stdout
    files = _files(tmp_path / "a")
    assert {"train.tfrecord", "dev.tfrecord", "test.tfrecord", "test_novel.tfrecord", "references.json"} <= files.keys()
    read = [records.decode(raw) for raw in records.read(tmp_path / "a" / "train.tfrecord")]
    assert len(read) == 5
    uids = [example["uid"] for example in read]
    shards = image_sources.shards(f"parquet:{tmp_path}/a/images/*.parquet", uids)
    found = {uid: caption for shard in shards for uid, caption, _ in shard.read(uids, lambda count: None)}
    for index, example in enumerate(read):
        drawn = synthetic.draw(3, index, "train", 48, 512)
        assert example["uid"] == drawn.uid and found[drawn.uid] == drawn.prompt
        np.testing.assert_array_equal(example["heatmaps"], drawn.heatmaps)
        np.testing.assert_allclose(example["scores"], drawn.scores, atol=1e-6)
        assert list(example["labels"]) == list(drawn.labels)
    references = json.loads(files["references.json"])
    assert references.keys() == {"dev", "test", "test_novel"}
    assert references["test"].keys() == {ceiling.CEILING, ceiling.ONE_ANNOTATOR}
    assert references["test"][ceiling.CEILING]["num_examples"] == 3

    # Again: nothing to do. Another configuration, or somebody's folder: refused.
    before = os.stat(tmp_path / "a" / "train.tfrecord").st_mtime_ns
    assert "complete already" in _run(tmp_path / "a", *COMMAND).stdout
    assert os.stat(tmp_path / "a" / "train.tfrecord").st_mtime_ns == before
    with pytest.raises(ValueError, match="take another folder"):
        write.write(tmp_path / "a", {"train": 5}, 48, 3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="holds other files"):
        write.write(tmp_path / "b", {"train": 5}, 48, 3)

    # The same files from another number of workers.
    counts = {"train": 5, "dev": 2, "test": 3, "test_novel": 3}
    write.write(tmp_path / "c", counts, 48, 3, workers=2)
    others = _files(tmp_path / "c")
    assert others.keys() == files.keys()
    for name in files:  # a serialised record's keys have no order of their own
        if name.endswith(".tfrecord"):
            assert list(records.read(tmp_path / "c" / name)) == list(records.read(tmp_path / "a" / name))
        else:
            assert others[name] == files[name], name
