"""Decodes pictures in worker processes, so that neither the event loop nor the devices wait for a codec."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
from collections.abc import Sequence

import numpy as np

from richhf_data import drawing, images, paths
from richhf_data.errors import UserError
from richhf_data.workers import start_worker

_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
      image: uint8[S, S, 3], as the critic reads it. size: (width, height) before.
      kept: uint8[H, W, 3], the picture itself; None if nobody asked for it.
    """

    image: np.ndarray
    size: tuple[int, int]
    kept: np.ndarray | None


def decode(pictures: Sequence[bytes], size: int, keep: int | None) -> list[Picture | str]:
    """Each picture, or the reason why it is none.

    Args:
      size: S. keep: keep the picture itself, scaled down to this longer side; 0 = of its own size; None = do not.
    """
    found = []
    for data in pictures:
        try:
            width, height = images.stored_size(data)
            if width * height > images.MAX_PIXELS:
                raise UserError(f"image: {width} x {height} pixels, expected at most {images.MAX_PIXELS / 1e6:g} million")
            image = images.decode(data, "picture")
            kept = None if keep is None else drawing.shrink(image, keep) if keep else image
            found.append(Picture(images.resize(image, size), image.shape[1::-1], kept))
        except UserError as error:
            reason = str(error).removeprefix("picture: ")
            found.append(reason if reason.startswith("image: ") else f"image: does not decode ({reason})")
        except MemoryError:
            found.append("image: too large for the memory of this machine")
    return found


class Decoders:
    """The worker processes. One that a picture kills is replaced.

    Args:
      count: of processes. size: S.
    """

    def __init__(self, count: int, size: int):
        self._count, self._size = count, size
        self._pool = self._new()

    def _new(self) -> concurrent.futures.ProcessPoolExecutor:
        with paths.naming("/dev/shm"):  # its semaphores
            context = multiprocessing.get_context("spawn")
            return concurrent.futures.ProcessPoolExecutor(self._count, context, initializer=start_worker)

    async def decode(self, pictures: Sequence[bytes], keep: int | None) -> list[Picture | str]:
        """As the function `decode`. Pictures whose process died are decoded again, each alone."""
        try:
            return await self._submitted(pictures, keep)
        except concurrent.futures.process.BrokenProcessPool:
            return [await self._alone(picture, keep) for picture in pictures]

    async def _alone(self, picture: bytes, keep: int | None) -> Picture | str:
        for _ in range(_TRIES):  # a picture of another request may have killed the process
            with contextlib.suppress(concurrent.futures.process.BrokenProcessPool):
                (found,) = await self._submitted([picture], keep)
                return found
        return "image: the process that decoded it died"

    async def _submitted(self, pictures: Sequence[bytes], keep: int | None) -> list[Picture | str]:
        pool = self._pool
        try:
            return await asyncio.wrap_future(pool.submit(decode, pictures, self._size, keep))
        except concurrent.futures.process.BrokenProcessPool:
            if self._pool is pool:
                self._pool = self._new()
                pool.shutdown(wait=False)
            raise

    def close(self) -> None:
        """Ends the processes, in the midst of their work."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
