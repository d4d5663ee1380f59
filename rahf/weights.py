"""Reads named tensors from files of several formats and writes safetensors files, one tensor at a time.

Reading runs no code from a file: npz without pickles, safetensors, torch files with `weights_only`, T5X's tensorstore
layout. `open_*` read names, shapes and types only and `Tensor.read` loads one tensor, so a conversion needs as much memory
as the largest tensor. What a file says of its sizes is compared with what it holds before anything is allocated.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping

import flax.traverse_util
import ml_dtypes  # also registers bfloat16 with numpy, which safetensors needs
import numpy as np
import safetensors

from rahf import checkpoints
from richhf_data import input_files, json_files, paths
from richhf_data.errors import UserError

FLOATS = ("float16", "bfloat16", "float32", "float64")
NPY_HEADERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
DEFLATE = 1032  # the most bytes that zip's compression makes of one
INDEX = re.compile(r"\.index(\.fp16)?\.json$")
EXPECTED = "one *.safetensors or *.bin, or an index of several (*.index.json, *.index.fp16.json)"
TIMEOUT = 60  # seconds
SMALL = 2**20  # numbers of a chunk, which may be larger than its array; chunks of an array on the web
SPEED = 2**20  # bytes a second; an address that sends less counts as one that does not answer


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
      read: loads it as a float32 np.ndarray. For other people's files it raises UserError, with the tensor's name, where
        they hold no weights: numbers that are not finite, or of another type than `FLOATS`.
      dtype: its type in the file.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "float32"


Tensors = dict[str, Tensor]


def unreadable(path, error) -> UserError:
    """The error for a file that the reader of its format cannot read."""
    return UserError(f"weights: {path} cannot be read, it is damaged or of another format ({error}); fetch it again")


def _tensor(path, name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], np.ndarray]) -> Tensor:
    """A tensor of the file `path`; `read` loads it in the file's type."""
    what = f"weights: {path}: the tensor {name}"
    if 0 in shape:
        raise UserError(f"{what} is empty, its shape is {tuple(shape)}; expected weights, save or fetch it again")
    return Tensor(tuple(shape), functools.partial(_read_weights, what, dtype, read), dtype)


def _read_weights(what, dtype, read) -> np.ndarray:
    if dtype not in FLOATS:
        raise UserError(f"{what} holds {dtype}, expected weights of {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):
        array = np.asarray(read(), np.float32)
    if count := count_not_finite(array):
        raise UserError(
            f"{what} holds {count} numbers of {array.size} that are not finite in float32 (NaN or infinity), expected only "
            "finite ones; take another file"
        )
    return array


def count_not_finite(array) -> int:
    """How many numbers of a float array are NaN or infinite."""
    array = np.asarray(array)
    if np.isfinite([array.min(), array.max()]).all():  # fast, in no memory; NaN is both the least and the greatest
        return 0
    return array.size - np.count_nonzero(np.isfinite(array))


def open_npz(path) -> Tensors:
    """The arrays of an .npz file.

    Raises:
      UserError: no file, a damaged one, or one with pickled objects; also when a damaged array is read.
    """
    path, tensors = _existing(path), {}
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.compress_size for member in members) > path.stat().st_size:
            raise unreadable(path, "its members are larger than the file")
        for member in members:
            where = f"{path}, {member.filename}"
            with _damage_named(where), archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                shape, _, dtype = NPY_HEADERS[version[0]](file)
                start = file.tell()
            if dtype.hasobject:
                raise UserError(f"weights: {path} has the pickled object {member.filename}, expected plain arrays")
            # zipfile compares the checksum when the last byte is read.
            size = start + math.prod(shape) * dtype.itemsize
            if member.file_size != size or size > start + DEFLATE * member.compress_size:
                raise unreadable(where, f"its header says {dtype}{list(shape)}, its size another")
            kind = "bfloat16" if dtype == "V2" else dtype.name  # npz cannot name bfloat16
            name, read = member.filename.removesuffix(".npy"), functools.partial(_read_npz, path, member.filename)
            tensors[name] = _tensor(path, name, shape, kind, read)
    return tensors


def _read_npz(path, member) -> np.ndarray:
    with _damage_named(f"{path}, {member}"), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array


@contextlib.contextmanager
def _damage_named(path):
    """Turns whatever a reader of other people's files raises into a UserError with the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damage reaches every part of a reader
        raise unreadable(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    """The first sentence of an error, without what TensorStore and torch append to it."""
    text = str(error).removeprefix("Weights only load failed.").partition("WeightsUnpickler error:")
    text = re.split(r"\. | \[source|\n", (text[2] or text[0]).strip(), maxsplit=1)[0][:300]
    return text if " " in text else f"{type(error).__name__} {text}".strip()


def open_hugging_face(path) -> Tensors:
    """The tensors of a Hugging Face folder or of one of its files: safetensors or torch, one file or an index and its parts.

    Raises:
      UserError: a file or a part of the index that is missing or truncated.
    """
    path = pathlib.Path(path)
    path = _weights_file(path) if path.is_dir() else path
    if not INDEX.search(path.name):
        return _open_file(path)
    parts = json_files.read(_existing(path)).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"weights: {path} has no weight_map, expected an index of files as Hugging Face writes it")
    tensors = {}
    # Some indexes name tensors that no part has: `pretrained.matched` finds those that are needed.
    for part in dict.fromkeys(parts.values()):
        if pathlib.PurePath(part).name != part:
            raise UserError(f"weights: {path} names the part {part!r}, expected a file name without a folder")
        tensors |= _open_file(path.parent / part)
    return tensors


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The weights file of a Hugging Face folder: one with a usual name, or the only one with its ending."""
    for kind in (".safetensors", ".bin"):
        for ending in (f"{kind}.index.json", f"{kind}.index.fp16.json", kind):
            for usual in ("model", "pytorch_model"):
                if (folder / f"{usual}{ending}").is_file():
                    return folder / f"{usual}{ending}"
            found = sorted(folder.glob(f"*{ending}"))
            if len(found) == 1:
                return found[0]
            if found:
                raise no_weights(folder, EXPECTED)
    raise no_weights(folder, EXPECTED)


def no_weights(folder: pathlib.Path, expected: str) -> UserError:
    """The error for a folder whose files are not the weights that are expected."""
    names = sorted(file.name for file in folder.glob("*") if file.is_file() and file.name != "config.json")
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return UserError(f"weights: {folder} has the files {names[:8]}{more}, expected {expected}; no other is supported")


def _open_file(path) -> Tensors:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def open_safetensors(path) -> Tensors:
    """The tensors of a .safetensors file.

    Raises:
      UserError: no such file, or a truncated one.
    """
    path, tensors = _existing(path), {}
    with _damage_named(path):
        file = safetensors.safe_open(path, framework="np")
        for name in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
            part = file.get_slice(name)
            dtype = part.get_dtype()
            dtype = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}.get(dtype, dtype)
            tensors[name] = _tensor(path, name, part.get_shape(), dtype, functools.partial(file.get_tensor, name))
    return tensors


def open_torch(path) -> Tensors:
    """The tensors of a torch file, memory-mapped: a `state_dict`, or a dictionary with one as `state_dict` or `model`.

    Raises:
      UserError: no such file, torch is not installed, a damaged file, or one that holds more than plain tensors.
    """
    path = _existing(path)
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith((b"PK", b"\x80")):
        raise unreadable(path, f"it begins with {start!r}, no torch file does")
    with _damage_named(path):
        if zipped := zipfile.is_zipfile(path):
            _check_sums(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(f"weights: {path} needs torch to be read; pip install 'rahf[parity]'") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damage reaches every part of a reader
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"weights: {path} is a pickle with more than plain tensors ({code[1]}); it could run code when loaded and "
                "is refused. Save its state_dict alone, or as safetensors"
            ) from error
        raise unreadable(path, _reason(error)) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise UserError(f"weights: {path} holds a {type(state).__name__}, expected a state_dict of tensors")
    other = [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(f"weights: {path} has entries that are no tensors with a name: {other[:5]}; expected a state_dict")
    return {name: _torch_tensor(path, name, tensor.detach()) for name, tensor in state.items()}


def _check_sums(path) -> None:
    """Compares the checksums of a torch file in zip format, which torch does not."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise unreadable(path, "its members are larger than the file")
        # torch writes zeros where it was told to compute none.
        if any(member.CRC for member in members) and (wrong := archive.testzip()):
            raise unreadable(path, f"the checksum of {wrong} is another")


def _torch_tensor(path, name, tensor) -> Tensor:
    kind = str(tensor.layout).removeprefix("torch.")
    for is_one, other in ((tensor.is_nested, "nested"), (tensor.is_quantized, "quantized"), (tensor.is_meta, "meta")):
        kind = other if is_one else kind
    if kind != "strided":
        raise UserError(f"weights: {path}: the tensor {name} is {kind}, expected a plain one; save it as such")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"weights: {path}: the tensor {name} has shape {tuple(tensor.shape)}, more than the file holds")
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _tensor(path, name, tuple(tensor.shape), dtype, lambda: tensor.resolve_neg().float().numpy())


def open_t5x(path, timeout: float = TIMEOUT) -> Tensors:
    """The parameters of a T5X checkpoint, local or gs://, with names joined by "/". The optimiser's state is not read.

    Args:
      timeout: seconds that an address may take to answer.

    Raises:
      UserError: the folder holds no T5X checkpoint, or lacks a part of an array that its index names; no answer.
    """
    import flax.serialization
    import tensorstore

    folder = str(path).rstrip("/")
    for file in [] if "://" in folder else sorted(pathlib.Path(folder).rglob("*")):
        if not file.is_dir() and (why := input_files.not_a_file(file)):  # TensorStore waits for a named pipe
            raise unreadable(file, why)
        if file.name == ".zarray" and file.stat().st_size > SMALL:
            raise unreadable(file, "too large for a header")
    url = folder if "://" in folder else pathlib.Path(folder).absolute().as_uri()
    retries = {"max_retries": 6, "initial_delay": "1s", "max_delay": "8s"}  # TensorStore's own take hours
    context = tensorstore.Context({f"{protocol}_request_retries": retries for protocol in ("gcs", "http", "s3")})
    answer = functools.partial(_answer, timeout=timeout, remote="://" in folder)
    with _damage_named(folder):
        store = answer(tensorstore.KvStore.open(url + "/", context=context), folder)
    index = answer(store.read("checkpoint"), folder)
    if index.state != "value":
        raise UserError(f"weights: {folder} has no file `checkpoint`, expected a T5X folder such as checkpoint_1000000")
    with _damage_named(f"{folder}/checkpoint"):
        tree = flax.serialization.msgpack_restore(index.value)
        target = flax.traverse_util.flatten_dict(tree["optimizer"]["target"], is_leaf=_is_t5x_leaf, sep="/")
    # Of each array not in the index, all at once: its header, its files, itself. The web has no lists of files.
    arrays = {name: f"target.{name.replace('/', '.')}" for name, leaf in target.items() if not isinstance(leaf, np.ndarray)}
    headers = {name: store.read(f"{array}/.zarray") for name, array in arrays.items()}
    files = {} if folder.startswith("http") else {name: (store / f"{array}/").list() for name, array in arrays.items()}
    tensors = {}
    for name, array in arrays.items():
        header = answer(headers[name], f"{folder}/{array}/.zarray")
        if header.state != "value":
            raise UserError(f"weights: {folder} lacks the array {array}, which its index names; fetch it again")
        json_files.parse(header.value, f"weights: {folder}/{array}/.zarray")  # TensorStore dies of too many levels
        # By default, a chunk that is missing after an interrupted download reads as zeros.
        spec = {"driver": "zarr", "kvstore": (store / f"{array}/").spec().to_json(), "fill_missing_data_reads": False}
        tensors[name] = tensorstore.open(spec, context=context)
    for name, leaf in target.items():
        if isinstance(leaf, np.ndarray):  # the index holds small arrays itself
            tensors[name] = _tensor(f"{folder}/checkpoint", name, leaf.shape, leaf.dtype.name, lambda leaf=leaf: leaf)
            continue
        where = f"{folder}/{arrays[name]}"
        array = answer(tensors[name], f"{where}/.zarray")
        there = answer(files[name], folder) if files else None
        chunks = SMALL if there is None else sum(not file.startswith(b".") for file in there)
        size = _check_zarr(array, chunks, where)
        read = functools.partial(lambda array, *rest: answer(array.read(), *rest), array, where, size)
        tensors[name] = _tensor(folder, arrays[name], array.shape, array.dtype.name, read)
    return {name: tensors[name] for name in target}


def _answer(future, what, size=0, *, timeout, remote):
    """What a TensorStore's future gives. size: in bytes, of the answer."""
    seconds = timeout + size / SPEED
    try:
        return future.result(timeout=seconds)
    except TimeoutError as error:
        raise UserError(
            f"weights: {what} did not answer within {seconds:.0f} seconds; check the network and the credentials, or allow "
            "more with --timeout=SECONDS"
        ) from error
    except Exception as error:
        if not remote:
            raise unreadable(what, _reason(error)) from error
        raise UserError(
            f"weights: {what} cannot be read ({_reason(error)}); check the address, the network and the credentials"
        ) from error


def _check_zarr(array, chunks: int, where) -> int:
    """The size of an array in bytes; refuses one that claims more than its files can hold.

    `chunks` is an upper bound of the number of its chunk files.

    TensorStore ends the process where it cannot allocate what an array claims.
    """
    shape, chunk = array.shape, array.chunk_layout.read_chunk.shape
    wanted = math.prod(-(-length // step) for length, step in zip(shape, chunk, strict=True))
    claims = f"its .zarray says shape {list(shape)} in chunks of {list(chunk)}"
    if chunks < wanted or math.prod(chunk) > max(math.prod(shape), SMALL):
        raise unreadable(where, f"{claims}, it has {chunks} of {wanted}")
    try:
        room = [np.empty(size, array.dtype.numpy_dtype) for size in (shape, chunk)]  # touches no memory
        return room[0].nbytes
    except (MemoryError, ValueError) as error:
        raise unreadable(where, f"{claims}, which no memory holds") from error


def _is_t5x_leaf(path, value) -> bool:
    return not isinstance(value, dict) or "driver" in value


def open_orbax(folder) -> Tensors:
    """The arrays of one item of an Orbax checkpoint, with names joined by "/". UserError where it does not list them."""
    import jax
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise unreadable(folder, "its arrays are not listed")
    tree = flax.traverse_util.flatten_dict(metadata.tree, sep="/")

    def read(name):
        leaf = jax.ShapeDtypeStruct(tree[name].shape, tree[name].dtype)
        item, kinds = (
            flax.traverse_util.unflatten_dict({name: value}, sep="/")
            for value in (leaf, ocp.RestoreArgs(restore_type=np.ndarray))
        )
        args = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
        return flax.traverse_util.flatten_dict(checkpointer.restore(folder, args=args), sep="/")[name]

    return {
        name: _tensor(folder, name, leaf.shape, np.dtype(leaf.dtype).name, functools.partial(read, name))
        for name, leaf in tree.items()
    }


def unstacked(theirs: Tensors, prefix: str, axis: int, layers: str = "") -> Tensors:
    """Splits scanned layers: `prefix/x` becomes `{layers}_0/x`, `{layers}_1/x`, ..., its slices along `axis`.

    One stack is in memory at a time. Reading its layers in order reads it once.

    Args:
      layers: the new prefix; `prefix` itself by default.
    """
    latest, out = {}, {}

    def layer(read, i):
        if read not in latest:
            latest.clear()
            latest[read] = read()
        return np.take(latest[read], i, axis)

    for name, tensor in theirs.items():
        if not name.startswith(prefix + "/"):
            out[name] = tensor
            continue
        if len(tensor.shape) <= axis:
            raise UserError(f"weights: the tensor {name} has shape {tensor.shape}, expected the layers on axis {axis}")
        shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
        for i in range(tensor.shape[axis]):
            one = f"{layers or prefix}_{i}/{name.removeprefix(prefix + '/')}"
            out[one] = Tensor(shape, lambda read=tensor.read, i=i: layer(read, i), tensor.dtype)
    return out


WRITTEN = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtype -> its name in the header


def write_safetensors(path, tensors: Mapping[str, Tensor], progress: Callable = iter, dtype: str = "float32") -> None:
    """Writes tensors, reading one at a time. The file appears when it is complete.

    Args:
      progress: wraps the iterator over the names, for example `tqdm`.
      dtype: of the file, a key of `WRITTEN`. Float32 is rounded to it.

    Raises:
      UserError: a tensor is not of its shape, or has a number that is too large for float16.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers 4 refuses files without it
    for name, tensor in tensors.items():
        size = np.dtype(dtype).itemsize * int(np.prod(tensor.shape))
        header[name] = {"dtype": WRITTEN[dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with paths.writing(path) as partial, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in progress(tensors):
            array = np.asarray(tensors[name].read(), np.float32, order="C")
            if array.shape != tensors[name].shape:
                raise UserError(f"weights: {name} has shape {array.shape} when read, expected {tensors[name].shape}")
            if dtype != "float32":
                with np.errstate(over="ignore"):  # named below
                    array, exact = array.astype(dtype), array
                if np.isinf(array).sum() > np.isinf(exact).sum():
                    raise UserError(f"weights: {name} has numbers too large for {dtype}; choose bfloat16 or float32")
            file.write(array.reshape(-1).view(np.uint8).data)


def read_all(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the tensors one by one: (name, float32 array)."""
    for name, tensor in tensors.items():
        yield name, np.asarray(tensor.read(), np.float32)


def read_params(path, shapes: Mapping, place: Callable = lambda array, leaf: array) -> dict:
    """The parameters of a safetensors file with our names, as nested dictionaries of float32 arrays.

    Args:
      shapes: name -> anything with the `shape` that the module's parameter has (models/parameters.py).
      place: called with each array as it is read and its entry in `shapes`; returns what to keep, for example on a device.

    Raises:
      UserError: no such file, or tensors with other names or shapes.
    """
    tensors = open_safetensors(path)
    found, wanted = ({name: tuple(leaf.shape) for name, leaf in side.items()} for side in (tensors, shapes))
    checkpoints.check_shapes(found, wanted, path)
    params = {name: place(array, shapes[name]) for name, array in read_all(tensors)}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _existing(path) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"weights: no file {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"weights: {path} is a Git LFS pointer, not the file; run `git lfs pull` in its repository")
    if re.match(rb"\s*<[!?a-zA-Z]", start):
        raise UserError(f"weights: {path} is a web page, not weights; open it to see why the download failed")
    return path
