"""Reproduce Table 1 of the paper: train every row, evaluate, fuse, and print the table beside the paper's.

    python -m jobs.table1 --shards data/ucf101 --workers 8
    python -m jobs.table1 --shards data/mine --trunk mobilenet_v2 --no-finetune --size 96 --seeds 0 1 2

Run the same command again to resume: finished rows are skipped, and an interrupted row continues. With several --shards (the
splits of a data set) and --seeds, each row runs on all of them, and the table shows the mean and the standard deviation. Flow has
its columns if the shards hold flow (jobs.make_shards --flow).

OUT/table1.md, OUT/table1.png and OUT/table1.json hold the table; --json FILE holds: trunk, shards, seeds, rows [{row, stream,
paper, top1, spread, runs [{run, shards, seed, top1, videos}]}].
"""

from dataclasses import dataclass
from pathlib import Path

from grurcn.evaluation.table1 import Table1Job, reproduce_table1
from jobs.command import Command, finish


@dataclass(frozen=True, kw_only=True)
class Table1Options(Table1Job):
    """Options of the table."""

    json: Path | None = None
    """Write the result as JSON to this file."""


def main(options: Table1Options) -> int:
    table = reproduce_table1(options, print_line=lambda line: print(line, flush=True))
    print(f"\n{table.markdown}")
    finish(
        f"{table.num_done} of {len(table.rows)} accuracies; table1.md, table1.png and table1.json in {table.folder}",
        table.to_dict(),
        options.json,
    )
    return 0


COMMAND = Command(Table1Options, main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
