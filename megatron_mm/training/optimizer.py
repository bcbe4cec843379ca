"""megatron-core's AdamW with linear warm-up and cosine decay, and its state as layout-independent checkpoint entries.

megatron-core's own optimizer checkpoints name state by position in a process's parameter list, or by data-parallel
shard, and restore `step` wrongly for torch's Adam. Here every state tensor is an entry `optimizer.<state>.<parameter
key>` of which each process holds regions, so that a checkpoint loads under any layout, with or without the distributed
optimizer, and nothing is gathered to write it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mm.checkpoints.held import Held
from megatron_mm.checkpoints.slots import Slot
from megatron_mm.config.schema import Config
from megatron_mm.models.phases import group_of
from megatron_mm.pipeline.schedule import Pipeline


class Optimizer:
    """megatron-core's optimizer of one process, with its schedule."""

    def __init__(self, config: Config, pipeline: Pipeline) -> None:
        settings, bf16 = config.optimizer, config.training.precision == "bf16"
        self.clip_grad = settings.clip_grad
        self.pipeline = pipeline
        megatron = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=config.performance.overlap_param_gather,
        )
        overrides = {**get_standard_config_overrides(megatron), **_group_overrides(config, pipeline)}
        self.inner: ChainedOptimizer = get_megatron_optimizer(megatron, pipeline.chunks, overrides)
        pipeline.config.grad_scale_func = None  # bf16 and fp32 need no loss scale
        for adam in self._torch_optimizers():
            for group in adam.param_groups:
                group["fused"] = pipeline.device.type == "cpu"  # torch's loop over tensors is slower
        batch = config.training.global_batch_size
        last = settings.lr_decay_iters or config.training.train_iters
        self.schedule = OptimizerParamScheduler(
            self.inner,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.lr_warmup_iters * batch,
            lr_decay_steps=last * batch,
            lr_decay_style="cosine",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        self.steps = 0

    def zero_grad(self) -> None:
        """Clears gradients and DDP's buffers."""
        for chunk in self.pipeline.chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def gradient_norm(self) -> float:
        """Global gradient norm of the batch just run; makes gradients ready for `step`."""
        self.inner.prepare_grads()
        return float(self.inner.get_grad_norm())

    def step(self, gradient_norm: float, samples: int) -> None:
        """Clips, updates the weights and advances the schedule by a batch of samples.

        Raises:
            ValueError: the norm is not finite; nothing was changed.
        """
        if not math.isfinite(gradient_norm):
            raise ValueError(f"the gradient norm is {gradient_norm}")
        self.schedule.step(increment=samples)
        if self.clip_grad > 0:
            for optimizer in self.inner.chained_optimizers:
                if not optimizer.is_stub_optimizer:
                    clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self.clip_grad, gradient_norm)
        self.inner.step_with_ready_grads()
        self.pipeline.weights_updated()
        self.steps += 1

    @property
    def learning_rate(self) -> float:
        """Rate of the last step, where no group has its own."""
        return self.schedule.get_lr({})

    # ---------------------------------------------------------------------------------------------- checkpointing

    def held_alike(self, weights: Sequence[Held]) -> Iterator[tuple[Held, torch.Tensor, str]]:
        """State that the processes of a data-parallel group hold alike: (parameter, values in its shape, key's prefix).

        In the same order on each, whichever made its state first: they divide it by its order among themselves.
        Nothing under the distributed optimizer, where each has its own (`own_slots`).
        """
        for weight, optimizer in self._with_state(weights):
            if not isinstance(optimizer, DistributedOptimizer):
                for name, tensor in sorted(self._local_state(optimizer, weight.parameter).items()):
                    yield weight, tensor.view(weight.parameter.shape), f"optimizer.{name}."

    def own_slots(self, weights: Sequence[Held]) -> Iterator[Slot]:
        """State that this process writes and no other of its data-parallel group holds."""
        for weight, optimizer in self._with_state(weights):
            if isinstance(optimizer, DistributedOptimizer) and weight.is_first:
                yield from self._slots_of(optimizer, weight)

    def slots(self, weights: Sequence[Held]) -> Iterator[Slot]:
        """All state that this process holds, to be filled before `restore`."""
        for weight, optimizer in self._with_state(weights):
            yield from self._slots_of(optimizer, weight)

    def _slots_of(self, optimizer, weight: Held) -> Iterator[Slot]:
        start, stop = self._range(optimizer, weight.parameter)
        for name, tensor in self._local_state(optimizer, weight.parameter).items():
            yield from weight.pieces(start, stop, tensor.view(-1), f"optimizer.{name}.")

    def _with_state(self, weights: Sequence[Held]) -> Iterator[tuple[Held, Any]]:
        """Trainable parameters, with the optimizers that hold state of them on this process."""
        self._materialise()
        by_parameter = {id(weight.parameter): weight for weight in weights}
        for parameter in self._parameters():
            for optimizer in self._owners(parameter):
                yield by_parameter[id(parameter)], optimizer

    @torch.no_grad()
    def restore(self, weights: Sequence[Held], stored: Container[str], steps: int, samples: int) -> None:
        """Goes on from weights and state that were filled from a checkpoint.

        Args:
            weights: of this process.
            stored: keys that the checkpoint holds: a parameter without a master weight there starts from its weight.
            steps: that the optimizer has made.
            samples: consumed in them.
        """
        for weight, optimizer in self._with_state(weights):
            state = self._local_state(optimizer, weight.parameter)
            if "fp32_param" in state and f"optimizer.fp32_param.{weight.key}" not in stored:
                start, stop = self._range(optimizer, weight.parameter)
                state["fp32_param"].view(-1).copy_(weight.parameter.detach().reshape(-1)[start:stop])
        self.steps = steps
        for adam in self._torch_optimizers():
            for group in adam.param_groups:
                if not isinstance(adam, torch.optim.Adam):
                    group["step"] = self._steps_of(group)  # Transformer Engine's and apex's: one count a group
                    continue
                for parameter in group["params"]:
                    adam.state[parameter]["step"] = torch.tensor(float(self._steps_of(group)))
        self.schedule.num_steps = 0
        self.schedule.step(increment=samples)

    def _steps_of(self, group: dict) -> int:
        """Steps that the parameters of a group have learned."""
        return max(0, self.steps - group.get("frozen_iters", 0))

    def reload_weights(self) -> None:
        """Takes master weights from the model (after loading weights without optimizer state)."""
        self.inner.reload_model_params()

    def _torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        for optimizer in self.inner.chained_optimizers:
            if not getattr(optimizer, "is_stub_optimizer", False) and optimizer.optimizer is not None:
                yield optimizer.optimizer

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self.pipeline.bare_chunks:
            yield from (parameter for parameter in chunk.parameters() if parameter.requires_grad)

    def _materialise(self) -> None:
        """Makes Adam's state, which torch only makes at the first step."""
        for adam in self._torch_optimizers():
            for group in adam.param_groups:
                for parameter in group["params"]:
                    state = adam.state[parameter]
                    if isinstance(adam, torch.optim.Adam) and not state:
                        state["step"] = torch.tensor(float(self._steps_of(group)))
                    for name in ("exp_avg", "exp_avg_sq"):
                        if name not in state:
                            state[name] = torch.zeros_like(parameter)

    def _owners(self, parameter: torch.nn.Parameter) -> Iterator:
        """The optimizers that hold state of a parameter on this process (none, if another DP rank has all of it)."""
        for optimizer in self.inner.chained_optimizers:
            if getattr(optimizer, "is_stub_optimizer", False):
                continue
            if not isinstance(optimizer, DistributedOptimizer) or parameter in optimizer.model_param_group_index_map:
                yield optimizer

    def _local_state(self, optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """State tensors of this process: exp_avg, exp_avg_sq, and the fp32 master weight in mixed precision."""
        mixed = parameter.dtype != torch.float32
        if isinstance(optimizer, DistributedOptimizer):
            tensors = dict(optimizer._get_main_param_and_optimizer_states(parameter))
            main = tensors.pop("param")
        else:
            main = parameter.main_param if mixed else parameter
            tensors = dict(optimizer.optimizer.state[main])
        tensors.pop("step", None)
        if mixed:
            tensors["fp32_param"] = main.data
        return tensors

    def _range(self, optimizer, parameter: torch.nn.Parameter) -> tuple[int, int]:
        """Which elements of the (flattened) local parameter this process's state covers."""
        if isinstance(optimizer, DistributedOptimizer):
            piece = optimizer._get_model_param_range_map(parameter)["param"]
            return piece.start, piece.end
        return 0, parameter.numel()


def _group_overrides(config: Config, pipeline: Pipeline) -> dict[ParamKey, dict]:
    """What `optimizer.groups` changes, as megatron-core's overrides of parameter groups."""
    lr, min_lr = config.optimizer.lr, config.optimizer.min_lr
    kinds: dict[int, tuple[float, int]] = {}
    for chunk in pipeline.bare_chunks:
        for node, module in zip(chunk.nodes, chunk.node_modules):
            group = group_of(config.optimizer.groups, node.name)
            for name, parameter in module.named_parameters() if group else ():
                if name not in node.ties:  # a copy follows its owner
                    kinds[id(parameter)] = (group.lr_scale, max(0, group.frozen_iters))
    overrides = {}
    for scale, frozen in {(group.lr_scale, max(0, group.frozen_iters)) for group in config.optimizer.groups}:
        predicate = ParamWithNamePredicate(
            f"lr x {scale} after {frozen}", lambda parameter, _, kind=(scale, frozen): kinds.get(id(parameter)) == kind
        )
        change: dict = {"frozen_iters": frozen} if frozen else {}
        if scale != 1.0:
            change |= {"max_lr": lr * scale, "min_lr": min_lr * scale}
        if change:
            overrides[ParamKey(with_name_predicate=predicate)] = change
    return overrides
