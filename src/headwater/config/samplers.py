"""Table of the samplers that `compute.sampler` can name; torch-free, so that recipes are read without loading them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplerSpec:
    """Facts about one sampler.

    module        defines `make_factory(recipe) -> SamplerFactory` (sampling/base.py); imported when a run first samples
    trainer_logp  its log-probs are the trainer's own up to rounding, so the loss needs no importance correction
    package       the package that it imports; the optional extra of the same name installs it
    """

    module: str
    trainer_logp: bool
    package: str | None = None


SAMPLERS = {
    "torch": SamplerSpec("headwater.sampling.torch_sampler", trainer_logp=True),
    "vllm": SamplerSpec("headwater.sampling.vllm_sampler", trainer_logp=False, package="vllm"),
}


def check_sampler_name(name: str) -> str:
    """The name itself. Raises ValueError if the table has no such sampler."""
    if name not in SAMPLERS:
        raise ValueError(f"input should be {' or '.join(repr(known) for known in SAMPLERS)}")
    return name


def missing_package(name: str) -> str | None:
    """A sentence about the package that a sampler needs if it is not installed, else None."""
    package = SAMPLERS[name].package
    if package is None or is_installed(package):
        return None
    return (
        f"compute.sampler: {package} is not installed here; install the extra with `pip install headwater[{package}]`, or set "
        "compute.sampler=torch"
    )


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
