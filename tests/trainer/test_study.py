"""The study: its grid, its runs on a tiny base, and conclusions that follow from the figures."""

import json
import re
import shutil
from pathlib import Path

import pytest

import attention
from trainer.study import grid as study
from trainer.study.grid import grid, main, measure, parse, plan
from trainer.study.report import UNANSWERED, compared, conclusions, most_dropped, table
from trainer.study.results import MEASURED, Cell, Result

PLACES = {
    **{"base": "base", "data.train": "train.txt", "data.valid": "valid.txt", "eval.text": "valid.txt"},
    **{"data.cache": "study-cache", "runs": "study-runs", "output": "study-docs"},
}
TINY = {
    **{"tokens": 512, "samples": 4, "length": 8, "samples.length": 8, "data.sample_batch": 8, "cpu": "true"},
    **{"seeds": 1, "context": 16, "batch": 8, "eval.every": 100},
}


def arguments(workplace: Path, *more: str) -> list[str]:
    """The command line of a study of the tiny base."""
    options = {name: workplace / path for name, path in PLACES.items()} | TINY
    return ["--methods", "masks", "nsa", *(f"--{name}={value}" for name, value in options.items()), *more]


@pytest.fixture(scope="module")
def page(workplace: Path) -> Path:
    assert main(arguments(workplace)) == 0
    return workplace / "study-docs" / "study.md"


def test_the_grid_has_every_cell_once_and_l1_for_masks_alone():
    cells = grid(study.METHODS, 3)
    assert len(cells) == len({cell.name for cell in cells}) == 3 * (6 * 2 * 2 + 2)
    assert {cell.method for cell in cells if cell.objective == "kl+l1"} == {"masks"}
    assert cells[0] == Cell("masks", "kl", "corpus", 0)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_cells_have_equal_budgets_and_differ_in_what_they_should(workplace: Path):
    configs = plan(parse(arguments(workplace, "--l1", "0.25", "--seeds", "2", "--runs", str(workplace / "none"))))
    assert {sum(stage.steps * stage.batch_size * stage.context for stage in c.stages) for c in configs.values()} == {
        512
    }
    for cell, config in configs.items():
        first, *rest = (stage.steps for stage in config.stages)
        assert first == round(study.TRANSFER * (first + sum(rest)))
        assert {stage.context for stage in config.stages} == {config.eval.context}
        objective = config.stages[-1].objective
        assert (objective.kl, objective.ce > 0, objective.l1) == (
            *(1.0, cell.objective == "kl+ce"),
            0.25 if cell.objective == "kl+l1" else 0.0,
        )
        assert (config.data.train is None) == (cell.text == "sampled")
        assert config.attention["method"] == cell.method
        assert config.seed == cell.seed
    assert len({config.output for config in configs.values()}) == len(configs)


def test_budgets_are_equal_whatever_the_recipes_have(workplace: Path):
    own = ["--runs", str(workplace / "none"), "--precision", "bf16", "--methods", *study.METHODS]
    configs = plan(parse([*arguments(workplace), *own])).values()
    assert {(c.precision, c.eval.context) for c in configs} == {("bf16", 16)}
    assert {(s.batch_size, s.micro_batch_size, s.context) for c in configs for s in c.stages} == {(8, None, 16)}
    assert len({tuple(stage.steps for stage in config.stages) for config in configs}) == 1


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture, tmp_path: Path):
    with pytest.raises(SystemExit):
        main(["--data.train", "a.txt"])
    assert "--data.valid, --eval.text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--report-only", "--seeds", "0", "--batch", "0"])
    assert "--seeds and --batch must be at least 1" in capsys.readouterr().err
    assert main(["--report-only", "--runs", str(tmp_path)]) == 2
    assert "is finished and measured" in capsys.readouterr().err


def test_every_cell_is_a_variant_that_loads(page: Path, workplace: Path):
    base = attention.load(workplace / "base")[0]
    for cell in grid(["masks", "nsa"], 1):
        variant, _ = attention.load(workplace / "study-runs" / cell.name / "variant", base=base)
        assert variant.config.attention["method"] == cell.method


def test_base_text_is_sampled_once(page: Path, workplace: Path):
    assert len(list((workplace / "study-cache").iterdir())) == 1


def test_the_page_has_a_row_a_cell_and_its_figures(page: Path):
    text = page.read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| (masks|nsa) \|", line)]
    assert len(rows) == 10
    figures = re.findall(r"\]\((study/[\w-]+\.png)\)", text)
    assert len(figures) == 4
    assert all((page.parent / figure).stat().st_size > 1000 for figure in figures)
    for cell in grid(["masks", "nsa"], 1):
        measured = json.loads((page.parent.parent / "study-runs" / cell.name / MEASURED).read_text())
        row = measured["row"]
        assert f"| {cell.method} | {cell.objective} | {cell.text} | {row['kl']:.4f} | {row['perplexity']:.2f} |" in text
    assert UNANSWERED not in text
    assert not re.search(r"[{}]", text.partition("## What they write")[0])
    assert str(page.parent.parent) not in text


def test_dropping_all_light_masks_reads_less(page: Path, workplace: Path):
    pruning = json.loads((workplace / "study-runs" / "masks-kl-corpus-seed0" / MEASURED).read_text())["pruning"]
    assert [row["threshold"] for row in pruning] == list(study.PRUNE)
    dropped, keys = ([row[name] for row in pruning] for name in ("dropped", "keys_read"))
    assert dropped[0] == 0
    assert dropped == sorted(dropped)
    assert dropped[-1] > 0
    assert keys == sorted(keys, reverse=True)


def test_a_study_goes_on_where_it_stopped(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    runs = workplace / "study-runs"
    shutil.rmtree(runs / "nsa-kl-corpus-seed0" / "variant")
    (runs / "nsa-kl-corpus-seed0" / MEASURED).unlink()
    ran, read = [], []
    monkeypatch.setattr(study, "run", lambda config, run=study.run: ran.append(config.output) or run(config))
    each = study.evaluate.evaluate
    monkeypatch.setattr(study.evaluate, "evaluate", lambda options: read.extend(options.variant) or each(options))
    before = page.read_text()
    assert main(arguments(workplace)) == 0
    assert ran == [str(runs / "nsa-kl-corpus-seed0")]
    assert read == [str(runs / "nsa-kl-corpus-seed0" / "variant")]
    assert re.sub(r"0\.\d \|$", "", page.read_text(), flags=re.M) == re.sub(r"0\.\d \|$", "", before, flags=re.M)


def test_what_was_measured_of_a_seed_is_kept(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = parse(arguments(workplace, "--methods", "nsa", "--seeds", "2", "--runs", str(tmp_path)))
    configs, read = plan(options), []
    for config in configs.values():
        Path(config.output).mkdir()

    def first_alone(asked):
        if read:
            raise OSError("stopped")
        read.extend(asked.variant)
        return [{} for _ in read]

    monkeypatch.setattr(study.evaluate, "evaluate", first_alone)
    with pytest.raises(OSError, match="stopped"):
        measure(configs, options)
    assert [(Path(config.output) / MEASURED).is_file() for config in configs.values()] == 4 * [True] + 4 * [False]


def test_a_run_with_other_options_is_not_taken_for_this_one(page: Path, workplace: Path, capsys: pytest.CaptureFixture):
    assert main(arguments(workplace, "--data.sample_batch", "4")) == 2
    assert capsys.readouterr().err.count("holds a run with other options") == 10


def test_a_stopped_cell_stops_the_study(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(study, "run", lambda config: 75)
    assert main(arguments(workplace, "--runs", str(workplace / "stopped"))) == 75
    assert "masks-kl-corpus-seed0 did not finish" in capsys.readouterr().err


def test_the_page_alone_needs_no_text_and_takes_what_there_is(page: Path, workplace: Path, tmp_path: Path):
    for name in ("masks-kl-corpus-seed0", "nsa-kl-corpus-seed0"):
        shutil.copytree(workplace / "study-runs" / name, tmp_path / "runs" / name)
    assert main(["--report-only", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "study.md").read_text()
    assert text.count(UNANSWERED) == 2
    assert "Is the simplest method the best?" in text


class Told(Result):
    """A result without a run."""

    def rows(self, kind: str) -> list[dict]:
        return [{"seconds": 60.0}]


def result(method: str, objective: str, text: str, kl: float, perplexity: float = 50.0, samples: float = 0.0, **more):
    row = {"kl": kl, "perplexity": perplexity, "base_perplexity": 40.0, "top1_agreement": 0.9, "keys_read": 7}
    row["samples"] = {
        "sample_perplexity": {"difference": samples, "error": 0.01},
        "new_names": {"difference": more.get("names", 0.1), "error": 0.1},
    }
    row["slices"] = {"hits, over 256 back": {"ce_excess": more.get("hits", 0.0), "ce_excess_error": 0.01}}
    return Told(Cell(method, objective, text, more.get("seed", 0)), Path("nowhere"), row, more.get("pruning", []))


def sweep(*steps: tuple[float, float]) -> list[dict[str, float]]:
    """Rows of a sweep from pairs of the dropped share and the KL."""
    return [
        {"threshold": place / 10, "dropped": dropped, "keys_read": 70 - place, "kl": kl, "perplexity": 1.0}
        for place, (dropped, kl) in enumerate(steps)
    ]


@pytest.mark.parametrize(
    ("masks", "nsa", "performer", "verdict"),
    [
        (0.02, 0.03, 0.05, "Yes"),
        (0.03, 0.029, 0.05, "As good as any"),
        (0.06, 0.05, 0.02, "No: performer is closer to the base than masks, whose KL is 3.0 times as high"),
    ],
)
def test_which_method_is_best_follows_from_kl(masks, nsa, performer, verdict):
    figures = {"masks": masks, "nsa": nsa, "performer": performer}
    found = conclusions([result(method, "kl", "corpus", kl) for method, kl in figures.items()])[0]
    assert found.verdict.startswith(verdict)
    assert all(f"{method} {kl:.4f}" in found.evidence for method, kl in figures.items())


@pytest.mark.parametrize(
    ("sampled", "difference", "verdict"),
    [
        (0.05, 0.02, "No: fitted on the corpus, every variant"),
        (0.03, 0.02, "Not for incoherence"),
        (0.03, 0.40, "In part: the text of masks is less likely"),
        (0.06, 0.40, "No: the text of masks is not as likely"),
    ],
)
def test_whether_data_is_to_blame_follows_from_kl_and_samples(sampled, difference, verdict):
    results = [
        result("masks", "kl", "corpus", 0.05, samples=difference),
        result("masks", "kl", "sampled", sampled),
    ]
    found = conclusions(results)[1]
    assert found.verdict.startswith(verdict)
    assert f"masks 0.0500 → {sampled:.4f}" in found.evidence


@pytest.mark.parametrize(
    ("masks", "nsa", "verdict"),
    [
        (49.0, 49.0, "Yes, for perplexity: it is lower with it in 2 of 2"),
        (49.0, 52.0, "Not as a rule: perplexity is lower with it in 1 of 2 comparisons, higher in 1"),
        (50.1, 52.0, "No: perplexity is lower with it in none of 2 comparisons, higher in 1"),
    ],
)
def test_whether_cross_entropy_helps_follows_from_perplexity(masks, nsa, verdict):
    results = [result(method, "kl", "corpus", 0.05) for method in ("masks", "nsa")]
    results += [result("masks", "kl+ce", "corpus", 0.08, masks), result("nsa", "kl+ce", "corpus", 0.05, nsa)]
    found = conclusions(results)[2]
    assert found.verdict.startswith(verdict)
    assert found.verdict.endswith("The KL to the base is higher with it in 1 of them.")


@pytest.mark.parametrize(
    ("plain", "penalised", "verdict"),
    [
        (sweep((0, 0.05), (0.2, 0.09)), sweep((0, 0.06), (0.6, 0.062), (0.9, 0.2)), "Yes: 60% of the masks can go"),
        (sweep((0, 0.05), (0.2, 0.051)), sweep((0, 0.06), (0.6, 0.09)), "Some: 20% of the masks can go"),
        (sweep((0, 0.05), (0.2, 0.06)), sweep((0, 0.06), (0.6, 0.09)), "No: dropping even the lightest"),
        (sweep((0, 0.05)), sweep((0, 0.06)), "Not answered: no mask became light enough"),
    ],
)
def test_whether_masks_can_go_follows_from_the_sweep(plain, penalised, verdict):
    results = [
        result("masks", "kl", "corpus", 0.05, pruning=plain),
        result("masks", "kl+l1", "corpus", 0.06, pruning=penalised),
    ]
    found = conclusions(results)[3]
    assert found.verdict.startswith(verdict)
    assert "from 0.0500 to 0.0600" in found.evidence


@pytest.mark.parametrize(("keys", "words"), [(70, "as many keys as before"), (35, "reads 50% fewer keys")])
def test_what_pruning_saves_is_said(keys, words):
    pruning = sweep((0, 0.05), (0.5, 0.05))
    pruning[1]["keys_read"] = keys
    found = conclusions([result("masks", "kl", "corpus", 0.05, pruning=pruning)])[3]
    assert words in found.verdict


def test_most_dropped_is_bound_by_cost():
    rows = sweep((0, 0.05), (0.3, 0.054), (0.4, 0.0551), (0.5, 0.0549))
    assert most_dropped(rows)["dropped"] == 0.5
    assert most_dropped(rows[:3])["dropped"] == 0.3


def test_without_results_nothing_is_concluded():
    assert [one.verdict for one in conclusions([result("nsa", "kl", "corpus", 0.1)])] == [UNANSWERED] * 5


@pytest.mark.parametrize(
    ("ones", "others", "expected"),
    [
        ([0.10, 0.11, 0.12], [0.13, 0.14, 0.15], "lower"),
        ([0.16, 0.17], [0.13, 0.14, 0.15], "higher"),
        ([0.10, 0.11, 0.135], [0.13, 0.14, 0.15], "equal"),  # a seed of the one among those of the other
        ([0.100, 0.101], [0.102, 0.103], "equal"),  # apart, by less than 5 %
        ([0.10], [0.12], "lower"),
    ],
)
def test_a_difference_counts_only_beyond_what_seeds_differ_by(ones, others, expected):
    assert compared("kl", ones, others) == expected


def test_what_seeds_say_is_one_line_with_its_spread():
    results = [result("masks", "kl", "corpus", kl, seed=seed) for seed, kl in enumerate((0.10, 0.12, 0.14))]
    head, _, *lines = table([*results, result("nsa", "kl", "corpus", 0.05)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert [row[0] for row in cells[1:]] == ["masks", "nsa"]
    assert [row[cells[0].index("KL, nats/token")] for row in cells[1:]] == ["0.1200 ± 0.0200", "0.0500"]
    assert all(len(row) == len(cells[0]) for row in cells)


@pytest.mark.parametrize(
    ("far_hits", "names", "verdict"),
    [
        ([0.02, 0.03], 0.1, "Not by itself: nsa is nearer than masks, and worse at hits, over 256 back."),
        ([0.02, 0.30], 0.1, "As far as these measures tell"),  # one seed of masks loses as much
        ([0.26, 0.27], 0.1, "As far as these measures tell"),  # within two standard errors
        ([0.02, 0.03], 0.5, "Not by itself: nsa is nearer than masks, and worse at hits, over 256 back and new names."),
    ],
)
def test_whether_nearness_is_quality_follows_from_what_it_hides(far_hits, names, verdict):
    results = [
        *(result("masks", "kl", "corpus", 0.05, hits=hits, seed=seed) for seed, hits in enumerate(far_hits)),
        *(result("nsa", "kl", "corpus", 0.03, hits=0.28, names=names, seed=seed) for seed in range(2)),
    ]
    found = conclusions(results)[4]
    assert found.verdict.startswith(verdict)
    assert found.evidence.index("nsa (KL 0.0300") < found.evidence.index("masks (KL 0.0500")
