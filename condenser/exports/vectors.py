"""How sentence-transformers is to make a vector of an export: pooling, length, prompts, whitening."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from condenser.evaluation.encoders import backbone
from condenser.evaluation.pooling import whitened, with_pooling

ENOUGH = 20_000  # texts to whiten by
SAMPLE = ["a question", "A sentence of a document, and one more. So that they differ."]


def write_vectors(
    folder: Path,
    pooling: str = "cls",
    normalize: bool = False,
    prompts: dict[str, str] | None = None,
    texts: list[str] | None = None,
    dimensions: int | None = None,
) -> None:
    """Change an export's files for sentence-transformers; those for transformers stay as they are.

    Args:
        pooling: see `condenser.evaluation.pooling`.
        normalize: make vectors one long, and compare them by cosine.
        prompts: what is put before a text, by name (query, document).
        texts: by which vectors are whitened.
        dimensions: that whitening leaves; by default all.

    Raises:
        ValueError: no such pooling, or too few texts for so many dimensions.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize

    encoder = with_pooling(SentenceTransformer(str(folder), device="cpu"), pooling)
    if texts is not None:
        vectors = encoder.encode(texts, show_progress_bar=sys.stderr.isatty())
        encoder = whitened(encoder, vectors, dimensions)
        print(f"whitened by {len(vectors):,} texts, to {encoder.get_embedding_dimension()} dimensions")
    if normalize:
        encoder.append(Normalize())
    encoder.prompts.update(prompts or {})
    encoder.similarity_fn_name = "cosine" if normalize else "dot"
    with tempfile.TemporaryDirectory() as saved:
        encoder.save(saved, create_model_card=False)
        shutil.rmtree(folder / "1_Pooling")
        for path in Path(saved).iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
        shutil.copy(Path(saved) / "config_sentence_transformers.json", folder)
        modules = json.loads((Path(saved) / "modules.json").read_text(encoding="utf-8"))
    for module in modules:
        module["type"] = as_before(folder / module["path"] / "config.json", module["type"].rsplit(".", 1)[1])
    (folder / "modules.json").write_text(json.dumps(modules, indent=1) + "\n", encoding="utf-8")
    if backbone(encoder).config.output_hidden_states:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(
            json.dumps(config | {"output_hidden_states": True}, indent=2) + "\n", encoding="utf-8"
        )
    vectors, again = (each.encode(SAMPLE) for each in (encoder, SentenceTransformer(str(folder), device="cpu")))
    if not np.allclose(vectors, again, rtol=1e-3, atol=1e-4):
        raise ValueError(f"sentence-transformers reads back vectors that differ by {np.abs(vectors - again).max():.2g}")


def as_before(config: Path, kind: str) -> str:
    """Write a module's settings in the words of sentence-transformers before version 6, which that knows too; and its
    class in these words."""
    if kind in ("Pooling", "WeightedLayerPooling", "Dense"):
        settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        if kind != "Dense":
            settings["word_embedding_dimension"] = settings.pop("embedding_dimension")
        if kind == "Pooling":
            modes = settings.pop("pooling_mode")
            modes = [modes] if isinstance(modes, str) else modes
            for mode, name in (("cls", "cls_token"), ("mean", "mean_tokens"), ("max", "max_tokens")):
                settings[f"pooling_mode_{name}"] = mode in modes
        settings = {name: value for name, value in settings.items() if not name.startswith("module_")}
        config.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return f"sentence_transformers.models.{kind}"
