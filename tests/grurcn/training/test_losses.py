"""The losses and the tally, against numbers worked by hand; on two ranks the tally is of both."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import start_processes

from grurcn.training.losses import Tally, WordTally, heads_loss, loss_function, mean_loss

CPU = torch.device("cpu")

# Two clips, two levels, two classes; the right classes are 0 and 1.
LEVELS = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.8, 0.2], [0.4, 0.6]]]).log()
LABEL = torch.tensor([0, 1])


def test_the_mean_loss_is_of_the_averaged_probability():
    expected = -(math.log(0.7) + math.log(0.4)) / 2
    assert mean_loss(LEVELS, LABEL).item() == pytest.approx(expected)


def test_the_heads_loss_is_the_mean_of_each_heads_own():
    expected = -(math.log(0.9) + math.log(0.5) + math.log(0.2) + math.log(0.6)) / 4
    assert heads_loss(LEVELS, LABEL).item() == pytest.approx(expected)


def test_a_loss_that_is_not_known_is_refused_with_those_that_are():
    assert loss_function("heads") is heads_loss
    with pytest.raises(ValueError, match="loss hinge: expected one of mean, heads"):
        loss_function("hinge")


def test_with_one_level_both_losses_are_the_same():
    torch.testing.assert_close(heads_loss(LEVELS[:, :1], LABEL), mean_loss(LEVELS[:, :1], LABEL))


def log_probs(*rows):
    return torch.tensor(rows).log()


def test_a_tally_is_what_it_is_by_hand():
    tally = Tally(CPU)
    tally.add(log_probs([0.1, 0.2, 0.3, 0.05, 0.05, 0.25, 0.05]), torch.tensor([2]))  # best
    tally.add(
        log_probs([0.4, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03], [0.4, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03]),
        torch.tensor([4, 5]),  # fifth and sixth
    )
    found = tally.read()
    assert found["loss"] == pytest.approx(-(math.log(0.3) + math.log(0.07) + math.log(0.05)) / 3)
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)


def test_reading_a_tally_does_not_change_it():
    tally = Tally(CPU)
    tally.add(log_probs([0.3, 0.7]), torch.tensor([1]))
    first = tally.read()
    assert tally.read() == first
    tally.add(log_probs([0.3, 0.7]), torch.tensor([0]))
    assert tally.read()["top1"] == 0.5


def test_how_clips_are_cut_into_batches_does_not_matter():
    scores, label = torch.randn(10, 8).log_softmax(-1), torch.randint(8, (10,))
    whole, parts = Tally(CPU), Tally(CPU)
    whole.add(scores, label)
    for part in (slice(0, 3), slice(3, 4), slice(4, 10)):
        parts.add(scores[part], label[part])
    assert parts.read() == pytest.approx(whole.read())


def test_a_clip_counts_by_its_weight():
    tally = Tally(CPU)
    tally.add(log_probs([0.9, 0.1], [0.8, 0.2]), torch.tensor([0, 1]), torch.tensor([3.0, 1.0]))
    found = tally.read()
    assert found["loss"] == pytest.approx(-(3 * math.log(0.9) + math.log(0.2)) / 4)
    assert found["top1"] == pytest.approx(3 / 4)


def test_padding_does_not_count_even_where_its_scores_are_not_numbers():
    tally = Tally(CPU)
    scores = log_probs([0.9, 0.1], [0.2, 0.8])
    padding = torch.tensor([[math.nan, math.nan], [-math.inf, 0.0], [math.inf, math.inf]])
    tally.add(torch.cat([scores, padding]), torch.zeros(5, dtype=torch.long), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert tally.read() == pytest.approx({"loss": -(math.log(0.9) + math.log(0.2)) / 2, "top1": 0.5, "top5": 1.0})


def test_scores_that_are_not_numbers_are_not_right():
    tally = Tally(CPU)
    tally.add(torch.full((1, 3), math.nan), torch.tensor([0]))
    tally.add(log_probs([0.8, 0.1, 0.1]), torch.tensor([0]))
    found = tally.read()
    assert math.isnan(found["loss"])
    assert (found["top1"], found["top5"]) == (0.5, 0.5)


def test_with_fewer_than_five_classes_all_are_among_the_first_five():
    tally = Tally(CPU)
    tally.add(log_probs([0.7, 0.2, 0.1], [0.7, 0.2, 0.1]), torch.tensor([2, 1]))
    assert tally.read()["top1"] == 0
    assert tally.read()["top5"] == 1


def test_equal_scores_for_all_classes_are_right_as_often_as_chance():
    num_classes = 10
    tally = Tally(CPU)
    tally.add(torch.full((num_classes, num_classes), -math.log(num_classes)), torch.arange(num_classes))
    found = tally.read()
    assert (found["top1"], found["top5"]) == (0.1, 0.5)


def test_top1_is_how_often_the_argmax_is_the_label():
    scores = torch.randint(4, (200, 6)).double().log_softmax(-1)  # few values, many ties
    label = torch.randint(6, (200,))
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in scores])
    tally = Tally(CPU)
    tally.add(scores, label)
    assert tally.read()["top1"] == (first == label).double().mean()


def test_many_clips_are_summed_without_losing_any():
    tally = Tally(CPU)
    tally.sums += torch.tensor([2.0**24, -(2.0**24), 2.0**24, 2.0**24])  # where float32 stops counting
    tally.add(log_probs([1.0, 0.0]), torch.tensor([1]), torch.tensor([0.0]))
    tally.add(log_probs([1.0, 0.0]), torch.tensor([0]))
    assert tally.sums[0] == 2**24 + 1
    assert tally.read()["loss"] == 2**24 / (2**24 + 1)


def test_the_tally_of_scores_that_learn_holds_no_graph():
    tally = Tally(CPU)
    tally.add(torch.randn(2, 3, requires_grad=True).log_softmax(-1), LABEL)
    assert not tally.sums.requires_grad


@pytest.mark.parametrize("weight", [None, torch.zeros(2)])
def test_a_mean_of_no_clips_is_refused(weight):
    tally = Tally(CPU)
    if weight is not None:
        tally.add(LEVELS[:, 0], LABEL, weight)
    with pytest.raises(ValueError, match="no clips were added"):
        tally.read()


def rank(index, folder):
    """Rank 0 has three clips, rank 1 has one and padding; a second tally is empty on rank 0 only."""
    dist.init_process_group("gloo", store=FileStore(str(folder / "store"), 2), rank=index, world_size=2)
    tally, other = Tally(CPU), Tally(CPU)
    if index == 0:
        tally.add(log_probs([0.9, 0.1], [0.8, 0.2], [0.6, 0.4]), torch.tensor([0, 0, 0]))
    else:
        tally.add(log_probs([0.7, 0.3], [0.7, 0.3]), torch.tensor([1, 1]), torch.tensor([1.0, 0.0]))
        other.add(log_probs([0.5, 0.5]), torch.tensor([0]))
    found = [tally.read(), tally.read(), other.read()]
    tally.add(log_probs([0.6, 0.4]), torch.tensor([index]))
    found.append(tally.read())
    (folder / f"{index}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_on_two_ranks_all_clips_count_alike_and_both_ranks_read_the_same(tmp_path):
    start_processes(rank, args=(tmp_path,), nprocs=2, start_method="spawn")
    first, second = (json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1))
    assert first == second
    loss = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.3)) / 4
    expected = {"loss": pytest.approx(loss), "top1": 3 / 4, "top5": 1.0}  # not the mean of the ranks' 1 and 0
    assert first[0] == expected
    assert first[1] == expected
    assert first[3]["top1"] == 4 / 6  # reading added nothing to either rank's own sums
    assert first[2] == {"loss": pytest.approx(math.log(2)), "top1": 1.0, "top5": 1.0}


# Captions


def test_words_are_tallied_by_captions_and_by_words():
    """Two captions of two words and of one, of a vocabulary of three."""
    log_probs = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.2, 0.2, 0.6], [1.0, 0.0, 0.0]]]).log()
    tally = WordTally(CPU)
    tally.add(log_probs, torch.tensor([[0, 1], [2, -1]]))
    nll = -(math.log(0.5) + math.log(0.1) + math.log(0.6))
    found = tally.read()
    assert found["loss"] == pytest.approx(nll / 2)  # a caption
    assert found["perplexity"] == pytest.approx(math.exp(nll / 3))  # a word
    assert found["word_accuracy"] == pytest.approx(2 / 3)


def test_words_of_no_captions_have_no_mean_and_scores_that_are_no_numbers_are_not_right():
    with pytest.raises(ValueError, match="no captions were added"):
        WordTally(CPU).read()
    tally = WordTally(CPU)
    tally.add(torch.full((1, 1, 3), math.nan), torch.tensor([[0]]))
    found = tally.read()
    assert math.isnan(found["loss"])
    assert math.isnan(found["perplexity"])
    assert found["word_accuracy"] == 0
