"""Recipes, overrides, and what is refused by name before anything is built."""

import pkgutil
import re
import subprocess

import pytest

from megatron_mm.config.load import RECIPES, config_from_tree, dump_config, load_config, parse_blend, parse_command_line
from megatron_mm.config.section import changed
from megatron_mm.config.validate import check, parallel_sizes
from tests.support.programs import PYTHON
from tests.support.recipes import small_config

pytestmark = pytest.mark.interface


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_sound(recipe, tmp_path):
    config = load_config(recipe)
    check(config, parallel_sizes(config, config.parallel.world_size or 1))
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_synapse_70b_pins_what_its_document_states():
    config = load_config(RECIPES / "synapse-70b.yaml")
    model, optimizer, data, training = config.model, config.optimizer, config.data, config.training
    assert (model.decoder.num_layers, model.decoder.num_attention_heads, model.decoder.hidden_size) == (80, 64, 8192)
    assert model.decoder.vocab_size == 128000 and data.seq_length == 4096
    vision = model.vision
    assert (vision.num_layers, vision.hidden_size, vision.num_attention_heads, vision.patch_size) == (24, 1024, 16, 14)
    assert vision.frozen and vision.image_size == 224 and data.random_crop
    assert training.global_batch_size * data.seq_length == 4 * 2**20 and training.precision == "bf16"
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-6)
    assert (optimizer.lr, optimizer.min_lr, optimizer.lr_warmup_iters, optimizer.clip_grad) == (3e-5, 1e-6, 2000, 1.0)
    assert config.parallel.recompute_granularity == "full" and config.parallel.world_size == 256


def test_synapse_70b_has_70_billion_parameters():
    from megatron_mm.platform import setup

    setup.apply_platform()
    from megatron_mm.config.sizes import ParallelSizes
    from megatron_mm.planner.assembly import full_plan, layer_settings
    from megatron_mm.planner.costs import total_parameters
    from megatron_mm.systems.graph import build_graph

    config = load_config(RECIPES / "synapse-70b.yaml")
    graph = build_graph(config.model, layer_settings(config, ParallelSizes(), "cpu"))
    total = total_parameters(graph, full_plan(config))
    assert f"{total / 1e9:.1f}" == "70.4" and abs(total / 70e9 - 1) < 0.01


def test_the_command_line_overrides_by_path_and_by_megatrons_name():
    words = ["--config", str(RECIPES / "synapse-tiny.yaml"), "--tensor-model-parallel-size", "2"]
    options = ["--model.decoder.num-layers", "6", "--sequence-parallel", "--lr", "0.5"]
    config = parse_command_line([*words, *options]).config
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.sequence_parallel
    assert config.model.decoder.num_layers == 6 and config.optimizer.lr == 0.5


def test_the_blend_in_megatrons_form():
    words = ["--config", str(RECIPES / "synapse-tiny.yaml"), "--data-path"]
    config = parse_command_line([*words, "3", "a", "1.5", "b", "--seed", "4"]).config
    assert [(d.path, d.weight) for d in config.data.datasets] == [("a", 3.0), ("b", 1.5)] and config.training.seed == 4
    assert [d.path for d in parse_command_line([*words, "a", "b"]).config.data.datasets] == ["a", "b"]
    with pytest.raises(ValueError, match="'b' stands where a weight should"):
        parse_blend(["3", "a", "b", "c"])
    with pytest.raises(ValueError, match="come in pairs"):
        parse_blend(["3", "a", "2"])


def test_a_start_from_one_checkpoint_or_several(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("checkpoint: {init_from: a}\n")
    assert load_config(recipe).checkpoint.init_from == ["a"]
    words = ["--config", str(recipe)]
    assert parse_command_line(words).config.checkpoint.init_from == ["a"]
    options = ["--init-from", "b", "c", "--init-nodes", "vision.*", "text.*", "--seed", "4"]
    config = parse_command_line([*words, *options]).config
    assert config.checkpoint.init_from == ["b", "c"] and config.checkpoint.init_nodes == ["vision.*", "text.*"]
    dump_config(config, recipe)
    assert load_config(recipe) == config


def test_mistakes_in_a_recipe_are_named_by_path(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {decoder: {num_layer: 3}}\ntraining: {micro_batch_size: many}\n")
    with pytest.raises(ValueError) as caught:
        load_config(recipe)
    message = str(caught.value)
    assert "model.decoder.num_layer: there is no such field" in message
    assert "training.micro_batch_size:" in message and "'many'" in message
    with pytest.raises(ValueError, match=r"there is no recipe .*; megatron_mm/recipes has .*synapse-tiny"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seq_length": 1}, "data.seq_length: Input should be greater than or equal to 2, not 1"),
        ({"horizontal_flip": 1.5}, "data.horizontal_flip: Input should be less than or equal to 1, not 1.5"),
        ({"color_jitter": -0.1}, "data.color_jitter: Input should be greater than or equal to 0, not -0.1"),
        ({"max_sounds_per_sample": -1}, "data.max_sounds_per_sample: Input should be greater than or equal to 0"),
        ({"num_workers": -2}, "data.num_workers: Input should be greater than or equal to 0"),
        ({"image_std": [0.2, 0.0, 0.2]}, "data.image_std.1: Input should be greater than 0"),
        ({"image_mean": [0.2, float("nan"), 0.2]}, "data.image_mean.1: Input should be a finite number"),
        ({"tokenizer": ""}, "data.tokenizer: String should have at least 1 character"),
        ({"split": "9,1,0,1"}, 'data.split: "9,1,0,1" must be up to three proportions, such as "969,30,1"'),
        ({"builder": "squares"}, "data.builder: 'squares' must be module:function or file.py:function"),
        ({"builder": ":build"}, "data.builder: ':build' must be module:function"),
        ({"on_corrupt": "ignore"}, "data.on_corrupt: Input should be 'stop' or 'skip', not 'ignore'"),
        ({"datasets": [{"path": "a"}, {"path": "b", "weight": 0}]}, "data.datasets.1.weight: Input should be greater"),
        ({"datasets": [{"path": "a", "weight": float("inf")}]}, "data.datasets.0.weight: Input should be a finite"),
        ({"datasets": [{"path": "a/text.bin"}]}, "data.datasets.0.path: give the prefix, a/text, not the file a/text"),
    ],
)  # fmt: skip
def test_values_by_which_no_data_could_be_read_are_refused_with_the_recipe(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_tree({"data": data}, "r.yaml")


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        ("avt-tiny", {"tokenizer": None}, "data.tokenizer is not set; masked language modelling"),
        ("vlm-tiny", {"split": "0,1"}, 'data.split is "0,1"; its first proportion, of training documents, must be'),
        ("synapse-tiny", {"frames_per_video": 0}, "data.frames_per_video is 0; it must be at least 1, as synapse"),
    ],
)
def test_data_that_could_not_be_trained_on_are_refused_before_they_are_there(recipe, data, message):
    config = load_config(RECIPES / f"{recipe}.yaml")
    check(config, parallel_sizes(config, 1))
    config = changed(config, {f"data.{name}": value for name, value in data.items()})
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config, parallel_sizes(config, 1))
    if "split" not in data and "frames_per_video" not in data:
        config = changed(config, {"data.builder": "module:of_my_own"})  # which reads no shards
        check(config, parallel_sizes(config, 1))


def across(comm: str, **parallel) -> dict[str, object]:
    """Context parallelism of two processes."""
    fields = {"context_parallel_size": 2, "cp_comm_type": comm, **parallel}
    return {f"parallel.{name}": value for name, value in fields.items()}


def kernels(backend: str, attention_backend: str) -> dict[str, object]:
    return {"model.backend": backend, "model.attention_backend": attention_backend}


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"parallel.tensor_model_parallel_size": 5}, 5, "num_attention_heads is 4, which does not"),
        ({"parallel.pipeline_model_parallel_size": 3}, 4, "4 processes do not divide by"),
        (across("a2a", tensor_model_parallel_size=2), 4, "num_query_groups is 2, which does not divide"),
        (across("p2p"), 2, "synapse packs documents; take all_gather or a2a"),
        ({**across("p2p"), "model.backend": "local"}, 2, "p2p, which is Transformer Engine's"),
        ({"model.attention_backend": "local"}, 1, "which model.backend local has; it is auto"),
        (kernels("local", "flash"), 1, "a choice of Transformer Engine's, and model.backend is local"),
        ({"parallel.context_parallel_size": 3}, 3, "data.seq_length is 32, which does not divide"),
        ({"training.global_batch_size": 7}, 1, "not a multiple of micro_batch_size 2"),
        ({"model.vision.patch_size": 7}, 1, "model.vision.image_size is 16"),
        ({"optimizer.lr_warmup_iters": 9}, 1, "lr_warmup_iters is 9, not below"),
        ({"optimizer.min_lr": 1.0}, 1, "min_lr 1.0 is above"),
        ({"model.cross_attention.num_query_groups": 3}, 1, "cross_attention.num_query_groups = 3"),
        ({"parallel.virtual_pipeline_model_parallel_size": 2}, 1, "needs pipeline_model_parallel"),
    ],
)
def test_contradictions_are_refused_by_name(changes, world, message):
    config = changed(small_config(), changes)
    with pytest.raises(ValueError, match=message):
        check(config, parallel_sizes(config, world))


def test_interleaving_needs_enough_microbatches():
    config = changed(
        small_config(),
        {
            "parallel.pipeline_model_parallel_size": 4,
            "parallel.virtual_pipeline_model_parallel_size": 2,
            "training.global_batch_size": 6,
        },
    )
    with pytest.raises(ValueError, match="multiples of pipeline_model_parallel_size 4"):
        check(config, parallel_sizes(config, 4))


@pytest.mark.parametrize("name", ["check", "dry_run", "dry_run_json"])
def test_a_recipe_holds_no_verb_and_settings_of_before_may(name):
    """They were fields once, so that settings of earlier runs have them; one that asks for something is refused."""
    assert config_from_tree({"check": False, "dry_run": False, "dry_run_json": None}, "r.yaml") == config_from_tree(
        {}, "r.yaml"
    )
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=rf"{name}: it is no setting but an option of the command line \({option}\)"):
        config_from_tree({name: "x.json" if name == "dry_run_json" else True}, "r.yaml")


def test_a_builder_that_was_moved_is_found():
    config = config_from_tree({"data": {"builder": "megatron_mm.data.generated:build"}}, "r.yaml")
    assert config.data.builder == "megatron_mm.data.reading.generated:build"
    assert pkgutil.resolve_name(config.data.builder)


@pytest.mark.slow
def test_usage_errors_exit_with_2_and_help_with_0():
    def run(*words):
        command = [PYTHON, "pretrain_multimodal.py", *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)

    assert run().returncode == 2
    wrong = run("--config", str(RECIPES / "synapse-tiny.yaml"), "--trainn-iters", "3")
    assert wrong.returncode == 2 and "train-iters" in wrong.stdout + wrong.stderr
    given = ["--config", str(RECIPES / "synapse-tiny.yaml"), "--dry-run", "--data.horizontal-flip", "1.5"]
    wrong = run(*given)
    assert wrong.returncode == 2 and "horizontal_flip" in wrong.stdout + wrong.stderr
    assert "less than or equal to 1" in " ".join((wrong.stdout + wrong.stderr).split())
    shown = run("--help")
    assert shown.returncode == 0 and "--tensor-model-parallel-size" in shown.stdout
