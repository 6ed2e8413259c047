"""Checks of an image folder: that it is laid out as ``root/train/<class>/*``, ``root/test/…``."""

from __future__ import annotations

from pathlib import Path

from sweeper.config.data import IMAGE_SUFFIXES, ImageFolder, shape_of

_LAYOUT = "it must hold train/<class>/*.jpg and test/<class>/*.jpg"


def folder_mistake(name: str) -> str | None:
    """What is wrong with the folder of images, or None for nothing that a glance shows."""
    root = Path(name)
    try:
        if not root.is_dir():
            return f"the folder must be there ({_LAYOUT}), but there is no folder {root}"
        for part in ("train", "test"):
            if not (root / part).is_dir():
                return f"{_LAYOUT}, but {root} has no folder {part}"
        classes = {part: _classes(root / part) for part in ("train", "test")}
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        return f"the folder must be readable, but: {error}"
    for part, names in classes.items():
        if not names:
            return f"{_LAYOUT}, but {root / part} has no class folder with images"
    if odd := sorted(classes["test"] ^ classes["train"]):
        there, lacking = ("train", "test") if odd[0] in classes["train"] else ("test", "train")
        return (
            f"train and test must have the same classes, but {odd[0]!r} of {there} is not in "
            f"{lacking}"
        )
    if len(classes["train"]) == 1:
        (only,) = classes["train"]
        return (
            f"there must be two classes at least, but {root / 'train'} has {only!r} alone; add "
            "another one to train and test, or move the classes up where they are inside it"
        )
    if shape_of(ImageFolder(name="image_folder", root=name)) is None:
        return f"the images must be readable, but the first one of {root / 'train'} is not"
    return None


def _classes(folder: Path) -> set[str]:
    return {
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and any(f.suffix.lower() in IMAGE_SUFFIXES for f in entry.iterdir())
    }
