"""coCondenser and RetroMAE: the authors' numbers, the papers' equations, and the same step however it is computed."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TINY_MODEL, error_of, fit
from test_model import load_case
from test_training import STOP, assert_minimised, assert_same_weights, final_state, metrics_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from condenser.cli import main
from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, StepBatch, Vocabulary
from condenser.data.pairs import Pairs, cut_pairs
from condenser.data.steps import Steps
from condenser.data.store import TokenStore
from condenser.data.tokenizers import load_tokenizer
from condenser.evaluation.probes import probe_store, sample_batches
from condenser.hub import load_checkpoint, load_export
from condenser.models.cocondenser import CoCondenser
from condenser.models.flops import Work
from condenser.models.losses import pair_losses, pair_measures, pair_scores
from condenser.models.objective import COUNTS, Objective, Term
from condenser.models.padded import flattened
from condenser.models.retromae import DupMAE, RetroMAE
from condenser.runs import checkpoints
from condenser.training.passes import inputs_of
from condenser.training.step import TrainingStep
from condenser.training.validation import Validation

GOLDEN = Path(__file__).parent / "golden" / "cocondenser-4layer.safetensors"


def golden(**settings):
    model, meta, tensors = load_case(GOLDEN, CoCondenser, **settings)
    fields = flattened(model.backbone, *(tensors[f"inputs.{n}"] for n in ("input_ids", "attention_mask", "labels")))
    return model, meta, tensors, fields


def host(fields, first, n, pairs=None):
    """A part of a golden batch as one pass of a step of all its rows."""
    places = torch.arange(first, first + n) if pairs is None else pairs
    return {"slots": places, "step": 0, "micro_batch": first, **fields}


class Golden(StepBatch):
    """Passes that are given, of a step of so many sequences."""

    def __init__(self, passes, n_sequences):
        super().__init__(torch.empty(0), passes, n_sequences)

    def __iter__(self):
        return iter(self.layout)


@pytest.mark.parametrize("way", ["one pass", "four passes", "four passes, all kept", "one pass, cached"])
@pytest.mark.parametrize("pruned", [True, False])
def test_cocondensers_losses_and_gradients_are_those_of_the_authors_code(pruned, way):
    """Rows 0, 2, ... and 1, 3, ... of a pass are of other passes' siblings, where there are several."""
    model, meta, tensors, fields = golden(pruned=pruned)
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])
    inputs = {n: tensors[f"inputs.{n}"][order] for n in ("input_ids", "attention_mask", "labels")}
    n_passes = 4 if way.startswith("four") else 1
    passes = []
    for some in torch.arange(8).chunk(n_passes):
        flat = flattened(model.backbone, *(inputs[n][some] for n in ("input_ids", "attention_mask", "labels")))
        passes.append(host(flat, int(some[0]), len(some), order[some]))
    cls, _ = model.cls_and_losses(fields)
    torch.testing.assert_close(cls, tensors["expected.cls"], rtol=1e-4, atol=1e-5)
    cached = {"one pass, cached": True, "four passes, all kept": False}.get(way)
    step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.0), gradient_cache=cached)
    scale = torch.tensor([1 / fields["n_masked"], 1.0, 1 / 8, 1.0])
    found = step.passes(Golden(passes, 8), scale, score=True)
    assert found.losses.sum().item() == pytest.approx(float(meta["loss"]), rel=1e-5)
    assert found.shares["contrast_loss"].item() == pytest.approx(float(meta["contrastive_loss"]), rel=1e-5)
    both = found.shares["mlm_loss"] + found.shares["head_mlm_loss"]
    assert both.item() == pytest.approx(float(meta["mlm_loss"]), rel=1e-5)
    for name, weight in model.named_parameters():
        expected = tensors[f"grads.{name}"]
        assert (weight.grad - expected).norm() <= 1e-3 * expected.norm() + 1e-4, name


# --- pairs


@pytest.fixture(scope="module")
def pairs(spans):
    return Pairs([TokenStore(spans, "train")], seed=3, span_length=12)


def texts_of(pairs):
    """The tokens of each document of a store."""
    (store,) = pairs.stores
    rows = store.rows(np.arange(len(store)))
    return np.split(rows.tokens, np.add.reduceat(rows.lengths, pairs.begins).cumsum()[:-1])


def spans_of(pairs, epoch, documents):
    rows, visits, ids = pairs.sequences(epoch, documents)
    return [part.tolist() for part in np.split(rows.tokens, rows.lengths.cumsum()[:-1])], visits, ids


@pytest.mark.parametrize("length", [None, 5, 12, 31])
def test_a_documents_two_spans_are_its_own_do_not_overlap_and_are_drawn_anew(length, spans):
    pairs = Pairs([TokenStore(spans, "train")], seed=3, span_length=length)
    numbers = np.arange(2 * len(pairs))
    found, visits, ids = spans_of(pairs, 4, numbers)
    assert len(set(ids.tolist())) == len(ids)
    assert (visits == 4).all()
    sizes = pairs.tokens(4, np.arange(len(pairs))).ravel()
    assert [len(span) for span in found] == sizes.tolist()
    for number, text in enumerate(texts_of(pairs)):
        text, (one, other) = text.tolist(), found[2 * number : 2 * number + 2]
        places = [
            (i, j + len(other))
            for i in range(len(text))
            for j in range(len(text))
            if text[i : i + len(one)] == one and text[j : j + len(other)] == other
            if i + len(one) <= j or j + len(other) <= i
        ]
        assert places, number
    again, _, _ = spans_of(pairs, 4, numbers[[7, 0, 31]])
    assert again == [found[7], found[0], found[31]]
    assert spans_of(pairs, 5, numbers)[0] != found
    assert spans_of(Pairs(pairs.stores, seed=4, span_length=length), 4, numbers)[0] != found


@pytest.mark.parametrize("length", [2, 3, 8, 32, 128])
def test_cut_spans_have_their_length_or_are_what_a_document_has_at_its_ends(length):
    n = np.concatenate([np.arange(2, 400), np.random.default_rng(0).integers(2, 5000, 5000)])
    begins, sizes = cut_pairs(n, length, np.arange(len(n)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    assert begins.min() >= 0
    assert 1 <= sizes.min() <= sizes.max() <= max(length, 2)
    first = begins.argmin(1)[:, None]
    ends = np.take_along_axis(begins + sizes, first, 1)[:, 0]
    assert (ends <= begins.max(1)).all()
    assert (np.maximum(*(begins + sizes).T) <= n).all()
    short = sizes < length
    assert ((begins == 0) | (begins + sizes == n[:, None]))[short & (n > 3 * length)[:, None]].all()
    least = min(8, -(-length // 4))
    assert (sizes[n > 3 * length] >= least).all()


def test_every_place_of_a_document_is_cut_about_as_often():
    covered, n = np.zeros(200), 20_000
    begins, sizes = cut_pairs(np.full(n, 200), 32, np.random.default_rng(1).integers(0, 2**63, n).astype(np.uint64))
    for begin, size in zip(begins.ravel(), sizes.ravel(), strict=True):
        covered[begin : begin + size] += 1
    middle = covered[16:-16] / covered[16:-16].mean()
    assert (abs(middle - 1) < 0.12).all()


def steps_of(pairs, spans, world_size=1, rank=0, batch_size=16, micro_batches=4, **options):
    batches = BucketedBatches(pairs, batch_size=batch_size, micro_batches_per_step=micro_batches, seed=3, added=2)
    vocabulary = Vocabulary.of(load_tokenizer(spans / "tokenizer"))
    return Steps(pairs, batches, vocabulary, Masking(3), (rank, world_size), **options)


def test_siblings_are_in_one_step_at_neighbouring_slots_and_an_epoch_has_each_document_once(pairs, spans):
    steps = steps_of(pairs, spans)
    seen = []
    for number in range(steps.batches.steps_per_epoch):
        batch = steps[number]
        slots = torch.cat([fields["slots"] for fields in batch])
        ids = torch.cat([fields["sample_ids"] for fields in batch])[slots.argsort()].view(-1, 2)
        assert slots.sort().values.tolist() == list(range(batch.n_sequences))
        assert (ids[:, 0] + 1 == ids[:, 1]).all()
        assert (ids[:, 0] % 2 == 0).all()
        seen += (ids[:, 0] // 2).tolist()
    assert sorted(seen) == list(range(len(pairs)))
    several = [torch.cat([fields["slots"] for fields in steps_of(pairs, spans, 2, rank)[0]]) for rank in range(2)]
    assert any(int(slot) ^ 1 in several[1] for slot in several[0])  # siblings on two ranks


# --- caching


def model_of(family="bert", objective=CoCondenser, dropout=0.1, vocabulary=200, **settings):
    torch.manual_seed(0)
    dry = {**TINY_MODEL, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    if family == "roberta":
        lm = RobertaForMaskedLM(RobertaConfig(vocab_size=vocabulary, **dry, pad_token_id=1))
    else:
        lm = BertForMaskedLM(BertConfig(vocab_size=vocabulary, **dry))
    lm.train()
    if objective is CoCondenser:
        settings = {"skip_from": 1, **settings}
    model = objective(lm, **settings).train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # [CLS] vectors of random weights are all alike
    return model.double()  # rounding is far below what would be wrong


def gradients_of(model, steps, number=0, cached=None, all_reduce=lambda values: values, scale=None):
    batch = steps[number]
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainingStep(model, optimizer, gradient_cache=cached, all_reduce=all_reduce)
    scale = (
        1 / torch.tensor([float(batch.total(name)) for name in COUNTS], dtype=torch.float64) if scale is None else scale
    )
    found = step.passes(batch, scale, score=True)
    return found, [gradient.clone() for gradient in step.gradients]


def norm_of(gradients):
    return torch.stack([gradient.double().norm() for gradient in gradients]).norm()


def close(one, other, share=1e-10):
    assert norm_of([a - b for a, b in zip(one, other, strict=True)]) <= share * norm_of(other)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens_per_pass", [1, 10**6])
@pytest.mark.parametrize(
    "settings",
    [{}, {"pruned": False}, {"n_head_layers": 0, "late_mlm": False}, {"similarity": "cosine", "temperature": 0.1}],
)
def test_cached_gradients_are_those_of_passes_that_are_kept(settings, tokens_per_pass, dropout, pairs, spans):
    model, steps = model_of(dropout=dropout, **settings), steps_of(pairs, spans, tokens_per_pass=tokens_per_pass)
    kept, cached = (gradients_of(model, steps, cached=which) for which in (False, True))
    assert norm_of(kept[1]) > 0.01
    close(cached[1], kept[1])
    assert cached[0].shares["contrast_loss"].item() == pytest.approx(kept[0].shares["contrast_loss"].item(), rel=1e-12)


@pytest.mark.parametrize("filled_up", ["few_shapes", "few_sizes"])
def test_dummies_are_no_part_of_a_contrast(pairs, spans, filled_up):
    model = model_of(dropout=0.0)
    plain, filled = (gradients_of(model, steps_of(pairs, spans, **{filled_up: few})) for few in (False, True))
    close(filled[1], plain[1])
    for name, value in plain[0].shares.items():
        torch.testing.assert_close(filled[0].shares[name], value, rtol=1e-10, atol=1e-12)


def test_several_devices_take_the_step_of_one(pairs, spans):
    """Two devices one after the other: each is given the other's vectors where they would be added up."""
    model = model_of(dropout=0.0)
    alone, gradients = gradients_of(model, steps_of(pairs, spans))
    sums = [[], []]
    for rank in range(2):  # the first time, to see what each would send
        steps = steps_of(pairs, spans, 2, rank)
        gradients_of(model, steps, all_reduce=lambda values, rank=rank: sums[rank].append(values.clone()) or values)
    everything = sums[0][0] + sums[1][0]
    scale = 1 / torch.tensor([float(steps_of(pairs, spans)[0].total(name)) for name in COUNTS], dtype=torch.float64)
    parts = [
        gradients_of(model, steps_of(pairs, spans, 2, rank), all_reduce=lambda values: everything.clone(), scale=scale)
        for rank in range(2)
    ]
    close([a + b for a, b in zip(parts[0][1], parts[1][1], strict=True)], gradients)
    assert parts[0][0].shares["contrast_loss"] == parts[1][0].shares["contrast_loss"]
    assert parts[0][0].shares["contrast_loss"].item() == pytest.approx(alone.shares["contrast_loss"].item(), rel=1e-12)


def test_devices_validate_the_contrast_of_one_where_some_have_fewer_passes(pairs, spans):
    """Six micro-batches, four devices: two have one pass, and repeat another for company."""
    model, nats = model_of(dropout=0.0).eval(), torch.zeros(200)

    def validated(world_size, rank, all_reduce):
        steps = steps_of(pairs, spans, world_size, rank, batch_size=6, micro_batches=6)
        steps.n_everywhere = -(-6 // world_size)
        validation = Validation(model, nats, mask_id=4)
        with torch.no_grad():
            validation.add(steps[0], all_reduce)
        return validation.mean("contrast_loss").compute().item(), [fields["again"] for fields in steps[0]]

    alone, _ = validated(1, 0, lambda values: values)
    sent, again = [], []
    for rank in range(4):
        again += validated(4, rank, lambda values: sent.append(values.clone()) or values)[1]
    assert again.count(True) == 2
    assert validated(4, 3, lambda values: sum(sent))[0] == pytest.approx(alone, rel=1e-12)


class Projected(CoCondenser):
    """Weights of its own in the contrast."""

    def __init__(self, lm, **settings):
        super().__init__(lm, **settings)
        self.project = torch.nn.Linear(lm.config.hidden_size, 7)

    def contrast(self, cls):
        return super().contrast(self.project(cls))


@pytest.mark.parametrize("cached", [False, True])
def test_weights_of_the_contrasts_own_get_their_gradient_once(cached, pairs, spans):
    """However many passes there are: that of the contrast as a plain function of all vectors."""
    model = model_of(objective=Projected, dropout=0.0, skip_from=1)
    (fields,) = steps_of(pairs, spans, tokens_per_pass=10**6)[0]
    vectors = model.cls_states(inputs_of(fields))[fields["slots"].argsort()]
    term = model.contrast(vectors.detach())
    expected = torch.autograd.grad(term.sum / len(vectors), [*model.project.parameters()])
    gradients_of(model, steps_of(pairs, spans), cached=cached)
    close([weight.grad for weight in model.project.parameters()], expected)


def test_the_contrast_alone_trains_no_mlm_head():
    model = model_of(n_head_layers=0, late_mlm=False)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {f"lm.bert.{name}" for name, _ in model.lm.bert.named_parameters()}


class Overridden(CoCondenser):
    def losses(self, batch, score=False):
        return super().losses(batch, score)


class Forgetful(CoCondenser):
    def __init__(self, lm, strength=1.0, **settings):
        super().__init__(lm, **settings)


class Keeps(CoCondenser):
    def __init__(self, lm, act=torch.relu, **settings):
        super().__init__(lm, **settings)
        self.act = act


class Unmade(Objective):
    def __init__(self, lm):
        self.lm = lm


class WithoutFlops(Objective):
    def losses(self, batch, score=False):
        late, _, _ = self.encoded(batch)
        return self.returned(late.sum(1))


class Own(WithoutFlops):
    def flops(self, work):
        return 0.0


def returning(name, returned):
    made = type(name, (Own,), {"returned": staticmethod(returned), "__module__": __name__})
    globals()[name] = made
    return made


RETURNED = {
    "ATensor": (lambda values: values.sum(), "losses must return Terms by name, not tensor("),
    "Nothing": (lambda values: None, "losses must return Terms by name, not None"),
    "NoTerm": (lambda values: {}, "losses returned no term"),
    "Tensors": (lambda values: {"a": values.sum()}, "losses must return Terms by name, not {'a': tensor("),
    "AVector": (lambda values: {"a": Term(values)}, "term 'a': sum must be a tensor that is a scalar, not tensor(["),
    "ANumber": (lambda values: {"a": Term(values.sum().item())}, "term 'a': sum must be a tensor that is a scalar"),
}
for name, (returned, _) in RETURNED.items():
    returning(name, returned)


class WithoutBoth(Objective):
    flops = Own.flops
    contrast = CoCondenser.contrast


def test_only_what_cls_needs_is_computed_for_the_vectors(pairs, spans):
    """Counted: without dropout no head, no vocabulary, and the last layer at [CLS] alone."""
    model, (fields, *_) = model_of(dropout=0.0), steps_of(pairs, spans)[0]
    products = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                products.append(args[-2].shape)
            return function(*args, **(kwargs or {}))

    with Counting(), torch.no_grad():
        vectors = model.cls_states(inputs_of(fields))
    n, n_tokens = len(vectors), fields["n_tokens"]
    layers = len(model.backbone.layers)
    assert [shape[0] for shape in products] == [n_tokens] * 4 * (layers - 1) + [n, n_tokens, n, n, n]
    torch.testing.assert_close(vectors, model.cls_and_losses(inputs_of(fields))[0])


def test_vectors_that_are_all_alike_rank_in_the_middle():
    vectors = torch.ones(8, 4)
    assert pair_measures(vectors, pair_scores(vectors))["contrast_mrr"].item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("scaled", [torch.mul, torch.div])
def test_a_learned_temperature_has_the_gradient_of_the_others_scores(scaled):
    vectors, temperature = torch.randn(6, 5), torch.tensor(0.1, requires_grad=True)
    losses, _ = pair_losses(scaled(pair_scores(vectors, cosine=True), temperature))
    unit = F.normalize(vectors, dim=-1)
    kept = ~torch.eye(6, dtype=torch.bool)
    others = (unit @ unit.T)[kept].view(6, 5)  # row i without i: its sibling is at i, or for odd i at i - 1
    expected = F.cross_entropy(scaled(others, temperature), torch.arange(6) // 2 * 2)
    of_both = (torch.autograd.grad(loss, temperature) for loss in (losses.mean(), expected))
    torch.testing.assert_close(*of_both)


def test_measures_of_pairs_are_those_of_their_definitions():
    vectors = torch.randn(8, 5)
    scores = pair_scores(vectors)
    losses, correct = pair_losses(scores)
    found = pair_measures(vectors, scores)
    unit = F.normalize(vectors, dim=-1)
    ranks, squared, potentials = [], [], []
    for i in range(8):
        others = [j for j in range(8) if j != i]
        dots = {j: float(vectors[i] @ vectors[j]) for j in others}
        assert losses[i].item() == pytest.approx(math.log(sum(map(math.exp, dots.values()))) - dots[i ^ 1], rel=1e-4)
        ranks.append(1 + sum(dot > dots[i ^ 1] for dot in dots.values()))
        assert bool(correct[i]) == (ranks[-1] == 1)
        squared.append(float((unit[i] - unit[i ^ 1]).square().sum()))
        potentials += [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for j in others]
    assert found["contrast_mrr"].item() == pytest.approx(np.mean([1 / rank for rank in ranks]), rel=1e-5)
    assert found["alignment"].item() == pytest.approx(np.mean(squared), rel=1e-4)
    assert found["uniformity"].item() == pytest.approx(math.log(np.mean(potentials)), rel=1e-4)


# --- RetroMAE


class Rows:
    def __init__(self, longest):
        self.longest, self.mask = longest, torch.ones(1, 1, 1, longest, dtype=torch.bool)


@pytest.fixture(scope="module")
def texts(store):
    from condenser.data.mixing import Mixture

    mixture = Mixture([TokenStore(store, "train")], seed=3)
    batches = BucketedBatches(mixture, batch_size=8, micro_batches_per_step=2, seed=3, added=2)
    vocabulary = Vocabulary.of(load_tokenizer(store / "tokenizer"))

    def steps(**options):
        return Steps(mixture, batches, vocabulary, Masking(3, 0.3), extras=RetroMAE.asks, **options)

    return steps


def test_the_decoder_never_sees_the_token_that_it_predicts_and_sees_half_of_the_others(texts):
    """Another token at a position changes the predictions of others there, never its own."""
    model = model_of(objective=RetroMAE, dropout=0.0, decoder_mask_rate=0.5).eval()
    (fields, *_) = texts()[0]
    assert fields["n_ordinary"] == (fields["original_ids"] >= 0).sum()
    inputs = inputs_of(fields)
    cls = model.cls_states(inputs)
    before = model.decoded(inputs, cls)
    n_changed = n_others = 0
    for place in range(1, int(fields["cu_seqlens"][1]) - 1):
        changed = inputs["original_ids"].clone()
        changed[place] = (changed[place] + 7) % 190 + 5
        differs = (model.decoded({**inputs, "original_ids": changed}, cls) != before).any(-1)
        assert not differs[place]
        assert not differs[int(fields["cu_seqlens"][1]) :].any()
        n_changed, n_others = n_changed + int(differs[1:].sum()), n_others + int(fields["cu_seqlens"][1]) - 2
    assert abs(n_changed / n_others - 0.5) < 0.08
    other = model.decoded(inputs, cls.roll(1, 0))
    assert (other != before).any(-1).all()  # all read [CLS]


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_positions_are_seen_at_the_rate_asked_for_each_pair_alike_and_anew_for_each_key(rate):
    model = model_of(objective=RetroMAE, decoder_mask_rate=rate)
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 2**31, 400))
    seen = model.seen(keys, Rows(24))[:, 0].double()
    assert (seen[:, :, 0] == 1).all()
    assert (seen.diagonal(dim1=1, dim2=2)[:, 1:] == 0).all()
    off = ~torch.eye(24, dtype=torch.bool)
    off[:, 0] = False
    share, spread = seen.mean(0)[off], (rate * (1 - rate) / 400) ** 0.5
    assert abs(share.mean() - (1 - rate)) < 5 * spread / len(share) ** 0.5
    assert (abs(share - (1 - rate)) < 5 * spread).all()
    flat = seen[:, off] - (1 - rate)
    correlation = (flat.T @ flat / 400 / (rate * (1 - rate))).fill_diagonal_(0)
    assert abs(correlation).max() < 6.5 / 400**0.5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_dupmaes_bag_of_words_is_the_papers_with_its_gradients(family, texts):
    """Sequence by sequence: the strongest logit of each word over ordinary tokens; the text's words, each alike."""
    model = model_of(family, DupMAE, dropout=0.0).eval()
    for fields in texts()[0]:
        late = model.encoded(inputs_of(fields), pruned=False)[0]
        head = model.lm.lm_head if family == "roberta" else model.lm.cls
        expected = torch.zeros(())
        for first, end in itertools.pairwise(fields["cu_seqlens"].tolist()):
            original = fields["original_ids"][first:end]
            nats = -head(late[first:end][original >= 0]).amax(0).log_softmax(-1)
            words = sorted(set(original[original >= 0].tolist()))
            assert len(words) < (original >= 0).sum() or len(words) < 9
            expected = expected + nats[words].mean()
        terms = model.losses(inputs_of(fields))
        assert terms["bag_of_words"].over == "n_sequences"
        assert terms["bag_of_words"].sum.item() == pytest.approx(expected.item(), rel=1e-10)
        found, wanted = (
            torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
            for loss in (terms["bag_of_words"].sum, expected)
        )
        pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b is not None]
        assert len(pairs) > 30
        close([a for a, _ in pairs], [b for _, b in pairs])


def test_dupmae_is_retromae_and_a_bag_of_words(texts):
    model = model_of(objective=DupMAE, dropout=0.0, bag_of_words_weight=0.3)
    plain = model_of(objective=RetroMAE, dropout=0.0)
    plain.load_state_dict(model.state_dict())
    both, alone = gradients_of(model, texts()), gradients_of(plain, texts())
    for name, value in alone[0].shares.items():
        torch.testing.assert_close(both[0].shares[name], value)
    more = (both[0].losses - alone[0].losses).sum()
    assert more.item() == pytest.approx(0.3 * both[0].shares["bag_of_words_loss"].item(), rel=1e-6)


@pytest.mark.parametrize("objective", [RetroMAE, DupMAE])
def test_retromaes_dummies_and_passes_change_nothing(objective, texts):
    model = model_of(objective=objective, dropout=0.0)
    plain = gradients_of(model, texts())
    whole = {"tokens_per_pass": 10**6}
    for options in ({"few_shapes": True}, {"few_sizes": True}, whole, {"few_shapes": True} | whole):
        other = gradients_of(model, texts(**options))
        close(other[1], plain[1])
        for name, value in plain[0].shares.items():
            torch.testing.assert_close(other[0].shares[name], value, rtol=1e-10, atol=1e-12)


# --- runs


CO = ["--model.objective", "condenser.models.cocondenser.CoCondenser"]
DUP = ["--model.objective", "condenser.models.retromae.DupMAE"]
RETRO = ["--model.objective", "condenser.models.retromae.RetroMAE", "--data.mask_probability", "0.3"]


@pytest.fixture(scope="module")
def co(recipe, spans, tmp_path_factory):
    """A run of coCondenser with dropout over several passes a step."""
    folder = tmp_path_factory.mktemp("co")
    options = [*CO, "--data.store", str(spans), "--data.span_length", "16", "--data.batch_size", "24"]
    assert fit(recipe, folder, "co", *options) == 0
    return folder / "co", options


@pytest.fixture(scope="module")
def dup(recipe, tmp_path_factory):
    """A run of RetroMAE's decoder, and a bag of words."""
    folder = tmp_path_factory.mktemp("dup")
    options = [*DUP, "--data.mask_probability", "0.3"]
    options += ["--model.objective_options", "{bag_of_words_weight: 0.2, decoder_mask_rate: 0.7}"]
    assert fit(recipe, folder, "dup", *options) == 0
    return folder / "dup", options


@pytest.mark.parametrize("name", ["co", "dup"])
def test_a_run_logs_and_validates_all_terms_and_what_is_minimised(name, request):
    run, _ = request.getfixturevalue(name)
    scored = ("mlm", "head_mlm", "contrast") if name == "co" else ("mlm", "decoder")
    assert_minimised(run, **dict.fromkeys(scored, 1), **({} if name == "co" else {"bag_of_words": 0.2}))
    for row in metrics_of(run):
        shares = [row[f"{kind}/{term}_accuracy"] for kind in ("train", "val") for term in scored]
        assert all(0 <= float(share) <= 1 for share in shares if share)
    if name == "co":
        assert 0 < float(row["val/contrast_mrr"]) <= 1
        assert float(row["val/alignment"]) >= 0 >= float(row["val/uniformity"])


@pytest.mark.parametrize("name", ["co", "dup"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit_with_dropout(name, recipe, tmp_path, request):
    run, options = request.getfixturevalue(name)
    assert fit(recipe, tmp_path, "parts", *options, *STOP, "3") == 0
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert fit(recipe, tmp_path, "parts", *options) == 0
    assert_same_weights(run, tmp_path / "parts")
    assert metrics_of(run) == metrics_of(tmp_path / "parts")


@pytest.mark.parametrize("name", ["co", "dup"])
def test_an_export_holds_the_objective_with_its_head(name, recipe, tmp_path, request, capsys):
    run, options = request.getfixturevalue(name)
    out = tmp_path / "export"
    assert main(["export", str(run), "--output", str(out)]) == 0
    model = load_export(out)
    assert type(model).__name__ == {"co": "CoCondenser", "dup": "DupMAE"}[name]
    state = final_state(run)["state_dict"]
    for weight_name, weight in model.state_dict().items():
        assert torch.equal(weight, state[f"model.{weight_name}"])
    if name == "dup":
        assert (model.decoder_mask_rate, model.bag_of_words_weight) == (0.7, 0.2)
    warm = ["--model.backbone", str(out), "--model.backbone_config", "{}", "--trainer.max_steps", "1"]
    capsys.readouterr()
    assert fit(recipe, tmp_path, "on", *options, *warm) == 0
    assert "begins with random weights" not in capsys.readouterr().out


def test_where_a_head_is_missing_or_of_another_objective_one_line_says_so(recipe, tiny_export, tmp_path, capsys):
    warm = ["--model.backbone", str(tiny_export), "--model.backbone_config", "{}", "--trainer.max_steps", "1"]
    assert fit(recipe, tmp_path, "other", *RETRO, *warm, "--model.late_mlm", "false", "--model.skip_from", "6") == 0
    said = capsys.readouterr().out
    assert "a RetroMAE has no use for model.late_mlm\n" in said  # the other one is as if it had not been given
    assert "has other weights beside the backbone's (c_head), so decoder of RetroMAE begins with random weights" in said
    assert "head_only_steps" in said
    plain = tmp_path / "plain"
    shutil.copytree(tiny_export, plain)
    (plain / "condenser_head.safetensors").unlink()
    warm[1] = str(plain)
    assert fit(recipe, tmp_path, "none", *warm) == 0
    assert "has no head, so c_head of Condenser begins with random weights" in capsys.readouterr().out
    assert fit(recipe, tmp_path, "mlm", *warm, "--model.n_head_layers", "0") == 0
    assert "random weights" not in capsys.readouterr().out


def test_cocondenser_starts_from_a_condenser_with_its_head(recipe, spans, tiny_export, tmp_path, capsys):
    warm = ["--model.backbone", str(tiny_export), "--model.backbone_config", "{}", "--trainer.max_steps", "1"]
    keep = ["--model.optimizer.learning_rate", "1e-12", "--data.store", str(spans)]
    assert fit(recipe, tmp_path, "co", *CO, *warm, *keep) == 0
    assert "random weights" not in capsys.readouterr().out
    head, state = load_export(tiny_export).c_head.state_dict(), final_state(tmp_path / "co")["state_dict"]
    for name, weight in head.items():
        torch.testing.assert_close(state[f"model.c_head.{name}"], weight, rtol=0, atol=1e-8)


def own(name, *options):
    return ["--model.objective", f"{__name__}.{name}", *options]


def option(name, value):
    return f"--model.objective_options.{name}={value}"


PAIRS, STEP = ["--data.store", "SPANS"], ["--data.batch_size=2", "--data.micro_batches_per_step=2"]
BAD = {  # what is said: why
    "holds blocks; pairs of spans need a store of `prepare --kind spans`": CO,
    "temperature=0 must be positive": [*CO, option("temperature", 0)],
    "similarity='l2' must be 'dot' or": [*CO, option("similarity", "l2")],
    "mlm_weight=-1 must not be negative": [*CO, option("mlm_weight", -1)],
    "'temperature': 'hot'} on": [*CO, option("temperature", "hot")],
    "has no setting temprature; it has skip_from": [*CO, option("temprature", 1)],
    "RetroMAE has no setting temperature": [*RETRO, option("temperature", 2)],
    "bag_of_words_weight=-1 must not be negative": [*DUP, option("bag_of_words_weight", -1)],
    "decoder_mask_rate=0 must lie between 0 and 1": [*RETRO, option("decoder_mask_rate", 0)],
    "decoder_mask_rate=1 must lie between 0 and 1": [*RETRO, option("decoder_mask_rate", 1)],
    "contrasts pairs": [*CO, "--data.pairs", "false"],
    "set data.pairs to true": ["--data.span_length", "16"],
    "span_length=1 must be at least 2": [*CO, *PAIRS, "--data.span_length", "1"],
    "two documents": [*CO, *PAIRS, *STEP],
    "let it override cls_and_losses, not losses": own("Overridden"),
    "for a contrast cls_and_losses": own("WithoutBoth", *PAIRS),
    "Forgetful does not keep its setting strength: set self.strength in __init__": own("Forgetful", *PAIRS),
    "its setting act is a builtin_function_or_method, unfit for checkpoints: settings are": own("Keeps", *PAIRS),
    "WithoutFlops needs a method flops": own("WithoutFlops"),
    "Unmade with {} on a BertForMaskedLM cannot be made: ": own("Unmade"),
    **{said: own(name) for name, (_, said) in RETURNED.items()},
    "no head to train alone": ["--model.n_head_layers", "0", "--model.optimizer.head_only_steps", "2"],
}


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_work_is_one_line(said, recipe, spans, tmp_path, capsys):
    options = [word.replace("SPANS", str(spans)) for word in BAD[said]]
    error_of(capsys, fit(recipe, tmp_path, "bad", "--trainer.max_steps", "2", *options), said)


@pytest.mark.parametrize("objective", [CoCondenser, RetroMAE])
def test_in_bf16_cached_gradients_differ_less_than_rounding_does(objective, pairs, spans, texts):
    model = model_of(objective=objective).float()
    steps = steps_of(pairs, spans) if objective is CoCondenser else texts()
    exact = gradients_of(model, steps)[1]
    found = []
    for which in (True, False):  # the cached way first, which casts weights where no gradient is asked for
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients_of(model, steps, cached=which)[1])
    cached, kept = found
    rounding = norm_of([a - b for a, b in zip(kept, exact, strict=True)]) / norm_of(exact)
    assert 1e-4 < rounding < 0.1
    close(cached, kept, 0.01 * rounding)


@pytest.mark.parametrize("objective", [CoCondenser, RetroMAE])
def test_recomputed_layers_draw_the_same_dropout(objective, pairs, spans, texts):
    model = model_of(objective=objective)
    steps = steps_of(pairs, spans) if objective is CoCondenser else texts()
    plain = gradients_of(model, steps)[1]
    model.gradient_checkpointing = True
    close(gradients_of(model, steps)[1], plain)


def test_probes_of_pairs_compare_other_documents(pairs, spans):
    vocabulary = Vocabulary.of(load_tokenizer(spans / "tokenizer"))
    batches = sample_batches(pairs, vocabulary, Masking(3), 64)
    ids = torch.cat([fields["sample_ids"] for batch in batches for fields in batch])
    assert len(set((ids // 2).tolist())) == len(ids) == 64


def test_a_condenser_trains_on_pairs_too(recipe, spans, tmp_path):
    """Which is the control of a coCondenser, and what an objective of one's own is on the demo's recipe."""
    options = ["--data.store", str(spans), "--data.pairs", "true", "--data.span_length", "16"]
    assert fit(recipe, tmp_path, "control", *options, "--trainer.max_steps", "2") == 0


def test_how_much_the_decoder_reads_from_cls_is_probed(dup):
    run, _ = dup
    model = load_checkpoint(checkpoints(run)[0])[0]
    store = Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["store"])
    found = probe_store(model, model.lm, store, n_sequences=8)
    assert found["head_loss"].keys() == {"true", "other", "zeros"}
    assert len(set(found["head_loss"].values())) == 3
    assert all(3 < value < 8 for value in found["head_loss"].values())


@pytest.mark.slow
@pytest.mark.parametrize("objective", [CoCondenser, RetroMAE, DupMAE])
def test_a_compiled_step_is_the_eager_one(objective, pairs, spans, texts):
    model = model_of(objective=objective, dropout=0.0).float()
    steps = steps_of(pairs, spans, few_shapes=True) if objective is CoCondenser else texts(few_shapes=True)
    batch = steps[0]
    scale = 1 / torch.tensor([float(batch.total(name)) for name in COUNTS])
    found = []
    for compiled in (False, True):
        step = TrainingStep(model, torch.optim.SGD(model.parameters(), lr=0.0), compiled=compiled, gradient_cache=True)
        passes = step.passes(batch, scale, score=True)
        found.append([passes.losses, passes.shares, [gradient.clone() for gradient in step.gradients]])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", [RetroMAE, DupMAE])
def test_retromaes_counted_operations_agree_with_torchs_counter(objective, texts):
    """Attention is laid out, so its pairs are those of rows; the decoder scores special tokens too, for nothing."""
    model = model_of(objective=objective, dropout=0.0).float()
    batch = texts(tokens_per_pass=10**6)[0]
    (fields,) = batch
    rows, longest = batch.total("n_sequences"), fields["max_seqlen"]
    needed = Work.of_real_tokens(batch)
    work = needed._replace(pairs=rows * longest**2, query_pairs=rows * longest * fields["max_query"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(term.sum for term in model.losses(inputs_of(fields)).values()).backward()
    config = model.lm.config
    for_nothing = 6.0 * 2 * rows * config.hidden_size * (config.hidden_size + config.vocab_size)
    assert model.flops(work) + for_nothing == pytest.approx(counter.get_total_flops(), rel=0.02)
