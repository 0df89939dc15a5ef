"""The experiments of examples/digits: that they run, and that what they rest on holds."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.append(str(Path(__file__).parents[2]))

from examples.digits import __main__ as command
from examples.digits import data, report, specialists, staged_pruning, training

SETTINGS = training.Settings(seeds=2, epochs=2)


def test_splits_are_disjoint_and_a_seed_has_the_same_one_beside_any_others():
    two, three = data.load(2), data.load(3)
    for part in ("training", "validation", "test"):
        assert torch.equal(getattr(two, part).inputs, getattr(three, part).inputs[:2])
    assert [len(p) for p in (two.training, two.validation, two.test)] == [1000, 200, 597]
    for seed in range(2):
        images = [getattr(two, p).inputs[seed] for p in ("training", "validation", "test")]
        assert len(torch.cat(images).unique(dim=0)) == 1797  # the digits hold no image twice
    assert not torch.equal(two.test.labels[0], two.test.labels[1])


def test_networks_trained_together_share_nothing():
    splits = data.load(2)
    networks = training.initialised(2, (8, 8))
    gradients = []
    for changed in (False, True):
        inputs, labels = splits.training.inputs[:, :50].clone(), splits.training.labels[:, :50]
        if changed:
            inputs[1] = 0.5
        networks.zero_grad()
        batch = data.Batch(inputs, labels, torch.arange(50).expand(2, -1), 0, 1)
        training.cross_entropy(networks(inputs), batch).backward()
        gradients.append([p.grad.clone() for p in networks.parameters()])
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    # and each one's loss is its own mean: as if it were alone
    alone = networks.trained_as([0])
    batch = data.Batch(inputs[:1], labels[:1], torch.arange(50).expand(1, -1), 0, 1)
    training.cross_entropy(alone(inputs[:1]), batch).backward()
    for parameter, joint in zip(alone.parameters(), gradients[0], strict=True):
        torch.testing.assert_close(parameter.grad[0], joint[0])


def test_the_same_run_twice_gives_the_same_errors():
    splits = data.load(2)
    results = []
    for _ in range(2):
        networks = training.initialised(2, (8, 8), dropout=0.2)
        loss = training.cross_entropy
        training.train(networks, splits.training, loss, 2, "again", jitter=True)
        results.append(networks.logits(splits.test.inputs))
    assert torch.equal(*results)


def test_a_jittered_image_is_the_image_shifted_by_up_to_one_pixel():
    torch.manual_seed(0)
    image = torch.arange(1.0, 65.0)
    shifted = data.jittered(image.expand(2, 100, 64)).reshape(-1, 8, 8)
    padded = F.pad(image.view(8, 8), (1, 1, 1, 1))
    all_nine = {
        tuple(padded[y : y + 8, x : x + 8].flatten().tolist()) for y in range(3) for x in range(3)
    }
    assert {tuple(i.flatten().tolist()) for i in shifted} == all_nine


def test_an_epoch_shows_every_example_once():
    splits = data.load(2)
    index = torch.cat([b.index for b in data.batches(splits.training, 0, 1, False)], dim=1)
    assert torch.equal(index.sort(dim=1).values, torch.arange(1000).expand(2, -1))
    few = list(data.batches(splits.training[:30], 0, 1, False))
    assert len(few) == 1 and few[0].size == 30


def test_the_table_compares_seed_by_seed(tmp_path):
    rows = [
        report.measured("a", {report.TEST: torch.tensor([1.0, 3.0])}),
        report.measured("b", {report.TEST: torch.tensor([2.0, 4.0]), "x_y": torch.ones(2)}),
    ]
    experiment = report.Experiment("title", rows, baseline="a")
    lines = report.table(experiment).splitlines()
    assert len(lines) == 4 and "x y" in lines[0]
    assert "2.00 ± 1.00" in lines[2] and "+" not in lines[2]
    assert "3.00 ± 1.00" in lines[3] and "+1.00 ± 0.00" in lines[3]

    report.save("few_labels", experiment, SETTINGS, 1.0, tmp_path)
    loaded, results = report.read(tmp_path / "few_labels.json")
    assert loaded == experiment and results["settings"]["seeds"] == 2
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(readme, command.EXPERIMENTS, tmp_path)
    text = readme.read_text()
    assert lines[3] in text and "old" not in text and text.startswith("before")
    assert text.endswith("after\n") and "(few_labels.png)" in text


def test_masks_keep_the_largest_weights_of_all_layers():
    networks = training.initialised(2, (16, 16))
    masks = staged_pruning.magnitude_masks(networks, 0.1)
    total = sum(w[0].numel() for w in networks.weights)
    for seed in range(2):
        weights = torch.cat([w[seed].abs().flatten() for w in networks.weights])
        kept = torch.cat([m[seed].flatten() for m in masks]).bool()
        assert int(kept.sum()) == round(0.1 * total)
        assert weights[kept].min() >= weights[~kept].max()


def test_the_dustbin_is_the_probability_of_all_other_classes():
    logits = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))
    own = torch.zeros(2, 10, dtype=torch.bool)
    own[0, [1, 4]] = own[1, [2, 3, 9]] = True
    pooled, q = specialists.with_dustbin(logits, own), F.softmax(logits, -1)
    for seed in range(2):
        p = F.softmax(pooled[seed], -1)
        torch.testing.assert_close(p[:, :10][:, own[seed]], q[seed][:, own[seed]])
        torch.testing.assert_close(p[:, 10], q[seed][:, ~own[seed]].sum(-1))


def test_specialists_that_agree_leave_the_answer_as_it_is():
    class Fixed:
        def __init__(self, logits):
            self.values = logits

        def logits(self, inputs):
            return self.values

    logits = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(1))
    own = torch.zeros(1, 2, 10, dtype=torch.bool)
    own[:, :, :4] = True
    agreeing = [Fixed(specialists.with_dustbin(logits, own[0]))]
    answer = specialists.combined(None, Fixed(logits), agreeing, own)
    torch.testing.assert_close(F.softmax(answer, -1), F.softmax(logits, -1), rtol=1e-4, atol=1e-6)
    # One that is sure of class 0 moves it there, where it is asked: with a best class of its own.
    sure = torch.full((2, 6, 11), -20.0)
    sure[..., 0] = 20.0
    sure[..., 4:10] = -float("inf")
    answer = F.softmax(specialists.combined(None, Fixed(logits), [Fixed(sure)], own), -1)
    asked = logits.argmax(-1) < 4
    assert asked.any() and not asked.all()
    assert (answer[asked][:, 0] > F.softmax(logits, -1)[asked][:, 0] + 0.1).all()
    torch.testing.assert_close(answer[~asked], F.softmax(logits, -1)[~asked], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", command.EXPERIMENTS)
def test_every_experiment_runs(name, tmp_path, capsys):
    threads = torch.get_num_threads()
    command.main([name, "--seeds", "2", "--epochs", "2", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["command"] == f"python -m examples.digits {name} --seeds 2 --epochs 2"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(results["rows"]) >= 5
    for row in results["rows"]:
        assert row["name"] in out
        assert all(len(v) == 2 and all(x == x for x in v) for v in row["values"].values())
    assert any(row["name"] == results["baseline"] or row["series"] == results["baseline"]
               for row in results["rows"])  # fmt: skip


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["nonsense"])
    assert "teacher_student" in capsys.readouterr().err
