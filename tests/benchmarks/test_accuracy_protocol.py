"""The protocol of the benchmark of accuracy: splits, changed labels, gene scores, peers, and what is computed from
predictions, each beside a plain loop or a library."""

import importlib
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn.metrics import f1_score

from annatac_scale.stream.batch import Batch

ACCURACY = Path(__file__).parents[2] / "benchmarks" / "accuracy"
sys.path.append(str(ACCURACY))
protocol: Any = importlib.import_module("protocol")
sets: Any = importlib.import_module("sets")
genes: Any = importlib.import_module("genes")
paired: Any = importlib.import_module("paired")
calibrated: Any = importlib.import_module("calibrated")
novel: Any = importlib.import_module("novel")
models: Any = importlib.import_module("models")
plans: Any = importlib.import_module("plans")
outside: Any = importlib.import_module("outside")
sections: Any = importlib.import_module("sections")
derive: Any = importlib.import_module("derive")
rows: Any = importlib.import_module("rows")
grid: Any = importlib.import_module("grid")


def _labels(seed: int, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]), np.array([f"cell{i}" for i in range(n)])


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """``protocol.opened`` gives 200 cells of three types in four donors; returns the types."""
    types, barcodes = _labels(0)
    types[:5] = ""
    groups = np.array([f"d{i % 4}" for i in range(200)])
    levels = sparse.csr_matrix((np.random.default_rng(0).random((200, 30)) < 0.2).astype(np.uint8))
    store = SimpleNamespace(obs=lambda columns: pd.DataFrame({"barcode": barcodes}))
    data_set = sets.DataSet("s", "s.h5ad", "hg19", ("t",), ("donor", ("d0", "d1+d3")))
    monkeypatch.setattr(
        protocol, "opened", lambda config, stores: (store, data_set, sets.Labelled(levels, types, groups))
    )
    return types


@pytest.mark.parametrize("change", [{}, {"few": 3, "draw": 0}, {"noise": 0.2, "draw": 1}, {"leave": "b"}])
def test_no_cell_trains_and_tests_and_no_type_of_a_test_cell_is_given(
    stubbed: np.ndarray, change: dict[str, Any]
) -> None:
    made = list(protocol.splits({"change": change}, None))
    assert [split.value for split in made] == ["d0", "d1+d3"]
    for split in made:
        problem = split.problem
        assert not set(problem.train) & set(problem.test)
        assert set(problem.train) <= set(problem.seen)
        assert not set(problem.seen) & set(problem.test)
        others = np.setdiff1d(np.arange(200), problem.train)
        assert (problem.types[others] == "").all()
        assert (problem.types[problem.train] != "").all()
        assert (split.truth == stubbed[problem.test]).all()
        if "noise" not in change:
            assert (problem.types[problem.train] == stubbed[problem.train]).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.9), st.integers(0, 5), st.integers(0, 3))
def test_exactly_the_share_of_labels_is_wrong_and_a_larger_share_holds_a_smaller(
    share: float, draw: int, seed: int
) -> None:
    types, barcodes = _labels(seed)
    train = np.arange(0, 200, 2)
    learnt = protocol.noisy(types, train, barcodes, share, draw)
    wrong = np.flatnonzero(learnt != types)
    assert len(wrong) == round(share * len(train))
    assert set(wrong) <= set(train)
    assert set(learnt) <= set(types)
    more = protocol.noisy(types, train, barcodes, min(1.0, share + 0.1), draw)
    assert (more[wrong] == learnt[wrong]).all()


def test_wrong_labels_are_each_other_type_alike() -> None:
    types, barcodes = np.repeat("a", 3000), np.array([f"cell{i}" for i in range(3000)])
    types = np.concatenate([types, ["b", "c"]])
    barcodes = np.concatenate([barcodes, ["x", "y"]])
    learnt = protocol.noisy(types, np.arange(3002), barcodes, 0.5, 0)
    counts = pd.Series(learnt[:3000][learnt[:3000] != "a"]).value_counts()
    assert counts["b"] + counts["c"] in (1499, 1500, 1501)
    assert stats.binomtest(int(counts["b"]), int(counts.sum())).pvalue > 0.001


@pytest.mark.parametrize("change", [{"few": 4}, {"share": 0.4}])
def test_kept_labels_are_counted_by_type_and_do_not_depend_on_the_order_of_cells(
    change: dict[str, Any],
) -> None:
    types, barcodes = _labels(1)
    train = np.arange(0, 150)
    learnt, kept = protocol.changed(types, train, barcodes, {**change, "draw": 2})
    assert (learnt == types).all()
    for name in "abc":
        n = int((types[train] == name).sum())
        assert (types[kept] == name).sum() == (4 if "few" in change else max(1, round(0.4 * n)))
    order = np.random.default_rng(0).permutation(200)
    again = protocol.changed(
        types[order], np.flatnonzero(np.isin(order, train)), barcodes[order], {**change, "draw": 2}
    )[1]
    assert set(barcodes[order][again]) == set(barcodes[kept])
    other = protocol.changed(types, train, barcodes, {**change, "draw": 3})[1]
    assert set(other) != set(kept)


def test_folds_hold_each_type_alike() -> None:
    types, barcodes = _labels(2)
    counts = pd.crosstab(types, protocol.folds(types, barcodes)).to_numpy()
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()


def test_gene_scores_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    peaks = pd.DataFrame({"chrom": rng.choice(["chr1", "chr2"], 60), "start": rng.integers(0, 60_000, 60)})
    peaks["end"] = peaks["start"] + rng.integers(1, 3_000, 60)
    where = pd.DataFrame({"chrom": rng.choice(["chr1", "chr2", "chr3"], 30)})
    where["start"] = rng.integers(3_000, 60_000, 30)
    where["end"] = where["start"] + rng.integers(1, 8_000, 30)
    where["gene"] = [f"g{i % 25}" for i in range(30)]
    where["strand"] = rng.choice(["+", "-"], 30)
    counts = sparse.csr_matrix(rng.integers(0, 4, (7, 60)))
    expected: dict[str, set[int]] = {}
    for gene in where.itertuples():
        low = gene.start - 2_000 if gene.strand == "+" else gene.start
        high = gene.end if gene.strand == "+" else gene.end + 2_000
        for number, peak in enumerate(peaks.itertuples()):
            if peak.chrom == gene.chrom and peak.start < high and peak.end > low:
                expected.setdefault(gene.gene, set()).add(number)
    scores, names = genes.gene_scores(counts, peaks, where)
    assert names.tolist() == sorted(expected)
    for column, name in enumerate(names):
        loop = counts[:, sorted(expected[name])].sum(axis=1)
        np.testing.assert_array_equal(scores[:, [column]].toarray(), loop)


@pytest.mark.parametrize("assembly", ["hg19", "mm9", "mm10"])
def test_tables_of_genes_have_places_on_chromosomes(assembly: str) -> None:
    table = genes.gene_table(assembly)
    assert len(table) > 20_000
    assert (table["start"] < table["end"]).all()
    assert set(table["strand"]) == {"+", "-"}
    assert table["chrom"].str.startswith("chr").all()


def _told(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.choice(["a", "b", "c"], 120, p=[0.6, 0.3, 0.1])
    ours, theirs = (
        np.where(rng.random(120) < right, truth, rng.choice(["a", "b", "c", "d"], 120))
        for right in (0.8, 0.6)
    )
    return truth, ours, theirs


def test_the_paired_bootstrap_is_that_of_a_plain_loop() -> None:
    truth, ours, theirs = _told(0)
    types = np.unique(truth)

    def difference(cells: np.ndarray) -> float:
        scores = [
            f1_score(truth[cells], told[cells], labels=types, average="macro", zero_division=0)
            for told in (ours, theirs)
        ]
        return float(scores[0] - scores[1])

    found = paired.f1_difference(truth, ours, theirs)
    assert found["difference"] == pytest.approx(difference(np.arange(120)), abs=1e-5)
    rng = np.random.default_rng(1)
    members = [np.flatnonzero(truth == name) for name in types]
    draws = [np.concatenate([rng.choice(own, len(own)) for own in members]) for _ in range(600)]
    loop = np.quantile([difference(cells) for cells in draws], [0.025, 0.975])
    # Both are drawn: quantiles of 600 and 2,000 draws.
    assert found["low"] == pytest.approx(loop[0], abs=0.03)
    assert found["high"] == pytest.approx(loop[1], abs=0.03)


def test_an_ensemble_is_the_mean_of_the_chances_and_survives_the_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells, classes = np.array([f"0/c{i}" for i in range(20)]), np.array(["a", "b", "c"])
    members = [
        paired.Told(cells, np.repeat("a", 20), np.repeat("b", 20), rng.dirichlet([1, 1, 1], 20), classes)
        for _ in range(3)
    ]
    joined = paired.ensemble(members)
    mean = sum(member.chances for member in members) / 3
    assert joined.types.tolist() == classes[mean.argmax(axis=1)].tolist()
    joined.write(tmp_path / "p" / "one.npz")
    again = paired.Told.read(tmp_path / "p" / "one.npz")
    assert again.types.tolist() == joined.types.tolist()
    np.testing.assert_allclose(again.chances, joined.chances, atol=1e-6)
    other = paired.Told(
        cells[::-1], *(getattr(members[0], n) for n in ("truth", "types", "chances", "classes"))
    )
    with pytest.raises(ValueError, match="other cells"):
        paired.ensemble([members[0], other])


def test_paired_rows_compare_with_the_best_linear_method(tmp_path: Path) -> None:
    truth, ours, theirs = _told(2)
    cells = np.array([f"c{i}" for i in range(120)])
    task = {"set": "s", "select": "all", "labels": "t"}
    saved = []
    for model, types in ((plans.MODEL, ours), (plans.LR, theirs), (plans.SVD_LR, np.repeat("a", 120))):
        config = {"table": "sets", "kind": "method", **task, "model": model, "seed": 0}
        told = paired.Told(cells, truth, types, np.empty((0, 0)), np.array([], str))
        told.write(tmp_path / f"{rows.digest(config)}.npz")
        saved.append(
            {"config": config, "figures": {"pooled": {"macro_f1": f1_score(truth, types, average="macro")}}}
        )
    made = derive.derived(saved, tmp_path)
    against = {row["config"]["model"]: row["figures"] for row in made if row["config"]["kind"] == "paired"}
    assert {figures["against"] for figures in against.values()} == {plans.LR}
    assert all(figures["is_bar"] for figures in against.values())
    assert against[plans.MODEL]["difference"] == paired.f1_difference(truth, ours, theirs)["difference"]
    # The bar stays what it is though its predictions are gone: nothing is compared with a lesser one.
    (tmp_path / f"{rows.digest(saved[1]['config'])}.npz").unlink()
    assert not [row for row in derive.derived(saved, tmp_path) if row["config"]["kind"] == "paired"]


def test_calibration_is_judged_by_temperature_and_limits_of_the_other_cells() -> None:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet([1, 1, 1, 1], 4000)
    codes = np.array([rng.choice(4, p=row) for row in chances])
    logits = 2 * np.log(chances)  # too sure by a factor of 2
    found = calibrated.judged((logits[:2000], codes[:2000]), (logits[2000:], codes[2000:]))
    assert (found["n_calib"], found["n_test"]) == (2000, 2000)
    assert found["temperature"] == pytest.approx(2, abs=0.15)
    assert found["ece"] < found["ece_band"] < found["ece_raw"]
    scaled = logits / found["temperature"]
    soft = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    for share in (0.9, 0.95):
        own = np.sort(soft[:2000][np.arange(2000), codes[:2000]])
        limit = own[2000 - int(np.ceil(2001 * share))]
        inside = soft[2000:] >= limit
        assert found[f"coverage_{round(100 * share)}"] == pytest.approx(
            inside[np.arange(2000), codes[2000:]].mean(), abs=0.002
        )
        assert found[f"sets_{round(100 * share)}"] == pytest.approx(inside.sum(axis=1).mean(), abs=0.01)


def test_vector_scaling_mends_what_no_temperature_does() -> None:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet([1, 1, 1, 1], 4000)
    codes = np.array([rng.choice(4, p=row) for row in chances])
    logits = np.log(chances) + np.array([2.0, 0, 0, -2.0])  # for one type and against another
    found = calibrated.judged((logits[:2000], codes[:2000]), (logits[2000:], codes[2000:]))
    assert found["ece_vector"] < found["ece_vector_band"] < found["ece"]
    right = {"": logits, "_vector": np.log(chances)}
    for end, said in right.items():
        assert found[f"accuracy{end}"] == pytest.approx(
            (said[2000:].argmax(1) == codes[2000:]).mean(), abs=0.01
        )
    assert found["macro_f1_vector"] > found["macro_f1"]


def test_the_page_has_each_figure_of_calibration_below_its_name() -> None:
    keys = [
        *(
            "n_calib",
            "n_test",
            "ece",
            "ece_band",
            "ece_raw",
            "coverage_90",
            "sets_90",
            "coverage_95",
            "sets_95",
        ),
        *("accuracy", "accuracy_vector", "macro_f1", "macro_f1_vector", "ece_vector", "ece_vector_band"),
    ]
    figures = {key: number / 100 for number, key in enumerate(keys, 11)} | {"n_calib": 400.0, "n_test": 399.0}
    config = {"table": "calibration", "set": "snareseq", "labels": "cell_type", "model": plans.MODEL}
    _, first, second = sections._calibration([{"config": config, "figures": {"out of fold": figures}}])

    def read(table: str) -> list[tuple[str, str]]:
        head, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        return list(zip(head, row, strict=True))

    assert read(first)[3:] == [
        *(("calibrate", "400"), ("test", "399"), ("ECE", "0.130"), ("its band", "0.140")),
        *(("ECE as it comes", "0.150"), ("coverage of 90%", "0.160"), ("types a set", "0.170")),
        *(("coverage of 95%", "0.180"), ("types a set", "0.190")),
    ]
    assert read(second) == [
        *(
            ("set", "snareseq, 15 types"),
            ("cells", "out of fold"),
            ("accuracy", "0.200"),
            ("by vector", "0.210"),
        ),
        *(("macro F1", "0.220"), ("by vector", "0.230"), ("ECE", "0.130"), ("by vector", "0.240")),
        ("its band", "0.250"),
    ]


def test_novel_cells_are_told_apart_as_plain_loops_tell() -> None:
    rng = np.random.default_rng(0)
    held_out, like = rng.normal(0, 1, 199), rng.normal(0, 1, 80)
    known, strange = rng.normal(0.8, 1, 60), rng.normal(2, 1, 40)
    found = novel.told_apart(held_out, like, known, strange)
    loop = np.mean([float(s > k) + 0.5 * (s == k) for s in strange for k in known])
    assert found["auroc"] == pytest.approx(loop)
    threshold = np.sort(strange)[int(0.05 * 40)]
    assert found["fpr95"] == pytest.approx(np.mean(known >= threshold))
    limit = np.sort(held_out)[-10]  # 5% of 200, one of them the cell that is asked
    assert found["false_within"] == pytest.approx(np.mean(like > limit))
    assert found["false_share"] == pytest.approx(np.mean(known > limit))
    above_usual = statistics.median([*known, *strange]) - statistics.median(held_out)
    assert found["false_adapted"] == pytest.approx(np.mean(known - above_usual > limit))
    assert above_usual > 0.2
    assert found["false_adapted"] < found["false_share"]


def test_scores_of_novelty_of_a_linear_method_are_larger_far_from_its_training_cells() -> None:
    rng = np.random.default_rng(0)
    centres = (np.eye(3) * 6).astype(np.float32)
    codes = rng.integers(0, 3, 400)
    z = (centres[codes] + rng.normal(0, 1, (400, 3))).astype(np.float32)
    depth, fits = rng.integers(50, 200, 400), rng.normal(-8, 0.1, 400).astype(np.float32)
    fit, aside = (
        novel.Outputs(z[part] @ centres.T, z[part], depth[part], fits[part])
        for part in (slice(300), slice(300, 400))
    )
    known = novel.known_of(fit, codes[:300], novel.Profiles(np.zeros((5, 3), np.float32)), aside)
    hundred, well, badly = np.full(3, 100), *(np.full(3, level, np.float32) for level in (-7, -9))
    near = novel.scores(known, novel.Outputs(centres @ centres.T, centres, hundred, well))
    away = np.full((3, 3), -6, np.float32)
    far = novel.scores(known, novel.Outputs(np.zeros((3, 3), np.float32), away, hundred, badly))
    assert list(near) == list(novel.SCORES)
    for name, found in near.items():
        assert far[name].min() > found.max(), name
    of_aside = novel.scores(known, aside)
    for name in novel.TRENDED[1:]:  # what is above the trend of the cells kept aside
        assert of_aside[name].mean() == pytest.approx(0, abs=1e-3)
        assert of_aside[name].std(ddof=2) == pytest.approx(1, abs=1e-3)


def test_profiles_of_the_linear_control_count_cells_by_type() -> None:
    levels = sparse.csr_matrix(np.array([[0, 3, 1], [2, 5, 0], [0, 1, 0], [4, 0, 0]], np.uint8))
    found = importlib.import_module("experiments")._counts(levels, np.array([0, 1, 1, 0]))
    assert found.tolist() == [[1, 1], [1, 2], [1, 0]]


def test_the_open_islands_of_a_cell_are_counted_and_not_its_other_tokens() -> None:
    tokens = np.array([1, 0, 3, 0, 0, 2], np.uint8)
    batch = Batch(np.arange(4), np.array([0, 3, 5, 5, 6]), np.array([0, 1, 2, 0, 1, 4], np.int32), tokens)
    opened = models._opened(batch)
    assert opened.n_open.tolist() == [2, 0, 0, 1]
    assert (opened.islands.tolist(), opened.levels.tolist()) == ([0, 2, 4], [1, 3, 2])


def test_a_peer_without_an_environment_says_so(tmp_path: Path) -> None:
    config = {"model": "CellTypist", "set": "cerebellum"}
    stores = sets.Stores(tmp_path, tmp_path)
    with pytest.raises(outside.CouldNotRunError, match=r"no environment: run .*make_env\.sh celltypist"):
        outside.tell_outside(None, config, stores, tmp_path)
    (tmp_path / "celltypist.log").write_text("something\n\nERROR: no such package\n")
    with pytest.raises(outside.CouldNotRunError, match="no environment: ERROR: no such package"):
        outside.tell_outside(None, config, stores, tmp_path)


_NEAREST = """
import numpy as np
from task import run

def fit_and_tell_of(task):
    dense = task.rows.toarray()
    def fit_and_tell(options, train, codes, asked):
        means = np.stack([dense[train][codes == code].mean(axis=0) for code in range(len(task.classes))])
        return ((dense[asked][:, None] - means[None]) ** 2 * options["sign"]).sum(axis=2).argmin(axis=1)
    return fit_and_tell

run([{"sign": -1.0}, {"sign": 1.0}], fit_and_tell_of)
"""


def test_a_peer_is_tuned_on_training_cells_and_gives_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(["a", "b"], 40)
    levels = (rng.random((80, 30)) < np.where(truth == "a", 0.1, 0.5)[:, None]).astype(np.uint8)
    train, test = np.arange(0, 80, 2), np.arange(1, 80, 2)
    types = np.where(np.isin(np.arange(80), train), truth, "")
    problem = protocol.Problem(
        None, sparse.csr_matrix(levels), types, np.arange(80).astype(str), train, test, train, 0
    )
    here = tmp_path / "peers"
    here.mkdir()
    (here / "task.py").write_bytes((ACCURACY / "peers" / "task.py").read_bytes())
    (here / "run_nearest.py").write_text(_NEAREST)
    (here / "run_broken.py").write_text("raise RuntimeError('it broke')")
    python = tmp_path / "envs" / "own" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / "envs" / "own" / ".ready").touch()
    peers = {name: outside.Peer("own", f"run_{name}.py", name) for name in ("nearest", "broken")}
    monkeypatch.setattr(outside, "HERE", here)
    monkeypatch.setattr(outside, "PEERS", peers)
    stores = sets.Stores(tmp_path, tmp_path)
    config = {"set": "cerebellum", "model": "nearest"}
    done = outside.tell_outside(problem, config, stores, tmp_path / "envs")
    assert done.tuned.values == "sign 1.0"
    assert np.mean(done.types == truth[test]) > 0.9
    with pytest.raises(outside.CouldNotRunError, match="exit 1: RuntimeError: it broke"):
        outside.tell_outside(problem, {**config, "model": "broken"}, stores, tmp_path / "envs")
    assert not list(tmp_path.glob("peer-*"))


def test_every_peer_has_a_script_and_a_pinned_list() -> None:
    for peer in outside.PEERS.values():
        assert (ACCURACY / "peers" / peer.script).is_file()
        lines = (ACCURACY / "peers" / f"{peer.env}.txt").read_text().splitlines()
        assert lines[0].startswith("# python 3.")
        assert all("==" in line for line in lines[1:])


@pytest.mark.parametrize("plan", ["tiny", "whole"])
def test_rows_of_a_plan_are_whole_and_no_two_are_the_same(plan: str) -> None:
    configs = [config for table in plans.TABLES for config in plans.configs(table, plan)]
    assert len({rows.digest(config) for config in configs}) == len(configs)
    assert json.loads(json.dumps(configs)) == configs
    assert all(grid.sets_of(config) <= set(sets.SETS) for config in configs)
    for config in configs:
        for settings_ in config["params"].get("settings", {}).values():
            assert settings_["finetune"]["train"]["seed"] == config["seed"]
            head = settings_["finetune"]["head"]
            if head["kind"] == "pooled":
                assert head["reads"] == settings_["pretrain"]["reads"]


def test_models_of_sets_with_unseen_groups_are_pretrained_without_them() -> None:
    for config in plans.configs("sets", "whole"):
        store = config["params"].get("store")
        if config["set"] in ("granja", "snareseq") and store:
            back = config.get("held") == ["D6"]
            expected = {"granja": "granja_d5" if back else "granja_d6", "snareseq": "snareseq_ah"}[
                config["set"]
            ]
            assert store in (expected, "hg19")
            assert not (back and store == "hg19")
    assert sets.PARTS["granja_d6"] == ("granja", ("D6",))
    tested = set(sets.SETS["snareseq"].holdout[1][0].split("+"))
    assert not tested & set(sets.PARTS["snareseq_ah"][1])


def test_the_estimate_takes_a_rows_own_time_else_that_of_rows_like_it() -> None:
    configs = plans.configs("sets", "tiny")
    saved = [{"config": configs[0], "seconds": {"wall": 10.0}}]
    assert plans.estimated(configs[:1], saved) == 10
    other = next(c for c in configs if c["model"] == configs[0]["model"] and c["set"] != configs[0]["set"])
    assert plans.estimated([configs[0], other], saved) == 20
    assert plans.estimated([{"kind": "unheard of"}], saved) == plans.UNKNOWN_S


def test_a_paired_t_test_over_draws_is_that_of_scipy() -> None:
    ours, theirs = {0: 0.7, 1: 0.75, 2: 0.71}, {0: 0.68, 1: 0.7, 2: 0.7, 3: 0.9}
    p = stats.ttest_rel([0.7, 0.75, 0.71], [0.68, 0.7, 0.7]).pvalue
    assert sections._t_test(ours, theirs) == f"{0.08 / 3:+.3f} (p {p:.2g})"
    assert sections._t_test({0: 0.7}, theirs) == "-"


def test_a_set_of_ones_own_is_asked_for_in_one_form() -> None:
    for wrong in ("store.zarr:cell_type", "name=store.zarr", "name=:t", "name=s.zarr:a:b:c"):
        with pytest.raises(ValueError, match="expected NAME=STORE:LABELS"):
            plans.own_configs(wrong)
