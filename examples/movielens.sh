#!/bin/sh
# From the raw MovieLens log to recommendations: the five commands that make a recommender, and the user it recommends to.
set -eu
genrec="${BIN:-.venv/bin}/genrec"
run="${RUN:-runs/demo}"

$genrec features --config configs/movielens/features.yaml --out "$run/features" --overwrite true
$genrec tokenize --config configs/movielens/tokenize.yaml --features "$run/features" --out "$run/tokenizer" --overwrite true
$genrec train --config configs/movielens/train.yaml --features "$run/features" --semantic_ids "$run/tokenizer" \
    --out "$run/model" --overwrite true
$genrec evaluate --model "$run/model" --title "MovieLens, from raw logs to recommendations"
$genrec recommend --model "$run/model" --user 42
