"""Per-class and per-level results over the videos of a split: counts that add up over batches and ranks.

L levels, K classes, B videos (or their middle clips).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

MISTAKES = 12  # the worst ones, which are kept


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A video whose predicted class is wrong."""

    key: str
    number: int  # in its split
    label: int
    predicted: int
    label_probability: float
    predicted_probability: float


class Confusion:
    """Counts over videos: label against predicted class, the accuracy of each level alone, and that of the others without it."""

    def __init__(self, classes: Sequence[str], levels: Sequence[str]):
        self.classes, self.levels = tuple(classes), tuple(levels)
        self.matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)  # (K, K): label, predicted
        self.alone = torch.zeros(len(levels), dtype=torch.int64)  # (L,) right videos of a level alone
        self.without = torch.zeros(len(levels), dtype=torch.int64)  # (L,) right videos of the others without it
        self.probability = torch.zeros(len(levels), dtype=torch.float64)  # (L,) sums of the label's probability
        self.mistakes: list[Mistake] = []

    @property
    def videos(self) -> int:
        return int(self.matrix.sum())

    def add(self, levels: Tensor, label: Tensor, keys: Sequence[str], numbers: Sequence[int]) -> None:
        """Counts some videos: probabilities by each level (B, L, K), label (B,), their keys and numbers in the split."""
        levels, label = levels.detach().double().cpu(), label.cpu()
        votes = levels.mean(dim=1)  # (B, K)
        predicted = first_largest(votes)
        self.matrix.index_put_((label, predicted), torch.ones_like(label), accumulate=True)
        own = label[:, None]
        self.alone += (first_largest(levels) == own).sum(dim=0)
        others = levels.sum(dim=1, keepdim=True) - levels  # (B, L, K)
        self.without += (first_largest(others) == own).sum(dim=0)
        of_label = votes.gather(1, own)[:, 0]
        self.probability += levels.gather(2, own[:, None].expand(-1, len(self.levels), 1)).sum(dim=(0, 2))
        wrong: list[int] = (predicted != label).nonzero()[:, 0].tolist()
        for place in wrong:
            self.mistakes.append(
                Mistake(
                    key=keys[place],
                    number=numbers[place],
                    label=int(label[place]),
                    predicted=int(predicted[place]),
                    label_probability=float(of_label[place]),
                    predicted_probability=float(votes[place].max()),
                )
            )
        self.keep_worst()

    def merge(self, other: "Confusion") -> None:
        """Adds the counts of other videos."""
        self.matrix += other.matrix
        self.alone += other.alone
        self.without += other.without
        self.probability += other.probability
        self.mistakes += other.mistakes
        self.keep_worst()

    def keep_worst(self) -> None:
        """Keeps the mistakes in which the label had the least probability."""
        self.mistakes.sort(key=lambda mistake: (mistake.label_probability, mistake.key))
        del self.mistakes[MISTAKES:]

    def per_class(self) -> dict[str, dict[str, float]]:
        """{class: {videos, top1}}, for the classes that have videos."""
        counts, right = self.matrix.sum(dim=1).tolist(), self.matrix.diagonal().tolist()
        return {
            name: {"videos": count, "top1": hits / count}
            for name, count, hits in zip(self.classes, counts, right, strict=True)
            if count
        }

    def per_level(self) -> dict[str, dict[str, float]]:
        """{level: {top1 of the level alone, top1_without of all others, mean probability of the label}}."""
        rows = zip(self.levels, self.alone.tolist(), self.without.tolist(), self.probability.tolist(), strict=True)
        return {
            name: {
                "top1": alone / self.videos,
                "top1_without": without / self.videos,
                "probability": sum_ / self.videos,
            }
            for name, alone, without, sum_ in rows
        }

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON."""
        pairs = self.matrix.nonzero().tolist()
        return {
            "classes": list(self.classes),
            "levels": list(self.levels),
            "matrix": [[row, column, int(self.matrix[row, column])] for row, column in pairs],
            "alone": self.alone.tolist(),
            "without": self.without.tolist(),
            "probability": self.probability.tolist(),
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Confusion":
        """The counts that to_dict wrote."""
        confusion = cls(content["classes"], content["levels"])
        for row, column, count in content["matrix"]:
            confusion.matrix[row, column] = count
        confusion.alone = torch.tensor(content["alone"], dtype=torch.int64)
        confusion.without = torch.tensor(content["without"], dtype=torch.int64)
        confusion.probability = torch.tensor(content["probability"], dtype=torch.float64)
        confusion.mistakes = [Mistake(**mistake) for mistake in content["mistakes"]]
        return confusion


def first_largest(values: Tensor) -> Tensor:
    """(..., K) -> (...) the index of the largest value, the first of equal ones on every device."""
    largest = values.amax(dim=-1, keepdim=True)
    numbers = torch.arange(values.shape[-1]).expand_as(values)
    return torch.where(values == largest, numbers, values.shape[-1] - 1).amin(dim=-1)
