"""Hard negatives for Tevatron's second stage: what a retriever ranks high though it is not relevant.

    python docs/mine_negatives.py --train train.jsonl.gz --corpus corpus.jsonl.gz --ranking train.rank.tsv \\
        --output train-mined.jsonl.gz

Each line of --train is written again with other negatives: --negatives of the best --depth passages of its question in
--ranking (lines of question id, passage id, score, best first), drawn by a fixed seed. Questions without any are left
out. The corpus is held in memory (MS MARCO: about 6 GB).
"""

import argparse
import gzip
import json
import random
from collections import defaultdict


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "corpus", "ranking", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--depth", type=int, default=200)
    parser.add_argument("--negatives", type=int, default=30)
    options = parser.parse_args(arguments)

    ranked: defaultdict[str, list[str]] = defaultdict(list)
    with open(options.ranking) as file:
        for line in file:
            question, passage, _ = line.split()
            if len(ranked[question]) < options.depth:
                ranked[question].append(passage)
    with gzip.open(options.corpus, "rt") as file:
        corpus = {row["docid"]: row for row in map(json.loads, file)}
    draw, written = random.Random(0), 0
    with gzip.open(options.train, "rt") as file, gzip.open(options.output, "wt") as output:
        for row in map(json.loads, file):
            relevant = {passage["docid"] for passage in row["positive_passages"]}
            others = [passage for passage in ranked[row["query_id"]] if passage not in relevant]
            if others:
                drawn = draw.sample(others, min(options.negatives, len(others)))
                negatives = [corpus[passage] for passage in drawn]
                output.write(json.dumps(row | {"negative_passages": negatives}) + "\n")
                written += 1
    print(f"wrote {options.output}: {written:,} questions")


if __name__ == "__main__":
    main()
