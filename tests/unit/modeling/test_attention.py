"""Who sees whom in a row, in each form; and the choice between the two attentions."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import lora_llava.modeling.attention as attention_module
import lora_llava.planning.attention as choice
from lora_llava.conversation.encode import IGNORE_INDEX, Encoded
from lora_llava.data.rows import Batch, build_row
from lora_llava.errors import TrainingError
from lora_llava.modeling.attention import (
    PACKED_ATTENTIONS,
    additive_mask,
    as_trees,
    attend_by_blocks,
    attend_by_tree,
    attention_of,
    check_attention,
    masked_inputs,
    set_attention,
    to_device,
    with_block_lists,
    with_sdpa,
)
from lora_llava.modeling.packed import llava_in, packed_logits
from lora_llava.modeling.structure import FLEX, SDPA, TREES
from tests.parity.test_packed import branches, build_model, row_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = build_model().config.text_config


def segments() -> torch.Tensor:
    """Two branches (3, 4 / 5) after a prefix of two tokens (1, 2); then a text (6, 7)."""
    skip = IGNORE_INDEX
    tree = [Encoded([1, 2, 3, 4], [skip, skip, skip, 4], 2), Encoded([1, 2, 5], [skip, skip, 5], 2)]
    return build_row([tree, [Encoded([6, 7], [skip, 7], 0)]])["segments"]


def test_mask_by_hand() -> None:
    mask = additive_mask(segments(), torch.float32)
    assert mask.shape == (1, 1, 7, 7)
    assert set(mask.unique().tolist()) == {0.0, -torch.inf}
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_trees_see_by_spans_what_the_mask_says() -> None:
    row = row_of([branches(4), branches(1), [*branches(2)]], torch.float32)
    dense = additive_mask(row["segments"], torch.float32)[0, 0]
    seen = torch.full_like(dense, -torch.inf)
    start = 0
    for tree in as_trees(row["tree_spans"].tolist(), row["segments"], torch.float32):
        own = seen[start : start + tree.length, start : start + tree.length]
        own[: tree.causal_length, : tree.causal_length] = torch.zeros(
            tree.causal_length, tree.causal_length
        ).masked_fill_(~torch.ones(tree.causal_length, tree.causal_length, dtype=torch.bool).tril(), -torch.inf)
        own[tree.causal_length :] = tree.mask[0, 0]
        start += tree.length
    assert torch.equal(seen, dense)


def random_row(seed: int, longest: int) -> Batch:
    """A row of at most `longest` tokens: trees with long prefixes, with none, and with many or few branches."""
    rng, trees, left = random.Random(seed), [], longest
    while left > 0 and len(trees) < 12:
        prefix = rng.choice([0, rng.randint(1, 30), rng.randint(100, 640)])
        tree = []
        for _ in range(rng.randint(1, 11) if prefix else 1):
            own = rng.choice([rng.randint(1, 60), rng.randint(1, 400)])
            left -= own + (0 if tree else prefix)
            if left < 0:
                break
            tree.append(Encoded([1] * (prefix + own), [IGNORE_INDEX] * (prefix + own), prefix))
        trees += [tree] if tree else []
    return build_row(trees)


PARTS = [f"{name}_{part}" for name in ("kv", "full_kv", "q", "full_q") for part in ("num_blocks", "indices")]


@pytest.mark.parametrize("seed", range(50))
def test_the_block_mask_is_that_of_torch(seed: int) -> None:
    row = random_row(seed, longest=random.Random(seed).choice([100, 1100, 2176]))
    inputs = masked_inputs(with_block_lists(row), FLEX, torch.float32)
    blocks, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    theirs = create_block_mask(blocks.mask_mod, None, None, length, length, device="cpu")
    assert torch.equal(blocks.to_dense(), theirs.to_dense())
    assert (blocks.shape, blocks.BLOCK_SIZE, blocks.seq_lengths) == (
        theirs.shape,
        theirs.BLOCK_SIZE,
        theirs.seq_lengths,
    )
    for name in PARTS:
        ours, expected = getattr(blocks, name), getattr(theirs, name)
        assert torch.equal(ours, expected), name
        assert ours.dtype == expected.dtype
        assert ours.is_contiguous()
    # And pair by pair, what the mask of any other attention says.
    rows = row["input_ids"].shape[1]
    dense = create_mask(blocks.mask_mod, None, None, length, length, device="cpu")[:, :, :rows, :rows]
    assert torch.equal(dense, additive_mask(row["segments"], torch.float32) == 0)


def test_a_row_without_lists_of_blocks_gets_them() -> None:
    row = random_row(0, longest=700)
    ours = masked_inputs(row, FLEX, torch.float32)["attention_mask"]
    theirs = masked_inputs(with_block_lists(row), FLEX, torch.float32)["attention_mask"]
    assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in PARTS)


def test_the_main_thread_makes_a_block_mask_within_two_milliseconds() -> None:
    tree = [Encoded([1] * 661, [IGNORE_INDEX] * 661, 620)] * 11
    row = with_block_lists(build_row([tree, tree]))
    assert masked_inputs(row, FLEX, torch.float32)["input_ids"].shape[1] == 2176
    times = []
    for _ in range(20):
        started = time.process_time()
        masked_inputs(row, FLEX, torch.float32)
        times.append(time.process_time() - started)
    assert min(times) < 2e-3


def test_flex_attention_is_compiled_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo's part of compiling decides what is compiled again; the part that makes kernels takes long.
    compiled = torch.compile(flex_attention, dynamic=True, backend="eager")
    monkeypatch.setattr(attention_module, "_compiled_flex_attention", lambda: compiled)
    before = counters["stats"]["unique_graphs"]
    for seed, longest in enumerate((100, 700, 1100, 2176)):
        inputs = masked_inputs(with_block_lists(random_row(seed, longest)), FLEX, torch.float32)
        length = inputs["input_ids"].shape[1]
        query, key, value = (torch.randn(1, 2, length, 16) for _ in range(3))
        ours, _ = attend_by_blocks(None, query, key, value, inputs["attention_mask"], scaling=0.3)
        mask = create_mask(inputs["attention_mask"].mask_mod, None, None, length, length, device="cpu")
        dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
        assert torch.allclose(ours, dense.transpose(1, 2), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "keys"), [(4, 2), (6, 2), (3, 3)])
def test_flex_attention_takes_grouped_keys(heads: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_compiled_flex_attention", lambda: flex_attention)
    row = row_of([branches(3), branches(1)], torch.float32)
    inputs = masked_inputs(row, FLEX, torch.float32)
    length = inputs["input_ids"].shape[1]
    query, key, value = (torch.randn(1, count, length, 16) for count in (heads, keys, keys))
    ours, weights = attend_by_blocks(None, query, key, value, inputs["attention_mask"], scaling=0.3)
    assert weights is None
    mask = create_mask(inputs["attention_mask"].mask_mod, None, None, length, length, device="cpu")
    dense = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert torch.allclose(ours, dense.transpose(1, 2), atol=1e-5)


def test_a_row_is_copied_without_waiting_and_its_spans_stay_on_the_host() -> None:
    copied = to_device(random_row(0, longest=100), torch.device("meta"))
    assert {name for name, tensor in copied.items() if tensor.device.type != "meta"} == {"tree_spans"}
    tensor: Any = SimpleNamespace(to=lambda device, *, non_blocking: (device.type, non_blocking))
    for name, waits in (("cuda", False), ("cpu", True)):
        assert to_device({"segments": tensor}, torch.device(name)) == {"segments": (name, not waits)}


# Not compiled here, which takes long: what is computed is the same.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_what_sdpa_does() -> None:
    model = build_model().eval()
    row = row_of([branches(4), branches(2)], torch.float32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        ours = packed_logits(model, row)
        set_attention(llava_in(model), FLEX)
        check_attention(llava_in(model))
        assert llava_in(model).config.text_config._attn_implementation in PACKED_ATTENTIONS
        theirs = packed_logits(model, row)
        with with_sdpa(llava_in(model)):
            assert attention_of(llava_in(model)) == SDPA
        assert attention_of(llava_in(model)) == FLEX
    assert llava_in(model).config.vision_config._attn_implementation == SDPA
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_mask_is_right_for_eager_attention_too() -> None:
    model = build_model()
    batch = row_of([branches(4), branches(2)], torch.float32)
    ours = packed_logits(model, batch)
    model.set_attn_implementation("eager")
    assert torch.allclose(ours, packed_logits(model, batch), atol=1e-5)


def test_eager_attention_is_refused() -> None:
    model = llava_in(build_model())
    check_attention(model)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="need sdpa_by_tree or flex_attention, the model has 'eager'"):
        check_attention(model)


def test_a_cpu_takes_sdpa_and_refuses_flex_attention() -> None:
    assert choice.pick_attention("auto", SHAPES, CPU, torch.float32)[0] == TREES
    assert choice.pick_attention("sdpa", SHAPES, CPU, torch.float32)[0] == TREES
    with pytest.raises(TrainingError, match=r"attn_implementation: .* no backward pass on a CPU; set auto or sdpa"):
        choice.pick_attention("flex_attention", SHAPES, CPU, torch.float32)


@pytest.mark.parametrize(
    ("setting", "seconds", "chosen"),
    [("auto", (2e-3, 1e-3), FLEX), ("auto", (1e-3, 2e-3), TREES), (FLEX, (1e-3, 2e-3), FLEX), (SDPA, None, TREES)],
)
def test_on_cuda_the_faster_is_taken_or_what_is_set(
    monkeypatch: pytest.MonkeyPatch, setting: str, seconds: tuple[float, float] | None, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(choice, "_compare", lambda *_: seconds)
    name, why = choice.pick_attention(setting, SHAPES, CUDA, torch.bfloat16)
    assert name == chosen
    assert why == "recipe" or ("flex_attention" in why and "sdpa" in why)


def test_flex_attention_that_fails_is_replaced_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no Triton\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(choice, "_compare", fail)
    name, why = choice.pick_attention("auto", SHAPES, CUDA, torch.bfloat16)
    assert (name, why) == (TREES, "auto: flex_attention does not work here (RuntimeError: no Triton)")
    with pytest.raises(TrainingError, match=r"no Triton.*set sdpa"):
        choice.pick_attention(FLEX, SHAPES, CUDA, torch.bfloat16)


def test_below_sm_80_flex_attention_is_tried_only_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    compared: list[Any] = []
    monkeypatch.setattr(choice, "_compare", lambda *options: compared.append(options) or (2e-3, 1e-3))
    name, why = choice.pick_attention("auto", SHAPES, CUDA, torch.float16)
    assert (name, compared) == (TREES, [])
    assert why == "auto: flex_attention is not tried on a card of compute capability 7.5"
    assert choice.pick_attention(FLEX, SHAPES, CUDA, torch.float16)[0] == FLEX
    assert len(compared) == 1


def test_attentions_are_compared_on_trees() -> None:
    tried = choice._trial_segments(choice._ROW, CPU)
    assert tried.shape == (2, choice._ROW)
    assert choice._trial_segments(choice._SHORT_ROW, CPU)[0].unique().tolist() == [0, 1]
    assert tried[0].unique().tolist() == [0, 1, 2, 3]
    assert tried[1].unique().tolist() == list(range(17))
    assert int((tried[1] == 0).sum()) == 4 * choice.PREFIX


def test_k32_masks_are_made_where_the_segments_are() -> None:
    places = segments().to("meta")
    assert additive_mask(places, torch.float32).device.type == "meta"
    assert additive_mask(places, torch.float32, torch.tensor([1, 2], device="meta")).shape == (1, 1, 2, 7)


def test_k32_sdpa_takes_plain_text_trees_and_the_positions_that_predict() -> None:
    row = row_of([branches(3), branches(1)], torch.float32)
    inputs = masked_inputs(row, TREES, torch.float32)
    # All ones: transformers then neither guesses a packing from the positions nor makes a mask.
    assert torch.equal(inputs.pop("attention_mask"), torch.ones_like(row["input_ids"]))
    first, second = inputs.pop("spans")
    assert (first.start, first.rest.stop) == (0, second.start) == (0, int(row["tree_spans"][0, 2]))
    queries = inputs.pop("last_queries")
    assert torch.equal(queries.positions, row["unique_target_positions"])
    assert torch.equal(queries.mask[0, 0], additive_mask(row["segments"], torch.float32)[0, 0, queries.positions])
    assert inputs.keys() == {"input_ids", "position_ids"}


def test_k32_rows_of_flex_attention_are_filled_up_with_tokens_that_nothing_sees() -> None:
    row = row_of([branches(3), branches(1)], torch.float32)
    inputs = masked_inputs(row, FLEX, torch.float32)
    length, whole = row["input_ids"].shape[1], inputs["input_ids"].shape[1]
    # At least two blocks.
    assert whole == max(256, -(-length // 128) * 128) > length
    assert inputs["position_ids"].shape[1] == whole
    assert torch.equal(inputs["input_ids"][:, :length], row["input_ids"])
    sees = create_mask(inputs["attention_mask"].mask_mod, None, None, whole, whole, device="cpu")[0, 0]
    assert not sees[length:, :length].any()
    assert not sees[:length, length:].any()


class Layer:
    """What attention asks a decoder layer's attention module."""

    num_key_value_groups = 1
    config = SimpleNamespace(num_hidden_layers=3)

    def __init__(self, index: int) -> None:
        self.layer_idx = index


def attended(
    index: int, scaling: float, width: int, at_the_end: bool, *, by_masks: bool = True
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Attend in layer `index` of three; returns that, plain softmax attention by the dense mask, and `places`."""
    row = row_of([branches(3), branches(1)], torch.float32)
    query, key, value = torch.randn(3, 1, 2, row["input_ids"].shape[1], width, generator=torch.manual_seed(0))
    inputs = masked_inputs(row, TREES, torch.float32)
    queries = inputs["last_queries"] if at_the_end else None
    form = {"spans": inputs["spans"]}
    if by_masks:
        # As on CUDA.
        form = {"trees": as_trees(row["tree_spans"].tolist(), row["segments"], torch.float32)}
    ours, weights = attend_by_tree(Layer(index), query, key, value, None, **form, scaling=scaling, last_queries=queries)
    assert weights is None
    scores = query @ key.transpose(2, 3) * scaling + additive_mask(row["segments"], torch.float32)
    return ours, (scores.softmax(-1) @ value).transpose(1, 2), row["unique_target_positions"].tolist()


# A width that is also the length of a tree must not be taken for it.
FIRST_TREE = int(row_of([branches(3), branches(1)], torch.float32)["tree_spans"][0, 2])


@pytest.mark.parametrize("scaling", [0.05, 1.0])
@pytest.mark.parametrize("width", [12, FIRST_TREE])
@pytest.mark.parametrize(("index", "at_the_end"), [(0, True), (1, True), (2, False)])
@pytest.mark.parametrize("by_masks", [True, False])
def test_k32_attention_by_trees_is_that_of_the_dense_mask(
    scaling: float, width: int, index: int, at_the_end: bool, by_masks: bool
) -> None:
    ours, dense, _ = attended(index, scaling, width, at_the_end, by_masks=by_masks)
    assert torch.allclose(ours, dense, atol=1e-5)


def test_k32_the_last_layer_attends_where_something_is_predicted_and_nowhere_else() -> None:
    ours, dense, places = attended(2, 0.3, 12, at_the_end=True)
    assert torch.allclose(ours[:, places], dense[:, places], atol=1e-5)
    ours[:, places] = 0
    assert not ours.any()
