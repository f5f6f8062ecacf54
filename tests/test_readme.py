"""What the README and the jobs tell people to type runs, word for word, on a small cut of real data."""

import json
import os
import re
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
CELLS_PER_TYPE = 25


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cells.h5ad: some cells of each type, the peaks of two chromosomes."""
    folder = tmp_path_factory.mktemp("own_data")
    with as_file(files("annatac_scale") / "data" / "cerebellum.h5ad") as shipped:
        data = anndata.read_h5ad(shipped)
    rows = np.concatenate(
        [rows[:CELLS_PER_TYPE] for rows in data.obs.groupby("cell_type", observed=True).indices.values()]
    )
    data[np.sort(rows), data.var_names.str.match(r"chr[12]:")].copy().write_h5ad(folder / "cells.h5ad")
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_the_six_commands_run_and_label_held_out_cells(folder: Path) -> None:
    (commands,) = blocks("bash")
    lines = commands.strip().splitlines()
    assert [line.split()[1] for line in lines] == [
        "convert",
        "info",
        "pretrain",
        "finetune",
        "predict",
        "evaluate",
    ]
    for line in lines:
        done = run(line, folder)
    assert "held-out test cells: 20 of 100" in done.stdout
    labels = pd.read_parquet(folder / "labels")
    assert len(labels) == 4 * CELLS_PER_TYPE
    for column in re.findall(r"Parquet tables, one row a cell: (.*?) \|", (ROOT / "README.md").read_text())[
        0
    ].split(", "):
        assert column in labels, column


def test_the_figures_of_the_converter_are_those_that_were_saved() -> None:
    cases = json.loads((ROOT / "benchmarks" / "results" / "convert.json").read_text())["cases"]
    peers = {name: run["cpu_s_median"] for name, run in cases["peers"]["runs"].items()}
    said = re.search(
        r"took ([0-9.]+) CPU-seconds without QC and ([0-9.]+) with it, of which ([0-9.]+) are start-up, beside\s+"
        r"([0-9.]+) of SnapATAC2 and ([0-9.]+) of BPCells",
        (ROOT / "README.md").read_text(),
    )
    assert said
    names = ("ours", "ours_qc", "ours_start", "snapatac2_paired_insertion", "bpcells_import")
    assert [float(figure) for figure in said.groups()] == [round(peers[name], 1) for name in names]
    guide = (ROOT / "docs" / "guide.md").read_text()
    memory = {name: round(run["rss_mb"]) for name, run in cases["memory"]["runs"].items()}
    for name in ("base", "lines_x5", "cells_x40"):
        assert f"{memory[name]} MB" in guide
    assert f"takes {cases['memory']['bytes_a_barcode']} bytes without QC" in guide
    assert f"{cases['peers']['ratios']['ours_qc_over_ours_cpu']:.2f} times as long" in guide


def test_the_figures_of_the_stream_are_those_that_were_saved() -> None:
    runs = json.loads((ROOT / "benchmarks" / "results" / "stream.json").read_text())["cases"]["peers"]["runs"]
    said = re.search(
        r"took ([0-9.]+) µs of CPU a cell, or ([0-9.]+) for batches that are decoded on\s+the device, beside "
        r"([0-9.]+) of annbatch with zarrs, in ([0-9]+) MB of memory beside ([0-9]+), from ([0-9,]+) bytes a cell "
        r"on disk beside ([0-9,]+)",
        (ROOT / "README.md").read_text(),
    )
    assert said
    ours, encoded, peer = (runs[name] for name in ("ours_ragged", "ours_encoded", "annbatch_zarrs"))
    cpu = [f"{run['cpu_us_per_cell']['median']:.1f}" for run in (ours, encoded, peer)]
    memory = [f"{run['rss_mb']:.0f}" for run in (ours, peer)]
    disk = [f"{run['x_bytes_per_cell']:,.0f}" for run in (ours, peer)]
    assert list(said.groups()) == cpu + memory + disk


def test_the_costs_of_the_jobs_are_those_that_were_saved() -> None:
    results = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("pretrain", "convert", "encoder")
    }
    said = re.search(
        r"r = (\d+) for `small`.*have ([0-9.]+)\s+times.*v = ([0-9,]+) from fragments.*q = (\d+) for.*"
        r"take (\d+) core-hours.*\s([0-9.]+) to convert, (\d+) to predict",
        (ROOT / "jobs" / "README.md").read_text(),
        re.S,
    )
    assert said
    workers, convert = results["pretrain"]["cases"]["workers"], results["convert"]
    assert convert["spec"]["lines"] == 4000 * convert["spec"]["cells"]
    per_s = [
        workers["runs"]["plain"]["cells_per_s"]["median"],
        convert["spec"]["cells"] / convert["cases"]["peers"]["runs"]["ours"]["cpu_s_median"],
        results["encoder"]["cases"]["predict"]["runs"]["open_cnn_fp32"]["cells_per_cpu_s"]["median"],
    ]
    r, faster, v, q, *hours = (float(figure.replace(",", "")) for figure in said.groups())
    assert [r, v, q] == [round(rate) for rate in per_s]
    assert faster == round(workers["two_workers_over_one"]["median"], 1)
    core_hours = [1e6 * cells / rate / 3600 for cells, rate in ((10, r), (1, v), (1, q))]
    assert hours == [round(core_hours[0]), round(core_hours[1], 1), round(core_hours[2])]


def test_the_figures_of_the_encoder_are_those_that_were_saved() -> None:
    bars = json.loads((ROOT / "benchmarks" / "results" / "encoder.json").read_text())["bars"]
    said = re.search(
        r"took 1/([0-9.]+) of the CPU .* and 1/([0-9]+) with a cell's 1,500 open islands alone, 1/([0-9]+) with 500",
        (ROOT / "README.md").read_text(),
        re.S,
    )
    assert said
    all_islands, open_1500, open_500 = (
        bars[f"train_{name}"]["found"] for name in ("all", "open_1500", "open_500")
    )
    assert list(said.groups()) == [f"{all_islands:.1f}", f"{open_1500:.0f}", f"{open_500:.0f}"]
    assert bars["flat_600k_over_16k"]["found"] < 1.15


def test_the_figures_of_the_guide_are_those_that_were_saved() -> None:
    cases = json.loads((ROOT / "benchmarks" / "results" / "stream.json").read_text())["cases"]
    runs, files = cases["peers"]["runs"], cases["files"]["runs"]

    def said(tag: str) -> list[float]:
        guide = (ROOT / "docs" / "guide.md").read_text()
        (text,) = re.findall(rf"<!-- {tag} -->(.*?)<!-- /{tag} -->", guide, re.S)
        return [float(figure) for figure in re.findall(r"(?<![a-zA-Z0-9])[0-9.]+(?= (?:MB|µs|kB))", text)]

    memory = [runs[name]["rss_mb"] for name in ("ours_ragged", "ours_ragged_labels")]
    assert said("stream-rss") == [round(figure) for figure in memory]
    base, tenth = files["verify_base"], files["verify_tenth"]
    verified = [base["cpu_us_per_cell"], base["rss_mb"], tenth["rss_mb"]]
    assert said("verify") == [round(figure) for figure in verified]
    exported = []
    for kind in ("h5ad", "zarr"):
        run = files[f"{kind}_base"]
        exported += [
            round(run["cpu_us_per_cell"]),
            round(run["out_bytes_per_cell"] / 1000, 1),
            round(run["rss_mb"]),
        ]
    tenths = [round(files[f"{kind}_tenth"]["rss_mb"]) for kind in ("h5ad", "zarr")]
    assert said("export") == exported + tenths


@pytest.mark.slow
def test_the_lines_for_fragments_run_on_the_shipped_blood_cells(tmp_path: Path) -> None:
    with as_file(files("annatac_scale") / "data" / "archr_PBSmall.tsv.gz") as shipped:
        (tmp_path / "fragments.tsv.gz").write_bytes(shipped.read_bytes())
    (commands,) = blocks("sh")
    planned, converted, shown, verified, exported = (
        run(line, tmp_path) for line in commands.strip().splitlines()
    )
    assert "1 of 1 samples to convert" in planned.stdout
    assert "29,399 lines" in converted.stderr
    assert "150" in shown.stdout
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert "everything is as it should be" in verified.stdout
    assert "150 cells" in exported.stdout
    assert anndata.read_h5ad(tmp_path / "blood.h5ad").n_obs == 150


@pytest.mark.slow
def test_the_python_lines_run(folder: Path) -> None:
    own = folder / "python"
    own.mkdir()
    (own / "cells.h5ad").symlink_to(folder / "cells.h5ad")
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "macro F1" in done.stdout


@pytest.mark.slow
def test_the_lines_of_the_guide_stream_and_encode_the_store_of_the_readme(folder: Path) -> None:
    encoding, streaming = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.S)
    own = folder / "stream"
    own.mkdir()
    (own / "cells.h5ad").symlink_to(folder / "cells.h5ad")
    run("annatac convert cells.h5ad --assembly mm9 --select all --out atlas.zarr", own)
    done = subprocess.run(
        [sys.executable, "-c", streaming], cwd=own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 steps an epoch; ['" in done.stdout
    run("annatac pretrain atlas.zarr --out runs/pre --preset small --epochs 1 --set encoder.layers=1", own)
    shown = f"{encoding}\nprint(len(batch), hidden.shape, embedding.shape, batch.offsets[-1])"
    done = subprocess.run([sys.executable, "-c", shown], cwd=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) torch.Size\(\[(\d+), 128\]\) torch.Size\(\[(\d+), 64\]\) (\d+)", done.stdout)
    assert found
    n_cells, n_states, n_vectors, n_open = map(int, found.groups())
    assert n_cells == n_vectors
    assert n_states == n_open > 0


def test_every_file_that_the_readme_links_to_is_there() -> None:
    for name in ("README.md", "docs/guide.md", "jobs/README.md", "benchmarks/README.md"):
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    shown = re.search(r"<!-- demo-full -->\n(.*?)<!-- /demo-full -->", (ROOT / "README.md").read_text(), re.S)
    assert shown is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[1].splitlines()[2:]]
    measured = json.loads((ROOT / "benchmarks" / "results" / "demo_full.json").read_text())
    methods = ("annatac_scale", "logistic_regression")
    assert rows == [
        [
            row["data_set"],
            str(row["held_out_cells"]),
            *[f"{row[method]['accuracy']:.3f}, {row[method]['macro_f1']:.3f}" for method in methods],
        ]
        for row in measured
    ]


@pytest.mark.slow
def test_the_benchmark_of_the_road_runs_quickly_and_ends_with_json(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_road.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["stages"]) == {"convert", "pretrain", "finetune", "predict", "evaluate"}
    assert all(stage["cpu_s_median"] > 0 for stage in figures["stages"].values())


def test_the_targets_that_the_readme_names_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(
        re.findall(r"make (demo-full|demo|test|lint|bench)\b", (ROOT / "README.md").read_text())
    ):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.slow
def test_the_local_job_goes_from_a_sheet_to_evaluated_labels(folder: Path) -> None:
    (folder / "samples.tsv").write_text("sample\tpath\ttissue\none\tcells.h5ad\tcerebellum\n")
    job = ROOT / "jobs" / "local" / "road.sh"
    done = run(f"ASSEMBLY=mm9 bash {job} samples.tsv job", folder)
    assert "macro F1" in done.stdout
    again = run(f"ASSEMBLY=mm9 bash {job} samples.tsv job", folder)
    assert "macro F1" in again.stdout
