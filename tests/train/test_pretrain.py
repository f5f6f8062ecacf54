from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Lines, draw_cells, small_pretraining, write_store

from annatac_scale.errors import AnnatacError, ConfigError, InputError
from annatac_scale.genome.assembly import Assembly
from annatac_scale.genome.islands import IslandSpace
from annatac_scale.model.folder import PoolConfig, read_model
from annatac_scale.progress import Silent
from annatac_scale.store.store import IslandStore
from annatac_scale.store.writer import create_store
from annatac_scale.stream.batch import MASK_TOKEN, Batch
from annatac_scale.train.checkpoint import checkpoint_name
from annatac_scale.train.presets import PRESETS, pretrain_preset
from annatac_scale.train.pretrain import VALIDATION_EPOCH, PretrainData, pretrain, pretrain_task
from annatac_scale.train.ranks import Ranks

ALONE = Ranks(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    """800 cells of two types, every open island at level 1."""
    cells = {"s0": draw_cells(800, binary=True)}
    return write_store(tmp_path_factory.mktemp("binary") / "a.zarr", cells)


def test_open_against_closed_is_learned_where_cell_types_open_islands_of_their_own(binary, tmp_path):
    rates = {"learning_rate": 3e-3, "table_learning_rate": 3e-2}
    report = pretrain(binary, tmp_path / "run", small_pretraining(6, global_batch_size=8, **rates))
    # The best possible is about 0.86: some closed islands that are drawn belong to the cell's own type.
    assert report.figures["open_accuracy"] > 0.8


@pytest.mark.parametrize(
    "asked",
    [{"objective": "cell", "reads": "none"}, {"objective": "vector"}, {"objective": "open+cell+vector"}],
    ids=str,
)
def test_hidden_islands_are_learned_from_the_vector_of_the_rest(binary, tmp_path, asked):
    config = small_pretraining(6, mask_fraction=0.5, mask_keep=0.0, mask_level_cap=0.5, pooled=4, **asked)
    report = pretrain(binary, tmp_path / "run", config)
    asked_of_cells = {"cell": 0.8, "vector": 0.9}
    for name in set(asked["objective"].split("+")) & set(asked_of_cells):
        assert report.figures[f"{name}_accuracy"] > asked_of_cells[name]
    model = read_model(report.model)
    assert model.info.pool == PoolConfig(4, asked.get("reads", "gate"))
    assert model.encoder.pool.table.shape == (60, 4)


@pytest.mark.parametrize("attend", ["open", "all"])
@pytest.mark.parametrize("objective", ["cell", "vector", "open+vector", "level+cell"])
def test_a_cells_vector_does_not_know_which_of_its_islands_are_hidden(binary, objective, attend):
    config = small_pretraining(
        objective=objective, attend=attend, reads="gate+sum", mask_fraction=0.5, mask_keep=0.0
    )
    data = PretrainData.of(binary, config, Silent())
    torch.manual_seed(0)
    task = pretrain_task(data, config, ALONE)
    task.module.eval()
    for parameter in task.module.encoder.pool.reading_parameters():
        torch.nn.init.normal_(parameter)
    batch = task.prepare(next(iter(data.stream(data.training, config.train, ALONE))), 0)
    seen = []
    task.module.encoder.pool.register_forward_hook(lambda module, given, z: seen.append(z))
    task.module(batch)
    # The same cells with every hidden island closed have the same vectors.
    visible = (batch.tokens > 0) & (batch.tokens < MASK_TOKEN)
    assert 0 < visible.sum() < len(visible)
    counts = np.concatenate([[0], np.cumsum(visible)])[batch.offsets]
    rest = Batch(batch.cell_ids, counts, batch.islands[visible], batch.tokens[visible])
    if attend == "all":
        rest = rest.with_closed([np.arange(60, dtype=np.int32)], np.zeros(len(rest), np.int64))
    torch.testing.assert_close(task.module.encoder(rest).embedding, seen[0])


def test_noise_cannot_be_guessed_by_any_objective_of_cells(tmp_path):
    rng = np.random.default_rng(0)
    noise = draw_cells(400, binary=True)
    store = write_store(
        tmp_path / "noise.zarr", {"s": replace(noise, levels=(rng.random((400, 60)) < 0.3).astype("u1"))}
    )
    asked = {"mask_fraction": 0.5, "mask_keep": 0.0, "mask_level_cap": 1.0, "pooled": 8, "reads": "gate+sum"}
    for name in ("vector", "level+vector"):
        report = pretrain(store, tmp_path / name, small_pretraining(4, objective=name, **asked))
        assert report.figures["vector_loss"] > 0.9


def test_looking_for_targets_leaves_the_validation_where_it_begins(atlas):
    config = small_pretraining(global_batch_size=8)
    data = PretrainData.of(atlas, config, Silent())
    figures = []
    for looks in (False, True):
        torch.manual_seed(0)
        task = pretrain_task(data, config, ALONE)
        if looks:
            task.check_targets(ALONE)
        figures.append(task.validate(ALONE, lambda: None))
    assert figures[0] == figures[1]


@pytest.mark.parametrize("objective", ["vector", "open", "cell"])
def test_a_run_that_would_ask_nothing_is_refused(tmp_path, objective):
    cells = draw_cells(60)
    levels = np.eye(60, dtype=np.uint8)[np.arange(60) % 20]
    store = write_store(tmp_path / "single.zarr", {"s": replace(cells, levels=levels)})
    config = small_pretraining(1, objective=objective, mask_level_cap=0.5)
    with pytest.raises(
        InputError, match=rf"objective {objective}: found nothing to ask .*; hold out more cells"
    ):
        pretrain(store, tmp_path / "run", config)


def test_the_linformer_is_run_on_open_islands_alone_where_nothing_reads_it(binary):
    config = small_pretraining(1, objective="vector", reads="none", attend="all", mask_fraction=0.5)
    data = PretrainData.of(binary, config, Silent())
    task = pretrain_task(data, config, ALONE)
    batch = task.prepare(next(iter(data.stream(data.training, config.train, ALONE))), 0)
    assert 0 not in batch.tokens


def test_the_pooled_layer_starts_as_the_svd_of_the_training_cells(binary, tmp_path):
    asked = {"objective": "vector", "reads": "none", "mask_fraction": 0.5, "pooled": 2}
    rates = {"learning_rate": 1e-9, "table_learning_rate": 1e-9}
    config = small_pretraining(1, **asked, **rates)
    pool = read_model(pretrain(binary, tmp_path / "run", config).model).encoder.pool
    data = PretrainData.of(binary, config, Silent())
    dense = binary.read(data.training).to_csr(60).toarray()[:, data.vocabulary.islands]
    idf = np.log1p(len(dense) / (dense > 0).sum(axis=0))
    weighted = (dense > 0) * idf
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    _, values, rows = np.linalg.svd(weighted, full_matrices=False)
    np.testing.assert_allclose(pool.idf, idf, rtol=1e-5)
    expected = (values[:2, None] * rows[:2]).T
    signs = np.sign((expected * pool.table.detach().numpy()).sum(axis=0))
    np.testing.assert_allclose(pool.table.detach().numpy() * signs, expected, atol=2e-3 * values[0])


def test_presets_ask_what_the_guide_says():
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    for name in PRESETS:
        (row,) = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
        _, encoder, attend, batch, objective, reads = (cell.strip() for cell in row.strip("|").split("|"))
        config = pretrain_preset(name)
        sizes = config.encoder
        assert encoder == (
            f"width {sizes.width}, {sizes.layers} layers, {sizes.heads} heads of {sizes.head_dim}, k {sizes.k}"
        )
        assert (attend, int(batch)) == (sizes.attend, config.train.global_batch_size)
        assert objective == " + ".join(config.objectives)
        said = {"none": "nothing: the Linformer is not trained", "gate": "the Linformer, as a gate"}
        assert reads == (said[config.reads] if config.asks_cells else "there is none")


def test_without_reading_the_encoder_nothing_of_it_is_trained(binary, tmp_path):
    config = small_pretraining(1, objective="vector", reads="none", mask_fraction=0.5, mask_level_cap=0.5)
    data = PretrainData.of(binary, config, Silent())
    torch.manual_seed(config.train.seed)
    task = pretrain_task(data, config, ALONE)
    groups = task.parameter_groups(config.train)
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained.isdisjoint({id(p) for p in task.module.encoder.linformer.parameters()})
    assert id(task.module.encoder.pool.table) in {id(p) for p in groups[1]["params"]}
    report = pretrain(binary, tmp_path / "run", config)
    assert report.n_parameters == sum(p.numel() for p in task.module.encoder.pool.parameters())
    model = read_model(report.model)
    assert not model.info.linformer_trained
    assert "not trained" in (report.model / "README.md").read_text()
    assert (
        "pooled layer: 64 channels, reads of the Linformer: none" in (report.model / "README.md").read_text()
    )


def test_every_trained_weight_is_in_one_group(binary):
    config = small_pretraining(1, objective="level+open+cell+vector", positions="learned", reads="gate+sum")
    data = PretrainData.of(binary, config, Silent())
    module = (task := pretrain_task(data, config, ALONE)).module
    grouped = [id(p) for group in task.parameter_groups(config.train) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    tables = {id(p) for p in task.parameter_groups(config.train)[1]["params"]}
    assert tables == {id(p) for p in module.parameters() if p.requires_grad and p.shape[0] == 60}


def test_levels_are_learned_where_each_island_has_its_own(tmp_path):
    cells = draw_cells(400)
    levels = (cells.levels > 0) * (1 + np.arange(cells.levels.shape[1]) % 5)
    store = write_store(tmp_path / "a.zarr", {"s0": replace(cells, levels=levels.astype(np.uint8))})
    config = small_pretraining(4, objective="level", global_batch_size=8)
    report = pretrain(store, tmp_path / "run", config)
    assert report.figures.keys() == {"score", "level_loss", "level_accuracy", "epoch"}
    assert report.figures["level_accuracy"] > 0.8


def test_attending_to_all_islands_trains_too_with_islands_that_are_not_measured(tmp_path):
    cells = draw_cells(200)
    measured = np.arange(60) % 5 > 0
    store = write_store(tmp_path / "a.zarr", {"s0": replace(cells, levels=cells.levels * measured)}, measured)
    report = pretrain(store, tmp_path / "run", small_pretraining(attend="all"))
    model = read_model(report.model)
    assert model.vocabulary.islands.tolist() == np.flatnonzero(measured).tolist()
    assert model.info.encoder.tokens_per_cell == 0
    assert np.isfinite(report.figures["score"])


def test_the_model_folder_holds_the_best_weights_and_what_they_are_of(atlas, tmp_path):
    report = pretrain(atlas, tmp_path / "run", small_pretraining(3))
    model = read_model(report.model)
    name = checkpoint_name(12 * report.figures["epoch"])
    best = torch.load(tmp_path / "run" / "checkpoints" / name, weights_only=True)["module"]
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, best[f"encoder.{name}"]), name
    assert (model.info.assembly, model.info.counting, model.info.preset) == ("toy", "insertion", "tiny")
    model.check_store(atlas)
    facts = model.info.provenance
    assert facts["samples"]["s1"]["x_sha256"] == atlas.samples["s1"].x_sha256
    assert facts["n_training_cells"] == report.n_cells == 360
    assert facts["validation"] == report.figures
    card = (report.model / "README.md").read_text()
    assert "objective: level+open, on 360 cells" in card
    assert "annatac finetune" in card


def test_counts_levels_and_vocabulary_are_those_of_the_training_cells(atlas):
    config = small_pretraining(min_cells=30)
    data = PretrainData.of(atlas, config, Silent())
    assert sorted([*data.training, *data.validation]) == list(range(400))
    assert len(data.validation) == 40
    dense = atlas.read(np.arange(400)).to_csr(60).toarray()[data.training]
    n_open = (dense > 0).sum(axis=0)
    assert data.vocabulary.islands.tolist() == np.flatnonzero(n_open >= 30).tolist()
    assert data.counts.tolist() == n_open[n_open >= 30].tolist()
    assert data.tokens_per_cell == pytest.approx((dense[:, n_open >= 30] > 0).sum(axis=1).mean())
    shares = [(dense == level).sum() / (dense > 0).sum() for level in range(1, 6)]
    assert data.level_shares == pytest.approx(shares)


def test_the_projection_is_scaled_to_the_tokens_of_a_cell_and_the_model_says_so(atlas, pretrained):
    model = read_model(pretrained)
    data = PretrainData.of(atlas, small_pretraining(), Silent())
    assert model.info.encoder.tokens_per_cell == pytest.approx(data.tokens_per_cell)
    task = pretrain_task(data, replace(small_pretraining(), encoder=model.info.encoder), ALONE)
    assert task.module.encoder.linformer.projection.abs().max() <= data.tokens_per_cell**-0.5


@pytest.mark.parametrize("positions", ["frozen", "learned"])
def test_positions_start_from_the_svd_and_move_only_where_they_are_learned(atlas, tmp_path, positions):
    models = {}
    for epochs in (1, 3):
        config = small_pretraining(epochs, positions=positions, schedule="step")
        models[epochs] = read_model(pretrain(atlas, tmp_path / f"run{epochs}", config).model)
    first, third = (models[epochs].encoder.linformer.positions for epochs in (1, 3))
    assert torch.equal(first, third) == (positions == "frozen")
    if positions == "frozen":
        data = PretrainData.of(atlas, small_pretraining(), Silent())
        dense = atlas.read(data.training).to_csr(60).toarray()[:, data.vocabulary.islands]
        weighted = (dense > 0) * np.log1p(len(dense) / (dense > 0).sum(axis=0))
        weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
        leading = np.linalg.svd(weighted, full_matrices=False)[2][:2].T
        cosines = np.abs((leading * first[:, :2].numpy()).sum(axis=0)) / np.linalg.norm(first[:, :2], axis=0)
        np.testing.assert_allclose(cosines, 1, atol=1e-4)


def test_the_levels_are_shown_and_a_level_only_objective_is_refused_on_binary_data(binary, tmp_path):
    progress = Lines()
    paper = pretrain_preset("paper")
    with pytest.raises(ConfigError, match=r"100.0% .* at level 1, .*; use --set objective=level\+open"):
        pretrain(binary, tmp_path / "run", paper, progress)
    assert "levels of open islands: 1: 100.0%, 2: 0.0%, 3: 0.0%, 4: 0.0%, 5: 0.0%" in progress.lines
    assert not (tmp_path / "run" / "model").exists()


def test_validation_asks_the_same_every_time_and_not_what_training_asks(atlas):
    config = small_pretraining()
    data = PretrainData.of(atlas, config, Silent())
    torch.manual_seed(0)
    task = pretrain_task(data, config, ALONE)
    assert task.validate(ALONE, lambda: None) == task.validate(ALONE, lambda: None)
    batch = next(iter(data.stream(data.validation, config.train, ALONE)))
    once, again, training = (task.prepare(batch, epoch) for epoch in (VALIDATION_EPOCH, VALIDATION_EPOCH, 0))
    assert once.tokens.tobytes() == again.tokens.tobytes()
    assert (once.tokens == MASK_TOKEN).sum() > 0
    assert once.tokens.tobytes() != training.tokens.tobytes()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_validation_runs_in_the_precision_of_training(atlas, monkeypatch, precision):
    config = small_pretraining(precision=precision)
    task = pretrain_task(PretrainData.of(atlas, config, Silent()), config, ALONE)
    forward, in_bf16 = task.module.forward, set()

    def seen(piece):
        in_bf16.add(torch.is_autocast_enabled("cpu"))
        return forward(piece)

    monkeypatch.setattr(task.module, "forward", seen)
    task.validate(ALONE, lambda: None)
    assert in_bf16 == {precision == "bf16"}


def test_validation_figures_are_means_over_all_targets(atlas):
    config = small_pretraining()
    data = PretrainData.of(atlas, config, Silent())
    torch.manual_seed(0)
    task = pretrain_task(data, config, ALONE)
    whole = replace(config.train, global_batch_size=40)
    batch = task.prepare(next(iter(data.stream(data.validation, whole, ALONE))), VALIDATION_EPOCH)
    assert len(batch) == 40
    task.module.eval()
    losses = task.module(batch)
    figures = task.validate(ALONE, lambda: None)
    for name, loss in losses.items():
        assert figures[f"{name}_loss"] == pytest.approx((loss.sum / loss.count).item(), rel=1e-5)
        assert figures[f"{name}_accuracy"] == pytest.approx((loss.correct / loss.count).item())
    assert figures["score"] == pytest.approx(-figures["level_loss"] - figures["open_loss"])


def test_a_complete_run_says_so_and_is_left_as_it_is(atlas, tmp_path):
    first = pretrain(atlas, tmp_path / "run", small_pretraining(1))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    progress = Lines()
    assert pretrain(atlas, tmp_path / "run", small_pretraining(1), progress) == first
    assert progress.lines == [f"{tmp_path / 'run'}: complete already; its model stays as it is"]
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert left == files


def test_a_run_of_another_store_or_configuration_is_refused(atlas, binary, tmp_path):
    pretrain(atlas, tmp_path / "run", small_pretraining(1))
    with pytest.raises(ConfigError, match=r"samples\.s0"):
        pretrain(binary, tmp_path / "run", small_pretraining(1))
    with pytest.raises(ConfigError, match=r"train\.epochs 1 \(now 2\)"):
        pretrain(atlas, tmp_path / "run", small_pretraining(2))


def test_a_batch_larger_than_the_set_is_the_whole_set(atlas, tmp_path):
    report = pretrain(atlas, tmp_path / "run", small_pretraining(1, global_batch_size=1000))
    assert np.isfinite(report.figures["score"])


def test_a_diverging_run_is_an_error_on_one_line(atlas, tmp_path):
    config = small_pretraining(2, learning_rate=1e30, table_learning_rate=1e30, clip=1e30, warmup_steps=0)
    with pytest.raises(AnnatacError, match="lower"):
        pretrain(atlas, tmp_path / "run", config)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (np.ones((1, 60), np.uint8), "1 cells are too few to pretrain on; expected at least 2"),
        (np.zeros((50, 60), np.uint8), "no island that is open"),
    ],
)
def test_too_few_cells_or_open_islands_are_refused(tmp_path, levels, message):
    obs = draw_cells(len(levels)).obs
    store = write_store(tmp_path / "a.zarr", {"s0": replace(draw_cells(1), levels=levels, obs=obs)})
    with pytest.raises(InputError, match=message):
        pretrain(store, tmp_path / "run", small_pretraining())


def test_settings_out_of_range_are_refused():
    with pytest.raises(
        ConfigError, match="negatives: found 0, expected at least 1 where open or cell is asked"
    ):
        small_pretraining(objective="cell", negatives=0)
    with pytest.raises(ConfigError, match="pooled: found 1, expected at least 2"):
        small_pretraining(pooled=1)
    for setting in ({"mask_fraction": 0.0}, {"mask_keep": 1.0}, {"min_cells": 0}, {"validation_share": 1.0}):
        with pytest.raises(ConfigError, match=r"expected"):
            small_pretraining(**setting)


def test_ranks_and_lanes_that_do_not_fit_the_batch_are_refused(atlas):
    data = PretrainData.of(atlas, small_pretraining(), Silent())
    options = small_pretraining(global_batch_size=8).train
    with pytest.raises(ConfigError, match="world size 9 is more than the 8 lanes"):
        data.stream(data.training, options, Ranks(8, 9, torch.device("cpu")))
    with pytest.raises(ConfigError, match="lanes = 3 does not divide the global batch of 8"):
        data.stream(data.training, replace(options, lanes=3), ALONE)
    assert len(data.stream(data.training, replace(options, lanes=2), Ranks(1, 2, torch.device("cpu")))) == 45


def test_a_store_without_a_cell_says_what_to_do(tmp_path):
    create_store(tmp_path / "empty.zarr", IslandSpace.all(Assembly("toy", ("chr1",), (20_000,))), "insertion")
    empty = IslandStore.open(tmp_path / "empty.zarr")
    with pytest.raises(InputError, match="holds no cell; add a sample with `annatac convert`"):
        pretrain(empty, tmp_path / "run", small_pretraining())
