"""The planner of memory: its bytes against real tensors, and its choices."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.data.packing import PlanItem, RowSettings, SampledSteps, sample_steps
from lora_llava.data.rows import build_row
from lora_llava.errors import TrainingError
from lora_llava.formats.shapes import LlavaShape
from lora_llava.modeling.attention import set_attention
from lora_llava.modeling.base import BaseIdentity, load_base
from lora_llava.modeling.fused.layer import fuse_layers
from lora_llava.modeling.metadata import read_config
from lora_llava.modeling.packed import llava_in, packed_loss
from lora_llava.modeling.recompute import set_recompute
from lora_llava.modeling.stages import build_stage
from lora_llava.modeling.structure import FLEX, TREES, PartParameters, linear_weights, stage_parameters
from lora_llava.planning import memory_plan
from lora_llava.planning.memory import (
    CPU_HEAP,
    LayerSettings,
    Recompute,
    activation_bytes,
    expected_memory,
    in_4_bits,
    plain_scale_bytes,
)
from lora_llava.planning.memory_plan import GIB, MemoryPlan, StageShapes, plan_line, plan_memory, stage_shapes
from lora_llava.planning.speed import Machine
from lora_llava.recipe.settings import AdapterSettings, Recipe
from lora_llava.recipe.stages import StageName
from lora_llava.system.ranks import planned_for
from tests.helpers.shapes import llava_7b
from tests.helpers.tiny import tiny_config

STAGE: dict[str, Any] = {"data": {"path": "train.json"}}


def recipe(**changes: Any) -> Recipe:
    stage = STAGE | changes.pop("stage", {})
    return Recipe.model_validate(
        {"name": "x", "base": {"model_name_or_path": "x"}, "stages": {"instruct": stage, "align": stage}} | changes
    )


@cache
def table_of(rank: int, stage: StageName) -> list[PartParameters]:
    return stage_parameters(
        LlavaShape.of(llava_7b().to_dict()), stage, recipe(adapter={"r": rank}).adapter, torch.bfloat16
    )


def steps_of(items: list[PlanItem], batch_size: int = 128, branches: int = 8) -> SampledSteps:
    """Sample the steps of a stage, once for the same conversations: counting their rows takes longest."""
    return _steps_of(tuple(items), batch_size, branches)


@cache
def _steps_of(items: tuple[PlanItem, ...], batch_size: int, branches: int) -> SampledSteps:
    settings = RowSettings(max(item.length for item in items), branches)
    return sample_steps(items, settings, batch_size=batch_size, num_steps=10, seed=0)


def shapes_of(
    settings: Recipe,
    dtype: torch.dtype,
    longest: int,
    stage: StageName = "instruct",
    items: list[PlanItem] | None = None,
) -> StageShapes:
    """Shapes of the 7B model; without `items`, with 256 conversations of up to `longest` tokens that share nothing."""
    made = items or [PlanItem(longest - number % 7, 0, -1) for number in range(256)]
    parts = settings.stage(stage), settings.quantization, settings.adapter
    return StageShapes(stage, *parts, llava_7b(), dtype, longest, steps_of(made))


def plan(
    memory: float,
    chosen: Recipe | None = None,
    *,
    longest: int = 700,
    stage: StageName = "instruct",
    attention: str = FLEX,
) -> MemoryPlan:
    settings = chosen or recipe()
    shapes = shapes_of(settings, torch.bfloat16, longest, stage)
    return plan_memory(shapes, Machine("cuda", int(memory * GIB), attention))


@pytest.mark.parametrize("dequantized", [False, True])
def test_parameters_and_optimizer_take_what_their_tensors_take(tiny_base: Path, dequantized: bool) -> None:
    settings = recipe(adapter={"r": 4, "lora_alpha": 8.0})
    config = read_config(tiny_base)
    table = stage_parameters(LlavaShape.of(config.to_dict()), "instruct", settings.adapter, torch.float32)
    if not dequantized:
        table = in_4_bits(table, config, settings.quantization, torch.float32)
    loaded = load_base(
        tiny_base,
        BaseIdentity("tiny", None, ""),
        nf4=True,
        double_quant=True,
        keep_dequantized=dequantized,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    model = build_stage(loaded.model, "instruct", settings.adapter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    expected = expected_memory("adamw_torch", table)
    assert sum(row.gradients for row in expected) == sum(one.grad.nbytes for one in trained if one.grad is not None)
    assert sum(row.optimizer for row in expected) == sum(state.nbytes for state in states)
    scales = 0
    for module in model.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            scales += sum(one.nbytes for one in (state.absmax, state.state2.absmax))
    # PEFT holds the projector twice: the original and the trained copy.
    held = {id(one): one.nbytes for one in model.parameters()}
    assert sum(row.weights for row in expected) == pytest.approx(sum(held.values()) + scales, rel=0.01)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made under it, and the most that lived at one time; a model's own do not count."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        own = (*model.parameters(), *model.buffers(), *(one.grad for one in model.parameters() if one.grad is not None))
        self.known = {one.untyped_storage()._cdata for one in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.usefixtures("masked_trees")
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "PEFT"])
@pytest.mark.parametrize(
    "policy", [Recompute(False), Recompute("selective"), Recompute("selective", 4), Recompute(True)]
)
def test_activations_are_estimated_to_15_percent(policy: Recompute, is_fused: bool) -> None:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=512
    )
    config = LlavaConfig(vision_config=tiny_config().vision_config, text_config=text)
    model = build_stage(LlavaForConditionalGeneration(config), "instruct", AdapterSettings(r=16)).train()
    if is_fused:
        assert fuse_layers(model) is None
    set_recompute(model, policy.policy, policy.full_layers)
    set_attention(llava_in(model), TREES)
    prefix, own, targets = list(range(1500)), 137, 16
    tree = [
        Encoded(
            [place % 500 for place in prefix + list(range(number, number + own))],
            [IGNORE_INDEX] * (len(prefix) + own - targets) + [7] * targets,
            len(prefix),
        )
        for number in range(4)
    ]
    batch = build_row([tree])
    tokens, targets = len(prefix) + 4 * own, 4 * targets
    for parameter in model.parameters():
        # Gradients are counted with the parameters.
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with PeakBytes(model) as measured:
        packed_loss(model, batch, targets).backward()
    # The copies of LoRA's factors were made with the layers, before the measurement.
    layer = LayerSettings(torch.float32, lora_rank=16, is_fused=is_fused)
    estimate = activation_bytes(config, layer, policy, tokens, targets)
    sys.stdout.write(f"estimated {estimate / measured.peak:.3f} of the peak\n")
    assert estimate == pytest.approx(measured.peak, rel=0.15)


def test_scales_that_are_not_quantized_take_what_double_quantization_saves() -> None:
    plain, double = (
        sum(part.bytes for part in in_4_bits(table_of(64, "instruct"), llava_7b(), setting, torch.bfloat16))
        for setting in (recipe(quantization={"double_quant": is_double}).quantization for is_double in (False, True))
    )
    assert plain_scale_bytes(llava_7b()) == pytest.approx(plain - double, abs=1)


@pytest.mark.parametrize(
    ("dtype", "is_fused", "copied"),
    [(torch.float32, True, 4), (torch.bfloat16, True, 2), (torch.float32, False, 0), (torch.bfloat16, False, 2)],
)
def test_factors_of_lora_are_copied_by_fused_layers_and_by_autocast(
    dtype: torch.dtype, is_fused: bool, copied: int
) -> None:
    layer = LayerSettings(dtype, lora_rank=16, is_fused=is_fused)
    without, with_factors = (
        activation_bytes(llava_7b(), replace(layer, lora_parameters=count), Recompute(True), 1000, 100)
        for count in (0, 10**6)
    )
    assert with_factors - without == copied * 10**6


def test_more_memory_is_never_slower_and_everything_fits() -> None:
    plans = [plan(size) for size in (9, 10, 12, 16, 20, 24, 40, 80)]
    assert all(one.bytes_needed <= one.bytes_usable for one in plans)
    assert all(one.tokens_per_micro_batch >= 700 for one in plans)
    costs = [one.cost for one in plans]
    assert costs == sorted(costs, reverse=True)
    assert (plans[-1].recompute.policy, plans[-1].keep_dequantized, plans[-1].optim) == (False, True, "adamw_torch")
    assert plans[0].optim == "paged_adamw_8bit"


def test_what_the_recipe_says_is_kept() -> None:
    stage = {"tokens_per_micro_batch": 2048, "gradient_checkpointing": True, "optim": "paged_adamw_32bit"}
    chosen = plan(24, recipe(stage=stage, quantization={"keep_dequantized": False}))
    assert (chosen.tokens_per_micro_batch, chosen.recompute, chosen.optim, chosen.keep_dequantized) == (
        2048,
        Recompute(True),
        "paged_adamw_32bit",
        False,
    )


def test_weights_that_are_not_quantised_are_not_dequantised() -> None:
    assert not plan(80, recipe(quantization={"type": "none"})).keep_dequantized


def test_a_conversation_longer_than_a_usual_row_fits_alone() -> None:
    assert plan(80, recipe(stage={"max_length": 9000}), longest=9000).tokens_per_micro_batch == 9000


@pytest.mark.fault("training: too little GPU memory")
def test_too_little_memory_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(TrainingError, match=r"stage instruct: .* at least \d+\.\d GiB are needed, 4\.0 GiB") as error:
        plan(4)
    assert "adapter.r" in str(error.value)


@pytest.mark.parametrize("memory", [12, 16, 24])
def test_a_plan_in_fp16_needs_what_one_in_bf16_needs(memory: int) -> None:
    machine = Machine("cuda", memory * GIB, TREES)
    plans = [plan_memory(shapes_of(recipe(), dtype, 700), machine) for dtype in (torch.float16, torch.bfloat16)]
    assert plans[0] == plans[1]


def least(shapes: StageShapes) -> MemoryPlan:
    """The plan that needs the least memory."""
    return min(memory_plan._candidates(shapes, Machine("cuda", 12 * GIB, FLEX)), key=lambda one: one.bytes_needed)


@pytest.mark.parametrize(("quantization", "weight"), [("nf4", 0.5), ("none", 2.0)])
def test_sharding_divides_what_is_frozen_in_the_decoder_layers(quantization: str, weight: float) -> None:
    whole = shapes_of(recipe(quantization={"type": quantization}), torch.bfloat16, 700)
    size, layers = linear_weights(whole.config) * weight, 32
    needed = {shards: least(replace(whole, shards=shards)).bytes_needed for shards in (1, 2, 4, 32)}
    for shards in (2, 4):
        expected = size * (1 - 1 / shards - 3 / layers)
        assert needed[1] - needed[shards] == pytest.approx(expected, abs=2)
    # At most what is whole, however few layers there are.
    few = replace(whole, config=llava_7b(layers=2), shards=2)
    assert least(few).bytes_needed <= least(replace(few, shards=1)).bytes_needed


def test_a_sharded_model_is_not_dequantized_unless_the_recipe_says_so() -> None:
    machine = Machine("cuda", 80 * GIB, FLEX)
    whole = shapes_of(recipe(), torch.bfloat16, 700)
    assert plan_memory(whole, machine).keep_dequantized
    assert not plan_memory(replace(whole, shards=2), machine).keep_dequantized
    told = shapes_of(recipe(quantization={"keep_dequantized": True}), torch.bfloat16, 700)
    assert plan_memory(replace(told, shards=2), machine).keep_dequantized
    sharded = replace(whole, shards=2)
    assert "frozen weights in 2 parts" in plan_line(plan_memory(sharded, machine), sharded)


@pytest.mark.parametrize(("shard", "processes", "shards"), [(True, 3, 3), (False, 3, 1), (True, 1, 1)])
def test_a_recipe_shards_over_the_processes_of_its_run(shard: bool, processes: int, shards: int) -> None:
    records: Any = SimpleNamespace(longest=SimpleNamespace(length=2), sample_steps=lambda *_: None)
    with planned_for(processes):
        shapes = stage_shapes(recipe(distributed={"shard": shard}), "instruct", llava_7b(), torch.bfloat16, records)
    assert shapes.shards == shards


@pytest.mark.parametrize(("offload", "processes", "offloads"), [(True, 2, True), (False, 2, False), (True, 1, False)])
def test_the_optimizer_of_several_processes_moves_to_the_host(offload: bool, processes: int, offloads: bool) -> None:
    records: Any = SimpleNamespace(longest=SimpleNamespace(length=2), sample_steps=lambda *_: None)
    made = recipe(distributed={"engine": "deepspeed", "offload": True} if offload else {})
    with planned_for(processes):
        assert stage_shapes(made, "instruct", llava_7b(), torch.bfloat16, records).offloads == offloads


def test_an_offloaded_optimizer_needs_a_bucket_for_gradients() -> None:
    whole = shapes_of(recipe(), torch.bfloat16, 700)
    offloaded, machine = replace(whole, offloads=True), Machine("cuda", 8 * GIB, FLEX)
    trained = {part.part: 4 * part.trainable for part in whole.parameters}
    buckets = sum(min(size, 2**28) for size in trained.values())
    assert 0 < buckets < sum(trained.values()) / 2
    saved = least(replace(whole, settings=whole.settings.model_copy(update={"optim": "adamw_torch"}))).bytes_needed
    assert saved - least(offloaded).bytes_needed == 3 * sum(trained.values()) - buckets
    plan = plan_memory(offloaded, machine)
    assert plan.optim == "adamw_torch"
    assert ", gradients and optimizer on the host; needs" in plan_line(plan, offloaded)


def test_stage_one_needs_less() -> None:
    assert plan(12, stage="align").cost <= plan(12).cost


def test_a_row_is_as_long_as_a_tree_where_that_saves_the_image() -> None:
    items = [PlanItem(660 + number % 9, 616, number // 20) for number in range(200)]
    steps, cpu = steps_of(items, batch_size=40, branches=16), Machine("cpu", 64 * GIB, TREES)
    shapes = replace(shapes_of(recipe(), torch.float32, 668), steps=steps)
    tokens = plan_memory(shapes, cpu).tokens_per_micro_batch

    def computed(tokens: int) -> int:
        return int(steps.row_lengths(tokens).sum())

    assert computed(tokens) == computed(2048) < computed(1000) < computed(668) == steps.num_separate_tokens
    assert tokens >= 616 + 16 * 44


@pytest.mark.parametrize(("policy", "factor"), [(False, 1.0), ("selective", CPU_HEAP), (True, CPU_HEAP)])
def test_k67_on_a_cpu_the_plan_counts_what_the_heap_keeps_where_layers_are_computed_again(
    policy: Any, factor: float
) -> None:
    quantization = {"keep_dequantized": True}
    fixed = {"optim": "adamw_torch", "gradient_checkpointing": policy, "tokens_per_micro_batch": 1536}
    settings = recipe(stage=fixed, quantization=quantization)
    shapes = shapes_of(settings, torch.float32, 1024)
    needed = {device: plan_memory(shapes, Machine(device, 10**15, TREES)).bytes_needed for device in ("cpu", "cuda")}
    parameters = sum(part.total for part in expected_memory("adamw_torch", shapes.parameters))
    assert needed["cpu"] - parameters == pytest.approx(factor * (needed["cuda"] - parameters), abs=2)
