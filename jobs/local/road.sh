#!/usr/bin/env bash
# From a sheet of samples to labels. Usage: jobs/local/road.sh samples.tsv OUT
set -euo pipefail

ASSEMBLY=${ASSEMBLY:-hg38}     # hg38, hg19, mm10, mm9
SELECT=${SELECT:-all}          # islands: tss, all, or a BED file of windows
LABELS=${LABELS:-cell_type}    # obs column with the cell types
PRESET=${PRESET:-tiny}         # tiny, small, paper
WORKERS=${WORKERS:-2}          # threads of the conversion

sheet=$1 out=$2
annatac convert --sheet "$sheet" --assembly "$ASSEMBLY" --select "$SELECT" --out "$out/atlas.zarr" --workers "$WORKERS"
annatac pretrain "$out/atlas.zarr" --out "$out/pretrained" --preset "$PRESET"
annatac finetune "$out/atlas.zarr" --model "$out/pretrained/model" --labels "$LABELS" --out "$out/finetuned"
annatac predict "$out/atlas.zarr" --model "$out/finetuned/model" --out "$out/labels"
annatac evaluate "$out/labels" --store "$out/atlas.zarr" --truth "$LABELS"
