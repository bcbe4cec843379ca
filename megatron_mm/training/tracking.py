"""Where the figures of a run go: metrics.jsonl, TensorBoard, Weights & Biases and the console. Rank 0 only.

`metrics.jsonl` is the record: one object an iteration, cut back to the checkpoint when a run resumes, so that it always
holds the committed history.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from megatron_mm.config.documents import parse_json
from megatron_mm.config.schema import Config
from megatron_mm.platform.atomic_files import write_whole

#: Peak dense BF16 TFLOP/s of devices, from their data sheets.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "L40S": 362.0}


def cut_back(path: Path, iteration: int) -> int:
    """Drops the lines of metrics.jsonl after an iteration; returns how many were dropped."""
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text().splitlines():
        try:
            keep = parse_json(line)["iteration"] <= iteration
        except (ValueError, LookupError, TypeError):
            keep = False  # a line that a killed process did not finish
        kept, dropped = ([*kept, line], dropped) if keep else (kept, dropped + 1)
    write_whole(path, "".join(f"{line}\n" for line in kept))
    return dropped


def peak_tflops(config: Config) -> float | None:
    """Peak of one device: the recipe's, or a known GPU's."""
    import torch

    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


class Tracker:
    """Writes the figures of every iteration.

    Args:
        config: `logging.output` is the folder; what else is written follows `logging`.
        active: False on all ranks but the first: nothing is written.
        start_iteration: iterations done before.
    """

    def __init__(self, config: Config, active: bool, start_iteration: int) -> None:
        self.config, self.active = config, active
        self._events = self._wandb = None
        self._started, self._first = time.monotonic(), start_iteration
        if not active:
            return
        output = Path(config.logging.output)
        output.mkdir(parents=True, exist_ok=True)
        path = output / "metrics.jsonl"
        dropped = cut_back(path, start_iteration)
        if dropped:
            print(f"metrics.jsonl: {dropped} iterations after the checkpoint were dropped", flush=True)
        self._file = path.open("a")
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(output / "tensorboard"), purge_step=start_iteration + 1)
        if config.logging.wandb_project:
            import wandb  # extra `wandb`

            self._wandb = wandb.init(project=config.logging.wandb_project, dir=str(output))

    def record(self, figures: dict) -> None:
        """Takes the figures of one iteration."""
        if not self.active:
            return
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()
        step = figures["iteration"]
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        if self._events:
            for key, value in numbers.items():
                self._events.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)
        if step % self.config.logging.log_interval == 0 or step in (self._first + 1, self.config.training.train_iters):
            print(self._line(figures), flush=True)

    def _line(self, figures: dict) -> str:
        last, step = self.config.training.train_iters, figures["iteration"]
        left = (time.monotonic() - self._started) / max(1, step - self._first) * (last - step)
        parts = [f"iteration {step}/{last}", f"loss {figures['loss']:.4f}"]
        parts += [f"{key[5:]} {value:.4f}" for key, value in figures.items() if key.startswith("loss_")]
        parts += [f"grad norm {figures['grad_norm']:.3f}", f"lr {figures['learning_rate']:.2e}"]
        parts += [f"{figures['tokens_per_second']:,.0f} tokens/s", f"{figures['iteration_time']:.3f} s/iteration"]
        if "mfu" in figures:
            parts.append(f"MFU {figures['mfu']:.1%}")
        if figures.get("corrupt_media"):
            parts.append(f"{figures['corrupt_media']} corrupt media")
        if "validation_loss" in figures:
            parts.append(f"validation {figures['validation_loss']:.4f}")
        return "  ".join([*parts, f"{_duration(left)} left"])

    def close(self) -> None:
        """Flushes everything."""
        if self.active:
            self._file.close()
            if self._events:
                self._events.close()
            if self._wandb:
                self._wandb.finish()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
