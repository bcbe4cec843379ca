"""Package metadata. Each requirement says why it is there."""

from setuptools import find_packages, setup

setup(
    name="megatron_mm",
    version="0.1.0",
    description="Pretraining of multimodal models on megatron-core, from a laptop to a cluster",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_mm", "megatron_mm.*"]),
    package_data={"megatron_mm": ["recipes/*.yaml", "data/*.html"]},
    install_requires=[
        "torch>=2.6",  # tensors, autograd, collectives
        # Parallel groups and layers, schedules, DDP, optimizer, checkpoints, shards. The releases that
        # platform/megatron_versions.py knows; those after 0.16 need Python 3.12, so that an older one gets 0.16.
        "megatron-core>=0.16.1,<0.20,!=0.17.*,!=0.18.*",
        "psutil",  # dist_checkpointing imports it without declaring it; ending child processes
        "numpy>=2.0",  # shards, spectrogram filters, sample order; from 2.0 it counts bits
        "pydantic>=2.7",  # typed recipes: errors that name the field
        "tyro>=1.0",  # command lines from the typed tree
        "pyyaml",  # recipes
        "sentencepiece",  # tokenizers, in training and in exported models
        "orjson",  # JSON lines of texts in half of the time of Python's reader
        "numba",  # the text builder's encoder, compiled (data/word_kernels.py)
        "safetensors",  # exported weights, and reading Hugging Face checkpoints tensor by tensor
        "transformers>=5.0,<6",  # configuration, tokenizer and generation of exported models
        "pillow",  # image decoding
        "simplejpeg",  # JPEG to pixels in two thirds of Pillow's time, the same pixels
        "av",  # video decoding
        "soundfile",  # sound decoding (wav, flac, ogg, mp3)
        "soxr",  # resampling
        "tqdm",  # progress bars
        "fsspec",  # datasets in object stores (torch needs it too); s3fs, gcsfs and others are the user's to choose
        "backports.zstd; python_version < '3.14'",  # .zst input; unlike zstandard's reader it notices a cut file
        "tensorboard",  # event files
        "jinja2",  # the page of tools/inspect_dataset.py, with everything escaped; torch needs it too
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.5", "flash-attn>=2.7"],  # layers and attention on CUDA
        "parquet": ["pyarrow"],  # Parquet and Hugging Face datasets as input of the builders
        "sentences": ["nltk"],  # --split-sentences
        "evaluation": ["pycocoevalcap"],  # CIDEr
        "plot": ["matplotlib"],  # loss curves
        "wandb": ["wandb"],  # experiment tracking
        "quickstart": ["resvg-py", "matplotlib", "pycocoevalcap"],  # emoji drawn as SVG; the plot; CIDEr
        "test": [
            *["pytest", "pytest-xdist", "ruff", "scipy", "resvg-py", "pycocoevalcap", "matplotlib", "pyarrow", "nltk"],
            "selenium",  # looks at the page of tools/inspect_dataset.py in Chromium
        ],
    },
)
