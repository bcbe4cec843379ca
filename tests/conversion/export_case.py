"""Small recipes, random weights, media and folders for the tests of export and generation."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from PIL import Image, ImageDraw

from megatron_mm.checkpoints import folder as checkpoint_folder
from megatron_mm.checkpoints.streamed import write_checkpoint_weights
from megatron_mm.config.load import dump_config
from megatron_mm.config.schema import Config, DataConfig
from megatron_mm.config.section import changed
from megatron_mm.data.reading.microbatch import Microbatch, MicrobatchPlan
from megatron_mm.data.tokens.tokenizer import stored_name
from megatron_mm.hf.configuration_synapse import SynapseConfig as HFConfig
from megatron_mm.hf.modeling_synapse import SynapseForCausalLM
from megatron_mm.parts.clip.section import VisionTowerConfig
from megatron_mm.parts.decoder.section import CrossAttentionConfig, DecoderConfig
from megatron_mm.parts.whisper.section import AudioTowerConfig
from megatron_mm.systems.export import model_entries
from megatron_mm.systems.synapse.export import fields
from megatron_mm.systems.synapse.section import SynapseConfig


def tiny_recipe(vocab_size: int = 320) -> Config:
    """Grouped queries everywhere, towers of different widths, two cross layers for three decoder layers."""
    model = SynapseConfig(
        decoder=DecoderConfig(
            num_layers=3, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96,
            vocab_size=vocab_size,
        ),
        cross_attention=CrossAttentionConfig(every=2, num_query_groups=2),
        vision=VisionTowerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=56, image_size=28, max_frames=4
        ),
        audio=AudioTowerConfig(
            num_layers=2, hidden_size=48, num_attention_heads=4, ffn_hidden_size=72, num_mel_bins=16, seconds=0.5
        ),
    )  # fmt: skip
    return Config(model=model, data=DataConfig(seq_length=64, frames_per_video=3))


def training_recipe() -> Config:
    """The tiny recipe in fp32, towers trained too, with open gates."""
    config = changed(
        tiny_recipe(),
        {
            "model.vision.frozen": False,
            "model.cross_attention.gate_init": 0.6,
            "training.precision": "fp32",
            "training.global_batch_size": 4,
            "optimizer.lr": 1e-2,
            "optimizer.lr_warmup_iters": 0,
            "training.train_iters": 10,
        },
    )
    return config


def random_weights(config: SynapseConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Training tensors; norms near one, gates open, everything else large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for entry in model_entries(config):
        noise = torch.randn(entry.shape, generator=generator)
        is_norm = "layernorm.weight" in entry.training
        weights[entry.training] = 1 + 0.1 * noise if is_norm else noise * (0.5 if len(entry.shape) < 2 else 0.08)
        if any(part.name is None for part in entry.parts):
            missing = next(part for part in entry.parts if part.name is None)
            entry.part_view(weights[entry.training], missing).zero_()
        if entry.training.endswith("gate"):
            weights[entry.training] = torch.full((1,), 0.8)
    return weights


def hf_model(recipe: Config, seed: int = 0) -> SynapseForCausalLM:
    """The modelling class with `random_weights`."""
    model = SynapseForCausalLM(HFConfig(**fields(recipe))).eval()
    weights = random_weights(recipe.model, seed)
    state = dict(pair for entry in model_entries(recipe.model) for pair in entry.split(weights[entry.training]))
    model.load_state_dict(state, strict=True)
    return model


def train_tokenizer(path: Path, vocab_size: int = 300) -> Path:
    """A SentencePiece model with this project's special tokens."""
    words = "a red blue green cat dog sun moon barks sings what is this sound picture of the and one two three"
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(words.split(), size=8)) for _ in range(200)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=buffer, vocab_size=vocab_size, model_type="bpe",
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, user_defined_symbols=["<image>", "<audio>", "<video>", "<mask>"],
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(buffer.getvalue())
    return path


def write_training_folder(root: Path, recipe: Config, weights: dict[str, torch.Tensor], tokenizer: Path) -> Path:
    """A whole training checkpoint `root/iter_0000007`."""
    part = checkpoint_folder.begin(root, 7)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    write_checkpoint_weights(part, shapes, torch.float32, weights.__getitem__)
    dump_config(recipe, part / "config.yaml")
    (part / stored_name(tokenizer)).write_bytes(tokenizer.read_bytes())
    return checkpoint_folder.finish(part, {"iteration": 7})


def media_batch(model: SynapseForCausalLM | SynapseConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Four rows: image and sound, neither, two frames, sound; of different lengths, padded on the left."""
    if isinstance(model, SynapseConfig):
        vocab_size, size = model.decoder.vocab_size, model.vision.image_size
        mels, frames = model.audio.num_mel_bins, model.audio.num_frames
    else:
        vocab_size, size = model.config.vocab_size, model.config.vision_image_size
        mels, frames = model.config.audio_num_mel_bins, model.config.audio_frames
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab_size, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 5, 2)):
        mask[row, :pads] = 0
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "pixel_values": torch.randn(4, 2, 3, size, size, generator=generator),
        "image_mask": torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]]).bool(),
        "image_frames": torch.tensor([[-1, -1], [-1, -1], [0, 1], [-1, -1]]),
        "input_features": torch.randn(4, 1, mels, frames, generator=generator),
        "sound_mask": torch.tensor([[1], [0], [0], [1]]).bool(),
    }


def training_microbatch(inputs: dict[str, torch.Tensor]) -> Microbatch:
    """`media_batch` as training sees it: one document a row, padded on the right, media listed once."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    rows, length = ids.shape
    tokens, documents, positions = torch.zeros_like(ids), torch.full_like(ids, -1), torch.zeros_like(ids)
    for row in range(rows):
        count = int(mask[row].sum())
        tokens[row, :count], documents[row, :count] = ids[row, mask[row]], 0
        positions[row, :count] = torch.arange(count)
    labels, loss_mask = torch.zeros_like(ids), torch.zeros(rows, length)
    labels[:, :-1] = tokens[:, 1:]
    loss_mask[:, :-1] = (documents[:, 1:] == 0).float()

    def slots(filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = (filled.flatten().cumsum(0) - 1).view(filled.shape)
        return numbers.masked_fill(~filled, -1), torch.zeros_like(numbers).masked_fill(~filled, -2)

    image_slots, image_documents = slots(inputs["image_mask"])
    sound_slots, sound_documents = slots(inputs["sound_mask"])
    images, sounds = inputs["pixel_values"][inputs["image_mask"]], inputs["input_features"][inputs["sound_mask"]]
    plan = MicrobatchPlan(
        num_rows=rows, row_length=length, num_images=len(images), num_sounds=len(sounds),
        image_slots=image_slots.shape[1], sound_slots=sound_slots.shape[1], one_document_per_row=False,
        max_document_length=length,
    )  # fmt: skip
    return Microbatch(
        plan=plan, document_ids_RT=documents, position_ids_RT=positions, loss_mask_RT=loss_mask,
        image_slots_RK=image_slots, image_slot_documents_RK=image_documents, sound_slots_RJ=sound_slots,
        sound_slot_documents_RJ=sound_documents, tokens_RT=tokens, labels_RT=labels, images_ICHW=images,
        image_frames_I=inputs["image_frames"][inputs["image_mask"]], sounds_AMF=sounds,
    )  # fmt: skip


def one_row(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row of `media_batch` alone: without padding, without empty slots."""
    length = int(batch["attention_mask"][row].sum())
    alone = {"input_ids": batch["input_ids"][row : row + 1, -length:]}
    if batch["image_mask"][row].any():
        filled = batch["image_mask"][row]
        alone["pixel_values"] = batch["pixel_values"][row, filled][None]
        alone["image_frames"] = batch["image_frames"][row, filled][None]
    if batch["sound_mask"][row].any():
        alone["input_features"] = batch["input_features"][row : row + 1]
    return alone


def draw(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    """A picture."""
    image = Image.new(mode, size, (200, 30, 30) if mode == "RGB" else (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((5, 5, 25, 20), fill=(20, 90, 200, 255)[: len(mode)])
    image.save(path)
    return path


def draw_animation(path: Path, frames: int = 5) -> Path:
    """An animated GIF of growing circles."""
    images = []
    for i in range(frames):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).ellipse((2, 2, 6 + 5 * i, 6 + 5 * i), fill=(50 * i, 40, 90))
        images.append(image)
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    return path


def sing(path: Path, rate: int = 16000, seconds: float = 0.4, pitch: float = 440.0) -> Path:
    """A sine wave."""
    samples = np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes((samples * 20000).astype("<i2").tobytes())
    return path
