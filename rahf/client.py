"""A client of `python -m rahf.serve`. One file, which needs the package requests alone: copy it where JAX is not installed.

    critic = Client("http://127.0.0.1:8080")
    critic.feedback(["cat.png"], ["a yellow cat"])      [{"scores": {"plausibility": 0.8, ...}, "keywords": ["yellow"], ...}]

    reward = Client("http://127.0.0.1:8080", {"alignment": 0.7, "plausibility": 0.3})
    reward(images, prompts)                             [0.71, ...], a reward for any trainer

An image is a path, the bytes of a picture's file, a PIL image, or an array uint8[H, W, 3] (PIL encodes the last two).
"""

import base64
import io
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import requests

_AGAIN = {408, 429, 500, 502, 503, 504}
_SCORES = {"plausibility", "alignment", "aesthetics", "overall"}
_CHARACTERS = 32 * 2**20  # of the pictures of a request


class ServiceError(RuntimeError):
    """The service refused a request, failed for a picture, or does not answer."""


class Client:
    """A service.

    Args:
      url: where it listens.
      answer: name of a score or a further reward -> weight, of the sum that a call returns.
      batch: pictures a request. timeout: seconds for each. tries: how often a request is sent that finds the service busy or
        does not reach it, with pauses of 1, 2, 4, ... seconds, or as long as the service says.
    """

    def __init__(
        self,
        url: str,
        answer: Mapping[str, float] | str = "overall",
        batch: int = 64,
        timeout: float = 120,
        tries: int = 6,
    ):
        self._url, self._batch, self._timeout, self._tries = url.rstrip("/"), batch, timeout, tries
        self._answer = {answer: 1.0} if isinstance(answer, str) else dict(answer)
        self._session = requests.Session()

    def __call__(self, images: Sequence, prompts: Sequence[str]) -> list[float]:
        """A number for each of B images and their B prompts. Raises ServiceError for the first picture without one."""
        values = []
        rewards = [name for name in self._answer if name not in _SCORES] or None
        for number, found in enumerate(self.feedback(images, prompts, rewards=rewards)):
            terms = found.get("scores", {}) | found.get("rewards", {})
            if missing := [name for name in self._answer if name not in terms]:
                reason = found.get("error") or found.get("errors", {}).get(missing[0]) or f"no reward {missing[0]!r}"
                raise ServiceError(f"images[{number}]: {reason}")
            values.append(sum(weight * terms[name] for name, weight in self._answer.items()))
        return values

    def feedback(
        self, images: Sequence, prompts: Sequence[str], heatmaps: str | None = None, rewards: Sequence[str] | None = None
    ) -> list[dict]:
        """What the service says of B images and their B prompts: for each its `scores`, `rewards`, `keywords`,
        `labelled_prompt`, or {"error": reason}.

        Args:
          heatmaps: "png" or "float16" adds `heatmaps`, in base64. rewards: the further rewards to compute; None = all.

        Raises:
          ServiceError: the service refuses the request, or does not answer.
        """
        if len(images) != len(prompts):
            raise ValueError(f"prompts: got {len(prompts)} for {len(images)} images, expected one each")
        found, part = [], []
        for number, image in enumerate(images, 1):
            part.append(_encoded(image))
            if number == len(images) or len(part) == self._batch or sum(map(len, part)) > _CHARACTERS:
                body = {"images": part, "prompts": list(prompts[number - len(part) : number])}
                found += self._post("/v1/feedback", body | {"heatmaps": heatmaps, "rewards": rewards})["results"]
                part = []
        return found

    def _post(self, path: str, body: dict) -> dict:
        for attempt in range(self._tries):
            pause = 2.0**attempt
            try:
                response = self._session.post(self._url + path, json=body, timeout=self._timeout)
                if response.status_code == 200:
                    return response.json()
                reason = f"HTTP {response.status_code}: {response.text[:200]}"
                if response.status_code not in _AGAIN:
                    break
                after = response.headers.get("retry-after", "")
                pause = float(after) if after.isdecimal() else pause
            except requests.RequestException as error:
                reason = f"no answer: {error}"
            if attempt + 1 < self._tries:
                time.sleep(pause)
        raise ServiceError(f"{self._url}{path}: {reason}")


def _encoded(image) -> str:
    if isinstance(image, str | os.PathLike):
        image = pathlib.Path(image).read_bytes()
    if not isinstance(image, bytes):
        import PIL.Image

        file = io.BytesIO()
        (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(file, "PNG", compress_level=1)
        image = file.getvalue()
    return base64.b64encode(image).decode()
