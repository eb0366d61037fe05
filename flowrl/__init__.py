"""FlowRL: reinforcement learning of language models that matches the reward distribution."""

__version__ = "0.1.0"
