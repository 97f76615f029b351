"""classes.py -- classes have names: those of private images are declared, never counted.

Which classes exist among private images, and in which order, may depend on a single one of them. So their
names are public constants, declared before the first private image is read, as N is; and each declared class
is found by its name among the public base's classes.

  $ python -m support.classes            # where CIFAR-10's classes lie in a base of photographs
"""
import csv
import re
from pathlib import Path

import torch
from torch import Tensor

import data
from machinery import folders, screen
from machinery.folders import few


def class_names(name: str) -> list[str] | None:
    """The classes of a PUBLIC data set, in the order of their labels; None if it has none or nobody knows."""
    if name.startswith("folder:"):
        return [folders.alike(n) for n in folders.subfolders(Path(name.removeprefix("folder:")))]
    known = data.KNOWN[name].classes if name in data.KNOWN else None
    return known and list(known)


def declared(name: str, flag: str, base: list[str] | None) -> list[str] | None:
    """The classes of the PRIVATE data set `name` in the order of their labels: public constants, as N is.

    flag: --classes, see `listed`; else those of a published data set, else the base's
    Errors: files of which nobody has said what their classes are -> ValueError
    """
    if flag and name in data.KNOWN:
        raise ValueError(f"--classes {flag}: expected only for folder: or npz:, {name} has its own classes")
    if flag:
        return listed(flag)
    if name.startswith("folder:") and base is None:
        raise ValueError(f"--data {name} on a base that does not name its classes: which ones exist is "
                         f"private; declare them, --classes NAME,NAME,... (the first becomes class 0)")
    return base if name.startswith(("folder:", "npz:")) else class_names(name)


def listed(flag: str) -> list[str]:
    """The names that --classes declares: with commas, those that hold a comma in quotes; or their number.

    Example: listed("cat,dog") -> ["cat", "dog"];  listed("2") -> ["0", "1"];  listed('"2"') -> ["2"]
    Errors:  a name twice or without letters, a range such as 0-3 -> ValueError
    """
    word = flag.strip()
    if word.isdecimal() and 1 <= int(word) <= 10_000:
        return [str(i) for i in range(int(word))]
    if not any(c.isalpha() or c in ',"' for c in word) or re.fullmatch(r"\d+ *(to|bis) *\d+", word):
        raise ValueError(f"--classes {flag}: expected the names of the classes, with commas, or their "
                         f"number, 1 to 10000 (4 is for the labels 0 to 3); a single class that is called "
                         f"so is declared in quotes, --classes '\"{word}\"'")
    try:
        names = [folders.alike(name.strip()) for name in next(csv.reader([word], skipinitialspace=True))]
    except csv.Error:
        names = [""]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"--classes {flag}: expected different names, with commas, for folder: or npz:")
    return names


def declared_classes(name: str, flag: str, model, own: bool = False) -> dict:
    """classes: the names of the private data's classes; labels: which class of the base each is. {}: none.

    own: the classes will have a table of their own in the network (lora.new_classes), in this order
    No image is read; model: the base, a unet.UNet. Errors: as `declared` and `place`
    """
    if model.classes is None:
        return {}
    names = declared(name, flag, None if own else model.config["names"])
    if own and names is None:
        if name.startswith("npz:"):
            raise ValueError(f"--data {name}: which classes exist is private; declare them, --classes "
                             f"NAME,NAME,... or --classes 8")
        names = ["image"]                                                # no classes: all images are of one
    if own:
        return dict(classes=names, labels=list(range(len(names))))
    labels = place(names, model.config["names"], model.classes)
    return dict(classes=names or [str(i) for i in labels], labels=labels)


def in_places(images: Tensor, labels: Tensor, places: list[int] | None,
              names: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """The images whose label is declared, in the base's numbers: label i becomes places[i]; None: all, as is.

    An image of another label counts as no image, and a note on the screen says how many do: the screen is for
    whoever holds the images, and nothing that is published depends on it. A class is found by its declared
    name, for the order of the sub-folders that exist would move with one image.
    Errors: no image is left, or the labels begin at 1 instead of 0 -> ValueError, on the same screen
    """
    if places is None:
        return images, labels
    known = (labels >= 0) & (labels < len(places))
    if not known.all():
        outside = f"{int((~known).sum())} of {screen.count(len(labels), 'image')}"
        lowest, highest = int(labels.min()), int(labels.max())
        if highest == len(places) and not (labels == 0).any():
            raise ValueError(f"the labels go from {lowest} to {highest}, and those of {len(places)} declared "
                             f"classes from 0 to {len(places) - 1}, so {outside} would count as none: save "
                             f"the file with labels - 1; or declare {len(places) + 1} classes, the first "
                             f"without images")
        if not known.any():
            raise ValueError(f"none of {screen.count(len(labels), 'image')} has the label of a declared "
                             f"class, 0 to {len(places) - 1}: the labels go from {lowest} to {highest}")
        folders.note(f"{outside} have labels outside the declared classes and count as none")
    images, labels = images[known], labels[known]
    absent = sorted(set(range(len(places))) - set(labels.tolist()))
    if absent:
        which = few([names[i] if names else i for i in absent])
        folders.note(f"no image is of the declared {'class' if len(absent) == 1 else 'classes'} {which}")
    return images, torch.tensor(places)[labels]


def table(classes: list[str], labels: list[int]) -> str:
    """At most five classes, each with the number that it has in the base: "dog = 1, horse = 2"."""
    return few([f"{name} = {label}" for name, label in zip(classes, labels)])


def place(names: list[str] | None, base: list[str] | None, classes: int) -> list[int]:
    """Which of the base's classes each of the data's is: by name if the base knows them all, else by number.

    Example: place(["dog", "horse"], ["cat", "dog", "horse"], 3) -> [1, 2]
    Errors:  some names known and some not, or more names than classes -> ValueError that names both lists
    """
    if names is None:                                                    # nothing declared: what the base has
        return list(range(classes))
    strangers = [name for name in names if name not in (base or [])]
    if base and not strangers:
        return [base.index(name) for name in names]
    if base and len(strangers) < len(names) or len(names) > classes:
        mine, its = few(names), few(base or ["without names"])
        raise ValueError(f"the classes {mine} do not fit the base's {classes}, {its}: "
                         f"expected names that it has, or at most {classes} new ones, which take its "
                         f"classes in order")
    return list(range(len(names)))


if __name__ == "__main__":
    import base
    model = base.load("assets/photos.pt").model
    for flag in ("", "sports car,bullfrog"):
        found = declared_classes("cifar10" if not flag else "folder:PHOTOS", flag, model, own=not flag)
        print(table(**found))
