"""Options of commands without a config: words that stand alone, flags, several values, and all mistakes at once."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from rawloop.errors import Mistakes, UserError
from rawloop.parser import read_options
from rawloop.settings import SamplingConfig


@dataclass
class Options:
    """What is done.

    Args:
        source: what to read.
        output: what to write.
        others: more of them.
        size: how large.
        dtype: in which type.
        force: whether it is done all the same.
        part: of our own processes.
        sampling: how tokens are drawn.
    """

    source: str
    output: str
    others: list[str] = field(default_factory=list)
    size: int = 3
    dtype: Literal["a", "b"] = "a"
    force: bool = False
    part: str | None = field(default=None, metadata={"hidden": True})
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UserError(f"--size is {self.size}: it must be 0 or more")


def read(*words: str) -> Any:
    return read_options("rawloop x", Options, words, "source", {"base": "sampling.top_p", "sampling": "dtype"})


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*words)
    return str(caught.value)


def test_options_are_read_in_any_order() -> None:
    plain = Options("in", "out")
    assert read("in", "--output", "out") == read("--output=out", "in") == plain
    assert read("--force", "in", "--output", "out", "--size=-0") == Options("in", "out", size=0, force=True)
    found = read("in", "--others", "p", "q", "--output", "-x", "--dtype", "b", "--sampling.top_k", "5")
    assert found == Options("in", "-x", ["p", "q"], dtype="b", sampling=SamplingConfig(top_k=5))
    assert read("in", "--output", "a", "--output", "b").output == "b"
    assert read("in", "--output", "a", "--part", "p").part == "p"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["in"], "--output must be given; `rawloop x --help` lists all options"),
        ([], "SOURCE and --output must be given; `rawloop x --help` lists all options"),
        (["in", "--output"], "--output needs a value after it"),
        (["in", "--output=o", "more"], "'more' stands alone on the command line: an option has a name, --NAME VALUE"),
        (["in", "--output=o", "--force=1"], "--force takes no value: write it alone"),
        (["in", "--output=o", "--size", "x"], "--size is 'x': it must be a whole number"),
        (["in", "--output=o", "--size", "-1"], "--size is -1: it must be 0 or more"),
        (["in", "--output=o", "--dtype", "c"], "--dtype is 'c': it must be one of 'a', 'b'"),
        (["in", "--output=o", "--dtype"], "--dtype needs a value after it: one of 'a', 'b'"),
        (["in", "--output=o", "--others"], "--others needs a value after it"),
        (
            ["in", "--output=o", "--sampling.top_k", "x"],
            "sampling.top_k is 'x' (from the command line): it must be a whole number",
        ),
        (
            ["in", "--output=o", "--sampling.top_p", "2"],
            "sampling.top_p is 2.0: it must be above 0 and at most 1 (sampling.top_p from the command line)",
        ),
        (["in", "--output=o", "--ouput=p"], "unknown option '--ouput' (did you mean '--output'?)"),
        (["in", "--output=o", "--base=1"], "unknown option '--base' (did you mean '--sampling.top_p'?)"),
        (["in", "--output=o", "--sampling=1"], "unknown option '--sampling' (did you mean '--dtype'?)"),
        (["in", "--output=o", "--prat=1"], "unknown option '--prat'"),  # what is hidden is not suggested
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str) -> None:
    assert refusal(*words) in (line, f"{line}: `rawloop x --help all` lists all options")


def test_what_a_misspelt_option_may_have_been_is_not_missed() -> None:
    line = "unknown option '--sze' (did you mean '--size'?): `rawloop x --help all` lists all options"
    assert refusal("in", "--output=o", "--sze=3", "--size=-1") == line


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(Mistakes) as caught:
        read("a", "b", "--size=x", "--froce", "--sampling.top_p=0")
    assert str(caught.value).splitlines() == [
        "5 mistakes (`rawloop x --help all` lists all options):",
        "  --size is 'x': it must be a whole number",
        "  unknown option '--froce' (did you mean '--force'?)",
        "  'b' stands alone on the command line: an option has a name, --NAME VALUE",
        "  --output must be given; `rawloop x --help` lists all options",
        "  sampling.top_p is 0.0: it must be above 0 and at most 1 (sampling.top_p from the command line)",
    ]
