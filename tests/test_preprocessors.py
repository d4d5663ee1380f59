"""preprocessors.py: image and maps move together, chances are the paper's, texts become the vocabulary's ids."""

import io
import pathlib

import cv2
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
import skimage.color
import skimage.data
from tiny_data import built, png

from richhf_data import images, preprocessors, schema, vocabulary
from richhf_data.tensorflow_cpu import tf

QUARTILES = np.tile([[0], [0.25], [0.5], [0.75], [1]], 5)
TEXTS = ["a red cat", "a red_0 cat on_0 the table", "Ünïcode 東京  spaces ", "", "the-moon's 3 _0 dogs!"]


def _dataset(size=None, **features):
    """`size` examples with seeds (n, 2n + 1) and the same features, or features with a first axis of examples."""
    if size is None:
        return tf.data.Dataset.from_tensor_slices(features)
    seeds = tf.stack([tf.range(size), 2 * tf.range(size) + 1], axis=-1)
    features = {key: tf.constant(value) for key, value in features.items()}
    return tf.data.Dataset.from_tensor_slices({"seed": seeds}).map(lambda example: example | features)


def _model_path():
    return pathlib.Path(built()) / "vocabulary.model"


def test_decode_formats():
    image = cv2.resize(np.random.default_rng(0).integers(0, 255, (10, 12, 3), np.uint8), (50, 40))
    maps = [np.full((512, 512), value, np.uint8) for value in (85, 255)]
    encoded = [png(image), png(image[..., 0]), cv2.imencode(".jpg", image)[1].tobytes()]
    encoded.append(cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes())
    dataset = _dataset(image=encoded, heatmaps=[[png(m) for m in maps]] * 4)
    decoded = list(preprocessors.decode(dataset).as_numpy_iterator())
    for example in decoded:
        assert example["image"].dtype == np.uint8
        assert example["image"].shape == (40, 50, 3)
        assert (example["heatmaps"] == np.stack(maps, -1)).all()
    rgb = image[..., ::-1]
    np.testing.assert_array_equal(decoded[0]["image"], rgb)
    np.testing.assert_array_equal(decoded[1]["image"], np.repeat(image[..., :1], 3, -1))
    np.testing.assert_array_equal(decoded[2]["image"], cv2.imdecode(np.frombuffer(encoded[2], np.uint8), 1)[..., ::-1])
    np.testing.assert_array_equal(decoded[3]["image"], rgb)


def test_absent_maps_decode_to_zeros():
    image, heatmap = png(np.zeros((4, 5, 3), np.uint8)), png(np.full((512, 512), 85, np.uint8))
    dataset = preprocessors.decode(_dataset(image=[image] * 2, heatmaps=[[heatmap, b""], [b"", b""]]))
    first, second = dataset.as_numpy_iterator()
    assert first["heatmaps"].shape == second["heatmaps"].shape == (512, 512, 2)
    assert (first["heatmaps"][..., 0] == 85).all() and not first["heatmaps"][..., 1].any()
    assert not second["heatmaps"].any()


def test_crop_moves_image_and_heatmaps_together():
    # A bright disk in a 200 x 300 image, and its heat at the same place of the 512 x 512 maps.
    image, maps = np.zeros((200, 300, 3), np.uint8), np.zeros((512, 512, 2), np.uint8)
    cv2.circle(image, (120, 110), 8, (255, 255, 255), -1)
    for i, size in enumerate((20, 10)):
        channel = np.zeros((512, 512), np.uint8)
        cv2.circle(channel, (round(120.5 / 300 * 512), round(110.5 / 200 * 512)), size, 255, -1)
        maps[..., i] = channel
    dataset = preprocessors.crop(_dataset(80, image=image, heatmaps=maps))
    shapes = {example["image"].shape for example in dataset.as_numpy_iterator()}
    dataset = preprocessors.resize(dataset, image_size=64, heatmap_size=64)
    places = []
    for example in dataset.as_numpy_iterator():
        marks = [example["image"][..., 0], example["heatmaps"][..., 0], example["heatmaps"][..., 1]]
        centres = [[(mark.sum(axis) * np.arange(64)).sum() / mark.sum() for axis in (1, 0)] for mark in marks]
        np.testing.assert_allclose(centres[1:], [centres[0]] * 2, atol=0.6)  # pixels of 64; a crop moves by up to 12
        places.append(centres[0])
    assert len(shapes) > 20
    assert np.ptp(places, axis=0).min() > 5


def test_crop_chance_and_sizes():
    seeds = tf.stack([tf.range(4000), tf.fill([4000], 7)], axis=-1)
    dataset = tf.data.Dataset.from_tensor_slices(seeds).map(preprocessors._crop_box)
    boxes = np.stack(list(dataset.as_numpy_iterator()))
    cropped = (boxes[:, 1] < 1).any(-1)
    assert abs(cropped.mean() - 0.5) < 0.04  # five standard deviations
    start, size = boxes[cropped, 0], boxes[cropped, 1]
    assert size.min() >= 0.8
    assert size.max() <= 1
    assert start.min() >= 0
    assert (start + size).max() <= 1 + 1e-6
    np.testing.assert_allclose(size.mean(0), 0.9, atol=0.01)
    assert abs(np.corrcoef(size.T)[0, 1]) < 0.12  # width and height are drawn apart
    np.testing.assert_allclose((start / (1 - size)).mean(0), 0.5, atol=0.04)
    assert (boxes[~cropped] == [[0, 0], [1, 1]]).all()


def test_colour_chances_and_strength():
    image = np.full((8, 8, 3), (200, 90, 60), np.uint8)
    image[:4] = (40, 120, 180)
    size = 3000
    examples = list(preprocessors.colour(_dataset(size, image=image)).as_numpy_iterator())
    images = np.stack([example["image"] for example in examples]).astype(int)
    grey = (np.ptp(images, axis=-1) <= 1).all(axis=(1, 2))
    same = (images == image).all(axis=(1, 2, 3))
    assert abs(grey.mean() - 0.1) < 5 * np.sqrt(0.09 / size)
    assert abs((~same & ~grey).mean() - 0.1 * 0.9) < 5 * np.sqrt(0.09 / size)
    difference = np.abs(images[~same & ~grey].mean(axis=(1, 2)) - image.mean(axis=(0, 1)))
    assert 1 < difference.mean() < 40  # changed, but the same picture
    assert len({image.tobytes() for image in images[~same]}) > 0.8 * (~same & ~grey).sum()


def test_colour_draws_span_their_ranges():
    seeds = tf.stack([tf.range(4000), tf.fill([4000], 3)], axis=-1)
    dataset = tf.data.Dataset.from_tensor_slices(seeds).map(preprocessors._draw_changes)
    drawn = list(dataset.as_numpy_iterator())
    ranges = {
        "brightness": (-0.05, 0.05),
        "contrast": (0.8, 1.0),
        "hue": (-0.025, 0.025),
        "saturation": (0.8, 1.0),
        "quality": (70, 100),
    }
    values = np.array([[row[name] for name in ranges] for row in drawn], np.float64)
    low, high = np.array(list(ranges.values())).T
    places = (values - low) / (high - low)
    assert places.min() >= 0 and places.max() <= 1 + 1e-6
    np.testing.assert_allclose(np.quantile(places, (0, 0.25, 0.5, 0.75, 1), axis=0), QUARTILES, atol=0.045)
    assert {70, 100} <= set(values[:, 4])
    assert np.abs(np.corrcoef(places.T) - np.eye(5)).max() < 0.08  # drawn apart; five standard deviations


def _photograph(size=224):
    return np.asarray(PIL.Image.fromarray(skimage.data.astronaut()).resize((size, size)))


def _changed(image, **changes):
    neutral = {"brightness": 0.0, "contrast": 1.0, "hue": 0.0, "saturation": 1.0}
    return preprocessors._change_colours(tf.constant(image), neutral | changes).numpy().astype(int)


def test_neutral_colour_changes_keep_the_image():
    np.testing.assert_allclose(_changed(_photograph()), _photograph(), atol=1)


@pytest.mark.parametrize("delta", [-0.05, 0.03])
def test_brightness_is_that_of_pillow(delta):
    expected = PIL.Image.fromarray(_photograph()).point(lambda level: min(max(round(level + 255 * delta), 0), 255))
    np.testing.assert_allclose(_changed(_photograph(), brightness=delta), np.asarray(expected), atol=1)


@pytest.mark.parametrize("factor", [0.8, 0.93])
def test_contrast_is_that_of_pillow(factor):
    channels = PIL.Image.fromarray(_photograph()).split()  # TensorFlow keeps each channel's mean, Pillow the grey one
    expected = PIL.Image.merge("RGB", [PIL.ImageEnhance.Contrast(one).enhance(factor) for one in channels])
    np.testing.assert_allclose(_changed(_photograph(), contrast=factor), np.asarray(expected), atol=1)
    assert np.abs(np.asarray(expected) - _photograph().astype(int)).max() > 5


@pytest.mark.parametrize(("hue", "saturation"), [(-0.025, 1.0), (0.02, 1.0), (0.0, 0.8), (0.025, 0.9)])
def test_hue_and_saturation_are_those_of_scikit_image(hue, saturation):
    hsv = skimage.color.rgb2hsv(_photograph())
    hsv[..., 0] = (hsv[..., 0] + hue) % 1
    hsv[..., 1] *= saturation
    expected = 255 * skimage.color.hsv2rgb(hsv)
    np.testing.assert_allclose(_changed(_photograph(), hue=hue, saturation=saturation), expected, atol=1)
    assert np.abs(expected - _photograph()).max() > 10


def test_grey_is_that_of_pillow():
    expected = np.asarray(PIL.Image.fromarray(_photograph()).convert("L"), int)
    grey = preprocessors._grey(tf.constant(_photograph())).numpy()
    np.testing.assert_allclose(grey, np.repeat(expected[..., None], 3, -1), atol=1)


def test_jpeg_noise_is_that_of_pillow():
    """What `colour` leaves of the image is what Pillow's JPEG of the drawn quality leaves of the drawn colours."""
    image, qualities = _photograph(96), []
    for example in preprocessors.colour(_dataset(150, image=image)).as_numpy_iterator():
        seed = preprocessors._fold(example["seed"], 1)
        change, grey = tf.random.stateless_uniform([2], preprocessors._fold(seed, 0)).numpy()
        if change >= preprocessors.COLOUR_PROBABILITY or grey < preprocessors.GREY_PROBABILITY:
            continue
        drawn = {name: value.numpy() for name, value in preprocessors._draw_changes(seed).items()}
        clean, file = preprocessors._change_colours(tf.constant(image), drawn).numpy(), io.BytesIO()
        PIL.Image.fromarray(clean).save(file, "JPEG", quality=int(drawn["quality"]))
        expected = np.asarray(PIL.Image.open(file), int)
        np.testing.assert_allclose(example["image"], expected, atol=1)
        assert np.abs(clean - expected).mean() > 0.5  # there is noise
        qualities.append(drawn["quality"])
    assert len(qualities) > 8 and np.ptp(qualities) > 15


def test_augmentation_is_a_function_of_the_seed():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    maps = np.random.default_rng(1).integers(0, 255, (512, 512, 2), np.uint8)

    def images(skip):
        dataset = preprocessors.crop(_dataset(60, image=image, heatmaps=maps).skip(skip))
        dataset = preprocessors.colour(preprocessors.resize(dataset, image_size=16, heatmap_size=8))
        return [example["image"].tobytes() + example["heatmaps"].tobytes() for example in dataset.as_numpy_iterator()]

    assert images(0) == images(0)
    assert images(0)[17:] == images(17)
    assert len(set(images(0))) > 25  # about half are cropped, each in its own way


def test_seed_comes_from_seqio_unless_given():
    import seqio

    def seeds(seed):
        with seqio.utils.map_seed_manager(seed):
            dataset = preprocessors.seed(tf.data.Dataset.range(5).map(lambda i: {"i": i}))
        return np.stack([example["seed"] for example in dataset.as_numpy_iterator()])

    assert (seeds(1) == seeds(1)).all()
    assert (seeds(1) != seeds(2)).any()
    assert len(set(seeds(1)[:, 0])) == 5
    given = _dataset(3, x=0)
    assert preprocessors.seed(given) is given


def test_resize_keeps_the_heat():
    maps = np.zeros((512, 512, 2), np.uint8)
    cv2.circle(channel := np.zeros((512, 512), np.uint8), (300, 100), 26, 255, -1)
    maps[..., 0] = channel
    image = np.full((512, 300, 3), 77, np.uint8)
    for size in (56, 64, 224):
        dataset = preprocessors.resize(_dataset(1, image=image, heatmaps=maps), image_size=32, heatmap_size=size)
        example = next(dataset.as_numpy_iterator())
        assert example["heatmaps"].dtype == np.uint8
        assert example["heatmaps"].shape == (size, size, 2)
        assert example["heatmaps"][..., 0].mean() == pytest.approx(maps[..., 0].mean(), rel=0.02)
        assert not example["heatmaps"][..., 1].any()
        assert (example["image"] == 77).all()


@pytest.mark.parametrize("variant", schema.VARIANTS)
def test_text_ids_equal_the_vocabulary(variant):
    pieces = vocabulary.Vocabulary(_model_path())
    dataset = _dataset(prompt=TEXTS, uid=["u"] * len(TEXTS))
    dataset = preprocessors.texts(
        dataset, variant=variant, vocabulary=preprocessors.SeqioVocabulary(str(_model_path())), length=60
    )
    for text, example in zip(TEXTS, dataset.as_numpy_iterator(), strict=True):
        expected = [pieces.encode(task, 60) for task in schema.task_prompts(text, variant)]
        assert example["text_ids"].dtype == np.int32
        np.testing.assert_array_equal(example["text_ids"], expected)


def test_decoded_texts_equal_the_vocabulary():
    ours, seqios = vocabulary.Vocabulary(_model_path()), preprocessors.SeqioVocabulary(str(_model_path()))
    rng = np.random.default_rng(0)
    sequences = [ours.encode(text, 40) for text in TEXTS] + list(rng.integers(0, ours.size + 5, (50, 12)))
    for ids in sequences:
        known = ids[ids < ours.size]
        assert seqios.decode(known) == ours.decode(known)
        assert seqios.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("length", [3, 6])  # six words and the end id take seven or more
def test_long_prompt_is_refused_or_cut(length):
    pieces = preprocessors.SeqioVocabulary(str(_model_path()))
    dataset = _dataset(prompt=["a red cat on the table"], uid=["u7"])
    refused = preprocessors.texts(dataset, variant="multi_head", vocabulary=pieces, length=length)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"longer than {length} ids.*raise text_length(.|\n)*u7"):
        next(refused.as_numpy_iterator())
    cut = preprocessors.texts(dataset, variant="multi_head", vocabulary=pieces, length=length, truncate=True)
    expected = vocabulary.Vocabulary(_model_path()).encode("a red cat on the table", length)
    (ids,) = next(cut.as_numpy_iterator())["text_ids"]
    np.testing.assert_array_equal(ids, expected)
    assert ids[-1] == schema.EOS_ID


def test_keyword_target_is_zero_without_labels():
    pieces = preprocessors.SeqioVocabulary(str(_model_path()))
    dataset = _dataset(labelled_prompt=["a red_0 cat", ""], uid=["u0", "u1"])
    first, second = preprocessors.keyword_target(dataset, vocabulary=pieces, length=20).as_numpy_iterator()
    np.testing.assert_array_equal(first["targets"], vocabulary.Vocabulary(_model_path()).encode("a red_0 cat", 20))
    assert pieces.decode(first["targets"]) == "a red_0 cat"
    assert first["targets_pretokenized"] == b"a red_0 cat"
    assert not second["targets"].any()


@pytest.mark.parametrize("shape", [(97, 61), (40, 200), (24, 30), (48, 48)])
def test_resize_is_that_of_prediction(shape):

    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    example = {"image": image, "heatmaps": np.zeros((512, 512, 2), np.uint8)}
    dataset = tf.data.Dataset.from_tensors(example)
    resized = next(preprocessors.resize(dataset, image_size=48, heatmap_size=16).as_numpy_iterator())["image"]
    difference = np.abs(resized.astype(int) - images.resize(image, 48))
    assert difference.max() <= 1
