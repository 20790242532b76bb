"""What flags of the examples take: argparse types, whose errors say what a value must be and what it was."""

import argparse
from pathlib import Path


def positive_int(text: str) -> int:
    """Reads 1, 2, ...

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return _int_from(1, text, "a positive integer")


def non_negative_int(text: str) -> int:
    """Reads 0, 1, 2, ...

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    return _int_from(0, text, "0 or a positive integer")


def folder(text: str) -> Path:
    """Reads the path of a folder, which need not be there.

    Raises:
        argparse.ArgumentTypeError: if it, or what it would lie in, is a file.
    """
    path = Path(text)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise argparse.ArgumentTypeError(f"must be a folder, got {path}, where {part} is a file")
    return path


def _int_from(least: int, text: str, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
    return value
