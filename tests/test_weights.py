"""Tensors in other people's files: what is read, and what is refused."""

import http.server
import json
import re
import socket
import threading
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
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has the files \[\], expected one"):
        weights.open_hugging_face(tmp_path / "empty")


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
    with pytest.raises(ValueError, match=r"f.npz, a.npy cannot be read, it is damaged"):
        weights.open_npz(tmp_path / "f.npz")["a"].read()
    with zipfile.ZipFile(tmp_path / "n.npz", "w") as archive:
        archive.writestr("note.txt", "no array")
    with pytest.raises(ValueError, match=r"n.npz, note.txt cannot be read, it is damaged or of another format"):
        weights.open_npz(tmp_path / "n.npz")


def test_torch_files_that_are_more_than_tensors_are_refused(torch, tmp_path):
    torch.save({"a": torch.ones(2), "f": print}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"a pickle with more than plain tensors \(\w*\.?print\); it could run code"):
        weights.open_torch(tmp_path / "evil.pt")
    torch.save({"a": torch.ones(2), "step": 3}, tmp_path / "step.pt")
    with pytest.raises(ValueError, match=r"entries that are no tensors with a name: \['step'\]"):
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


def test_a_variant_in_parts_is_read_and_other_kinds_are_named(tmp_path):
    for name in ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"):
        safetensors.numpy.save_file({name: np.ones(2, np.float16)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"has the files \['model.fp16-00001-of.*, expected one .*; no other is supported"):
        weights.open_hugging_face(tmp_path)
    parts = {"weight_map": {name: name for name in ("model.fp16-00001-of-00002.safetensors",)}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(parts))
    assert set(weights.open_hugging_face(tmp_path)) == {"model.fp16-00001-of-00002.safetensors"}
    for i in range(10):
        (tmp_path / "other" / f"{i}").mkdir(parents=True)
        (tmp_path / "other" / f"flax_model_{i}.msgpack").touch()
    with pytest.raises(ValueError, match=r"other has the files \['flax_model_0.msgpack', .*\] and 2 more, expected one"):
        weights.open_hugging_face(tmp_path / "other")


# ---- What is no weights ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_with_tensor_and_count(value, dtype, tmp_path):
    bad = np.ones((2, 3)).astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    bad[1, :2] = value
    np.savez(tmp_path / "w.npz", fine=np.ones(3), bad=bad)
    safetensors.numpy.save_file({"fine": np.ones(3), "bad": bad}, tmp_path / "w.safetensors")
    for name, opener in (("w.npz", weights.open_npz), ("w.safetensors", weights.open_safetensors)):
        tensors = opener(tmp_path / name)
        np.testing.assert_array_equal(tensors["fine"].read(), np.ones(3, np.float32))
        with pytest.raises(ValueError, match=rf"{name}: the tensor bad holds 2 numbers of 6 that are not finite"):
            tensors["bad"].read()


def test_a_number_too_large_for_float32_and_an_empty_tensor_are_refused(tmp_path):
    np.savez(tmp_path / "large.npz", a=np.array([1e300, 3e38]))
    with pytest.raises(ValueError, match="the tensor a holds 1 numbers of 2 that are not finite in float32"):
        weights.open_npz(tmp_path / "large.npz")["a"].read()
    np.savez(tmp_path / "empty.npz", a=np.zeros((3, 0)))
    with pytest.raises(ValueError, match=r"the tensor a is empty, its shape is \(3, 0\)"):
        weights.open_npz(tmp_path / "empty.npz")


OTHERS = {"I64": "int64", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}
OTHERS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@pytest.mark.parametrize(("kind", "dtype"), OTHERS.items())
def test_types_that_no_weights_have_are_refused_where_they_are_used(kind, dtype, tmp_path):
    array = np.ones(4, dtype)
    header = json.dumps({"a": {"dtype": kind, "shape": [4], "data_offsets": [0, array.nbytes]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + array.tobytes())
    opened = [weights.open_safetensors(tmp_path / "w.safetensors")]
    if "float8" not in dtype:
        np.savez(tmp_path / "w.npz", a=array)
        opened.append(weights.open_npz(tmp_path / "w.npz"))
    ours = {"x": jax.ShapeDtypeStruct((4,), np.float32)}
    for tensors in opened:
        with pytest.raises(ValueError, match=rf"file: tensors do not .*\n  x \(4,\): the tensor a holds ({kind}|{dtype}), "):
            pretrained.matched(tensors, {"x": ("a", names.same)}, ours, "", "file")
        with pytest.raises(ValueError, match=rf"w\.\w+: the tensor a holds ({kind}|{dtype}), expected weights of float16"):
            tensors["a"].read()
        unused = tensors | {"b": Tensor((4,), None)}  # position_ids, say
        assert set(pretrained.matched(unused, {"x": ("b", names.same)}, ours, "a", "file")) == {"x"}


NOT_PLAIN = ("sparse_coo", "sparse_csr", "quantized", "meta", "nested", "float8", "expanded", "integer key")


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_tensors_that_are_not_plain_are_named(kind, torch, tmp_path):
    made = {
        "sparse_coo": lambda: torch.eye(3).to_sparse(),
        "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": lambda: torch.ones(3, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
        "expanded": lambda: torch.ones(1).expand(10**12),
        "integer key": lambda: torch.ones(1),
    }[kind]()
    torch.save({3 if kind == "integer key" else "a": made}, tmp_path / "w.pt")
    message = {
        "float8": "w.pt: the tensor a holds float8_e4m3fn, expected weights",
        "expanded": r"the tensor a has shape \(1000000000000,\), more than the file holds",
        "integer key": r"entries that are no tensors with a name: \[3\]",
    }.get(kind, f"w.pt: the tensor a is {kind}, expected a plain one")
    with pytest.raises(ValueError, match=message):
        weights.open_torch(tmp_path / "w.pt")["a"].read()


@pytest.mark.parametrize("start", [b"a plain text", b"", b'{"a": 1}', bytes(100)])
def test_what_is_no_torch_file_is_not_called_a_pickle(start, tmp_path):
    (tmp_path / "w.pt").write_bytes(start)
    message = rf"w.pt cannot be read, .* \(it begins with {re.escape(repr(start[:16]))}, no torch file does\)"
    with pytest.raises(ValueError, match=message):
        weights.open_torch(tmp_path / "w.pt")


# ---- Damage, and sizes that a file does not have --------------------------------------------------------------------
def test_a_flipped_byte_of_an_npz_is_an_error_or_changes_nothing(tmp_path):
    arrays, file = {"a": np.arange(12.0, dtype=np.float32).reshape(3, 4), "b": np.float32(2)}, tmp_path / "w.npz"
    for save in (np.savez, np.savez_compressed):
        save(file, **arrays)
        whole, refused = file.read_bytes(), 0
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
            try:
                found = {name: tensor.read() for name, tensor in weights.open_npz(file).items()}
            except ValueError as error:
                assert "w.npz" in str(error)
                refused += 1
            else:
                for name, array in found.items():  # a lost entry is a missing tensor
                    np.testing.assert_array_equal(array, arrays[name])
        assert refused > len(whole) / 2


def test_a_flipped_byte_of_a_torch_file_is_seen_before_it_is_read(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.arange(100.0))  # a zip file, as torch writes
    whole = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    with pytest.raises(ValueError, match=r"w.pt cannot be read, it is damaged .* \(the checksum of a.npy is another\)"):
        weights.open_torch(tmp_path / "w.pt")


def test_a_flipped_byte_of_a_torch_file_is_an_error_or_changes_nothing(torch, tmp_path):
    file, expected = tmp_path / "w.pt", np.arange(50, dtype=np.float32)
    torch.save({"a": torch.from_numpy(expected)}, file)
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            found = weights.open_torch(file)["a"].read()
        except ValueError as error:
            assert "w.pt cannot be read, it is damaged" in str(error)
        else:
            np.testing.assert_array_equal(found, expected)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.from_numpy(expected)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(weights.open_torch(file)["a"].read(), expected)  # without checksums, as its writer chose


@pytest.mark.parametrize("shape", [(10**9, 10**9), (10**30,), (-1,), (2,), (5,), (4.5,), None, ((1,),), "(" * 300])
def test_an_npz_header_that_lies_about_its_size_is_refused(shape, tmp_path):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(16)
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", member)
    with pytest.raises(ValueError, match=r"w.npz, a.npy cannot be read, it is damaged"):
        weights.open_npz(tmp_path / "w.npz")


# ---- Addresses ------------------------------------------------------------------------------------------------------
def test_an_address_that_does_not_answer_or_refuses_ends_with_the_reason():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/t5"
        with pytest.raises(ValueError, match=rf"weights: {address} did not answer within 1 seconds; check the network"):
            weights.open_t5x(address, timeout=1)

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/t5"
        with pytest.raises(ValueError, match=rf"weights: {address} cannot be read \(.*403.*\); check the address"):
            weights.open_t5x(address)
        server.shutdown()
    for address in ("gopher://t5", "gs:///t5"):
        with pytest.raises(ValueError, match=f"weights: {address} cannot be read"):
            weights.open_t5x(address)


def test_a_header_that_begins_with_a_space_and_a_bracket_is_no_web_page(tmp_path):
    entry = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header = entry.ljust(int.from_bytes(b" <", "little"))
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + np.float32(2).tobytes())
    assert (tmp_path / "w.safetensors").read_bytes().startswith(b" <\0")
    assert weights.open_safetensors(tmp_path / "w.safetensors")["a"].read() == 2


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


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
def test_weights_are_rounded_to_the_dtype_of_the_file(dtype, bits, tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    tensors = {
        "a": Tensor((50, 7), lambda: values),
        "b": Tensor((), lambda: np.float32(3)),
    }
    weights.write_safetensors(tmp_path / "w.safetensors", tensors, dtype=dtype)
    read = dict(weights.read_all(weights.open_safetensors(tmp_path / "w.safetensors")))
    assert {name: (array.shape, array.dtype.name) for name, array in read.items()} == {
        "a": ((50, 7), "float32"),
        "b": ((), "float32"),
    }
    error = np.abs(read["a"] / values - 1).max()
    assert (error == 0) == (dtype == "float32") and error <= 2.0**-bits
    assert read["b"] == 3


def test_a_number_that_is_too_large_for_float16_is_named(tmp_path):
    large = {"a/kernel": Tensor((2,), lambda: np.array([1.0, 1e6], np.float32))}
    with pytest.raises(ValueError, match="weights: a/kernel has numbers too large for float16; choose bfloat16"):
        weights.write_safetensors(tmp_path / "w.safetensors", large, dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail():
        raise OSError("the disk is gone")

    good = Tensor((2,), lambda: np.zeros(2, np.float32))
    with pytest.raises(OSError, match="gone"):
        weights.write_safetensors(tmp_path / "w.safetensors", {"a": good, "b": Tensor((2,), fail)})
    assert not list(tmp_path.iterdir())
