"""What sections of YAML are made of: kinds of values, and a base that knows its keys.

The spec (``qlora_dist.spec``) and cluster profiles (``qlora_slurm.site_profile``) are built of
these.
"""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Strict, so that `true` is no count and "16" no number. Bounded, so that arithmetic on what a user
# gives stays arithmetic.
LARGEST = 2**40
Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Switch = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]


def _time_limit(text: object) -> object:
    if not isinstance(text, str) or not re.fullmatch(r"(\d+-)?\d{1,3}:\d\d:\d\d", text):
        raise ValueError(
            f"should be [days-]hours:minutes:seconds, such as 12:00:00 or 2-00:00:00, got {text!r}"
        )
    return text


TimeLimit = Annotated[str, BeforeValidator(_time_limit)]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_*]+$")]


class Section(BaseModel):
    """A frozen part of the spec; keys that it does not know are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )
