"""Optimizers and quantised bases of other programs, and what they are here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rawloop.translation.rules import Convert, Found, Given, Rule, changed, missing, nothing, sets, switch

ADAMW = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla"}
OPTIMIZERS = "'optim.name' is adamw, adamw_8bit, paged_adamw_8bit, adafactor, lion, muon or schedule_free"
OTHER = f"there is none; {OPTIMIZERS}"
BITS_32 = "its state is in 32 bits here"
# The names of HF Trainer -> ours, and what is different.
NAMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "adamw_8bit": ("adamw_8bit", ""),
        "adamw_bnb_8bit": ("adamw_8bit", ""),
        "adamw_torch_8bit": ("adamw_8bit", "bitsandbytes', not torchao's"),
        "paged_adamw_8bit": ("paged_adamw_8bit", ""),
        "adafactor": (
            "adafactor",
            "here an update is 'optim.lr' times the rms of each tensor's weights, there 'optim.lr' alone: choose it "
            "anew, such as 1e-3",
        ),
        "lion_32bit": ("lion", ""),
        "lion_8bit": ("lion", BITS_32),
        "muon": ("muon", "embeddings, heads and vectors by AdamW, at the same learning rate"),
        "schedule_free_adamw": ("schedule_free", "'optim.schedule' becomes constant"),
    }
)
LOADED = "the frozen linear layers are quantised"
NESTED = "there is none; the scales are not quantised again: 4.5 bits a weight"
NEAREST = "'model.quantization' is nf4 or int8"
ONLY = f"there is none; {NEAREST}"


def word(value: Any) -> str:
    """Return a value as a plain word: `IntervalStrategy.STEPS` as `steps`."""
    return str(value).rpartition(".")[2].lower()


def optimizer(value: Any, _: Given) -> Found:
    """HF Trainer's optim."""
    name = word(value)
    if name in ADAMW:
        return nothing("AdamW, as here")
    if name in ("paged_adamw_32bit", "paged_adamw"):
        return nothing("AdamW, whose state stays on the GPU here")
    ours, words = NAMES.get(name, ("", ""))
    return sets(words, optim__name=ours) if ours else missing(OPTIMIZERS)


def is_schedule_free(values: Given) -> bool:
    """Whether the optimizer of HF Trainer or axolotl averages weights, and so needs a constant learning rate."""
    return word(values.get("optim") or values.get("optimizer") or "") == "schedule_free_adamw"


def optimizer_rule(name: str) -> Rule:
    """Return the rule of the setting that names the optimizer."""
    return changed(name, "optim.name", optimizer, f"{OPTIMIZERS}; AdamW is the default", "adamw_torch_fused")


def bits(method: str) -> Convert:
    """Return the convert of a number of bits; `method` is the setting that names the library."""

    def convert(value: Any, values: Given) -> Found:
        if not value:
            return nothing()
        name = {"4": "nf4", "8": "int8"}.get(str(value))
        known = word(values.get(method) or "bnb") in ("bnb", "bitsandbytes")
        return sets(LOADED, model__quantization=name) if name and known else missing(NEAREST)

    return convert


def quant_type(value: Any, _: Given) -> Found:
    """bnb_4bit_quant_type: nf4 or fp4."""
    return nothing("as here") if value in (None, "nf4") else missing(NEAREST)


def loading_rules() -> list[Rule]:
    """Return the rules of load_in_4bit, load_in_8bit and use_4bit, each with its name in some program."""
    return [
        changed("load_in_4bit", "model.quantization", switch(LOADED, model__quantization="nf4"), "nf4", False),
        changed("load_in_8bit", "model.quantization", switch(LOADED, model__quantization="int8"), "int8", False),
        changed("use_4bit", "model.quantization", switch(LOADED, model__quantization="nf4"), "nf4", False),
    ]
