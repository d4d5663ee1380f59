"""Named tensors in other people's files, read one at a time, and our own safetensors files, written one at a time.

Nothing here runs code from a file: npz without pickles, safetensors, torch files with `weights_only`, T5X's tensorstore
layout. `open_*` read shapes alone; `Tensor.read` loads one tensor, so that a conversion needs the memory of the largest.
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

import ml_dtypes  # also makes numpy's bfloat16 known, in which safetensors gives such tensors
import numpy as np
import safetensors

from richhf_data import json_files, paths
from richhf_data.errors import UserError

NPY_HEADERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
INDEX = ".index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """shape; read() -> np.ndarray of that shape, in the file's dtype."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def unreadable(path, error) -> UserError:
    """What to raise for a file that its own format's reader gave up on."""
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
    return array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array  # numpy's file has no such name


@contextlib.contextmanager
def _damage_named(path):
    """What readers of npz files raise over damage, as one ValueError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError) as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise error if str(error).startswith("weights: ") else unreadable(path, error) from error


def open_hugging_face(path) -> Tensors:
    """The tensors of a folder, or of one of its files: safetensors or torch, in one file or in the parts of an index.

    Raises:
      UserError: no such file, a truncated one, or a part that the index names and that is missing.
    """
    path = pathlib.Path(path)
    path = _weights_file(path) if path.is_dir() else path
    if not path.name.endswith(INDEX):
        return _open_file(path)
    parts = json_files.read(_existing(path)).get("weight_map")
    if not isinstance(parts, dict):
        raise UserError(f"weights: {path} has no weight_map, expected an index as Hugging Face writes it")
    tensors = {}
    # Some indexes name tensors that no part has; what is needed and missing is found when it is matched.
    for part in dict.fromkeys(parts.values()):
        if pathlib.PurePath(part).name != part:
            raise UserError(f"weights: {path} names the part {part!r}, expected a file name without a folder")
        tensors |= _open_file(path.parent / part)
    return tensors


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    """The weights of a Hugging Face folder: under the usual names, or the only file of their kind."""
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
    """The tensors of a torch file (a `state_dict`, perhaps under the key `state_dict` or `model`), mapped into memory.

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
    """The `target` tree of a T5X checkpoint, local or gs://, its names joined by "/"; the optimiser's state is not read.

    Raises:
      UserError: the folder holds no T5X checkpoint, or its index names an array that is not there.
    """
    import flax.serialization
    import flax.traverse_util
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
        if isinstance(leaf, np.ndarray):  # small ones lie in the index
            tensors[name] = Tensor(leaf.shape, lambda leaf=leaf: leaf)
            continue
        array = f"target.{name.replace('/', '.')}"
        header = store.read(f"{array}/.zarray").result()
        if header.state != "value":
            raise UserError(f"weights: {folder} lacks the array {array}, which its index names; fetch it again")
        # A chunk that an interrupted download left out would read as zeros.
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
    """The arrays of an Orbax checkpoint's item, its names joined by "/"."""
    import flax.traverse_util
    import jax
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = flax.traverse_util.flatten_dict(checkpointer.metadata(folder).item_metadata.tree)

    def read(path):
        item = flax.traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(tree[path].shape, tree[path].dtype)})
        kinds = flax.traverse_util.unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)})
        args = ocp.args.PyTreeRestore(item=item, restore_args=kinds, partial_restore=True)
        return flax.traverse_util.flatten_dict(checkpointer.restore(folder, args=args))[path]

    return {"/".join(path): Tensor(tuple(leaf.shape), functools.partial(read, path)) for path, leaf in tree.items()}


def write_safetensors(path, tensors: Mapping[str, Tensor], progress: Callable = iter) -> None:
    """Writes float32 tensors whole or not at all, reading one after the other.

    Args:
      progress: wraps the iterator over the names, `tqdm` for instance.
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
    """(name, float32 array) of each tensor."""
    for name, tensor in tensors.items():
        yield name, np.asarray(tensor.read(), np.float32)


def _existing(path) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"weights: no file {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"weights: {path} is a Git LFS pointer, not the file; run `git lfs pull` where it came from")
    if start.lstrip().startswith(b"<"):
        raise UserError(f"weights: {path} is a web page, not weights; open it to see why the download failed")
    return path
