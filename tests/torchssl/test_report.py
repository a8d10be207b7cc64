"""The report: what the stages wrote, in JSON, in words and in pictures, for one seed and over several."""
import json

import numpy as np
import pytest
from PIL import Image

from shared.cli import UserError
from TorchSSL import report

CLASSES = ["cat", "dog", "newt"]


def write_run(folder, last, seed=1):
    """A finished classifier's run folder."""
    folder.mkdir(parents=True)
    accuracy = {"last": last, "best_on_test": last + 0.01, "best_iteration": 8, "median_of_last_20": last - 0.01,
                "evaluations_in_median": 3}
    result = dict(num_labels=6, seed=seed, unlabeled_images=30, test_images=9, iterations=10, classes=CLASSES,
                  accuracy=accuracy, confusion_matrix=[[3, 0, 0], [1, 2, 0], [0, 0, 3]], seconds=1.5, device="cpu",
                  hardware="a processor", threads=2, processes=1, precision="fp32")
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"step": 5, "train/total_loss": 2.0, "train/utilisation": 0.4}, {"step": 9, "eval/top-1-acc": last}]
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def experiment(tmp_path):
    """All that three stages and two controls write, without the networks and images."""
    write_run(tmp_path / "run", 0.75)
    write_run(tmp_path / "run_aug100", 0.875)
    write_run(tmp_path / "run_twice", 0.8125)
    write_run(tmp_path / "run_other_seed", 0.78125)
    pseudo = dict(classes=CLASSES, agreement=0.8, agreement_by_class=[1.0, 0.6, None], pseudo_label_counts=[12, 8, 10])
    (tmp_path / "run" / "pseudo_label.json").write_text(json.dumps(pseudo))
    (tmp_path / "edm").mkdir()
    lines = [{"Progress/kimg": {"mean": k}, "Loss/loss": {"mean": 1 / (k + 1)}} for k in range(3)]
    (tmp_path / "edm" / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    out.mkdir()
    steps = [("classifier", 8.0), ("zip", 2.0), ("diffusion model", 30.0), ("classifier again", 7.0),
             ("control twice", 5.0), ("report", 3.0)]
    entries = [dict(name=name, command="x", status=0, started=0, seconds=seconds) for name, seconds in steps]
    (out / "commands.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def make(folder, monkeypatch, *extra):
    flags = [f"--out={folder}/out", "--dataset=digits", f"--stage1={folder}/run", f"--stage2={folder}/edm",
             f"--stage3={folder}/run_aug100", f"--images={folder}/none", *extra]
    monkeypatch.setattr("sys.argv", ["report.py", *flags])
    report.main()
    return json.loads((folder / "out" / "report.json").read_text())


def test_one_seed(experiment, monkeypatch, capsys):
    content = make(experiment, monkeypatch)
    assert (content["stage1_accuracy"], content["stage3_accuracy"], content["difference"]) == (0.75, 0.875, 0.125)
    assert content["pseudo_label_accuracy"] == 0.8
    assert content["pseudo_label_accuracy_by_class"] == {"cat": 1.0, "dog": 0.6, "newt": None}
    assert content["seconds"] == dict(stage1=10.0, stage2=30.0, stage3=7.0, controls=5.0, other=3.0, total=55.0)
    assert set(content["controls"]) == {"twice", "other_seed"} and content["controls"]["twice"]["last"] == 0.8125
    assert content["hardware"]["stage1"]["precision"] == "fp32" and content["versions"]["torch"]

    text = (experiment / "out" / "report.md").read_text()
    assert "| stage 1 | 75.00 | 74.00 | 76.00 |" in text and "| stage 3 (with generated images) | 87.50 |" in text
    assert "Stage 3 minus stage 1: +12.50 points, one seed" in text and "| newt | - | 10 |" in text
    printed = capsys.readouterr().out
    assert "stage 3, accuracy on the test set   87.50 %  (+12.50 points)" in printed
    assert printed.endswith(f"report: {experiment}/out/report.md\n")
    assert content["pictures"] == ["curves.png", "confusion.png"]
    for name in content["pictures"]:
        assert f"![{name}]({name})" in text and Image.open(experiment / "out" / name).size[0] > 300


def test_what_is_missing_is_null(experiment, monkeypatch):
    (experiment / "run_aug100" / "result.json").unlink()
    (experiment / "run" / "pseudo_label.json").unlink()
    content = make(experiment, monkeypatch)
    assert content["stage1_accuracy"] == 0.75 and content["stage3_accuracy"] is None is content["difference"]
    assert content["pseudo_label_accuracy"] is None is content["generated"]


def test_a_damaged_result_is_named(experiment, monkeypatch):
    (experiment / "run" / "result.json").write_text('{"accuracy": ')
    with pytest.raises(UserError, match="run/result.json is damaged"):
        make(experiment, monkeypatch)


def test_over_seeds(experiment, monkeypatch):
    first = make(experiment, monkeypatch)
    figures = [(0.7, 0.8, 0.72), (0.8, 0.85, 0.84), (0.9, 0.88, 0.86)]
    reports = [{**first, "seed": seed, "stage1_accuracy": a, "stage3_accuracy": b,
                "controls": {"other_seed": {"last": c}}} for seed, (a, b, c) in enumerate(figures)]
    content = report.over_seeds(reports)
    a, b, c = np.array(figures).T
    assert content["stage1_accuracy"] == pytest.approx(a.mean()) and content["seeds"] == [0, 1, 2]
    assert content["summary"]["stage3_accuracy"]["standard_deviation"] == pytest.approx(b.std(ddof=1))
    found = content["differences"]["stage3_minus_stage1_accuracy"]
    assert found["mean"] == pytest.approx((b - a).mean()) and found["positive"] == 2 and found["seeds"] == 3
    assert found["standard_error"] == pytest.approx((b - a).std(ddof=1) / 3 ** 0.5)
    cautious = content["differences"]["stage3_minus_stage1_two_runs"]
    assert cautious["mean"] == pytest.approx((b - (a + c) / 2).mean())

    folders = []
    for seed, one in enumerate(reports):
        folders.append(experiment / f"seed_{seed}")
        folders[-1].mkdir()
        (folders[-1] / "report.json").write_text(json.dumps(one))
    monkeypatch.setattr("sys.argv", ["report.py", f"--out={experiment}/all", *(f"--seed_report={f}" for f in folders)])
    report.main()
    assert json.loads((experiment / "all" / "report.json").read_text()) == content
    text = (experiment / "all" / "report.md").read_text()
    assert "| stage 1 | 80.00 | 10.00 | 3 |" in text and "| stage 1 | +4.33 |" in text and "2 of 3 |" in text


def test_seeds_with_missing_stages_are_left_out_of_the_differences(experiment, monkeypatch):
    first = make(experiment, monkeypatch)
    content = report.over_seeds([first, {**first, "seed": 2, "stage3_accuracy": None}])
    assert content["differences"]["stage3_minus_stage1_accuracy"] == dict(mean=0.125, standard_error=None, positive=1,
                                                                          seeds=1)
    assert content["summary"]["stage3_accuracy"]["by_seed"] == [0.875, None]


def test_a_second_stage_that_knows_its_noise_is_compared_with_plain_dpt(experiment, monkeypatch, capsys):
    write_run(experiment / "run_aug100_tdsm", 0.9375)
    transition = dict(transition_matrix=[[1]], method="held_out", held_out=30, error=0.125, error_of_no_noise=0.25)
    (experiment / "transition.json").write_text(json.dumps(transition))
    for kind, share in (("plain", 0.71), ("tdsm", 0.83)):
        (experiment / f"judged-{kind}").mkdir()
        (experiment / f"judged-{kind}" / "result.json").write_text(
            json.dumps({"class_accuracy": share, "judge_accuracy": 0.99}))
    content = make(experiment, monkeypatch, f"--tdsm_stage3={experiment}/run_aug100_tdsm",
                   f"--tdsm_transition={experiment}/transition.json", f"--judged={experiment}/judged")
    assert content["stage3_tdsm_accuracy"] == 0.9375 and content["stage3_accuracy"] == 0.875
    assert content["tdsm"]["minus_stage3"] == 0.0625 and content["tdsm"]["minus_stage1"] == 0.1875
    assert content["tdsm"]["images_of_the_right_class"] == {"plain": 0.71, "tdsm": 0.83}
    text = (experiment / "out" / "report.md").read_text()
    for words in ("| stage 3 with images of TDSM, which knows that pseudo-labels err | 93.75 |",
                  "minus stage 3 of plain DPT: +6.25 points", "plain EDM 71.00 %, TDSM 83.00 %",
                  "from 30 further labelled images, which plain DPT did not have", "0.125 from the true ones"):
        assert words in text
    assert "93.75 %  (+6.25 over plain DPT)" in capsys.readouterr().out
    over = report.over_seeds([content, {**content, "stage3_tdsm_accuracy": 0.875, "seed": 2}])
    assert over["differences"]["stage3_tdsm_minus_stage3_accuracy"]["mean"] == pytest.approx(0.03125)
    assert over["summary"]["images_right_tdsm"]["mean"] == pytest.approx(0.83)
    assert "stage3_minus_stage3_tdsm_accuracy" not in over["differences"]


def test_without_it_the_report_does_not_mention_it(experiment, monkeypatch):
    content = make(experiment, monkeypatch)
    assert "tdsm" not in content and "TDSM" not in (experiment / "out" / "report.md").read_text()
    assert "stage3_tdsm_accuracy" not in report.over_seeds([content])


def test_seconds_add_up_over_interruptions_and_start_anew_with_another_command(tmp_path):
    path = tmp_path / "commands.jsonl"
    entries = [("a", "old", 9, 0), ("a", "new", 1, 143), ("a", "new", 2, 0), ("a", "new", 4, 0), ("b", "x", 8, 0)]
    lines = [json.dumps(dict(name=n, command=c, seconds=s, status=status)) for n, c, s, status in entries]
    path.write_text("\n".join(lines) + '\n{"name": "cut sho')
    assert report.seconds_by_step(path) == {"a": 3.0, "b": 8.0}
