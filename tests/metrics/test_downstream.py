"""Retrieval, neighbour agreement and the linear probe against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from blip3o_dit.metrics.downstream import LinearProbe, NearestClass, neighbour_agreement, retrieval_ranks


def vectors(count: int = 60, width: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# Retrieval


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_ranks_are_those_of_scikit_learns_cosines(block: int) -> None:
    gallery = vectors()
    queries = gallery + 1.5 * vectors(seed=1)
    similarity = cosine_similarity(queries.numpy(), gallery.numpy())
    expected = 1 + (similarity > similarity.diagonal()[:, None]).sum(axis=1)
    assert retrieval_ranks(queries, gallery, block=block).tolist() == expected.tolist()


def test_a_perfect_query_ranks_first_whatever_its_length() -> None:
    gallery = vectors()
    assert (retrieval_ranks(5 * gallery, gallery) == 1).all()


def test_a_constant_gallery_ranks_everything_in_the_middle() -> None:
    ranks = retrieval_ranks(vectors(), torch.ones(60, 7))
    assert (ranks == 30.5).all()


def test_shuffled_queries_rank_by_chance() -> None:
    gallery = vectors(2000, 30)
    ranks = retrieval_ranks(gallery.roll(1, dims=0), gallery)
    assert float(ranks.mean()) == pytest.approx(1000.5, rel=0.05)


@pytest.mark.parametrize("block", [3, 1024])
def test_neighbour_agreement_is_that_of_scikit_learn(block: int) -> None:
    truth, k = vectors(), 6
    generated = truth + 0.8 * vectors(seed=1)
    true = torch.nn.functional.normalize(truth, dim=1).numpy()
    finder = NearestNeighbors(n_neighbors=k + 1).fit(true)
    expected = []
    for row in range(len(true)):
        query = torch.nn.functional.normalize(generated[row], dim=0).numpy()
        order = np.argsort(((true - query) ** 2).sum(axis=1))
        mine = [index for index in order if index != row][:k]
        theirs = finder.kneighbors(true[row : row + 1], return_distance=False)[0][1:]
        expected.append(len(set(mine) & set(theirs)) / k)
    found = neighbour_agreement(generated, truth, k=k, block=block)
    np.testing.assert_allclose(found.numpy(), expected)


def test_neighbours_of_the_truth_agree_and_of_noise_do_by_chance() -> None:
    truth = vectors(500, 20)
    assert (neighbour_agreement(truth, truth, k=10) == 1).all()
    by_chance = neighbour_agreement(vectors(500, 20, seed=5), truth, k=10)
    assert float(by_chance.mean()) == pytest.approx(10 / 499, rel=0.3)


@pytest.mark.parametrize("k", [0, 60])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k: expected 1 to 59"):
        neighbour_agreement(vectors(), vectors(), k=k)


# The linear probe


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    centres = 1.2 * vectors(4, 6, seed=3)
    numbers = torch.arange(200) % 4
    features = (centres[numbers] + vectors(200, 6, seed=4)) * torch.tensor([1.0, 50.0, 0.01, 3.0, 1.0, 0.0])
    labels = [f"class {int(number)}" for number in numbers]
    probe = LinearProbe(features[:120], labels[:120], inverse_penalty=0.1)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=5000))
    peer.fit(features[:120].numpy(), labels[:120])
    assert probe.predict(features[120:]) == peer.predict(features[120:].numpy()).tolist()
    np.testing.assert_allclose(probe._weight.numpy().T[:, :5], peer[-1].coef_[:, :5], atol=2e-3)


def test_a_probe_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least two classes, found \\['a'\\]"):
        LinearProbe(vectors(4), ["a"] * 4)


def test_the_nearest_class_by_cosine_about_an_origin() -> None:
    """The mean of each class, whatever mean all vectors share; texts have no origin to take off."""
    features = 100 + torch.tensor([[1.0, 0.0], [3.0, 0.2], [0.0, 2.0], [0.1, 4.0]])
    known = NearestClass.of_samples(features, ["b", "b", "a", "a"])
    assert known.names == ["a", "b"]
    torch.testing.assert_close(known.vectors, 100 + torch.tensor([[0.05, 3.0], [2.0, 0.1]]))
    assert known.predict(100 + torch.tensor([[9.0, 0.0], [1.0, 9.0]])) == ["b", "a"]
    texts = NearestClass(["x", "y"], torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2))
    assert texts.predict(torch.tensor([[0.2, 0.1], [-5.0, 1.0]])) == ["x", "y"]
