"""What the owner of GPUs can check, and a machine without one cannot: backends, NCCL, speed, memory.

Every check is a run, or several, of what users run: `pretrain_multimodal.py` on generated rows, with its metrics and
checkpoints, its `--check` and its `--dry-run`; and of the comparison behind tools/verify_layouts.py. A check ends in a
`Verdict` with its numbers and what they had to be. tools/check_gpus.py prints them.

Weights and rows are functions of the seed, so two runs differ in what is compared alone. Bounds and their reasons:
- LOSS and GRADIENT_NORM in fp32: other kernels round otherwise (2^-24 an operation). Adam divides by the gradient's own
  size, so what rounding leaves of a vanishing gradient steers as much as a large one, and differences grow from step to
  step; on CPUs, other layouts stay within 2e-7 of each other over ten steps. A norm or a bias left out, or another
  activation, shows in the first step.
- In bf16 every operation rounds by up to 2^-9, but a loss is the mean of hundreds of tokens: on a CPU, twenty steps of
  synapse-tiny in bf16 stayed within 2.4e-4 of fp32 in the loss and 1.2e-2 in the gradient's norm. Two kernels are each
  as far from fp32; the bounds are four times that.
- MFU: the smallest models of which Megatron publishes figures reach 0.44 on A100 (1.7 billion parameters,
  arXiv:2104.04473, table 1) and 0.41 on H100 (2.1 billion, its README). Less than half of that says that something else
  than arithmetic takes the time.
- MEMORY: what torch's allocator gave out at most, over the dry run's estimate. The estimate has no temporary buffers,
  and counts the activations of the local backend.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import yaml
from torch.distributed import TCPStore

from megatron_mm.checks.layouts import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Layout,
    compare,
    for_layout,
    launch,
    parse_layout,
)
from megatron_mm.config.load import RECIPES, dump_config, load_config, parse_command_line
from megatron_mm.config.outputs import begin_folder
from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.config.validate import parallel_sizes
from megatron_mm.platform import own_code

#: What trains, of this checkout.
PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_multimodal.py"
#: Largest relative difference of the loss of any step.
LOSS = {"fp32": 1e-4, "bf16": 1e-3}
#: The same of the gradient's norm, which is a sum of squares over parameters that are each less certain than the loss.
GRADIENT_NORM = {"fp32": 1e-3, "bf16": 5e-2}
#: How much the loss must change over a run, in those bounds: a model that learns nothing agrees with any other.
LEARNS = 3.0
MFU = 0.17
MEMORY = (0.75, 1.25)
#: A layout of four processes with every kind of process group but that of contexts.
SPLIT = "TP2xPP2+SP+distopt"
#: Transformer Engine multiplies fp32 matrices as TF32, of ten bits, unless NVIDIA's libraries are told otherwise.
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}

#: Text, images and sounds through every kind of layer; and a tower and its decoder alone, for fp32: Transformer Engine
#: has no fp32 attention to packed documents before 2.11.
SYNAPSE, VISION = RECIPES / "synapse-tiny.yaml", RECIPES / "dual-encoder-tiny.yaml"
_LARGE = {"num_layers": 8, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 4,
          "ffn_hidden_size": 5632, "vocab_size": 32768}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a check found; `passed` is None for what could not be measured here."""

    check: str
    passed: bool | None
    numbers: str

    def __str__(self) -> str:
        word = {True: "PASS", False: "FAIL", None: "----"}[self.passed]
        return f"{word}  {self.check}: {self.numbers}"


Verdicts = Iterator[Verdict]


@dataclass
class Machines:
    """Where runs are started, and where they leave what they did.

    Raises:
        ValueError: `output` is not a folder of these checks, or another program has the port.
    """

    output: Path
    cuda: bool
    gpus: int
    """Processes on this node."""
    nodes: int = 1
    node_rank: int = 0
    master: str = "localhost"
    port: int = 29500
    """Of the first node: the nodes agree over it, and runs take one of the next ten."""
    second: list[str] = field(default_factory=list)
    """Options of pretrain_multimodal.py for the second run of each comparison, which must then fail (check_second)."""

    def __post_init__(self) -> None:
        begin_folder(self.output, "tools/check_gpus.py", "--output", _is_earlier)
        self._runs, self._last_port = 0, self.port
        if self.nodes > 1:
            first, patience = self.node_rank == 0, timedelta(minutes=30)
            if first and not _is_free(self.port):
                raise ValueError(f"port {self.port} of this node is taken: set --master-port, the same on every node")
            self._store = TCPStore(self.master, self.port, None, first, patience, wait_for_workers=False)

    def _agreed_port(self) -> int:
        """A free port of the first node for the next run of all nodes: the first chooses, the others are told."""
        self._runs += 1
        if self.node_rank == 0:  # from the last one on: who had it may still be leaving
            candidates = [self.port + 1 + (self._last_port - self.port + offset) % 10 for offset in range(10)]
            self._last_port = next(filter(_is_free, candidates), 0)
            self._store.set(f"port {self._runs}", str(self._last_port))
        if port := int(self._store.get(f"port {self._runs}")):
            return port
        raise ValueError(f"ports {self.port + 1} to {self.port + 10} of {self.master} are taken: set --master-port")

    def pretrain(
        self, name: str, config: Config, *words: str, processes: int | None = None, fresh: bool = True
    ) -> list[dict]:
        """Runs pretrain_multimodal.py, its output in a folder of that name, and returns its metrics on the first node.

        Args:
            words: more options.
            processes: on one node; None: all GPUs of all nodes.
            fresh: what an earlier run left there is removed; otherwise it goes on.

        Raises:
            ValueError: it failed; its errors are quoted, and its whole output is in NAME.log.
        """
        config = replace(config, logging=replace(config.logging, output=str(self.output / name)))
        if fresh and self.node_rank == 0:  # no process begins before those of this node do
            shutil.rmtree(self.output / name, ignore_errors=True)
        recipe, log = self.output / f"{name}-{self.node_rank}.yaml", self.output / f"{name}-{self.node_rank}.log"
        dump_config(config, recipe)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes or self.gpus)]
        if processes or self.nodes == 1:
            command.append("--standalone")
        else:
            command += ["--nnodes", str(self.nodes), "--node-rank", str(self.node_rank), "--rdzv-backend", "static"]
            command += ["--master-addr", self.master, "--master-port", str(self._agreed_port())]
        command += [str(PROGRAM), "--config", str(recipe), *words]
        environment = own_code.environment(**({} if self.cuda else {"OMP_NUM_THREADS": "1"}))
        if config.training.precision == "fp32":
            environment |= NO_TF32
        with log.open("w") as file:
            status = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        if status:
            raise ValueError(f"{name} failed: {_reason(log)} ({log})")
        metrics = self.output / name / "metrics.jsonl"
        if self.node_rank or "--check" in words:
            return []
        return [json.loads(line) for line in metrics.read_text().splitlines()]


def with_options(config: Config, options: Sequence[str]) -> Config:
    """A recipe with options of pretrain_multimodal.py.

    Raises:
        ValueError: an option asks for something else than training.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_mm-") as folder:
        recipe = Path(folder, "recipe.yaml")
        dump_config(config, recipe)
        read = parse_command_line(["--config", str(recipe), *options])
    for verb in fields(read.verbs):
        if getattr(read.verbs, verb.name) != verb.default:
            raise ValueError(f"--{verb.name.replace('_', '-')} is no setting of a run")
    return read.config


def check_second(what: str, options: Sequence[str], steps: int) -> None:
    """Refuses options of second runs on which a check would not act: sizes that one process has not, and what the
    comparisons of layouts set themselves.

    Args:
        what: `one`, `node` or `two-nodes`.

    Raises:
        ValueError: an option says nothing that this check compares; its field is named.
    """
    if not options:
        return
    recipes = [prepared(SYNAPSE, steps, "fp32", "local")]
    if what != "one":  # an option that says what one process has as well differs from a layout's
        recipes.append(in_layout(recipes[0], SPLIT, 4))
    try:
        pairs = [(recipe, with_options(recipe, options)) for recipe in recipes]
        if what == "one":
            parallel_sizes(pairs[0][1], 1)
    except ValueError as error:
        raise ValueError(f"--second: `{what}`: {error}") from None
    named = set().union(*(_differing(*pair) for pair in pairs))
    lost = {name for name in named if name.startswith("parallel.") and what != "one"}
    if what == "node":
        sizes = {"iterations": steps, "pool": 4, "global_batch": 16}
        seen = (_differing(*(for_layout(side, parse_layout("DP1"), **sizes) for side in pair)) for pair in pairs)
        lost |= named - set().union(*seen)
    if lost:
        verb = "is what" if len(lost) == 1 else "are what"
        raise ValueError(
            f"--second: {', '.join(sorted(lost))} {verb} `{what}` sets itself in the runs that it compares; name what "
            "is learned, such as optimizer.lr=4e-3 or training.seed=2"
        )
    if not named:
        raise ValueError(f"--second {' '.join(options)}: the second run would be the first again; name another value")


def _differing(one: Config, other: Config) -> set[str]:
    """Paths of the fields in which two recipes of one system differ."""

    def leaves(tree: dict, prefix: str) -> Iterator[tuple[str, object]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    first, second = (dict(leaves(asdict(config), "")) for config in (one, other))
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def _is_earlier(output: Path) -> bool:
    """Whether an earlier version, which left no marker, ran checks there: a recipe of one names its run's folder."""
    for recipe in output.glob("*-[0-9]*.yaml"):
        try:
            run = Path(yaml.safe_load(recipe.read_text())["logging"]["output"])
        except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
            continue
        if run.is_absolute() and run.name == recipe.stem.rpartition("-")[0]:
            return True
    return False


def _is_free(port: int) -> bool:
    """Whether a server could listen on the port of this machine now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's stores do
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _reason(log: Path) -> str:
    """The errors in a run's output, or else its end, on one line."""
    lines = log.read_text().splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("error")), len(lines) - 3)
    return " ".join(" ".join(lines[max(0, first) :][:4]).split())


def prepared(recipe: Path, steps: int, precision: str, backend: str) -> Config:
    """A recipe on generated rows, without warm-up, dropout, validation and what a user's disk would have."""
    config = changed(
        load_config(recipe),
        {
            "data.datasets": [],
            "data.tokenizer": None,
            "data.builder": "megatron_mm.data.reading.generated:build",
            "data.num_workers": 0,
            "training.train_iters": steps,
            "training.precision": precision,
            "training.eval_interval": 0,
            "optimizer.lr_warmup_iters": 0,
            "optimizer.lr_decay_iters": steps,
            "model.backend": backend,
            "model.hidden_dropout": 0.0,
            "model.attention_dropout": 0.0,
            "checkpoint.save_interval": 0,
            "checkpoint.init_from": None,
            "logging.tensorboard": False,
            "logging.wandb_project": None,
        },
    )
    return changed(config, {"model.phase": "mae"}) if recipe == VISION else config


def in_layout(config: Config, name: str, world_size: int) -> Config:
    """The recipe in a layout such as TP2xPP2+SP; data parallel is what `world_size` leaves."""
    layout, training = parse_layout(name), config.training
    data_parallel = world_size // layout.world_size
    rows = max(1, training.micro_batch_size // data_parallel)
    together = rows * data_parallel
    batch = -(-training.global_batch_size // together) * together
    return replace(
        config,
        parallel=replace(config.parallel, **layout.parallel),
        training=replace(training, micro_batch_size=rows, global_batch_size=batch),
    )


def large(steps: int, backend: str) -> Config:
    """Synapse with 1.1 billion parameters, rows of 2048 tokens: enough work to time, little enough for 40 GB."""
    return changed(
        prepared(RECIPES / "synapse-70b.yaml", steps, "bf16", backend),
        {
            **{f"model.decoder.{key}": value for key, value in _LARGE.items()},
            "model.cross_attention.every": 4,
            "model.cross_attention.num_query_groups": 8,
            "parallel.world_size": None,
            "parallel.recompute_granularity": "none",
            "parallel.tensor_model_parallel_size": 1,
            "parallel.pipeline_model_parallel_size": 1,
            "parallel.sequence_parallel": False,
            "data.seq_length": 2048,
            "data.num_workers": 2,
            "training.global_batch_size": 8,
        },
    )


def same_curve(check: str, precision: str, first: Sequence[dict], second: Sequence[dict]) -> Verdicts:
    """Whether two runs of the same steps have the same losses and gradient norms, and learn at all."""
    for key, bound in (("loss", LOSS[precision]), ("grad_norm", GRADIENT_NORM[precision])):
        pairs = [(line["iteration"], line[key], other[key]) for line, other in zip(first, second, strict=True)]
        relative = [(abs(a - b) / abs(a) if math.isfinite(b) else math.inf, step) for step, a, b in pairs]
        worst, step = max(relative)
        numbers = f"differ by at most {worst:.1e}, in step {step} of {len(pairs)}; {bound:.0e} is allowed"
        yield Verdict(f"{check}, {key}", worst <= bound, numbers)
    begin, end = first[0]["loss"], first[-1]["loss"]
    learned, least = abs(end - begin) / begin, LEARNS * LOSS[precision]
    numbers = f"loss {begin:.4f} → {end:.4f}, a change of {learned:.1e}; {least:.0e} is needed to tell runs apart"
    yield Verdict(f"{check}, the model learns", learned >= least, numbers)


def attempted(check: str, verdicts: Callable[[], Verdicts]) -> Verdicts:
    """A run that fails is a check that fails; the others go on."""
    try:
        yield from verdicts()
    except ValueError as error:
        yield Verdict(check, False, str(error))


def healthy(machines: Machines, layout: str, world_size: int) -> Verdicts:
    """The pre-flight of all processes."""
    config = in_layout(prepared(SYNAPSE, 1, "bf16" if machines.cuda else "fp32", "local"), layout, world_size)
    machines.pretrain("preflight", config, "--check")
    if machines.node_rank == 0:
        figures = json.loads((machines.output / "preflight" / "preflight.json").read_text())
        speeds = [product["tflops"] for product in figures["products"]]
        numbers = f"{len(speeds)} processes, matrix product {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s, "
        numbers += f"{len(figures['groups'])} groups right; see preflight-0.log"
        yield Verdict("pre-flight", figures["passed"], numbers)


def backends(machines: Machines, steps: int, precision: str, recipe: Path) -> Verdicts:
    """Transformer Engine against the local backend, from the same weights, on one GPU."""
    other = "transformer_engine" if machines.cuda else "local"
    first = machines.pretrain(f"{precision}-first", prepared(recipe, steps, precision, "local"), processes=1)
    config = prepared(recipe, steps, precision, other)
    second = machines.pretrain(f"{precision}-second", config, *machines.second, processes=1)
    yield from same_curve(f"{other} against local, {precision}, {recipe.stem}", precision, first, second)


def layouts(machines: Machines, names: Sequence[str], steps: int, backend: str, recipe: Path) -> Verdicts:
    """Layouts against one process, on the GPUs of a node: every step's loss and every parameter's gradient, fp32."""
    config, sizes = prepared(recipe, steps, "fp32", backend), {"iterations": steps, "pool": 4, "global_batch": 16}

    def run(config: Config, layout: Layout) -> dict:
        return launch(for_layout(config, layout, **sizes, backend=backend), layout, environment=NO_TF32)

    reference, config = run(config, parse_layout("DP1")), with_options(config, machines.second)
    for layout in map(parse_layout, names):
        check = f"{layout.name} against one process, {backend}, {recipe.stem}"
        try:
            found = compare(layout, run(config, layout), reference)
        except ValueError as error:
            yield Verdict(check, False, str(error))
        else:
            numbers = f"loss {found.loss:.1e} ({LOSS_TOLERANCE:.0e} is allowed), gradient {found.gradient:.1e} "
            numbers += f"({GRADIENT_TOLERANCE:.0e}), {found.parameter}"
            yield Verdict(check, found.passed, numbers)


def speed_and_memory(machines: Machines, layout: str, world_size: int, steps: int) -> Verdicts:
    """MFU and the memory of rank 0 in a recipe of some size, against the dry run's of the same recipe."""
    config = large(steps, "transformer_engine") if machines.cuda else prepared(SYNAPSE, steps, "fp32", "local")
    config = in_layout(config, layout, world_size)
    data_parallel = world_size // parse_layout(layout).world_size
    microbatches = 8 if machines.cuda else 1  # of a pipeline stage; a CPU only shows that the check runs
    batch = microbatches * config.training.micro_batch_size * data_parallel
    config = changed(config, {"training.global_batch_size": batch})
    lines = machines.pretrain("large", config)
    if machines.node_rank:
        return
    shutil.rmtree(machines.output / "large" / "checkpoints")  # gigabytes
    # Medians, because kernels are chosen and memory is taken in the first steps.
    seconds = statistics.median(line["iteration_time"] for line in lines)
    check = f"MFU, {layout} on {world_size}"
    if "mfu" in lines[-1]:
        mfu = statistics.median(line["mfu"] for line in lines)
        yield Verdict(check, mfu >= MFU, f"{mfu:.1%} at {seconds:.3f} s a step; at least {MFU:.0%} is right")
    else:
        yield Verdict(check, None, f"not measured: no peak is known here; {seconds:.3f} s a step")
    planned = planned_memory(machines, config, world_size)
    check = f"memory of rank 0, {layout} on {world_size}"
    if "max_memory_gib" in lines[-1]:
        most = lines[-1]["max_memory_gib"]
        numbers = f"{most:.2f} GiB, the dry run said {planned:.2f}; {MEMORY[0]} to {MEMORY[1]} of it is right"
        yield Verdict(check, MEMORY[0] <= most / planned <= MEMORY[1], numbers)
    else:
        yield Verdict(check, None, f"not measured: no CUDA; the dry run says {planned:.2f} GiB")


def planned_memory(machines: Machines, config: Config, world_size: int) -> float:
    """GiB that the dry run gives a process of the first stage."""
    recipe, figures = (machines.output / f"dry-run.{end}" for end in ("yaml", "json"))
    dump_config(config, recipe)
    command = [sys.executable, str(PROGRAM), "--config", str(recipe), "--dry-run"]
    command += ["--world-size", str(world_size), "--dry-run-json", str(figures)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ValueError(f"the dry run failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(figures.read_text())["stages"][0]["memory_bytes"] / 2**30


def save_and_resume(machines: Machines, layout: str, other: str, world_size: int, steps: int) -> Verdicts:
    """A run across nodes, saved half-way and resumed in another layout, against the run that was never stopped."""
    config = prepared(SYNAPSE, steps, "fp32", "local")
    whole = machines.pretrain("whole", in_layout(config, layout, world_size))
    machines.pretrain("resumed", in_layout(config, layout, world_size), "--train-iters", str(steps // 2))
    resumed = machines.pretrain("resumed", in_layout(config, other, world_size), *machines.second, fresh=False)
    if machines.node_rank == 0:
        yield from same_curve(f"{layout} saved in the middle, resumed as {other}", "fp32", whole, resumed)


def one(machines: Machines, steps: int) -> Verdicts:
    """The checks of one GPU."""
    machines.gpus = 1
    yield from attempted("pre-flight", lambda: healthy(machines, "TP1", 1))
    for precision, recipe in (("fp32", VISION), ("bf16", SYNAPSE)):
        yield from attempted(f"backends, {precision}", lambda: backends(machines, steps, precision, recipe))  # noqa: B023
    yield from attempted("speed and memory", lambda: speed_and_memory(machines, "TP1", 1, steps))


def node(machines: Machines, steps: int) -> Verdicts:
    """The checks of the GPUs of one node, four or more."""
    split, gpus = SPLIT, machines.gpus
    names = ["TP2xPP2+SP", "TP2xDP2+SP+distopt", "PP4", *["TP2xPP2xDP2+SP+distopt+full"] * (gpus >= 8)]
    yield from attempted("pre-flight", lambda: healthy(machines, split, gpus))
    for backend, recipe in (("local", SYNAPSE), ("transformer_engine", VISION))[: 2 if machines.cuda else 1]:
        yield from attempted(f"layouts, {backend}", lambda: layouts(machines, names, min(steps, 10), backend, recipe))  # noqa: B023
    yield from attempted("speed and memory", lambda: speed_and_memory(machines, split, gpus, steps))


def two_nodes(machines: Machines, steps: int) -> Verdicts:
    """The checks across nodes: pipeline stages on different nodes, then data parallel across them."""
    world_size = machines.gpus * machines.nodes
    inside = f"TP{2 if machines.gpus > 1 else 1}"
    pipeline, data = f"{inside}xPP2+distopt", f"{inside}+distopt"
    yield from attempted("pre-flight", lambda: healthy(machines, pipeline, world_size))
    yield from attempted("resume", lambda: save_and_resume(machines, pipeline, data, world_size, steps))
    yield from attempted("speed and memory", lambda: speed_and_memory(machines, data, world_size, steps))
