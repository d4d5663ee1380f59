"""Short names for contents, for cache keys and for telling two runs' inputs apart."""

import dataclasses
import hashlib
import json
import pathlib


def fingerprint(*parts) -> str:
    """16 hexadecimal digits that depend on the contents of all parts.

    Args:
      parts: JSON values, dataclasses of JSON values, or paths, which stand for the bytes of their files.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, pathlib.Path):
            with part.open("rb") as file:
                part = hashlib.file_digest(file, "sha256").hexdigest()
        elif dataclasses.is_dataclass(part):
            part = dataclasses.asdict(part)
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:16]
