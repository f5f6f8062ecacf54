"""Sets, novelty and low depth in the table, against plain loops over what the model says of each cell alone."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from predicted import assert_same_bytes
from scipy.special import logsumexp
from small_atlas import (
    TEMPERATURE,
    TYPES,
    VOCABULARY,
    SmallSample,
    draw_sample,
    small_known,
    small_model,
    small_store,
    write_split,
)

from annatac_scale.annotate.batches import evenly_spaced
from annatac_scale.annotate.labels import MANIFEST
from annatac_scale.annotate.predict import predict
from annatac_scale.annotate.predictor import ADAPT_CELLS
from annatac_scale.errors import ConfigError, InputError
from annatac_scale.model.folder import read_model, write_model
from annatac_scale.model.labels import LOW_DEPTH, NOVEL
from annatac_scale.model.novelty import SCORES, SHIFTING, KnownCells
from annatac_scale.progress import Silent
from annatac_scale.store.store import IslandStore

KNOWN = small_known(80)


@pytest.fixture
def careful(tmp_path: Path) -> Path:
    """A model that keeps known cells."""
    small_model(tmp_path / "careful", known=KNOWN)
    return tmp_path / "careful"


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def rows_of(labels: Path, name: str = "many") -> pd.DataFrame:
    return pd.concat([pd.read_parquet(file) for file in sorted(labels.glob(f"{name}-*.parquet"))])


def embeddings_and_logits(model_path: Path, sample: SmallSample) -> tuple[np.ndarray, np.ndarray]:
    """Of each cell alone, straight from the parts of the model; attend open."""
    import torch

    model = read_model(model_path)
    number = {island: i for i, island in enumerate(model.vocabulary.islands.tolist())}
    found = []
    for row in sample.levels:
        listed = [island for island in np.flatnonzero(row).tolist() if island in number]
        tokens = torch.tensor([int(row[island]) for island in listed], dtype=torch.int64)
        islands = torch.tensor([number[island] for island in listed], dtype=torch.int64)
        offsets = torch.tensor([0, len(listed)])
        with torch.no_grad():
            hidden = model.typer.linformer(tokens, islands, offsets)
            z = model.typer.head.embed(hidden, tokens, islands, offsets)
            found.append((z[0].numpy(), model.typer.head.classifier(z)[0].numpy()))
    return np.array([z for z, _ in found], float), np.array([logits for _, logits in found], float)


def plain_score(name: str, z: np.ndarray, logits: np.ndarray, opened: list[int], known: KnownCells) -> float:
    """A score of one cell by its formula. opened: its open islands, by the model's numbers"""
    if name == "max_probability":
        powers = np.exp((logits - logits.max()) / TEMPERATURE)
        return 1 - float((powers / powers.sum()).max())
    if name == "joint":
        return sum(above_trend(part, z, logits, opened, known) for part in ("energy", "profile"))
    if name == "energy":
        return -TEMPERATURE * float(logsumexp(logits / TEMPERATURE))
    return above_trend(name, z, logits, opened, known)


def above_trend(name: str, z: np.ndarray, logits: np.ndarray, opened: list[int], known: KnownCells) -> float:
    if name == "energy":
        raw = plain_score(name, z, logits, opened, known)
    elif name == "profile":
        if not opened:
            return 0.0
        raw = -max(
            math.fsum(shares[i] for i in opened) / len(opened) for shares in known.profiles.log_shares.T
        )
    elif name == "mahalanobis":
        raw = min(float(np.linalg.norm((z - mean) @ known.whitening.astype(float))) for mean in known.means)
    else:
        far = {0: 2, 1: 1, 2: 1}  # a twentieth of the 40, 1 and 19 references of each type, rounded up
        raw = min(
            sorted(float(np.linalg.norm(z - one)) for one in known.references[known.reference_codes == code])[
                n - 1
            ]
            for code, n in far.items()
        )
    trend = known.trends[name]
    depth = min(max(math.log(1 + len(opened)), trend.low), trend.high)
    return (raw - trend.intercept - trend.slope * depth) / (trend.spread * math.exp(-trend.narrowing * depth))


@pytest.mark.parametrize("name", SCORES)
def test_novel_cells_are_those_whose_score_few_calib_cells_reach(
    tmp_path: Path, store: IslandStore, samples: dict[str, SmallSample], careful: Path, name: str
) -> None:
    rate = 0.2
    report = predict(store, careful, tmp_path / "labels", novelty=name, novel_rate=rate)
    table = rows_of(tmp_path / "labels")
    z, logits = embeddings_and_logits(careful, samples["many"])
    opened = [np.flatnonzero(row).tolist() for row in samples["many"].levels[:, VOCABULARY]]
    assert [] in opened
    expected = [plain_score(name, *cell, KNOWN) for cell in zip(z, logits, opened, strict=True)]
    np.testing.assert_allclose(table["novelty_score"], expected, rtol=1e-3, atol=2e-4)
    calib = KNOWN.scores[name].tolist()
    counts = [1 + sum(one >= score for one in calib) for score in table["novelty_score"].tolist()]
    np.testing.assert_allclose(table["novelty_p"], np.array(counts) / 81, rtol=1e-6)
    assert table["novel"].tolist() == [Fraction(n, 81) <= Fraction("0.2") for n in counts]
    assert table["novel"].dtype == bool
    assert table["label"].tolist() == np.where(table["novel"], NOVEL, table["best"]).tolist()
    assert report.n_novel == sum((rows_of(tmp_path / "labels", s)["novel"]).sum() for s in samples)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("coverage", [0.3, 0.9])
def test_the_set_holds_the_types_likely_enough_the_likeliest_first(
    tmp_path: Path, store: IslandStore, careful: Path, coverage: float, per_class: bool
) -> None:
    options: dict[str, Any] = {
        "coverage": coverage,
        "coverage_per_class": per_class,
        "probabilities": True,
    }
    predict(store, careful, tmp_path / "labels", **options)
    table = rows_of(tmp_path / "labels")

    def limit(chances: list[float]) -> float:
        rank = math.ceil((len(chances) + 1) * Fraction(str(coverage)))
        return sorted(chances, reverse=True)[rank - 1]

    chances, codes = KNOWN.chances.tolist(), KNOWN.codes.tolist()
    assert min(codes.count(code) for code in range(3)) >= 9
    of_type = [
        limit([p for p, c in zip(chances, codes, strict=True) if c == code] if per_class else chances)
        for code in range(3)
    ]
    for row in table.itertuples():
        inside = [code for code in range(3) if row.probabilities[code] >= of_type[code]]
        inside.sort(key=lambda code: -row.probabilities[code])
        assert list(row.set) == [TYPES[code] for code in inside]
        assert row.set_size == len(inside)
    assert len(set(table["set_size"])) > 1


def test_where_every_set_holds_all_types_it_is_said(tmp_path: Path, store: IslandStore) -> None:
    for n_calib, n_lines in ((8, 1), (9, 0)):
        small_model(tmp_path / f"{n_calib}", known=small_known(n_calib))
        progress = Lines()
        predict(store, tmp_path / f"{n_calib}", tmp_path / f"labels{n_calib}", progress=progress)
        said = [line for line in progress.lines if line.endswith("; every set holds all types")]
        assert len(said) == n_lines
        assert (rows_of(tmp_path / f"labels{n_calib}")["set_size"] == len(TYPES)).all() == bool(n_lines)


def test_without_known_cells_sets_and_p_values_are_null_and_scores_are_there(
    tmp_path: Path, store: IslandStore, model: Path
) -> None:
    predict(store, model, tmp_path / "labels")
    table = rows_of(tmp_path / "labels")
    assert table[["set", "set_size", "novelty_p"]].isna().all(axis=None)
    np.testing.assert_allclose(table["novelty_score"], 1 - table["confidence"], atol=1e-6)
    assert (table["novel"] == (table["label"] == NOVEL)).all()


def test_shallow_cells_are_unassigned_and_never_novel(
    tmp_path: Path, store: IslandStore, careful: Path
) -> None:
    report = predict(store, careful, tmp_path / "labels", min_open=6, novel_threshold=1.0)
    table = rows_of(tmp_path / "labels")
    low = table["n_open"] < 6
    assert 0 < low.sum() < len(table)
    sure = np.where(table["confidence"] < 1, NOVEL, table["best"])
    assert table["label"].tolist() == np.where(low, LOW_DEPTH, sure).tolist()
    assert not table["novel"][low].any()
    assert report.n_low_depth == report.labels[LOW_DEPTH] >= low.sum()


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("name", SHIFTING)
def test_calib_cells_of_low_depth_set_no_limit(
    tmp_path: Path, store: IslandStore, careful: Path, name: str, per_class: bool
) -> None:
    least, rate, coverage = 12, 0.3, 0.6
    options: dict[str, Any] = {"coverage": coverage, "coverage_per_class": per_class, "min_open": least}
    options["probabilities"] = True
    predict(store, careful, tmp_path / "labels", novelty=name, novel_rate=rate, **options)
    table = rows_of(tmp_path / "labels")
    deep = [cell for cell in range(80) if KNOWN.n_open[cell] >= least]
    assert 20 < len(deep) < 70
    calib = [float(KNOWN.scores[name][cell]) for cell in deep]
    counts = [1 + sum(one >= score for one in calib) for score in table["novelty_score"].tolist()]
    np.testing.assert_allclose(table["novelty_p"], np.array(counts) / (len(deep) + 1), rtol=1e-6)
    rare = [Fraction(n, len(deep) + 1) <= Fraction(str(rate)) for n in counts]
    assert table["novel"].tolist() == (np.array(rare) & (table["n_open"] >= least)).tolist()
    assert 0 < table["novel"].sum() < len(table)
    for code, type_name in enumerate(TYPES):
        own = [cell for cell in deep if not per_class or KNOWN.codes[cell] == code]
        rank = math.ceil((len(own) + 1) * Fraction(str(coverage)))
        least_chance = sorted((float(KNOWN.chances[cell]) for cell in own), reverse=True)[rank - 1]
        inside = np.stack(table["probabilities"].to_list())[:, code] >= np.float32(least_chance)
        assert [type_name in one for one in table["set"]] == inside.tolist()


def plain_shift(table: pd.DataFrame, name: str, min_open: int = 1) -> float:
    """How far the median of the cells that have open islands and did not train is above that of the calib cells."""
    taken = (table["n_open"] >= min_open) & (table["split"] != "train")
    ordered = sorted(table["novelty_score"][taken].tolist())
    n = len(ordered)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    calib = KNOWN.scores[name] if min_open == 1 else KNOWN.scores[name][KNOWN.n_open >= min_open]
    return median - float(np.median(calib))


def test_adapting_takes_each_samples_own_median_off_its_scores(
    tmp_path: Path, store: IslandStore, careful: Path
) -> None:
    progress = Lines()
    trained = [("many", f"many-{i}", "train" if i < 100 else "test") for i in range(150)]
    write_split(
        tmp_path / "split.parquet", trained, {n: sample.x_sha256 for n, sample in store.samples.items()}
    )
    predict(store, careful, tmp_path / "plain", novelty="knn")
    predict(store, careful, tmp_path / "adapted", novelty="knn", novel_adapt=True, progress=progress)
    plain, adapted = rows_of(tmp_path / "plain"), rows_of(tmp_path / "adapted")
    shift = plain_shift(plain, "knn")
    assert abs(shift) > 0.1
    np.testing.assert_allclose(adapted["novelty_score"], plain["novelty_score"] - shift, rtol=1e-4, atol=1e-4)
    limit = np.sort(KNOWN.scores["knn"])[math.ceil(81 * 0.95) - 1]
    assert (adapted["novel"] == (adapted["novelty_score"] > limit)).all()
    few = [name for name, s in store.samples.items() if 0 < s.n_cells < ADAPT_CELLS]
    assert few
    for name in few:
        pd.testing.assert_frame_equal(rows_of(tmp_path / "plain", name), rows_of(tmp_path / "adapted", name))
        assert any(line.startswith(f"{name}: --novel-adapt: found") for line in progress.lines)


def test_adapting_compares_cells_that_are_deep_enough_with_calib_cells_that_are(
    tmp_path: Path, store: IslandStore, careful: Path
) -> None:
    options: dict[str, Any] = {"novelty": "knn", "min_open": 8}
    predict(store, careful, tmp_path / "plain", **options)
    predict(store, careful, tmp_path / "adapted", novel_adapt=True, **options)
    plain, adapted = rows_of(tmp_path / "plain"), rows_of(tmp_path / "adapted")
    shift = plain_shift(plain, "knn", 8)
    assert abs(shift - plain_shift(plain, "knn")) > 0.05
    np.testing.assert_allclose(adapted["novelty_score"], plain["novelty_score"] - shift, rtol=1e-4, atol=1e-4)


def test_samples_that_were_mostly_trained_on_are_adapted_by_their_other_cells(
    tmp_path: Path, careful: Path
) -> None:
    store = small_store(tmp_path / "atlas.zarr", {"big": draw_sample(8100, 1)})
    others = range(260, 480)  # all in one block
    rows = [("big", f"big-{i}", "test" if i in others else "train") for i in range(8100)]
    write_split(tmp_path / "split.parquet", rows, {"big": store.samples["big"].x_sha256})
    predict(store, careful, tmp_path / "plain", novelty="knn")
    predict(store, careful, tmp_path / "adapted", novelty="knn", novel_adapt=True)
    plain, adapted = rows_of(tmp_path / "plain", "big"), rows_of(tmp_path / "adapted", "big")
    shift = plain_shift(plain, "knn")
    assert abs(shift) > 0.1
    np.testing.assert_allclose(adapted["novelty_score"], plain["novelty_score"] - shift, rtol=1e-4, atol=1e-4)


@given(n=st.integers(0, 300), most=st.integers(1, 100))
def test_evenly_spaced_cells_are_all_or_so_many_at_about_equal_distances(n: int, most: int) -> None:
    cells = np.arange(n) * 3 + 7
    found = evenly_spaced(cells, most)
    assert len(found) == min(n, most)
    assert set(found.tolist()) <= set(cells.tolist())
    if len(found) > 1:
        steps = np.diff(found) // 3
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 1


def test_adapted_scores_do_not_depend_on_which_parts_were_there(tmp_path: Path, careful: Path) -> None:
    store = small_store(tmp_path / "atlas.zarr", {"big": draw_sample(8100, 1)})
    options: dict[str, Any] = {"novelty": "mahalanobis", "novel_adapt": True, "coverage": 0.8}
    predict(store, careful, tmp_path / "labels", **options)
    before = {file.name: file.read_bytes() for file in (tmp_path / "labels").iterdir()}
    for name in ("big-00000.parquet", "big-00002.parquet"):
        (tmp_path / "labels" / name).unlink()
    assert predict(store, careful, tmp_path / "labels", **options).n_skipped == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "labels").iterdir()} == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"coverage": 0.8}, r"coverage 0\.9, now asked for 0\.8"),
        ({"coverage_per_class": False}, "coverage_per_class True, now asked for False"),
        ({"novelty": "energy"}, "novelty knn, now asked for energy"),
        ({"novel_rate": 0.1}, r"novel_rate 0\.05, now asked for 0\.1"),
        ({"novel_adapt": True}, "novel_adapt False, now asked for True"),
        ({"min_open": 3}, "min_open 0, now asked for 3"),
    ],
)
def test_labels_of_other_options_are_not_mixed(
    tmp_path: Path, store: IslandStore, careful: Path, option: dict[str, Any], message: str
) -> None:
    predict(store, careful, tmp_path / "labels", novelty="knn")
    with pytest.raises(InputError, match=f"holds labels made with {message}; choose another --out"):
        predict(store, careful, tmp_path / "labels", **{"novelty": "knn", **option})
    predict(store, careful, tmp_path / "other", **{"novelty": "knn", **option})
    part = tmp_path / "labels" / "many-00000.parquet"
    part.write_bytes((tmp_path / "other" / part.name).read_bytes())
    assert predict(store, careful, tmp_path / "labels", novelty="knn").n_skipped == 3


def test_the_manifest_says_what_was_asked_for(tmp_path: Path, store: IslandStore, careful: Path) -> None:
    predict(store, careful, tmp_path / "labels", novelty="knn", novel_rate=0.1, min_open=2)
    assert json.loads((tmp_path / "labels" / MANIFEST).read_text())["rule"] == {
        "coverage": 0.9,
        "coverage_per_class": True,
        "novelty": "knn",
        "novel_rate": 0.1,
        "novel_threshold": None,
        "novel_adapt": False,
        "min_open": 2,
    }
    with pytest.raises(ConfigError, match="expected one of them"):
        predict(store, careful, tmp_path / "x", novel_threshold=0.5, novel_rate=0.1)
    assert not (tmp_path / "x").exists()


def test_the_same_threshold_as_a_whole_number_is_the_same_rule(
    tmp_path: Path, store: IslandStore, careful: Path
) -> None:
    predict(store, careful, tmp_path / "a", novel_threshold=0)
    predict(store, careful, tmp_path / "b", novel_threshold=0.0)
    assert_same_bytes(tmp_path / "a", tmp_path / "b")


def test_vector_scaling_makes_the_probabilities_and_may_change_the_best_type(
    tmp_path: Path, store: IslandStore, samples: dict[str, SmallSample]
) -> None:
    scales, biases = (0.2, 1.0, 3.0), (2.0, 0.0, -2.0)
    model = small_model(tmp_path / "plain")
    write_model(
        tmp_path / "vector", replace(model, info=replace(model.info, scales=scales, biases=biases)), "card"
    )
    predict(store, tmp_path / "plain", tmp_path / "a")
    predict(store, tmp_path / "vector", tmp_path / "b", probabilities=True)
    assert (rows_of(tmp_path / "a")["best"] != rows_of(tmp_path / "b")["best"]).any()
    _, logits = embeddings_and_logits(tmp_path / "plain", samples["many"])
    for row, scores in zip(rows_of(tmp_path / "b").itertuples(), logits, strict=True):
        lines = [a * x + b for a, x, b in zip(scales, scores.tolist(), biases, strict=True)]
        powers = [math.exp(line - max(lines)) for line in lines]
        assert row.probabilities.tolist() == pytest.approx([p / sum(powers) for p in powers], abs=1e-4)
        assert row.best == TYPES[int(np.argmax(row.probabilities))]
