"""What runs wrote before, as it is written now: the only place that knows old keys."""

from typing import Any

Content = dict[str, Any]


def upgrade_state(state: Content) -> Content:
    """A checkpoint's state.json. Before, its metrics were "told", and a recipe did not name its task."""
    meta = dict(state["meta"])
    if "recipe" in meta:
        meta["recipe"] = upgrade_recipe(meta["recipe"])
    if "told" in meta:
        meta["metrics"] = [
            {"step": each["at"], "values": each["metrics"], "milliseconds": each["milliseconds"]}
            for each in meta.pop("told")
        ]
    return {**state, "meta": meta}


def upgrade_recipe(recipe: Content) -> Content:
    """A recipe in run.json or state.json. Before, only recipes of captioning had a decoder, and none named its task."""
    return {"task": "captioning" if "decoder" in recipe else "classification", **recipe}
