"""Generated vectors in downstream use, in place of reference ones: retrieval, neighbours, classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Cosines of unit float32 vectors closer than this are rounding apart.
TIE = 1e-6


def retrieval_ranks(queries: Tensor, gallery: Tensor, *, block: int = 256) -> Tensor:
    """Rank, by cosine, of gallery row i among all gallery rows for query i; 1 is best. [n, C] x2 -> [n].

    Equal similarities share the middle of the places they take, so a constant gallery ranks everything
    at (n + 1) / 2 instead of first.
    """
    queries, gallery = F.normalize(queries.float(), dim=-1), F.normalize(gallery.float(), dim=-1)
    ranks = []
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ gallery.T
        own = similarity.diagonal(start)[:, None]
        better = (similarity > own + TIE).sum(dim=1)
        equal = ((similarity - own).abs() <= TIE).sum(dim=1) - 1
        ranks.append(1.0 + better + equal / 2)
    return torch.cat(ranks).double()


def neighbour_agreement(generated: Tensor, reference: Tensor, *, k: int = 10, block: int = 256) -> Tensor:
    """Share of a reference vector's k nearest other ones that its generated vector finds too, in [0, 1].

    [n, C], [n, C] -> [n]. Nearness is the cosine; both search all reference vectors but the sample's own.
    Chance is k / (n - 1).

    Raises:
        ValueError: unless 1 <= k < n.
    """
    if not 1 <= k < len(reference):
        raise ValueError(f"k: expected 1 to {len(reference) - 1}, one less than the vectors, found {k}")
    generated, reference = F.normalize(generated.float(), dim=-1), F.normalize(reference.float(), dim=-1)
    shares = []
    for start in range(0, len(reference), block):
        nearest = []
        for vectors in (reference, generated):
            similarity = vectors[start : start + block] @ reference.T
            similarity.diagonal(start).fill_(-torch.inf)
            nearest.append(similarity.topk(k, dim=1).indices)
        shared = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(dim=2)
        shares.append(shared.double().mean(dim=1))
    return torch.cat(shares)


@dataclass(frozen=True)
class NearestClass:
    """Tells the class whose vector is nearest by cosine, of K names and vectors [K, C].

    `origin` [C] is taken off both sides first: vectors with a large mean are alike in all but that.
    """

    names: list[str]
    vectors: Tensor
    origin: Tensor

    @classmethod
    def of_samples(cls, features: Tensor, labels: list[str]) -> NearestClass:
        """The mean vector of each class (nearest prototype) of features [n, C], about the mean of all."""
        names = sorted(set(labels))
        place: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            place.setdefault(label, []).append(row)
        means = torch.stack([features[place[name]].double().mean(dim=0) for name in names])
        return cls(names, means.float(), features.double().mean(dim=0).float())

    def predict(self, features: Tensor) -> list[str]:
        """[n, C] -> n class names."""
        found, known = (F.normalize(side.float() - self.origin, dim=-1) for side in (features, self.vectors))
        return [self.names[number] for number in (found @ known.T).argmax(dim=1).tolist()]


class LinearProbe:
    """Multinomial logistic regression on standardised features, the same objective as scikit-learn's.

    Minimises the mean cross-entropy plus |W|^2 / (2 inverse_penalty n) over W [F, classes] and a free bias,
    by L-BFGS in float64; features that never vary are left out by their zero. `features` [n, F] are those of
    reference tokens, `labels` n names of at least two kinds, `inverse_penalty` scikit-learn's C.

    Raises:
        ValueError: for fewer than two classes.
    """

    def __init__(
        self, features: Tensor, labels: list[str], *, inverse_penalty: float = 0.1, max_steps: int = 200
    ) -> None:
        self.classes = sorted(set(labels))
        if len(self.classes) < 2:
            raise ValueError(f"labels: expected at least two classes, found {self.classes}")
        numbers = {name: number for number, name in enumerate(self.classes)}
        wanted = torch.tensor([numbers[label] for label in labels])
        features = features.double()
        self._mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
        self._scale = torch.where(std > 1e-9 * std.max(), 1.0 / std.clamp(min=1e-300), torch.zeros_like(std))
        rows = self._standardize(features)
        self._weight = torch.zeros(rows.shape[1], len(self.classes), dtype=torch.float64, requires_grad=True)
        self._bias = torch.zeros(len(self.classes), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self._weight, self._bias], max_iter=max_steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            penalty = self._weight.square().sum() / (2 * inverse_penalty * len(rows))
            value = F.cross_entropy(rows @ self._weight + self._bias, wanted) + penalty
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self._weight, self._bias = self._weight.detach(), self._bias.detach()

    def predict(self, features: Tensor) -> list[str]:
        """[n, F] -> n class names."""
        scores = self._standardize(features.double()) @ self._weight + self._bias
        return [self.classes[number] for number in scores.argmax(dim=1).tolist()]

    def _standardize(self, features: Tensor) -> Tensor:
        return (features - self._mean) * self._scale
