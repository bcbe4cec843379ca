"""Greedy captions against the graph's own logits of the finished text, computed anew."""

from dataclasses import replace

import pytest
import torch

from megatron_mm.config.section import changed
from megatron_mm.data.tokens.tokenizer import open_tokenizer
from megatron_mm.evaluation.greedy import greedy_captions, greedy_tokens
from megatron_mm.evaluation.streams import GraphReader, all_rows, reading_jsonl
from tests.support.corpus import build_corpus
from tests.support.recipes import small_avt


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Samples of at most one image and one sound, the tokenizer, the folder of the media."""
    folder = tmp_path_factory.mktemp("corpus")
    _, tokenizer = build_corpus(folder)
    lines = (folder / "samples.jsonl").read_text().splitlines()
    samples = folder / "few.jsonl"
    samples.write_text("\n".join(lines[:3] + lines[4:8]) + "\n")
    return samples, tokenizer


@pytest.fixture
def reader():
    config = changed(small_avt(init_std=0.3), {"model.decoder.vocab_size": 304})
    return GraphReader(config)


def test_every_token_is_the_likeliest_after_those_before_it(reader, corpus):
    tokenizer = open_tokenizer(str(corpus[1]))
    with reading_jsonl(reader.config, *corpus) as config:
        (batch,) = all_rows(config, reader.fields({"logits"}) | {"tokens_RT"}, 8, "generation")
        captions = greedy_captions(reader, config, "generation", batch_size=3)
    found = greedy_tokens(reader, batch, tokenizer)
    assert captions == [tokenizer.decode(ids) for ids in found], "batches of another size change nothing"
    assert len(set(captions)) > 1 and max(map(len, found)) > 1

    rows, length = batch.tokens_RT.shape
    prompt_R = batch.loss_mask_RT.argmax(1) + 1
    tokens_RT = batch.tokens_RT.clone()
    for row, ids in enumerate(found):
        first = int(prompt_R[row])
        tokens_RT[row, first : first + len(ids)] = torch.tensor(ids)
    finished = replace(batch, tokens_RT=tokens_RT, document_ids_RT=torch.zeros(rows, length).long())
    finished.position_ids_RT = torch.arange(length).repeat(rows, 1)
    logits_RTV = reader.run(finished, ["logits"])[0]["logits"].view(rows, length, -1)
    likeliest_RT = logits_RTV[..., : tokenizer.vocab_size].argmax(-1)
    for row, ids in enumerate(found):
        end = int(prompt_R[row]) - 1 + len(ids)
        wanted = ids + [tokenizer.eos_id] * (end + 1 < length)
        assert likeliest_RT[row, int(prompt_R[row]) - 1 :][: len(wanted)].tolist() == wanted


def test_the_true_text_is_not_looked_at(reader, corpus):
    with reading_jsonl(reader.config, *corpus) as config:
        (batch,) = all_rows(config, reader.fields({"logits"}) | {"tokens_RT"}, 8, "generation")
    tokenizer = open_tokenizer(str(corpus[1]))
    found = greedy_tokens(reader, batch, tokenizer)
    prompt_R = batch.loss_mask_RT.argmax(1) + 1
    text_RT = torch.arange(batch.tokens_RT.shape[1]) >= prompt_R[:, None]
    other = replace(batch, tokens_RT=torch.where(text_RT, 17, batch.tokens_RT))
    other.document_ids_RT = torch.where(text_RT, 0, batch.document_ids_RT)
    assert greedy_tokens(reader, other, tokenizer) == found


def test_nodes_without_tokens_are_run_once(reader, corpus):
    with reading_jsonl(reader.config, *corpus) as config:
        (batch,) = all_rows(config, reader.fields({"logits"}) | {"tokens_RT"}, 8, "generation")
    kept = {}
    first = reader.run(batch, ["logits"], kept)[0]["logits"]
    names = {reader.graph.nodes[number].name.split(".")[0] for number in kept}
    assert names == {"vision", "audio", "fusion"}
    changed = replace(batch, tokens_RT=batch.tokens_RT.flip(0), waveforms_AN=torch.zeros_like(batch.waveforms_AN))
    fresh = replace(batch, tokens_RT=batch.tokens_RT.flip(0))
    again = reader.run(changed, ["logits"], kept)[0]["logits"]
    assert torch.equal(again, reader.run(fresh, ["logits"])[0]["logits"]) and not torch.equal(again, first)
