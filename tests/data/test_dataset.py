"""Packing, collation and the loader: bounds, masks against a slow reference, resume and layout independence."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mm.config.schema import DatasetConfig
from megatron_mm.config.section import changed
from megatron_mm.data.build.text import build_text
from megatron_mm.data.reading.dataset import build_datasets
from megatron_mm.data.reading.loader import MicrobatchLoader, microbatch_indexes
from megatron_mm.data.reading.microbatch import ALWAYS_READ
from megatron_mm.data.reading.packing import Limits, pack
from megatron_mm.data.store.indexed import IndexedWriter
from megatron_mm.data.store.shards import Shard
from megatron_mm.media.errors import DataError
from megatron_mm.systems.synapse.section import SynapseConfig

OPTIONAL_FIELDS = SynapseConfig().inputs.fields
#: Always read, by this system.
ALWAYS = ALWAYS_READ - {"clip_slots_R", "masked_loss_mask_RT"}


@pytest.fixture
def text_prefix(tmp_path, tokenizer_path) -> str:
    """Text documents of 1 to about 400 tokens, with </s>."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": "red ball " * (1 + i * 7 % 60)}) + "\n" for i in range(90)))
    build_text([str(path)], str(tmp_path / "t"), tokenizer_path, append_eod=True, workers=0, progress=False)
    return str(tmp_path / "t_text_document")


def mixed(config, text_prefix):
    """The folder and the text shard, 3 to 1."""
    folder = config.data.datasets[0].path
    datasets = [DatasetConfig(path=folder, weight=3.0), DatasetConfig(path=text_prefix, weight=1.0)]
    return changed(config, {"data.datasets": datasets})


def same(a, b) -> bool:
    return a.plan == b.plan and a.sample_ids == b.sample_ids and all(
        (getattr(a, f) is None and getattr(b, f) is None) or torch.equal(getattr(a, f), getattr(b, f))
        for f in ALWAYS | OPTIONAL_FIELDS
    )


@pytest.mark.parametrize(
    ("seq_length", "max_images", "max_sounds"), [(128, 8, 2), (64, 3, 1), (40, 3, 1), (1000, 4, 50)]
)
def test_packing_keeps_every_document_once_within_bounds(folder, seq_length, max_images, max_sounds):
    shard = Shard(folder)
    limits = Limits(seq_length, max_images, max_sounds, frames_per_video=3)
    packing = pack(shard, range(5, 60), limits, key=[1])
    assert sorted(packing.pieces["document"].tolist()) == list(range(5, 60))
    lengths = np.minimum(shard.document_lengths(), seq_length)
    assert np.array_equal(packing.pieces["length"], lengths[packing.pieces["document"]])
    images = np.minimum(shard.column("num_images") + 3 * shard.column("num_videos"), max_images)
    for r in range(len(packing)):
        pieces = packing.pieces[packing.row_starts[r] : packing.row_starts[r + 1]]
        row = pieces["document"]
        assert row.size and pieces["length"].sum() <= seq_length
        assert images[row].sum() <= max_images and shard.column("num_audios")[row].sum() <= max_sounds
    report = packing.report
    assert report["padding"] == len(packing) * seq_length - packing.pieces["length"].sum()
    assert report["documents_truncated"] == (shard.document_lengths()[5:60] > seq_length).sum()
    again = pack(shard, range(5, 60), limits, key=[1])
    assert np.array_equal(again.pieces, packing.pieces) and np.array_equal(again.row_starts, packing.row_starts)
    assert not np.array_equal(pack(shard, range(5, 60), limits, key=[2]).pieces, packing.pieces)


def test_long_text_is_split_and_packs_tightly(tmp_path):
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(2, 120, 3000), [0, 1, 257, 1000]])
    writer = IndexedWriter(tmp_path / "x", np.int32)
    writer.add_documents(np.arange(sizes.sum()), sizes)
    writer.finalize()
    packing = pack(Shard(str(tmp_path / "x")), range(sizes.size), Limits(128, 0, 0, 1), key=[0])
    covered = Counter()
    for d, o, n in zip(packing.pieces["document"], packing.pieces["offset"], packing.pieces["length"]):
        assert n >= 2
        for t in range(o, o + n):
            covered[d, t] += 1
    # A lone last token (257 = 2 × 128 + 1) has no label: it is left out and counted.
    assert max(covered.values()) == 1 and len(covered) == sizes.sum() - 1 - 1
    assert packing.report["documents_split"] == 2 and packing.report["tokens_cut"] == 1
    assert packing.report["documents_too_short"] == 2
    assert packing.report["padding"] / (len(packing) * 128) < 0.05


def test_collation_against_a_slow_reference(config, folder, text_prefix):
    """Every field is rebuilt token by token from the shards, by the words of microbatch.py."""
    config = mixed(config, text_prefix)
    datasets = build_datasets(config)
    tokenizer = datasets.tokenizer
    media_ids = {tokenizer.image_id, tokenizer.audio_id, tokenizer.video_id, tokenizer.pad_id}
    shards = {"balls": Shard(folder), "t_text_document": Shard(text_prefix)}
    numbers = {s.document_id(d): d for s in (shards["balls"],) for d in range(len(s))}
    seen_media = 0
    for index in ([0, 1, 2, 3], [4, 5], [10], list(range(20, 28))):
        m = datasets.train.microbatch(index, OPTIONAL_FIELDS)
        ids = iter(m.sample_ids)
        images = sounds = 0
        for r in range(len(index)):
            documents = sorted(set(m.document_ids_RT[r].tolist()) - {-1})
            assert documents == list(range(len(documents)))
            for d in documents:
                name, _, rest = next(ids).partition("/")
                rest, _, offset = rest.partition("@")
                number = numbers[rest] if name == "balls" else int(rest)
                offset = int(offset or 0)
                where = torch.nonzero(m.document_ids_RT[r] == d)[:, 0].tolist()
                assert where == list(range(where[0], where[-1] + 1))
                tokens = shards[name].text.document(number).tolist()[offset : offset + len(where)]
                prompt = shards[name].prompt_length(number)
                assert m.tokens_RT[r, where].tolist() == tokens
                assert m.position_ids_RT[r, where].tolist() == list(range(len(tokens)))
                assert m.labels_RT[r, where].tolist() == [*tokens[1:], 0]
                counts = [offset + t >= prompt and token not in media_ids for t, token in enumerate(tokens)]
                assert m.loss_mask_RT[r, where].tolist() == [*map(float, counts[1:]), 0.0]
                stills, videos = (len(shards[name].records(k, number)) for k in ("images", "videos"))
                mine = m.image_slots_RK[r][m.image_slot_documents_RK[r] == d].tolist()
                assert mine == list(range(images, images + stills + 3 * videos))
                assert m.image_frames_I[mine].tolist() == [-1] * stills + [0, 1, 2] * videos
                images += len(mine)
                mine = m.sound_slots_RJ[r][m.sound_slot_documents_RJ[r] == d].tolist()
                assert mine == list(range(sounds, sounds + len(shards[name].records("audios", number))))
                sounds += len(mine)
            padding = m.document_ids_RT[r] == -1
            assert (m.tokens_RT[r][padding] == 0).all() and m.loss_mask_RT[r][padding].sum() == 0
            assert ((m.image_slots_RK[r] == -1) == (m.image_slot_documents_RK[r] == -2)).all()
        assert next(ids, None) is None
        plan = m.plan
        assert (plan.num_images, plan.num_sounds) == (max(1, images), max(1, sounds))
        assert m.images_ICHW.shape == (plan.num_images, 3, 28, 28) and m.image_frames_I.shape == (plan.num_images,)
        assert m.sounds_AMF.shape == (plan.num_sounds, 80, 50)
        assert m.image_slots_RK.shape == (len(index), plan.image_slots)
        assert m.sound_slots_RJ.shape == (len(index), plan.sound_slots)
        assert plan.one_document_per_row == (int(m.document_ids_RT.max()) == 0)
        assert plan.max_document_length == int(m.position_ids_RT.max()) + 1
        seen_media += images + sounds
    assert seen_media > 20


def test_pixels_and_sounds_are_the_records(config, folder):
    """Validation: the centre crop of the stored bytes, and the spectrogram of the stored sound."""
    from megatron_mm.media.decoding import decode_image, decode_sound, resample
    from megatron_mm.media.transforms import center_crop_box, image_tensor, log_mel_spectrogram

    valid = build_datasets(config).valid
    m = valid.microbatch([0, 1], OPTIONAL_FIELDS)
    shard = Shard(folder)
    images, sounds = [], []
    numbers = {shard.document_id(d): d for d in range(len(shard))}
    for name in m.sample_ids:
        d = numbers[name.split("/")[1]]
        for r in shard.records("images", d):
            image = decode_image(shard.medium("images", r))
            images.append(
                image_tensor(image, 28, center_crop_box(*image.size), config.data.image_mean, config.data.image_std)
            )
        images += [None] * (3 * len(shard.records("videos", d)))
        for r in shard.records("audios", d):
            waveform = resample(*decode_sound(shard.medium("audios", r)), 16000)
            sounds.append(log_mel_spectrogram(waveform, 16000, 0.5, 80))
    assert torch.equal(m.sounds_AMF, torch.stack(sounds))
    assert all(image is None or torch.equal(image, got) for image, got in zip(images, m.images_ICHW, strict=True))
    assert sum(image is not None for image in images) > 3
    assert same(m, build_datasets(config).valid.microbatch([0, 1], OPTIONAL_FIELDS))
    config = changed(config, {"training.seed": 5})
    assert same(m, build_datasets(config).valid.microbatch([0, 1], OPTIONAL_FIELDS)), "validation ignores the seed"


def test_crops_change_with_epoch_and_seed_only(config):
    train = build_datasets(config).train
    rows = train.num_rows
    first = train.microbatch(range(rows), OPTIONAL_FIELDS)
    second = train.microbatch(range(rows, 2 * rows), OPTIONAL_FIELDS)
    assert Counter(first.sample_ids) == Counter(second.sample_ids), "each epoch visits every document once"
    assert max(Counter(first.sample_ids).values()) == 1 and first.sample_ids != second.sample_ids
    assert not torch.isin(first.images_ICHW.sum((1, 2, 3)), second.images_ICHW.sum((1, 2, 3))).all()
    assert same(first, build_datasets(config).train.microbatch(range(rows), OPTIONAL_FIELDS))
    config = changed(config, {"data.random_crop": False})
    plain = build_datasets(config).train
    sums = [set(plain.microbatch(r, OPTIONAL_FIELDS).images_ICHW.sum((1, 2, 3)).tolist())
            for r in (range(rows), range(rows, 2 * rows))]  # fmt: skip
    assert sums[0] == sums[1], "without random crops epochs differ in order only"


def test_fields_do_not_change_the_rest(config, text_prefix):
    train = build_datasets(mixed(config, text_prefix)).train
    full = train.microbatch([3, 4, 5], OPTIONAL_FIELDS)
    for fields in (set(), {"tokens_RT"}, {"images_ICHW"}, {"sounds_AMF", "labels_RT", "loss_mask_RT"}):
        part = train.microbatch([3, 4, 5], fields)
        assert part.plan == full.plan and part.sample_ids == full.sample_ids
        for name in ALWAYS | OPTIONAL_FIELDS:
            if name in ALWAYS | fields:
                assert torch.equal(getattr(part, name), getattr(full, name)), name
            else:
                assert getattr(part, name) is None
    with pytest.raises(ValueError, match=r"unknown fields \['pixels'\]"):
        train.microbatch([0], {"pixels"})


def test_text_only_and_missing_modalities(config, text_prefix, folder):
    config = changed(config, {"data.datasets": [DatasetConfig(path=text_prefix)]})
    m = build_datasets(config).train.microbatch([0, 1], OPTIONAL_FIELDS)
    assert m.plan.num_images == m.plan.num_sounds == m.plan.image_slots == m.plan.sound_slots == 1
    assert m.image_slots_RK.tolist() == [[-1], [-1]] and m.image_slot_documents_RK.tolist() == [[-2], [-2]]
    assert m.images_ICHW.abs().sum() == 0 and m.sounds_AMF.abs().sum() == 0 and m.image_frames_I.tolist() == [-1]
    assert m.loss_mask_RT.sum() > 50
    config = changed(config, {"data.datasets": [DatasetConfig(path=folder)], "data.max_sounds_per_sample": 0})
    m = build_datasets(config).train.microbatch(range(8), OPTIONAL_FIELDS)
    assert m.plan.num_sounds == 1 and m.plan.num_images > 5


def test_splits_are_disjoint_and_complete(config):
    config = changed(config, {"data.split": "70,20,10"})
    datasets = build_datasets(config)
    names = []
    for part, size in ((datasets.train, 42), (datasets.valid, 12), (datasets.test, 6)):
        names.append({i for row in part.pieces(range(part.num_rows)) for i in map(part.sample_id, row)})
        assert len(names[-1]) == size
    assert len(set.union(*names)) == 60
    config = changed(config, {"data.split": "100"})
    datasets = build_datasets(config)
    assert datasets.valid is None and datasets.test is None


def test_index_arithmetic():
    """Ranks and microbatches of an iteration cover its samples once; a pool is consecutive."""
    for mbs, dp, gbs in ((1, 1, 4), (2, 3, 12), (4, 2, 8)):
        per_iteration = gbs // (mbs * dp)
        for iteration in range(3):
            numbers = range(iteration * per_iteration, (iteration + 1) * per_iteration)
            pools = [[i for d in range(dp) for i in microbatch_indexes(n, 100, mbs, d, dp, gbs)] for n in numbers]
            assert list(chain.from_iterable(pools)) == list(range(100 + iteration * gbs, 100 + (iteration + 1) * gbs))


def read(dataset, consumed: int, mbs: int, dp: int, gbs: int, iterations: int, workers: int = 0, **options):
    """Sample ids of iterations in global order, over all ranks."""
    loaders = [
        MicrobatchLoader(dataset, consumed, mbs, d, dp, gbs, {"tokens_RT"}, workers, **options) for d in range(dp)
    ]
    out = []
    for _ in range(iterations * loaders[0].num_microbatches):
        for loader in loaders:
            out += next(loader).sample_ids
    for loader in loaders:
        loader.close()
    return out


def test_resume_in_any_layout_continues_the_same_sequence(config, text_prefix):
    config = mixed(config, text_prefix)
    train = build_datasets(config).train
    straight = read(train, 0, 1, 1, 8, 9)
    resumed = read(train, 0, 2, 2, 8, 3) + read(train, 24, 1, 4, 8, 2, workers=1)
    again = build_datasets(config).train
    resumed += read(again, 40, 4, 2, 8, 3, workers=2) + read(again, 64, 8, 1, 8, 1)
    assert resumed == straight
    share = sum(len(row) > 0 and row[0].source == 0 for row in train.pieces(range(72)))
    assert share == 54, "3 of 4 rows come from the first dataset"


@pytest.mark.slow
def test_workers_read_the_same(config):
    train = build_datasets(config).train
    for options in ({"num_workers": 2}, {"num_workers": 1, "start_method": "spawn"}):
        inline = MicrobatchLoader(train, 3, 2, 0, 1, 4, OPTIONAL_FIELDS)
        ahead = MicrobatchLoader(train, 3, 2, 0, 1, 4, OPTIONAL_FIELDS, **options)
        for _ in range(5):
            assert same(next(inline), next(ahead))
        ahead.close()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("file", "field"), [("images", "images_ICHW"), ("sounds", "sounds_AMF"), ("videos", "images_ICHW")]
)
def test_corrupt_record_stops_with_its_name(tmp_path, config, folder, workers, file, field):
    copy = tmp_path / "bad"
    shutil.copytree(folder, copy)
    data = bytearray((copy / f"{file}.bin").read_bytes())
    (copy / f"{file}.bin").write_bytes(bytes(len(data)))
    config = changed(config, {"data.datasets": [DatasetConfig(path=str(copy))]})
    train = build_datasets(config).train
    loader = MicrobatchLoader(train, 0, train.num_rows, 0, 1, train.num_rows, {field}, workers)
    with pytest.raises(DataError, match=rf"bad/(images|{file})\.bin, record \d+ \(sample [\w-]+\): ") as error:
        next(loader)
    assert "Traceback" not in str(error.value)
    loader.close()
    MicrobatchLoader(train, 0, 1, 0, 1, 1, {"tokens_RT"}).__next__()  # a stage without images does not notice


def test_configuration_errors_name_the_field(config, tmp_path, folder):
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_datasets(config)

    config = changed(config, {"data.frames_per_video": 9})
    refused(r"data\.frames_per_video: 9, but data\.max_images_per_sample is 8")
    config = changed(config, {"data.frames_per_video": 3, "data.split": "0,1"})
    refused(r"leaves no training documents of .*balls")
    config = changed(config, {"data.split": "1", "data.tokenizer": None})
    refused(r"data\.tokenizer: not set")
    config = changed(config, {"data.datasets": []})
    refused(r"data\.datasets: empty")
    with pytest.raises(ValueError, match="must be a multiple of micro_batch_size"):
        MicrobatchLoader(None, 0, 3, 0, 2, 8, set())


def test_same_folder_names_are_told_apart(config, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x" / Path(folder).name)
    config = changed(
        config,
        {
            "data.datasets": [DatasetConfig(path=folder), DatasetConfig(path=str(tmp_path / "x" / Path(folder).name))],
        },
    )
    names = [source.name for source in build_datasets(config).train.sources]
    assert len(set(names)) == 2 and names[1] == "x/balls"
