"""Resolve a model name and inspect the folder's files: each is checked and read once, on first use."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers import AutoConfig, GenerationConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from headwater.errors import UnsupportedModelError, UserError, did_you_mean
from headwater.models import adapter_files, untrusted_files
from headwater.models.architecture import refuse_unknown, refuse_unsupported
from headwater.models.generation_config import read_generation_config
from headwater.models.resource_limits import layout_limits
from headwater.models.shape import Shape
from headwater.models.tokenizer import read_tokenizer, stop_ids_of
from headwater.models.untrusted_files import as_user_error
from headwater.models.untrusted_tokenizer import CONVERTED, FILES, problem_of_tokenizer
from headwater.models.weight_files import WeightFiles
from headwater.storage import hub

transformers_logging.disable_progress_bar()  # a run loads and saves dozens of models and shows its own progress
transformers_logging.set_verbosity_error()  # what transformers warns about while loading is refused here with a UserError

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with none of these holds no tokenizer."""

FULL_HASH_BYTES, SAMPLED_BLOCKS, BLOCK_BYTES = 256 << 20, 512, 16 << 10
"""Files up to the first size are hashed in full; of larger ones SAMPLED_BLOCKS blocks of BLOCK_BYTES."""


@dataclass(frozen=True)
class ModelFolder:
    """A model's files: a local folder or a hub id. Open one with `ModelFolder.open`.

    name   the model as the user named it, for error messages
    field  the recipe field or option that names it; every error message starts with it
    path   the folder or hub id that the name stands for

    Properties raise UserError for files that are missing, damaged or unsafe. No property reads weights.
    """

    name: str
    field: str
    path: str
    trust_remote_code: bool = False
    _json: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, name: str, field: str, trust_remote_code: bool = False) -> ModelFolder:
        """Resolve a model name and refuse a folder with unsafe files. Nothing is downloaded.

        `pocket:NAME` ships with the package. `desk:NAME` is ./desk/NAME if that holds weights; otherwise the shipped folder,
        which lacks weights and is enough to plan with (see `require_weights`).

        Raises UserError that names the field for a missing folder or an unknown pocket or desk model.
        """
        return cls(name, field, _resolve(name, field), trust_remote_code)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder and not a hub id."""
        return Path(self.path).is_dir()

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a LoRA adapter and no model of its own."""
        return _is_adapter(Path(self.path))

    def require_weights(self) -> None:
        """Raises UserError for a desk model that has not been pretrained yet, and for a hub id that cannot be loaded now."""
        if not self.is_local:
            self._require_on_hub()
        elif not list(Path(self.path).glob("*.safetensors")):
            raise UserError(
                f"{self.field}: {self.name} has no weights yet; `python -m tools.pretrain desk`, in a checkout of the source, makes "
                "them in ./desk"
            )

    def require_trusted(self) -> None:
        """Raises UserError if a config names code to import, or describes a model much larger than the weights.

        Also for a hub id that is not in the cache while the hub cannot be reached.
        """
        folder = Path(self.path)
        if not self.is_local:
            self._require_on_hub()
            return  # transformers applies the same rules to a hub id and downloads safetensors only
        if not self.trust_remote_code:
            for name in untrusted_files.CONFIGS:
                if (folder / name).is_file():
                    untrusted_files.refuse_code(self.json(name), folder / name, self.field)
        if self.is_adapter:
            self.base.require_trusted()
        elif list(folder.glob("*.safetensors")):
            untrusted_files.refuse_unlike_weights(self.json("config.json"), folder, self.field, self.name)

    def _require_on_hub(self) -> None:
        """Raises UserError for a hub id that is not in the cache while the hub cannot be reached, or that it does not have."""
        hub.unreachable()  # where it is, the libraries work offline and read the cache
        if isinstance(try_to_load_from_cache(self.path, "config.json"), str):
            return
        if hub.in_local_folder(self.name):
            likely = did_you_mean(self.name, hub.names_here(self.name))
            raise UserError(f"{self.field}: {self.name} is no folder here{likely}")
        hub.refuse_unreachable({self.field: self.path})
        hub.refuse_absent(self.field, self.path)

    def require_trainable(self, adapter: bool) -> None:
        """Raises UnsupportedModelError if the files hold quantized weights; those of bitsandbytes may carry an adapter."""
        quantization = self._config_entries.get("quantization_config")
        if not quantization:
            return
        method = str(quantization.get("quant_method") if isinstance(quantization, dict) else quantization)
        if not (adapter and method == "bitsandbytes"):
            raise UnsupportedModelError(
                f"{self.field}: {self.name} holds quantized weights ({method:.40}), which cannot be trained; name the unquantized "
                "model, or dequantize it with transformers and save it"
            )

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of the folder."""
        if name not in self._json:
            self._json[name] = untrusted_files.read_object(Path(self.path, name), self.field, self.name)
        return self._json[name]

    @cached_property
    def base(self) -> ModelFolder:
        """The folder with the full model: an adapter's base, or this folder. An adapter of an adapter is refused."""
        if not self.is_adapter:
            return self
        config = self.json(adapter_files.CONFIG)
        problem = adapter_files.unsupported(config)
        if problem is None and not Path(self.path, adapter_files.WEIGHTS).is_file():
            problem = f"it holds no {adapter_files.WEIGHTS}"
        if problem is not None:
            raise UserError(f"{self.field}: {self.path} is an adapter that cannot be used ({problem})")
        name = config["base_model_name_or_path"]
        base = ModelFolder.open(name, f"{self.field}: the base of the adapter {self.path}", self.trust_remote_code)
        if base.is_adapter:
            raise UserError(
                f"{self.field}: the adapter {self.path} is based on {name}, another adapter; merge that one first"
            )
        return base

    @cached_property
    def config(self) -> Any:
        """The transformers config of the full model."""
        self.require_trusted()
        if self.base.is_local:
            refuse_unknown(self.base.json("config.json"), self.field, self.name)
        message = f"the config of {self.name} cannot be read"
        if not self.base.is_local:
            message = f"{self.name} is no folder here, and its config cannot be read from the hub"
        with as_user_error(f"{self.field}: {message}"):
            with layout_limits():
                config = AutoConfig.from_pretrained(self.base.path, trust_remote_code=self.trust_remote_code)
            refuse_unsupported(config, self.field, self.name)
            if not self.trust_remote_code:
                untrusted_files.refuse_kernels(config, self.field, self.name)
        return config

    @property
    def generation_config(self) -> GenerationConfig:
        """The generation config, corrected where transformers would refuse to save it; derived from the config if there is none."""
        return self._generation[0]

    @property
    def generation_changes(self) -> tuple[str, ...]:
        """What was corrected in the generation config."""
        return self._generation[1]

    @cached_property
    def _generation(self) -> tuple[GenerationConfig, tuple[str, ...]]:
        with as_user_error(f"{self.field}: the generation config of {self.name} cannot be read"):
            return read_generation_config(self.base.path, self._config_entries)

    @property
    def _config_entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = self.base.json("config.json") if self.base.is_local else self.config.to_dict()
        return entries

    @cached_property
    def tokenizer(self) -> Any:
        return self.read_tokenizer()

    def read_tokenizer(self) -> Any:
        """A new tokenizer for each call. Raises UserError that names the field; hostile files are refused before they are opened."""
        config = self.config  # read first: transformers would blame the tokenizer for its faults
        own = config if self.tokenizer_path == self.base.path else None
        message = f"{self.field}: the tokenizer of {self.name} cannot be loaded"
        with as_user_error(message):
            problem = self._problem_of_tokenizer()
            if problem is not None:
                raise UserError(f"{message} ({problem})")
            return read_tokenizer(self.tokenizer_path, self.trust_remote_code, own)

    def _problem_of_tokenizer(self) -> str | None:
        path = Path(self.tokenizer_path)
        if path.is_relative_to(str(files("headwater"))):
            return None  # shipped with the package
        if not path.is_dir():
            # All of them, before transformers fetches and opens them: the check reads what is in the cache.
            cached = [
                cached_file(
                    self.tokenizer_path,
                    name,
                    _raise_exceptions_for_missing_entries=False,
                    _raise_exceptions_for_connection_errors=False,
                )
                for name in (*FILES, *CONVERTED)
            ]
            file = next((file for file in cached if file is not None), None)
            return None if file is None else problem_of_tokenizer(Path(file).parent, None)
        tensors = self.weight_files.tensors.values() if self.base.is_local else ()
        rows = max((extent for stored in tensors for extent in stored.shape), default=None)
        return problem_of_tokenizer(path, rows)

    @property
    def weight_files(self) -> WeightFiles:
        """The files with the full model's weights; those of a hub id are downloaded, as `from_pretrained` does."""
        base = self.base
        path = base.path if base.is_local else snapshot_download(base.path, allow_patterns=["model*.safetensors*"])
        return WeightFiles(Path(path), base.field, base.name)

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer's files are: peft writes none with an adapter, which then uses its base's."""
        own = any(Path(self.path, name).is_file() for name in TOKENIZER_FILES)
        return self.path if own or not self.is_adapter else self.base.path

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token id that ends a completion."""
        return stop_ids_of(self.generation_config, self.config, self.tokenizer)

    @cached_property
    def shape(self) -> Shape:
        with as_user_error(f"{self.field}: the config of {self.name} cannot be used"), layout_limits():
            return Shape.from_config(self.config, self.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files that decide outcomes, an adapter's base included; of a hub id, hash of its name."""
        if not self.is_local:
            return hashlib.sha256(self.path.encode()).hexdigest()[:16]
        return content_hash(Path(self.path), self.base.fingerprint if self.is_adapter else "")


def content_hash(folder: Path, prefix: str = "") -> str:
    """Hash of a folder's configs, tokenizer and weights.

    Of a large file, its size and blocks spread evenly from its first MiB to its last are hashed, so that 16 GB take a moment.
    A change that touches none of the blocks goes unnoticed; training changes all of a tensor.
    """
    digest = hashlib.sha256(prefix.encode())
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= FULL_HASH_BYTES:
                while part := file.read(1 << 20):
                    digest.update(part)
                continue
            digest.update(file.read(1 << 20))
            for block in range(1, SAMPLED_BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // SAMPLED_BLOCKS)
                digest.update(file.read(BLOCK_BYTES))
            file.seek(size - (1 << 20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _is_adapter(folder: Path) -> bool:
    """Whether the weights are an adapter's: some trainers write the base's config.json next to them."""
    if not (folder / adapter_files.CONFIG).is_file():
        return False
    of_model = [path for path in folder.glob("*.safetensors") if path.name != adapter_files.WEIGHTS]
    return not (folder / "config.json").is_file() or not of_model


def _resolve(name: str, field: str) -> str:
    family, colon, short = name.partition(":")
    if colon and family in ("pocket", "desk"):
        pretrained, shipped = Path(family) / short, Path(str(files("headwater"))) / family
        if family == "desk" and list(pretrained.glob("*.safetensors")):
            return str(pretrained)
        known = sorted(path.parent.name for path in shipped.glob("*/config.json"))
        if short not in known:
            names = ", ".join(f"{family}:{model}" for model in known)
            raise UserError(f"{field}: no {family} model {name!r}; there are {names}")
        return str(shipped / short)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not _is_adapter(folder):
            raise UserError(f"{field}: the folder {name} holds no config.json, so no model")
        if not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{field}: the folder {name} holds no *.safetensors; other weight formats are not read: save it again with "
                "save_pretrained, which writes safetensors"
            )
        untrusted_files.refuse_unsafe(folder, field, name)
        if not _is_adapter(folder):
            if (folder / adapter_files.CONFIG).is_file():
                raise UserError(
                    f"{field}: {name} holds a model and an adapter ({adapter_files.CONFIG}); transformers would load the adapter, on "
                    "its own base: keep one of the two there"
                )
            WeightFiles(folder, field, name).refuse_inconsistent()
        return str(folder)
    if folder.is_file():
        raise UserError(f"{field}: {name} is a file; name the model folder that holds it")
    if hub.HUB_ID.match(name):
        return name
    raise UserError(f"{field}: {name} is no folder here{'' if '/' in name else ', and no hub id (owner/name)'}")
