# ruff: noqa: RUF001 - characters that look alike
"""keywords.py: what a decoder copies exactly is read exactly, whatever the prompt and the vocabulary."""

import io

import numpy as np
import pytest
import sentencepiece

from richhf_data import build, copying, keywords, metrics, vocabulary
from richhf_data.keywords import label_prompt, read_labels, tokenize

WHITE = ["\n", "\t", "\r\n", "\u00a0", "\u200b", "\u2028", "\x85", "\x0c", "\u3000", "\ufeff", "\ufffd", "\x1c"]
REWRITTEN = ["…", "½", "™", "ﬁ", "e\u0301", "ＡＢ", "＿０", "´", "ﷺ", "？", "⁇", "\u2581", "\xad", "\x1f", "\x00", "\u202e"]
ORDINARY = ["a", "red", "cat", "_0", "gpt_0", "_0_0", "_", "0", "1", " ", " ", " ", " ", ", ", ".", '"', "café"]


def prompts(number, seed=0):
    """Random prompts of words, white space, rewritten and arbitrary characters."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        parts = []
        for _ in range(rng.integers(1, 12)):
            kind = rng.integers(6)
            if kind < 4:
                parts.append(str(rng.choice((WHITE, REWRITTEN, ORDINARY, ORDINARY)[kind])))
            else:
                point = int(rng.integers(0x20000 if kind == 4 else 0x600))
                parts.append("" if 0xD800 <= point < 0xE000 else chr(point))
        yield "".join(parts)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory, unpacked):
    """name -> a vocabulary: ours, that of a packed run, and some with other normalisers and models."""
    folder, texts = tmp_path_factory.mktemp("vocabularies"), ["a red cat", "gpt 1⁄2, a dog... TM fi caf\u00e9", "_ 0 _0 AB"]
    found = {"ours": vocabulary.train(texts * 3, folder / "ours.model", 90)}
    found["packed"] = vocabulary.Vocabulary(next(unpacked("older_workdirs").rglob("vocabulary.model")))
    options = {
        "folding": {"normalization_rule_name": "nmt_nfkc_cf"},
        "identity": {"normalization_rule_name": "identity"},
        "unigram": {"model_type": "unigram", "normalization_rule_name": "nfkc"},
        "bytes": {"byte_fallback": True, "vocab_size": 400},
    }
    for name, changed in options.items():
        model = io.BytesIO()
        common = {"vocab_size": 60, "hard_vocab_limit": False, "model_type": "bpe", "minloglevel": 2}
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        sentences = iter(texts * 3)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **common | ids | changed)
        (folder / f"{name}.model").write_bytes(model.getvalue())
        found[name] = vocabulary.Vocabulary(folder / f"{name}.model")
    return found


@pytest.mark.parametrize("name", ["ours", "packed", "folding", "identity", "unigram", "bytes"])
def test_a_perfect_decoder_has_precision_and_recall_1(name, pieces):
    rng, targets, predictions, vocab = np.random.default_rng(1), [], [], pieces[name]
    for prompt in prompts(400):
        tokens = tokenize(prompt)
        labels = rng.integers(0, 2, len(tokens)).tolist()
        text = vocab.decode(vocab.encode(label_prompt(tokens, labels), 400))
        read = read_labels(text, tokens, vocab.written)
        for token, label, got in zip(tokens, labels, read, strict=True):
            expected = label if keywords.written_words(token, vocab.written) else None
            assert got == expected, (prompt, text, token)
        targets.append(_target(prompt, labels))
        predictions.append(_prediction(text))
    found = metrics.evaluate(targets, predictions, vocab.written)
    assert found["keywords/micro/precision"] == found["keywords/micro/recall"] == found["keywords/micro/f1"] == 1


@pytest.mark.parametrize("name", ["ours", "packed", "folding", "identity", "unigram", "bytes"])
def test_a_decoder_that_may_only_copy_loses_no_word(name, pieces):
    rng, vocab, length = np.random.default_rng(2), pieces[name], 400
    table_of = copying.Copies(vocab, length).table
    for prompt in prompts(200, seed=3):
        table, tokens, found, state = table_of(prompt), tokenize(prompt), [], 0
        while found[-1:] != [1]:
            allowed = [option for option in table[state] if len(found) <= option[2]]
            piece, state, _ = allowed[rng.integers(len(allowed))].tolist()
            found.append(piece)
        text, copied = vocab.decode(found), vocab.written(label_prompt(tokens, [1] * len(tokens)))
        assert [word for word, _ in keywords.read_words(text)] == [word for word, _ in keywords.read_words(copied)]
        lost = [label is None for label in read_labels(text, tokens, vocab.written)]
        assert lost == [not keywords.written_words(token, vocab.written) for token in tokens]

        target, state = vocab.encode(label_prompt(tokens, rng.integers(0, 2, len(tokens)).tolist()), length).tolist(), 0
        if name == "unigram" and "…" in prompt:
            continue  # two ways to write "..." are equally probable: which it takes depends on the words before
        for position, piece in enumerate(target[: target.index(1) + 1]):
            (state,) = (then for one, then, last in table[state] if one == piece and position <= last)


def _target(prompt, labels, **more):
    values = {"scores": np.zeros(4), "heatmaps": np.zeros((1, 1, 2), np.uint8), "prompt": prompt, "labels": labels}
    return values | {"score_mask": np.zeros(4, bool), "heatmap_mask": np.zeros(2, bool)} | more


def _prediction(text):
    return {"scores": np.zeros(4), "heatmaps": np.zeros((1, 1, 2)), "labelled_prompt": text}


@pytest.mark.parametrize(
    ("prompt", "labels", "expected"),
    [
        ("a red cat\n", [1, 1, 0], "a red cat_0"),
        ("a\tred\u00a0cat", [0], "a_0 red_0 cat_0"),
        ("wait… ½ x™", [0, 1, 0], "wait..._0 1⁄2 xTM_0"),
        ("cafe\u0301 ﬁn ＡＢ\u200b", [0, 0, 1], "caf\u00e9_0 fin_0 AB"),
        ("gpt_0 gpt", [1, 1], "gpt_0_0 gpt"),
        ("gpt_0 gpt", [0, 1], "gpt_0_0_0 gpt"),
        ("gpt＿０ gpt_0_0", [1, 0], "gpt_0_0 gpt_0_0_0_0_0"),
        ("a \n _0", [1, 0, 1], "a _0_0"),
        ("a yellow cat, sitting", [1, 0, 1, 1], "a yellow_0 cat sitting"),
    ],
)
def test_what_is_written_and_read(prompt, labels, expected):
    tokens = tokenize(prompt)
    assert label_prompt(tokens, labels) == expected
    there = [bool(keywords.words(token)) for token in tokens]
    assert read_labels(expected, tokens) == [label if one else None for label, one in zip(labels, there, strict=True)]


def test_tokens_are_those_of_the_release():
    assert tokenize('a\nb, "c": d;e\u00a0f?!.') == ["a\nb", "c", "d", "e\u00a0f"]
    assert keywords.misaligned_words(tokenize("a\nb, c\n"), [0, 0]) == ["a b", "c"]


def test_a_text_that_the_vocabulary_did_not_write_is_read_as_well():
    tokens = tokenize("wait… ½ cat")
    assert read_labels("wait… ½_0 cat", tokens) == read_labels("wait... 1⁄2_0 cat", tokens) == [1, 0, 1]


def test_constant_predictor_copies_and_marks_nothing():
    targets = [_target("gpt_0 gpt\n½", [1, 0])]
    (made,) = metrics.constant_predictions(np.zeros(4), np.zeros((4, 4, 2)), targets)
    assert made["labelled_prompt"] == "gpt_0_0 gpt 1⁄2"
    assert metrics.evaluate(targets, [made])["keywords/micro/precision"] == 0


def test_captions_are_compared_as_they_are_written(pieces):
    vocab, caption = pieces["ours"], "a “red” cat… ½ café"
    text = vocab.decode(vocab.encode(caption, 90))
    found = metrics.evaluate([_target("", None, caption=caption)], [_prediction(text)], vocab.written)
    assert found["caption/word_f1"] == 1


def test_knows_is_false_where_something_is_lost(pieces):
    vocab = pieces["ours"]
    for text in ("a red cat", "a\tred\ncat\u00a0", "caf\u00e9", "cafe\u0301", "wait…"[4:], "", "_0", "½"):
        assert vocab.knows(text), text
    for text in ("z", "a zebra", "\u4f60", "a\x85", "re\x1fd", "\x07", "a \U0001f600"):
        assert not vocab.knows(text), text
    assert not pieces["folding"].knows("AB") and pieces["folding"].knows("ab")


def test_unknown_characters_are_shown(pieces):
    vocab = pieces["ours"]
    assert vocab.written("a 你好_0 cat z!") == "a ⁇_0 cat ⁇"


def test_vocabulary_texts_tell_labelled_prompts_from_captions():
    rows = [["u", "gpt_0 ½ a\nb", label_prompt(tokenize("gpt_0 ½ a\nb"), [0, 1, 0])], ["v", "image caption", "a dog"]]
    assert list(build._vocabulary_texts(rows)) == ["gpt_0 ½ a\nb", "a dog", "image caption"]
