"""What the sections of the four systems refuse: field, value and what would be right are named."""

from __future__ import annotations

import pytest

from megatron_mm.config.load import config_from_tree, load_config
from megatron_mm.config.plugins import load_plugin
from megatron_mm.config.schema import Config
from megatron_mm.config.section import changed
from megatron_mm.config.validate import check, parallel_sizes
from tests.support import recipes

AVT, VLM = recipes.small_avt, recipes.small_vlm
FUSION, DUAL = recipes.small_perceiver_fusion, recipes.small_dual_encoder


def refusal(config: Config, world: int = 1) -> str:
    """The message of the check."""
    with pytest.raises(ValueError) as caught:
        check(config, parallel_sizes(config, world))
    return str(caught.value)


@pytest.mark.parametrize("recipe", [AVT, VLM, FUSION, DUAL])
def test_the_small_recipes_are_sound(recipe):
    config = recipe()
    check(config, parallel_sizes(config, 1))


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        (AVT, ("masked_lm_weight", "contrastive_weight", "generation_weight")),
        (VLM, ("contrastive_weight", "causal_lm_weight")),
        (FUSION, ("contrastive_weight", "masked_lm_weight", "matching_weight")),
        (DUAL, ("contrastive_weight", "causal_lm_weight")),
    ],
)
def test_weights_that_teach_nothing_or_less(recipe, weights):
    message = refusal(recipe(**dict.fromkeys(weights, 0.0)))
    assert f"model: every weight is zero ({', '.join(weights)})" in message
    for weight in weights:
        assert f"model.{weight} is -0.5; a weight must not be negative" in refusal(recipe(**{weight: -0.5}))
        alone = recipe(**{**dict.fromkeys(weights, 0.0), weight: 1.0})
        check(alone, parallel_sizes(alone, 1))


def test_masked_autoencoding_beside_nothing_else_is_the_first_phase():
    message = refusal(DUAL(contrastive_weight=0.0, causal_lm_weight=0.0, mae_weight=1.0))
    assert "every weight is zero (contrastive_weight, causal_lm_weight)" in message
    assert "model.mae_weight is -1.0; a weight must not be negative" in refusal(DUAL(mae_weight=-1.0))


@pytest.mark.parametrize("recipe", [AVT, FUSION])
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_a_share_of_tokens_that_hides_none_or_all(recipe, ratio):
    message = refusal(recipe(mask_ratio=ratio))
    assert f"model.mask_ratio is {ratio}; it must lie strictly between 0 and 1" in message


@pytest.mark.parametrize("recipe", [VLM, DUAL])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_share_of_patches_that_hides_none_or_all(recipe, ratio):
    config = changed(recipe(phase="mae"), {"model.mae.mask_ratio": ratio})
    assert f"model.mae.mask_ratio is {ratio}; it must lie strictly between 0 and 1" in refusal(config)


@pytest.mark.parametrize(
    ("recipe", "size", "ratio", "message"),
    [
        (lambda: VLM(phase="mae"), 32, 0.95, ".mask_ratio is 0.95: of an image's 16 patches it hides all; at most"),
        (DUAL, 32, 0.95, ".mask_ratio is 0.95: of an image's 16 patches it hides all; at most 0.9375 leaves one"),
        (DUAL, 160, 0.9999, ".mask_ratio is 0.9999: of an image's 400 patches it hides all; at most 0.9974 leaves one"),
        (DUAL, 32, 1e-17, ".mask_ratio is 1e-17: of an image's 16 patches it hides none; at least 0.0625 hides one"),
        (DUAL, 8, 0.75, ": an image is 1 patch, so none can be hidden while others are seen"),
    ],
)
def test_a_share_that_in_effect_hides_all_or_none_of_so_few_patches(recipe, size, ratio, message):
    config = changed(recipe(), {"model.vision.image_size": size, "model.mae.mask_ratio": ratio})
    assert f"model.mae{message}" in refusal(config)
    if "at most" in message:
        config = changed(config, {"model.mae.mask_ratio": float(refusal(config).partition("at most ")[2].split()[0])})
        check(config, parallel_sizes(config, 1))
        assert config.model.mae.visible_patches(config.model.vision.num_patches) == 1


def test_a_share_of_patches_counts_only_where_masks_are_used():
    for config in (VLM(), DUAL(mae_weight=0.0)):
        config = changed(config, {"model.mae.mask_ratio": 0.95})
        check(config, parallel_sizes(config, 1))
    config = changed(DUAL(), {"model.vision.patch_size": 0})
    assert "does not divide by model.vision.patch_size = 0" in refusal(config)


@pytest.mark.parametrize("recipe", [AVT, VLM, FUSION, DUAL])
def test_one_sample_teaches_a_contrastive_loss_nothing(recipe):
    config = changed(
        recipe(),
        {
            "training.micro_batch_size": 1,
            "training.global_batch_size": 1,
            "model.contrastive.negatives": "batch",
        },
    )
    assert "training.global_batch_size is 1: a contrastive loss needs at least two samples" in refusal(config)
    config = changed(config, {"training.global_batch_size": 8, "model.contrastive.negatives": "microbatch"})
    message = refusal(config)
    assert "training.micro_batch_size 1 x data parallel 1 leaves a contrastive loss one sample" in message
    assert "take more, or model.contrastive.negatives: batch" in message
    config = changed(config, {"model.contrastive.negatives": "batch"})
    if recipe is FUSION:
        assert "leaves image-text matching no wrong pair" in refusal(config)
        config = changed(config, {"model.matching_weight": 0.0})
    check(config, parallel_sizes(config, 1))


def test_a_contrastive_weight_of_zero_or_another_phase_asks_for_no_company():
    unweighted = {"contrastive_weight": 0.0, "causal_lm_weight": 0.0}
    for config in (VLM(contrastive_weight=0.0), VLM(phase="mae"), DUAL(phase="mae"), VLM(phase="mae", **unweighted)):
        config = changed(config, {"training.micro_batch_size": 1, "training.global_batch_size": 1})
        check(config, parallel_sizes(config, 1))


@pytest.mark.parametrize(
    ("recipe", "part", "field", "message"),
    [
        (AVT, "fusion", "num_attention_heads", "model.fusion.num_attention_heads is 2, which does not divide by"),
        (AVT, "decoder", "num_query_groups", "model.decoder.num_query_groups is 2, which does not divide by"),
        (AVT, "audio", "num_attention_heads", "model.audio.num_attention_heads is 2, which does not divide by"),
        (AVT, "vision", "num_heads", "model.vision.num_heads of stage 0 is 2, which does not divide by"),
        (VLM, "vision", "num_attention_heads", "model.vision.num_attention_heads is 2, which does not divide by"),
        (VLM, "mae", "num_attention_heads", "model.mae.num_attention_heads is 2, which does not divide by"),
        (FUSION, "text", "num_attention_heads", "model.text.num_attention_heads is 2, which does not divide by"),
        (FUSION, "perceiver", "num_attention_heads", "model.perceiver.num_attention_heads is 2, which does not"),
        (DUAL, "fusion", "num_attention_heads", "model.fusion.num_attention_heads is 2, which does not divide by"),
    ],
)
def test_heads_that_tensor_parallelism_would_split(recipe, part, field, message):
    """Four processes share two heads."""
    heads = [2, 2] if field == "num_heads" else 2
    config = changed(recipe(), {f"model.{part}.{field}": heads, "parallel.tensor_model_parallel_size": 4})
    found = refusal(config, 4)
    assert message in found and "parallel.tensor_model_parallel_size = 4" in found


@pytest.mark.parametrize(
    ("config", "path", "value", "message"),
    [
        (AVT, "model.masked_lm_share", 1.5, "model.masked_lm_share is 1.5; it must lie between 0 and 1"),
        (AVT, "data.frames_per_video", 3, "data.frames_per_video is 3, which does not divide by model.vision.temporal"),
        (AVT, "data.frames_per_video", 0, "data.frames_per_video is 0"),
        (AVT, "model.audio.conv_kernel_size", 4, "model.audio.conv_kernel_size is 4; it must be odd"),
        (AVT, "model.audio.seconds", 0.001, "model.audio.seconds is 0.001: too short"),
        (VLM, "model.cross_attention.first_layer", 0, "model.cross_attention: first_layer 0 and every 1 do not lie"),
        (VLM, "model.cross_attention.first_layer", 4, "first_layer 4 and every 1 do not lie within 1 … 3"),
        (VLM, "model.contrastive.temperature", 0.0, "model.contrastive.temperature is 0.0; it must be positive"),
        (VLM, "model.contrastive.temperature", 0.005, "would begin with 200, above model.contrastive.max_scale 100"),
        (FUSION, "data.seq_length", 40, "data.seq_length is 40, which does not divide by model.text.segment_length"),
        (FUSION, "data.seq_length", 16, "data.seq_length is 16; model.max_positions, one output query a token, is 32"),
        (FUSION, "model.vision.hidden_size", 64, "so they must be equal"),
        (DUAL, "data.seq_length", 33, "data.seq_length is 33, above model.text.max_positions 32"),
        (DUAL, "model.fusion.num_attention_heads", 5, "model.text.hidden_size is 64, which does not divide by"),
    ],
)
def test_values_that_do_not_fit(config, path, value, message):
    assert message in refusal(changed(config(), {path: value}))


def test_microbatches_of_an_objective_without_weight():
    message = refusal(AVT(masked_lm_share=0.0, generation_weight=0.0))
    assert "model.masked_lm_share is 0.0: no microbatch learns the one that has weight" in message
    assert "model.masked_lm_weight 1.0 and model.generation_weight 0.0" in message
    config = AVT(masked_lm_share=1.0)
    check(config, parallel_sizes(config, 1))


def test_unknown_systems_fields_and_plugins(tmp_path):
    with pytest.raises(ValueError, match=r"r\.yaml:\n  model\.system: there is no 'avt2'; known: synapse, avt, vlm"):
        config_from_tree({"model": {"system": "avt2"}}, "r.yaml")
    with pytest.raises(ValueError, match=r"model\.fusionn: there is no such field"):
        config_from_tree({"model": {"system": "avt", "fusionn": {}}}, "r.yaml")
    with pytest.raises(ValueError, match=r"model\.phase: .*'mae'.*'joint'.*not 'second'"):
        config_from_tree({"model": {"system": "vlm", "phase": "second"}}, "r.yaml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("plugins: [mine.py]\nmodel: {system: mine}\n")
    with pytest.raises(ValueError, match=r"plugins: there is no file mine\.py, neither here nor in .*"):
        load_config(recipe)
    recipe.write_text("plugins: [no_such_module_here]\nmodel: {system: mine}\n")
    with pytest.raises(ValueError, match="plugins: there is no module 'no_such_module_here'"):
        load_config(recipe)
    recipe.write_text("plugins: mine.py\nmodel: {system: mine}\n")
    with pytest.raises(ValueError, match=r"plugins: it must be a list of files or modules, not 'mine\.py'"):
        load_config(recipe)
    (tmp_path / "mine.py").write_text("nothing = 0\n")
    recipe.write_text("plugins: [mine.py]\nmodel: {system: mine}\n")
    with pytest.raises(ValueError, match=r"model\.system: there is no 'mine'; known: synapse"):
        load_config(recipe)


def test_plugins_of_one_name_in_two_folders_and_one_that_fails(tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(f"value = {value}\n")
    first, second = (load_plugin("own.py", tmp_path / name) for name in ("a", "b"))
    assert (first.value, second.value) == (1, 2) and load_plugin("own.py", tmp_path / "a") is first
    (tmp_path / "broken.py").write_text("half = 1\nraise RuntimeError('no')\n")
    for _ in range(2):  # not found half made the second time
        with pytest.raises(RuntimeError, match="no"):
            load_plugin("broken.py", tmp_path)
