"""A decoder that may only copy: exact, as the free one where that is right, on any number of devices."""

import itertools

import jax
import numpy as np
import optax
import pytest
import sentencepiece
import tiny_data
import tiny_model
from flax import linen as nn
from test_t5 import load

from rahf import evaluate, experiments, partitioning, predictor
from rahf.models import t5
from richhf_data import copying, keywords, synthetic, tasks, vocabulary

pytestmark = pytest.mark.usefixtures("standard_promotion")

PROMPTS = [
    "a red cat",
    'two "red" dogs, on a gpt_0 (and _0_0)!',
    "caf\u00e9 \u00bd \ufb01n 你好 x你y wait\u2026",
    "",
    "\n",
    "cat",
    "a a a a a a a",
    "dogdogdogdog " * 8,
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    texts = ["a red cat", "two dogs, on a table", "gpt_0 caf\u00e9 (and) wait... 1\u20442 fin"]
    return vocabulary.train(texts * 3, tmp_path_factory.mktemp("pieces") / "vocabulary.model", 64)


def fitting(prompt, vocab, length):
    """Every labelling of a prompt's words that fits, as ids; without its last words, if none does."""
    tokens = keywords.tokenize(prompt)
    while True:
        labelled = (keywords.label_prompt(tokens, labels) for labels in itertools.product((0, 1), repeat=len(tokens)))
        if found := {tuple(vocab.pieces(text)) + (1,) for text in labelled if vocab.num_ids(text) <= length}:
            return found
        tokens = tokens[:-1]


def accepted(table, state=0, before=()):
    for piece, then, last in table[state].tolist():
        if len(before) <= last:
            yield from [(*before, piece)] if piece == 1 else accepted(table, then, (*before, piece))


@pytest.mark.parametrize("length", [1, 2, 5, 9, 12, 14, 17, 40])
def test_an_automaton_accepts_all_labellings_that_fit_and_nothing_else(length, pieces):
    table_of = copying.Copies(pieces, length).table
    for prompt in ("a red cat", "dog, gpt_0 on x", "", "cat", "\u00bd a 你 a"):
        found = sorted(accepted(table_of(prompt)))
        assert len(found) == len(set(found)) and set(found) == fitting(prompt, pieces, length), prompt


def test_a_vocabulary_that_cannot_write_the_suffix_is_refused(unpacked, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat"] * 3), model_prefix=str(tmp_path / "few"), vocab_size=20, hard_vocab_limit=False,
        model_type="bpe", minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^data.decoding: .*few.model does not write '_0' .*config.data.decoding=free"):
        copying.Copies(vocabulary.Vocabulary(tmp_path / "few.model"), 8)


def test_greedy_decoding_takes_the_best_id_of_those_that_lead_to_a_copy(unpacked, pieces):
    """The referee writes the whole prefix again for each position and masks by all labellings."""
    config, params, golden = load(unpacked, "t5x_v1_1_tiny")
    module, rows = t5.T5(config), [0, 1] * 3
    encoded, mask = golden["encoded"][rows], (golden["encoder_input_tokens"] != 0)[rows]
    prompts, length = ["a red cat", "dog on gpt_0", "a 你 cat a", "", "two dogs on a table", "cat"], 18
    sets = [fitting(prompt, pieces, length) for prompt in prompts]
    decode = jax.jit(lambda prefix: module.apply({"params": params}, encoded, mask, prefix, method="decode"))
    expected = np.zeros((len(rows), length), np.int32)
    for position in range(length):
        logits = np.asarray(decode(t5.shift_right(expected)))[:, position]
        for row, those in enumerate(sets):
            prefix = tuple(expected[row, :position].tolist())
            if 1 not in prefix:
                allowed = {one[position] for one in those if one[:position] == prefix}
                expected[row, position] = max(sorted(allowed), key=lambda piece: logits[row, piece])
    copy = np.stack([copying.Copies(pieces, length).table(prompt) for prompt in prompts])
    greedy = jax.jit(lambda copy: module.apply({"params": params}, encoded, mask, length, copy, method="greedy_decode"))
    np.testing.assert_array_equal(greedy(copy), expected)
    assert (expected == pieces.pieces("_0")[-1]).any()


def test_where_a_trained_decoder_copies_rightly_the_constraint_changes_nothing(pieces):
    rng, words, length = np.random.default_rng(0), ["a", "red", "cat", "two", "dogs", "on", "table"], 24
    prompts = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(32)]
    labelled = [keywords.label_prompt(tokens, rng.integers(0, 2, len(tokens))) for tokens in map(str.split, prompts)]
    inputs, targets = (np.stack([pieces.encode(text, length) for text in texts]) for texts in (prompts, labelled))
    sizes = {"emb_dim": 64, "num_heads": 4, "head_dim": 16, "mlp_dim": 64}
    module = t5.T5(t5.T5Config(vocab_size=96, num_encoder_layers=1, num_decoder_layers=1, **sizes))
    params = tiny_model.random_params(module, inputs, targets)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, state):
        def loss(params):
            logits = module.apply({"params": params}, inputs, t5.shift_right(targets))
            values = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return (values * (targets != 0)).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(120):
        params, state = update(params, state)

    @jax.jit
    def written(copy):
        def decode(module):
            mask = inputs != 0
            return module.greedy_decode(module.encode(module.embed(inputs), mask), mask, length, copy)

        return nn.apply(decode, module)({"params": params})

    table_of = copying.Copies(pieces, length).table
    tables = np.stack([table_of(prompt) for prompt in prompts])
    free, copied = np.asarray(written(None)), np.asarray(written(tables))
    ids = [tuple(np.trim_zeros(row, "b").tolist()) for row in free]
    right = [row for row, prompt in enumerate(prompts) if ids[row] in fitting(prompt, pieces, 64)]
    print(len(right))
    assert len(right) >= 8
    np.testing.assert_array_equal(free[right], copied[right])
    for one, prompt in zip(copied.tolist(), prompts, strict=True):
        assert [word for word, _ in keywords.read_words(pieces.decode(one))] == prompt.split()


def predictor_of(vocab, decoding="copy", variant="multi_head", **mesh):
    config = experiments.load("rahf_ci")
    with config.unlocked():
        config.model = tiny_model.dividing(variant)
    config.model.t5.vocab_size, config.model.heatmap_head.deconv_filters = 96, (8, 8)
    config.data.update(text_length=96, keyword_length=112, decoding=decoding, truncate_long_prompts=True)
    return predictor.Predictor(config, vocab, partitioning.make_mesh(**mesh))


def model_of(made):
    _, params = tiny_model.model_and_params(made.model_config)
    return predictor.Model(made, jax.device_put(params["params"], jax.tree.map(lambda leaf: leaf.sharding, made.params)))


@pytest.mark.parametrize(("variant", "mesh"), [("multi_head", {}), ("augmented_prompt", {"data": 4, "model": 2})])
@pytest.mark.filterwarnings("ignore:prompts of more than 96 ids")
def test_random_weights_copy_every_prompt_on_one_device_and_on_eight(variant, mesh, pieces):
    images = list(np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 16, 16, 3), np.uint8))
    one, eight = (
        model_of(predictor_of(pieces, variant=variant, **of)).predict(images, PROMPTS).labelled_prompts
        for of in ({"devices": jax.devices()[:1]}, mesh)
    )
    assert one == eight
    marks = set()
    for prompt, text in zip(PROMPTS, one, strict=True):
        tokens = keywords.tokenize(prompt)
        labels = keywords.read_labels(text, tokens, pieces.written)
        assert text == pieces.written(keywords.label_prompt(tokens, [label != 0 for label in labels])), prompt
        assert [label is None for label in labels] == [not keywords.words(token) for token in tokens]
        marks.update(labels)
    assert marks == {0, 1, None}


def test_the_identity_tells_the_constraint(pieces):
    (*free, lengths, digest), copied = (model_of(predictor_of(pieces, name)).identity_parts() for name in ("free", "copy"))
    assert copied == [*free, lengths | {"decoding": "copy"}, digest]


def test_the_constrained_program_is_lowered_without_a_vocabulary():
    for decoding in ("copy", "free"):
        text = predictor_of(None, decoding).lower(8).as_text()
        assert (f"tensor<8x{4 * 112}x3x3xi32>" in text) == (decoding == "copy")


@pytest.mark.parametrize("source", ["stream", "seqio"])
def test_an_evaluation_copies_every_prompt_of_a_split(source, pieces, monkeypatch):
    made = predictor_of(pieces)
    made.config.data.source = source
    if source == "seqio":
        made.config.data.data_dir = tiny_data.built()
        prompts = [prompt for _, prompt, _ in tasks.prompts(made.config.data.data_dir)["dev"]]
    else:
        prompts = [example.prompt for example in synthetic.examples("dev", 8, 0, 16, 16)]
    seen, predict_rows = [], made.predict_rows

    def recorded(*args):
        for row in predict_rows(*args):
            seen.append([word for word, _ in keywords.read_words(row["labelled_prompt"])])
            yield row

    monkeypatch.setattr(made, "predict_rows", recorded)
    assert evaluate.Evaluation(made, "dev", len(prompts)).run(model_of(made).params)["num_examples"] == len(prompts)
    assert sorted(seen) == sorted(keywords.words(pieces.written(" ".join(keywords.tokenize(one)))) for one in prompts)
