"""How often a letter occurs in a word."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowrl.tasks.few_shot import FewShotOptions, Question, Space, Split, few_shot_prompts
from flowrl.tasks.options import parse_options
from flowrl.tasks.prompts import Prompt

TEMPLATE = 'The letter "{a}" in "{b}": {c}\n'

_TEXT = """
address alligator almanac apple assembly attention avocado balloon banana barrier beekeeper believe
blossom bottle bubble buffalo butter button cabbage calendar camera candle carrot cassette ceiling
cellar cherry chocolate cinnamon circus clever coconut coffee committee copper corridor cotton
cricket crystal cucumber dagger dessert diamond dinner dolphin dragon eleven elephant emerald engine
evening feather fellow finger forest freedom galaxy garage garlic giraffe glacier goggles grammar
gravity guitar hammer harbor helmet hidden hollow honey horizon hurricane illness infinity insect
island jacket jelly jungle kangaroo kettle kitten ladder lantern lemon letter lettuce lizard lobster
luggage machine magnet mammal marble meadow melody mirror mississippi mitten monkey mountain muffin
mushroom needle nettle noodle nothing occasion ocean onion orange orchard oxygen paddle papaya
parallel parrot pebble penguin pepper pillow pineapple pizza planet poppy possess potato pumpkin
puppet puzzle pyramid quarrel quarter rabbit raccoon raisin ribbon river rubber saddle sailor salmon
scissors season seesaw shadow shallow silver skeleton slipper soccer sparrow spinach squirrel
station strawberry success summer sunflower supper swallow symbol tattoo temple tennis terrace
thunder tobacco tomato tomorrow tunnel turtle umbrella vacuum valley vanilla velvet village volcano
volley wagon walnut water weather whisper willow window winter wizard wonder yellow yoghurt zipper
"""
WORDS = _TEXT.split()


def letter_space() -> Space:
    """Every letter of each word, and the first letter of the alphabet that it lacks.

    A word is a class: its letters never fall into different splits.
    """
    pairs = []
    for number, word in enumerate(WORDS):
        absent = next(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in word)
        pairs += [(number, letter) for letter in sorted({*word, absent})]

    def question(index: int) -> Question:
        number, letter = pairs[index]
        return Question(letter, WORDS[number], WORDS[number].count(letter))

    return Space(np.array([number for number, _ in pairs]), question)


def load_letter_count(
    split: Split, *, count: int | None, seed: int, options: Mapping[str, Any] | None
) -> list[Prompt]:
    """Prompts of task "letter_count"; the ground truth is the number in digits."""
    task = "letter_count"
    parsed = parse_options(FewShotOptions, options, task)
    template = parsed.template or TEMPLATE
    return few_shot_prompts(task, letter_space(), split, parsed, template, count=count, seed=seed)
