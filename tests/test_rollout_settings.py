"""The settings of rollout engines: which ones have no effect, and the environment they start in."""

import os

import pytest

from flowrl.config import kept_environment, load_config

REQUIRED = ["model.path=m", "data.task=sums"]
VLLM = "rollout.engine=vllm"
SERVERS = "rollout.servers=['http://a:1']"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.verify_weights=false"], r"verify_weights = False.*needs rollout.engine=vllm$"),
        (["rollout.max_model_len=4096"], r"max_model_len = 4096.*needs rollout.engine=vllm$"),
        (["rollout.gpu_memory_utilization=0.4"], r"gpu_memory_utilization = 0.4 has no effect"),
        ([SERVERS], r"rollout.servers = \['http://a:1'\].*needs rollout.engine=vllm$"),
        ([VLLM, "rollout.tensor_model_parallel_size=2"], r"parallel_size = 2.*rollout.servers$"),
        ([VLLM, "rollout.weight_dir=/x"], r"weight_dir = /x.*rollout.servers$"),
        ([VLLM, "rollout.weight_transfer=nccl"], r"weight_transfer = nccl.*rollout.servers$"),
        (
            [VLLM, SERVERS, "rollout.weight_transfer=nccl", "rollout.weight_dir=/x"],
            r"weight_dir = /x has no effect with rollout.weight_transfer = nccl.*use disk$",
        ),
        ([VLLM, "rollout.max_retries=0"], r"max_retries = 0.*rollout.servers$"),
        ([VLLM, SERVERS, "rollout.free_cache_engine=true"], r"free_cache_engine = True.*process"),
        (
            [VLLM, "rollout.max_model_len=2047"],
            r"max_model_len = 2047 is below data.max_prompt_length \+ data.max_response_length = "
            r"2048; raise it, or leave it unset",
        ),
        ([VLLM, "rollout.gpu_memory_utilization=1.5"], r"`rollout.gpu_memory_utilization` = 1.5"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_settings_without_effect_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(None, [*REQUIRED, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [VLLM, "rollout.max_model_len=2048", "rollout.free_cache_engine=true"],
        [VLLM, SERVERS, "rollout.weight_dir=/x", "rollout.tensor_model_parallel_size=2"],
        [VLLM, SERVERS, "rollout.weight_transfer=nccl"],
    ],
    ids=["in process", "servers", "servers over the network"],
)
def test_settings_with_effect_are_taken(overrides: list[str]) -> None:
    assert load_config(None, [*REQUIRED, *overrides]).rollout.engine == "vllm"


def test_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWRL_TEST_USERS", "theirs")
    monkeypatch.setenv("FLOWRL_TEST_FORCED", "theirs")
    before = dict(os.environ)
    with kept_environment(
        {"FLOWRL_TEST_FORCED": "ours"}, {"FLOWRL_TEST_USERS": "ours", "FLOWRL_TEST_NEW": "ours"}
    ):
        found = [os.environ[f"FLOWRL_TEST_{name}"] for name in ("FORCED", "USERS", "NEW")]
        assert found == ["ours", "theirs", "ours"]
        os.environ["FLOWRL_TEST_LATER"] = "theirs"
        del os.environ["FLOWRL_TEST_USERS"]
    assert dict(os.environ) == before
