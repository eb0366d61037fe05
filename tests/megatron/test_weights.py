"""HF weights go into every layout and come back bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from hf_reference import hf_config, hf_model
from safetensors.torch import load_file
from torch import Tensor

from flowrl.megatron.layout import Layout, initialize
from flowrl.megatron.model import FlowModel, build_chunks
from flowrl.megatron.weights import export_hf_weights, load_hf_weights
from flowrl.partition import PartitionNetwork
from flowrl.rollout.publication import expected_weights

LAYOUTS = {
    "single": Layout(),
    "tp2": Layout(tensor=2),
    "tp2-sp": Layout(tensor=2, sequence_parallel=True),
    "tp4-of-2-groups": Layout(tensor=4),
    "pp2": Layout(pipeline=2),
    "pp2-vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "tp2-pp2": Layout(tensor=2, pipeline=2),
    "tp2-pp2-vpp2": Layout(tensor=2, pipeline=2, virtual_pipeline=2),
    "pp4": Layout(pipeline=4),
}


EXPERT_LAYOUTS = {
    "single": Layout(),
    "ep2": Layout(expert=2),
    "ep4": Layout(expert=4),
    "tp2-sp-ep2": Layout(tensor=2, expert=2, sequence_parallel=True),
    "pp2-vpp2-ep2": Layout(pipeline=2, virtual_pipeline=2, expert=2),
}


def build(kind: str, tied: bool, layout: Layout, dtype: torch.dtype) -> list[FlowModel]:
    """Chunks whose weights and Z are all NaN."""
    initialize(layout)
    partition = PartitionNetwork(16)
    chunks = build_chunks(hf_config(kind, tied=tied), layout, dtype, partition=partition)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    return chunks


def round_trip(
    rank: int, kind: str, tied: bool, layout: Layout, source: Any
) -> tuple[dict[str, Tensor], bool, list[Tensor]]:
    """What is exported, whether Z was left alone, and the rows of the output weight."""
    chunks = build(kind, tied, layout, torch.bfloat16)
    load_hf_weights(chunks, source)
    exported = dict(export_hf_weights(chunks))
    last, rows = chunks[-1], []
    if last.post_process:
        weight = last.output_weight().detach()
        rows = [weight[: last.num_vocab_rows], weight[last.num_vocab_rows :]]
    z = last.partition
    return exported, z is None or all(p.isnan().all() for p in z.parameters()), rows


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("name", "kind"), [*zip(LAYOUTS, ["llama", "qwen2", "qwen3"] * 3, strict=True)], ids=LAYOUTS
)
def test_round_trip_is_bit_exact(name: str, kind: str, tied: bool) -> None:
    layout = LAYOUTS[name]
    truth = hf_model(hf_config(kind, tied=tied), torch.bfloat16).state_dict()
    pairs = list(truth.items())
    results = run_ranks(layout.model_ranks, round_trip, kind, tied, layout, pairs)
    expected = [n for n in truth if not (tied and n == "lm_head.weight")]
    for exported, is_z_kept, _ in results:
        assert is_z_kept
        assert sorted(exported) == sorted(expected)
        assert all(torch.equal(exported[n], truth[n]) for n in expected)
    shards = [rows for _, _, rows in results if rows]
    assert len(shards) == layout.tensor
    assert torch.equal(torch.cat([real for real, _ in shards]), truth["lm_head.weight"])
    assert all(torch.equal(padding, torch.zeros_like(padding)) for _, padding in shards)


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_round_trip_of_experts_is_bit_exact(name: str, tmp_path: Path) -> None:
    """From a model's own tensors, and from files, which name the experts one by one."""
    layout, model = EXPERT_LAYOUTS[name], hf_model(hf_config("qwen3_moe"), torch.bfloat16)
    model.save_pretrained(tmp_path)
    truth = dict(model.named_parameters())
    files = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in files
    assert "model.layers.0.mlp.experts.gate_up_proj" in truth
    for source in ([*truth.items()], tmp_path):
        results = run_ranks(layout.model_ranks, round_trip, "qwen3_moe", False, layout, source)
        for exported, is_z_kept, _ in results:
            assert is_z_kept and exported.keys() == expected_weights(model.config).keys()
            assert all(torch.equal(exported[n], x) for n, x in truth.items())


def test_layers_come_in_order() -> None:
    layout = LAYOUTS["pp2-vpp2"]
    pairs = list(hf_model(hf_config("llama"), torch.bfloat16).state_dict().items())
    exported = run_ranks(2, round_trip, "llama", False, layout, pairs)[0][0]
    layers = [int(n.split(".")[2]) for n in exported if n.startswith("model.layers.")]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2, 3}
    assert list(exported)[0] == "model.embed_tokens.weight"
    assert list(exported)[-1] == "lm_head.weight"


def reads(rank: int, kind: str, layout: Layout) -> tuple[list[int], dict[str, Tensor]]:
    """How often each of the model's parameters is read, and the doubled values."""
    chunks = build(kind, False, layout, torch.bfloat16)
    load_hf_weights(chunks, hf_model(hf_config(kind), torch.bfloat16).named_parameters())
    counts = {p: 0 for c in chunks for n, p in c.named_parameters() if "partition." not in n}

    def read(parameter: torch.nn.Parameter) -> Tensor:
        counts[parameter] += 1
        return 2 * parameter.detach().float()

    doubled = dict(export_hf_weights(chunks, read=read, dtype=torch.float32))
    return list(counts.values()), doubled


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_what_is_read_once_may_have_another_dtype(kind: str) -> None:
    """A read may be a collective of its own, as that of masters and moments is."""
    layout = Layout(pipeline=2, expert=2) if kind == "qwen3_moe" else LAYOUTS["pp2"]
    truth = dict(hf_model(hf_config(kind), torch.bfloat16).named_parameters())
    for numbers, doubled in run_ranks(layout.model_ranks, reads, kind, layout):
        assert set(numbers) == {1}
        assert doubled.keys() == truth.keys()
        assert all(torch.equal(doubled[n], 2 * x.float()) for n, x in truth.items())


def other_dtype(rank: int) -> str:
    chunks = build("llama", False, Layout(), torch.bfloat16)
    with pytest.raises(ValueError) as caught:
        dict(export_hf_weights(chunks, read=lambda parameter: parameter.float()))
    return str(caught.value)


def test_a_read_of_another_dtype_than_announced_is_refused() -> None:
    (text,) = run_ranks(1, other_dtype)
    assert text == (
        "read returns torch.float32 for embedding.word_embeddings.weight, expected is "
        "torch.bfloat16: give dtype=torch.float32"
    )


@pytest.mark.parametrize("size", ["1GB", "2KB"], ids=["one-file", "many-files"])
def test_load_from_folder(size: str, tmp_path: Path) -> None:
    model = hf_model(hf_config("qwen2"), torch.float32)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "2KB")
    results = run_ranks(2, round_trip, "qwen2", False, LAYOUTS["tp2"], tmp_path)
    for exported, _, _ in results:
        # The weights have bfloat16 precision, so rounding to the model's dtype changes nothing.
        assert all(torch.equal(exported[n].float(), x) for n, x in model.state_dict().items())


def message(rank: int, source: Any, kind: str = "llama") -> str:
    chunks = build(kind, False, Layout(), torch.float32)
    with pytest.raises(ValueError) as caught:
        load_hf_weights(chunks, source)
    return str(caught.value)


def test_missing_weights_are_named() -> None:
    pairs = list(hf_model(hf_config("llama")).state_dict().items())
    kept = [(n, x) for n, x in pairs if "layers.2.mlp.up" not in n and n != "model.norm.weight"]
    text = run_ranks(1, message, kept)[0]
    assert "lacks 2 weights" in text and "model.layers.2.mlp.up_proj.weight" in text


def test_missing_expert_is_named(tmp_path: Path) -> None:
    model = hf_model(hf_config("qwen3_moe"), torch.bfloat16)
    model.save_pretrained(tmp_path)
    pairs = list(load_file(tmp_path / "model.safetensors").items())
    missing = "model.layers.2.mlp.experts.3.up_proj.weight"
    text = run_ranks(1, message, [(n, x) for n, x in pairs if n != missing], "qwen3_moe")[0]
    assert f"lacks 1 weights of the model, first {missing}" in text


def test_wrong_shape_is_refused() -> None:
    pairs = list(hf_model(hf_config("llama", intermediate_size=32)).state_dict().items())
    text = run_ranks(1, message, pairs)[0]
    assert "gate_proj" in text and "(64, 16)" in text and "(48, 16)" in text


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    assert "model.safetensors" in run_ranks(1, message, tmp_path)[0]
