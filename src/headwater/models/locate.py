"""Where a model's name leads, whether what is there may be read, and what its weights are called."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path

from headwater.errors import UserError
from headwater.models import lora, untrusted_files

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")

WHOLE, SAMPLES, BLOCK = 256 << 20, 512, 16 << 10
"""Bytes up to which a weights file is read whole to name it; how many blocks of a larger one, and of how many bytes."""


def resolve(name: str, field: str) -> str:
    """The folder or hub id that a recipe's model name stands for.

    `pocket:NAME` ships with the package. `desk:NAME` is ./desk/NAME where that holds weights; else what ships, which is all
    but the weights and enough to plan with (`refuse_without_weights` tells).

    Raises UserError that names the field when it is a missing folder or an unknown pocket or desk model.
    """
    family, colon, short = name.partition(":")
    if colon and family in ("pocket", "desk"):
        made, shipped = Path(family) / short, Path(str(files("headwater"))) / family
        if family == "desk" and list(made.glob("*.safetensors")):
            return str(made)
        known = sorted(path.parent.name for path in shipped.glob("*/config.json"))
        if short not in known:
            listed = ", ".join(f"{family}:{one}" for one in known)
            raise UserError(f"{field}: no {family} model {name!r}; there are {listed}")
        return str(shipped / short)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not lora.is_adapter(name):
            raise UserError(f"{field}: the folder {name} holds no config.json, so no model")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"{field}: the folder {name} holds no *.safetensors; other weight formats are not read")
        untrusted_files.refuse_unsafe(folder, field, name)
        return str(folder)
    if HUB_ID.match(name):
        return name
    raise UserError(f"{field}: no such model folder: {name}")


def refuse_without_weights(name: str, where: str, field: str) -> None:
    """Raises UserError for a desk model that has not been made yet; `where` is what its name stands for."""
    if Path(where).is_dir() and not list(Path(where).glob("*.safetensors")):
        raise UserError(
            f"{field}: {name} has no weights yet; `python -m tools.pretrain desk`, in a checkout of the source, makes them in ./desk"
        )


def refuse_untrusted(where: str, field: str, name: str, trust_remote_code: bool) -> None:
    """Raises UserError for a folder whose configs name code to be run, or a model unlike the weights beside it."""
    folder = Path(where)
    if not folder.is_dir():
        return  # a hub id: the library asks the same of it as we do, and downloads safetensors alone
    if not trust_remote_code:
        untrusted_files.refuse_code(folder, field, name)
    if lora.is_adapter(where):
        refuse_untrusted(base_of(where, field), field, name, trust_remote_code)
    elif list(folder.glob("*.safetensors")):
        untrusted_files.refuse_unlike_weights(folder, field, name)


def base_of(where: str, field: str) -> str:
    """Where the model itself is: for an adapter's folder that of its base, which must be there and be no adapter. Raises UserError."""
    if not lora.is_adapter(where):
        return where
    named = lora.base_name(where, field)
    base = resolve(named, f"{field}: the base of the adapter {where}")
    if lora.is_adapter(base):
        raise UserError(f"{field}: the adapter {where} stands on {named}, another adapter; merge that one first")
    return base


def fingerprint_of(where: str) -> str:
    """Names the weights of a model folder by content; a hub id by its name.

    Files up to WHOLE bytes count whole; of larger ones the size and SAMPLES blocks spread evenly from the first MiB to the last,
    so that a 16 GB model is named in a moment. A change that touches none of the blocks would go unseen; training touches
    all of a tensor.
    """
    digest = hashlib.sha256()
    folder = Path(where)
    if not folder.is_dir():
        return hashlib.sha256(where.encode()).hexdigest()[:16]
    if lora.is_adapter(where):
        digest.update(fingerprint_of(base_of(where, "the adapter's base")).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE:
                while part := file.read(1 << 20):
                    digest.update(part)
                continue
            digest.update(file.read(1 << 20))
            for place in range(1, SAMPLES):
                file.seek(place * (size - BLOCK) // SAMPLES)
                digest.update(file.read(BLOCK))
            file.seek(size - (1 << 20))
            digest.update(file.read())
    return digest.hexdigest()[:16]
