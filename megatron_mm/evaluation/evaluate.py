"""Evaluation of a model on held-out samples: generate, score, and measure the loss of the true text.

Samples are the dicts of `generation.prompts.read_prompts`: their "text" is the reference. `swap_media` gives every
sample another sample's media: a model that reads its media does worse on those, one that only knows the texts does
not, which is how looking and listening are told from guessing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from megatron_mm.evaluation.captions import CaptionScores, score_captions
from megatron_mm.generation.generate import Decoding, Generator

MEDIA = ("images", "audios", "videos")


@dataclass(frozen=True)
class TokenScores:
    """How well a model knows the next token of true texts, of all tokens and the texts' ends."""

    loss: float
    """Mean cross-entropy, in nats."""
    accuracy: float
    """Share of tokens that the model finds the likeliest."""


@dataclass(frozen=True)
class Evaluation:
    """What one model does on one set of samples."""

    scores: CaptionScores
    tokens: TokenScores
    """Of the true texts."""
    captions: list[str]
    """The generated captions, in order of the samples."""


def evaluate(
    generator: Generator, samples: Sequence[dict], decoding: Decoding, batch_size: int = 32, progress: bool = False
) -> Evaluation:
    """Generates a caption for every sample, scores it against its "text", and measures the text's tokens.

    Args:
        generator: the model.
        samples: dicts with "prompt", "text" and the media's files.
        decoding: how tokens are chosen.
        batch_size: samples handled at once.
        progress: show progress bars.

    Raises:
        ValueError: a sample without "text" (named by its id), or a medium that cannot be read.
    """
    check_references(samples)
    captions = list(generator.generate(list(samples), decoding, batch_size, progress))
    scores = score_captions(captions, [[sample["text"]] for sample in samples])
    return Evaluation(scores, token_scores(generator, samples, batch_size, progress), captions)


@torch.inference_mode()
def token_scores(
    generator: Generator, samples: Sequence[dict], batch_size: int = 32, progress: bool = False
) -> TokenScores:
    """Next-token prediction of all tokens of all texts, the end included where the model has one, placeholders not.

    The loss is the training loss of these samples: prompts are read and not counted.

    Raises:
        ValueError: as `evaluate`.
    """
    check_references(samples)
    model, processor = generator.model, generator.processor
    config, tokenizer = processor.config, processor.tokenizer
    placeholders = torch.tensor(list(tokenizer.placeholder_ids.values()), dtype=torch.long)
    end = [] if config.eos_token_id is None else [config.eos_token_id]
    total, right, count = 0.0, 0, 0
    for start in tqdm(range(0, len(samples), batch_size), desc="tokens", unit="batch", disable=not progress):
        batch = samples[start : start + batch_size]
        inputs = processor(batch)
        texts = [[*tokenizer.encode(sample["text"]), *end] for sample in batch]
        width = max(map(len, texts))
        ids = torch.full((len(batch), width), config.pad_token_id)
        real = torch.zeros(len(batch), width, dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            real[row, : len(text)] = 1
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real], dim=1)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1].float().cpu()
        counted = real.bool() & ~torch.isin(ids, placeholders)
        total += F.cross_entropy(logits[counted], ids[counted], reduction="sum").item()
        likeliest = logits[counted][:, : tokenizer.vocab_size].argmax(dim=-1)  # rows beyond are never chosen
        right += int((likeliest == ids[counted]).sum())
        count += int(counted.sum())
    return TokenScores(total / count, right / count)


def swap_media(samples: Sequence[dict], seed: int = 0) -> list[dict]:
    """The same samples, each with the media of another sample with another text.

    Media are exchanged among samples with as many images, sounds and videos; samples without media stay as they are.
    Every file is used as often as before.

    Args:
        samples: dicts with "text" and the media's files.
        seed: chooses who gets whose.

    Raises:
        ValueError: more than half of the samples of one kind share a text, so that no exchange exists.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        kind = tuple(len(sample.get(name) or ()) for name in MEDIA)
        if any(kind):
            groups.setdefault(kind, []).append(index)
    swapped = [dict(sample) for sample in samples]
    chance = random.Random(seed)
    for kind, members in groups.items():
        chance.shuffle(members)
        # In order of text, a shift by the largest number of equal texts never lands on the same text.
        members.sort(key=lambda index: samples[index]["text"])
        texts = [samples[index]["text"] for index in members]
        shift = max(texts.count(text) for text in set(texts))
        if 2 * shift > len(members):
            raise ValueError(
                f"media cannot be swapped: of {len(members)} samples with {_describe(kind)}, {shift} share a text"
            )
        shift = chance.randint(shift, len(members) - shift)
        for place, index in enumerate(members):
            giver = samples[members[(place + shift) % len(members)]]
            swapped[index].update({name: giver.get(name) or [] for name in MEDIA})
    return swapped


def check_references(samples: Sequence[dict]) -> None:
    """Refuses samples without a text to compare with."""
    if not samples:
        raise ValueError("there are no samples to evaluate")
    for sample in samples:
        if not (sample.get("text") or "").strip():
            name = sample.get("id", "without id")
            raise ValueError(f'sample {name}: field "text", the reference, is missing or empty')


def _describe(kind: tuple[int, ...]) -> str:
    return ", ".join(f"{number} {name}" for number, name in zip(kind, MEDIA) if number)
