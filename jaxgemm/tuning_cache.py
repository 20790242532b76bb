"""The user's cache of tuned tiles: one readable file for each device kind, JAX version and version of this library.

It lies in `$JAXGEMM_CACHE_DIR`, else in `$XDG_CACHE_HOME/jaxgemm`, else in `~/.cache/jaxgemm`. Several processes may
write at once: a writer holds a lock, reads what the others wrote, adds its rows and replaces the file in one step, so
that a reader, who needs no lock, sees the old file or the new one. A file that is not a table is set aside, under its
name with ".damaged" behind it, and built anew; a warning says so.
"""

import contextlib
import logging
import os
import pathlib
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping

import jax

from jaxgemm import tuned_rows
from jaxgemm.tuned_rows import TunedKey, TunedRow, TunedTable

FOLDER_VARIABLE = "JAXGEMM_CACHE_DIR"

logger = logging.getLogger(__name__)

Signature = tuple[int, int, int]
"""What changes when a file is replaced or written to."""

_read: dict[pathlib.Path, tuple[Signature, Mapping[TunedKey, TunedRow]]] = {}
_lock = threading.Lock()


def folder() -> pathlib.Path:
    """Returns the folder of the cache, which need not exist.

    Raises:
        RuntimeError: if the environment names none and the user has no home.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return pathlib.Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = pathlib.Path(shared) if os.path.isabs(shared) else pathlib.Path.home() / ".cache"
    return base / "jaxgemm"


def path(device_kind: str) -> pathlib.Path:
    """Returns the file of a device kind under the versions that run; "*" makes a pattern for all kinds.

    Example:
        >>> path("NVIDIA H200").name
        'tuned-nvidia-h200-jax-...-jaxgemm-....json'
    """
    device = re.sub(r"[^a-z0-9*]+", "-", device_kind.lower()).strip("-")
    return folder() / f"tuned-{device}-jax-{jax.__version__}-jaxgemm-{library_version()}.json"


def rows(device_kind: str) -> Mapping[TunedKey, TunedRow]:
    """Returns the rows tuned on a device kind; a file that has not changed is not read again.

    Nothing here raises: a cache that cannot be read costs a warning and is empty.
    """
    try:
        file = path(device_kind)
        signature = _signature(file)
        with _lock:
            known = _read.get(file)
            if known is None or known[0] != signature:
                known = _read[file] = signature, _load(file, device_kind)
            return known[1]
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _warn_once(f"the cache of tuned tiles cannot be read: {error}")
        return {}


def add(device_kind: str, new: Iterable[TunedRow]) -> pathlib.Path:
    """Adds rows to the file of a device kind, beside those that other processes wrote; returns the file.

    Raises:
        OSError: if the file cannot be written.
    """
    file = path(device_kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(file):
        content, reason = _parse(file, device_kind)
        if reason is not None:
            _set_aside(file, reason)
        _replace(file, tuned_rows.to_text(content.merged(new)))
    return file


def library_version() -> str:
    """Returns the version of this library, which stands at its front door."""
    return sys.modules[__package__].__version__


def _empty(device_kind: str) -> TunedTable:
    return TunedTable(device_kind, jax=jax.__version__, jaxgemm=library_version())


def _load(file: pathlib.Path, device_kind: str) -> Mapping[TunedKey, TunedRow]:
    content, reason = _parse(file, device_kind)
    if reason is not None:
        try:
            with _exclusive(file):
                content, reason = _parse(file, device_kind)  # meanwhile another process may have built it anew
                if reason is not None:
                    _set_aside(file, reason)
        except OSError as error:  # a folder that nobody may write
            _warn_once(f"{file} holds no table of tuned tiles ({reason}), is not used, and cannot be moved: {error}")
    return content.rows


def _parse(file: pathlib.Path, device_kind: str) -> tuple[TunedTable, str | None]:
    """Returns the table in a file, empty if there is none, and why the file is damaged, or None."""
    expected = _empty(device_kind)
    try:
        content = tuned_rows.from_text(file.read_text("utf-8"))
    except FileNotFoundError:
        return expected, None
    except ValueError as error:  # also bytes that are no UTF-8
        return expected, str(error)
    found, wanted = ((table.device, table.jax, table.jaxgemm) for table in (content, expected))
    if found != wanted:
        return expected, f"it is of {found}, not of {wanted}"
    return content, None


def _set_aside(file: pathlib.Path, reason: str) -> None:
    """Renames a damaged file; to be called under the lock."""
    kept = file.with_name(file.name + ".damaged")
    os.replace(file, kept)
    logger.warning("%s held no table of tuned tiles (%s): it is kept as %s, and built anew", file, reason, kept.name)


def _replace(file: pathlib.Path, text: str) -> None:
    """Writes a file in one step: whoever reads it sees what was there before, or all of the text."""
    descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".partial")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def _exclusive(file: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a file, which lies beside it, since the file itself is replaced."""
    with open(file.with_name(file.name + ".lock"), "a") as stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)  # ends with the stream
        except (ImportError, OSError) as error:  # no such locks on this system, or on this file system
            logger.debug("%s is written without a lock: %s", file, error)
        yield


def _signature(file: pathlib.Path) -> Signature:
    status = os.stat(file)
    return status.st_ino, status.st_mtime_ns, status.st_size


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)
