"""Rows of one document, from shards: truncation, one medium of each kind, clips, waveforms, masked text, noise."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageDraw

from megatron_mm.config.load import config_type
from megatron_mm.config.schema import DatasetConfig
from megatron_mm.config.section import changed
from megatron_mm.config.systems import section_of
from megatron_mm.data.build.multimodal import build_multimodal
from megatron_mm.data.build.text import build_text
from megatron_mm.data.build.train_tokenizer import train_tokenizer
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.loader import MicrobatchLoader
from megatron_mm.data.reading.microbatch import field_shapes
from megatron_mm.data.reading.order import TaskSchedule
from megatron_mm.data.store.indexed import IndexedWriter
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.decoding import decode_image, decode_sound, decode_video, resample
from megatron_mm.media.errors import DataError
from megatron_mm.media.transforms import center_crop_box, image_tensor, waveform

LENGTH, FRAMES, SECONDS = 40, 4, 0.25


def picture(i: int) -> Image.Image:
    """Red on its left half, blue on its right, a white disc that tells pictures apart."""
    image = Image.new("RGB", (48, 40), (200, 30, 20))
    draw = ImageDraw.Draw(image)
    draw.rectangle((24, 0, 48, 40), fill=(20, 40, 200))
    draw.ellipse((4, 2, 10 + i % 7, 12), fill="white")
    return image


def movie(frames: int) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            grey = np.full((32, 32, 3), 40 + 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def write(folder: Path) -> Path:
    """Ten kinds of documents, six of each."""
    lines = []
    for i in range(60):
        kind, record = i % 10, {"id": f"s{i}", "text": f"number {i} is a coloured thing", "prompt": ""}
        if kind in (0, 1, 3, 6, 9):
            names = [f"{i}-{k}.png" for k in range(2 if kind == 1 else 1)]
            for k, name in enumerate(names):
                picture(i + k).save(folder / name)
            record |= {"images": names, "prompt": "<image>" * len(names) + "what is it?"}
        if kind in (2, 3, 7):
            name = f"{i}.{'gif' if kind == 7 else 'webp'}"
            frames = [Image.new("RGB", (32, 32), (40 * f, 0, 200 - 30 * f)) for f in range(6)]
            frames[0].save(folder / name, save_all=True, append_images=frames[1:])
            record |= {"videos": [name], "prompt": record["prompt"] + "<video>"}
        if kind == 4:
            (folder / f"{i}.mp4").write_bytes(movie(2))
            record |= {"videos": [f"{i}.mp4"], "text": "<video> two frames"}
        if kind in (5, 6, 7):
            names = [f"{i}-{k}.wav" for k in range(2 if kind == 7 else 1)]
            for k, name in enumerate(names):
                tone = 0.4 * np.sin(np.arange(3000 + 200 * i) * 0.05 * (k + 1 + i % 3))
                stereo = np.stack([tone, np.zeros_like(tone)], 1)
                soundfile.write(folder / name, stereo if kind == 6 else tone, 44100 if kind == 6 else 8000)
            record |= {"audios": names, "text": "<audio>" * len(names) + record["text"]}
        if kind == 9:
            record["text"] = "a very long text goes on and on, " * 8
        lines.append(json.dumps(record))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The samples, their tokenizer and the folder built from them."""
    root = tmp_path_factory.mktemp("single")
    samples = write(root)
    train_tokenizer([str(samples)], str(root / "t.model"), 330, json_keys=["text", "prompt"], num_threads=1)
    build_multimodal([str(samples)], str(root / "shards"), str(root / "t.model"), workers=0, progress=False)
    return root


def build(folder: Path, tokenizer: Path, check: bool = True) -> list[DatasetConfig]:
    """The dataset of a folder's s.jsonl."""
    args = [str(folder / "s.jsonl")], str(folder / "d"), str(tokenizer)
    build_multimodal(*args, workers=0, progress=False, check=check)
    return [DatasetConfig(path=str(folder / "d"))]


def make(corpus: Path, system: str = "avt"):
    """A recipe of the system that reads the corpus."""
    config = changed(
        config_type(section_of(system))(),
        {
            "data.datasets": [DatasetConfig(path=str(corpus / "shards"))],
            "data.tokenizer": str(corpus / "t.model"),
            "data.split": "80,20",
            "data.seq_length": LENGTH,
            "data.frames_per_video": FRAMES,
            "model.vision.image_size": 32,
        },
    )
    if system == "avt":
        config = changed(config, {"model.audio.seconds": SECONDS})
    return config


def fields(config) -> frozenset[str]:
    return config.model.inputs.fields


@pytest.mark.parametrize("split", ["train", "valid"])
def test_rows_against_a_slow_reference(corpus, split):
    """Every row is rebuilt from the shards; validation's pixels and samples are those of the records."""
    config = make(corpus)
    datasets = build_datasets(config)
    rows, shard, tokenizer = getattr(datasets, split), Shard(str(corpus / "shards")), datasets.tokenizer
    batch = rows.microbatch(range(rows.num_rows), fields(config), task="generation")
    assert rows.num_rows == (48 if split == "train" else 12) and batch.plan.task == "generation"
    for name, (shape, dtype) in field_shapes(config.model.inputs, batch.plan).items():
        assert (tuple(getattr(batch, name).shape), getattr(batch, name).dtype) == (shape, dtype), name
    placeholders = {tokenizer.image_id, tokenizer.audio_id, tokenizer.video_id, tokenizer.pad_id}
    boundary = tokenizer.processor.piece_to_id("\u2581")  # stands before every placeholder
    special = placeholders | {tokenizer.bos_id, tokenizer.eos_id, boundary}
    data, images, clips, sounds = config.data, 0, 0, 0
    for r, name in enumerate(batch.sample_ids):
        number = int(name.split("/s")[1])
        whole = shard.text.document(number).tolist()
        length = min(LENGTH, len(whole))
        tokens = [*whole[: length - 1], tokenizer.eos_id]
        assert batch.tokens_RT[r].tolist() == tokens + [0] * (LENGTH - length)
        assert batch.document_ids_RT[r].tolist() == [0] * length + [-1] * (LENGTH - length)
        assert batch.position_ids_RT[r].tolist() == [*range(length)] + [0] * (LENGTH - length)
        assert batch.labels_RT[r].tolist() == [*tokens[1:], 0] + [0] * (LENGTH - length)
        prompt = shard.prompt_length(number)
        learned = [t >= prompt and token not in placeholders for t, token in enumerate(tokens)]
        learned[-1] &= len(whole) <= LENGTH  # a truncated text does not end here
        assert batch.loss_mask_RT[r, : length - 1].bool().tolist() == learned[1:]
        assert batch.loss_mask_RT[r, length - 1 :].sum() == 0

        hidden = batch.masked_loss_mask_RT[r].bool()
        maskable = [t for t, token in enumerate(tokens) if token not in special]
        assert hidden.sum() == max(1, round(0.15 * len(maskable) + 1e-9))
        assert set(hidden.nonzero()[:, 0].tolist()) <= set(maskable)
        assert torch.equal(batch.masked_tokens_RT[r][~hidden], batch.tokens_RT[r][~hidden])
        assert torch.equal(batch.masked_labels_RT[r], batch.tokens_RT[r] * hidden)

        stills, videos, audios = (shard.records(kind, number) for kind in ("images", "videos", "audios"))
        assert batch.image_slots_RK[r].tolist() == ([images] if len(stills) else [-1])
        assert batch.image_slot_documents_RK[r].tolist() == ([0] if len(stills) else [-2])
        has_clip = bool(len(videos)) and not len(stills)
        assert int(batch.clip_slots_R[r]) == (clips if has_clip else -1)
        assert batch.sound_slots_RJ[r].tolist() == ([sounds] if len(audios) else [-1])
        if split == "valid" and len(stills):
            still = decode_image(shard.medium("images", stills[0]))
            expected = image_tensor(still, 32, center_crop_box(*still.size), data.image_mean, data.image_std)
            assert torch.equal(batch.images_ICHW[images], expected)
        if split == "valid" and has_clip:
            frames = decode_video(shard.medium("videos", videos[0]), FRAMES)
            box = center_crop_box(*frames[0].size)
            expected = [image_tensor(frame, 32, box, data.image_mean, data.image_std) for frame in frames]
            assert torch.equal(batch.clips_VFCHW[clips], torch.stack(expected))
        if len(audios):
            samples = resample(*decode_sound(shard.medium("audios", audios[0])), 16000)
            assert torch.equal(batch.waveforms_AN[sounds], waveform(samples, 4000))
        images, clips, sounds = images + bool(len(stills)), clips + has_clip, sounds + bool(len(audios))
    assert (batch.plan.num_images, batch.plan.num_clips, batch.plan.num_sounds) == (images, clips, sounds)
    assert min(images, clips, sounds) >= 3 and batch.plan.clip_frames == FRAMES


def test_what_has_no_place_is_counted_and_reported(corpus):
    config = changed(make(corpus), {"data.split": "1"})
    report = build_datasets(config).train.report()["shards"]
    long = np.maximum(Shard(str(corpus / "shards")).document_lengths() - LENGTH, 0)
    assert report["documents"] == report["rows"] == 60
    assert (report["documents_truncated"], report["tokens_cut"]) == ((long > 0).sum(), long.sum())
    assert report["documents_truncated"] >= 6
    assert report["media_dropped"] == 18, "6 second images, 6 videos beside an image, 6 second sounds"
    line = build_datasets(config).report_lines()[0]
    assert f"; {report['documents_truncated']} longer than a row, truncated by {long.sum():,} tokens; " in line
    assert "; 18 images, frames or sounds without a place in a row of this system, not read" in line
    report = build_datasets(make(corpus, "vlm")).train.report()["shards"]
    valid = build_datasets(make(corpus, "vlm")).valid.report()["shards"]
    assert report["media_dropped"] + valid["media_dropped"] == 6 + 24 + 24, "videos and sounds are not read at all"


def test_a_short_video_repeats_its_frames(corpus):
    """Two frames for four: each twice, as `evenly_spaced` says."""
    config = make(corpus)
    train = build_datasets(config).train
    batch = train.microbatch(range(train.num_rows), fields(config))
    short = [r for r, name in enumerate(batch.sample_ids) if int(name.split("/s")[1]) % 10 == 4]
    assert short
    for r in short:
        clip = batch.clips_VFCHW[batch.clip_slots_R[r]]
        assert torch.equal(clip[0], clip[1]) and torch.equal(clip[2], clip[3]) and not torch.equal(clip[1], clip[2])


def test_text_shards_have_a_document_a_row(corpus, tmp_path):
    """Without an end token a truncated text just stops; with one, it ends with it."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "thing " * (5 + 9 * i)}) + "\n" for i in range(12)))
    for eod in (False, True):
        prefix, tokenizer = str(tmp_path / f"t{eod}"), str(corpus / "t.model")
        build_text([str(tmp_path / "t.jsonl")], prefix, tokenizer, append_eod=eod, workers=0, progress=False)
        config = make(corpus, "perceiver_fusion")
        config = changed(config, {"data.datasets": [DatasetConfig(path=prefix + "_text_document")], "data.split": "1"})
        train = build_datasets(config).train
        batch = train.microbatch(range(12), fields(config))
        assert train.num_rows == 12 and batch.plan.one_document_per_row
        lengths = (batch.document_ids_RT >= 0).sum(1)
        last = batch.tokens_RT.gather(1, lengths[:, None] - 1)
        assert ((last == 3) == eod).all() and (lengths == LENGTH).sum() > 5
        assert batch.loss_mask_RT.sum(1).tolist() == (lengths - 1 - (lengths == LENGTH).long() * eod).tolist()
        assert (batch.masked_loss_mask_RT.sum(1) > 0).all() and batch.images_ICHW.abs().sum() == 0


def test_epochs_draw_masks_noise_and_views_anew_but_validation_does_not(corpus):
    config = make(corpus, "dual_encoder")
    config = changed(config, {"model.mae_weight": 1.0, "data.horizontal_flip": 0.5, "data.color_jitter": 0.4})
    masked = make(corpus)

    def of(dataset, config, epoch):
        """Fields by document."""
        rows = dataset.num_rows
        batch = dataset.microbatch(range(epoch * rows, (epoch + 1) * rows), fields(config))
        found = {}
        for r, name in enumerate(batch.sample_ids):
            image = int(batch.image_slots_RK[r, 0])
            found[name] = [batch.masked_tokens_RT[r]] if batch.masked_tokens_RT is not None else []
            if image >= 0 and batch.patch_noise_IP is not None:
                found[name] += [batch.images_ICHW[image], batch.patch_noise_IP[image]]
        return found

    def differing(a, b) -> float:
        pairs = [torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True)]
        return 1 - np.mean(pairs)

    for recipe in (config, masked):
        datasets, again = build_datasets(recipe), build_datasets(recipe)
        assert differing(of(datasets.train, recipe, 0), of(again.train, recipe, 0)) == 0
        assert differing(of(datasets.train, recipe, 0), of(datasets.train, recipe, 1)) > 0.7
        assert differing(of(datasets.valid, recipe, 0), of(datasets.valid, recipe, 1)) == 0
        other = build_datasets(changed(recipe, {"training.seed": recipe.training.seed + 1}))
        assert differing(of(datasets.train, recipe, 0), of(other.train, recipe, 0)) > 0.7
        assert differing(of(datasets.valid, recipe, 0), of(other.valid, recipe, 0)) == 0


def test_frames_of_a_clip_are_seen_alike(corpus, tmp_path):
    """A clip of one picture repeated, under crop, flip and jitter: its frames stay equal."""
    frames = [picture(3)] * 4
    for i in range(4):
        frames[0].save(tmp_path / f"{i}.gif", save_all=True, append_images=[f.copy() for f in frames[1:]])
    lines = [json.dumps({"text": f"<video> thing {i}", "videos": [f"{i}.gif"]}) for i in range(4)]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    config = changed(
        make(corpus),
        {
            "data.datasets": build(tmp_path, corpus / "t.model"),
            "data.split": "1",
            "data.horizontal_flip": 0.5,
            "data.color_jitter": 0.4,
        },
    )
    clips = build_datasets(config).train.microbatch(range(16), {"clips_VFCHW"}).clips_VFCHW
    assert all(torch.equal(clip[0], frame) for clip in clips for frame in clip)
    assert len({float(clip.sum()) for clip in clips}) == 16
    red_left = clips[:, 0, 0, 16:, :8].mean((1, 2)) > clips[:, 0, 0, 16:, -8:].mean((1, 2))
    assert 2 < red_left.sum() < 14, "some are mirrored, some are not"


def test_a_text_with_a_side_is_never_mirrored(corpus, tmp_path):
    """The picture is red on its left; the text stands in prompt or answer."""
    records = []
    for i in range(24):
        picture(i).save(tmp_path / f"{i}.png")
        side = {"text": "a red part on the left"} if i % 2 else {"text": "red", "prompt": "what is Left of blue?"}
        prompt = "<image>" + side.pop("prompt", "")
        records.append({"id": f"p{i}", "images": [f"{i}.png"], "prompt": prompt, **side})
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, records)))
    train_tokenizer([str(tmp_path / "s.jsonl")], str(tmp_path / "t.model"), 300, json_keys=["text", "prompt"])
    config = changed(
        make(corpus, "vlm"),
        {
            "data.datasets": build(tmp_path, tmp_path / "t.model"),
            "data.split": "1",
            "data.tokenizer": str(tmp_path / "t.model"),
            "data.horizontal_flip": 1.0,
            "data.random_crop": False,
        },
    )
    images = build_datasets(config).train.microbatch(range(24), {"images_ICHW"}).images_ICHW
    assert (images[:, 0, 16:, :8].mean((1, 2)) > images[:, 0, 16:, -8:].mean((1, 2))).all()


def test_tasks_follow_the_pool_in_every_layout(corpus):
    """A pool of 4 samples: ranks agree, other divisions of the pool see the same, and a resumed run goes on."""
    config = make(corpus)
    train = build_datasets(config).train
    schedule = TaskSchedule(config.model.inputs.tasks, config.training.seed)

    def tasks(consumed: int, micro_batch_size: int, ranks: int, iterations: int, workers: int = 0) -> list[str]:
        loaders = [
            MicrobatchLoader(train, consumed, micro_batch_size, rank, ranks, 16, set(), workers, tasks=schedule)
            for rank in range(ranks)
        ]
        found = [[next(loader).plan.task for loader in loaders] for _ in range(4 * iterations)]
        for loader in loaders:
            loader.close()
        assert all(len(set(pool)) == 1 for pool in found), "every rank learns the same"
        return [pool[0] for pool in found]

    straight = tasks(0, 4, 1, 6)
    assert straight.count("masked_lm") == straight.count("generation") == 12
    assert tasks(0, 2, 2, 2) + tasks(32, 1, 4, 3) + tasks(80, 4, 1, 1, workers=1) == straight
    assert MicrobatchLoader(train, 0, 1, 0, 1, 4, set()).__next__().plan.task == ""


@pytest.mark.parametrize("kind", ["audios", "videos"])
def test_media_without_content_are_refused_by_name(corpus, tmp_path, kind):
    """When a dataset is built, and when a damaged one is read."""
    empty, file, field = {
        "audios": (io.BytesIO(), "e.wav", "waveforms_AN"),
        "videos": (io.BytesIO(b"GIF89a nothing"), "e.gif", "clips_VFCHW"),
    }[kind]
    if kind == "audios":
        soundfile.write(empty, np.zeros(0), 16000, format="WAV")
    (tmp_path / file).write_bytes(empty.getvalue())
    line = {"text": ("<audio>" if kind == "audios" else "<video>") + " thing", kind: [file]}
    (tmp_path / "s.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=rf"s\.jsonl, line 1: .*{file}: "):
        build(tmp_path, corpus / "t.model")
    config = make(corpus)
    config = changed(config, {"data.datasets": build(tmp_path, corpus / "t.model", check=False), "data.split": "1"})
    with pytest.raises(DataError, match=r"d/(sounds|videos)\.bin, record 0 \(sample 0\): "):
        build_datasets(config).train.microbatch([0], {field})


def test_a_sound_of_which_resampling_leaves_nothing_is_refused_by_name(corpus, tmp_path):
    """The builder knows no rate; the reader does."""
    soundfile.write(tmp_path / "e.wav", np.ones(1), 48000)
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "<audio> thing", "audios": ["e.wav"]}))
    config = changed(make(corpus), {"data.datasets": build(tmp_path, corpus / "t.model"), "data.split": "1"})
    message = r"d/sounds\.bin, record 0 \(sample 0\): .* 1 samples at 48000 Hz are none at 16000 Hz"
    with pytest.raises(DataError, match=message):
        build_datasets(config).train.microbatch([0], {"waveforms_AN"})


def test_tokens_beyond_the_vocabulary_are_refused_when_read(corpus, tmp_path):
    """No tokenizer, no manifest: the document is named before the embedding sees it."""
    writer = IndexedWriter(tmp_path / "x", np.int32)
    writer.add_documents(np.array([5, 6, 7, 8, 9, 1000, 11]), np.array([4, 3]))
    writer.finalize()
    config = changed(
        make(corpus, "vlm"),
        {
            "data.datasets": [DatasetConfig(path=str(tmp_path / "x"))],
            "data.split": "1",
            "data.tokenizer": None,
            "model.decoder.vocab_size": 1000,
        },
    )
    with pytest.raises(DataError, match=r"x, document 1 \(1\): token ids from 9 to 1000; the vocabulary has 1000"):
        build_datasets(config).train.microbatch([0, 1], {"tokens_RT"})
    config = changed(config, {"model.decoder.vocab_size": 1001})
    assert int(build_datasets(config).train.microbatch([0, 1], {"tokens_RT"}).tokens_RT.max()) == 1000


def test_configuration_errors_name_the_field(corpus):
    def refused(message: str, system: str = "avt", **data) -> None:
        config = changed(make(corpus, system), {f"data.{name}": value for name, value in data.items()})
        with pytest.raises(ValueError, match=message):
            build_datasets(config)

    refused(r"data\.tokenizer is not set; masked language modelling", tokenizer=None)
    refused(r"data\.frames_per_video is 0; it must be at least 1", frames_per_video=0)
    with pytest.raises(ValueError, match=r"unknown fields \['sounds_AMF'\]; samples of this system have .*waveforms"):
        build_datasets(make(corpus)).train.microbatch([0], {"sounds_AMF"})
