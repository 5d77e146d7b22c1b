"""Table of the samplers that `compute.sampler` can name; torch-free, so that recipes are read without loading them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from headwater import plugins


@dataclass(frozen=True)
class SamplerSpec:
    """Facts about one sampler.

    module        defines `function(recipe) -> SamplerFactory` (sampling/base.py); imported when a run first samples
    trainer_logp  its log-probs are the trainer's own up to rounding, so the loss needs no importance correction
    package       the package that it imports; the optional extra of the same name installs it
    collective    its samplers take policies that are sharded over ranks, and all ranks call them with all requests; others sample
                  a rank's share of the requests with gathered weights (`sampling.sharded_sampler`)
    """

    module: str
    trainer_logp: bool
    package: str | None = None
    function: str = "make_factory"
    collective: bool = False

    @property
    def of_user(self) -> bool:
        return not self.module.startswith("headwater.")


SAMPLERS = {
    "torch": SamplerSpec("headwater.sampling.torch_sampler", trainer_logp=True),
    "vllm": SamplerSpec("headwater.sampling.vllm_sampler", trainer_logp=False, package="vllm", collective=True),
}


def sampler(trainer_logp: bool) -> Callable[[plugins.Function], plugins.Function]:
    """Declare a function (Recipe) -> SamplerFactory as a sampler that a recipe can name (docs/python-api.md)."""
    return plugins.declare("sampler", trainer_logp)


def check_sampler_name(name: str) -> str:
    """The name itself; adds the row of a sampler that a user declared. Raises ValueError if there is no such sampler."""
    if name not in SAMPLERS:
        function, trainer_logp = plugins.find_declared("sampler", name, SAMPLERS)
        SAMPLERS[name] = SamplerSpec(function.__module__, bool(trainer_logp), function=function.__name__)
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
