"""Table of the samplers that `compute.sampler` can name; torch-free, so that recipes are read without loading them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from headwater import plugins
from headwater.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class SamplerSpec:
    """Facts about one sampler.

    module        defines `function(recipe) -> SamplerFactory` (sampling/base.py); imported when a run first samples
    trainer_logp  its log-probs are the trainer's own up to rounding, so the loss needs no importance correction
    package       the package that it imports; the optional extra of the same name installs it
    """

    module: str
    trainer_logp: bool
    package: str | None = None
    function: str = "make_factory"

    @property
    def of_user(self) -> bool:
        return not self.module.startswith("headwater.")


SAMPLERS = {
    "torch": SamplerSpec("headwater.sampling.torch_sampler", trainer_logp=True),
    "vllm": SamplerSpec("headwater.sampling.vllm_sampler", trainer_logp=False, package="vllm"),
}


def sampler(trainer_logp: bool) -> Callable[[Function], Function]:
    """Declare a function (Recipe) -> SamplerFactory as a sampler that a recipe can name (docs/python-api.md)."""

    def declare(function: Function) -> Function:
        function.trainer_logp = trainer_logp  # type: ignore[attr-defined]
        return function

    return declare


def check_sampler_name(name: str) -> str:
    """The name itself; adds the row of a sampler that a user declared. Raises ValueError if there is no such sampler."""
    if name not in SAMPLERS:
        try:
            function = plugins.find("sampler", name)
        except UserError as error:
            raise ValueError(str(error)) from None
        if function is None:
            raise ValueError(f"input should be {', '.join(map(repr, SAMPLERS))}, or package.module:function")
        trainer_logp = getattr(function, "trainer_logp", None)
        if trainer_logp is None:
            raise ValueError(f"{name} is not declared with @headwater.config.samplers.sampler")
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
