"""Names of tokenizers and models, and the tokenizer of one."""

from pathlib import Path
from typing import Any

from condenser.online import ask_hub


def tokenizer_files(folder: Path) -> dict[str, str]:
    """The text of a tokenizer's files, by name; hidden ones are an operating system's."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("[!.]*"))}


def load_tokenizer(name: str | Path) -> Any:
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        if not has_tokenizer(Path(name)):  # the library would make an empty one
            raise ValueError(f"no tokenizer in {name}: there is no tokenizer.json, vocab.txt or the like")
    elif is_path(str(name)) or Path(name).exists():
        raise ValueError(f"no tokenizer folder at {name}: give the folder that holds tokenizer.json, or a hub name")
    else:
        ask_hub()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # missing folder, no network, broken files: the library raises many kinds
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {name!r} has no fast version, which word boundaries are read from")
    tokenizer.padding_side = "right"  # BERT's positions are counted from the left
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    return any(path.is_file() for pattern in ("*token*.json", "vocab*", "*.model") for path in folder.glob(pattern))


def vocabulary_size(tokenizer: Any) -> int:
    """How many rows its ids need in an embedding; some of these may have no token."""
    return 1 + max(tokenizer.get_vocab().values())


def special_ids(tokenizer: Any) -> list[int]:
    """Of all special tokens, those too that only its file says are special, as of ModernBERT's <|padding|>."""
    flagged = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *flagged})


def is_path(name: str) -> bool:
    """Whether a name that a folder or the hub may answer to is meant as a path: ``NAME`` and ``OWNER/NAME`` are not,
    unless a folder OWNER is here."""
    parent = Path(name).parent
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (parent != Path() and parent.is_dir())
