"""What every exported model owes the library that calls it: its cache under either name, its arguments, its vocabulary.

transformers hands a cache to a model, and takes it back, under a name that releases disagree on (`past_key_values`;
`cache` from 5.24 on). A release that nobody tried may disagree on more. So whatever a model is given and does not
understand raises: generation can fail in such a release, but it cannot answer wrongly in silence. Part of every
exported folder; it needs torch and transformers only.

Shapes: B rows, T tokens, V rows of the vocabulary, E width of a shared space.
"""

import inspect
from dataclasses import dataclass, fields

import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)

# -------------------------------------------------------------------------------------------------------------- caches

_NAMES = [field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")]
if not _NAMES:
    raise ImportError(
        f"transformers {transformers.__version__} names a model's cache otherwise than releases that this folder was "
        "made for; install one of those (`transformers_releases` in config.json), or renew this folder's code with "
        "megatron_mm's tools/convert_checkpoint.py refresh"
    )
#: The name under which this release hands a cache to a model and finds it in the model's output.
CACHE = _NAMES[0]


class MemoryCache(DynamicCache):
    """Growing self-attention keys and values, and the keys and values of a memory, computed once."""

    def __init__(self, num_memory_layers):
        super().__init__()
        self.memory = [None] * num_memory_layers
        self.memory_mask = None

    def _map_memory(self, function):
        self.memory = [pair if pair is None else (function(pair[0]), function(pair[1])) for pair in self.memory]
        if self.memory_mask is not None:
            self.memory_mask = function(self.memory_mask)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._map_memory(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._map_memory(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._map_memory(lambda x: x[indices])

    def reset(self):
        super().reset()
        self.memory, self.memory_mask = [None] * len(self.memory), None


def begin(past_key_values, cache, use_cache, num_memory_layers):
    """The cache to work with (None: none), and how many tokens it holds.

    Args:
        past_key_values, cache: the cache that the model was given, under either name.

    Raises:
        ValueError: it was given two, or one of another kind, which would lose the keys and values of the memory.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("both cache and past_key_values were given; they are two names of one argument")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, MemoryCache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}; this model keeps what it has read of media in a MemoryCache: "
            "leave the argument out in the first call and pass on what the output holds"
        )
    if cache is None and use_cache:
        cache = MemoryCache(num_memory_layers)
    return cache, cache.get_seq_length() if cache is not None else 0


# ----------------------------------------------------------------------------------------------------------- arguments

#: Arguments that callers send to any model and that change nothing here, each with who sends it. A value of None is
#: harmless under any name: generate and PEFT send whatever they know of.
HARMLESS = {
    "cache_position": "generate, before 5.5; places are counted from the cache, and check_positions compares",
    "output_attentions": "PEFT and Trainer, as False",
    "output_hidden_states": "PEFT and Trainer, as False",
    "token_type_ids": "pipelines and collators of a tokenizer, as zeros: a text is one segment",
}


def check_positions(position_ids, past, length, cache_position=None):
    """Refuses tokens that stand beyond what cache and input hold: the cache was lost between two calls.

    Args:
        position_ids: [B or 1, T], counted from each row's first token; None: nothing is said of them.
        past: tokens in the cache.
        length: T.
        cache_position: [T], places in cache and input; None: nothing is said of them.

    Raises:
        ValueError: a position is `past + length` or more.
    """
    for name, places in (("position_ids", position_ids), ("cache_position", cache_position)):
        if places is None or places.device.type == "meta" or torch.compiler.is_compiling():
            continue
        last = int(places.max())
        if last >= past + length:
            raise ValueError(
                f"{name} reach {last}, but the cache holds {past} tokens and the input {length}: what came before "
                f"is missing. Pass on the cache of the call before, or the whole text "
                f"(transformers {transformers.__version__})"
            )


# -------------------------------------------------------------------------------------------------------------- models


class ExportedModel(PreTrainedModel):
    """Base of all exported models: says when it is loaded in a release that its folder was not made for."""

    def __init__(self, config):
        super().__init__(config)
        oldest_and_newest = getattr(config, "transformers_releases", None)
        if oldest_and_newest is not None:
            oldest, newest = oldest_and_newest
            if not Version(oldest) <= Version(transformers.__version__) <= Version(newest):
                logger.warning(
                    f"this folder was made for transformers {oldest} to {newest} and is loaded in "
                    f"{transformers.__version__}, in which it was not tried: what it does not understand raises; "
                    "megatron_mm's tools/convert_checkpoint.py refresh renews its code"
                )

    @classmethod
    def check_arguments(cls, given, known=()):
        """Refuses arguments that would be ignored.

        Args:
            given: arguments by name that the signature does not name.
            known: names that do no harm here.

        Raises:
            TypeError: names the first.
        """
        for name, value in given.items():
            asked = value.any() if isinstance(value, torch.Tensor) else value
            if value is None or name in known or (name in HARMLESS and (name == "cache_position" or not asked)):
                continue
            shown = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            does = "cannot do what is asked by" if name in HARMLESS else "does not know"
            names = ", ".join(cls._forward_arguments())
            raise TypeError(f"{cls.__name__} {does} the argument {name} ({shown}); its arguments are {names}")

    @classmethod
    def check_features(cls, given):
        """`check_arguments` of the get_…_features, which may be given a processor's whole output: what forward reads is
        known.

        Raises:
            TypeError: names the first argument that nothing here reads.
        """
        cls.check_arguments(given, cls._forward_arguments())

    @classmethod
    def _forward_arguments(cls):
        parameters = inspect.signature(cls.forward).parameters.values()
        return [x.name for x in parameters if x.name != "self" and x.kind is not x.VAR_KEYWORD]

    @staticmethod
    def output(found, return_dict):
        """A MultimodalOutput of the fields `found` by name; where `return_dict` is False, not None, a tuple of them."""
        out = MultimodalOutput(**found)
        return out.to_tuple() if return_dict is False else out


@dataclass
class MultimodalOutput(CausalLMOutputWithPast):
    """What a forward pass gives; fields that a model or an input does not have are None.

    Embeddings [B, E] are float32 and of any length (a cosine is compared); rows without the medium are zero.
    """

    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    vision_embeds: torch.FloatTensor | None = None
    """Of images or clips."""
    audio_embeds: torch.FloatTensor | None = None
    match_logits: torch.FloatTensor | None = None
    """[B, 2]: that image and text belong together, and that they do not."""
    mae_prediction: torch.FloatTensor | None = None
    """[B, patches, pixels of a patch]."""


# ---------------------------------------------------------------------------------------------------------- generation


class PaddedVocabulary(LogitsProcessor):
    """Never chooses rows of the vocabulary beyond the tokenizer's pieces, which pad it for tensor parallelism."""

    def __init__(self, tokenizer_size):
        self.tokenizer_size = tokenizer_size

    def __call__(self, input_ids, scores):
        """Scores [B, V] -> the same, minus infinity in padded rows."""
        beyond = torch.arange(scores.shape[-1], device=scores.device) >= self.tokenizer_size
        return scores.masked_fill(beyond, -torch.inf)


class MemoryGeneration:
    """Before GenerationMixin: generation of a model whose `encode_media(**media)` gives a tuple of tensors, which the
    argument `media_memory` takes in place of the media."""

    #: Names of the arguments of encode_media.
    media_inputs = ()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # generate() leaves the cache to forward(), which makes a MemoryCache

    def generate(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        """GenerationMixin's; what it chooses from are the tokenizer's pieces (`config.tokenizer_size`)."""
        size = getattr(self.config, "tokenizer_size", None)
        if size is not None and size < self.config.vocab_size:
            logits_processor = LogitsProcessorList([*(logits_processor or []), PaddedVocabulary(size)])
        return super().generate(inputs, generation_config, logits_processor, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Run the towers before beams multiply the rows, so that each picture is encoded once."""
        if expand_size > 1 and model_kwargs.get("media_memory") is None:
            media = {name: model_kwargs.pop(name, None) for name in self.media_inputs}
            model_kwargs["media_memory"] = tuple(
                x if x is None else x.repeat_interleave(expand_size, dim=0) for x in self.encode_media(**media)
            )
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
