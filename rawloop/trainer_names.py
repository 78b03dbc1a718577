"""Answers for people who type a name of HF Trainer, PEFT or the scripts for Higgs Audio as a key. Needs no torch."""

from types import MappingProxyType

from rawloop.translation.higgs import HIGGS
from rawloop.translation.lora import LORA
from rawloop.translation.rules import Rule
from rawloop.translation.trainer_more import MORE_TRAINER

GROUPS = ("optim",)  # a group of keys here: another mistake in it is not answered with HF Trainer's setting
# A key alone would mislead: the value is another here.
TOLD = ("disable_tqdm", "eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy")


def _rules() -> dict[str, Rule]:
    """Return the rules of names that are no keys here, even without their group."""
    lora = {name: rule for name, rule in {**LORA.rules, **HIGGS.rules}.items() if name.startswith("lora_")}
    named = lora | dict(MORE_TRAINER.rules)
    ours = {key.rpartition(".")[2] for rule in named.values() for key in rule.keys}
    return {name: rule for name, rule in named.items() if name not in (*ours, *GROUPS)}


RULES = MappingProxyType(_rules())
# Names of HF Trainer and PEFT -> the key here.
HF_NAMES = MappingProxyType({name: rule.keys[0] for name, rule in RULES.items() if rule.keys and name not in TOLD})
# Names of HF Trainer -> why there is no such key here.
NO_COUNTERPART = MappingProxyType({name: rule.words for name, rule in RULES.items() if not rule.keys or name in TOLD})
# Flags of scripts for Higgs Audio v2 that HF Trainer does not have -> the key here.
SCRIPT_NAMES = MappingProxyType(
    {name: rule.keys[0] for name, rule in HIGGS.rules.items() if rule.keys and name not in RULES}
)
