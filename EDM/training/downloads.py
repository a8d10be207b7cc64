"""Files named by URL, kept in the cache that the published code uses, so that what it fetched is found again."""
from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

from shared.cli import MACHINE_ERRORS, UserError
from shared.training.files import atomic, make_dir
from shared.training.progress import Progress

ATTEMPTS = 10
TIMEOUT_SECONDS = 30
CHUNK = 1 << 20


def is_url(path: str | os.PathLike) -> bool:
    return re.match(r"https?://", str(path)) is not None


def cache_folder() -> Path:
    """Return $DNNLIB_CACHE_DIR/downloads, or ~/.cache/dnnlib/downloads."""
    root = os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "dnnlib"
    return Path(root) / "downloads"


def cache_prefix(url: str) -> str:
    """Return how the name of the cached copy of `url` begins."""
    return hashlib.md5(url.encode(), usedforsecurity=False).hexdigest() + "_"


def local_file(path: str | os.PathLike) -> Path:
    """Return `path` itself, or the cached copy of a URL, which is fetched first if there is none.

    Raises UserError when the file does not exist or cannot be fetched.
    """
    if not is_url(path):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        return Path(path)
    url, prefix = str(path), cache_prefix(str(path))
    for cached in sorted(cache_folder().glob(f"{prefix}*")):
        return cached
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1])[-100:]
    target = make_dir(cache_folder()) / (prefix + name)
    _fetch(url, target)
    return target


def _fetch(url: str, target: Path) -> None:
    import requests

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response:
                if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                    raise UserError(f"cannot fetch {url}: the server answers {response.status_code}")
                response.raise_for_status()
                _save(response, target)
                return
        except (requests.RequestException, OSError) as error:
            if error.errno in MACHINE_ERRORS:
                raise
            # A ValueError: the address, or the one that the server sends on to, is none that can be fetched.
            if attempt == ATTEMPTS or isinstance(error, (ValueError, requests.TooManyRedirects)):
                raise UserError(f"cannot fetch {url}: {type(error).__name__} ({attempt} attempts); save the file "
                                "yourself and give its path") from None
            time.sleep(min(2.0**attempt / 8, 10))


def _save(response, target: Path) -> None:
    """Write the body of a response to `target`, which appears only when every byte has arrived."""
    expected = int(response.headers.get("content-length") or 0)
    plain = "content-encoding" not in response.headers
    counter = Progress(f"fetching {target.name[33:]}", expected or None, unit="B")
    try:
        with atomic(target) as file:
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                counter.advance(len(chunk))
            if plain and expected and file.tell() != expected:
                raise OSError(f"{file.tell()} of {expected} bytes arrived")
    finally:
        counter.close()
