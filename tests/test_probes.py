"""Probes: what they measure against independent computations, and that training does not notice them."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import fit, write_collection
from test_devices import DDP, SHARDED, start_ranks, wait_for, write_recipe
from test_engine import VOCABULARY, flat_pass, inputs, loss_of, padded, step_batch, tiny_model
from test_model import DEVICES
from test_report import section
from test_training import assert_same_weights, metrics_of
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from condenser.cli import main
from condenser.data.collate import StepBatch
from condenser.data.synthetic import SyntheticStore
from condenser.evaluation import callbacks
from condenser.evaluation.callbacks import RETRIEVED, Probes, part_of, whole_copy
from condenser.evaluation.encoders import load_encoder
from condenser.evaluation.probes import cls_attention_entropy, head_losses, probe, probe_store, unmasked
from condenser.evaluation.retrieval import read_collection
from condenser.evaluation.search import dense_search, score
from condenser.hub import load_export
from condenser.models.backbones.base import prepare_layers
from condenser.models.backbones.bert import Bert
from condenser.models.condenser import Condenser
from condenser.models.padded import flattened
from condenser.reports.figures import panels_for

SHARES = ("perf/probe_fraction", "perf/retrieval_fraction")
HEAD_LOSSES = [f"probe/head_loss_{cls}" for cls in ("true", "other", "zeros")]
MEASURED = [*HEAD_LOSSES, *(f"probe/cls_entropy_layer_{i}" for i in (1, 2, 3)), *(f"probe/{m}" for m in RETRIEVED)]


def expressive(family="bert"):
    """A model whose attention is far from even, and whose head notices what it reads."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(16 if parameter.dim() > 1 else 1)
    return model.train()  # with dropout


# --- attention entropy


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_entropy_equals_that_of_the_weights_that_the_library_gives_out(family):
    lm, (text, real) = expressive(family).lm, unmasked(step_batch(flat_pass()))
    nats, normalised = cls_attention_entropy(lm, text, real)
    lm.eval().set_attn_implementation("eager")
    weights = lm(input_ids=text, attention_mask=real, output_attentions=True).attentions
    for layer, of_layer in enumerate(weights):
        by_row = []
        for row, n in zip(of_layer.double(), real.sum(1).tolist(), strict=True):
            p = row[:, 0, :n]  # [A, n]
            by_row.append((-torch.xlogy(p, p).sum(1).mean().item(), n))
        expected = sum(entropy for entropy, _ in by_row) / len(by_row)
        share = sum(entropy / torch.tensor(n).log().item() for entropy, n in by_row) / len(by_row)
        assert nats[layer].item() == pytest.approx(expected, rel=1e-5)
        assert normalised[layer].item() == pytest.approx(share, rel=1e-5)
    assert nats.std() > 0.01


def test_entropy_is_of_the_text_before_it_was_masked():
    tokens, _, lengths = SyntheticStore(1000, max_length=36).rows(np.arange(9))
    assert (flat_pass()["input_ids"] == VOCABULARY.mask_id).any()
    texts, real = unmasked(step_batch(flat_pass()))
    assert real.sum(1).tolist() == [n + 2 for n in lengths]
    for text, ids in zip(texts, np.split(tokens, lengths.cumsum()[:-1]), strict=True):
        assert text[: len(ids) + 2].tolist() == [VOCABULARY.cls_id, *(5 + ids % 85), VOCABULARY.sep_id]


def test_entropy_leaves_the_encoder_as_it_was():
    model = tiny_model()
    model.train().lm.bert.embeddings.eval()
    modes, before = [module.training for module in model.modules()], model.lm.config._attn_implementation
    cls_attention_entropy(model.lm, *unmasked(step_batch(flat_pass())))
    assert model.lm.config._attn_implementation == model.lm.bert.config._attn_implementation == before
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_an_encoder_of_another_architecture_is_refused():
    lm = tiny_model().lm
    lm.config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"'gpt2' cannot be probed; of these it can: .*bert, .*roberta"):
        cls_attention_entropy(lm, *unmasked(step_batch(flat_pass())))


# --- what the head reads


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_with_the_true_cls_the_head_loss_is_the_models_own(family, pruned):
    model = expressive(family)
    model.pruned = pruned
    found = head_losses(model, [step_batch(flat_pass(rows, rows)) for rows in (9, 4)])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    own = torch.cat([model.losses(inputs(rows, rows), score=True)["head_mlm"].losses for rows in (9, 4)])
    assert found["true"] == pytest.approx(own.mean().item(), rel=1e-6)
    assert len({round(value, 3) for value in found.values()}) == 3


def test_the_other_cls_is_the_one_of_the_row_before_and_zeros_are_zeros():
    model = expressive().eval()
    model.pruned = False
    found, batch = head_losses(model, [step_batch(flat_pass())]), padded(inputs())
    last = model(**batch).last_hidden_state[:, 0]
    for name, cls in (("other", last[[-1, *range(8)]]), ("zeros", torch.zeros_like(last))):
        head = model(**batch).skip_hidden_state.clone()
        head[:, 0] = cls
        mask = batch["attention_mask"][:, None, None].bool()
        for layer in model.c_head:
            head = layer(head, mask)
        logits = model.lm.cls(head).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())
        assert found[name] == pytest.approx(expected.item(), rel=1e-5)


def test_a_head_that_cannot_look_at_cls_has_one_loss():
    model = expressive()
    for layer in model.c_head:
        layer.attention.self.value.weight.data.zero_()  # nothing moves between positions
    found = head_losses(model, [step_batch(flat_pass())])
    assert found["true"] == found["other"] == found["zeros"]


def test_what_the_head_reads_can_be_set_for_padded_rows_too():
    model = expressive().eval()
    model.cls_hook = torch.zeros_like
    loss = model(**padded(inputs())).head_mlm_loss
    assert loss.item() == pytest.approx(head_losses(model, [step_batch(flat_pass())])["zeros"], rel=1e-5)
    assert model.cls_hook is torch.zeros_like


def marked_names(n, seed):
    """Micro-batch of n rows: names, a mark before one of them, what stands for that one, a full stop. That can be told
    from the others, in two steps: which name is marked, and what stands for it."""
    draw, rows = random.Random(seed), []
    for _ in range(n):
        names = draw.choices(range(6, 12), k=draw.randint(3, 6))
        place = draw.randrange(len(names))
        rows.append(torch.tensor([1, *names[:place], 4, *names[place:], names[place] + 6, 5, 2]))
    text = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    masked = (torch.rand(text.shape, generator=torch.Generator().manual_seed(seed)) < 0.15) & (text > 3)
    backbone = Bert.__new__(Bert)
    backbone.lm = SimpleNamespace(config=BertConfig())
    found = flattened(backbone, text.masked_fill(masked, 3), (text > 0).long(), text.masked_fill(~masked, -100))
    arrays = {name: value.numpy() for name, value in found.items() if torch.is_tensor(value)}
    return StepBatch.of([arrays | {name: value for name, value in found.items() if isinstance(value, int)}])


@pytest.mark.slow
def test_a_head_learns_to_read_cls_where_only_late_layers_know_and_not_where_it_can_do_without():
    """Layers that it starts from either learn what it needs, or stay as they were drawn."""
    lost = {}
    for frozen in (0, 2):
        torch.manual_seed(2)
        sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        lm = BertForMaskedLM(BertConfig(vocab_size=18, initializer_range=0.1, **sizes, **dropouts))
        prepare_layers(lm, freeze_embeddings=False, freeze_layers=frozen, reinit_layers=0)
        model = Condenser.from_masked_lm(lm, skip_from=2, n_head_layers=1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1, 75)
        for step in range(100):
            (fields,) = marked_names(64, 1 + step)
            (loss_of(model, fields) / fields["n_masked"]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
            optimizer.zero_grad()
            warm_up.step()
        found = head_losses(model, [marked_names(512, 0)])
        lost[frozen] = found["other"] - found["true"]
    assert abs(lost[0]) < 0.02
    assert lost[2] > 0.1


def test_a_store_is_probed_alike_whenever_and_gives_plain_numbers(tiny_export, store):
    model, encoder = load_export(tiny_export), AutoModel.from_pretrained(tiny_export)
    found = probe_store(model, encoder, store, n_sequences=40)
    assert found == json.loads(json.dumps(probe_store(model, encoder, store, n_sequences=40)))
    assert found["sequences"] == 40
    assert found["head_loss"].keys() == {"true", "other", "zeros"}
    assert len(found["cls_entropy"]) == len(found["cls_entropy_nats"]) == 3
    assert all(
        0 < share <= 1 < nats for share, nats in zip(found["cls_entropy"], found["cls_entropy_nats"], strict=True)
    )
    headless = probe_store(None, AutoModelForMaskedLM.from_pretrained(tiny_export), store, n_sequences=40)
    assert headless == {key: value for key, value in found.items() if key != "head_loss"}
    with pytest.raises(ValueError, match=r"probes compare n_sequences >= 2 .* prepare it with a larger"):
        probe_store(model, encoder, store, n_sequences=1)


# --- while training runs


@pytest.fixture(scope="module")
def collection(corpus, tmp_path_factory):
    """Documents of the corpus, their beginnings as queries."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:60]]
    return write_collection(tmp_path_factory.mktemp("collection"), texts, [text[:20] for text in texts[:10]])


@pytest.fixture(scope="module")
def probing(recipe, collection, tmp_path_factory):
    """The recipe with both callbacks, every 4 of 8 steps; for one process and for two."""
    package = "condenser.evaluation.callbacks"
    both = [
        {"class_path": f"{package}.Probes", "init_args": {"every_n_steps": 4, "n_sequences": 8}},
        {
            "class_path": f"{package}.ZeroShotRetrieval",
            "init_args": {"folder": str(collection), "every_n_steps": 4, "n_documents": 60},
        },
    ]

    def write(name, *more, **changes):
        return write_recipe(recipe, folder / f"{name}.yaml", trainer__callbacks=[*both, *more], **changes)

    folder = tmp_path_factory.mktemp("probing")
    return write


@pytest.fixture(scope="module")
def probed(probing, run):
    assert fit(probing("probed"), run.parent, "probed") == 0
    return run.parent / "probed"


def rows_of(run, kind):
    """The rows that have a metric of this kind, with those metrics alone."""
    rows = [
        {key: value for key, value in row.items() if key == "step" or (value and key.startswith(kind))}
        for row in metrics_of(run, skip=())
    ]
    return [row for row in rows if len(row) > 1]


def test_training_does_not_notice_that_it_is_probed(probed, run):
    assert_same_weights(probed, run)
    for kind in ("train/", "val/"):
        assert rows_of(probed, kind) == rows_of(run, kind)


def test_probes_are_logged_after_the_first_step_and_every_n_steps(probed):
    rows = rows_of(probed, "probe/")
    assert [row["step"] for row in rows] == ["0", "0", "3", "3", "7", "7"]  # counted from 0, as Lightning does
    for of_probes, of_retrieval in zip(rows[::2], rows[1::2], strict=True):
        assert [*of_probes, *of_retrieval] == ["step", *MEASURED[:6], "step", *MEASURED[6:]]
    assert all(0 < float(value) < 10 for row in rows for key, value in row.items() if key != "step")


def test_the_share_of_the_time_is_logged_and_a_large_one_warned_about(probing, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "SHARE", 0.0)
    with pytest.warns(UserWarning, match=r"Probes takes \d+% of the time: raise its every_n_steps=4") as warned:
        assert fit(probing("shares"), tmp_path, "r") == 0
    assert len([w for w in warned if "of the time" in str(w.message)]) == 2  # of each callback one
    for share in SHARES:
        found = {row["step"]: float(row[share]) for row in rows_of(tmp_path / "r", share)}
        assert found.keys() == {"3", "7"}
        assert all(0 < value < 1 for value in found.values())


def test_what_is_logged_last_is_what_the_export_gives(probed, store, collection, tmp_path):
    assert main(["export", str(probed / "checkpoints" / "last-step=8.ckpt"), "--output", str(tmp_path / "e")]) == 0
    whole = read_collection(collection)
    hits = dense_search(load_encoder(str(tmp_path / "e"), None), whole.documents, whole.queries)
    expected = {f"probe/{metric}": value for metric, value in score(hits, whole.qrels).items() if metric in RETRIEVED}
    of_probes, of_retrieval = rows_of(probed, "probe/")[-2:]
    assert {key: float(value) for key, value in of_retrieval.items() if key != "step"} == pytest.approx(expected)
    model = load_export(tmp_path / "e")
    found = probe_store(model, model.lm, store, n_sequences=8, seed=1)
    assert [float(of_probes[key]) for key in HEAD_LOSSES] == pytest.approx(list(found["head_loss"].values()))
    layers = [float(of_probes[f"probe/cls_entropy_layer_{i}"]) for i in (1, 2, 3)]
    assert layers == pytest.approx(found["cls_entropy"])


def test_a_resumed_run_has_the_probes_of_an_uninterrupted_one(probing, probed, tmp_path):
    for n_steps in (3, 1, 8):  # one that ends between probes, and one at a probe
        stop = {"class_path": "test_training.StopAfter", "init_args": {"n_steps": n_steps}}
        assert fit(probing("resumed", stop), tmp_path, "resumed") == 0
    assert_same_weights(tmp_path / "resumed", probed)
    for kind in ("train/", "probe/"):
        assert rows_of(tmp_path / "resumed", kind) == rows_of(probed, kind)


def test_a_run_that_goes_on_from_before_a_probe_logs_it_once(probing, probed, tmp_path):
    shutil.copytree(probed, tmp_path / "probed")
    for lost in ("summary.json", "checkpoints/last-step=8.ckpt", "checkpoints/best-step=8.ckpt"):
        (tmp_path / "probed" / lost).unlink()
    assert fit(probing("probed"), tmp_path, "probed") == 0
    for kind in ("train/", "val/", "probe/"):
        assert rows_of(tmp_path / "probed", kind) == rows_of(probed, kind)


@pytest.mark.slow
def test_on_several_devices_sharded_or_not_they_are_those_of_one(probing, probed, tmp_path):
    fits = []
    for name, strategy in (("ddp", DDP), ("sharded", SHARDED)):
        path = probing(name, trainer__devices=2, trainer__strategy=strategy)
        fits.append(["--config", str(path), "--runs_dir", str(tmp_path), "--name", name])
    wait_for(start_ranks(2, fits, tmp_path / "log"), tmp_path / "log")
    for name in ("ddp", "sharded"):
        ours, theirs = rows_of(tmp_path / name, "probe/"), rows_of(probed, "probe/")
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for mine, one in zip(ours, theirs, strict=True):
            for key in one.keys() & {*HEAD_LOSSES, "probe/cls_entropy_layer_1"}:
                assert float(mine[key]) == pytest.approx(float(one[key]), rel=1e-3)


def test_plain_mlm_has_no_head_to_probe(probing, tmp_path):
    """And rows have the epoch of the training rows beside them."""
    path = probing("mlm", model__n_head_layers=0, trainer__max_steps=4, data__batch_size=512)
    assert fit(path, tmp_path, "mlm") == 0
    assert list(rows_of(tmp_path / "mlm", "probe/")[0]) == ["step", *MEASURED[3:6]]
    epochs = [row["epoch"] for row in metrics_of(tmp_path / "mlm") if row["step"] == "3" and not row["val/loss"]]
    assert epochs == ["1"] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_has_the_weights_and_shares_none_of_them(device):
    model, batch = expressive("roberta").to(device).train(), step_batch(flat_pass(), device=device)
    (fields,) = batch
    before = torch.get_rng_state()
    copy = whole_copy(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(loss_of(copy, fields), loss_of(model.eval(), fields))
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in model.parameters()}
    on_cpu = step_batch(flat_pass())
    found, same = probe(copy, copy.lm, [batch]), probe(model.cpu(), model.lm, [on_cpu])
    tolerance = 1e-4 if device == "cpu" else 1e-3  # a fit before this has allowed TF32
    for key in ("true", "other", "zeros"):
        assert found["head_loss"][key] == pytest.approx(same["head_loss"][key], rel=tolerance)
    assert found["cls_entropy"] == pytest.approx(same["cls_entropy"], rel=tolerance)


def test_a_part_of_a_collection_holds_what_is_relevant_to_its_queries(collection):
    whole = read_collection(collection)
    part = part_of(whole, n_documents=6, n_queries=4)
    assert list(part.queries) == list(part.qrels) == list("0123")
    assert list(part.documents) == list("012345")
    whole.qrels["0"] |= {"59": 1, "58": 0, "missing": 1}
    assert list(part_of(whole, 6, 4).documents) == [*"01234", "59"]
    with pytest.raises(ValueError, match="5 documents are relevant to the first n_queries=4; raise n_documents=4"):
        part_of(whole, 4, 4)


def test_bad_settings_are_refused_before_any_step(recipe, probing, tmp_path, capsys):
    with pytest.raises(ValueError, match="Probes: every_n_steps=0 must be at least 1"):
        Probes(every_n_steps=0)
    for init, message in (
        ({"class_path": "Probes", "init_args": {"n_sequences": 1}}, "probes compare n_sequences >= 2"),
        ({"class_path": "ZeroShotRetrieval", "init_args": {"folder": "nowhere"}}, "no retrieval collection at nowhere"),
    ):
        init["class_path"] = f"condenser.evaluation.callbacks.{init['class_path']}"
        assert fit(write_recipe(recipe, tmp_path / "c.yaml", trainer__callbacks=[init]), tmp_path, "r") == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_the_report_draws_them_also_alone(probed, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text(yaml.safe_dump({"name": "r"}))
    rows = rows_of(probed, "probe/")
    lines = [",".join(row.get(key, "") for key in ("step", *MEASURED)) for row in rows]
    (tmp_path / "r" / "metrics.csv").write_text("\n".join([",".join(["step", *MEASURED]), *lines]) + "\n")
    assert main(["report", str(tmp_path / "r"), "--output", str(tmp_path / "r.html")]) == 0
    html = (tmp_path / "r.html").read_text()
    curves = section(html, "Curves")
    assert curves.count("<figcaption>") == 3
    for title, names in (
        ("Head loss by the [CLS] it reads", ("true", "other", "zeros")),
        ("Zero-shot [CLS] retrieval", RETRIEVED),
        ("[CLS] attention entropy by layer", "123"),
    ):
        panel = curves.split(f"<figcaption>{title}", 1)[1].split("</figure>", 1)[0]
        assert all(f">{name}</text>" in panel for name in names)


def test_layers_are_drawn_in_their_order():
    names = [f"probe/cls_entropy_layer_{i}" for i in range(1, 13)]
    assert panels_for(set(names))[-1].metrics == tuple(names)
