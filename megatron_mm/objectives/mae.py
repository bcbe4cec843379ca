"""Masked autoencoding: the pixels of the patches that the tower did not see (arXiv:2111.06377)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_mm.config.sizes import ParallelSizes
from megatron_mm.data.reading.microbatch import Microbatch
from megatron_mm.models.graph import ForwardContext, Loss
from megatron_mm.models.work import Moved
from megatron_mm.objectives.measures import MaskedPatches
from megatron_mm.parts.vit.nodes import patchify, shuffled_patches
from megatron_mm.parts.vit.section import MAEConfig, ViTConfig


def mae_loss(tower: ViTConfig, mae: MAEConfig, weight: float = 1.0) -> Loss:
    """Squared error of `mae_prediction` [I, P, X], averaged over a patch's pixels, summed over hidden patches.

    Only images that a row refers to count. With `mae.normalize_pixels` each patch is first brought to mean 0 and
    deviation 1 of its own pixels (unbiased variance, plus 1e-6). Computed in fp32; every context-parallel process
    returns all of it.
    """
    visible = mae.visible_patches(tower.num_patches)
    hidden = tower.num_patches - visible

    def real_images(batch: Microbatch) -> torch.Tensor:
        return (batch.image_slots_RK >= 0).sum()

    def compute(prediction_IPX: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        batch = context.batch
        target_IPX = patchify(batch.images_ICHW.float(), tower.patch_size, channels_last=True)
        if mae.normalize_pixels:
            variance, mean = torch.var_mean(target_IPX, dim=-1, keepdim=True)
            target_IPX = (target_IPX - mean) * (variance + 1e-6).rsqrt()
        error_IP = (prediction_IPX.float() - target_IPX).square().mean(dim=-1)
        hidden_errors = error_IP.gather(1, shuffled_patches(context)[:, visible:]).sum(dim=1)
        # Images are listed in the order of rows, so a stand-in for rows without any comes last.
        real = torch.arange(error_IP.shape[0], device=error_IP.device) < real_images(batch)
        return torch.dot(hidden_errors, real.to(hidden_errors.dtype))

    def count(batch: Microbatch) -> torch.Tensor:
        return real_images(batch).float() * hidden

    def work(shapes: Sequence[tuple[int, ...]], sizes: ParallelSizes) -> tuple[Moved, ...]:
        values = math.prod(shapes[0])
        # In fp32: patches in their order; mean, variance and two operations; error and its square, then its mean.
        kernels = 4 + (4 if mae.normalize_pixels else 0)
        return (Moved(8 * values, kernels, "errors of pixels"),)

    return Loss(
        "mae",
        compute,
        count,
        ("mae_prediction",),
        weight,
        sharded=False,
        fields=frozenset({"images_ICHW", "patch_noise_IP"}),
        measure=MaskedPatches,
        work=work,
    )
