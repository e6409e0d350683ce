"""Token stores: shared work and growth give the same bytes, damage is seen, several stores mix, spans pair up."""

import itertools
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_of, error_of, fit, flip_a_bit, make_documents, numpy_calls, slow, write_jsonl
from test_prepare import all_tokens, contents, prepare, refused, rows_of, times

from condenser.cli import main
from condenser.corpus.readers import Source
from condenser.corpus.work import Share
from condenser.data.batching import BucketedBatches
from condenser.data.collate import Masking, Vocabulary, collate
from condenser.data.datamodule import CondenserDataModule
from condenser.data.hashing import hash_ints
from condenser.data.mixing import Mixture
from condenser.data.pairs import two_of
from condenser.data.steps import StepLoader, Steps
from condenser.data.store import TokenStore, check_same_stores, digest, names_of, read_manifest
from condenser.data.tokenizers import load_tokenizer
from condenser.evaluation.evaluate import print_rows
from condenser.training.failures import explained


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of documents."""
    folder = tmp_path_factory.mktemp("files")
    return [write_jsonl(folder / f"{name}.jsonl", make_documents(60, seed)) for seed, name in enumerate("ab")]


# --- sharing the work


ONCE = ["--deduplicate"]
SHARES = [(1, "3", ONCE), (3, "1", []), (7, "1", ONCE)]
SHARES += [slow(*each) for each in ((1, "3", []), (2, "1", ONCE), (7, "1", []))]


@pytest.mark.parametrize(("count", "workers", "options"), SHARES)
def test_shares_and_processes_give_the_bytes_of_one(
    count, workers, options, files, store, small_units, tmp_path, capsys
):
    source = [*files, write_jsonl(tmp_path / "again.jsonl", make_documents(60, seed=0)[::2])]
    assert prepare(source, store / "tokenizer", tmp_path / "one", *options) == 0
    for index in reversed(range(count)):
        share = ["--shard", f"{index}/{count}", "--workers", workers]
        assert prepare(source, store / "tokenizer", tmp_path / "shared", *share, *options) == 0
        if index:
            assert "unfinished" in error_of(capsys, main(["prepare", "merge", str(tmp_path / "shared")]))
    if count > 1:
        assert main(["prepare", "merge", str(tmp_path / "shared")]) == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("units/*.json"))) > 7


def test_shares_may_begin_at_one_moment(files, store, tmp_path, monkeypatch):
    """As those of a job array do: one finds the folder empty, and then what another has made meanwhile."""
    arguments = files, store / "tokenizer"
    assert prepare(*arguments, tmp_path / "other", "--shard", "0/2") == 0
    out = tmp_path / "out"

    def another_begins(folder):
        shutil.copytree(tmp_path / "other", out, dirs_exist_ok=True)
        return []

    monkeypatch.setattr("condenser.corpus.prepare.partial_files", another_begins)
    assert prepare(*arguments, out, "--shard", "1/2") == 0
    assert main(["prepare", "merge", str(out)]) == 0


def test_a_share_of_whole_sources_reads_no_others(files, tmp_path):
    sources = [Source(str(files[0]), "jsonl"), Source(str(tmp_path / "not here"), "jsonl", number=1)]
    assert {unit.source for unit in Share(sources, 4000, index=0, count=2).units()} == {sources[0]}
    with pytest.raises(FileNotFoundError, match="not here"):
        next(Share(sources, 4000, index=1, count=2).units())


def test_a_store_in_the_place_of_another_has_nothing_of_it(files, store, roberta, tmp_path):
    assert prepare(files[0], roberta, tmp_path / "a") == 0
    for tokenizer in (store / "tokenizer", roberta):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        assert prepare(files[0], tokenizer, tmp_path / "b") == 0
    a, b = (all_tokens(tmp_path / name) for name in "ab")
    assert a == b


def test_merging_verifies_every_file(files, store, small_units, tmp_path, capsys):
    for index in range(2):
        assert prepare(files, store / "tokenizer", tmp_path / "s", "--shard", f"{index}/2") == 0
    shard = sorted((tmp_path / "s" / "train").glob("*.arrow"))[2]
    flip_a_bit(shard)
    assert str(shard) in error_of(capsys, main(["prepare", "merge", str(tmp_path / "s")]))
    assert not (tmp_path / "s" / "manifest.json").exists()


def test_a_share_cannot_train_a_tokenizer(files, tmp_path, capsys):
    error = refused(capsys, files, "train:200", tmp_path / "out", "--shard", "0/2")
    assert "needs a tokenizer that is there already" in error


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bytes_and_the_same_errors(files, store, small_units, tmp_path, capsys):
    ray = pytest.importorskip("ray")
    try:
        assert prepare(files, store / "tokenizer", tmp_path / "one") == 0
        assert prepare(files, store / "tokenizer", tmp_path / "ray", "--engine", "ray", "--workers", "2") == 0
        assert contents(tmp_path / "ray") == contents(tmp_path / "one")
        broken = tmp_path / "broken.jsonl"
        broken.write_text(files[0].read_text() + "{oops\n")
        error = refused(capsys, broken, store / "tokenizer", tmp_path / "bad", "--engine", "ray")
        assert "broken.jsonl, line 61: not JSON" in error
    finally:
        ray.shutdown()


# --- growing


def test_appending_leaves_files_and_sample_ids_as_they_were(files, store, small_units, tmp_path, capsys):
    out = tmp_path / "grows"
    assert prepare(files[0], store / "tokenizer", out) == 0
    before, written = contents(out), times(out, "*.arrow")
    old = TokenStore(out, "train")
    rows = old.rows(np.arange(len(old)))
    assert prepare(files[1], store / "tokenizer", out, "--append") == 0
    after = contents(out)
    changed = {name for name in before if before[name] != after[name]}
    assert all(name.endswith(("manifest.json", "token_counts.npy", "state.json")) for name in changed)
    assert written.items() <= times(out, "*.arrow").items()
    new = TokenStore(out, "train")
    for ours, theirs in zip(new.rows(np.arange(len(old))), rows, strict=True):
        assert (ours == theirs).all()

    assert prepare(files, store / "tokenizer", tmp_path / "at once") == 0
    assert after == contents(tmp_path / "at once")
    assert prepare(files[1], store / "tokenizer", out, "--append") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(out) == after


def test_other_inputs_or_settings_are_refused_and_the_way_to_append_is_named(files, store, tmp_path, capsys):
    assert prepare(files[0], store / "tokenizer", tmp_path / "out") == 0
    other = files[1], store / "tokenizer", tmp_path / "out"
    assert "--append adds inputs to it" in refused(capsys, *other)
    assert "another min_length" in refused(capsys, *other, "--append", "--min-length", "3")


def test_an_append_that_fails_leaves_the_store_usable(files, store, tmp_path, capsys):
    assert prepare(files[0], store / "tokenizer", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine."}\n' * 3 + "{oops\n")
    assert "broken.jsonl, line 4" in refused(capsys, broken, store / "tokenizer", tmp_path / "out", "--append")
    assert contents(tmp_path / "out") == before


def test_a_store_that_lost_a_file_is_not_added_to_before_its_command_has_made_that_anew(
    files, store, small_units, tmp_path, capsys
):
    out, before = tmp_path / "out", {}
    cut, of_a_unit = "train/data-00000-00002.arrow", ("units/00000-00001.json", "units/00000-00001.npy")
    for lost in (None, cut, "train/data-00000-00001.arrow", *of_a_unit, "token_counts.npy", "train/state.json"):
        if lost:
            written = times(out, "*.arrow")
            (out / lost).write_bytes(before[lost][:-1]) if lost == cut else (out / lost).unlink()
            error = refused(capsys, files[1], store / "tokenizer", out, "--append")
            assert f"{lost} is missing or damaged: first repair" in error
        assert prepare(files[0], store / "tokenizer", out) == 0
        before = before or contents(out)
        assert contents(out) == before
        assert not lost or len(set(times(out, "*.arrow").items()) - set(written.items())) <= 2  # of its unit


@pytest.mark.parametrize("how", ["no tokenizer", "interrupted"])
def test_a_repair_that_fails_leaves_the_store_usable(how, files, store, small_units, tmp_path, monkeypatch):
    out, tokenizer = tmp_path / "out", tmp_path / "tokenizer"
    shutil.copytree(store / "tokenizer", tokenizer)
    assert prepare(files, tokenizer, out) == 0
    whole = contents(out)
    shutil.rmtree(out / "units")
    before = contents(out)
    with monkeypatch.context() as patch:
        if how == "interrupted":
            patch.setattr("condenser.corpus.work.do_unit", interrupt)
        else:
            tokenizer.rename(tmp_path / "away")
        assert prepare(files, tokenizer, out) == (130 if how == "interrupted" else 1)
    assert contents(out) == before
    if how == "no tokenizer":
        (tmp_path / "away").rename(tokenizer)
    assert prepare(files, tokenizer, out) == 0
    assert contents(out) == whole


def interrupt(*args):
    raise KeyboardInterrupt


def test_a_store_grows_beyond_100000_sources(files, store, tmp_path):
    """Whose numbers have another order as texts. The one source of the store becomes the last of 100,000."""
    out = tmp_path / "out"
    assert prepare(files[0], store / "tokenizer", out) == 0
    for path in [*out.glob("units/*"), *out.glob("*/data-*"), *out.glob("*/state.json"), out / "manifest.json"]:
        if path.suffix == ".json":
            path.write_text(path.read_text().replace("00000-", "99999-"))
        path.rename(path.with_name(path.name.replace("00000-", "99999-")))
    manifest = read_manifest(out)
    manifest["settings"]["sources"][:0] = [{"name": str(number)} for number in range(99_999)]
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = times(out, "*.arrow")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{oops\n")
    assert prepare(broken, store / "tokenizer", out, "--append") == 1
    assert times(out, "*.arrow") == before
    assert prepare(files[1], store / "tokenizer", out, "--append") == 0
    assert read_manifest(out)["units"] == ["99999-00000", "100000-00000"]
    assert read_manifest(out)["counts"]["documents"] == 120
    assert before.items() <= times(out, "*.arrow").items()


def test_a_share_file_left_from_before_does_not_count_when_a_store_grows(files, store, tmp_path, capsys):
    assert prepare(files[0], store / "tokenizer", tmp_path / "out") == 0
    (tmp_path / "out/units/share-0-of-1.json").write_text('["00000-00000"]')
    assert prepare(files[1], store / "tokenizer", tmp_path / "out", "--append", "--shard", "0/2") == 0
    assert prepare(files[1], store / "tokenizer", tmp_path / "out", "--append", "--shard", "1/2") == 0
    assert main(["prepare", "merge", str(tmp_path / "out")]) == 0
    assert read_manifest(tmp_path / "out")["counts"]["documents"] == 120


def test_a_tokenizer_that_has_changed_is_refused(files, store, small_units, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(store / "tokenizer", tokenizer)
    assert prepare(files[0], tokenizer, tmp_path / "out") == 0
    path = tokenizer / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    assert "has changed since" in refused(capsys, files[1], tokenizer, tmp_path / "out", "--append")
    shutil.copy(path, tmp_path / "out" / "tokenizer")
    with pytest.raises(ValueError, match="it has changed"):
        CondenserDataModule(str(tmp_path / "out")).tokenizer  # noqa: B018


def test_no_other_tokenizer_is_trained_for_a_store_that_has_lost_its_own(files, tmp_path, capsys):
    """Its rows would be of the old one, and the manifest would say that they are of the new one."""
    out = tmp_path / "out"
    for source in files:
        assert prepare(source, "train:200", out, "--append") == 0
    shutil.copytree(out / "tokenizer", tmp_path / "tokenizer")
    shutil.rmtree(out / "tokenizer")
    before = contents(out)
    more = write_jsonl(tmp_path / "more.jsonl", make_documents(20, seed=4))
    assert "tokenizer is missing" in refused(capsys, more, "train:200", out, "--append")
    assert "has changed since" in refused(capsys, files, "train:200", out)  # it was trained on the first file
    assert contents(out) == before
    path = Path(shutil.copytree(tmp_path / "tokenizer", out / "tokenizer"), "tokenizer_config.json")
    path.write_text(path.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    assert "has changed since" in refused(capsys, more, "train:200", out, "--append")


# --- damage


def test_a_flipped_bit_is_found_by_verifying(copied, capsys):
    assert main(["inspect", str(copied), "--verify"]) == 0
    assert "agree with their checksums" in capsys.readouterr().out
    damaged = next((copied / "validation").glob("*.arrow"))
    flip_a_bit(damaged)
    assert str(damaged) in error_of(capsys, main(["inspect", str(copied), "--verify"]))


def test_rows_are_shown_once_however_many_are_asked_for(store, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("condenser.reports.inspection.masked_pieces", lambda *args: shown.append(args[-1]) or [])
    assert main(["inspect", str(store), "--samples", "5000"]) == 0
    assert shown == [*range(read_manifest(store)["splits"]["train"]["rows"])]


def test_a_run_goes_on_where_its_store_was_moved_and_over_no_other(copied, spans, recipe, tmp_path, capsys):
    def fitted(store, *options):
        return fit(recipe, tmp_path, "r", "--data.store", str(store), *options)

    assert fitted(copied, "--trainer.max_steps", "4") == 0
    moved = shutil.move(copied, tmp_path / "moved")
    said = f"{spans} is not the store that {tmp_path}/r/checkpoints/last-step=4.ckpt was"
    for options in (["--trainer.max_steps", "4"], []):
        assert said in error_of(capsys, fitted(spans, *options))
    assert fitted(moved, "--trainer.max_steps", "4") == 0
    assert "is finished (4 steps): nothing to do" in capsys.readouterr().out
    assert fitted(moved) == 0
    assert json.loads((tmp_path / "r/summary.json").read_text())["steps"] > 4


def test_a_truncated_or_missing_shard_is_named_when_the_store_is_opened(copied, recipe, tmp_path, capsys):
    shard = next((copied / "train").glob("*.arrow"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    error = error_of(capsys, fit(recipe, tmp_path, "r", "--data.store", str(copied)))
    assert f"{shard} has {len(whole) - 100:,} bytes instead of {len(whole):,}" in error
    shard.unlink()
    assert f"{shard} is missing" in error_of(capsys, main(["inspect", str(copied)]))


EMPTY_MANIFEST = {key: {} for key in ("settings", "tokenizer", "counts", "bad", "units", "splits")}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks 'settings'"),
        ('{"settings": {}}', "lacks 'tokenizer'"),
        (json.dumps(EMPTY_MANIFEST), "lacks 'kind'"),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(manifest, message, copied, capsys):
    (copied / "manifest.json").write_text(manifest)
    error = error_of(capsys, main(["inspect", str(copied)]))
    assert message in error
    assert str(copied / "manifest.json") in error


def test_a_store_holds_a_token_in_little_more_than_two_bytes(files, store, tmp_path):
    """At rows of 128; everything in the folder but the tokenizer, whose size does not grow."""
    options = ["--max-length", "128", "--validation-fraction", "0.01"]
    source = write_jsonl(tmp_path / "many.jsonl", [" ".join(make_documents(20, seed)) for seed in range(300)])
    assert prepare(source, store / "tokenizer", tmp_path / "out", *options) == 0
    n_bytes = sum(len(content) for name, content in contents(tmp_path / "out").items() if "tokenizer" not in name)
    assert n_bytes / read_manifest(tmp_path / "out")["counts"]["tokens_kept"] < 2.5
    assert TokenStore(tmp_path / "out", "train").shards[0].tokens.dtype == np.uint16


# --- mixing


@pytest.fixture(scope="module")
def two_stores(files, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for path in files:
        assert prepare(path, store / "tokenizer", folder / path.stem, "--validation-fraction", "0.1") == 0
    return [folder / path.stem for path in files]


def test_an_epoch_holds_the_weighted_share_of_each_store_and_rows_come_once_before_twice(two_stores):
    stores = [TokenStore(folder, "train") for folder in two_stores]
    mixture = Mixture(stores, [1.0, 0.3], seed=1)
    quota = round(0.3 * len(stores[1]))
    assert len(mixture) == len(stores[0]) + quota
    order = BucketedBatches(mixture, batch_size=8, micro_batches_per_step=2, seed=1)
    counts, seen = np.zeros(len(mixture.lengths), int), []
    for epoch in range(10):
        numbers = [order.step(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
        numbers = np.concatenate([part for step in numbers for part in step])
        assert sorted(numbers) == list(range(len(mixture)))
        rows, visits, _ = mixture.samples(epoch, numbers)
        seen += zip(rows.tolist(), visits.tolist(), strict=True)
        np.add.at(counts, rows, 1)
        assert (counts[: len(stores[0])] == epoch + 1).all()
        second = counts[len(stores[0]) :]
        assert second.sum() == quota * (epoch + 1)
        assert second.max() - second.min() <= 1
    # the visit number is how often the row was seen before
    assert sorted(seen) == [(row, visit) for row, count in enumerate(counts) for visit in range(count)]


def test_a_weight_above_one_repeats_rows_within_an_epoch_with_other_masks(two_stores):
    mixture = Mixture([TokenStore(two_stores[0], "train")], [2.0], seed=1)
    rows, visits, ids = mixture.samples(3, np.arange(len(mixture)))
    assert sorted(zip(rows, visits, strict=True)) == list(itertools.product(range(len(mixture) // 2), (6, 7)))
    assert (ids == rows).all()


def test_a_mixture_reads_what_its_stores_hold_and_its_ids_tell_the_stores_apart(two_stores):
    stores = [TokenStore(folder, "train") for folder in two_stores]
    mixture = Mixture(stores, seed=1)
    rows, _, ids = mixture.samples(0, np.arange(len(mixture)))
    some = np.array([0, len(stores[0]), 5, len(rows) - 1])
    tokens, word_starts, lengths = mixture.read(rows[some])
    ends = lengths.cumsum()
    for place, row in enumerate(some):
        number = int(row >= len(stores[0]))
        local = row - number * len(stores[0])
        assert ids[row] == (number << 40) + local
        theirs, here = stores[number].rows(np.array([local])), slice(ends[place] - lengths[place], ends[place])
        assert lengths[place] == theirs.lengths[0]
        assert (tokens[here] == theirs.tokens).all()
        assert (word_starts[here] == theirs.word_starts).all()


def test_stores_are_mixed_by_name_or_folder_and_their_shares_are_kept_in_the_checkpoint(
    two_stores, recipe, tmp_path, monkeypatch
):
    (tmp_path / "data" / "tokens").mkdir(parents=True)
    shutil.copytree(two_stores[1], tmp_path / "data" / "tokens" / "books")
    monkeypatch.chdir(tmp_path)
    stores = json.dumps({str(two_stores[0]): 1.0, "books": 0.5})
    assert fit(recipe, "runs", "mixed", "--data.store=null", "--data.stores", stores, "--trainer.max_steps", "3") == 0
    checkpoint = torch.load(next((tmp_path / "runs/mixed/checkpoints").glob("*.ckpt")), weights_only=True)
    about = json.loads(checkpoint["condenser"]["manifest"])
    assert about["stores"] == {two_stores[0].name: 1.0, "books": 0.5}
    assert [source["name"] for source in about["settings"]["sources"]] == ["a.jsonl", "b.jsonl"]
    assert main(["export", "runs/mixed", "--output", "exported"]) == 0


@pytest.mark.parametrize("weight", [-1.0, float("nan"), 1e12])
def test_a_weight_that_is_no_number_of_passes_is_refused(weight, two_stores):
    with pytest.raises(ValueError, match="weights of stores must be numbers from 0 to 1,000,000"):
        Mixture([TokenStore(two_stores[0], "train")], [weight], seed=1)


def test_stores_of_different_tokenizers_do_not_mix(store, files, tmp_path):
    assert prepare(files[0], "train:150", tmp_path / "other") == 0
    with pytest.raises(ValueError, match="different tokenizers"):
        CondenserDataModule(stores={str(store): 1.0, str(tmp_path / "other"): 1.0}).setup("fit")


# --- batches


@pytest.mark.parametrize("unit", ["word", "span"])
def test_samples_are_masked_alike_alone_and_together(unit, store):
    data, index = TokenStore(store, "train"), np.array([3, 50, 7, 21, 4])
    vocabulary, masking = Vocabulary.of(load_tokenizer(store / "tokenizer")), Masking(5, unit=unit)
    together = collate(data.rows(index), index, 2, vocabulary, masking)
    alone = [collate(data.rows(index[i : i + 1]), index[i : i + 1], 2, vocabulary, masking) for i in range(5)]
    for name in ("input_ids", "position_ids", "labels", "sample_ids"):
        assert together[name].tolist() == np.concatenate([each[name] for each in alone]).tolist()
    for name in ("n_masked", "n_tokens", "pairs", "query_pairs"):
        assert together[name] == sum(each[name] for each in alone)


def test_a_step_crosses_processes_as_one_file_descriptor(store):
    """A loader of many small tensors hangs without a word at the usual limit of 1,024."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    data = data_of(store, batch_size=256, micro_batches_per_step=64, num_workers=4)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, hard))
    try:
        steps = [*data.train_dataloader()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(step) for step in steps] == [64] * len(steps)


def test_a_device_without_a_row_of_the_validation_split_has_a_step_of_no_passes(store):
    one = data_of(store).loader(Mixture([TokenStore(store, "validation")], seed=0), 1, 1, training=False).dataset
    step = Steps(one.mixture, one.batches, one.vocabulary, one.masking, (1, 2))[0]
    assert (len(step), [*step], step.total("n_tokens"), step.n_positions) == (0, [], 0, 0)
    assert len(step.to("cpu").buffer) == 0


def test_a_loader_that_gives_nothing_becomes_an_error(store, monkeypatch):
    monkeypatch.setattr(StepLoader, "PATIENCE", 0.5)
    monkeypatch.setattr(Steps, "__getitem__", lambda self, step: time.sleep(30))
    with pytest.raises(ConnectionError, match="give nothing any more"), explained():
        next(iter(data_of(store, num_workers=1).train_dataloader()))


@pytest.mark.parametrize(
    ("message", "kind"),
    [("It looks like your LightningModule has parameters that were not used", ValueError), ("shapes", RuntimeError)],
)
def test_what_lightning_says_of_settings_is_for_users_also_where_torch_raises_it(message, kind):
    with pytest.raises(kind, match=message), explained():
        raise RuntimeError(message)


def test_reading_does_not_slow_down_with_the_number_of_shards(files, store, tmp_path, monkeypatch):
    """Counted: array operations of a read, over one shard and over many."""
    monkeypatch.setattr("condenser.corpus.prepare.UNIT_BYTES", (2000, 2000))
    assert prepare(files, store / "tokenizer", tmp_path / "many") == 0
    one, many = (TokenStore(folder, "train") for folder in (store, tmp_path / "many"))
    assert len(many.shards) > 20 * len(one.shards)
    names = "concatenate", "unpackbits", "searchsorted", "repeat", "arange"
    index = np.random.default_rng(0).permutation(len(many))[:64]
    assert numpy_calls(lambda: one.rows(index % len(one)), *names) == numpy_calls(lambda: many.rows(index), *names)


# --- spans


def test_the_spans_of_a_document_stand_together_and_lone_ones_are_dropped_and_counted(spans, corpus, store):
    bounds = {split: TokenStore(spans, split).document_bounds() for split in ("train", "validation")}
    counts = read_manifest(spans)["counts"]
    n_documents = sum(len(of_split) - 1 for of_split in bounds.values())
    assert n_documents == counts["kept"] == counts["documents"] - counts["too_short"] - counts["empty"]
    assert counts["too_short"] > 0
    tokenizer = load_tokenizer(store / "tokenizer")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    whole = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    for split, of_split in bounds.items():
        assert (np.diff(of_split) >= 2).all()
        rows = rows_of(spans, split)
        for first, end in itertools.pairwise(of_split):
            assert tuple(token for row in rows[first:end] for token in row) in whole


def test_every_pair_of_a_document_is_drawn_equally_often():
    pairs = two_of(np.full(6000, 4), hash_ints(1, np.arange(6000)))
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 12
    assert (abs(counts - 500) < 4.5 * np.sqrt(500)).all()


def test_a_store_of_blocks_has_no_pairs(store):
    with pytest.raises(ValueError, match="--kind spans"):
        TokenStore(store, "train").document_bounds()


# --- looking


@pytest.mark.parametrize("folder", ["blocks", "spans"])
def test_inspect_shows_numbers_lengths_masks_and_steps(folder, store, spans, capsys):
    options = ["--samples", "2", "--batch-size", "32", "--micro-batches-per-step", "4"]
    assert main(["inspect", str(store if folder == "blocks" else spans), *options]) == 0
    out = capsys.readouterr().out
    assert f"kind {folder}" in out
    assert "lengths" in out
    assert len(re.findall(r"row \d+:", out)) == 2
    assert re.search(r"\[\w+\]", out)
    assert re.search(r"tokens of a micro-batch +[\d,]+, from [\d,]+ to [\d,]+", out)


def test_what_is_a_users_is_shown_as_it_is(store, tmp_path, capsys):
    source = write_jsonl(tmp_path / "[draft] a :smile:.jsonl", make_documents(20))
    source.write_text(source.read_text() + '{"[/INST]": ""}\n')
    assert prepare(source, store / "tokenizer", tmp_path / "[b] out", "--skip-bad-lines") == 0
    said = capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "[b] out")]) == 0
    said, shown = ("".join(text.split()) for text in (said, capsys.readouterr().out))
    assert "preparing:[draft]a:smile:.jsonl" in said
    for text in ("[b]out", "sources[draft]a:smile:.jsonl", "thereare'[/INST]'"):
        assert text in shown
    print_rows(["n"], [({"collection": "[/x] :smile:", "model": "[b] model"}, ["1"])])
    assert re.search(r"\[/x\] :smile: +\[b\] model +1", capsys.readouterr().out)


def test_bench_data_compares_steps_and_preparation(files, store, tmp_path, capsys):
    options = ["--rounds", "2", "--batch-size", "64", "--json", str(tmp_path / "figures.json")]
    prepared = ["--input", str(files[0]), "--tokenizer", str(store / "tokenizer")]
    assert main(["bench", "data", "--store", str(store), *options, *prepared]) == 0
    assert "ratio" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"steps", "preparation", "versions"}
    assert all(len(rounds) == 2 for rounds in figures["steps"].values())
    assert main(["bench", "data", *options]) == 0  # rows in memory
    assert main(["bench", "data", "--input", str(files[0])]) == 1


def test_a_checkpoints_stores_are_all_given_again(store, spans):
    digests = [digest(folder) for folder in (store, spans)]
    check_same_stores(digests, [store, spans], "a.ckpt")
    for fewer in ([store], [store, spans, store]):
        with pytest.raises(ValueError, match=r"a.ckpt was trained on 2 store\(s\), and here are"):
            check_same_stores(digests, fewer, "a.ckpt")
    with pytest.raises(ValueError, match=r"is not the store that a.ckpt was trained on"):
        check_same_stores(digests, [spans, store], "a.ckpt")


def test_stores_of_one_name_are_told_apart():
    folders = [Path("/x/books"), Path("/y/books"), Path("wiki")]
    assert names_of(folders) == {folders[0]: "x/books", folders[1]: "y/books", folders[2]: "wiki"}
