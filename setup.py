"""Package metadata. Each requirement says why it is there.

These are bounds: `tests/run.sh --lowest` tries the lowest releases (locks/lowest.txt), `--newest` the newest. The
lowest of wandb and of the extra `gpu` were not tried. What this repository's own scripts install are the exact releases
of locks/, which `tools/update_locks.sh` renews.
"""

from setuptools import find_packages, setup

PARQUET = ["pyarrow>=17.0"]  # Parquet and Hugging Face datasets as input of the builders
SENTENCES = ["nltk>=3.9.1"]  # --split-sentences
EVALUATION = ["pycocoevalcap>=1.2"]  # CIDEr
PLOT = ["matplotlib>=3.9"]  # loss curves
EMOJI = ["resvg-py>=0.1.6"]  # emoji drawn as SVG

setup(
    name="megatron_mm",
    version="0.1.0",
    description="Pretraining of multimodal models on megatron-core, from a laptop to a cluster",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_mm", "megatron_mm.*"]),
    package_data={"megatron_mm": ["recipes/*.yaml", "data/view/*.html"]},
    install_requires=[
        # Tensors, autograd, collectives. Below 2.13 only parts were tried: the tests of the dry run in 2.10.0, those of
        # models and pipeline in 2.9.1, before the package's folders were moved.
        "torch>=2.9",
        # Parallel groups and layers, schedules, DDP, optimizer, places of weights, shards. The releases that
        # platform/megatron_versions.py knows; those after 0.16 need Python 3.12, so that an older one gets 0.16.
        "megatron-core>=0.16.1,<0.20,!=0.17.*,!=0.18.*",
        "psutil>=6.0",  # dist_checkpointing imports it without declaring it; memory of hosts; ending child processes
        "xxhash>=3.5",  # checksums of checkpoints, at 10 GiB/s, eight times zlib's CRC-32
        "numpy>=2.0",  # shards, spectrogram filters, sample order; from 2.0 it counts bits
        "pydantic>=2.7",  # typed recipes: errors that name the field
        "tyro>=1.0.9",  # command lines from the typed tree; before, an error of pydantic ended in a traceback
        "pyyaml>=6.0.1",  # recipes
        "sentencepiece>=0.2.1",  # tokenizers, in training and in exported models
        "orjson>=3.10",  # JSON lines of texts in half of the time of Python's reader
        "numba>=0.60",  # the text builder's encoder, compiled (data/tokens/word_kernels.py)
        "safetensors>=0.4.5",  # exported weights, and reading Hugging Face checkpoints tensor by tensor
        "transformers>=5.0,<6",  # configuration, tokenizer and generation of exported models
        "pillow>=11.0",  # image decoding
        "simplejpeg>=1.8",  # JPEG to pixels in two thirds of Pillow's time, the same pixels
        "av>=13.0",  # video decoding
        "soundfile>=0.12.1",  # sound decoding (wav, flac, ogg, mp3)
        "soxr>=0.5",  # resampling
        "tqdm>=4.66",  # progress bars
        "fsspec>=2024.6",  # datasets in object stores; s3fs, gcsfs and others are the user's to choose
        "backports.zstd>=1.0; python_version < '3.14'",  # .zst input; unlike zstandard's reader it notices a cut file
        "tensorboard>=2.18",  # event files
        "jinja2>=3.1.3",  # the page of tools/inspect_dataset.py, with everything escaped; torch needs it too
    ],
    extras_require={
        # Layers and attention on CUDA, as megatron-core 0.16 asks for them. Nobody ran them yet but for their Python
        # layers, in the releases of locks/gpu-stack-3.X.txt.
        "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7.4"],
        "parquet": PARQUET,
        "sentences": SENTENCES,
        "evaluation": EVALUATION,
        "plot": PLOT,
        "wandb": ["wandb>=0.18"],  # experiment tracking
        "quickstart": [*EMOJI, *PLOT, *EVALUATION],
        "test": [
            *[*PARQUET, *SENTENCES, *EVALUATION, *PLOT, *EMOJI],
            "pytest>=8.0",
            "pytest-xdist>=3.8",  # two files at a time
            "ruff>=0.6",  # style
            "import-linter>=2.15",  # the direction of imports between the package's folders
            "scipy>=1.13",  # statistics of sample order and of masks
            *["accelerate>=1.3", "peft>=0.18"],  # call exported models as users do who train them on
            "selenium>=4.20",  # looks at the page of tools/inspect_dataset.py in Chromium
        ],
    },
)
