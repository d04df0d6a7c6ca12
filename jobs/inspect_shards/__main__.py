"""Look into a packed data set, check it, and make others' tars readable.

    python -m jobs.inspect_shards info data/mine               what it holds
    python -m jobs.inspect_shards verify data/mine             whether every byte, row and frame is what was packed
    python -m jobs.inspect_shards preview data/mine            what the model will see: preview.html, preview.png
    python -m jobs.inspect_shards index s3://bucket/tars       an index for WebDataset tars that others wrote

A data set is a folder or a URL: s3://, gs://, http://. Only `index` writes there, and it changes no tar.

--json FILE holds:
  info      url, format_version, digest, classes, splits, packing, encoder, source, shared_groups, rejected, reasons
  verify    url, digest, videos, shards, bytes, holds, decoded, faults, fault_list (the first 10,000), seconds
  preview   url, split, page, picture, samples
  index     out, tars_at, classes, captions, videos, shards, rejected, rejected_list, bytes, packing, frames_per_video, seconds
"""

from jobs.command import Command, subcommands
from jobs.inspect_shards.index import MakeIndex, make_index
from jobs.inspect_shards.info import Info, print_info
from jobs.inspect_shards.preview import Preview, preview
from jobs.inspect_shards.verify import Verify, verify_and_print

Job = Info | Verify | Preview | MakeIndex
JOBS = {"info": Info, "verify": Verify, "preview": Preview, "index": MakeIndex}


def main(job: Job) -> int:
    match job:
        case Info():
            return print_info(job)
        case Verify():
            return verify_and_print(job)
        case Preview():
            return preview(job)
        case MakeIndex():
            return make_index(job)


COMMAND = Command(subcommands(JOBS), main, __doc__)

if __name__ == "__main__":
    COMMAND.run()
