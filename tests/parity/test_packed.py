"""Conversations packed in one row, against each on its own through LLaVA's own loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lora_llava.modeling.attention as attention_module
import lora_llava.modeling.packed as packed_module
from lora_llava.conversation.encode import Encoded, ImageTokens, Turn, encode
from lora_llava.conversation.templates import get_template
from lora_llava.data.rows import Batch, build_row
from lora_llava.modeling.attention import additive_mask, set_attention, with_sdpa
from lora_llava.modeling.packed import llava_in, packed_logits, packed_loss
from lora_llava.modeling.stages import build_stage
from lora_llava.modeling.structure import LANGUAGE_MODEL, SDPA, TREES
from lora_llava.recipe.settings import AdapterSettings
from tests.helpers.tiny import IMAGE_ID, IMAGE_SIZE, NUM_IMAGE_TOKENS, tiny_llava, tiny_tokenizer

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}
QUESTIONS = ("What is in the image?", "Is it red?", "Why?", "Where is the other one, and what is it on?")
ANSWERS = ("a thing", "yes", "no one knows the answer", "it is on the table")

Tree = Sequence[Encoded]
Gradients = dict[str, torch.Tensor]


def build_model(dtype: torch.dtype = torch.float32, kind: str = "lora", layers: int = 2) -> Any:
    """A tiny LLaVA in stage instruct; LoRA's B is not zero, so that every gradient counts."""
    torch.manual_seed(0)
    model = build_stage(tiny_llava(seed=3, layers=layers), "instruct", AdapterSettings(type=kind, r=4, lora_alpha=8.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    set_attention(llava_in(model), TREES)
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def model(request: pytest.FixtureRequest) -> Any:
    return build_model(request.param)


def dtype_of(model: Any) -> torch.dtype:
    return next(model.parameters()).dtype


def conversation(*texts: str, template: str = "vicuna_v1") -> Encoded:
    return encode(
        [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)],
        get_template(template),
        tiny_tokenizer(),
        image_tokens=ImageTokens(IMAGE_ID, NUM_IMAGE_TOKENS),
        max_length=400,
        where="test",
    )


def branches(count: int, start: int = 0) -> list[Encoded]:
    """Questions about one image, of one or two turns."""
    made = []
    for number in range(start, start + count):
        texts = [f"<image>\n{QUESTIONS[number % 4]}", ANSWERS[number % 3]]
        if number % 3 == 1:
            texts += [QUESTIONS[(number + 1) % 4], ANSWERS[(number + 2) % 4]]
        made.append(conversation(*texts))
    return made


def image(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def has_image(tree: Tree) -> bool:
    return IMAGE_ID in tree[0].input_ids


def row_of(trees: Sequence[Tree], dtype: torch.dtype) -> Batch:
    """Pack trees in one row; each tree with an image has its own image."""
    batch = build_row(trees)
    images = [image(number, dtype) for number, tree in enumerate(trees) if has_image(tree)]
    if images:
        batch["pixel_values"] = torch.stack(images)
    return batch


def gradients(model: Any, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def own_loss(model: Any, encoded: Encoded, pixels: torch.Tensor | None) -> torch.Tensor:
    """The loss of LlavaForConditionalGeneration itself: the mean over one conversation."""
    ids = torch.tensor([encoded.input_ids])
    with with_sdpa(llava_in(model)):
        loss: torch.Tensor = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            labels=torch.tensor([encoded.labels]),
        ).loss
    return loss


def separate(model: Any, trees: Sequence[Tree]) -> tuple[torch.Tensor, Gradients]:
    """Each conversation on its own, weighted by its share of the supervised tokens."""
    total = sum(branch.num_supervised for tree in trees for branch in tree)
    loss = torch.zeros((), dtype=torch.float64)
    for number, tree in enumerate(trees):
        pixels = image(number, dtype_of(model))[None] if has_image(tree) else None
        for branch in tree:
            loss = loss + own_loss(model, branch, pixels).double() * branch.num_supervised / total
    return loss.detach(), gradients(model, loss)


def packed(model: Any, trees: Sequence[Tree]) -> tuple[torch.Tensor, Gradients]:
    batch = row_of(trees, dtype_of(model))
    loss = packed_loss(model, batch, batch["shift_labels"].numel())
    return loss.detach(), gradients(model, loss)


def error(ours: Gradients, theirs: Gradients) -> float:
    """Relative error of all gradients together."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return float((difference / sum(float(one.square().sum()) for one in theirs.values())) ** 0.5)


@pytest.mark.parametrize("count", [1, 2, 5, 11])
def test_a_tree_equals_its_conversations_one_by_one(model: Any, count: int) -> None:
    ours_loss, ours = packed(model, [branches(count)])
    theirs_loss, theirs = separate(model, [branches(count)])
    tolerance = TOLERANCE[dtype_of(model)]
    assert float(ours_loss) == pytest.approx(float(theirs_loss), rel=1e-6)
    assert error(ours, theirs) < tolerance
    parts = [["lora_A"], ["lora_B"], ["multi_modal_projector"]]
    for part in parts:
        names = [name for name in theirs if part[0] in name]
        assert names
        assert error({n: ours[n] for n in names}, {n: theirs[n] for n in names}) < tolerance * 3


@pytest.mark.parametrize("text_first", [True, False])
def test_a_row_of_several_trees_equals_its_conversations(model: Any, text_first: bool) -> None:
    text = [conversation("Who is it?", "no one")]
    later = [conversation("Look at this.", "yes", "<image>\nWhat is it?", "a thing")]
    trees: list[Tree] = [branches(3), branches(1, 3), later, branches(2, 4)]
    trees = [text, *trees] if text_first else [*trees, text]
    ours_loss, ours = packed(model, trees)
    theirs_loss, theirs = separate(model, trees)
    assert float(ours_loss) == pytest.approx(float(theirs_loss), rel=1e-6)
    assert error(ours, theirs) < TOLERANCE[dtype_of(model)]


@pytest.mark.fault("training: gradient accumulation that changes the loss")
def test_rows_of_a_step_add_up_to_the_step(model: Any) -> None:
    trees = [branches(3), branches(2, 3)]
    total = sum(branch.num_supervised for tree in trees for branch in tree)
    _, whole = packed(model, trees)
    rows = [row_of([trees[0]], dtype_of(model)), build_row([trees[1]])]
    rows[1]["pixel_values"] = image(1, dtype_of(model))[None]
    loss = packed_loss(model, rows[0], total) + packed_loss(model, rows[1], total)
    assert error(gradients(model, loss), whole) < TOLERANCE[dtype_of(model)]


def test_a_dense_mask_computes_the_same(model: Any) -> None:
    trees = [branches(3), branches(1, 3), branches(2, 4)]
    _, ours = packed(model, trees)
    with with_sdpa(llava_in(model)):
        _, theirs = packed(model, trees)
    assert error(ours, theirs) < TOLERANCE[dtype_of(model)]


def test_dora_too() -> None:
    model = build_model(kind="dora")
    assert error(packed(model, [branches(4)])[1], separate(model, [branches(4)])[1]) < 1e-5


@pytest.mark.fault("records: some with an image, some without")
def test_text_only() -> None:
    model = build_model()
    texts: list[Tree] = [[conversation("Who is it?", "no one")], [conversation("Why?", "yes", "And?", "no")]]
    assert error(packed(model, texts)[1], separate(model, texts)[1]) < 1e-5


def test_loss_of_one_sample_is_the_models_own(model: Any) -> None:
    for number in range(4):
        (one,) = branches(1, number)
        with torch.no_grad():
            theirs = own_loss(model, one, image(0, dtype_of(model))[None])
        assert float(packed(model, [[one]])[0]) == pytest.approx(float(theirs), rel=1e-6)


def test_captions_are_predicted_from_the_last_image_token(model: Any) -> None:
    captions = [conversation("<image>", text, template="plain") for text in ("a thing", "the other", "it is")]
    batch = build_row([captions])
    prefix = captions[0].prefix_length
    firsts = [caption.input_ids[prefix] for caption in captions]
    at_prefix = (batch["target_positions"] == prefix - 1).nonzero().flatten()
    assert batch["shift_labels"][at_prefix].tolist() == firsts
    assert batch["input_ids"][0, prefix - 1] == IMAGE_ID
    assert error(packed(model, [captions])[1], separate(model, [captions])[1]) < TOLERANCE[dtype_of(model)]


def logits_by_branch(model: Any, tree: Tree) -> list[torch.Tensor]:
    with torch.no_grad():
        logits = packed_logits(model, row_of([tree], dtype_of(model)))
    return list(logits.split([branch.num_supervised for branch in tree]))


def test_a_branch_does_not_see_the_others() -> None:
    model = build_model()
    tree = branches(4)
    prefix = tree[1].prefix_length
    changed = [7 + (token + 1) % 200 for token in tree[1].input_ids[prefix:]]
    other = Encoded(tree[1].input_ids[:prefix] + changed, tree[1].labels, prefix)
    before = logits_by_branch(model, tree)
    after = logits_by_branch(model, [tree[0], other, *tree[2:]])
    assert not torch.equal(before[1], after[1])
    for place in (0, 2, 3):
        assert torch.equal(before[place], after[place])


def test_the_order_of_branches_does_not_matter(model: Any) -> None:
    tree = branches(5)
    there, back = packed(model, [tree]), packed(model, [tree[::-1]])
    assert float(there[0]) == pytest.approx(float(back[0]), rel=1e-6)
    assert error(there[1], back[1]) < TOLERANCE[dtype_of(model)]


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_long_row_in_chunks_has_the_same_loss_and_gradients(
    model: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(model, [branches(6)])
    monkeypatch.setattr(packed_module, "HEAD_CHUNK", chunk)
    in_chunks = packed(model, [branches(6)])
    assert float(in_chunks[0]) == pytest.approx(float(whole[0]), rel=1e-6)
    assert error(in_chunks[1], whole[1]) < TOLERANCE[dtype_of(model)] / 10


def test_the_model_has_its_head_again_even_after_an_error(model: Any) -> None:
    head = model.get_base_model().lm_head
    with pytest.raises(RuntimeError):
        packed_logits(model, row_of([branches(1)], dtype_of(model)) | {"position_ids": torch.zeros(1, 999)})
    assert model.get_base_model().lm_head is head


def test_image_tokens_without_features_are_an_error_and_leave_no_hook(model: Any) -> None:
    row = row_of([branches(1), branches(1, 1)], dtype_of(model))
    with torch.no_grad():
        expected = packed_logits(model, row)
        with pytest.raises(ValueError, match="8 image tokens, but features for 4"):
            packed_logits(model, row | {"pixel_values": row["pixel_values"][:1]})
        assert torch.equal(packed_logits(model, row), expected)


def with_eager_attention(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """A bool mask, which eager attention adds."""
    monkeypatch.setattr(attention_module, "additive_mask", lambda *inputs: additive_mask(*inputs) == 0)
    model.set_attn_implementation("eager")
    return batch


def without_mask(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Batch:
    set_attention(llava_in(model), SDPA)
    monkeypatch.setattr(attention_module, "additive_mask", lambda *_: None)
    return batch


def as_plain_text(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Trees whose later branches see the earlier ones."""
    tree, branch = batch["segments"]
    return batch | {"segments": torch.stack([tree, branch.clamp(max=1)])}


def with_linear_positions(model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Batch:
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


@pytest.mark.parametrize("mistake", [with_eager_attention, without_mask, as_plain_text, with_linear_positions])
def test_the_silent_mistakes_would_be_seen_here(
    mistake: Callable[[Any, Batch, pytest.MonkeyPatch], Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    trees = [branches(4)]
    _, theirs = separate(model, trees)
    batch = mistake(model, row_of(trees, torch.float32), monkeypatch)
    loss = F.cross_entropy(packed_logits(model, batch).float(), batch["shift_labels"])
    assert error(gradients(model, loss), theirs) > 1e-3


def test_k32_of_more_than_two_layers_the_last_is_the_one_cut_short() -> None:
    deep = build_model(layers=3)
    trees = [branches(3), branches(2)]
    ours_loss, ours = packed(deep, trees)
    theirs_loss, theirs = separate(deep, trees)
    assert float(ours_loss) == pytest.approx(float(theirs_loss), rel=1e-6)
    assert error(ours, theirs) < TOLERANCE[torch.float32]


def test_the_last_layer_computes_only_where_a_token_is_predicted(model: Any) -> None:
    row = row_of([branches(3)], dtype_of(model))
    seen: list[int] = []
    handles = [
        module.base_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[1]))
        for layer in llava_in(model).get_submodule(LANGUAGE_MODEL).layers
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj)
    ]
    with torch.no_grad():
        packed_logits(model, row)
    for handle in handles:
        handle.remove()
    assert seen == [row["input_ids"].shape[1]] * 3 + [len(row["unique_target_positions"])] * 3


class Wrapper(torch.nn.Module):
    """Wraps a model as data parallelism does, and keeps what it was called with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> Any:
        self.seen = inputs
        return self.module(**inputs)


def test_k32_a_wrapped_model_is_called_as_a_whole_and_keeps_no_cache(model: Any) -> None:
    wrapper, row = Wrapper(model), row_of([branches(2)], dtype_of(model))
    count = row["shift_labels"].numel()
    assert torch.equal(packed_loss(wrapper, row, count), packed_loss(model, row, count))
    assert wrapper.seen["use_cache"] is False
    assert llava_in(wrapper) is llava_in(model)


def test_k32_a_model_without_an_adapter_is_its_own_llava() -> None:
    plain = tiny_llava()
    assert llava_in(plain) is plain


@pytest.mark.parametrize("chunk", [1, 1000])
def test_k32_gradients_can_be_asked_for_without_a_backward_pass(
    model: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    # As the guard does, which looks for the record whose gradient is not finite.
    monkeypatch.setattr(packed_module, "HEAD_CHUNK", chunk)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    row = row_of([branches(3)], dtype_of(model))
    loss = packed_loss(model, row, row["shift_labels"].numel())
    found = torch.autograd.grad(loss, list(trained.values()))
    assert error(dict(zip(trained, found, strict=True)), separate(model, [branches(3)])[1]) < TOLERANCE[dtype_of(model)]


@pytest.mark.parametrize(
    ("spare", "calls"),
    # One full chunk is kept for the backward pass; of two, each is computed a second time there.
    [(0, 1), (-1, 4)],
)
def test_k32_only_several_chunks_of_the_head_are_computed_again(
    model: Any, monkeypatch: pytest.MonkeyPatch, spare: int, calls: int
) -> None:
    row = row_of([branches(3)], dtype_of(model))
    count = row["shift_labels"].numel()
    monkeypatch.setattr(packed_module, "HEAD_CHUNK", count + spare)
    seen: list[int] = []
    handle = llava_in(model).lm_head.register_forward_hook(lambda *_: seen.append(1))
    gradients(model, packed_loss(model, row, count))
    handle.remove()
    assert len(seen) == calls


def test_k32_labels_without_a_hidden_state_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "HEAD_CHUNK", 2)
    with pytest.raises(ValueError, match="zip"):
        packed_module._in_chunks(lambda hidden, _: hidden, torch.ones(4, 8), torch.zeros(6, dtype=torch.long))
