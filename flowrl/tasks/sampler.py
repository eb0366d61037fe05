"""Which prompts a training step takes: seeded epochs without loss or repetition."""

from collections.abc import Mapping
from typing import Any

from flowrl.tasks.permutation import fixed_permutation
from flowrl.tasks.prompts import shorten


class PromptSampler:
    """An endless stream of batches of prompt indices.

    Every epoch is a permutation of all prompts, given by (seed, epoch). A batch that an epoch
    cannot fill goes on with the next epoch, so every prompt is drawn once an epoch. No prompt is
    twice in a batch: the next epoch puts those of its prompts that are already in the shared batch
    behind it, the others keep their order.
    """

    def __init__(self, num_prompts: int, batch_size: int, seed: int, shuffle: bool = True):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give 1 or more")
        if batch_size > num_prompts:
            raise ValueError(
                f"batch_size is {batch_size}, more than the {num_prompts} prompts: "
                "lower data.train_batch_size, or load more prompts"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}: give 0 or more")
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._start(0, [])

    def next_batch(self) -> list[int]:
        """The next `batch_size` indices in 0 .. num_prompts-1, all different."""
        epoch, offset = divmod(self._position, self.num_prompts)
        batch = self._order[offset : offset + self.batch_size]
        position = self._position + self.batch_size
        if position < (epoch + 1) * self.num_prompts:
            self._position = position
            return batch
        carried = batch if len(batch) < self.batch_size else []
        self._start(position, carried)
        return batch + self._order[: self.batch_size - len(batch)] if carried else batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in types that JSON keeps.

        `position` counts the indices drawn; `carried` holds the indices of the previous epoch that
        shared a batch with the head of the current one (fewer than batch_size).
        """
        return {**self._identity(), "position": self._position, "carried": list(self._carried)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises ValueError if it comes from another prompt count, batch size, seed or order, or is
        damaged; the sampler then stays as it was.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved sampler has {name} {shorten(state.get(name))}, this run has "
                    f"{value}: resume with the same data, batch size and seed, or start anew"
                )
        position, carried = state.get("position"), state.get("carried")
        if not isinstance(position, int) or position < 0 or position % self.batch_size != 0:
            raise ValueError(
                f"the saved sampler has position {shorten(position)}, not a multiple of "
                f"{self.batch_size}: the checkpoint is damaged, take an earlier one"
            )
        num_carried = position // self.num_prompts * self.num_prompts % self.batch_size
        if (
            not isinstance(carried, list)
            or len(carried) != num_carried
            or not all(isinstance(i, int) and 0 <= i < self.num_prompts for i in carried)
            or len(set(carried)) != num_carried
        ):
            raise ValueError(
                f"the saved sampler has carried {shorten(carried)}, not {num_carried} prompt "
                "indices: the checkpoint is damaged, take an earlier one"
            )
        self._start(position, carried)

    def _identity(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_prompts,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def _start(self, position: int, carried: list[int]) -> None:
        """Stand at `position`, in an epoch whose first batch also holds `carried`."""
        self._position = position
        self._carried = list(carried)
        order = list(range(self.num_prompts))
        if self.shuffle:
            epoch = position // self.num_prompts
            order = fixed_permutation(self.num_prompts, f"sampler/{self.seed}/{epoch}").tolist()
        if carried:
            taken = set(carried)
            fresh = [index for index in order if index not in taken]
            head = fresh[: self.batch_size - len(carried)]
            rest = set(head)
            order = head + [index for index in order if index not in rest]
        self._order = order
