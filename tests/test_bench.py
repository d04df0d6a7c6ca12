"""jobs.bench: its variants compute what they are said to, and it measures them. How fast they are is no test's business."""

import json

import numpy as np
import pytest
import torch

from grurcn.gru import ConvGRU
from jobs.bench import main
from jobs.bench_model import Limit, Model, SixProducts, UsualCell, bench_model, peak_memory, with_ratios
from jobs.bench_order import OrderBench, mix_error, mixing

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
    job = Model(batch=2, frames=3, repeats=1, device="cpu")
    tables = bench_model(job, TINY)
    assert len(tables) == 3
    for rows in tables.values():
        assert [row["variant"] for row in rows] == ["ours", "ours, recomputing", "usual cell", "six products", "limit"]
        assert all(row["seconds"] > 0 and row["memory_mib"] > 0 for row in rows)
        assert rows[-1]["times the limit"] == 1


def test_ratios_are_against_the_limit_and_the_usual_cell():
    rows = [
        {"variant": name, "seconds": seconds, "memory_mib": 1.0}
        for name, seconds in (("ours", 2.0), ("usual cell", 5.0), ("limit", 1.6))
    ]
    ours = with_ratios(rows)[0]
    assert ours["times the limit"] == pytest.approx(1.25)
    assert ours["times as fast as the usual cell"] == pytest.approx(2.5)


def test_peak_memory_counts_what_was_held_at_once():
    def work():
        first = torch.zeros(1_000_000)
        del first
        _ = torch.zeros(500_000), torch.zeros(750_000)

    assert peak_memory(work, torch.device("cpu")) == pytest.approx(5_000_000, rel=0.01)


def test_the_whole_step_is_measured_part_by_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jobs.bench.bench_model", lambda job: bench_model(job, TINY))
    job = Model(
        batch=1, frames=2, repeats=1, device="cpu", whole_step=True, size=32, width=1 / 32, json=tmp_path / "bench.json"
    )
    assert main(job) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = found["tables"]["training step"]
    assert [row["part"] for row in rows[:5]] == ["pixels", "trunk", "ConvGRUs and heads", "backward", "optimizer"]
    assert sum(row["share"] for row in rows[:5]) == pytest.approx(1)
    assert 0 < rows[6]["share"] < 1.5
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
    with pytest.raises(ValueError, match="a rank's batch of 6 cannot be shared by 4 loader workers"):
        OrderBench(batch=6)
