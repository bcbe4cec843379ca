"""Image-text matching: which pairs are made, how often, and that no layout changes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_mm.models.graph import ForwardContext
from megatron_mm.objectives.matching import hard_negatives, matching_loss, matching_pairs, pair_noise
from tests.objectives.cases import EMBEDDING, rows
from tests.support.graph_layouts import largest_difference, step


def embeddings(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(count, EMBEDDING, generator=generator) for _ in range(2))


def test_a_negative_has_an_image_and_another_text():
    """Over many pools: rows without image are never drawn and have none, rows of equal text are never drawn."""
    with_image = set(range(400)) - {3, 7, 11}
    for start in range(0, 400, 8):
        numbers = list(range(start, start + 8))
        batch = rows(numbers, with_image)
        wrong_text, wrong_image, valid = hard_negatives(batch, *embeddings(8), torch.tensor([5.0]))
        assert valid.tolist() == [float(number in with_image) for number in numbers]
        for row, number in enumerate(numbers):
            for chosen in (wrong_text[row], wrong_image[row]):
                if number in with_image:
                    assert chosen != row and numbers[chosen] in with_image
                    assert not torch.equal(batch.tokens_RT[chosen], batch.tokens_RT[row])


@pytest.mark.slow
def test_negatives_follow_the_softmax_of_similarity():
    """Chi-square of 2000 draws of texts and of images over four kinds of candidates, and of how often each is drawn."""
    count, kinds, scale = 2000, 4, 3.0
    kind = torch.arange(count) % kinds
    directions = functional.normalize(torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 0, 1]]), dim=-1)
    queries, keys = torch.tensor([[1.0, 0.2, 0.1]]).expand(count, -1), directions[kind]
    tokens = torch.stack((torch.arange(count) // 2, torch.zeros(count, dtype=torch.long)), dim=1)  # equal in twos
    batch = rows(list(range(5_000_000, 5_000_000 + count)), set(range(5_000_000, 5_000_000 + count)), tokens)
    wrong = tokens[:, None, 0] != tokens[None, :, 0]
    similarity = functional.normalize(queries, dim=-1) @ keys.t()
    expected_RP = (scale * similarity).masked_fill(~wrong, float("-inf")).softmax(dim=1).double()
    texts, _, _ = hard_negatives(batch, queries, keys, torch.tensor([scale]))
    _, images, _ = hard_negatives(batch, keys, queries, torch.tensor([scale]))
    for drawn in (texts, images):
        of_kind = torch.bincount(kind[drawn], minlength=kinds).double()
        expected = torch.stack([expected_RP[:, kind == k].sum() for k in range(kinds)])
        assert ((of_kind - expected).square() / expected).sum() < 16.3  # 0.1% of draws, three degrees of freedom
        each, mean = torch.bincount(drawn, minlength=count).double(), expected_RP.sum(dim=0)
        often = mean > 0.5
        dispersion = ((each - mean).square() / mean)[often].mean()
        assert abs(dispersion - 1) < 5 * (2 / often.sum()) ** 0.5 * 2
    assert (texts == images).double().mean() < 0.01  # the two draws of a row know nothing of each other


def test_noise_is_gumbels_and_keyed_by_the_pair():
    noise = pair_noise(torch.arange(300), torch.arange(10**12, 10**12 + 300), 1)
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.02) and noise.var().item() == pytest.approx(
        1.64493, abs=0.05
    )
    quantiles = torch.exp(-torch.exp(-noise.double())).flatten().sort().values
    uniform = (torch.arange(quantiles.numel()) + 0.5) / quantiles.numel()
    assert (quantiles - uniform).abs().max() < 1.95 / quantiles.numel() ** 0.5  # Kolmogorov-Smirnov at 0.1%
    assert torch.equal(noise[5:7, 3:4], pair_noise(torch.arange(5, 7), torch.tensor([10**12 + 3]), 1))
    assert not torch.equal(noise, pair_noise(torch.arange(300), torch.arange(10**12, 10**12 + 300), 2))
    lines = torch.corrcoef(noise[:50])
    assert (lines - torch.eye(50)).abs().max() < 0.3  # neighbouring samples draw independently


def test_pairs_are_what_they_say():
    """Own pairs, the image with the wrong text and its padding, the text with the wrong image."""
    batch = rows(list(range(8)), set(range(8)) - {2})
    images, texts = torch.randn(8, 3, 5), torch.randn(8, 4, 5)
    image_RE, text_RE = embeddings(8)
    args = (image_RE, text_RE, torch.tensor([2.0]))
    wrong_text, wrong_image, valid = hard_negatives(batch, *args)
    memory, seen, counts = matching_pairs(ForwardContext(batch), images, texts, *args)
    own, with_wrong_text, with_wrong_image = memory.chunk(3)
    seen_text = (batch.document_ids_RT >= 0).float()
    torch.testing.assert_close(own, torch.cat((images, texts), dim=1))
    torch.testing.assert_close(with_wrong_text, torch.cat((images, texts[wrong_text]), dim=1))
    torch.testing.assert_close(with_wrong_image, torch.cat((images[wrong_image], texts), dim=1))
    for found, text in zip(seen.chunk(3), (seen_text, seen_text[wrong_text], seen_text)):
        assert torch.equal(found[:, 3:], text)
        assert (found[valid > 0, :3] == 1).all() and (found[2, :3] == 0).all()
    assert torch.equal(counts, valid.repeat(3))


@pytest.mark.parametrize("numbers", [[4], [0, 15]])
def test_a_row_without_a_wrong_text_adds_its_own_pair_alone(numbers):
    """Alone in its pool, or beside rows of the same text only."""
    batch = rows(numbers, set(numbers), torch.tensor([[9, 8, 7, 6]]).expand(len(numbers), -1))
    image_RE, text_RE = embeddings(len(numbers))
    *_, valid = hard_negatives(batch, image_RE, text_RE, torch.tensor([2.0]))
    assert (valid == 0).all()
    images = torch.randn(len(numbers), 3, 5, requires_grad=True)
    memory, _, counts = matching_pairs(
        ForwardContext(batch), images, torch.randn(len(numbers), 4, 5), image_RE, text_RE, torch.tensor([2.0])
    )
    logits = memory.sum(dim=1)[:, :2]
    loss = matching_loss().compute(logits, counts, ForwardContext(batch))
    own = logits[: len(numbers)]
    assert loss.item() == pytest.approx((own.logsumexp(dim=1) - own[:, 0]).sum().item())
    loss.backward()
    assert torch.isfinite(images.grad).all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DP4", "CP2xDP2"])
def test_layouts_make_the_same_pairs(in_four_processes, layout):
    """Another pair anywhere would give other gradients of images and texts, which come from other processes too."""
    one = step("tests.objectives.cases:matching", "DP1", 8, 16)
    learned = {name for name, gradient in one["gradients"].items() if gradient.abs().max() > 1e-4}
    assert learned == {"gradient.image_memory.table", "gradient.text.table", "gradient.head.weight"}
    assert largest_difference(in_four_processes["matching", layout], one) <= 1e-6
