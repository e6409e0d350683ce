"""The encoder of an export for ONNX Runtime: ``onnx/model.onnx``, and with weights of 8 bits ``onnx/model_qint8.onnx``.

sentence-transformers loads them (``SentenceTransformer(folder, backend="onnx")``), as does any other ONNX Runtime.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER, FULL, SMALL = "onnx", "model.onnx", "model_qint8.onnx"
ROWS = 8  # to compare on, of several lengths
CLOSE = 1e-3  # largest difference of a state that another order of sums may make


def check_installed() -> None:
    """Raises ValueError where what it takes is not installed."""
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--onnx needs {error.name}: pip install 'condenser[onnx]'") from None


class Encoder(nn.Module):
    """What is exported: ids and mask ``[B, L]`` -> last states ``[B, L, H]``."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def write_onnx(folder: Path, longest: int) -> dict[str, Any]:
    """Write both files, run them beside torch on random rows, and note the differences in ``onnx/parity.json``.

    Args:
        folder: an export.
        longest: tokens of the rows to compare on.

    Raises:
        ValueError: the model is not one that torch exports, or ONNX Runtime computes something else.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    # attention in plain operations, which every runtime has
    encoder = AutoModel.from_pretrained(folder, trust_remote_code=False, attn_implementation="eager").eval()
    ids = torch.randint(0, encoder.config.vocab_size, (ROWS, longest), generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(2, longest, ROWS).long()
    mask = (torch.arange(longest) < lengths[:, None]).long()
    (folder / FOLDER).mkdir()
    warnings.filterwarnings("ignore", module="torch.onnx")
    path = folder / FOLDER / FULL
    batch, length = torch.export.Dim("batch", min=1, max=1 << 16), torch.export.Dim("length", min=2, max=1 << 16)
    shape = {0: batch, 1: length}
    try:
        torch.onnx.export(
            Encoder(encoder).eval(),
            (ids, mask),
            path,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # of torch's exporter, for what it cannot express
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--onnx: torch cannot export a {encoder.config.model_type}: {reason}") from error
    quantize_dynamic(path, folder / FOLDER / SMALL, weight_type=QuantType.QInt8)
    with torch.inference_mode():
        expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    found: dict[str, Any] = {}
    for name in (FULL, SMALL):
        file = folder / FOLDER / name
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (states,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        states = torch.from_numpy(states)
        found[name] = {
            "largest_difference": (expected - states)[mask > 0].abs().max().item(),
            "lowest_cosine_of_cls": F.cosine_similarity(expected[:, 0], states[:, 0]).min().item(),
            "bytes": file.stat().st_size,
        }
    if found[FULL]["largest_difference"] > CLOSE:
        raise ValueError(f"--onnx: ONNX Runtime's states differ by {found[FULL]['largest_difference']:.2g}")
    (folder / FOLDER / "parity.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found
