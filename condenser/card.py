"""The page of an export that the hub shows."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from condenser.models.objective import Objective

FILES_NAMED = 20  # of the text that was trained on
PAPERS = {
    "Condenser": "Gao & Callan, EMNLP 2021",
    "CoCondenser": "Gao & Callan, ACL 2022",
    "RetroMAE": "Xiao & Liu, EMNLP 2022",
    "DupMAE": "Xiao et al., ACL 2023",
}


def metadata(backbone: str | None, language: str) -> dict[str, Any]:
    """By which the hub finds a model."""
    about: dict[str, Any] = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    about |= {"license": "unknown", "language": language, "tags": ["condenser", "dense-retrieval", "masked-lm"]}
    if backbone and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", backbone) and not Path(backbone).exists():
        about["base_model"] = backbone  # of the hub
    return about


def model_card(model: Objective, card: dict[str, Any], backbone: str | None) -> str:
    """The page that the hub shows; its first part is the hub's metadata."""
    config, data, numbers = model.lm.config, card["data"], card["measured"]
    about = metadata(backbone, data["settings"].get("language", "en"))
    names = [source["name"] for source in data["settings"]["sources"]]
    files = ", ".join(names[:FILES_NAMED])
    files += f" and {len(names) - FILES_NAMED:,} more" if len(names) > FILES_NAMED else ""
    name = type(model).__name__
    control = name == "Condenser" and not model.head_state()
    objective = "plain MLM" if control else name
    method = "Pre-trained as the control of" if control else "Its `[CLS]` vector is made ready for dense retrieval by"
    seen = f"{numbers['train/tokens_seen']:,.0f}" if "train/tokens_seen" in numbers else "not recorded"
    losses = [f"`{name}` {value:.3f}" for name, value in numbers.items() if name.startswith("val/")]
    options = card["source"].get("options", {})
    of_text = options.get("pooling", "`[CLS]`")
    of_text += ", whitened" if "whitening" in options else ""
    compared = "cosine" if "normalize" in options else "dot product"
    prompts = ", ".join(f"{name}: {json.dumps(text)}" for name, text in options.get("prompts", {}).items())
    rows = [
        f"- {row['collection']}, {row['model']}, fine-tuned: {row['trained_on'] or 'no'}, nDCG@10: {row['ndcg@10']:.3f}"
        for row in numbers.get("evaluation", [])
        if "ndcg@10" in row
    ]
    return f"""---
{yaml.safe_dump(about, sort_keys=False)}---
# A {config.model_type} encoder pre-trained with {objective}

{method} {name} ({PAPERS.get(name, "an objective of one's own")}).
**It is not fine-tuned for retrieval: fine-tune it first**; before that, `[CLS]` similarity says little. How, on
MS MARCO and others, with sentence-transformers or Tevatron: `docs/fine-tuning.md` of the project that made it.

- {config.num_hidden_layers} layers, hidden size {config.hidden_size}, vocabulary {config.vocab_size:,}
- started from: {backbone or "random weights"}
- head: {json.dumps(card["head"])}
- training: step {card["source"]["step"]:,}, tokens seen: {seen}; settings in `training_config.yaml`
- data: {files}; {data["counts"]["tokens_kept"]:,} tokens in rows of up to {data["settings"]["max_length"]}; all of its
  manifest in `condenser.json`
- vectors: {of_text}, compared by {compared}; prompts: {prompts or "none"}; sequences are cut at
  {data["settings"]["max_length"]} tokens, the length of pre-training, unless you raise `max_seq_length`
- licence: not stated; it depends on the text and on the weights that training started from

## Measured

Validation losses at this step: {", ".join(losses) or "not recorded"}.

{chr(10).join(rows) or "Retrieval: not evaluated when this was written."}

## Use

```python
from sentence_transformers import SentenceTransformer  # to fine-tune, then to encode: SentenceTransformer(folder)
from transformers import AutoModel, AutoModelForMaskedLM  # .from_pretrained(folder): encoder; encoder with MLM head
from condenser.hub import load_export  # load_export(folder): with its head, to go on pre-training
```

Limits: it knows what its text says, with its errors and biases, in its language and of its time. Measure whether
`[CLS]` holds the text: of the small models in `docs/study.md` RetroMAE's decoder read it, and Condenser's head did not.
"""
