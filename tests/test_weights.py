"""Tensors in other people's files: what is read, and what is refused."""

import json
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rahf import names, pretrained, weights
from rahf.weights import Tensor


def test_an_index_may_not_leave_its_folder_nor_miss_a_part(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for outside in ("../a.safetensors", "/a.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ValueError, match="expected a file name without a folder"):
            weights.open_hugging_face(tmp_path)
    for no_file in ("..", index.name):
        index.write_text(json.dumps({"weight_map": {"a": no_file}}))
        with pytest.raises(ValueError, match="weights: "):
            weights.open_hugging_face(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"no file .*a.safetensors"):
        weights.open_hugging_face(tmp_path)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ValueError, match="has no weight_map, expected an index"):
        weights.open_hugging_face(tmp_path)


def test_an_index_may_name_tensors_that_no_part_has(tmp_path):
    safetensors.numpy.save_file({"b": np.zeros(2)}, tmp_path / "1.safetensors")
    parts = {"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}  # flan-t5-xl's names copies of the embedding
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(parts))
    assert set(weights.open_hugging_face(tmp_path)) == {"b"}


def test_the_usual_name_is_taken_among_several_files(tmp_path):
    for name in ("adapter", "model"):
        safetensors.numpy.save_file({name: np.zeros(2)}, tmp_path / f"{name}.safetensors")
    assert set(weights.open_hugging_face(tmp_path)) == {"model"}
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has the files \['adapter.safetensors', 'other.safetensors'\], expected one"):
        weights.open_hugging_face(tmp_path)


def test_torch_parts_of_an_index_are_read(torch, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-2.bin")
    parts = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(parts))
    found = weights.open_hugging_face(tmp_path)
    assert {name: tensor.read().tolist() for name, tensor in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}
    with pytest.raises(ValueError, match=r"has the files \[\], expected one"):
        weights.open_hugging_face(tmp_path / "..")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not the file"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not weights"),
    ],
)
def test_what_a_failed_download_leaves_is_named(start, message, tmp_path):
    for name in ("a.npz", "a.safetensors", "a.bin"):
        (tmp_path / name).write_bytes(start)
        opener = weights.open_npz if name == "a.npz" else weights.open_hugging_face
        with pytest.raises(ValueError, match=message):
            opener(tmp_path / name)


def test_bfloat16_in_an_npz_is_read(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    np.savez(tmp_path / "b.npz", a=values)
    np.testing.assert_array_equal(np.asarray(weights.open_npz(tmp_path / "b.npz")["a"].read(), np.float32), [1.5, -2.0])


def test_npz_pickles_and_damage_are_refused(unpacked, tmp_path):
    np.savez(tmp_path / "p.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match=r"has the pickled object a.npy, expected plain arrays"):
        weights.open_npz(tmp_path / "p.npz")
    whole = (unpacked("vit_augreg_tiny") / "vit_tiny_p8.npz").read_bytes()
    (tmp_path / "t.npz").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"t.npz cannot be read, it is damaged"):
        weights.open_npz(tmp_path / "t.npz")
    np.savez_compressed(tmp_path / "f.npz", a=np.arange(1000.0))
    flipped = bytearray((tmp_path / "f.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "f.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"f.npz cannot be read, it is damaged"):
        weights.open_npz(tmp_path / "f.npz")["a"].read()
    with zipfile.ZipFile(tmp_path / "n.npz", "w") as archive:
        archive.writestr("note.txt", "no array")
    with pytest.raises(ValueError, match=r"n.npz cannot be read, it is damaged or of another format"):
        weights.open_npz(tmp_path / "n.npz")


def test_torch_files_that_are_more_than_tensors_are_refused(torch, tmp_path):
    torch.save({"a": torch.ones(2), "f": print}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="a pickle with more than plain tensors; it could run code"):
        weights.open_torch(tmp_path / "evil.pt")
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match=r"entries that are no tensors: \['step'\]"):
        weights.open_torch(tmp_path / "step.pt")
    (tmp_path / "t.pt").write_bytes((tmp_path / "step.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"t.pt cannot be read, it is damaged"):
        weights.open_torch(tmp_path / "t.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds a list, expected a state_dict"):
        weights.open_torch(tmp_path / "list.pt")
    legacy = {"a": torch.nn.Parameter(torch.ones(2))}
    torch.save(legacy, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(weights.open_torch(tmp_path / "legacy.bin")["a"].read(), np.ones(2, np.float32))
    torch.save({"state_dict": {"a": torch.full((2,), 1.5, dtype=torch.bfloat16)}}, tmp_path / "nested.pt")
    np.testing.assert_array_equal(weights.open_torch(tmp_path / "nested.pt")["a"].read(), np.full(2, 1.5, np.float32))


class Counted(np.ndarray):
    """An array that knows how many of its kind are in memory; views count as well."""

    alive = most = 0

    def __array_finalize__(self, source):
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_one_tensor_at_a_time_is_in_memory_and_scanned_ones_are_read_once(tmp_path):
    reads = []

    def stack(name):
        def read():
            reads.append(name)
            return np.zeros((4, 100, 50), np.float32).view(Counted)

        return Tensor((4, 100, 50), read)

    theirs = weights.unstacked({f"block/{i}": stack(i) for i in range(5)}, "block", 0)
    # Layer by layer, as our names come; `matched` puts what lies together together.
    ours = {f"block_{layer}/{i}": jax.ShapeDtypeStruct((100, 50), np.float32) for layer in range(4) for i in range(5)}
    tensors = pretrained.matched(theirs, names.same_names(ours), ours, "", "test")
    weights.write_safetensors(tmp_path / "w.safetensors", tensors)
    assert reads == [0, 1, 2, 3, 4]
    assert Counted.most <= 3  # a stack, its layer, and a view of one
    assert len(weights.open_safetensors(tmp_path / "w.safetensors")) == 20


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail():
        raise OSError("the disk is gone")

    good = Tensor((2,), lambda: np.zeros(2, np.float32))
    with pytest.raises(OSError, match="gone"):
        weights.write_safetensors(tmp_path / "w.safetensors", {"a": good, "b": Tensor((2,), fail)})
    assert not list(tmp_path.iterdir())
