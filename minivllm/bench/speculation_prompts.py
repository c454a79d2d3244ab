"""What a lookup is good for and what it is not: texts to be copied with an edit, and texts to be summarised."""

TEXTS = {
    "harbour": "The harbour of Ostby was built in 1874. Every morning the boats leave before sunrise, and every "
    "evening the crews come back with herring and cod. The market on the quay opens at six. People from the town buy "
    "fish there, and what is left goes by train to the city. In winter the harbour freezes, and the crews mend their "
    "nets in the long hall behind the market.",
    "garden": "Our garden lies behind the school. In April the children sow carrots, peas and sunflowers, and each "
    "class waters its own bed. Last summer it hardly rained, so we dug a pond that keeps the water of the roof. Frogs "
    "came by themselves. In September everybody cooks soup together, and the seeds of the best plants are kept in "
    "paper bags for the next year.",
    "bridge": "The old bridge over the river Lenn was closed in March because two of its pillars had moved. Engineers "
    "measured it for six weeks. They found that the flood of the year before had washed away the gravel under the "
    "pillars. The town will repair the bridge next summer, which will cost nine million euros. Until then a small "
    "ferry carries people and bicycles, but cars must take the road through the hills.",
    "clock": "Grandfather's clock stood in the hall for forty years. It struck every hour, and nobody in the house "
    "heard it any more. One night in January it stopped, and all of us woke up. My sister opened the door of the case "
    "and found a mouse asleep on the weight. We carried the mouse to the barn, pushed the pendulum, and slept.",
}
EDITED = {
    "harbour": ("harbour", "port"), "garden": ("garden", "orchard"), "bridge": ("bridge", "tower"),
    "clock": ("mouse", "kitten"),
}  # fmt: skip
MISSPELT = {
    "every": "evry", "because": "becaus", "people": "peple", "water": "watter", "year": "yaer", "night": "nihgt",
}  # fmt: skip
CODE = (
    "def total_price(items, tax):\n    total = 0\n    for item in items:\n        price = item.price * item.count\n"
    "        total = total + price\n    return total * (1 + tax)\n"
)


def _misspelt(text: str) -> str:
    for right, wrong in MISSPELT.items():
        text = text.replace(right, wrong)
    return text


def _of(name: str, text: str) -> dict[str, tuple[str, str]]:
    word, other = EDITED[name]
    return {
        f"replace a word: {name}": (
            "edit", f"Repeat the following text exactly, but replace the word {word} with {other}.\n\n{text}"
        ),
        f"copy: {name}": ("edit", f"Repeat the following text exactly, word for word.\n\n{text}"),
        f"fix the spelling: {name}": (
            "edit", f"Fix the spelling mistakes in this text and return all of it.\n\n{_misspelt(text)}"
        ),
        f"in two sentences: {name}": ("summarise", f"Summarise the following text in two sentences.\n\n{text}"),
        f"main points: {name}": ("summarise", f"List the main points of the following text.\n\n{text}"),
    }  # fmt: skip


# Name of a prompt: (kind, prompt). None of them trained a draft.
PROMPTS: dict[str, tuple[str, str]] = {
    "rename in code": (
        "edit",
        f"Write this function again, with the name total_cost instead of total_price.\n\n```python\n{CODE}```",
    )
} | {label: entry for name, text in TEXTS.items() for label, entry in _of(name, text).items()}
