"""Decodes every picture of this code base, by one policy.

  transparency        laid over white
  EXIF rotation       applied
  colour profile      converted to sRGB; one that cannot be read is ignored
  CMYK, palette       become RGB
  16 bits             become 8
  animation           its first picture
  size                scaled down to `MAX_PIXELS`; refused, before it is decoded, above 5 times as many, with a side of more
                      than a million pixels, or in a file of more than a GiB
"""

import contextlib
import functools
import hashlib
import io
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps

from richhf_data import input_files
from richhf_data.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mpo", ".avif", ".jp2")
EXTENSIONS += (".jpe", ".jfif", ".apng", ".dib", ".avifs", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c")  # rarer names of these
MAX_PIXELS = 20_000_000
_REFUSED = 5  # an image of more than this times the allowed pixels is not decoded
MAX_BYTES = 1 << 30  # of a file
_MAX_SIDE = 1_000_000
# Not those that run another program, such as EPS. Pillow may be built without the last two.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000")
_EXPECTED = "expected a JPEG, PNG or WebP, or another of the formats GIF, BMP, TIFF, AVIF and JPEG 2000"
_ORIENTATION = PIL.ExifTags.Base.Orientation
_SRGB_LEVELS = 2  # a profile that moves no colour by more than this is sRGB


def read(path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture file as uint8[H, W, 3], RGB.

    Raises:
      UserError: the file is missing or does not decode.
    """
    try:
        with _opened(pathlib.Path(path), max_pixels) as image:
            return np.array(_rgb(image, max_pixels))  # a copy, which the caller may write to
    except UserError as error:
        raise UserError(f"image: {path} is missing or is not a readable image ({error}), {_EXPECTED}") from error


def read_bytes(path) -> bytes:
    """The content of a picture file, not decoded.

    Raises:
      UserError: no such file, or too large a one.
    """
    try:
        _check_file(pathlib.Path(path))
    except UserError as error:
        raise UserError(f"image: {path} is missing or is not a readable image ({error}), {_EXPECTED}") from error
    return pathlib.Path(path).read_bytes()


def decode(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded picture as uint8[H, W, 3], RGB; `where` names it in errors.

    Raises:
      UserError: it does not decode.
    """
    try:
        with _opened(data, max_pixels) as image:
            return np.array(_rgb(image, max_pixels))  # a copy, which the caller may write to
    except UserError as error:
        raise UserError(f"{where}: image: does not decode ({error}), {_EXPECTED}") from error


def size(path) -> tuple[int, int]:
    """(width, height) of a picture file after its EXIF rotation; reads only the head of the file.

    Raises:
      UserError: the file is missing or its head does not decode.
    """
    try:
        with _opened(pathlib.Path(path), MAX_PIXELS) as image:
            quarter_turn = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
            return image.size[::-1] if quarter_turn else image.size
    except UserError as error:
        raise UserError(f"images: {path} is not a readable image ({error}), {_EXPECTED}; replace it") from error


def digest(data: bytes) -> str:
    """What tells an encoded picture from others: the first 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def stored_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded picture of any size; reads only its head.

    Raises:
      UserError: the head does not decode; the message is the reason alone.
    """
    with _opened(data, math.inf) as image:
        return image.size


def plain(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[bytes, str, bytes]:
    """An encoded picture in a form that every decoder reads alike, such as training's `tf.io.decode_image`.

    An sRGB JPEG or PNG of 8 bits in RGB or grey stays as it is, byte for byte. Any other picture becomes an RGB PNG, by
    the policy of this module.

    Returns:
      the picture, encoded; what was changed ("alpha, EXIF rotation"), "" for nothing; and uint8[8, 8, 3] as bytes: a
      thumbnail, by which `same_picture` compares.

    Raises:
      UserError: it does not decode; the message is the reason alone.
    """
    with _opened(data, max_pixels) as image:
        changes, rgb = _changes(image, data, max_pixels), _rgb(image, max_pixels)
    thumbnail = rgb.resize((8, 8), PIL.Image.Resampling.BOX).tobytes()
    if not changes:
        return data, "", thumbnail
    encoded = io.BytesIO()
    rgb.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue(), ", ".join(changes), thumbnail


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[H, W, 3] -> uint8[size, size, 3], antialiased bilinear: within one level of `preprocessors.resize`."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BILINEAR))


def png(image: np.ndarray) -> bytes:
    """A picture, uint8[H, W, 3] in RGB or uint8[H, W] in grey, encoded."""
    done, data = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)
    assert done
    return data.tobytes()


def extension(data: bytes) -> str:
    """The usual ending of the name of an encoded picture's file: "png", "jpeg", "jp2"."""
    with PIL.Image.open(io.BytesIO(data)) as image:
        return "jp2" if image.format == "JPEG2000" else image.format.lower()


def same_picture(thumbnail: bytes, other: bytes) -> bool:
    """Whether two of `plain`'s thumbnails show one picture, encoded or scaled differently."""
    difference = np.frombuffer(thumbnail, np.uint8).astype(int) - np.frombuffer(other, np.uint8)
    return bool(np.abs(difference).mean() < 8)


@contextlib.contextmanager
def _opened(source: bytes | pathlib.Path, max_pixels: float) -> Iterator[PIL.Image.Image]:
    """Opens a picture, without decoding it. An error, also of the block, becomes a UserError with the reason alone."""
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None  # the check below replaces Pillow's
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(source, bytes):
                file = io.BytesIO(source)
            else:
                _check_file(source)
                file = stack.enter_context(source.open("rb"))  # Pillow maps a file that it opens itself into memory
            if not file.seek(0, io.SEEK_END):
                raise UserError("no bytes")
            file.seek(0)
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            image = stack.enter_context(PIL.Image.open(file, formats=_formats()))
            if max(image.size) > _MAX_SIDE:
                raise UserError(f"a side of more than {_MAX_SIDE:,} pixels")
            if image.width * image.height > _REFUSED * max_pixels:
                raise UserError(f"more than {_REFUSED * max_pixels / 1e6:g} megapixels")
            _scale_transparent_colour(image)
            yield image
    except PIL.UnidentifiedImageError as error:
        raise UserError("no known image format") from error
    except (AssertionError, AttributeError, MemoryError, NameError):  # faults of the code
        raise
    except Exception as error:  # Pillow's plugins raise any other kind on a damaged file
        message = "truncated" if "truncated" in str(error).lower() else str(error)[:80] or type(error).__name__
        raise UserError(message) from error
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit


def _check_file(path: pathlib.Path) -> None:
    if reason := input_files.not_a_file(path):
        raise UserError(reason)
    if path.stat().st_size > MAX_BYTES:
        raise UserError("more than a GiB")


@functools.cache
def _formats() -> tuple[str, ...]:
    PIL.Image.init()
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


def _changes(image: PIL.Image.Image, data: bytes, max_pixels: int) -> list[str]:
    """What `_rgb` changes, in words; nothing of a picture that every decoder reads alike."""
    kind = "JPEG" if image.format == "MPO" else image.format  # a telephone's JPEG, followed by more pictures
    changes = {
        kind: kind not in ("JPEG", "PNG"),
        "animation": kind != "JPEG" and getattr(image, "is_animated", False),
        "alpha": image.has_transparency_data,
        "palette": image.mode in ("P", "PA"),
        "CMYK": image.mode == "CMYK",
        "bit depth": image.mode[0] in "1IF" or (image.format == "PNG" and data[24] != 8),
        "colour profile": _to_srgb(image) is not None,
        "EXIF rotation": _is_turned(image),
        f"over {max_pixels / 1e6:g} megapixels": image.width * image.height > max_pixels,
    }
    return [name for name, holds in changes.items() if holds]


def _is_turned(image: PIL.Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION) in range(2, 9)


def _rgb(image: PIL.Image.Image, max_pixels: int) -> PIL.Image.Image:
    """The picture in RGB, 8 bits, by the policy of this module."""
    scale = min(1, (max_pixels / (image.width * image.height)) ** 0.5)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    if scale < 1:
        image.draft(None, size)  # decodes a JPEG of twice the size or more to a fraction
    to_srgb = _to_srgb(image) or (lambda colours: colours.convert("RGB"))
    alpha = None
    if image.mode[0] == "I":  # Pillow's own conversion clips these at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError("more than 16 bits")
        rgb = to_srgb(PIL.Image.fromarray((values >> 8).astype(np.uint8)))
        if image.has_transparency_data:
            alpha = PIL.Image.fromarray(np.uint8(255) * (values != image.info["transparency"]))
    elif image.mode == "F":
        raise UserError("more than 16 bits")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb, alpha = to_srgb(rgba), rgba.getchannel("A")
    else:
        rgb = to_srgb(image)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    if scale < 1:
        rgb = rgb.resize(size, PIL.Image.Resampling.LANCZOS)
    if _is_turned(image):
        rgb.getexif()[_ORIENTATION] = image.getexif()[_ORIENTATION]
        rgb = PIL.ImageOps.exif_transpose(rgb)
    rgb.info = {}  # some readers would apply a colour profile, gamma or EXIF, and others not
    return rgb


def _scale_transparent_colour(image: PIL.Image.Image) -> None:
    """Makes a PNG's transparent colour one of 8 bits: Pillow scales the picture to 8 bits, and not this colour."""
    colour = image.info.get("transparency")
    if image.format == "PNG" and image.mode in ("1", "L", "RGB") and colour is not None:
        scale = {"1": 255, "L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(image.tile[0].args, 1)
        scaled = [int(value * scale) for value in (colour if isinstance(colour, tuple) else (colour,))]
        image.info["transparency"] = tuple(scaled) if image.mode == "RGB" else scaled[0]


def _to_srgb(image: PIL.Image.Image) -> Callable[[PIL.Image.Image], PIL.Image.Image] | None:
    """The conversion of the embedded colour profile to RGB in sRGB; None without one, for sRGB, and for a damaged one."""
    if not (profile := image.info.get("icc_profile")):
        return None
    mode = "CMYK" if image.mode == "CMYK" else "L" if image.mode[0] in "1LI" else "RGB"
    try:
        source = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = PIL.ImageCms.buildTransform(source, PIL.ImageCms.createProfile("sRGB"), mode, "RGB")
        probe = PIL.Image.fromarray(_PROBES[mode], mode)
        moved = np.asarray(PIL.ImageCms.applyTransform(probe, transform), int) - np.asarray(probe.convert("RGB"))
    except (PIL.ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode != "CMYK" and np.abs(moved).max() <= _SRGB_LEVELS:
        return None
    return lambda colours: PIL.ImageCms.applyTransform(colours.convert(mode), transform)


_STEPS = np.arange(0, 256, 51, dtype=np.uint8)
_PROBES = {  # colours that a transform is tried on: uint8[n, 1(, bands)]
    "L": np.arange(256, dtype=np.uint8)[:, None],
    "RGB": np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), -1).reshape(-1, 1, 3),
    "CMYK": np.zeros((1, 1, 4), np.uint8),
}
