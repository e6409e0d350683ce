"""`condenser inspect`: what is in a token store; or what a model does: its predictions at [MASK], where its [CLS]
looks, texts that it makes up.

    condenser inspect data/tokens/demo
    condenser inspect runs/demo/export --fill "the [MASK] of a list" --attend "sort the keys of a dict" --generate 3

Legend: N layers, A attention heads, B rows, L their length, T tokens, M masked tokens, V vocabulary.
"""

import sys
import textwrap
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers.utils import logging

from condenser.data.collate import Masking
from condenser.data.masking import Unit
from condenser.data.tokenizers import load_tokenizer, special_ids, vocabulary_size
from condenser.evaluation.encoders import model_folder
from condenser.evaluation.probes import at_rest, cls_attention
from condenser.models.backbones.base import longest_text
from condenser.models.condenser import Condenser
from condenser.models.files import is_run
from condenser.models.losses import logits_of
from condenser.models.objective import Objective
from condenser.models.padded import before_masking, flattened
from condenser.models.pretraining import CondenserForPreTraining, opened
from condenser.reports.inspection import inspect_store
from condenser.reports.tables import table
from condenser.runs import at_least

MASKING = ("mask_unit", "mask_probability", "masking", "masking_options")
OF_STORE = ("samples", "epoch", *MASKING, "batch_size", "micro_batches_per_step", "verify")  # options
MANY = 512  # tokens, of a text for a model that takes any number


def inspect(
    what: str,
    /,
    *,
    samples: int = 3,
    epoch: int = 0,
    mask_unit: Unit = "word",
    mask_probability: float = 0.15,
    masking: type[Masking] | None = None,
    masking_options: dict[str, Any] | None = None,
    batch_size: int = 1024,
    micro_batches_per_step: int = 8,
    verify: bool = False,
    fill: list[str] | None = None,
    top: int = 5,
    attend: str | None = None,
    picture: str | None = None,
    generate: int = 0,
    length: int = 16,
    sweeps: int = 20,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Show what is in a token store: where it came from, how long its rows are, some with their masks, the steps.
    Or what a model does with a text.

    Args:
        what: a folder that `condenser prepare` wrote; or a model: an export, a run or checkpoint, another masked LM.
        samples: of a store, rows to show.
        epoch: of a store, the epoch whose masks are shown.
        mask_unit: of a store, mask whole words, single tokens, or spans of words.
        mask_probability: of a store, share of the tokens to predict.
        masking: of a store, class that masks, by its path, where it is one of your own.
        masking_options: its further settings, as a mapping: '{low: 0.1}'.
        batch_size: of a store, sequences per optimizer step over all devices.
        micro_batches_per_step: of a store, parts of a step.
        verify: of a store, compare every file with its checksum first, which reads all of them.
        fill: of a model, texts with [MASK] (or the tokenizer's own): what the backbone and the head predict there.
        top: how many of the predictions.
        attend: of a model, a text: which of its tokens [CLS] attends to in each layer, as the mean over heads.
        picture: a file (.svg, .png, .pdf) for what attend finds.
        generate: of a model, so many texts that it makes up, by Gibbs sampling from its MLM head (Wang & Cho 2019).
        length: tokens of each.
        sweeps: how often every token of them is drawn again.
        temperature: of what is drawn; below 1 the likely more often.
        seed: of what is drawn.

    Raises:
        ValueError: neither store nor model there, a damaged one, or a text without [MASK].
    """
    given = locals()
    for name, value in {"top": top, "length": length, "sweeps": sweeps}.items():
        at_least(name, value, 1)
    at_least("generate", generate, 0)
    if not temperature > 0:
        raise ValueError(f"--temperature {temperature} must be positive")
    check_picture(picture, attend)
    is_model = (Path(what) / "config.json").is_file() or is_run(what) or bool(fill or attend or generate)
    if not Path(what).exists() and not is_model:
        raise ValueError(f"no token store or model at {what}")
    is_store = (Path(what) / "manifest.json").is_file() or not is_model
    for name, parameter in [*signature(inspect).parameters.items()][1:]:
        if given[name] != parameter.default and (name in OF_STORE) != is_store:
            kinds = ("model", "token store") if is_store else ("token store", "model")
            raise ValueError(f"--{name.replace('_', '-')} is for a {kinds[0]}, and {what} is a {kinds[1]}")
    if is_store:
        return inspect_store(what, **{name: given[name] for name in OF_STORE})
    logging.disable_progress_bar()  # of loading weights
    console = Console(highlight=False, markup=False, emoji=False)
    with model_folder(what) as folder:
        model, tokenizer = whole_model(folder), load_tokenizer(folder)
        check_fits(model, tokenizer, length if generate else 0, top)
    console.print(table(("", ""), about(model).items(), what, justify="left"))
    for text in fill or ():
        for title, rows in predictions(model, tokenizer, text, top):
            console.print(title, table(tuple(rows), zip(*rows.values(), strict=True), justify="left"), sep="\n")
    if attend is not None:
        tokens, weights = attention(model, tokenizer, attend)
        console.print(strongest(tokens, weights, top))
        if picture is not None:
            draw_attention(tokens, weights).savefig(picture)
            console.print(picture)
    if generate:
        for row in gibbs(model, tokenizer, generate, length, sweeps, temperature, seed).tolist():
            console.print(f"- {tokenizer.decode(row, skip_special_tokens=True)}")


def check_picture(picture: str | None, attend: str | None) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if picture is not None and attend is None:
        raise ValueError("--picture is of --attend: give a text")
    if picture is not None and Path(picture).suffix.removeprefix(".") not in known:
        raise ValueError(f"--picture {picture}: its name must end in one of {', '.join(sorted(known))}")


def check_fits(model: Objective, tokenizer: Any, length: int, top: int) -> None:
    longest, size, n_ids = longest_text(model.lm.config), model.lm.config.vocab_size, vocabulary_size(tokenizer)
    if n_ids > size:
        raise ValueError(f"the model's vocabulary ({size}) is smaller than its tokenizer's ({n_ids})")
    if longest and length + 2 > longest:
        raise ValueError(f"--length {length}: the model takes texts of {longest} tokens, two of them special")
    if top > size:
        raise ValueError(f"--top {top}: there are {size} tokens")


def whole_model(folder: str) -> Objective:
    """With its head, if it has one. A checkpoint of the authors' code does not say where its head begins: the paper's
    begins in the middle."""
    found = opened(folder, {})
    if found.head is None:
        return Condenser.from_masked_lm(found.lm, n_head_layers=0).eval()
    options = {} if found.objective else {"skip_from": found.lm.config.num_hidden_layers // 2}
    return CondenserForPreTraining.from_pretrained(folder, **options).model


def about(model: Objective) -> dict[str, str]:
    config = model.lm.config
    return {
        "backbone": f"{config.model_type}, {len(model.backbone.layers)} layers of {config.hidden_size}, "
        f"{config.vocab_size:,} tokens in the vocabulary, {sum(p.numel() for p in model.lm.parameters()):,} weights",
        "objective": type(model).__name__,
        "settings": ", ".join(f"{name} {value}" for name, value in model.settings.items()),
        "head": f"{sum(weight.numel() for weight in model.head_state().values()):,} weights",
    }


def predictions(model: Objective, tokenizer: Any, text: str, top: int) -> list[tuple[str, dict[str, list[str]]]]:
    """For each mask of a text a title, and by the names of what predicts (mlm, head_mlm, decoder) the likeliest tokens;
    ValueError if there is no mask."""
    ids = read(model, tokenizer, text.replace("[MASK]", tokenizer.mask_token))["input_ids"]
    masked = ids == tokenizer.mask_token_id
    if not masked.any():
        said = textwrap.shorten(text, 80)
        raise ValueError(f"--fill {said!r}: there is no {tokenizer.mask_token} in what the model reads of it")
    by_name = {name: logits.softmax(-1).topk(top) for name, logits in logits_at_masks(model, ids, masked).items()}
    found: list[tuple[str, dict[str, list[str]]]] = [(f"{text}, mask {n}", {}) for n in range(1, int(masked.sum()) + 1)]
    for name, best in by_name.items():
        for (_, rows), shares, tokens in zip(found, *map(Tensor.tolist, best), strict=True):
            pieces = tokenizer.convert_ids_to_tokens(tokens)  # None beyond the tokenizer's vocabulary
            rows[name] = [f"{s:6.1%}  {piece or '(no token)'}" for s, piece in zip(shares, pieces, strict=True)]
    return found


def logits_at_masks(model: Objective, ids: Tensor, masked: Tensor) -> dict[str, Tensor]:
    """By name ``[M, V]``, of rows ``[B, L]``: all that an objective would score, as it calls `Objective.mlm_terms`."""
    labels = torch.where(masked, ids, -100)
    batch = flattened(model.backbone, ids, torch.ones_like(ids), labels)
    batch |= before_masking(batch)
    found: dict[str, Tensor] = {}
    mlm_terms = model.mlm_terms

    def watched(streams: Any, score: bool) -> Any:
        for name, (states, _, _) in streams.items():
            at = states if len(states) == int(masked.sum()) else states[batch["masked_index"]]
            found[name] = logits_of(model.backbone.transform(at), model.backbone.decoder)
        return mlm_terms(streams, score)

    model.mlm_terms = watched  # type: ignore[method-assign]
    try:
        with at_rest(model):
            model.losses(batch)
    finally:
        del model.mlm_terms
    return found


def read(model: Objective, tokenizer: Any, text: str) -> Any:
    """Ids and mask of what the model takes of a text ``[1, L]``."""
    return tokenizer(text, return_tensors="pt", truncation=True, max_length=longest_text(model.lm.config) or MANY)


def attention(model: Objective, tokenizer: Any, text: str) -> tuple[list[str], Tensor]:
    """The tokens of a text, and how much of [CLS]'s attention each has, by layer ``[N, L]``, as the mean over heads."""
    rows = read(model, tokenizer, text)
    of_layers = cls_attention(model.lm, rows["input_ids"], rows["attention_mask"])
    tokens = tokenizer.convert_ids_to_tokens(rows["input_ids"][0].tolist())
    return tokens, torch.stack([each[0].mean(0) for each in of_layers])


def strongest(tokens: list[str], weights: Tensor, top: int) -> Any:
    rows = []
    for depth, of_layer in enumerate(weights, start=1):
        shares, places = of_layer.topk(min(top, len(tokens)))
        named = zip(places.tolist(), shares.tolist(), strict=True)
        rows.append((str(depth), ", ".join(f"{tokens[place]} {share:.0%}" for place, share in named)))
    return table(("layer", "[CLS] attends to"), rows, justify="left")


def draw_attention(tokens: list[str], weights: Tensor) -> Any:
    """A figure: a row for each layer, the first at the bottom, a column for each token."""
    from matplotlib.figure import Figure

    n_layers = len(weights)
    figure = Figure(figsize=(2 + 0.3 * len(tokens), 1.4 + 0.3 * n_layers), layout="constrained")
    axes = figure.add_subplot(ylabel="layer", title="attention of [CLS], mean over heads")
    image = axes.imshow(weights.numpy(), origin="lower", aspect="auto", cmap="Blues", vmin=0)
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(n_layers), [str(depth) for depth in range(1, n_layers + 1)])
    figure.colorbar(image, label="share of the attention")
    return figure


def gibbs(model: Objective, tokenizer: Any, n: int, length: int, sweeps: int, temperature: float, seed: int) -> Tensor:
    """Texts ``[n, length + 2]``: all tokens masked at first, then one after the other, in a new order every sweep, is
    masked and drawn from what the MLM head predicts there. Special tokens are not drawn."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(special_ids(tokenizer))
    first, *_, last = tokenizer("")["input_ids"]
    ids = torch.tensor([[first, *[tokenizer.mask_token_id] * length, last]] * n)
    steps = [1 + torch.randperm(length, generator=generator) for _ in range(sweeps)]
    with at_rest(model):
        console = Console(file=sys.stderr)
        for place in track(torch.cat(steps).tolist(), "sampling", console=console, disable=not console.is_terminal):
            ids[:, place] = tokenizer.mask_token_id
            logits = model.lm(input_ids=ids).logits[:, place] / temperature
            logits[:, special] = -torch.inf
            ids[:, place] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return ids
