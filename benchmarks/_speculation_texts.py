"""Texts of `speculation.py`: prompts with replies that repeat them, and questions whose replies do not."""

from __future__ import annotations

__all__ = ["PLAIN", "REPEATING"]

_CODE = """class Inventory:
    def __init__(self):
        self.items = {}

    def add(self, name, count):
        if count <= 0:
            raise ValueError("count must be positive")
        self.items[name] = self.items.get(name, 0) + count

    def remove(self, name, count):
        if self.items.get(name, 0) < count:
            raise ValueError("not enough items")
        self.items[name] -= count

    def total(self):
        return sum(self.items.values())
"""

_EDITED = _CODE.replace("count", "amount").replace("    def total(self):\n", "    def total_items(self) -> int:\n")

_REPORT = (
    "The harbour was closed on Monday after two barges collided near the northern pier. Nobody was hurt, but about "
    "four hundred litres of diesel leaked into the water. The fire brigade laid a floating barrier within the hour and "
    "pumped out most of the fuel by the evening. The harbour master said that the fog had been thicker than forecast "
    "and that both crews had followed the rules. Ferries to the islands will run again from Wednesday morning."
)

_SUMMARY = (
    'Two ships met in the fog: the report says that "two barges collided near the northern pier" and that "nobody was '
    'hurt, but about four hundred litres of diesel leaked into the water". Firefighters reacted fast; they "laid a '
    'floating barrier within the hour and pumped out most of the fuel by the evening". Nobody is blamed: "the fog had '
    'been thicker than forecast and both crews had followed the rules". Ferries "will run again from Wednesday '
    'morning".'
)

_PEOPLE = (
    ("Ada Martin", "ada.martin@example.org", "Lyon", 34),
    ("Ben Okafor", "ben.okafor@example.org", "Lagos", 51),
    ("Chen Wei", "chen.wei@example.org", "Chengdu", 27),
    ("Dora Novak", "dora.novak@example.org", "Brno", 45),
)
_LIST = "\n".join(f"{name}, {mail}, lives in {city}, aged {age}" for name, mail, city, age in _PEOPLE)
_JSON = (
    "["
    + ", ".join(
        f'{{"name": "{name}", "email": "{mail}", "city": "{city}", "age": {age}}}' for name, mail, city, age in _PEOPLE
    )
    + "]"
)

REPEATING = {
    "code edit": (f"Call the counts amounts, and annotate total:\n\n{_CODE}", _EDITED),
    "summary with quotes": (f"Summarise with quotes:\n\n{_REPORT}", _SUMMARY),
    "JSON": (f"Write this list as JSON:\n\n{_LIST}", _JSON),
    "proofreading": (f"Correct the spelling:\n\n{_REPORT.replace('harbour', 'harbuor')}", _REPORT),
}
"""Name -> prompt and reply. The reply is enforced, so that any model gives it."""

PLAIN = (
    "What is the capital of France, and what is it known for?",
    "Explain in simple words how a bicycle stays upright.",
    "Write a short letter to a friend about a rainy day.",
    "Tell me how bread is made, from the field to the oven.",
    "Why is the sky blue, and red in the evening?",
    "Describe a walk through a market in the morning.",
    "What should I pack for a week in the mountains?",
    "Write a story about a lighthouse keeper and a whale.",
    "Compare cats and dogs as pets for a small flat.",
    "Give advice to somebody who starts to learn the violin.",
)
"""Questions that the model answers in its own words."""
