"""Reproduce Table 2 of the paper: search, train, caption and score every row, and print the table beside the paper's.

    python -m jobs.table2 --shards data/msvd --frame runs/vgg16-frames --states runs/gru-rcn-bidirectional --entity imagenet
    python -m jobs.table2 --shards data/mine --states runs/mine --rows states --samples 4 --hidden 64 96 --segments 4 8

For each row, Ray Tune trains --samples decoders in parallel, whose LSTM size, word vectors and number of segments are drawn at
random. The decoder with the best score of the validation videos (BLEU-4, or the row's own) captions the test videos. The vectors
of each encoder and number of segments are computed once, as by jobs.encode. Run the same command again to resume: what is done is
not done again, and an interrupted training continues. Rows whose encoders are not given stay empty.

OUT/table2.md, OUT/table2.png and OUT/table2.json hold the table; --json FILE holds: shards, encoders, rows [{row, select, paper
{bleu4, meteor, cider}, scores, best {run, hidden, embedding, segments, validation}, trials}].
"""

from dataclasses import dataclass
from pathlib import Path

from grurcn.evaluation.table2 import Table2Job, reproduce_table2
from jobs.command import Command, finish


@dataclass(frozen=True, kw_only=True)
class Table2Options(Table2Job):
    """Options of the table."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(options: Table2Options) -> int:
    table = reproduce_table2(options, print_line=lambda line: print(line, flush=True))
    print(f"\n{table.markdown}")
    finish(
        f"{table.num_done} of {len(table.rows)} rows; table2.md, table2.png and table2.json in {table.folder}",
        table.to_dict(),
        options.json,
    )
    return 0


COMMAND = Command(Table2Options, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
