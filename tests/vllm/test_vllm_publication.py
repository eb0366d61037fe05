"""New weights in a running vLLM: all of them or none, and nothing of the old ones is used."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm_models import (
    assert_exact,
    need_vllm,
    random_weights,
    set_weights,
    vllm_engine,
    write_model,
)

from flowrl.rollout import SamplingParams
from flowrl.rollout.vllm_engine import VllmEngine

need_vllm()

PROMPTS = [[5, 6, 7, 8, 9, 10, 3], [4], [11, 12, 13]]
PARAMS = SamplingParams(n=4, max_tokens=12)
KINDS = {
    "llama tied": ("llama", True),
    "qwen2 untied": ("qwen2", False),  # with biases
    "qwen3_moe": ("qwen3_moe", False),
}


class Published:
    """An engine, and models of the weights that it should have, in float64 and float32."""

    def __init__(self, engine: VllmEngine, exact: PreTrainedModel, plain: PreTrainedModel) -> None:
        self.engine = engine
        self.exact = exact
        self.plain = plain
        self.version = 0

    def weights(self, seed: int) -> dict[str, Tensor]:
        return random_weights(self.plain, seed)

    def publish(self, weights: dict[str, Tensor]) -> None:
        self.version += 1
        self.engine.publish(weights.items(), self.version)
        set_weights(self.exact, weights)
        set_weights(self.plain, weights)

    def check(self, prompts: list[list[int]] = PROMPTS, params: SamplingParams = PARAMS) -> None:
        """The engine samples from the weights of the last publication."""
        groups = self.engine.generate(prompts, params, seed=self.version)
        assert {r.weight_version for group in groups for r in group} == {self.version}
        assert_exact(self.exact, self.plain, prompts, groups, params)


@pytest.fixture(scope="module", params=KINDS)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Published]:
    kind, tied = KINDS[request.param]
    folder = tmp_path_factory.mktemp("model")
    plain = write_model(folder, kind, tied=tied)
    exact = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",  # the default multiplies no float64
    )
    with vllm_engine(folder) as engine:
        yield Published(engine, exact.eval(), plain)


def test_every_weight_arrives(published: Published) -> None:
    published.check()
    for seed in (1, 2):
        published.publish(published.weights(seed))
        published.check()


def test_every_weight_arrives_in_any_order(published: Published) -> None:
    published.publish(dict(reversed(published.weights(3).items())))
    published.check()


def test_no_cached_prompt_survives(published: Published) -> None:
    prompts = [[4 + i * i % 11 for i in range(200)]]  # more than one block of 128
    params = SamplingParams(n=2, max_tokens=4)
    published.check(prompts, params)
    published.publish(published.weights(4))
    published.check(prompts, params)


def test_the_engine_has_weights_of_its_own(published: Published) -> None:
    weights = published.weights(5)
    given = {name: weight.clone() for name, weight in weights.items()}
    published.publish(given)
    assert all(torch.equal(given[name], weight) for name, weight in weights.items())
    for weight in given.values():
        weight.fill_(torch.nan)
    published.check()


def test_wrong_weights_change_nothing(published: Published) -> None:
    published.publish(published.weights(6))
    before = published.engine.generate(PROMPTS, PARAMS, seed=0)
    weights = published.weights(7)
    name = "model.layers.1.self_attn.k_proj.weight"
    wrong = [
        {n: w for n, w in weights.items() if n != name},
        {**weights, name: weights[name].T},
        {**weights, "model.layers.2.self_attn.k_proj.weight": weights[name]},
    ]
    for these in wrong:
        with pytest.raises(ValueError, match=r"layers.\d.self_attn.k_proj.weight"):
            published.engine.publish(these.items(), 99)
        assert published.engine.generate(PROMPTS, PARAMS, seed=0) == before


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"],
)
def test_a_failure_half_way_stops_sampling_until_a_publication_succeeds(
    published: Published, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = published.weights(8)
    without_data = {**weights, name: weights[name].to("meta")}  # cannot be copied from
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="version 98 failed"):
        published.engine.publish(without_data.items(), 98)
    assert "publication of version 98 failed, trying again" in caplog.text
    assert published.engine.weight_version == published.version
    with pytest.raises(RuntimeError, match=r"weights of two versions.*version 98"):
        published.engine.generate(PROMPTS, PARAMS, seed=0)
    with pytest.raises(ValueError, match="not published"):  # nor does one that is refused repair it
        published.engine.publish([], 99)
    with pytest.raises(RuntimeError, match="weights of two versions"):
        published.engine.generate(PROMPTS, PARAMS, seed=0)
    published.publish(published.weights(9))
    published.check()
