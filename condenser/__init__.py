"""What users import from here: the models as Hugging Face classes."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Only when it is asked for, since torch takes seconds to load."""
    if name in ("CondenserForPreTraining", "CondenserConfig"):
        from condenser.models import pretraining

        return getattr(pretraining, name)
    raise AttributeError(f"module 'condenser' has no attribute {name!r}")
