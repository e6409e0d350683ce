"""`condenser report`: one page that needs no network, whatever state the runs are in."""

import json
import os
import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from conftest import error_of
from matplotlib.figure import Figure

from condenser.cli import main
from condenser.reports.figures import Panel, draw, draw_over, plot, short
from condenser.reports.reference import KEPT, PANELS, STUDIES, comparable, over_tokens, read_reference, write_reference
from condenser.reports.report import report
from condenser.runs import read_metrics

TRAIN = ["train/mlm_loss", "train/lr", "train/tokens_seen", "perf/tokens_per_second"]
VALIDATION = ["val/mlm_loss", "val/mlm_accuracy", "val/mlm_loss_at_mask", "val/unigram_loss_at_mask"]
HEAD = ["train/head_mlm_loss", "val/head_mlm_loss", "val/head_mlm_accuracy", "val/head_mlm_loss_at_mask"]


def make_run(folder: Path, columns=(*TRAIN, *VALIDATION, *HEAD), *, finished=True, model=None, rows=6) -> Path:
    folder.mkdir(parents=True)
    lines = [",".join(("step", "epoch", *columns))]
    for step in range(10, 10 * rows + 1, 10):
        for split in ("train/", "val/", "probe/"):
            values = (f"{7.03 if 'unigram' in c else 50 / step}" if c.startswith(split) else "" for c in columns)
            lines.append(f"{step},0,{','.join(values)}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    config = {"name": folder.name, "trainer": {"precision": "32-true"}, "data": {"batch_size": 64}}
    config["model"] = {"class_path": "condenser.Module", "init_args": {"skip_from": 6, "lr": 0.0001} | (model or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"steps": 60, "hardware": "2 toy cores"}))
    return folder


def page(*runs: Path, **options) -> str:
    output = runs[0].parent / "out" / "report.html"
    report([str(run) for run in runs], output=str(output), **options)
    assert [file.name for file in output.parent.iterdir()] == ["report.html"]
    return output.read_text(encoding="utf-8")


def section(html: str, heading: str) -> str:
    return html.split(f"<h2>{heading}", 1)[1].split("<h2>", 1)[0]


def test_page_asks_nothing_of_the_network(tmp_path):
    html = page(make_run(tmp_path / "a", rows=3000), make_run(tmp_path / "b"))
    assert not re.search(r"https?://|<script|<link|@import|url\((?!#)", html)
    references = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert references
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_a_page_of_many_rows_is_hardly_larger_and_shows_every_peak(tmp_path):
    few, many = (len(page(make_run(tmp_path / str(rows), TRAIN, rows=rows))) for rows in (1000, 20_000))
    assert many < 1.5 * few
    values = np.random.default_rng(0).random(20_000)
    values[12_345] = 9.0
    svg = draw(Panel("noise", "", ("train/noise",)), [{"train/noise": (np.arange(20_000), values)}], "step")
    (drawn,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-opacity: 0.3;', svg)
    heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", drawn)]
    assert len(heights) < 2000
    assert sum(y < np.median(heights) - 100 for y in heights) == 1


def test_runs_are_drawn_over_each_other_and_named_everywhere(tmp_path):
    html = page(make_run(tmp_path / "first"), make_run(tmp_path / "second"))
    for heading in ("At a glance", "Curves", "Final numbers"):
        assert re.search("first.*second", section(html, heading), re.DOTALL)
    assert html.count("<figcaption>Backbone MLM loss") == 1
    assert "2 toy cores" in section(html, "Final numbers")


@pytest.mark.parametrize(
    ("others", "heading", "names"),
    [
        ([], "Main settings", ["data.batch_size", "model", "model.lr", "model.skip_from"]),
        ([{"skip_from": 3, "tied": True}], "Settings that differ", ["model.skip_from", "model.tied"]),
        ([{}], "Settings that differ", []),
    ],
)
def test_of_one_run_the_main_settings_are_shown_and_of_several_those_that_differ(tmp_path, others, heading, names):
    runs = [make_run(tmp_path / str(number), model=model) for number, model in enumerate([{}, *others])]
    settings = section(page(*runs), heading)
    assert re.findall(r"<tr><td>(.*?)</td>", settings) == names
    assert ("<td>—</td><td>True</td>" in settings) == ("model.tied" in names)
    assert ("<p>None.</p>" in settings) == (not names)


def test_text_from_files_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    run = make_run(tmp_path / "<b>run", model={"tokenizer": evil})
    (run / "summary.json").write_text(json.dumps({evil: evil}))
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().replace("train/lr", "train/<script>"))
    write_evaluation(run, model=evil, text=evil)
    html = page(run)
    assert "<script" not in html
    assert "<b>run" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5


def test_loss_at_mask_is_compared_with_the_unigram_loss(tmp_path):
    with_line = page(make_run(tmp_path / "a"))
    assert "unigram 7.03" in with_line
    assert f"<td>{50 / 60 - 7.03:.4f}</td>" in section(with_line, "At a glance")
    without = [column for column in (*TRAIN, *VALIDATION) if "unigram" not in column]
    assert "unigram 7.03" not in page(make_run(tmp_path / "b", without))


def test_panels_without_data_are_left_out_and_unknown_metrics_get_one(tmp_path):
    unknown = ["train/contrastive_loss", "train/a$\\frac$b", "probe/cls_entropy_layer_x"]
    html = page(make_run(tmp_path / "mlm-only", [*TRAIN, *VALIDATION, *unknown]))
    titles = ["Backbone MLM loss", "Loss at [MASK] positions", "Backbone MLM accuracy", "Learning rate"]
    titles += ["[CLS] attention entropy by layer", "A$\\frac$b", "Contrastive loss"]
    assert re.findall("<figcaption>(.*?)</figcaption>", html) == titles
    assert ">a$\\frac$b</text>" in html
    assert "val/head" not in html


def logged(folder: Path, metrics: str) -> Path:
    """A run with this content of metrics.csv."""
    (make_run(folder) / "metrics.csv").write_text(metrics, encoding="utf-8", errors="surrogateescape")
    return folder


def test_throughput_is_drawn_and_its_median_given(tmp_path):
    html = page(logged(tmp_path / "a", "step,epoch,perf/tokens_per_second\n1,0,10\n2,0,9000\n3,0,9500\n"))
    assert "Throughput" in html
    assert "<td>9k</td>" in section(html, "At a glance")


def test_unfinished_run_with_a_cut_last_line_is_reported_as_such(tmp_path):
    run = make_run(tmp_path / "a", finished=False)
    with open(run / "metrics.csv", "a") as file:
        file.write("70,0,99")
    assert "a is unfinished (it has no summary.json): last logged step 60." in page(run)
    assert "unfinished" not in page(make_run(tmp_path / "b"))


@pytest.mark.parametrize(("finished", "steps"), [(True, 60), (False, 61)])
def test_steps_are_those_taken_though_the_first_is_logged_as_0(finished, steps, tmp_path):
    glance = section(page(make_run(tmp_path / "a", finished=finished)), "At a glance")
    assert re.search(rf"<td>steps</td>\s*<td>{steps}</td>", glance)


def test_values_that_are_not_finite_are_warned_about_and_not_drawn(tmp_path):
    columns = "step,epoch,train/mlm_loss,train/grad_norm\n"
    html = page(logged(tmp_path / "a", columns + "10,0,5.0,nan\n20,0,inf,nan\n30,0,nan,nan\n40,0,4.0,nan\n"))
    assert "train/mlm_loss is not finite in 2 rows, first at step 20" in html
    assert "train/grad_norm is not finite in 4 rows, first at step 10" in html
    assert not re.search(r"\bd=\"[^\"]*nan", html)


def test_rows_logged_again_after_a_resume_replace_the_earlier_ones(tmp_path):
    html = page(logged(tmp_path / "a", "step,epoch,val/mlm_loss\n10,0,5\n20,0,4\n30,0,nan\n20,0,3.5\n30,0,3.25\n"))
    assert "3.2500" in section(html, "Final numbers")
    assert "not finite" not in html


def test_curves_over_tokens(tmp_path):
    assert ">tokens seen</text>" in page(make_run(tmp_path / "a"), x="tokens")
    with pytest.raises(ValueError, match="b logged no train/tokens_seen: leave out --x tokens"):
        page(make_run(tmp_path / "b", VALIDATION), x="tokens")


def test_a_checkout_that_is_not_installed_makes_reports_too(tmp_path, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert "condenser not installed, matplotlib not installed" in page(make_run(tmp_path / "a"))


def test_runs_of_one_name_are_told_apart_by_their_path_and_one_given_twice_counts_once(tmp_path, capsys):
    a, b = make_run(tmp_path / "one" / "base"), make_run(tmp_path / "two" / "base")
    glance = section(page(a, b, b), "At a glance")
    assert glance.count(str(a)) == glance.count(str(b)) == 1
    assert "3 runs given, of which 1 repeat others: each is shown once\n" in capsys.readouterr().out


@pytest.mark.parametrize("files", [["launch"], ["config.yaml", "lock"], ["config.yaml", "lock", "metrics.csv"]])
def test_what_has_logged_nothing_yet_is_left_out_of_all_runs(files, tmp_path, capsys):
    run, other = make_run(tmp_path / "begun"), tmp_path / "other"
    other.mkdir()
    for name in files:
        (other / name).touch()
    assert str(other) not in page(run, other)
    assert f"left out, as nothing is logged there yet: {other}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no |is empty"):
        page(other)
    (other / files[0]).unlink()  # so it is no run
    with pytest.raises(ValueError, match="other has no config"):
        page(run, other)


def write_evaluation(run: Path, *, model: str, text: str) -> None:
    (run / "evaluation").mkdir()
    attention = {"task": "attention", "collection": "s", "model": "m"}
    rows = [
        {"collection": "toy", "model": model, "fine_tuned": False, "ndcg@10": 0.4321, "whitening": None},
        {"task": "similarity", "collection": "sts", "model": "m", "spearman": 0.8765, "whitening": 32},
        attention | {"trained_on": None, "cls_entropy": [0.9, 0.5]},
        attention | {"trained_on": "toy", "cls_entropy": [0.8, 0.4]},
    ]
    example = {"query": "a query", "hits": [{"rank": 1, "id": "d1", "score": 2.5, "text": text}]}
    content = {"settings": {"pooling": "cls"}, "rows": rows, "example": example}
    (run / "evaluation" / "results.json").write_text(json.dumps(content))


def test_each_kind_of_evaluation_has_a_table_and_attention_is_drawn(tmp_path):
    run = make_run(tmp_path / "a")
    write_evaluation(run, model="bm25", text="a document")
    shown = section(page(run), "Evaluation: ")
    for expected in ("bm25", "pooling cls", "not fine-tuned", "a query", "a document", "m, fine-tuned on toy"):
        assert expected in shown
    assert [shown.count(text) for text in ("<table>", "0.4321", "0.8765", "whitening", "spearman")] == [3, 1, 1, 1, 1]
    assert "0.8000" not in shown


ROW = {"collection": "toy", "model": "m"}
WITHOUT_ROWS = [{"rows": rows} for rows in (3, [3], [{"collection": "toy"}], [ROW | {"task": "attention"}])]
WITHOUT_ROWS += [{"rows": [ROW], "mteb": {"a": 1}}, {"rows": [ROW], "settings": [1]}]


@pytest.mark.parametrize("results", WITHOUT_ROWS, ids=str)
def test_an_evaluation_without_rows_is_named_by_its_file(results, tmp_path, capsys):
    run = make_run(tmp_path / "a")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    assert main(["report", str(run), "--output", str(tmp_path / "out.html")]) == 1
    assert "evaluation/results.json holds no rows of `condenser evaluate`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "has no metrics.csv: give run folders"),
        ("", "holds no values yet"),
        ("step,epoch,train/loss\n", "holds no values yet"),
        ("step,epoch,train/loss\n1,0,2.5\n2,0\n3,0,2.4\n", r"csv, line 3: broken row \(2 cells under 3 columns\)"),
        ("step,epoch,train/loss\n1,0,2.5\n2,0,2.x\n", "metrics.csv, line 3: broken row .*2.x"),
        ("step,epoch,train/loss\n,0,2.5\n", "metrics.csv, line 2: broken row"),
        ("step,epoch,train/loss\n1,0,2.5\ninf,0,2\n", "metrics.csv, line 3: broken row .inf is no number of steps"),
        ("step,epoch,train/loss\n1e30,0,2.5\n", "metrics.csv, line 2: broken row .1e.30 is no number of steps"),
        ("step,epoch,train/loss\n1,0,2.5\n\udce9\n", "metrics.csv, line 3: broken row"),
        ("iteration,loss\n1,2.5\n", "has no 'step' column but iteration, loss"),
    ],
)
def test_bad_metrics_are_refused_by_file_and_line(tmp_path, metrics, message):
    run = logged(tmp_path / "a", metrics or "")
    if metrics is None:
        (run / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=message):
        page(run)


def test_errors_are_one_line_on_the_command_line(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    (run / "summary.json").write_text('{"steps":')
    empty, listed, _ = (make_run(tmp_path / name) for name in ("empty", "listed", "whole"))
    (empty / "config.yaml").write_text("")
    (listed / "summary.json").write_text("[1]")
    for words, expected in (
        ([run], "summary.json cannot be read"),
        ([tmp_path / "none"], "none has no config.yaml"),
        ([empty], f"{empty / 'config.yaml'} is empty, or holds no mapping"),
        ([listed], f"{listed / 'summary.json'} is empty, or holds no mapping"),
        ([run, "--reference", "typo"], "--reference typo is neither a file nor one of study, warm"),
        ([tmp_path / "whole", "--output", tmp_path], f"--output {tmp_path} is a folder"),
    ):
        assert expected in error_of(capsys, main(["report", "--output", str(tmp_path / "r.html"), *map(str, words)]))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("kind", ["device", "link to a device", "link to a file"])
@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_is_written_takes_the_place_of_no_device_and_goes_where_a_link_leads(command, kind, tmp_path, capsys):
    """Such as of /dev/stdout, for root."""
    there, given = tmp_path / "there", tmp_path / ("link" if "link" in kind else "there")
    os.mkfifo(there) if "device" in kind else there.write_text("")
    if "link" in kind:
        given.symlink_to(there)
    words, option = [command, str(make_run(tmp_path / "run"))], "--output"
    if command == "compare":
        words, option = ["evaluate", "compare", *make_evaluations(tmp_path)], "--json"
    code = main([*words, option, str(given)])
    if "device" in kind:
        error_of(capsys, code, f"{option} {given} is a folder or a device")
        assert there.is_fifo()
    else:
        assert code == 0
        assert there.read_text()
    assert given.is_symlink() == ("link" in kind)


def make_evaluations(folder):
    """Two results of `condenser evaluate` of two questions."""
    row = {"task": "retrieval", "collection": "toy", "model": "m", "pooling": "cls"}
    for name in "ab":
        (folder / name / "rows").mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps({"fingerprints": ["r"]}))
        values = {"q1": {"ndcg@10": 0.5}, "q2": {"ndcg@10": 0.25}}
        row |= dict.fromkeys(("whitening", "trained_on", "train_size", "pair_loss", "seed"))
        (folder / name / "rows/r.json").write_text(json.dumps({"row": row, "values": values}))
    return [str(folder / "a"), str(folder / "b")]


def test_short_numbers_carry_over_to_the_next_letter():
    assert [short(n) for n in (0, 999, 1500, 999_999, 393_216_000, 2e9)] == ["0", "999", "1.5k", "1M", "393.2M", "2B"]


@pytest.mark.parametrize(("n", "points"), [(100, 96), (50_020, 1828)])
def test_the_mean_of_a_straight_line_lies_on_it_and_has_no_more_points_than_a_panel_shows(n, points):
    axes = Figure().add_subplot()
    plot(axes, Panel("", "", ()), "train/a", np.arange(float(n)), 2 * np.arange(float(n)), "red")
    logged, mean = (line.get_data() for line in axes.lines)
    assert len(logged[0]) == n
    assert len(mean[0]) == points
    np.testing.assert_allclose(mean[1], 2 * mean[0])


def test_a_run_of_many_validations_has_few_dots_over_a_reference():
    x = np.arange(1.0, 5001)
    svg = draw_over("Backbone", "nats", {}, [{"Backbone": (x, 1 / x)}])
    assert 20 < svg.count("<use") < 80


def make_curves(folder: Path, head: float = 0.5, vocabulary: float = 0.0, steps=(500, 1000, 1500)) -> Path:
    """A run that gains 1 nat in 1000 steps, and reads ``head`` nats from [CLS]; tokens: 100 a step."""
    names = ["train/tokens_seen", *KEPT, "probe/cls_entropy_layer_2", "probe/cls_entropy_layer_10"]
    lines = [",".join(("step", "epoch", *names)), f"0,0,{',' * len(KEPT)},0.9,0.7"]
    for step in steps:
        losses = [f"{vocabulary + 7 - 0.00111111 * step * ('unigram' not in name):.6f}" for name in KEPT[:5]]
        probes = [5.0, 5.0 + head, 5.25, 0.25, 0.8, 0.4]
        lines.append(f"{step - 1},0,{100 * step},{','.join(map(str, losses + probes))}")
    return logged(folder, "\n".join(lines) + "\n")


def test_reference_curves_come_back_as_the_runs_logged_them_and_pandas_reads_them(tmp_path):
    runs = {f"arm {n}, seed {seed}": make_curves(tmp_path / f"{n}{seed}", n) for n in range(2) for seed in range(2)}
    runs["long"] = make_curves(tmp_path / "long", steps=range(500, 20_001, 500))
    write_reference(tmp_path / "r.csv", runs)
    assert (tmp_path / "r.csv").stat().st_size < 10_000
    found = read_reference(tmp_path / "r.csv")
    assert list(found) == list(runs)
    for label, curves in found.items():
        logged = over_tokens(read_metrics(runs[label] / "metrics.csv"), label)
        assert curves.keys() == {*KEPT, "probe/cls_entropy_layer_2", "probe/cls_entropy_layer_10"}
        for metric, (tokens, values) in curves.items():
            np.testing.assert_allclose(tokens, logged[metric][0], atol=0.5)
            np.testing.assert_allclose(values, logged[metric][1], rtol=5e-5)
    (tmp_path / "blank.csv").write_text((tmp_path / "r.csv").read_text().replace("\n", "\n\n") + "\n")
    assert read_reference(tmp_path / "blank.csv").keys() == found.keys()
    table = pandas.read_csv(tmp_path / "r.csv")
    assert list(table.columns[:2]) == ["run", "tokens"]
    assert list(table.columns[-2:]) == ["probe/cls_entropy_layer_2", "probe/cls_entropy_layer_10"]
    assert table[table.run == "arm 1, seed 0"].tokens.tolist() == [100, 50_000, 100_000, 150_000]


def test_what_is_compared_does_not_depend_on_the_vocabulary(tmp_path):
    one, other = (
        comparable(over_tokens(read_metrics(make_curves(tmp_path / str(v), vocabulary=v) / "metrics.csv"), ""))
        for v in (0.0, 3.0)
    )
    assert list(one) == list(PANELS)
    for title, (tokens, values) in one.items():
        np.testing.assert_allclose(tokens, other[title][0])
        np.testing.assert_allclose(values, other[title][1], atol=1e-5)
    backbone, head, read, siblings, entropy = (values for _, values in one.values())
    np.testing.assert_allclose(backbone, [0.555555, 1.11111, 1.666665], atol=1e-5)
    np.testing.assert_allclose(head, backbone)
    np.testing.assert_allclose(read, 0.5)
    np.testing.assert_allclose(siblings, 0.25)
    np.testing.assert_allclose(entropy, [0.8, 0.6, 0.6, 0.6])


@pytest.mark.slow
def test_runs_are_drawn_over_reference_runs_where_both_measured_the_same(tmp_path):
    runs = {f"arm {n}, seed {seed}": make_curves(tmp_path / f"{n}{seed}", n) for n in range(6) for seed in range(2)}
    write_reference(tmp_path / "known.csv", runs)
    ours = make_curves(tmp_path / "ours", vocabulary=3.0)
    compared = section(page(ours, reference=str(tmp_path / "known.csv")), "Is this normal?")
    assert re.findall("<figcaption>(.*?)</figcaption>", compared) == list(PANELS)
    for panel in compared.split("<figcaption>")[1:]:
        grey = re.findall(r'<path d="[^"]*" clip-path[^>]*stroke: currentColor; stroke-opacity: 0.45', panel)
        assert len(grey) == len(runs)
        assert [panel.count(f">arm {n}<") for n in range(6)] == [1] * 6
        assert "#1b80c4" in panel
    assert "known.csv" in compared
    few = make_run(tmp_path / "few", [*TRAIN, *VALIDATION])
    compared = section(page(few, reference=str(tmp_path / "known.csv")), "Is this normal?")
    assert compared.count("<figcaption>") == 1
    none = make_run(tmp_path / "none", TRAIN)
    assert "nothing that can be compared yet" in page(none, reference=str(tmp_path / "known.csv"))
    assert "Is this normal?" not in page(ours)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tokens", "steps", "known.csv does not begin with run,tokens"),
        (",50000,", ",,", "known.csv, line 3: could not convert string to float: ''"),
        (",50000,6.4444,", ",50000,6.x,", "known.csv, line 3: could not convert string to float: '6.x'"),
        (",0.8,0.4\nlong,100000", "\nlong,100000", "known.csv, line 3: 10 cells under 12 columns"),
        ("\nlong.*", "\n", "known.csv holds no values"),
        (".*", "", "known.csv does not begin with run,tokens"),
    ],
)
def test_broken_reference_files_are_refused_by_line(tmp_path, old, new, message):
    path = tmp_path / "known.csv"
    write_reference(path, {"long": make_curves(tmp_path / "a")})
    broken = re.sub(old, new, path.read_text(), count=1, flags=re.DOTALL)
    assert broken != path.read_text()
    path.write_text(broken)
    with pytest.raises(ValueError, match=re.escape(message)):
        page(tmp_path / "a", reference=str(path))


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_are_references_that_come_with_the_package(name, tmp_path, monkeypatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert STUDIES[name].name in project["tool"]["setuptools"]["package-data"]["condenser.reports"]
    run = make_curves(tmp_path / "a")
    write_reference(tmp_path / "shipped.csv", {"mlm, seed 1": run})
    monkeypatch.setitem(STUDIES, name, tmp_path / "shipped.csv")
    assert main(["report", str(run), "--output", str(tmp_path / "r.html"), "--reference", name]) == 0
    assert "shipped.csv" in section((tmp_path / "r.html").read_text(), "Is this normal?")


def test_the_references_of_the_studies_are_small_and_whole():
    runs = [read_reference(path) for path in STUDIES.values()]
    assert sum(path.stat().st_size for path in STUDIES.values()) < 100_000
    assert {title for found in runs for curves in found.values() for title in comparable(curves)} == set(PANELS)
