"""seqio preprocessors that turn an example of the dataset into what the model reads.

Order: `decode`, `crop` (training), `resize`, `colour` (training), `texts`, `keyword_target`. Crop and colour are the
augmentation of the paper (arXiv 2312.10240, section 9). There is no flip, because prompts name left and right. Colour
follows the resize because it is cheaper on the smaller image. All randomness is a function of the example's `seed`.
"""

from collections.abc import Sequence

from richhf_data import schema
from richhf_data import vocabulary as vocabularies
from richhf_data.tensorflow_cpu import seqio, tf

CROP_PROBABILITY, CROP_SHARE = 0.5, (0.8, 1.0)  # of width and of height
COLOUR_PROBABILITY = 0.1
BRIGHTNESS_DELTA, HUE_DELTA = 0.05, 0.025
CONTRAST, SATURATION = (0.8, 1.0), (0.8, 1.0)
JPEG_QUALITY = (70, 100)
DCT_METHOD = "INTEGER_ACCURATE"  # as in Pillow, which prediction uses; TensorFlow's default differs by up to 25 levels
GREY_PROBABILITY = 0.1


class SeqioVocabulary(seqio.SentencePieceVocabulary):
    """A vocabulary for seqio with the ids and texts of `richhf_data.vocabulary.Vocabulary`."""

    def _decode(self, ids) -> str:
        return vocabularies.spell(self.tokenizer, [int(piece) for piece in ids])


class TextTable(seqio.Vocabulary):
    """CLIP's vocabulary for seqio, whose tokenizer TensorFlow does not have: a table of a dataset's texts.

    Args:
      texts: all that will be encoded. length: as of `CLIPVocabulary.pieces`.
    """

    def __init__(self, vocabulary: vocabularies.CLIPVocabulary, texts: Sequence[str], length: int):
        super().__init__()
        self._vocabulary = vocabulary
        self._ids = tf.ragged.constant([vocabulary.pieces(text, length) for text in texts], tf.int32)
        places = tf.lookup.KeyValueTensorInitializer(tf.constant(texts), tf.range(len(texts), dtype=tf.int64))
        self._places = tf.lookup.StaticHashTable(places, default_value=len(texts))  # out of range: gathering it fails

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int:
        return schema.EOS_ID

    @property
    def unk_id(self) -> int:
        return schema.UNK_ID

    def _encode(self, s: str) -> list[int]:
        return self._encode_tf(tf.constant([s]))[0].numpy().tolist()

    def _encode_tf(self, s: tf.Tensor) -> tf.RaggedTensor:
        return tf.gather(self._ids, self._places.lookup(s))

    def _decode(self, ids) -> str:
        return self._vocabulary.decode(ids)

    def _decode_tf(self, ids):
        raise NotImplementedError("seqio decodes predictions outside of TensorFlow")


@seqio.map_over_dataset
def decode(example: dict) -> dict:
    """Encoded `image` -> uint8[H, W, 3]; encoded `heatmaps` -> uint8[512, 512, 2], zeros for an absent map."""
    image = tf.cond(
        tf.io.is_jpeg(example["image"]),
        lambda: tf.io.decode_jpeg(example["image"], channels=3, dct_method=DCT_METHOD),
        lambda: tf.io.decode_image(example["image"], channels=3, expand_animations=False),
    )
    first, second = (tf.cast(_decode_map(example["heatmaps"][i])[..., 0], tf.uint16) for i in (0, 1))
    # The two channels become the bytes of one integer: tf.concat would take longer than decoding the maps.
    heatmaps = tf.bitcast(tf.bitwise.bitwise_or(first, tf.bitwise.left_shift(second, 8)), tf.uint8)
    image.set_shape([None, None, 3])
    heatmaps.set_shape([None, None, len(schema.HEATMAPS)])
    return example | {"image": image, "heatmaps": heatmaps}


def _decode_map(encoded: tf.Tensor) -> tf.Tensor:
    absent = tf.zeros([schema.RAW_MAP_SIZE, schema.RAW_MAP_SIZE, 1], tf.uint8)
    return tf.cond(tf.equal(encoded, ""), lambda: absent, lambda: tf.io.decode_png(encoded, channels=1))


def seed(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Adds `seed` int32[2], seqio's seed of the example, unless the dataset has one."""
    if "seed" in dataset.element_spec:
        return dataset

    @seqio.map_over_dataset(num_seeds=1)
    def add(example, seed):
        return example | {"seed": tf.cast(tf.bitwise.bitwise_and(seed, 0x7FFFFFFF), tf.int32)}

    return add(dataset)


@seqio.map_over_dataset
def crop(example: dict) -> dict:
    """With probability 0.5 cuts `image` and `heatmaps` to the same 80 to 100 % of their width and of their height."""
    box = _crop_box(_fold(example["seed"], 0))
    return example | {key: _cut(example[key], box) for key in ("image", "heatmaps")}


def _crop_box(seed: tf.Tensor) -> tf.Tensor:
    """float32[2, 2]: (top, left) and (height, width), as shares of the image."""
    chance = tf.random.stateless_uniform([], _fold(seed, 0))
    size = tf.random.stateless_uniform([2], _fold(seed, 1), *CROP_SHARE)
    start = tf.random.stateless_uniform([2], _fold(seed, 2)) * (1 - size)
    whole = tf.constant([[0.0, 0.0], [1.0, 1.0]])
    return tf.where(chance < CROP_PROBABILITY, tf.stack([start, size]), whole)


def _cut(image: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """The pixels of the box; each edge is rounded to the nearest pixel border."""
    sides = tf.shape(image)[:2]
    edges = tf.cast(tf.round(tf.stack([box[0], box[0] + box[1]]) * tf.cast(sides, tf.float32)), tf.int32)
    edges = tf.minimum(edges, sides)
    return image[edges[0, 0] : edges[1, 0], edges[0, 1] : edges[1, 1]]


def resize(dataset: tf.data.Dataset, *, image_size: int, heatmap_size: int) -> tf.data.Dataset:
    """`image` -> uint8[image_size, image_size, 3], antialiased; `heatmaps` -> uint8[heatmap_size, heatmap_size, 2]."""

    @seqio.map_over_dataset
    def resize_example(example):
        image = tf.image.resize(example["image"], [image_size, image_size], antialias=True)
        return example | {"image": _to_uint8(image), "heatmaps": resize_maps(example["heatmaps"], heatmap_size)}

    return resize_example(dataset)


def resize_maps(heatmaps: tf.Tensor, size: int) -> tf.Tensor:
    """uint8[H, W, 2] -> uint8[size, size, 2], averages over areas."""
    return _to_uint8(tf.image.resize(heatmaps, [size, size], method="area"))


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


@seqio.map_over_dataset
def colour(example: dict) -> dict:
    """With probability 0.1 changes the colours and adds JPEG noise, and with probability 0.1 makes `image` grey."""
    seed, image = _fold(example["seed"], 1), example["image"]
    shape = image.shape

    def changed():
        drawn = _draw_changes(seed)
        return tf.image.adjust_jpeg_quality(_change_colours(image, drawn), drawn["quality"], dct_method=DCT_METHOD)

    change, grey = tf.unstack(tf.random.stateless_uniform([2], _fold(seed, 0)))
    image = tf.cond(change < COLOUR_PROBABILITY, changed, lambda: image)
    image = tf.cond(grey < GREY_PROBABILITY, lambda: _grey(image), lambda: image)
    return example | {"image": tf.ensure_shape(image, shape)}


def _draw_changes(seed: tf.Tensor) -> dict[str, tf.Tensor]:
    def draw(number, low, high, dtype=tf.float32):
        return tf.random.stateless_uniform([], _fold(seed, number), low, high, dtype)

    return {
        "brightness": draw(1, -BRIGHTNESS_DELTA, BRIGHTNESS_DELTA),
        "contrast": draw(2, *CONTRAST),
        "hue": draw(3, -HUE_DELTA, HUE_DELTA),
        "saturation": draw(4, *SATURATION),
        "quality": draw(5, JPEG_QUALITY[0], JPEG_QUALITY[1] + 1, tf.int32),
    }


def _change_colours(image: tf.Tensor, drawn: dict[str, tf.Tensor]) -> tf.Tensor:
    image = tf.image.convert_image_dtype(image, tf.float32)
    image = tf.image.adjust_brightness(image, drawn["brightness"])
    image = tf.image.adjust_contrast(image, drawn["contrast"])
    image = tf.clip_by_value(image, 0, 1)  # hue and saturation are defined on [0, 1]
    image = tf.image.adjust_hue(image, drawn["hue"])
    image = tf.image.adjust_saturation(image, drawn["saturation"])
    return _to_uint8(image * 255)


def _grey(image: tf.Tensor) -> tf.Tensor:
    return tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image))


def _fold(seed: tf.Tensor, number: int) -> tf.Tensor:
    return tf.random.fold_in(seed, number)


def texts(
    dataset: tf.data.Dataset, *, variant: str, vocabulary: seqio.Vocabulary, length: int, truncate: bool = False
) -> tf.data.Dataset:
    """Adds `text_ids`: int32[R, L], the ids of the texts of `schema.task_prompts`.

    Each text is its pieces, the end id, then zeros. A text of more than L ids stops the iteration with
    `tf.errors.InvalidArgumentError`, or loses its last pieces with `truncate`.
    """
    prefixes = schema.task_prompts("", variant)

    @seqio.map_over_dataset
    def add(example):
        ids = tokenize(tf.strings.join([prefixes, example["prompt"]]), vocabulary, length, truncate, example["uid"])
        return example | {"text_ids": ids}

    return add(dataset)


def keyword_target(
    dataset: tf.data.Dataset, *, vocabulary: seqio.Vocabulary, length: int, truncate: bool = False
) -> tf.data.Dataset:
    """Adds `targets` int32[T], the ids of the labelled prompt (all zero where it is empty), and its text as
    `targets_pretokenized`, where seqio's Evaluator looks for it."""

    @seqio.map_over_dataset
    def add(example):
        text = example["labelled_prompt"]
        ids = tokenize(text[None], vocabulary, length, truncate, example["uid"])[0]
        ids = tf.where(tf.equal(text, ""), tf.zeros_like(ids), ids)
        return example | {"targets": ids, "targets_pretokenized": text}

    return add(dataset)


def tokenize(texts: tf.Tensor, vocabulary: seqio.Vocabulary, length: int, truncate: bool, uid: tf.Tensor) -> tf.Tensor:
    """int32[n, length] of string[n]: pieces, end id, zeros."""
    pieces = vocabulary.encode_tf(texts)
    longest = tf.cast(tf.reduce_max(pieces.row_lengths()), tf.int32) + 1
    checks = []
    if not truncate:
        message = f"prompt longer than {length} ids, end included; raise text_length or keyword_length. uid, ids, text:"
        checks = [tf.debugging.Assert(longest <= length, [message, uid, longest, texts[0]])]
    with tf.control_dependencies(checks):
        pieces = pieces[:, : length - 1]
        ends = tf.fill([tf.shape(texts)[0], 1], schema.EOS_ID)
        ids = tf.concat([pieces, tf.cast(ends, pieces.dtype)], axis=1).to_tensor(schema.PAD_ID, shape=[None, length])
    return tf.ensure_shape(tf.cast(ids, tf.int32), [texts.shape[0], length])
