"""Hold the settings of one watch: collect.py decides by them when to take a sample, sample.py what to look at."""

from __future__ import annotations

from dataclasses import dataclass

from te_nvfp4_cv.errors import bad_value

THRESHOLD = 3**0.5  # below this ratio of gradient norm and quantization noise training stalls: arXiv 2505.19115


@dataclass(frozen=True)
class Settings:
    """The arguments of attach, checked; `recipe` is TOML text, or "" if none was given.

    Raises:
        ValueError: a number out of range.
    """

    every: int
    name: str
    group: str
    recipe: str
    backend: str
    gradient_noise: bool
    max_elements: int
    noise_bytes: int
    last: int | None

    def __post_init__(self) -> None:
        for argument, least in (("every", 0), ("max_elements", 16), ("noise_bytes", 0)):
            value = getattr(self, argument)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:  # True is an int to Python
                raise bad_value("telemetry", argument, repr(value), f"an integer >= {least}")
        if self.last is not None and (not isinstance(self.last, int) or isinstance(self.last, bool) or self.last < 0):
            raise bad_value("telemetry", "last", repr(self.last), "an integer >= 0, or None")
