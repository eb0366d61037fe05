"""A server that the vLLM tests share; starting one takes half a minute."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from vllm_models import write_model
from vllm_servers import ServerProcess


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """The folder and the weights of the model that the servers start with."""
    folder = tmp_path_factory.mktemp("served") / "model"
    return folder, write_model(folder)


@pytest.fixture(scope="session")
def shared_server(
    served_model: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server for every test that leaves it alive."""
    server = ServerProcess(served_model[0], tmp_path_factory.mktemp("server") / "server.log")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.close()
