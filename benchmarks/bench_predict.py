"""Prediction: memory whatever the number of cells, speed beside the bare model and the published loop, kills, workers.

    python benchmarks/bench_predict.py [--quick] [--cases memory,speed,...] [--data FOLDER] [--save]

Cases: memory (peak of one process at 100,000 and 1,000,000 cells of 1,501 open islands, preset tiny, and what a cell
takes there), encoder (``predict`` through an encoder that the head reads, over that model alone on batches in memory,
in cells a second on as many threads), speed (the same for tiny as it is, whose head reads no encoder: ``predict`` of
1,000,000 cells over the sums that it forms of them, and over the same head on tokens), published
(``predict`` at the paper's size on open islands beside one cell at a time through the published dense model), workers
(one process, several, Ray actors and shares make the same files), kills (the same after SIGKILLs of processes, workers
and actors at random moments), real (with --labelled: granja and snareseq straight from their h5ad files, by models
fine-tuned on granja's donor D6, and on four fifths of snareseq). Every run is a process of its own. All other models
have random weights. Ends with one line of JSON; exit 1 where a run failed or files differ.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import commands
import psutil
from bench_stream import cpu_model
from measure import measured
from store_writer import Spec, make_store
from turns import Rounds, Run, ratio, summaries, take_turns

RESULTS = Path(__file__).with_name("results") / "predict.json"

BARS: dict[str, tuple[str, float]] = {
    "rss_mb_few": ("<=", 1500),
    "rss_mb_many": ("<=", 1500),
    "rss_mb_encoder": ("<=", 1500),
    "over_bare_encoder": (">=", 0.9),
    "over_bare_sums": (">=", 0.9),
    "over_published_loop": (">=", 20),
}
"""Speed beside the bare model is asked for of an encoder; held against the sums of a head without one it is missed."""

WORKER, ACTOR = "annatac_scale.annotate.worker", "_PartActor"
"""In the command lines of the processes that are killed."""
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Bench:
    """What the cases run with. data: folder of stores and models, kept; labelled: of labelled h5ad files"""

    data: Path
    scratch: Path
    rounds: int
    quick: bool
    kills: int
    seed: int
    labelled: Path | None = None

    @property
    def threads(self) -> int:
        return 1 if self.quick else len(os.sched_getaffinity(0))

    def spec(self, cells: int, islands: int = 16_657, n_open: int = 1501) -> Spec:
        small = {"islands": islands // 100, "open": max(n_open // 100, 2), "types": 3}
        return Spec(cells=cells // 50, **small) if self.quick else Spec(cells, islands, n_open)

    def store(self, spec: Spec) -> Path:
        return make_store(self.data / spec.folder(), spec)

    def model(self, store: Path, name: str, **options: Any) -> Path:
        """A model of a store, made once."""
        path = store.parent / f"model_{name}"
        if not (path / "config.json").exists():
            run = self.run("model", work="model", store=str(store), model=str(path), **options)
            figures = run.measured(self.scratch)
            if "failed" in figures:
                raise SystemExit(figures["failed"])
        return path

    def run(self, name: str, **task: Any) -> Run:
        """A run on all threads."""
        least = {"least_s": 0.1} if self.quick else {}
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return Run(name, {"threads": self.threads, **least, **task}, env=threads, script="predict_work.py")

    def predict(self, name: str, store: Path, model: Path) -> Run:
        """``predict`` into a place of its own, which has to be new each time."""
        out = self.scratch / f"labels_{name}"
        shutil.rmtree(out, ignore_errors=True)
        return self.run(name, work="predict", store=str(store), model=str(model), out=str(out))


Case = dict[str, Any]


def memory(bench: Bench) -> Case:
    """Peak memory of one process, few and many cells."""
    found: Rounds = {}
    for name, cells in (("few", 100_000), ("many", 1_000_000)):
        store = bench.store(bench.spec(cells))
        model = bench.model(store, "tiny")
        found |= take_turns([bench.predict(name, store, model)], 1, bench.scratch)
        shutil.rmtree(bench.scratch / f"labels_{name}", ignore_errors=True)
    bars = {f"rss_mb_{name}": figures[-1].get("rss_mb") for name, figures in found.items()}
    return {"runs": summaries(found), "bars": bars}


def encoder(bench: Bench) -> Case:
    """``predict`` through an encoder over that encoder and its head alone."""
    store = bench.store(bench.spec(50_000))
    found = _beside_bare(bench, store, bench.model(store, "tiny_encoder", reads="gate"), ["tokens"])
    over = ratio(found, "predict", "tokens", "cells_per_s")
    return {
        "runs": summaries(found),
        "predict_over_bare": over,
        "predict_over_bare_cpu": ratio(found, "predict", "tokens", "cells_per_cpu_s"),
        "bars": {
            "over_bare_encoder": over["median"] if over else None,
            "rss_mb_encoder": max(
                (figures["rss_mb"] for figures in found["predict"] if "rss_mb" in figures), default=None
            ),
        },
    }


def speed(bench: Bench) -> Case:
    """``predict`` through a head that reads no encoder, over its sums alone and over itself on tokens alone."""
    store = bench.store(bench.spec(1_000_000))
    found = _beside_bare(bench, store, bench.model(store, "tiny"), ["sums", "tokens"])
    over = ratio(found, "predict", "sums", "cells_per_s")
    return {
        "runs": summaries(found),
        "predict_over_sums": over,
        "predict_over_tokens": ratio(found, "predict", "tokens", "cells_per_s"),
        "bars": {"over_bare_sums": over["median"] if over else None},
    }


def _beside_bare(bench: Bench, store: Path, model: Path, bare: list[str]) -> Rounds:
    """``predict`` and the model alone in turns."""
    found: Rounds = {"predict": [], **{work: [] for work in bare}}
    for _ in range(bench.rounds):
        alone = [bench.run(work, work=work, store=str(store), model=str(model), cells=8_000) for work in bare]
        runs = [bench.predict("predict", store, model), *alone]
        for name, figures in take_turns(runs, 1, bench.scratch).items():
            found[name] += figures
    return found


def published(bench: Bench) -> Case:
    """The paper's size, 1,500 open islands: ours on open islands beside one dense cell at a time."""
    store = bench.store(bench.spec(1_000))
    model = bench.model(
        store, "paper", preset="paper" if not bench.quick else "tiny", head="cnn", reads="gate"
    )
    found: Rounds = {"predict": [], "loop": []}
    for _ in range(bench.rounds):
        loop = bench.run("loop", work="loop", store=str(store), model=str(model), cells=8)
        runs = [bench.predict("predict", store, model), loop]
        for name, figures in take_turns(runs, 1, bench.scratch).items():
            found[name] += figures
    over = ratio(found, "predict", "loop", "cells_per_s")
    return {
        "runs": summaries(found),
        "predict_over_loop": over,
        "bars": {"over_published_loop": over["median"] if over else None},
    }


MODES: Mapping[str, tuple[str, ...]] = {
    "process": (),
    "workers_2": ("--workers", "2"),
    "workers_8": ("--workers", "8"),
    "ray_2": ("--workers", "2", "--ray", "local"),
    "ray_8": ("--workers", "8", "--ray", "local"),
}


def small_atlas(bench: Bench) -> tuple[Path, Path]:
    """A store of many parts, and a model of it."""
    cells = bench.spec(200_000, 5_000, 300)
    store = bench.store(Spec(24_000, 200, 20, 3) if bench.quick else cells)
    return store, bench.model(store, "tiny")


def command_of(store: Path, model: Path, out: Path, *more: str) -> list[str]:
    return [*commands.ANNATAC, "predict", str(store), "--model", str(model), "--out", str(out), *more]


def files_digest(out: Path) -> str:
    """sha256 over the names and bytes of all parts."""
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.parquet")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def workers(bench: Bench) -> Case:
    """All ways to share the work make the same files."""
    store, model = small_atlas(bench)
    asked = ["process", "workers_2"] if bench.quick else list(MODES)
    runs: dict[str, dict[str, Any]] = {}
    for name in asked:
        out = bench.scratch / f"mode_{name}"
        begin = time.perf_counter()
        commands.printed(command_of(store, model, out, *MODES[name]))
        runs[name] = {"digest": files_digest(out), "wall_s": round(time.perf_counter() - begin, 1)}
        print(f"{name:12} {runs[name]['wall_s']:6.1f} s", flush=True)
    out = bench.scratch / "mode_shares"
    for share in ("3/3", "1/3", "2/3"):
        commands.printed(command_of(store, model, out, "--part", share))
    runs["shares"] = {"digest": files_digest(out)}
    for name in runs:
        shutil.rmtree(bench.scratch / f"mode_{name}")
    same = len({figures["digest"] for figures in runs.values()}) == 1
    return {"runs": runs, "same": same, "bars": {}, **({} if same else {"differing": True})}


def kills(bench: Bench) -> Case:
    """Data sets that are killed at random moments and gone on with equal an undisturbed one."""
    store, model = small_atlas(bench)
    whole = bench.scratch / "undisturbed"
    commands.printed(command_of(store, model, whole))
    expected, draw = files_digest(whole), random.Random(bench.seed)
    targets = ["driver", "worker"] if bench.quick else [*("driver", "worker", "actor")] * -(-bench.kills // 3)
    targets = targets[: bench.kills]
    draw.shuffle(targets)
    done, equal, n_sets = 0, True, 0
    while done < len(targets):
        out = bench.scratch / "disturbed"
        n_sets += 1
        while not _complete(out):
            target = targets[done] if done < len(targets) else "none"
            done += _run_and_kill(command_of(store, model, out), out, target, draw)
        equal &= files_digest(out) == expected and not list(out.glob(".*"))
        shutil.rmtree(out)
        print(f"data set {n_sets}: {done} kills so far, {'equal' if equal else 'DIFFERENT'}", flush=True)
    shutil.rmtree(whole)
    runs = {"kills": {"kills": done, "data_sets": n_sets, "targets": targets}}
    return {"runs": runs, "equal": equal, "bars": {}, **({} if equal else {"differing": True})}


_KILLED_MODES = {"driver": "process", "worker": "workers_2", "actor": "ray_2", "none": "process"}


def _complete(out: Path) -> bool:
    manifest = out / "_manifest.json"
    return manifest.exists() and '"complete": true' in manifest.read_text()


def _run_and_kill(command: list[str], out: Path, target: str, draw: random.Random) -> int:
    """One run, in which a process of a kind is killed after the next part; returns how many were."""
    before = len(list(out.glob("*.parquet")))
    log = out.with_suffix(".log")
    with log.open("ab") as said:
        process = subprocess.Popen(
            [*command, *MODES[_KILLED_MODES[target]]], cwd=commands.ROOT,
            env={**os.environ, **commands.ENVIRONMENT}, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    killed = 0
    until = time.monotonic() + PATIENCE_S
    while process.poll() is None:
        if time.monotonic() > until:
            raise SystemExit(f"no end in {PATIENCE_S:.0f} s: {log.read_text()[-2000:]}")
        grown = len(list(out.glob("*.parquet"))) > before
        if target != "none" and not killed and grown:
            time.sleep(draw.uniform(0, 0.3))
            killed = _kill(process, target, draw)
        time.sleep(0.02)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"exit {process.returncode}: {log.read_text()[-2000:]}")
    return killed


def _kill(process: subprocess.Popen[bytes], target: str, draw: random.Random) -> int:
    try:
        driver = psutil.Process(process.pid)
        kind = {"worker": WORKER, "actor": ACTOR}.get(target)
        below = driver.children(recursive=True) if kind else []
        found = [driver] if kind is None else [one for one in below if kind in title_of(one)]
        if not found:
            return 0
        draw.choice(found).kill()
    except psutil.NoSuchProcess:
        return 0
    return 1


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


REAL: Mapping[str, tuple[str, str, str, tuple[str, ...]]] = {
    "granja": ("granja2019_bmmc_14k.h5ad", "hg19", "coarse_label", ("--holdout", "donor=D5")),
    "snareseq": ("snareseq_mouse_cortex_10k.h5ad", "mm10", "cell_type", ("--holdout", "0.2")),
}
"""File, assembly, column of types and what is held out."""


def real(bench: Bench) -> Case:
    """h5ad files straight to labels, in one command."""
    if bench.labelled is None:
        print("real: skipped, no --labelled given", flush=True)
        return {"runs": {}, "bars": {}}
    runs: dict[str, dict[str, Any]] = {}
    for name, (file, assembly, labels, held) in REAL.items():
        cells, work = bench.labelled / file, bench.data / name
        model = work / "finetuned" / "model"
        if not model.exists():
            store = work / "cells.zarr"
            made = ["--assembly", assembly, "--select", "all", "--out", str(store)]
            commands.printed([*commands.ANNATAC, "convert", str(cells), *made])
            commands.printed([*commands.ANNATAC, "pretrain", str(store), "--out", str(work / "pretrained")])
            tuned = ["--model", str(work / "pretrained" / "model"), "--labels", labels, *held]
            commands.printed([*commands.ANNATAC, "finetune", str(store), *tuned, "--out", str(model.parent)])
        out = bench.scratch / f"real_{name}"
        command = command_of(cells, model, out, "--embeddings", "--write-h5ad", str(out.with_suffix(".h5ad")))
        environment = {**commands.ENVIRONMENT, "OMP_NUM_THREADS": str(bench.threads)}
        figures = measured(command, commands.ROOT, environment)
        print(f"{name:12} {figures['wall_s']:6.1f} s   peak {figures['rss_mb']:5.0f} MB", flush=True)
        runs[name] = {
            key: figures[key] for key in ("cpu_s", "wall_s", "rss_mb", "printed", "failed") if key in figures
        }
    return {"runs": runs, "bars": {}}


CASES: Mapping[str, Callable[[Bench], Case]] = {
    "memory": memory,
    "encoder": encoder,
    "speed": speed,
    "published": published,
    "workers": workers,
    "kills": kills,
    "real": real,
}


def bars(cases: Mapping[str, Case]) -> dict[str, dict[str, Any]]:
    """What was found, beside what is asked for."""
    found = {}
    for case in cases.values():
        for name, value in case["bars"].items():
            if value is not None:
                sign, bar = BARS[name]
                met = value >= bar if sign == ">=" else value <= bar
                found[name] = {"found": value, "bar": f"{sign} {bar:g}", "met": met}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="very small: for tests")
    parser.add_argument(
        "--data", type=Path, help="folder that keeps stores and models; default: a temporary one"
    )
    parser.add_argument("--labelled", type=Path, help="folder of the labelled h5ad files, for the case real")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help=f"write the JSON into results/{RESULTS.name} too")
    commands.add_cases(parser, CASES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(
            data=(options.data or Path(temporary) / "data").resolve(),
            scratch=Path(temporary),
            rounds=1 if options.quick else options.rounds,
            quick=options.quick,
            kills=2 if options.quick else options.kills,
            seed=options.seed,
            labelled=options.labelled,
        )
        cases: dict[str, Case] = {}
        for name in options.cases:
            print(f"-- {name}", flush=True)
            cases[name] = CASES[name](bench)
    report = {
        "benchmark": "predict",
        "quick": options.quick,
        "cpu": cpu_model(),
        **commands.conditions(),
        "cases": cases,
        "bars": bars(cases),
    }
    report["failed"] = commands.failures(cases) + [
        name for name, case in cases.items() if case.get("differing")
    ]
    commands.end(report, RESULTS if options.save else None)


if __name__ == "__main__":
    main()
