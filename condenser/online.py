"""Whether the Hugging Face hub can be reached."""

import functools
import os
import sys


@functools.cache
def ask_hub() -> None:
    """Where the hub does not answer, names are looked up in its cache alone: its libraries would ask again and again,
    for half a minute a file."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        return
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of the network, a proxy, certificates
        print(f"{constants.ENDPOINT} does not answer ({error}): names are looked up in its cache", file=sys.stderr)
        constants.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"] = True, "1"
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
