"""Every family of backbones: states, losses and gradients are those of Hugging Face's own modules, dense and padded."""

import inspect
import itertools
from contextlib import nullcontext
from functools import partial
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from conftest import error_of, fit, slow
from test_model import tiny_batch, tiny_config
from test_objectives import close
from torch import nn
from torch.nn.attention import varlen
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from condenser.cli import main
from condenser.evaluation.probes import cls_attention_entropy
from condenser.hub import load_export
from condenser.models import attention, dropout
from condenser.models.backbones.base import backbone_of, depths, longest_text, prepare_layers
from condenser.models.cocondenser import CoCondenser
from condenser.models.condenser import Condenser
from condenser.models.flops import Sizes
from condenser.models.losses import pair_losses, pair_scores
from condenser.models.padded import before_masking, flattened
from condenser.models.positions import extended, with_positions
from condenser.models.pretraining import CondenserForPreTraining
from condenser.models.retromae import RetroMAE
from condenser.runs import checkpoints
from condenser.training.passes import inputs_of, pass_loss


def distilbert(dropout):
    names = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48, "attention_dropout": 0.0, "dropout": dropout}
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=90, max_position_embeddings=40, **names))


def electra(dropout, width):
    dry = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0, "embedding_size": width}
    return ElectraForMaskedLM(tiny_config(ElectraConfig, **dry))


def modernbert(dropout, **settings):
    """A full layer, two that see 4 tokens to either side, and so on; the last sees a window in some."""
    names = dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), dropout)
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    special = dict.fromkeys(("bos_token_id", "cls_token_id", "sep_token_id", "eos_token_id"), 3) | {"pad_token_id": 1}
    more = {"max_position_embeddings": 40, "local_attention": 8, "num_hidden_layers": 4, **settings}
    return ModernBertForMaskedLM(ModernBertConfig(**sizes, **special, **names, **more))


def albert(dropout, **settings):
    dry = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0, "embedding_size": 16}
    return AlbertForMaskedLM(tiny_config(AlbertConfig, **dry, **settings))


def mpnet(dropout):
    dry = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1}
    return MPNetForMaskedLM(tiny_config(MPNetConfig, **dry))


def deberta(dropout, **settings):
    dry = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    return DebertaV2ForMaskedLM(tiny_config(DebertaV2Config, **dry, **settings))


V3 = {  # as its published models are, in small
    "relative_attention": True,
    "position_buckets": 6,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
V2 = {"relative_attention": True, "max_relative_positions": 7, "pos_att_type": "c2p|p2c", "embedding_size": 16}

FAMILIES = {
    "deberta": deberta,
    "deberta, version 2": lambda dropout: deberta(dropout, **V2),
    "deberta, version 3": lambda dropout: deberta(dropout, **V3),
    "albert": albert,
    "albert, two groups": lambda dropout: albert(dropout, num_hidden_groups=2),
    "mpnet": mpnet,
    "distilbert": distilbert,
    "electra": lambda dropout: electra(dropout, 16),
    "electra, wide": lambda dropout: electra(dropout, 32),
    "modernbert": modernbert,
    "modernbert, window last": lambda dropout: modernbert(
        dropout, num_hidden_layers=5, attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True
    ),
}
MODELS = FAMILIES | {
    "albert, layers in pairs": lambda dropout: albert(dropout, inner_group_num=2),
    "modernbert, windows alone": lambda dropout: modernbert(dropout, layer_types=["sliding_attention"] * 4),
    "bert": lambda dropout: BertForMaskedLM(tiny_config(BertConfig)),
    "roberta": lambda dropout: RobertaForMaskedLM(tiny_config(RobertaConfig)),
}
family = pytest.mark.parametrize("family", FAMILIES)
OFTEN = ("deberta, version 3", "modernbert, window last")
SOME = [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in FAMILIES]
some = pytest.mark.parametrize("family", SOME)
HEADS = {  # Hugging Face's MLM head, states to logits
    "distilbert": lambda lm, h: lm.vocab_projector(lm.vocab_layer_norm(lm.activation(lm.vocab_transform(h)))),
    "electra": lambda lm, h: lm.generator_lm_head(lm.generator_predictions(h)),
    "modernbert": lambda lm, h: lm.decoder(lm.head(h)),
    "albert": lambda lm, h: lm.predictions(h),
    "mpnet": lambda lm, h: lm.lm_head(h),
    "deberta-v2": lambda lm, h: lm.cls(h),
    "bert": lambda lm, h: lm.cls(h),
    "roberta": lambda lm, h: lm.lm_head(h),
}
LAYERS = {  # Hugging Face's layer over padded rows [B, L, H], where mask [B, 1, 1, L] is true, if it is not just that
    "modernbert": lambda lm, layer, h, mask: layer(h, mask, turns_of(lm, h)),
    "mpnet": lambda lm, layer, h, mask: layer(h, bias_of(mask), lm.mpnet.encoder.compute_position_bias(h))[0],
    "deberta-v2": lambda lm, layer, h, mask: layer(
        h,
        mask & mask.mT,
        relative_pos=lm.deberta.encoder.get_rel_pos(h),
        rel_embeddings=lm.deberta.encoder.get_rel_embedding(),
    )[0],
}


def bias_of(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def turns_of(lm, h):
    return lm.model.rotary_emb(h, torch.arange(h.shape[1])[None], min(lm.config.layer_types))


def normed(lm, h):
    """What comes after the last layer."""
    return lm.model.final_norm(h) if kind(lm) == "modernbert" else h


def lm_of(name, dropout=0.0):
    torch.manual_seed(0)
    lm = MODELS[name](dropout).double().eval()
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(3.0)  # attention is far from even
    return lm


def kind(lm):
    return lm.config.model_type


def states_of(lm, batch, skip_from):
    """Embeddings, early and late states by Hugging Face's forward pass."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    every = lm.base_model(**inputs, output_hidden_states=True).hidden_states
    return every[skip_from], every[-1]


def dense_condenser(model, batch):
    """Late and head losses, every position of every row computed, and the late states."""
    early, late = states_of(model.lm, batch, model.skip_from)
    head = torch.cat([late[:, :1], early[:, 1:]], dim=1)
    run = LAYERS.get(kind(model.lm), lambda lm, layer, h, mask: layer(h, mask))
    for layer in model.c_head:
        head = run(model.lm, layer, head, batch["attention_mask"][:, None, None].bool())
    logits = (HEADS[kind(model.lm)](model.lm, states) for states in (late, normed(model.lm, head)))
    losses = [F.cross_entropy(each.flatten(0, 1), batch["labels"].flatten()) for each in logits]
    return losses, late


def rounding(family):
    """Hugging Face turns ModernBERT's queries and keys in fp32, and divides DeBERTa's scores by a number in fp32."""
    return 1e-7 if family.startswith(("modernbert", "deberta")) else 1e-10


def gradients_of(loss, model):
    found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


@pytest.mark.parametrize("family", MODELS)
def test_a_configuration_says_how_many_layers_are_run(family):
    lm = lm_of(family)
    assert (
        Sizes.of(lm.config).layers == len(backbone_of(lm).layers) == len(states_of(lm, tiny_batch(), slice(1, None))[0])
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("pruned", [True, False])
def test_condensers_losses_and_gradients_are_those_of_whole_padded_rows(family, pruned):
    lm, batch = lm_of(family), tiny_batch()
    model = Condenser(lm, skip_from=2, pruned=pruned).double().eval()
    out = model(**batch)
    (late, head), states = dense_condenser(model, batch)
    assert out.mlm_loss.item() == pytest.approx(late.item(), rel=rounding(family))
    assert out.head_mlm_loss.item() == pytest.approx(head.item(), rel=rounding(family))
    assert late.item() == pytest.approx(lm(**batch).loss.item(), rel=1e-6)  # theirs, of which some are in fp32
    if not pruned:
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(out.last_hidden_state[real], states[real])
    found, expected = gradients_of(out.loss, model), gradients_of(late + head, model)
    assert all(gradient.any() for gradient in expected[:3])
    close(found, expected, rounding(family))


def one_by_one(query, key, value, queries, keys, scale=None, window=None):
    """Torch's attention of each sequence over itself, in one matrix, which compilers take."""
    row, column = (torch.arange(len(each)) for each in (query, key))
    mask = torch.bucketize(row, queries, right=True)[:, None] == torch.bucketize(column, keys, right=True)
    mask = mask if window is None else mask & ((row[:, None] - column).abs() <= window)
    heads = (each.transpose(0, 1) for each in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale).transpose(0, 1)


@pytest.fixture
def kernels(monkeypatch):
    """Where a GPU would run a kernel its stand-in is run, and noted by name."""
    ran = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        window = None if window_size == (-1, -1) else window_size[0]
        assert window is None or cu_seq_q is cu_seq_k  # else it counts queries from the end
        if not torch.compiler.is_compiling():
            assert cu_seq_q.diff().max() <= max_q
            assert cu_seq_k.diff().max() <= max_k
            ran.append("varlen" if window is None else "window")
        return one_by_one(query, key, value, cu_seq_q, cu_seq_k, scale, window)

    def short_attention(states, bounds):
        if not torch.compiler.is_compiling():
            ran.append("short")
        return one_by_one(*states.unbind(1), bounds, bounds)

    assert {*inspect.signature(varlen_attn).parameters} <= {*inspect.signature(varlen.varlen_attn).parameters}
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "short_attention", short_attention)
    return ran


BY_KERNELS = [(family, Condenser, False) for family in MODELS]
BY_KERNELS += [("bert", RetroMAE, True), ("modernbert", Condenser, True), ("modernbert, window last", RetroMAE, True)]


@pytest.fixture
def by_kernels(family, objective, is_short, monkeypatch):
    options = {"skip_from": 2} if objective is Condenser else {}
    monkeypatch.setattr(attention, "has_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "is_short", lambda *_: is_short)
    return CondenserForPreTraining.of(objective(lm_of(family), **options).double()).eval()


@pytest.mark.parametrize(("family", "objective", "is_short"), BY_KERNELS)
def test_by_kernels_that_take_sequences_as_they_lie_all_is_the_same(family, is_short, by_kernels, kernels, monkeypatch):
    batch, found = tiny_batch(length=37), []
    for on_gpu in (False, True):
        assert not kernels
        monkeypatch.setattr(attention, "has_kernel", lambda *_, on_gpu=on_gpu: on_gpu)
        loss = by_kernels(**batch).loss
        found.append([loss, *gradients_of(loss, by_kernels)])
    assert bool(kernels) == by_kernels.model.backbone.has_kernel
    close(*found)
    assert ("short" in kernels) == is_short
    assert ("window" in kernels) == family.startswith("modernbert")


@pytest.mark.parametrize(("family", "objective", "is_short"), [slow(*each) for each in BY_KERNELS[-4:]])
def test_and_with_them_a_pass_is_one_graph(by_kernels, kernels):
    fields = flattened(by_kernels.model.backbone, *tiny_batch(length=37).values())
    inputs, losses = inputs_of(fields | before_masking(fields)), by_kernels.model.losses
    torch._dynamo.reset()
    compiled = torch.compile(losses, dynamic=False, fullgraph=True, backend="eager")(inputs)
    assert not kernels
    for name, term in losses(inputs).items():
        assert compiled[name].sum.item() == pytest.approx(term.sum.item())


@family
@pytest.mark.parametrize("objective", [Condenser, RetroMAE])
def test_padding_before_a_text_changes_nothing_where_positions_are_not_embedded(family, objective):
    lm, batch = lm_of(family), tiny_batch()
    for name, weight in lm.named_parameters():
        if "position_embeddings" in name:
            nn.init.zeros_(weight)
    model = (
        CondenserForPreTraining.of(objective(lm, **({"skip_from": 2} if objective is Condenser else {})))
        .double()
        .eval()
    )
    n_pads = (1 - batch["attention_mask"]).sum(1).tolist()
    assert max(n_pads) > 2
    before = {
        name: torch.stack([row.roll(n) for row, n in zip(rows, n_pads, strict=True)]) for name, rows in batch.items()
    }
    assert model(**before).loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-10)


@family
def test_cocondensers_contrast_is_over_hugging_faces_cls(family):
    batch = {name: values[:4] for name, values in tiny_batch().items()}
    model = CoCondenser(lm_of(family), skip_from=2).double().eval()
    fields = flattened(model.backbone, *(batch[name] for name in ("input_ids", "attention_mask", "labels")))
    cls, terms = model.cls_and_losses(fields)
    losses, late = dense_condenser(model, batch)
    torch.testing.assert_close(cls, late[:, 0])
    torch.testing.assert_close(model.cls_states(fields), late[:, 0])
    contrasts = [pair_losses(pair_scores(vectors))[0].sum() for vectors in (cls, late[:, 0])]
    found = contrasts[0] + sum(term.sum for term in terms.values()) / fields["n_masked"]
    close(gradients_of(found, model), gradients_of(contrasts[1] + sum(losses), model), rounding(family))


OWN = {  # where a layer has its attention; the names of its projections and of the number of its heads
    "distilbert": ("attention", "q_lin", "k_lin", "v_lin", "n_heads"),
    "albert": ("attention", "query", "key", "value", "num_attention_heads"),
    "mpnet": ("attention.attn", "q", "k", "v", "num_attention_heads"),
    "deberta-v2": ("attention.self", "query_proj", "key_proj", "value_proj", "num_attention_heads"),
}
ATTENDED = {  # a layer's states after attention
    "distilbert": lambda layer, context, h: layer.sa_layer_norm(layer.attention.out_lin(context) + h),
    "modernbert": lambda layer, context, h: h + layer.attn.Wo(context),
    "albert": lambda layer, context, h: layer.attention.LayerNorm(h + layer.attention.dense(context)),
    "mpnet": lambda layer, context, h: layer.attention.LayerNorm(layer.attention.attn.o(context) + h),
}
REST = {  # and what it does with them
    "distilbert": lambda layer, h: layer.output_layer_norm(layer.ffn(h) + h),
    "modernbert": lambda layer, h: h + layer.mlp(layer.mlp_norm(h)),
    "albert": lambda layer, h: layer.full_layer_layer_norm(layer.ff_chunk(h) + h),
}


def attention_of(lm, layer):
    """Query, key and value projections, the number of heads, and what a layer does after attention."""
    attended = ATTENDED.get(kind(lm), lambda layer, context, h: layer.attention.output(context, h))
    rest = REST.get(kind(lm), lambda layer, h: layer.output(layer.intermediate(h), h))

    def after(context, h):
        return normed(lm, rest(layer, attended(layer, context, h)))

    if kind(lm) == "modernbert":
        joined = layer.attn.Wqkv
        biases = (None,) * 3 if joined.bias is None else joined.bias.chunk(3)
        parts = [partial(F.linear, weight=w, bias=b) for w, b in zip(joined.weight.chunk(3), biases, strict=True)]
        return *(lambda h, part=part: part(layer.attn_norm(h)) for part in parts), lm.config.num_attention_heads, after
    path, *names = OWN.get(kind(lm), ("attention.self", "query", "key", "value", "num_attention_heads"))
    return *attrgetter(*names)(attrgetter(path)(layer)), after


def positions_of(lm, n):
    """What stands for positions in the states before the first layer."""
    if getattr(lm.base_model.embeddings, "position_embeddings", None) is None:
        return torch.zeros(n, lm.config.hidden_size)
    first = 2 if kind(lm) in ("mpnet", "roberta") else 0
    states = lm.base_model.embeddings.position_embeddings.weight[first : first + n]
    return states if widening_of(lm) is None else F.linear(states, widening_of(lm).weight)


def widening_of(lm):
    if kind(lm) == "albert":
        return lm.albert.encoder.embedding_hidden_mapping_in
    if kind(lm) == "deberta-v2":
        return lm.deberta.embeddings.embed_proj
    return getattr(lm.base_model, "embeddings_project", None)


def embeddings_of(lm, ids):
    states = lm.base_model.embeddings(ids)
    within = kind(lm) == "deberta-v2"  # its embeddings widen themselves
    return states if widening_of(lm) is None or within else widening_of(lm)(states)


@pytest.mark.parametrize(("family", "pruned"), [*((family, True) for family in MODELS), ("bert", False)])
def test_retromaes_decoder_is_the_papers_over_hugging_faces_modules(family, pruned):
    """The encoder reads other tokens than are to be predicted; special ones are read and not predicted."""
    model, batch = RetroMAE(lm_of(family), pruned=pruned).double().eval(), tiny_batch()
    fields = flattened(model.backbone, *(batch[name] for name in ("input_ids", "attention_mask", "labels")))
    fields["keys"] = torch.arange(5) * 7919 + 1
    original, bounds = 5 + 3 * fields["input_ids"] % 85, fields["cu_seqlens"]
    original[bounds[:-1]] = original[bounds[1:] - 1] = -100
    fields["original_ids"] = original
    text = torch.where(original < 0, fields["input_ids"], original)
    query, key, value, n_heads, after = attention_of(model.lm, model.decoder)
    cls, terms = model.cls_and_losses(fields)
    expected = torch.zeros(())
    for row, (first, end) in enumerate(itertools.pairwise(bounds.tolist())):
        n, ids = end - first, text[first:end]
        h1 = cls[row] + positions_of(model.lm, n)
        h2 = torch.cat([cls[row][None], embeddings_of(model.lm, ids[None])[0, 1:]])
        rows = type("Rows", (), {"longest": n, "mask": torch.ones(1, 1, 1, n, dtype=torch.bool)})
        seen = model.seen(fields["keys"][row : row + 1], rows)[0, 0]
        q, k, v = (part(h).view(n, n_heads, -1) for part, h in ((query, h1), (key, h2), (value, h2)))
        if kind(model.lm) == "modernbert":
            q, k = apply_rotary_pos_emb(q[None], k[None], *turns_of(model.lm, h1[None]), unsqueeze_dim=2)
            q, k = q[0], k[0]
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        if kind(model.lm) == "mpnet":
            scores = scores + model.lm.mpnet.encoder.compute_position_bias(h1[None])[0]
        if kind(model.lm) == "deberta-v2" and model.lm.config.relative_attention:
            encoder, factor = model.lm.deberta.encoder, 3
            scores = scores / factor**0.5 + model.decoder.attention.self.disentangled_attention_bias(
                *(part.transpose(0, 1) for part in (q, k)),
                encoder.get_rel_pos(h1[None]),
                encoder.get_rel_embedding(),
                factor,
            )
        share = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = after(torch.einsum("hij,jhd->ihd", share, v).flatten(1), h1)
        logits = HEADS[kind(model.lm)](model.lm, out[1:])
        expected = expected + F.cross_entropy(logits, original[first + 1 : end], reduction="sum")
    assert terms["decoder"].sum.item() == pytest.approx(expected.item(), rel=rounding(family))
    close(gradients_of(terms["decoder"].sum, model), gradients_of(expected, model), rounding(family))


@family
def test_dropout_is_where_hugging_face_has_it(family, monkeypatch):
    """As many draws of as many values, so that the same seed drops the same ones in one row without padding."""
    monkeypatch.setattr(dropout, "drawn", lambda shape, p: F.dropout(torch.ones(shape).double(), p) > 0)
    lm, batch = lm_of(family, dropout=0.3), tiny_batch(rows=1)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"].clamp_(min=5)  # no padding
    model = Condenser(lm, n_head_layers=0, pruned=False).double().train()
    torch.manual_seed(5)
    ours = model(**batch).last_hidden_state
    torch.manual_seed(5)
    theirs = lm.base_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(ours, theirs)
    assert model.has_dropout


@family
def test_what_cls_attends_to_is_probed_in_every_layer(family):
    lm, batch = lm_of(family).float(), tiny_batch()
    nats, normalised = cls_attention_entropy(lm, batch["input_ids"], batch["attention_mask"])
    assert len(nats) == lm.config.num_hidden_layers
    assert ((nats > 0) & (normalised < 1)).all()


@pytest.mark.parametrize("settings", [{"conv_kernel_size": 3}, {"legacy": False}])
def test_what_a_family_cannot_do_is_said(settings):
    with pytest.raises(ValueError, match=f"deberta-v2 with .*{next(iter(settings))}"):
        backbone_of(deberta(0.0, **settings))


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query", "absolute"])
def test_a_backbone_whose_positions_transformers_leaves_out_is_refused(kind, tmp_path):
    BertForMaskedLM(tiny_config(position_embedding_type=kind)).save_pretrained(tmp_path)
    refused = pytest.raises(ValueError, match=f"position_embedding_type='{kind}'")
    with nullcontext() if kind == "absolute" else refused:
        CondenserForPreTraining.from_pretrained(tmp_path, skip_from=1)


def test_an_unlisted_model_is_refused_with_the_list_and_where_a_family_is_added():
    lm = FAMILIES["distilbert"](0.0)
    lm.config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"'gpt2' is not supported; choose one of: albert, bert, .*docs/backbones.md"):
        backbone_of(lm)


@family
def test_weights_are_frozen_drawn_anew_and_ranked_by_depth(family):
    lm = lm_of(family)
    if backbone_of(lm).shares_layers:
        assert sorted({*depths(lm).values()}) == [0, 1, 2]
        for settings in ({"freeze_layers": 1, "reinit_layers": 0}, {"freeze_layers": 0, "reinit_layers": 1}):
            with pytest.raises(ValueError, match="share their weights"):
                prepare_layers(lm, freeze_embeddings=False, **settings)
        prepare_layers(lm, freeze_embeddings=True, freeze_layers=0, reinit_layers=0)
        assert all(not p.requires_grad for module in backbone_of(lm).below for p in module.parameters())
        return
    found, n = depths(lm), len(backbone_of(lm).layers)
    (words,) = (p for p in lm.parameters() if p is backbone_of(lm).decoder.weight)
    assert found[words] == n + 1
    assert {*found.values()} == {*range(n + 2)}
    assert all(found[p] == n + 1 for module in backbone_of(lm).below for p in module.parameters())
    of_layers = ("final_norm", "rel", "encoder.LayerNorm")  # of all layers, as near as the last
    head = [name for name, p in lm.named_parameters() if found[p] == 0 and not any(part in name for part in of_layers)]
    assert head
    assert not any(name.startswith(lm.base_model_prefix) for name in head)
    before = {name: p.clone() for name, p in lm.named_parameters()}
    prepare_layers(lm, freeze_embeddings=True, freeze_layers=1, reinit_layers=2)
    frozen = {name for name, p in lm.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in lm.named_parameters() if found[p] in (n, n + 1)}
    changed = {name for name, p in lm.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if name.endswith("weight")} >= {
        name for name, p in lm.named_parameters() if found[p] in (1, 2) and p.ndim == 2
    }
    assert changed <= {name for name, p in lm.named_parameters() if found[p] in (1, 2)}


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("modernbert, window last", Condenser),
        ("distilbert", Condenser),
        ("electra", RetroMAE),
        ("modernbert", RetroMAE),
        ("deberta, version 3", CoCondenser),
    ],
)
@pytest.mark.slow
def test_compiled_and_in_bf16_a_pass_is_the_same(family, objective):
    lm, batch = lm_of(family).float(), tiny_batch()
    model = objective(lm, **({} if objective is RetroMAE else {"skip_from": 2})).float()
    fields = flattened(model.backbone, *(batch[name] for name in ("input_ids", "attention_mask", "labels")))
    fields |= {"keys": torch.arange(5) * 7919 + 1, "original_ids": fields["input_ids"]}
    inputs, scale = inputs_of(fields | {"slots": torch.arange(5)}), torch.full((4,), 0.01)
    losses = [pass_loss(model, inputs, scale, True).loss]
    torch._dynamo.reset()
    compiled = torch.compile(pass_loss, dynamic=False, fullgraph=True, backend="aot_eager")
    losses.append(compiled(model, inputs, scale, True).loss)
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(pass_loss(model, inputs, scale, True).loss)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert losses[2].item() == pytest.approx(losses[0].item(), rel=3e-2)


@some
def test_from_text_to_an_export_that_others_load(family, store, recipe, tmp_path, capsys):
    """With the settings of a recipe for BERT; then training goes on from the export, head included."""
    lm = FAMILIES[family](0.0)
    lm.resize_token_embeddings(200)
    lm.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(store / "tokenizer").save_pretrained(tmp_path / "start")
    settings = "{attention_probs_dropout_prob: 0.0}"
    options = ["--model.backbone_config", settings, "--trainer.max_steps", "3", "--trainer.val_check_interval", "3"]
    assert fit(recipe, tmp_path, "one", *options, "--model.backbone", str(tmp_path / "start")) == 0
    export = tmp_path / "export"
    assert main(["export", str(tmp_path / "one"), "--output", str(export)]) == 0
    trained = load_export(export)
    encoder = AutoModel.from_pretrained(export)
    masked = AutoModelForMaskedLM.from_pretrained(export)
    batch = tiny_batch()
    with torch.no_grad():
        states = masked.base_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        again = encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        ours = trained.eval()(**batch)
    torch.testing.assert_close(again, states)
    torch.testing.assert_close(ours.mlm_loss, masked.eval()(**batch).loss, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert fit(recipe, tmp_path, "two", *options, "--model.backbone", str(export)) == 0
    assert "begins with random weights" not in capsys.readouterr().out
    start = torch.load(checkpoints(tmp_path / "two")[0], weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in start} >= {*dict(trained.named_parameters())}


# --- more positions


@some
@pytest.mark.parametrize("extension", ["hierarchical", "interpolated", "copied"])
def test_a_backbone_takes_longer_texts_and_short_ones_as_before(family, extension):
    lm, batch = lm_of(family), tiny_batch()
    larger = with_positions(lm, 90, extension).eval()
    assert longest_text(larger.config) == 90
    assert {name for name, p in larger.named_parameters()} == {name for name, p in lm.named_parameters()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before, after = (each(**inputs).logits for each in (lm, larger))
    real = batch["attention_mask"].bool()
    same = torch.allclose(before[real], after[real])
    embeds = getattr(lm.base_model.embeddings, "position_embeddings", None) is not None
    assert same == (extension != "interpolated" or not embeds)
    batch = tiny_batch(rows=2, length=90)
    out = Condenser(larger, skip_from=2).double().eval()(**batch)
    assert out.mlm_loss.item() == pytest.approx(larger(**batch).loss.item(), rel=1e-6)


def test_positions_are_those_of_their_definitions():
    trained = torch.randn(4, 3, dtype=torch.float64)
    found = extended(trained, 14, "hierarchical")
    parts = (trained - 0.4 * trained[0]) / 0.6
    for number in range(14):
        i, j = divmod(number, 4)
        torch.testing.assert_close(found[number], 0.4 * parts[i] + 0.6 * parts[j])
    assert torch.equal(found[:4], trained)
    assert torch.equal(extended(trained, 10, "copied"), trained[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])
    between = extended(trained, 7, "interpolated")
    torch.testing.assert_close(between[::2], trained)
    torch.testing.assert_close(between[1], (trained[0] + trained[1]) / 2)


@pytest.mark.parametrize(
    ("n", "extension", "message"),
    [(39, "copied", "takes 40"), (1601, "hierarchical", "at most 1444"), (50, "x", "'x'")],
)
def test_positions_that_cannot_be_made_are_refused(n, extension, message):
    with pytest.raises(ValueError, match=message):
        with_positions(lm_of("mpnet" if n > 1600 else "distilbert"), n, extension)


def test_a_run_over_longer_rows_goes_on_and_is_exported_with_its_positions(roberta, recipe, corpus, tmp_path, capsys):
    """RoBERTa's positions begin at 2."""
    source = ["--input", str(corpus), "--tokenizer", str(roberta), "--output", str(tmp_path / "rows"), "--workers", "1"]
    assert main(["prepare", *source, "--max-length", "64"]) == 0
    options = ["--model.backbone", str(roberta), "--model.backbone_config", "{}", "--data.batch_size", "8"]
    options += ["--data.store", str(tmp_path / "rows")]
    assert "rows of up to 64 tokens" in error_of(capsys, fit(recipe, tmp_path, "short", *options))
    options += ["--model.max_positions", "64"]
    for steps in (4, 8):
        assert fit(recipe, tmp_path, "long", *options, "--trainer.max_steps", str(steps)) == 0
    assert main(["export", str(tmp_path / "long"), "--output", str(tmp_path / "export")]) == 0
    exported = AutoModel.from_pretrained(tmp_path / "export")
    assert len(load_export(tmp_path / "export").c_head) == 2
    assert exported.embeddings.position_embeddings.weight.shape[0] == exported.config.max_position_embeddings == 66
