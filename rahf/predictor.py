"""A trained RAHF in Python: images and prompts in, feedback out. Needs no TensorFlow.

    model = rahf.load(DIR)
    feedback = model.predict(images, prompts)
"""

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence

import flax.traverse_util
import jax
import numpy as np
from flax import linen as nn

from rahf import ahead, checkpoints, folders, partitioning, sources, weights, workdirs
from rahf.fingerprint import fingerprint
from rahf.models import critics
from rahf.models.baselines import CLIPCriticConfig
from richhf_data import copying, images, jsonl, keywords, paths, schema
from richhf_data import vocabulary as vocabularies
from richhf_data.errors import UserError


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What a critic says of B images. A baseline predicts a part of it: the rest is {} or None.

    Attributes:
      scores: name of `schema.SCORES` -> float32[B] in [0, 1], higher is better.
      heatmaps: name of `schema.HEATMAPS` -> float32[B, h, w] in [0, 1], the model's heatmap resolution.
      labelled_prompts: B keyword sequences as the decoder wrote them ("a yellow_0 cat").
      keywords: for each image the prompt's words that it contradicts.
      deviations: of a model that predicts them (`score_head.deviation`), name of `schema.SCORES` -> float32[B], the standard
        deviation of a label around the score; else {}.
    """

    scores: dict[str, np.ndarray]
    heatmaps: dict[str, np.ndarray]
    labelled_prompts: list[str] | None
    keywords: list[list[str]] | None
    deviations: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Predictor:
    """A critic's forward pass, compiled for one config and one mesh. The parameters are an argument of its calls.

    Attributes:
      config: of the run. model_config: of critics.config_of. vocabulary: None is enough to compile.
      copies: whether the decoder may write nothing but the prompt's words, with or without the suffix (copying.py).
      params: the parameters that it expects, as shapes with shardings: sharded over the mesh axis `model`, replicated over
        `data`.
    """

    def __init__(self, config, vocabulary: vocabularies.Vocabulary | None, mesh=None):
        self.config, self.vocabulary = config, vocabulary
        self.model_config = critics.config_of(config.model.to_dict())
        self._mesh = partitioning.make_mesh() if mesh is None else mesh
        self._rows = partitioning.batch_sharding(self._mesh)
        module = critics.module_of(self.model_config)
        inputs = critics.dummy_inputs(self.model_config, config.data.text_length)
        boxed = jax.eval_shape(lambda key: module.init(key, *inputs)["params"], jax.random.key(0))
        shardings = partitioning.param_shardings(self._mesh, boxed)
        self.params = partitioning.placed_shapes(nn.unbox(boxed), shardings)
        self._gather = jax.jit(lambda params: params, out_shardings=shardings)

        self.copies = config.data.get("decoding", "free") == "copy" and "keywords" in self.model_config.parts
        self._inputs = ("image", "text_ids", *(("copy",) if self.copies else ()))
        self._automata = copying.Copies(vocabulary, config.data.keyword_length) if self.copies and vocabulary else None

        def forward(params, image, text_ids, copy=None):
            length = config.data.keyword_length
            return module.apply({"params": params}, image, text_ids, length, copy, method=module.predict)

        everywhere = partitioning.replicated(self._mesh)  # every process has every row
        attention = config.get("mesh", {}).get("attention", "auto")  # a converted folder has no section mesh
        self._forward = partitioning.MeshFunction(forward, self._mesh, attention=attention, out_shardings=everywhere)

    def gather(self, params):
        """Parameters of a training state, in the places where this expects them."""
        return self._gather(params)

    def batch_size(self, rows: int) -> int:
        """`rows`, rounded up to a multiple of the devices that share a batch."""
        return rows + -rows % partitioning.sizes(self._mesh)["data"]

    def lower(self, rows: int) -> jax.stages.Lowered:
        """The forward pass of `rows` images, lowered from shapes alone."""
        rows = self.batch_size(rows)
        copy = (rows, *copying.table_shape(self.config.data.keyword_length)), "int32"
        shapes = sources.batch_shapes(self.config, rows) | {"copy": copy}
        inputs = (jax.ShapeDtypeStruct(*shapes[name], sharding=self._rows) for name in self._inputs)
        return self._forward.lower(self.params, *inputs)

    def bucket(self, rows: int, most: int) -> int:
        """The rows of the program that predicts so many: a power of two up to `most`, rounded up as `batch_size`."""
        return self.batch_size(min(1 << (rows - 1).bit_length(), most))

    def predict_rows(self, params, examples: Iterable[dict], batch_size: int) -> Iterator[dict]:
        """Predictions of any number of rows, in batches of at most `batch_size`; see `predict_batches`.

        Args:
          examples: each a dictionary of `image` uint8[H, W, 3] at the model's size and `text_ids` int32[R, L]; and of the
            `prompt`, which a model with data.decoding=copy reads. On several hosts each is given the same rows.

            `name`, where there is one, names a row in errors.

        Yields:
          One dictionary a row: scores float32[4] and heatmaps float32[h, w, 2], both in [0, 1], keyword_ids int32[T] and the
          labelled_prompt that they spell, deviations float32[4]; None for what the model does not predict.

        Raises:
          UserError: a prediction that is not finite.
        """
        examples = iter(examples)

        def batches():
            while rows := list(itertools.islice(examples, batch_size)):
                yield None, rows

        with contextlib.closing(self.predict_batches(params, batches(), batch_size)) as results:
            for _, rows in results:
                yield from rows

    def predict_batches(self, params, batches: Iterable[tuple], batch_size: int) -> Iterator[tuple]:
        """Predictions batch by batch.

        A thread takes the batches and hands them to the devices, one ahead of the results that are asked for. A batch is
        filled up to its bucket. Where compiling another program takes longer than computing the rows that fill it up, which
        is everywhere but on a CPU, a smaller batch takes the program of a larger one before it.

        Args:
          batches: pairs of anything and up to `batch_size` rows, which may be none.

        Yields:
          Pairs of the same and the rows' predictions, as `predict_rows`.
        """
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"

        def begun():
            size = number = 0
            for key, rows in batches:
                outputs = ()
                if rows:
                    bucket = self.bucket(len(rows), batch_size)
                    size = bucket if on_cpu else max(bucket, size)
                    outputs = self.begin(params, rows, size)
                names = [row.get("name", f"row {number + i}") for i, row in enumerate(rows)]
                number += len(rows)
                yield key, names, outputs

        with contextlib.closing(ahead.taken(begun(), 1)) as results:
            for key, names, outputs in results:
                yield key, self.finish(names, outputs)

    def begin(self, params, rows: Sequence[dict], size: int) -> tuple[jax.Array, ...]:
        """The forward pass of some rows as a batch of `size`; does not wait for the devices."""
        local = partitioning.local_rows(self._rows, size)
        if self.copies:
            rows = [row | {"copy": self._automata.table(row["prompt"])} for row in rows]
        stacked = {name: np.stack([row[name] for row in rows]) for name in self._inputs}
        own = {name: schema.pad_rows(array, size)[local] for name, array in stacked.items()}
        return self._forward(params, **partitioning.shard_batch(own, self._rows))

    def finish(self, names: Sequence[str], outputs: Sequence) -> list[dict]:
        """Waits for what `begin` returned: a dictionary for each name, as `predict_rows`."""
        outputs = [itertools.repeat(None) if output is None else output for output in jax.device_get(outputs)]
        return [self._row(*row) for row in zip(names, *outputs, strict=False)]

    def _row(
        self,
        name: str,
        scores: np.ndarray | None,
        heatmaps: np.ndarray | None,
        ids: np.ndarray | None,
        deviations: np.ndarray | None = None,
    ) -> dict:
        if not all(np.isfinite(values).all() for values in (scores, heatmaps, deviations) if values is not None):
            raise UserError(
                f"prediction: got scores or heatmaps that are not finite for {name}; the weights are damaged, or "
                "too large for model.dtype: train or convert them again"
            )
        spelt = None if ids is None else self.vocabulary.decode(ids)
        return {
            "scores": scores,
            "heatmaps": heatmaps,
            "keyword_ids": ids,
            "labelled_prompt": spelt,
            "deviations": deviations,
        }


# (part of the model, option, its default): of identities only where the default is not taken.
_LATER_OPTIONS = (
    ("", "word_head", False),
    ("vit", "stem_blocks", 0),
    ("score_head", "pool", "flatten"),
    ("score_head", "reads_text", False),
    ("score_head", "deviation", False),
)


class Model:
    """A critic with its parameters and vocabulary, ready to predict.

    Attributes:
      predictor, params: the compiled forward pass, and the parameters in its places.
    """

    def __init__(self, predictor: Predictor, params):
        self.predictor, self.params = predictor, params
        self.config, self.model_config, self.vocabulary = predictor.config, predictor.model_config, predictor.vocabulary

    def require(self, name: str, *parts: str) -> None:
        """Refuses a model that does not predict these parts of `schema.PARTS`: UserError that begins with `name`."""
        if missing := [part for part in parts if part not in self.model_config.parts]:
            raise UserError(
                f"{name}: the model predicts {' and '.join(self.model_config.parts)}, expected one that predicts "
                f"{' and '.join(missing)} too, such as RAHF"
            )

    @functools.cached_property
    def identity(self) -> str:
        """Depends on all that predictions depend on: parameters, model, text lengths, way of decoding and vocabulary."""
        return fingerprint(*self.identity_parts())

    def identity_parts(self) -> list:
        """What `identity` is made of."""
        data = {name: self.config.data[name] for name in ("text_length", "keyword_length")}
        if self.predictor.copies:
            data["decoding"] = "copy"  # identities are older than this option
        model = dataclasses.asdict(self.model_config)
        if model["architecture"] == "rahf":  # identities are older than these options
            del model["architecture"]
            for part, option, default in _LATER_OPTIONS:
                options = model[part] if part else model
                if options[option] == default:
                    del options[option]
        return [sorted(checkpoints.digests(self.params).items()), model, data, self.vocabulary.digest]

    def prepare(self, image: np.ndarray, prompt: str) -> dict:
        """One row of a batch from an RGB image uint8[H, W, 3] of any size and its prompt.

        Raises:
          UserError: the image is not uint8[H, W, 3]; or the prompt is no text, or longer than the model's text length and
            the config does not say data.truncate_long_prompts.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UserError(f"image: got {image.dtype}{list(image.shape)}, expected uint8[H, W, 3], RGB")
        return {"image": images.resize(image, self.model_config.image_size), **self.text(prompt)}

    def text(self, prompt: str) -> dict:
        """What a row of a batch has of its prompt. Raises UserError as `prepare`."""
        return {"text_ids": self.text_ids(prompt), "prompt": prompt}

    def text_ids(self, prompt: str) -> np.ndarray:
        """The texts that the model reads of a prompt, int32[R, L]. Raises UserError as `prepare`."""
        if not jsonl.is_text(prompt):
            raise UserError(f"prompt: got {prompt!r}, expected text")
        if self.is_too_long(prompt) and not self.truncates:
            raise UserError(
                f"prompt: {prompt[:80]!r} takes {self._num_ids(prompt)} ids with its end, the model reads "
                f"data.text_length={self.config.data.text_length}; shorten it"
            )
        texts = schema.task_prompts(prompt, self.model_config.variant)
        return np.stack([self.vocabulary.encode(text, self.config.data.text_length) for text in texts])

    @property
    def truncates(self) -> bool:
        """Whether long prompts lose their ends, as in training, or are refused."""
        return self.config.data.get("truncate_long_prompts", False)

    def is_too_long(self, prompt: str) -> bool:
        """Whether a prompt is longer than the model's text length. A model that reads no text cuts all that it is given."""
        return self.model_config.vocab_size is not None and self._num_ids(prompt) > self.config.data.text_length

    def _num_ids(self, prompt: str) -> int:
        return max(map(self.vocabulary.num_ids, schema.task_prompts(prompt, self.model_config.variant)))

    def predict(self, images: Sequence[np.ndarray], prompts: Sequence[str], batch_size: int = 32) -> Feedback:
        """Feedback for B RGB images, uint8[H, W, 3] of any sizes, and their B prompts.

        Warns of prompts that lose their ends (`truncates`).

        Raises:
          UserError: different numbers of images and prompts; an image or a prompt that `prepare` refuses; a prediction that
            is not finite.
        """
        if len(images) != len(prompts):
            raise UserError(f"prompts: got {len(prompts)} for {len(images)} images, expected one each")
        if self.truncates and any(map(self.is_too_long, filter(jsonl.is_text, prompts))):
            length = self.config.data.text_length
            warnings.warn(f"prompts of more than {length} ids lose their ends, as in the model's training", stacklevel=2)

        def prepare(numbered):
            number, (image, prompt) = numbered
            return self.prepare(image, prompt) | {"name": f"images[{number}]"}

        pairs = enumerate(zip(images, prompts, strict=True))
        with contextlib.closing(ahead.mapped(prepare, pairs, batch_size)) as inputs:
            rows = list(self.predict_rows(inputs, batch_size))
        return feedback_of(rows, prompts, self)

    def predict_rows(self, examples: Iterable[dict], batch_size: int) -> Iterator[dict]:
        """`Predictor.predict_rows` with the model's parameters."""
        return self.predictor.predict_rows(self.params, examples, batch_size)

    def predict_batches(self, batches: Iterable[tuple], batch_size: int) -> Iterator[tuple]:
        """`Predictor.predict_batches` with the model's parameters."""
        return self.predictor.predict_batches(self.params, batches, batch_size)


def feedback_of(rows: Sequence[dict], prompts: Sequence[str], model: "Model") -> Feedback:
    """Collects `predict_rows`' rows."""
    parts, heatmaps = model.model_config.parts, {}

    def numbers(key):
        values = np.asarray([row[key] for row in rows], np.float32).reshape(-1, len(schema.SCORES))
        return {name: values[:, i] for i, name in enumerate(schema.SCORES)}

    scores = numbers("scores") if "scores" in parts else {}
    deviations = numbers("deviations") if model.model_config.deviations else {}
    if "heatmaps" in parts:
        size = rows[0]["heatmaps"].shape[:2] if rows else (0, 0)
        values = np.asarray([row["heatmaps"] for row in rows], np.float32).reshape(-1, *size, len(schema.HEATMAPS))
        heatmaps = {name: values[..., i] for i, name in enumerate(schema.HEATMAPS)}
    if "keywords" not in parts:
        return Feedback(scores, heatmaps, None, None, deviations)
    labelled = [row["labelled_prompt"] for row in rows]
    written = model.vocabulary.written
    words = [keywords.misaligned_in(text, prompt, written) for text, prompt in zip(labelled, prompts, strict=True)]
    return Feedback(scores, heatmaps, labelled, words, deviations)


def load(workdir, config=None) -> Model:
    """The model of a workdir, with the parameters of its best evaluation so far; or of a folder that rahf.convert wrote.

    Args:
      workdir: a path, or an address such as gs://bucket/run, hf://owner/name or "synth" (folders.py).
      config: the workdir's by default.

    Raises:
      UserError: the folder holds no run, or no checkpoint, or one of another architecture, or weights that are not finite;
        an address as `folders.local_folder`.
    """
    workdir = paths.absolute(folders.local_folder(workdir))
    config = workdirs.read_config(workdir) if config is None else config
    predictor = Predictor(config, workdirs.vocabulary(workdir))
    if (file := workdir / "weights.safetensors").is_file():
        if "://" in str(workdir):
            raise UserError(
                f"workdir: {workdir} holds weights of rahf.convert, expected {folders.SUMS} beside them and a package that "
                "fetches them (gcsfs for gs://); convert again, or install it"
            )
        return Model(predictor, _read_params(file, predictor.params))
    params = checkpoints.restore_params(workdir, predictor.params)
    for name, array in flax.traverse_util.flatten_dict(params, sep="/").items():
        if count := sum(weights.count_not_finite(shard.data) for shard in array.addressable_shards if not shard.replica_id):
            raise UserError(
                f"workdir: {workdir}: the parameter {name} holds {count} numbers that are not finite (NaN or infinity); "
                "train again in another --workdir"
            )
    return Model(predictor, params)


def _read_params(file, targets):
    """Parameters of a safetensors file with our names, placed as `targets` says, one tensor at a time."""
    targets = flax.traverse_util.flatten_dict(targets, sep="/")
    return weights.read_params(file, targets, lambda array, target: partitioning.place(array, target.sharding))


def check_vocabulary(model_config: critics.CriticConfig, vocabulary: vocabularies.Vocabulary, text_length: int) -> None:
    """Refuses a vocabulary or a text length that the model cannot read: UserError.

    Args:
      text_length: of the config's `data`.
    """
    size, is_clip = model_config.vocab_size, isinstance(model_config, CLIPCriticConfig)
    of_clip = isinstance(vocabulary, vocabularies.CLIPVocabulary)
    if of_clip and "keywords" in model_config.parts:
        raise UserError(f"vocabulary: {vocabulary.path} is a CLIP's, expected a SentencePiece model, which writes keywords")
    if size is not None and vocabulary.size > size:
        raise UserError(
            f"vocabulary: {vocabulary.path} has {vocabulary.size} pieces, the model embeds "
            f"model.{'clip.text' if is_clip else 't5'}.vocab_size={size}; raise it, or train a smaller vocabulary"
        )
    if is_clip and vocabulary.end_id != model_config.clip.text.eos_id:
        raise UserError(
            f"vocabulary: {vocabulary.path} ends a text with the id {vocabulary.end_id}, the model reads its text at "
            f"model.clip.text.eos_id={model_config.clip.text.eos_id}; set it, or take the tokenizer of the CLIP"
        )
    if is_clip and text_length > (most := model_config.clip.text.length + of_clip):
        raise UserError(
            f"data.text_length: got {text_length}, the CLIP reads at most {most}; where prompts are longer, set "
            "--config.data.truncate_long_prompts=True"
        )
