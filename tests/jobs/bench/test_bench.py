"""The benchmarks measure what they say. No test checks a speed."""

import json
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from videos import level, listing_of, numbered_planes, pack, write_video

from grurcn.models.gru import ConvGRU
from jobs.bench.model import Limit, ModelBench, SixProducts, UsualCell, bench_model, peak_memory, ratio_rows
from jobs.bench.order import OrderBench, mix_error, mixing
from jobs.bench.pack import PackBench
from jobs.bench.read import Cost, ReadBench, order_of, ratio, rgb_clip
from jobs.bench.read import Limit as ReadLimit
from jobs.bench.train import TrainBench, rows_of
from jobs.commands import load
from shards.index import Index
from shards.reading.clips import ClipConfig
from shards.reading.stream import train_batches
from shards.video import Packing

main = load("bench").main
TINY = (("one", 6, 8, 4, 3), ("two", 1, 8, 6, 1))


def same_kernels(gru, usual, six):
    """The GRU's kernels in the other two."""
    x_channels = gru.w.shape[1]
    with torch.no_grad():
        usual.gates.weight[:, :x_channels], usual.gates.weight[:, x_channels:] = gru.w_gates, gru.u_gates
        usual.candidate.weight[:, :x_channels], usual.candidate.weight[:, x_channels:] = gru.w, gru.u
        for conv, kernel in zip(
            (six.w_z, six.w_r, six.w, six.u_z, six.u_r, six.u),
            (*gru.w_gates.chunk(2), gru.w, *gru.u_gates.chunk(2), gru.u),
            strict=True,
        ):
            conv.weight.copy_(kernel)


def test_the_peers_compute_the_same_states():
    torch.manual_seed(0)
    gru, usual, six = ConvGRU(8, 4), UsualCell(8, 4, 3), SixProducts(8, 4, 3)
    same_kernels(gru, usual, six)
    maps = torch.randn(5, 2, 8, 6, 6)
    expected = gru(maps.transpose(0, 1))[:, -1]
    torch.testing.assert_close(usual(maps), expected)
    torch.testing.assert_close(six(maps), expected)


def test_the_limit_has_the_multiplications_of_ours():
    from torch.utils.flop_counter import FlopCounterMode

    maps, counts = torch.randn(5, 2, 8, 6, 6), []
    limit = Limit(8, 4, 3)
    limit(maps)  # makes the maps that stand for states
    for module, out in (
        (ConvGRU(8, 4), lambda gru: gru(maps.transpose(0, 1))[:, -1]),
        (limit, lambda bare: bare(maps)),
    ):
        with FlopCounterMode(display=False) as counter:
            got = out(module)
            got.backward(torch.ones_like(got))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_every_level_and_all_together_are_measured(tmp_path, capsys):
    job = ModelBench(batch=2, frames=3, repeats=1, device="cpu")
    tables = bench_model(job, TINY)
    assert len(tables) == 3
    for rows in tables.values():
        assert [row["variant"] for row in rows] == ["ours", "ours, recomputing", "usual cell", "six products", "limit"]
        assert all(row["seconds"] > 0 and row["memory_mib"] > 0 for row in rows)
        assert rows[-1]["times the limit"] == 1


def test_ratios_are_against_the_limit_and_the_usual_cell():
    seconds = {"ours": 2.0, "usual cell": 5.0, "limit": 1.6}
    ours = ratio_rows(seconds, dict.fromkeys(seconds, 2.0**20))[0]
    assert ours["times the limit"] == pytest.approx(1.25)
    assert ours["times as fast as the usual cell"] == pytest.approx(2.5)


def test_peak_memory_counts_what_was_held_at_once():
    def work():
        first = torch.zeros(1_000_000)
        del first
        _ = torch.zeros(500_000), torch.zeros(750_000)

    assert peak_memory(work, torch.device("cpu")) == pytest.approx(5_000_000, rel=0.01)


def test_the_whole_step_is_measured_part_by_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(main.__globals__, "bench_model", lambda job: bench_model(job, TINY))
    job = ModelBench(
        batch=1, frames=2, repeats=1, device="cpu", whole_step=True, size=32, width=1 / 32, json=tmp_path / "bench.json"
    )
    assert main(job) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = found["tables"]["training step"]
    assert [row["part"] for row in rows[:5]] == ["pixels", "trunk", "ConvGRUs and heads", "backward", "optimizer"]
    assert sum(row["fraction"] for row in rows[:5]) == pytest.approx(1)
    assert 0 < rows[6]["fraction"] < 1.5
    assert found["machine"]
    assert "training step" in capsys.readouterr().out


def test_the_orders_costs_and_mixing_are_measured(tmp_path, capsys):
    job = OrderBench(samples=10**6, shards=10**3, ranks=16, batch=4, steps=20, resumes=2, json=tmp_path / "order.json")
    assert main(job) == 0
    costs, mixes = json.loads((tmp_path / "order.json").read_text())["tables"].values()
    assert [row["what"] for row in costs][::3] == ["a step, mean", "resuming at a random step"]
    assert 1 < float(costs[-1]["measured"]) < 1.1  # the rows of the index come on top of the videos
    assert [row["batches"] for row in mixes] == [1, 10, 50] * 2
    assert "1,000,000 samples in 1,000 shards" in capsys.readouterr().out


def test_the_error_of_a_class_mix_as_worked_by_hand():
    """Two classes; the first two steps show one each, the other two both: 1/2, 1/2, 0, 0. Two steps together are even."""
    labels = np.array([[0, 0], [1, 1], [0, 1], [1, 0]])
    assert mix_error(labels, together=1) == 0.25
    assert mix_error(labels, together=2) == 0


def test_mixing_is_set_beside_a_perfect_shuffle():
    """Ten classes, four shards each: the eight shards of a window are of up to eight classes."""
    for row in mixing("tiny", 10, 100, 25, 8, seed=0):
        assert 0.7 < row["ours"] / row["perfect shuffle"] < 1.4


def test_a_batch_that_loader_workers_cannot_share_is_refused():
    with pytest.raises(ValueError, match="a rank's batch of 6 cannot be divided among 4 loader workers"):
        OrderBench(batch=6)


# Reading


@pytest.mark.long
def test_reading_is_measured_beside_the_usual_way_and_the_limit(tmp_path, capsys):
    job = ReadBench(
        num_videos=3, seconds=1, frames=4, batch=2, batches=2, repeats=1, small_videos=6, small_batches=20,
        json=tmp_path / "read.json",
    )  # fmt: skip
    assert main(job) == 0
    clips, large, small, threads, memory = json.loads((tmp_path / "read.json").read_text())["tables"].values()
    assert [row["what"] for row in clips] == ["ours", "usual way", "limit"]
    assert all(row["ours / this, per core"] > 0 for row in clips)
    for rows in (large, small):
        assert rows[0]["ours / this"] == 1
        assert all(row["a second"] > 0 and row["per core"] > 0 for row in rows)
    assert [row["what"] for row in threads] == ["1 decode threads", "2 decode threads"]
    assert float(memory[2]["measured"]) > 0
    assert "Random clips of 4 frames, 3 videos" in capsys.readouterr().out


@pytest.mark.parametrize("stride", [1, 3])
def test_the_limit_of_reading_decodes_the_frames_that_ours_gives(stride, tmp_path):
    packing = Packing(width=32, height=32, gop=4)
    index = Index(pack(tmp_path / "shards", listing_of(tmp_path / "videos", [30, 31, 40, 33]), packing), "train")
    job, clips = ReadBench(frames=5, batch=2, batches=3), ClipConfig(num_frames=5, stride=stride, size=16)
    limit = ReadLimit(index, clips, job)
    with closing(train_batches(index, clips, order_of(index, 2), rank=0, world_size=1)) as batches:
        frames = torch.cat([batch.frames for _, batch in islice(batches, 4, 7)]).numpy()
    assert limit.decode() == len(frames) == 6
    for (decoder, packets), expected in zip(limit.clips, frames, strict=True):
        found = [frame for packet in packets for frame in decoder.decode(packet)] + decoder.decode(None)
        decoder.flush_buffers()
        planes = [frame.to_ndarray() for frame in found]
        assert all(any(np.array_equal(frame, plane) for plane in planes) for frame in expected)
        assert packets[0].is_keyframe


def test_the_usual_way_gives_consecutive_frames(tmp_path):
    data = write_video(tmp_path / "video.mp4", numbered_planes(30), codec="libx264").read_bytes()
    for seed in range(10):
        clip = rgb_clip(data, 4, np.random.default_rng(seed))
        numbers = [round((luma - level(0)) / (level(1) - level(0)) * 219 / 255) for luma in clip.mean(axis=(1, 2, 3))]
        assert np.diff(numbers).tolist() == [1, 1, 1]


def test_a_ratio_is_the_median_of_the_turns():
    def costs(*cores):
        return [Cost(clock=2 * core, core=core) for core in cores]

    found = {"slow": costs(8.0, 4.0, 6.0), "fast": costs(1.0, 2.0, 2.0)}
    assert ratio(found, slower="slow", faster="fast") == 3


def test_reading_nothing_is_refused():
    with pytest.raises(ValueError, match="all counts must be at least 1"):
        ReadBench(batches=0)


def test_packing_is_set_beside_bare_ffmpeg_and_its_memory_beside_four_times_the_videos(tmp_path):
    json_file = tmp_path / "pack.json"
    assert main(PackBench(num_videos=3, seconds=1, cores=2, repeats=1, json=json_file)) == 0
    speed, memory = json.loads(json_file.read_text())["tables"].values()
    assert [row["what"] for row in speed] == ["ours", "bare ffmpeg"]
    assert speed[1]["ours / this"] == pytest.approx(speed[0]["videos a second"] / speed[1]["videos a second"])
    assert [row["times the first"] > 0 for row in memory] == [True, True]


@pytest.mark.long
def test_training_is_measured_with_its_loader_and_without_and_from_a_slow_store(tmp_path):
    json_file = tmp_path / "train.json"
    job = TrainBench(
        workers=0,
        width=1 / 32,
        size=64,
        num_videos=6,
        seconds=1,
        turns=1,
        steps=2,
        demo_steps=2,
        delay_seconds=0.01,
        json=json_file,
    )
    assert main(job) == 0
    paper, small = json.loads(json_file.read_text())["tables"].values()
    assert [row["batches from"] for row in paper] == ["loader", "one batch in memory"]
    assert [row["batches from"] for row in small] == ["10 ms an answer", "folder"]
    for row in (*paper, *small):
        assert row["clips a second"] > 0
        assert 0 <= float(row["waiting for data"].rstrip("%")) <= 100
    assert paper[0]["first / this"] == 1


def test_the_ratio_of_two_readers_as_worked_by_hand():
    """Turns of 1 + 3 steps, of which the first does not count: 2 s and 4 s a step, then 3 s and 3 s; the last turn is cut off."""
    record: dict[str, Any] = {
        "ours": [[(9, 1), (2, 0), (2, 1), (2, 0)], [(9, 1), (3, 0), (3, 0), (3, 0)], [(9, 1)]],
        "theirs": [[(9, 1), (4, 0), (4, 0), (4, 0)], [(9, 1), (3, 0), (3, 3), (3, 0)]],
    }
    ours, theirs = rows_of(record, global_batch=10, num_turns=2, target="more")
    assert ours["clips a second"] == 4  # a step takes 2.5 s
    assert theirs["first / this"] == 1.5  # 2 and 1
    assert (ours["waiting for data"], theirs["waiting for data"]) == ("6.67%", "14.29%")
