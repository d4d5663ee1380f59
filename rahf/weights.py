"""Reads named tensors from files of several formats and writes safetensors files, one tensor at a time.

Reading runs no code from a file: npz without pickles, safetensors, torch files with `weights_only`, T5X's tensorstore
layout. `open_*` read names and shapes only and `Tensor.read` loads one tensor, so a conversion needs as much memory as the
largest tensor.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping

import flax.traverse_util
import ml_dtypes  # also registers bfloat16 with numpy, which safetensors needs
import numpy as np
import safetensors

from rahf import checkpoints
from richhf_data import json_files, paths
from richhf_data.errors import UserError

NPY_HEADERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its shape, and `read()`, which loads it as an np.ndarray in the file's dtype."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def unreadable(path, error) -> UserError:
    """The error for a file that the reader of its format cannot read."""
    return UserError(f"weights: {path} cannot be read, it is damaged or of another format ({error}); fetch it again")


def open_npz(path) -> Tensors:
    """The arrays of an .npz file.

    Raises:
      UserError: no file, a damaged one, or one with pickled objects; also when a damaged array is read.
    """
    path, tensors = _existing(path), {}
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                shape, _, dtype = NPY_HEADERS[version[0]](file)
            if dtype.hasobject:
                raise UserError(f"weights: {path} has the pickled object {member}, expected plain arrays")
            tensors[member.removesuffix(".npy")] = Tensor(shape, functools.partial(_read_npz, path, member))
    return tensors


def _read_npz(path, member) -> np.ndarray:
    with _damage_named(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array  # npz cannot name bfloat16


@contextlib.contextmanager
def _damage_named(path):
    """Turns every exception that a damaged npz file can cause into a UserError with its path."""
    try:
        yield
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError, ValueError) as error:
        raise unreadable(path, error) from error


def open_hugging_face(path) -> Tensors:
    """The tensors of a Hugging Face folder or of one of its files: safetensors or torch, one file or an index and its parts.

    Raises:
      UserError: a file or a part of the index that is missing or truncated.
    """
    path = pathlib.Path(path)
    path = _weights_file(path) if path.is_dir() else path
    if not path.name.endswith(INDEX):
        return _open_file(path)
    parts = json_files.read(_existing(path)).get("weight_map")
    if not isinstance(parts, dict):
        raise UserError(f"weights: {path} has no weight_map, expected an index as Hugging Face writes it")
    tensors = {}
    # Some indexes name tensors that no part has: `pretrained.matched` finds those that are needed.
    for part in dict.fromkeys(parts.values()):
        if pathlib.PurePath(part).name != part:
            raise UserError(f"weights: {path} names the part {part!r}, expected a file name without a folder")
        tensors |= _open_file(path.parent / part)
    return tensors


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The weights file of a Hugging Face folder: one with a usual name, or the only one with its ending."""
    for ending in (f".safetensors{INDEX}", ".safetensors", f".bin{INDEX}", ".bin"):
        for usual in ("model", "pytorch_model"):
            if (folder / f"{usual}{ending}").is_file():
                return folder / f"{usual}{ending}"
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) == 1:
            return found[0]
        if found:
            break
    names = [file.name for file in found]
    raise UserError(f"weights: {folder} has the files {names}, expected one *.safetensors or *.bin, or an index")


def _open_file(path) -> Tensors:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def open_safetensors(path) -> Tensors:
    """The tensors of a .safetensors file.

    Raises:
      UserError: no such file, or a truncated one.
    """
    path = _existing(path)
    try:
        file = safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise unreadable(path, error) from error
    return {
        name: Tensor(tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))
        for name in file.keys()  # noqa: SIM118  (a safetensors file is not a mapping)
    }


def open_torch(path) -> Tensors:
    """The tensors of a torch file, memory-mapped: a `state_dict`, or a dictionary with one as `state_dict` or `model`.

    Raises:
      UserError: no such file, torch is not installed, a damaged file, or one that holds more than plain tensors.
    """
    path = _existing(path)
    try:
        import torch
    except ImportError as error:
        raise UserError(f"weights: {path} needs torch to be read; pip install 'rahf[parity]'") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights: {path} is a pickle with more than plain tensors; it could run code when loaded and is refused. "
            "Save its state_dict alone, or as safetensors"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise unreadable(path, str(error).partition(".")[0]) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise UserError(f"weights: {path} holds a {type(state).__name__}, expected a state_dict of tensors")
    other = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise UserError(f"weights: {path} has entries that are no tensors: {other[:5]}; expected a state_dict")

    def read(tensor):
        tensor = tensor.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return {name: Tensor(tuple(tensor.shape), functools.partial(read, tensor)) for name, tensor in state.items()}


def open_t5x(path) -> Tensors:
    """The parameters of a T5X checkpoint, local or gs://, with names joined by "/". The optimiser's state is not read.

    Raises:
      UserError: the folder holds no T5X checkpoint, or lacks an array that its index names.
    """
    import flax.serialization
    import tensorstore

    folder = str(path).rstrip("/")
    url = folder if "://" in folder else pathlib.Path(folder).absolute().as_uri()
    store = tensorstore.KvStore.open(url + "/").result()
    index = store.read("checkpoint").result()
    if index.state != "value":
        raise UserError(f"weights: {folder} has no file `checkpoint`, expected a T5X folder such as checkpoint_1000000")
    try:
        tree = flax.serialization.msgpack_restore(index.value)
        target = flax.traverse_util.flatten_dict(tree["optimizer"]["target"], is_leaf=_is_t5x_leaf, sep="/")
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise unreadable(folder, error) from error
    tensors = {}
    for name, leaf in target.items():
        if isinstance(leaf, np.ndarray):  # the index holds small arrays itself
            tensors[name] = Tensor(leaf.shape, lambda leaf=leaf: leaf)
            continue
        array = f"target.{name.replace('/', '.')}"
        header = store.read(f"{array}/.zarray").result()
        if header.state != "value":
            raise UserError(f"weights: {folder} lacks the array {array}, which its index names; fetch it again")
        # By default, a chunk that is missing after an interrupted download reads as zeros.
        spec = {"driver": "zarr", "kvstore": f"{url}/{array}/", "fill_missing_data_reads": False}
        try:
            shape = tuple(json.loads(header.value)["shape"])
        except (ValueError, KeyError) as error:
            raise unreadable(f"{folder}/{array}/.zarray", error) from error
        tensors[name] = Tensor(shape, lambda spec=spec: tensorstore.open(spec).result().read().result())
    return tensors


def _is_t5x_leaf(path, value) -> bool:
    return not isinstance(value, dict) or "driver" in value


def open_orbax(folder) -> Tensors:
    """The arrays of one item of an Orbax checkpoint, with names joined by "/"."""
    import jax
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = flax.traverse_util.flatten_dict(checkpointer.metadata(folder).item_metadata.tree, sep="/")

    def read(name):
        leaf = jax.ShapeDtypeStruct(tree[name].shape, tree[name].dtype)
        item, kinds = (
            flax.traverse_util.unflatten_dict({name: value}, sep="/")
            for value in (leaf, ocp.RestoreArgs(restore_type=np.ndarray))
        )
        args = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
        return flax.traverse_util.flatten_dict(checkpointer.restore(folder, args=args), sep="/")[name]

    return {name: Tensor(tuple(leaf.shape), functools.partial(read, name)) for name, leaf in tree.items()}


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
        shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
        for i in range(tensor.shape[axis]):
            one = f"{layers or prefix}_{i}/{name.removeprefix(prefix + '/')}"
            out[one] = Tensor(shape, lambda read=tensor.read, i=i: layer(read, i))
    return out


def write_safetensors(path, tensors: Mapping[str, Tensor], progress: Callable = iter) -> None:
    """Writes tensors as float32, reading one at a time. The file appears when it is complete.

    Args:
      progress: wraps the iterator over the names, for example `tqdm`.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers 4 refuses files without it
    for name, tensor in tensors.items():
        size = 4 * int(np.prod(tensor.shape))
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with paths.writing(path) as partial, partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in progress(tensors):
            array = np.asarray(tensors[name].read(), np.float32, order="C")
            if array.shape != tensors[name].shape:
                raise UserError(f"weights: {name} has shape {array.shape} when read, expected {tensors[name].shape}")
            file.write(array.data)


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
    if start.lstrip().startswith(b"<"):
        raise UserError(f"weights: {path} is a web page, not weights; open it to see why the download failed")
    return path
