"""Captions straight from a training checkpoint: greedy decoding through the graph, in one process.

    rows of held-out samples ─ tokens of the prompt ─ graph ─ likeliest next token ─ … until the end token ─ text

What depends on media alone is computed once; the decoder reads its whole row again for every token, so this is for
short texts of small models. An exported folder decodes with a cache (generation/generate.py).

Shape suffixes: R rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_mm.config.schema import Config
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.data.tokens.tokenizer import Tokenizer, open_tokenizer
from megatron_mm.evaluation.streams import GraphReader, all_rows


def greedy_captions(
    reader: GraphReader, config: Config, task: str = "", batch_size: int = 64, limit: int = 0
) -> list[str]:
    """The likeliest text of every row after its prompt and media, in order of the rows.

    Args:
        reader: a model whose decoder is causal and writes `logits`.
        config: the recipe whose datasets are read (`streams.reading_jsonl`); every row has one document.
        task: the task under which the decoder is causal, where the system divides microbatches among tasks.
        batch_size: rows decoded at once.
        limit: at most this many rows; 0 takes all.

    Returns:
        Texts; one as long as its row allows where the model does not end it.
    """
    tokenizer = open_tokenizer(config.data.tokenizer)
    fields = reader.fields({"logits"}) | {"tokens_RT"}
    captions: list[str] = []
    for batch in all_rows(config, fields, batch_size, task, limit):
        captions += (tokenizer.decode(ids) for ids in greedy_tokens(reader, batch, tokenizer))
    return captions


def greedy_tokens(reader: GraphReader, batch: Microbatch, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids generated for each row, the end token left out.

    Args:
        batch: rows of one document; what follows each prompt is not looked at.
        tokenizer: its ids alone are chosen, where the vocabulary is padded.
    """
    pad_id = tokenizer.pad_id
    rows, length = batch.tokens_RT.shape
    prompt_R = batch.loss_mask_RT.argmax(dim=1) + 1  # the first label that counts is the text's first token
    at_T = torch.arange(length)
    tokens_RT = torch.where(at_T < prompt_R[:, None], batch.tokens_RT, pad_id)
    plan = replace(batch.plan, one_document_per_row=True, max_document_length=length)
    batch = replace(
        batch,
        plan=plan,
        document_ids_RT=torch.zeros_like(batch.document_ids_RT),  # the row is as long as the text may become
        position_ids_RT=at_T.repeat(rows, 1),
        tokens_RT=tokens_RT,
    )
    going_R, numbers_R, kept = torch.ones(rows, dtype=torch.bool), torch.arange(rows), {}
    for place_R in (prompt_R + step for step in range(length)):
        going_R = going_R & (place_R < length)
        if not going_R.any():
            break
        logits_RTV = reader.run(batch, ["logits"], kept)[0]["logits"].cpu().view(rows, length, -1)
        place_R = place_R.clamp(max=length - 1)
        next_R = logits_RTV[numbers_R, place_R - 1, : tokenizer.vocab_size].argmax(dim=-1)
        going_R = going_R & (next_R != tokenizer.eos_id)
        tokens_RT[numbers_R[going_R], place_R[going_R]] = next_R[going_R]
    generated = (row[first:] for row, first in zip(tokens_RT.tolist(), prompt_R.tolist()))
    return [[token for token in row if token != pad_id] for row in generated]
